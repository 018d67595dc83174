"Killed at any moment, a run goes on from its last whole checkpoint, on the path of the uninterrupted one."
import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import modeling_utils
from transformers.trainer_callback import PrinterCallback

from lexical_sae import checkpoints
from lexical_sae.train import GatesClosed, LexicalTrainer, LexicalTrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from test_processes import ENV, ROOT, RUN, ended, start
from training_run import collate, model, texts

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')

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

def toy(folder, **given):
    "A trainer in this process that writes a checkpoint every second step."
    settings = dict(max_steps=8, per_device_train_batch_size=16, learning_rate=5e-3, report_to='none', save_strategy='steps', save_steps=2, use_cpu=True, disable_tqdm=True, active_target=4.)
    trainer = LexicalTrainer(model(0.), LexicalTrainingArguments(str(folder), **settings | given), train_dataset=texts(), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer

def closed(folder, **given):
    "A run whose thresholds nothing reaches."
    trainer = toy(folder, save_steps=1, level_rate=0., **given)
    trainer.model.activation.log_theta.data.fill_(20.)
    return trainer

def test_closed_steps_are_counted_over_a_resume(tmp_path):
    closed(tmp_path, max_steps=6).train()
    with pytest.raises(GatesClosed, match='at step 10'): closed(tmp_path, max_steps=20).train(resume_from_checkpoint=str(tmp_path/'checkpoint-6'))

def test_what_was_said_once_is_not_said_again_after_a_resume(tmp_path):
    pinned = dict(target_accuracy=.999, dual_rate=50., warmup_fraction=.2)
    with pytest.warns(UserWarning, match='lambda is pinned'): toy(tmp_path, **pinned).train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        again = toy(tmp_path, **pinned); again.train(resume_from_checkpoint=str(tmp_path/'checkpoint-6'))
    assert again.geco.log_lambda == again.geco.bounds[1] and not [w for w in said if 'pinned' in str(w.message)]

def no_space(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def no_tensors(*args, **kwargs): raise SafetensorError('I/O error: No space left on device (os error 28)')
def half_a_file(state, path, *args, **kwargs):
    "As torch.save ends on a full disk: some bytes, and an error of its own."
    Path(path).write_bytes(b'half'); raise RuntimeError(f'PytorchStreamWriter failed writing file {path}: file write failed')

@pytest.mark.parametrize('owner, name, fails', [(modeling_utils, 'safe_save_file', no_tensors), (modeling_utils, 'safe_save_file', no_space), (torch, 'save', no_space), (torch, 'save', half_a_file),
                                                (checkpoints, 'save_file', no_tensors)], ids=['weights', 'weights, by the system', 'optimiser', 'half of the optimiser', 'method'])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, owner, name, fails):
    "Wherever in a checkpoint the room runs out; with room again the run goes on from there."
    whole = toy(tmp_path/'whole'); whole.train()
    trainer, write = toy(tmp_path/'full', save_total_limit=1), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (fails if trainer.state.global_step == 6 else write)(*args, **kwargs))
    with pytest.raises(OSError, match='checkpoint of step 6 could not be written .*free some space, then resume; earlier checkpoints are intact'): trainer.train()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/'full').iterdir()] == ['checkpoint-4']
    again = toy(tmp_path/'full'); again.train(resume_from_checkpoint=str(tmp_path/'full/checkpoint-4'))
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.allclose(a, b, atol=1e-6)

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
