"Killed at any moment, a run goes on from its last whole checkpoint, on the path of the uninterrupted one."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_processes import ENV, ROOT, RUN, ended, start

OPTIONS = ('dropout=0.1', 'save_strategy="steps"', 'save_steps=7', 'logging_steps=1')

def kill(folder, *options, script=RUN):
    "Start a run, wait until it says that it is where it should die, and kill it there."
    process = subprocess.Popen([sys.executable, str(script), str(folder), *options], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if (folder/'reached').exists() or process.poll() is not None: break
            time.sleep(.1)
    finally:
        process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL and (folder/'reached').exists(), err.decode()[-2000:]

def same_path(a, b):
    assert [h['step'] for h in a['log']] == [h['step'] for h in b['log']] == list(range(1, 25))
    assert max(h['lambda'] for h in a['log']) > 1.05                     # the constraint has a price, so that its path can differ
    for k in ('ce', 'lambda', 'active', 'anchor'): assert [h[k] for h in a['log']] == pytest.approx([h[k] for h in b['log']], rel=1e-5), k
    assert a['weights'] == pytest.approx(b['weights'], rel=1e-5) and a['active'] == pytest.approx(b['active'], rel=1e-6)
    for k, v in a['method'].items(): assert v == pytest.approx(b['method'][k], rel=1e-4, abs=1e-6), k

@pytest.mark.slow
@pytest.mark.parametrize('optim, sampling', [('adamw_torch_fused', 'group_by_length'), ('schedule_free_adamw', 'random')])
def test_a_killed_run_goes_on(tmp_path, optim, sampling):
    options = (*OPTIONS, 'uneven=true', f'optim={json.dumps(optim)}', f'train_sampling_strategy={json.dumps(sampling)}')
    run = start(tmp_path/'whole', *options)
    assert not run.returncode, run.stderr[-3000:]
    for name, stop, left in (('step', 'stop_at_step=12', ['checkpoint-7']), ('checkpoint', 'stop_in_checkpoint=14', ['checkpoint-7'])):
        folder = tmp_path/name
        kill(folder, *options, stop)
        assert sorted(p.name for p in folder.glob('checkpoint-*')) == left              # what was half written has no name that a resume picks up
        assert (folder/'.unfinished').exists() == (name == 'checkpoint')
        run = start(folder, *options)
        assert not run.returncode, run.stderr[-3000:]
        same_path(ended(tmp_path/'whole'), ended(folder))
        assert not (folder/'.unfinished').exists()

SET_UP = ROOT/'tests/setup_run.py'

@pytest.mark.slow
@pytest.mark.parametrize('options, left', [((), {'checkpoint-17'}), (('validation_share=0.2', 'evaluations=5'), {'checkpoint-8', 'checkpoint-16'})], ids=['defaults', 'validation'])
def test_a_killed_call_goes_on(tmp_path, options, left):
    "All of `setup_and_train`: head start, dense teacher, associations, the level of the thresholds, the choice on validation; without one, the last epoch's checkpoint is there."
    run = start(tmp_path/'whole', *options, script=SET_UP)
    assert not run.returncode, run.stderr[-3000:]
    kill(tmp_path/'killed', *options, 'stop_at_step=20', script=SET_UP)
    found = {p.name for p in (tmp_path/'killed/run/checkpoints').glob('checkpoint-*')}
    assert found and found <= left
    run = start(tmp_path/'killed', *options, script=SET_UP)
    assert not run.returncode, run.stderr[-3000:]
    a, b = ended(tmp_path/'whole'), ended(tmp_path/'killed')
    assert b['begun_at'] == max(int(name.split('-')[1]) for name in found) and not a['begun_at']
    assert max(h['lambda'] for h in a['log'] if 'lambda' in h) > 1.05 and {'distillation', 'association_agreement', 'anchor', 'completeness', 'band'} <= set().union(*a['log'])
    assert [h['step'] for h in a['log']] == [h['step'] for h in b['log']] and a['chosen'] == b['chosen']
    for x, y in zip(a['log'][:-1], b['log'][:-1]): assert x == pytest.approx(y, rel=1e-5, abs=1e-7), x['step']
    assert a['weights'].keys() == b['weights'].keys()
    for name, weight in a['weights'].items(): assert weight == pytest.approx(b['weights'][name], rel=1e-5, abs=1e-7), name
    assert [p.name for p in (tmp_path/'killed/run').iterdir()] == ['model']              # what was kept for the resume is gone
