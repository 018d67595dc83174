"""Make the figures and tables of the paper: run what is missing or stale, then paper/figures.ipynb.

paper.py          runs, then draws. EXPERIMENT:NAME=VALUE, such as sst2:source=data/sst2, changes one experiment; data=FOLDER reads every data set
                  of which FOLDER has a folder from there. The variable SET may hold them too.
paper.py --list   says what it would run
paper.py --draw   draws from the results that are there
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT/'nbs/experiments'
sys.path.insert(0, str(ROOT/'tools'))
from run_experiment import KERNEL, split_changes                         # noqa: E402
# in this order: later experiments read the models of earlier ones
RUNS = ['demo', 'sst2', 'sst2_20k', 'sst2_20k_seed1', 'sst2_20k_seed2', 'sst2_20k_again', 'sst2_20k_binding', 'ag_news', 'imdb', 'banking77',
        *(f'{x}_exemplars' for x in ('sst2', 'ag_news', 'imdb', 'banking77')), 'ablation', 'ablation_seed1', 'ablation_seed2', 'dense_rates', 'longer', 'sst2_20k_longer', 'robustness',
        'conll2003', *(f'conll2003_4k_{x}' for x in ('seed0', 'seed1', 'seed2', 'free', 'middle', 'tight')),
        'toxicity', 'toxicity_seed1', 'toxicity_seed2', 'toxicity_classifier', 'faithfulness', 'faithfulness_sst2', 'faithfulness_movies', 'faithfulness_toxicity', 'comparison', 'long_context',
        'word_in_context', 'backbones']

READS = {'faithfulness': 'demo', 'faithfulness_sst2': 'sst2', 'faithfulness_movies': 'demo', 'faithfulness_toxicity': 'toxicity_classifier',
         'comparison': 'demo', 'long_context': 'demo'}                                               # experiment -> the one whose model it reads

def state(name: str) -> str:
    "'ready', 'missing', or what makes a committed result stale."
    from lexical_sae.results import read_results
    from lexical_sae.setup_training import training_defaults
    path = ROOT/'paper/results'/f'{name}.json'
    if not path.exists(): return 'missing'
    params, found = yaml.safe_load((ROOT/'paper/params'/f'{name}.yaml').read_text()), read_results(path)
    if name in READS:
        reads = ROOT/'paper/results'/f'{READS[name]}.json'
        if not reads.exists() or found['parameters'].get('weights') != read_results(reads)['parameters'].get('trained_weights'):
            return f'stale (another model of {READS[name]})'
    known = ({} if 'notebook' in params else library_defaults()) | known_of(found)
    changed = [k for k, v in params.items() if k in known and known[k] != v and not (k.endswith('_samples') and v < 0)]     # below 0: all there are
    if 'defaults' in found['parameters']: changed += [k for k, v in training_defaults().items() if found['parameters']['defaults'].get(k, v) != v]     # a knob that came later is off by default, or whoever adds it removes the results that it makes stale
    changed += [k for k in ('arms', 'more_arms', 'evaluate_tiers') if any(not measured(found, name) for name in params.get(k, ()))]
    lacking = [m for m in measures_of(params) if m not in found['metrics']]
    why = [f'{", ".join(names)} {what}' for names, what in ((changed, 'changed'), (lacking, 'not measured')) if names]
    return f'stale ({"; ".join(why)})' if why else 'ready'

def measures_of(params: dict) -> list:
    "What an experiment's notebook says that it always measures (`measures = [...]`): entries of `metrics`, so that results of an earlier notebook can be told. Without such a line nothing is."
    notebook = json.loads((NOTEBOOKS/f"{params.get('notebook', 'classification')}.ipynb").read_text())
    lines = [line for cell in notebook['cells'] if cell['cell_type'] == 'code' for line in ''.join(cell['source']).splitlines()]
    said = [m[1] for line in lines if (m := re.match(r'measures = (\[.*\])', line))]
    return ast.literal_eval(said[0]) if said else []

def library_defaults() -> dict:
    "What a classification run was trained with where its result does not say: a parameter that came later had its default."
    from lexical_sae.setup_training import TrainingConfig
    from lexical_sae.train import LexicalTrainingArguments
    return {f.name: f.default for kind in (LexicalTrainingArguments, TrainingConfig) for f in fields(kind) if f.default is not MISSING and f.name not in ('source', 'output_dir')}

def known_of(found: dict) -> dict:
    "The parameters that a result was made with, as far as it says. Where the data were read from is not kept, only which and how many."
    sizes = {f'{split}_samples': found['data']['sizes'][split] for split in ('train', 'test') if split in found['data'].get('sizes', ())}
    named = {'dataset_name': found['data']['name']} if 'name' in found['data'] else {}
    return dict(model_name=found['backbone']) | sizes | named | found['parameters'] | dict(seed=found['seed'], experiment_name=found['experiment'])

def measured(found: dict, name: str) -> bool:
    "Whether a result holds an arm (of any seed) or a tier; three tiers have no entry of their own."
    return name in ('accuracy', 'identity', 'grounding') or any(m == name or m.startswith(f'{name}, seed ') for m in found['metrics'])

def has_model(name: str) -> bool:
    "Whether the model of a committed result lies in runs: a clone has none, and a run of one's own made another."
    from lexical_sae.results import read_results
    own, kept = ROOT/'runs'/name, ROOT/'paper/results'/f'{name}.json'
    weights = lambda path: read_results(path)['parameters'].get('trained_weights')
    return kept.exists() and (own/'model').is_dir() and (own/'results.json').exists() and weights(own) == weights(kept)

def asked_of(changes: list) -> dict:
    "Changes by experiment; the folder of all data under `data`. Those of one experiment would be wrong for another, so each says whose it is."
    found = {}
    for change in changes:
        whose, value = change.split('=', 1)
        name, _, key = whose.partition(':')
        if whose == 'data': found['data'] = Path(value).resolve(); continue
        if name not in RUNS or not key: sys.exit(f"'{change}' does not say which experiment it changes: write, for example, sst2:{whose.rpartition(':')[2]}={value}, or data=FOLDER.")
        found.setdefault(name, []).append(f'{key}={value}')
    return found

def from_folder(name: str, root: Path|None) -> list:
    "Where an experiment's data sets are, of which `root` has a folder."
    if root is None: return []
    params = yaml.safe_load((ROOT/'paper/params'/f'{name}.yaml').read_text())
    own, away = root/params.get('dataset_name', ''), params.get('elsewhere', {})
    found = {key: str(root/Path(v).name) for key, v in params.items() if isinstance(v, str) and v.startswith('data/') and (root/Path(v).name).is_dir()}
    if 'dataset_name' in params and own.is_dir(): found['source'] = str(own)
    if away: found['elsewhere'] = json.dumps({task: str(root/task) if (root/task).is_dir() else source for task, source in away.items()})
    return [f'{key}={value}' for key, value in found.items()]

def run(name: str, asked: dict):
    "One experiment, whose results are committed under its name; the model that it reads is there (`wanted_models`)."
    changes = from_folder(name, asked.get('data')) + asked.get(name, [])
    done = subprocess.run([sys.executable, str(ROOT/'tools/run_experiment.py'), f'paper/params/{name}.yaml', *changes], cwd=ROOT, env={k: v for k, v in os.environ.items() if k != 'SET'})
    if done.returncode:
        sys.exit(f"{name} stopped, for the reason above. Where its data lie in a folder, say so: make paper SET='{name}:source=FOLDER'.")
    shutil.copy(ROOT/'runs'/name/'results.json', ROOT/'paper/results'/f'{name}.json')

def wanted_models() -> dict:
    "Experiments whose model is not here although one that must run reads it -> which one. They are run in their turn, before any reader is asked whether it is stale: another model would make it so."
    return {READS[name]: name for name in RUNS if name in READS and state(name) != 'ready' and not has_model(READS[name])}

def draw():
    "Execute the figures' notebook; the executed copy is in runs."
    import papermill as pm
    os.environ['JUPYTER_PATH'] = str(Path(sys.prefix)/'share/jupyter')
    (ROOT/'runs').mkdir(exist_ok=True)
    pm.execute_notebook(str(ROOT/'paper/figures.ipynb'), str(ROOT/'runs/figures.ipynb'), cwd=str(ROOT), **KERNEL)

def main(*args):
    changes = [a for a in args if '=' in a]
    if wrong := set(args) - {'--list', '--draw', *changes}: sys.exit(f"Unknown option {sorted(wrong)[0]}: use --list, --draw, EXPERIMENT:NAME=VALUE, data=FOLDER, or nothing.")
    asked = asked_of(changes)
    os.chdir(ROOT)
    wanted = wanted_models()
    for name in RUNS:
        now = state(name)
        if now == 'ready' and name in wanted: now = f'ready, but {wanted[name]} reads its model, which is not in runs'
        print(f'{name:16} {now}', flush=True)
        if not set(args) & {'--list', '--draw'} and now != 'ready': run(name, asked)
    if '--list' not in args: draw()

if __name__ == '__main__': main(*(sys.argv[1:] or split_changes(os.environ.get('SET', ''))))
