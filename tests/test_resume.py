"Killed at any moment, a run goes on from its last whole checkpoint, on the path of the uninterrupted one."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_processes import ENV, RUN, ended, start

OPTIONS = ('dropout=0.1', 'save_strategy="steps"', 'save_steps=7', 'logging_steps=1')

def kill(folder, *options):
    "Start a run, wait until it says that it is where it should die, and kill it there."
    process = subprocess.Popen([sys.executable, str(RUN), str(folder), *options], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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
