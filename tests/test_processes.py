"Two processes train as one: what the method keeps is identical on each, and equal to a single process on the same global batch."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT/'tests/training_run.py'
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', TOKENIZERS_PARALLELISM='false')

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def start(folder, *options, processes=1, script=RUN):
    launch = [sys.executable, script] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(processes),
        '--master-addr', '127.0.0.1',
                                                           '--master-port', str(free_port()), script]
    return subprocess.run([*map(str, launch), str(folder), *options], capture_output=True, text=True, env=ENV, timeout=240)

def ended(folder, rank=0): return json.loads((Path(folder)/f'ends{rank}.json').read_text())

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process with batches of 16, and two with batches of 8 that also write checkpoints."
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    for run in (start(one, 'held_out=27'),
                start(two, 'per_device_train_batch_size=8', 'held_out=27', 'save_strategy="steps"', 'save_steps=6', 'save_total_limit=2',
                    'ddp_backend="gloo"', processes=2)):
        assert not run.returncode, run.stderr[-3000:]
    return one, two

@pytest.mark.slow
def test_state_is_identical_on_each_process(runs):
    a, b = ended(runs[1], 0), ended(runs[1], 1)
    assert {'geco.log_lambda', 'geco.tau', 'centroids.centroids', 'frequencies.frequency', 'frequencies.start', 'margin.margin'} <= set(a['method'])
    assert a['log'] == b['log']                                          # a term is the mean over both, not the first one's own
    assert a['method'] == b['method'] and a['active'] == b['active'] and a['step'] == b['step'] == 24
    assert a['weights'] == b['weights']
    assert {k: a['evaluation'][k] for k in ('eval_ce', 'eval_active', 'eval_reference_share')} == {k: b['evaluation'][k] for k in ('eval_ce',
        'eval_active', 'eval_reference_share')}

@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_global_batch(runs):
    one, two = ended(runs[0]), ended(runs[1])
    assert one['method'].keys() == two['method'].keys()
    for k in ('geco.log_lambda', 'geco.tau', 'geco.gap', 'frequencies.start', 'frequencies.frequency', 'centroids.centroids'):
        assert two['method'][k] == pytest.approx(one['method'][k], rel=2e-3, abs=2e-3), k
    assert two['active'] == pytest.approx(one['active'], rel=1e-3)
    assert two['weights'] == pytest.approx(one['weights'], rel=1e-3, abs=1e-3)
    assert [h['lambda'] for h in two['log']] == pytest.approx([h['lambda'] for h in one['log']], rel=1e-3)
    assert max(h['lambda'] for h in one['log']) > 1.05
    assert any('band' in h for h in two['log'])                          # the term that is a logarithm of a mean was on
    for k in ('ce', 'anchor', 'evidence', 'completeness', 'active'):
        assert [h[k] for h in two['log'] if k in h] == pytest.approx([h[k] for h in one['log'] if k in h], rel=2e-3, abs=1e-4), k
    for k in ('eval_ce', 'eval_accuracy', 'eval_active', 'eval_reference_share'):    # of 27 texts: the last batches are filled up with others
        assert two['evaluation'][k] == pytest.approx(one['evaluation'][k], rel=1e-3, abs=1e-4), k

@pytest.mark.slow
def test_two_processes_write_whole_checkpoints_and_resume(runs):
    folder = runs[1]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ['checkpoint-18', 'checkpoint-24']        # the limit is kept
    files = {p.name for p in (folder/'checkpoint-18').iterdir()}
    assert {'method.safetensors', 'model.safetensors', 'optimizer.pt', 'rng_state_0.pth', 'rng_state_1.pth', 'trainer_state.json'} <= files
    whole = ended(folder)
    for f in (folder/'checkpoint-24').iterdir(): f.unlink()
    (folder/'checkpoint-24').rmdir()
    run = start(folder, 'per_device_train_batch_size=8', 'held_out=27', 'save_strategy="steps"', 'save_steps=6', 'save_total_limit=2',
        'ddp_backend="gloo"', processes=2)
    assert not run.returncode, run.stderr[-3000:]
    again = ended(folder)
    assert [h['ce'] for h in again['log']] == pytest.approx([h['ce'] for h in whole['log']], rel=1e-4)
    assert again['method']['geco.log_lambda'] == pytest.approx(whole['method']['geco.log_lambda'], rel=1e-5)

@pytest.mark.slow
def test_thresholds_do_not_part_where_processes_count_differently(tmp_path):
    "Each process watches texts of its own here, as if its arithmetic differed: the level follows what they open together."
    run = start(tmp_path/'two', 'per_device_train_batch_size=8', 'held_out=27', 'own_held_out=true', 'ddp_backend="gloo"', processes=2)
    assert not run.returncode, run.stderr[-3000:]
    a, b = ended(tmp_path/'two', 0), ended(tmp_path/'two', 1)
    assert a['method']['level.log_ratio'] == b['method']['level.log_ratio'] and a['weights'] == b['weights']

