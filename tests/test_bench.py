"The benchmark of a training step: that it times a whole one, and that its page says what was measured."
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import Trainer

from lexical_sae.grounding import FrozenReference
from lexical_sae.train import LexicalTrainer

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='module')
def bench():
    spec = importlib.util.spec_from_file_location('bench_step', ROOT/'tools/bench_step.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

@pytest.mark.slow
def test_what_is_timed_is_a_whole_step(bench, monkeypatch, capsys):
    "Clipping and the dual step included; the reference reads a batch once of the two times that it is trained on."
    calls = Counter()
    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.update([name]), original(*args, **kwargs))[1])
    for owner, name in ((Trainer, 'training_step'), (Trainer, '_clip_grad_norm'), (LexicalTrainer, 'dual_step'), (LexicalTrainer, '_held_out_active'), (FrozenReference, 'encode')): count(owner, name)
    bench.main('tiny', 'native', '50', '1')
    found = json.loads(capsys.readouterr().out)
    assert calls == dict(training_step=6, _clip_grad_norm=6, dual_step=4, _held_out_active=2, encode=2)
    assert {'ce', 'distillation', 'anchor', 'evidence', 'completeness', 'band'} <= set(found['terms'])
    assert found['lexical_seconds'] > found['look_seconds']/found['look_every'] > 0 and found['ratio'] == pytest.approx(found['lexical_seconds']/found['dense_seconds'], rel=.01)

def test_the_page_says_what_is_met(bench, tmp_path):
    step = dict(backbone='bert-base', dtype='float32', words=49, dense_seconds=20., ratio=1.25, ratio_first_epoch=1.31)
    for name, r in dict(a=step, b=step | dict(backbone='offline', ratio=1.7, ratio_first_epoch=1.5)).items(): (tmp_path/f'step_{name}.json').write_text(json.dumps(r))
    bench.readme(tmp_path)
    first, second = (line.split(' | ') for line in (tmp_path/'README.md').read_text().splitlines() if line.startswith(('| bert', '| offline')))
    assert first[:3] == ['| bert-base', '49', 'float32'] and first[-3:] == ['1.25', 'met', 'missed by 0.06 |'] and second[-3:] == ['1.6', 'missed by 0.10', 'met |']

def test_the_committed_page_is_made_of_the_committed_files(bench, tmp_path):
    for file in (ROOT/'paper/bench').glob('step_*.json'): (tmp_path/file.name).write_text(file.read_text())
    bench.readme(tmp_path); assert (tmp_path/'README.md').read_text() == (ROOT/'paper/bench/README.md').read_text()
