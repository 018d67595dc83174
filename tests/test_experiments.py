"Experiment notebooks, executed on a random backbone of a hundred words: that they run, and where they write."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill as pm
import pytest

from lexical_sae.testing import tiny_checkpoint, tiny_texts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from run_experiment import KERNEL                                        # noqa: E402

def execute(notebook, folder, monkeypatch, **parameters):
    "One notebook with papermill; what it wrote under `folder`/runs/toy."
    monkeypatch.setenv('JUPYTER_PATH', str(Path(sys.prefix)/'share/jupyter'))
    pm.execute_notebook(str(ROOT/f'nbs/experiments/{notebook}.ipynb'), str(folder/'executed.ipynb'), dict(experiment_name='toy', output_dir=str(folder/'runs')) | parameters, cwd=str(ROOT), **KERNEL)
    return folder/'runs/toy'

def write_csv(path, seed):
    "Half of the texts say good, the other half bad."
    path.parent.mkdir(parents=True)
    path.write_text('text,label\n' + ''.join(f'a {("bad", "good")[i % 2]} film {t},{("neg", "pos")[i % 2]}\n' for i, t in enumerate(tiny_texts(60, seed))))
    return str(path)

@pytest.fixture
def backbone(tmp_path): return tiny_checkpoint(tmp_path/'backbone', num_hidden_layers=1)

TOGETHER = '''
import sys; sys.path.insert(0, sys.argv[1])
import papermill as pm
from run_experiment import KERNEL
pm.execute_notebook('both.ipynb', sys.argv[2], **KERNEL)
'''

@pytest.mark.slow
def test_two_experiments_run_side_by_side_in_one_folder(tmp_path):
    "A batch of runs shares its checkout: each hears its own kernel alone."
    cells = [nbformat.v4.new_code_cell('import time; time.sleep(1)') for _ in range(3)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), tmp_path/'both.ipynb')
    runs = [subprocess.Popen([sys.executable, '-c', TOGETHER, ROOT/'tools', f'{i}.ipynb'], cwd=tmp_path, env=os.environ | dict(JUPYTER_PATH=str(Path(sys.prefix)/'share/jupyter')), stderr=subprocess.PIPE, text=True)
            for i in range(2)]
    failed = [err for run in runs if (err := run.communicate(timeout=120)[1]) and run.returncode]
    assert not failed, failed[0][-600:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['0.ipynb', '1.ipynb', 'both.ipynb']             # and no socket is left beside them

SHORT = dict(max_steps=4, warmup_steps=1, logging_steps=1, bf16=False, use_cpu=True)

@pytest.mark.slow
def test_datasets_named_by_paths_stay_apart_in_the_output_folder(tmp_path, backbone, monkeypatch):
    "Two files that are called the same, each in a folder of its own."
    files = [write_csv(tmp_path/f'{where}/mine.csv', seed) for seed, where in enumerate('ab')]
    theirs = sorted(p for p in tmp_path.glob('[ab]/*'))
    out = execute('multi_dataset', tmp_path, monkeypatch, dataset_name=', '.join(files), model_name=backbone, learning_rate=5e-3, batch_size=8, active_targets={files[0]: 20.},
                  max_lengths={f: 24 for f in files}, training=SHORT, model=dict(check=False, initial_words=40, classifier_hidden=8))
    assert sorted(p for p in tmp_path.glob('[ab]/*')) == theirs             # nothing beside the user's data
    folders = [p.name for p in out.iterdir() if p.is_dir()]
    assert len(folders) == 6 and all(f.startswith('mine-') and f.endswith(('_lexical_seed0', '_dense_seed0', '_twin_seed0')) for f in folders)
    found = json.loads((out/'results.json').read_text())
    assert len(found['metrics']) == len(found['data']['sizes']) == 2 and str(tmp_path) not in (out/'results.json').read_text()
    assert all(m['identity_error'] <= 1e-5 and 'difference_to_dense' in m for m in found['metrics'].values())

def run_cells(notebook, upto, **parameters):
    "The code of a notebook up to the cell that has `upto`, in this process; its names."
    names = {}
    for cell in json.loads((ROOT/f'nbs/experiments/{notebook}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        exec(''.join(cell['source']), names)
        if 'parameters' in cell['metadata'].get('tags', []): names |= parameters
        if upto in ''.join(cell['source']): return names

@pytest.mark.slow
def test_a_parameter_file_can_ask_for_the_best_grounded_model(tmp_path):
    "A validation share, how often it is looked at, and the patience reach the trainer; what was chosen is in the results."
    file = write_csv(tmp_path/'mine/mine.csv', 0)
    names = run_cells('classification', "metrics['choice'] =", experiment_name='toy', output_dir=str(tmp_path/'runs'), dataset_name='mine', source=file, max_length=24, batch_size=8, num_train_epochs=1,
                      warmup_steps=1, dense=False, positive_class=None, validation_share=.25, evaluations=3, patience=4)
    args, setup = names['trained'].trainer.args, names['setup']
    assert len(setup.tokens['validation']) > 5 and args.load_best_model_at_end and args.patience == 4
    assert names['metrics']['choice']['evaluations'] >= 2 and names['parameters'].items() >= dict(validation_share=.25, evaluations=3, patience=4).items()