TAUGHT = ('taught=true', 'associated=true', 'class_weights=[1.0, 5.0]')

@pytest.mark.slow
@pytest.mark.parametrize('parts', [('per_device_train_batch_size=8',), ('per_device_train_batch_size=4', 'gradient_accumulation_steps=2')], ids=['processes', 'processes and batches'])
def test_the_teacher_and_weighted_classes_are_the_same_on_two_processes(tmp_path, parts):
    "Also where a step is several batches; then without what is a logarithm, or a bias, of each batch's mean."
    apart = ('band_weight=0.0', 'evidence_share=0.0', 'reference_share=0.0') if len(parts) > 1 else ()
    one, two = start(tmp_path/'one', *TAUGHT, *apart), start(tmp_path/'two', *TAUGHT, *apart, *parts, 'ddp_backend="gloo"', processes=2)
    assert not one.returncode and not two.returncode, one.stderr[-3000:] + two.stderr[-3000:]
    one, two = ended(tmp_path/'one'), ended(tmp_path/'two')
    for k in ('ce', 'distillation', 'association_agreement', 'anchor', 'completeness', 'active', 'lambda'):
        assert len([h for h in one['log'] if k in h]) > 10
        assert [h[k] for h in two['log'] if k in h] == pytest.approx([h[k] for h in one['log'] if k in h], rel=2e-3, abs=1e-4), k
    assert two['weights'] == pytest.approx(one['weights'], rel=1e-3, abs=1e-3)

@pytest.mark.slow
def test_each_process_reads_its_share_of_one_order(tmp_path):
    "Batches of texts alike in length, and dropout: the processes' random numbers drift apart, the order of the texts does not."
    run = start(tmp_path/'two', 'per_device_train_batch_size=8', 'train_sampling_strategy="group_by_length"', 'uneven=true', 'dropout=0.1', 'max_steps=18',
        'ddp_backend="gloo"', processes=2)
    assert not run.returncode, run.stderr[-3000:]
    a, b = ended(tmp_path/'two', 0)['read'], ended(tmp_path/'two', 1)['read']
    epochs = [sorted(i for batch in a[e:e + 6] + b[e:e + 6] for i in batch) for e in (0, 6, 12)]
    assert epochs == [list(range(96))]*3

SET_UP = """
import os
import sys
import pandas as pd
import torch
from transformers import AutoTokenizer
from lexical_sae.data import offline_backbone
from lexical_sae.arms import run_arm
from lexical_sae.setup_training import TrainingConfig
from lexical_sae.testing import tiny_checkpoint
folder, rank = sys.argv[1], os.environ['RANK']
mine = tiny_checkpoint(f'{folder}/backbone{rank}', AutoTokenizer.from_pretrained(offline_backbone()), num_hidden_layers=1, intermediate_size=16,
                       max_position_embeddings=32, initializer_range=.3)
pd.DataFrame([dict(text=f'a {w} film with plot and {w} number {i}', label='pos' if j < 3 else 'neg')
              for i in range(12) for j, w in enumerate(['good', 'fine', 'great', 'bad', 'poor', 'dull'])]).to_csv(f'{folder}/mine{rank}.csv', index=False)
training = dict(max_steps=10, warmup_steps=2, logging_steps=5, bf16=False, ddp_backend='gloo', use_cpu=True)
config = TrainingConfig(active_target=40., anchor_margin=4., dataset_name='mine', source=f'{folder}/mine{rank}.csv', model_name=mine, output_dir=f'{folder}/arm',
    validation_share=.2, evaluations=2, learning_rate=5e-3, batch_size=8, training=training, model=dict(initial_words=60, classifier_hidden=8, check=False))
found = run_arm(config, 'small', positive_class='pos')
print('ended', found['metrics']['accuracy'], found['metrics']['active_dims'], found['metrics']['reference_share'], flush=True)
torch.distributed.destroy_process_group()
"""

@pytest.mark.slow
def test_one_call_trains_and_measures_on_two_processes(tmp_path):
    "On few held-out texts one process has none of its own to judge."
    (tmp_path/'run.py').write_text(SET_UP)
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-addr', '127.0.0.1', '--master-port', str(free_port()),
                          str(tmp_path/'run.py'), str(tmp_path)], capture_output=True, text=True, env=ENV, timeout=240)
    assert not run.returncode, run.stderr[-3000:]
    ended = [line for line in run.stdout.splitlines() if line.startswith('ended')]
    assert len(ended) == 2 and len(set(ended)) == 1
    assert sorted(p.name for p in (tmp_path/'arm').iterdir()) == ['results.json', 'right.json']
