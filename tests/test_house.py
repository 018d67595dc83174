"What holds the house together: notebooks, parameter files, README, packaging."
import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lexical_sae.setup_training import DENSE, TrainingConfig, training_defaults

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT/'nbs/experiments').glob('*.ipynb'))
PARAMS = sorted((ROOT/'paper/params').glob('*.yaml'))
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
cells = lambda f: json.loads(f.read_text())['cells']
source = lambda c: ''.join(c['source'])

def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

def test_there_is_something_to_check(): assert EXPERIMENTS and PARAMS and len(CHAPTERS) > 10

def parameters(notebook):
    tagged = [c for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{notebook.name} needs exactly one cell tagged parameters'
    return set(re.findall(r'^(\w+) *=', source(tagged[0]), flags=re.M))

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda f: f.stem)
def test_experiment_is_parameterised_and_skipped(notebook):
    assert {'experiment_name', 'output_dir', 'dataset_name', 'train_samples', 'test_samples', 'model_name'} <= parameters(notebook)
    first = cells(notebook)[0]
    assert first['cell_type'] == 'raw' and 'skip_exec: true' in source(first)

@pytest.mark.parametrize('file', PARAMS, ids=lambda f: f.stem)
def test_parameter_file_names_known_parameters(file):
    params = yaml.safe_load(file.read_text())
    known = parameters(ROOT/'nbs/experiments'/f"{params.pop('notebook', 'classification')}.ipynb")
    assert set(params) <= known and params['experiment_name'] == file.stem

@pytest.mark.parametrize('notebook', CHAPTERS, ids=lambda f: f.stem)
def test_chapter_opens_with_title_and_summary_and_has_no_errors(notebook):
    first = source(cells(notebook)[0])
    assert re.match(r'# .+\n\n?> .+', first)
    assert not [o for c in cells(notebook) for o in c.get('outputs', []) if o['output_type'] == 'error']

@pytest.mark.parametrize('notebook', CHAPTERS, ids=lambda f: f.stem)
def test_no_progress_bar_is_printed_in_the_book(notebook):
    assert not [c['id'] for c in cells(notebook) for o in c.get('outputs', []) if '\r' in ''.join(o.get('text', ''))]     # `make book` leaves them out

def mixed_imports(code):
    "Statements beside imports that need what other cells made: the documentation build runs a cell with an import, alone."
    directives = {l[2:].split()[0].rstrip(':') for l in code.split('\n') if l.startswith('#|') and l[2:].split()}
    if directives & {'export', 'exports', 'exporti', 'exec_doc'}: return []
    tree = ast.parse('\n'.join('' if l.startswith(('%', '!')) else l for l in code.split('\n')))
    imports = (ast.Import, ast.ImportFrom)
    if not any(isinstance(n, imports) for n in ast.walk(tree)): return []
    settings = lambda n: isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and ast.unparse(n.value.func).split('.')[0] in ('warnings', 'logging', 'nbdev')
    return [ast.unparse(n) for n in tree.body if not isinstance(n, imports) and not settings(n)]

@pytest.mark.parametrize('notebook', CHAPTERS, ids=lambda f: f.stem)
def test_imports_stand_in_cells_of_their_own(notebook):
    assert [m for c in cells(notebook) if c['cell_type'] == 'code' for m in mixed_imports(source(c))] == []

def test_paper_knows_what_is_missing_or_stale(tmp_path, monkeypatch):
    paper = tool('paper')
    assert all((ROOT/'paper/params'/f'{n}.yaml').exists() for n in paper.RUNS)
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); monkeypatch.setattr(paper, 'ROOT', tmp_path)
    assert paper.state('demo') == 'ready'
    file = tmp_path/'paper/params/demo.yaml'; file.write_text(file.read_text().replace('classifier_hidden: 256', 'classifier_hidden: 8'))
    assert paper.state('demo') == 'stale (classifier_hidden changed)'
    (tmp_path/'paper/results/demo.json').unlink(); assert paper.state('demo') == 'missing'
    with pytest.raises(SystemExit, match='Unknown option --lst'): paper.main('--lst')

@pytest.mark.parametrize('name, old, new, changed', [
    ('robustness', 'arms: [full, dense]', 'arms: [full, dense, neither]', 'arms'),
    ('demo', 'experiment_name: demo', 'experiment_name: demo\nevaluate_tiers: [accuracy, layers]', 'evaluate_tiers'),
    ('conll2003_4k_seed0', 'train_samples: 4000', 'train_samples: 5000', 'train_samples'),
    ('banking77', 'dataset_name: banking77', 'dataset_name: trec', 'dataset_name'),
    ('conll2003', 'experiment_name: conll2003', 'experiment_name: conll2003\nmodel_name: bert-base-cased', 'model_name')])
def test_paper_misses_what_a_result_does_not_hold(tmp_path, monkeypatch, name, old, new, changed):
    paper = tool('paper')
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); monkeypatch.setattr(paper, 'ROOT', tmp_path)
    before = paper.state(name)
    file = tmp_path/f'paper/params/{name}.yaml'; text = file.read_text(); assert old in text
    file.write_text(text.replace(old, new, 1))
    assert changed in paper.state(name) and changed not in before

def test_paper_sees_that_a_default_has_changed(tmp_path, monkeypatch):
    paper = tool('paper')
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); monkeypatch.setattr(paper, 'ROOT', tmp_path)
    file = tmp_path/'paper/results/demo.json'; found = json.loads(file.read_text())
    assert paper.state('demo') == 'ready'                                   # made before defaults were noted: nothing to compare
    for defaults, state in ((training_defaults(), 'ready'), (training_defaults() | dict(evidence_share=.1), 'stale (evidence_share changed)')):
        found['parameters']['defaults'] = defaults; file.write_text(json.dumps(found))
        assert paper.state('demo') == state

def test_paper_takes_a_knob_that_came_later_as_it_was(tmp_path, monkeypatch):
    "A result that does not note a parameter was made with its default."
    paper = tool('paper')
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); monkeypatch.setattr(paper, 'ROOT', tmp_path)
    file = tmp_path/'paper/params/demo.yaml'; text = file.read_text()
    assert 'validation_share' not in json.loads((ROOT/'paper/results/demo.json').read_text())['parameters']
    for said, state in (('validation_share: 0.0\nevaluations: 10\npatience: 0\n', 'ready'), ('validation_share: 0.1\npatience: 3\n', 'stale (validation_share, patience changed)')):
        file.write_text(text + said); assert paper.state('demo') == state

@pytest.fixture
def papers(tmp_path, monkeypatch):
    "tools/paper.py on a copy of its results, for the readers of the demo's model; experiments only pretend to run. `weights`: of the model that the demo makes."
    paper, ran, made = tool('paper'), [], {}
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); monkeypatch.setattr(paper, 'ROOT', tmp_path); monkeypatch.setattr(paper, 'draw', lambda: None)
    monkeypatch.setattr(paper, 'RUNS', ['demo', 'faithfulness', 'comparison', 'long_context'])
    monkeypatch.setattr(paper.os, 'chdir', lambda folder: None)
    def pretend(command, cwd, env):
        name = Path(command[2]).stem
        if name in made.get('failing', ()): return SimpleNamespace(returncode=1)
        found = json.loads((ROOT/f'paper/results/{name}.json').read_text())
        key = 'trained_weights' if name == 'demo' else 'weights'
        found['parameters'][key] = made.get('weights', found['parameters'][key])
        (tmp_path/f'runs/{name}/model').mkdir(parents=True, exist_ok=True); (tmp_path/f'runs/{name}/results.json').write_text(json.dumps(found))
        ran.append((name, *command[3:])); return SimpleNamespace(returncode=0)
    monkeypatch.setattr(paper.subprocess, 'run', pretend)
    return SimpleNamespace(paper=paper, ran=ran, made=made, names=lambda: [name for name, *_ in ran], results=tmp_path/'paper/results')

def test_paper_trains_the_model_that_an_experiment_reads(papers):
    "Once, and only where one that must run reads it; what was typed for the data goes along."
    paper = papers.paper
    paper.main('demo:source=here'); assert papers.ran == []                  # all are ready: no model is wanted
    (papers.results/'comparison.json').unlink(); (papers.results/'long_context.json').unlink()
    paper.main('--list'); assert papers.ran == []
    paper.main('demo:source=here', 'comparison:seed=1')
    assert papers.ran == [('demo', 'source=here'), ('comparison', 'seed=1'), ('long_context',)]
    (papers.results/'comparison.json').unlink(); paper.main(); assert papers.names()[3:] == ['comparison']    # the model is there now
    papers.made['failing'] = ['long_context']; (papers.results/'long_context.json').unlink()
    with pytest.raises(SystemExit, match='long_context stopped'): paper.main()

def test_paper_asks_readers_after_their_model_is_trained(papers):
    "Another machine trains another model: who was ready with the old one is not ready with the new one."
    papers.made['weights'] = 'new'; (papers.results/'long_context.json').unlink()
    papers.paper.main()
    assert papers.names() == ['demo', 'faithfulness', 'comparison', 'long_context'] and {papers.paper.state(name) for name in papers.paper.RUNS} == {'ready'}

def test_paper_runs_models_before_their_readers():
    paper = tool('paper')
    assert all(paper.RUNS.index(model) < paper.RUNS.index(name) for name, model in paper.READS.items())

def test_paper_sees_that_a_notebook_measures_more(tmp_path, monkeypatch):
    paper = tool('paper')
    measures = paper.measures_of(dict(notebook='faithfulness'))
    assert 'completeness' in measures and paper.measures_of({}) == []       # a notebook that does not say is not asked
    shutil.copytree(ROOT/'paper', tmp_path/'paper'); shutil.copytree(ROOT/'nbs/experiments', tmp_path/'experiments')
    monkeypatch.setattr(paper, 'ROOT', tmp_path); monkeypatch.setattr(paper, 'NOTEBOOKS', tmp_path/'experiments')
    assert paper.state('faithfulness') == 'ready'
    notebook = tmp_path/'experiments/faithfulness.ipynb'; text = notebook.read_text(); assert text.count('"measures = [') == 1
    notebook.write_text(text.replace('"measures = [', '"measures = [\'weight\', '))
    assert paper.state('faithfulness') == 'stale (weight not measured)'
    file = tmp_path/'paper/params/faithfulness.yaml'; file.write_text(file.read_text() + 'steps: 7\n')
    assert paper.state('faithfulness') == 'stale (steps changed; weight not measured)'

def test_paper_changes_one_experiment_or_reads_a_folder_of_data(tmp_path):
    paper = tool('paper')
    asked = paper.asked_of(['sst2:source=here', 'sst2:seed=1', f'data={tmp_path}'])
    assert asked == dict(sst2=['source=here', 'seed=1'], data=tmp_path.resolve())
    for change in ('source=here', 'no_such:source=here'):
        with pytest.raises(SystemExit, match='does not say which experiment'): paper.asked_of([change])
    (tmp_path/'sst2').mkdir(); (tmp_path/'yelp').mkdir()
    assert paper.from_folder('ag_news', tmp_path) == [] and paper.from_folder('sst2', None) == []
    own, away = paper.from_folder('sst2_20k', tmp_path)
    assert own == f'source={tmp_path}/sst2' and json.loads(away.partition('=')[2]) == dict(yelp=f'{tmp_path}/yelp', imdb='hub')

def defaults_of(name):
    "What an experiment's notebook does where its parameter file says nothing."
    exec(source(next(c for c in cells(ROOT/f'nbs/experiments/{name}.ipynb') if 'parameters' in c['metadata'].get('tags', []))), found := {})
    return {k: v for k, v in found.items() if not k.startswith('__')}

def test_several_datasets_are_run_as_each_is_alone():
    "K, length and epochs of `multi_dataset` are those of the datasets' own parameter files, and so is the recipe."
    one, ns, default = {f.stem: yaml.safe_load(f.read_text()) for f in PARAMS}, defaults_of('multi_dataset'), defaults_of('classification')
    together = ns | one['multi_dataset']
    for name in ns['active_targets']:
        alone = default | one[name]
        assert (ns['active_targets'][name], ns['max_lengths'][name], ns['epochs'][name]) == (alone['active_target'], alone['max_length'], alone['num_train_epochs'])
        assert recipe(together | together['training'] | dict(active_target=ns['active_targets'][name], num_train_epochs=ns['epochs'][name])) == recipe(alone)

def recipe(given):
    "How a model is trained: what is given, and the library's defaults for the rest."
    config = {f.name: f.default for f in fields(TrainingConfig) if f.name in ('learning_rate', 'head_start', 'validation_share', 'validation_samples', 'evaluations')}
    library = training_defaults() | config | {f'dense_{k}': v for k, v in DENSE.items()}
    return library | {k: v for k, v in given.items() if k in library}

@pytest.mark.parametrize('notebook, own', [('classification', []), ('multi_dataset', []), ('backbones', []), ('ablation', ['active_target'])])
def test_an_experiment_has_the_recipe_of_the_library(notebook, own):
    "One name, one recipe: other values stand in parameter files. Tagging and surgery have recipes of their own."
    asked = defaults_of(notebook)
    shared, differing = asked.keys() & recipe({}).keys(), [k for k, v in recipe(asked).items() if recipe({})[k] != v]
    assert len(shared) >= 3 and differing == own

def test_what_a_result_was_trained_with_stands_in_its_parameter_file():
    "Where the notebook's default has become another since."
    for name in (f.stem for f in PARAMS):
        params, path = yaml.safe_load((ROOT/f'paper/params/{name}.yaml').read_text()), ROOT/f'paper/results/{name}.json'
        notebook = params.get('notebook', 'classification')
        if not path.exists() or notebook not in ('classification', 'backbones'): continue
        now, then = recipe(defaults_of(notebook) | params), json.loads(path.read_text())['parameters']
        assert {k for k in now if k in then and now[k] != then[k]} == set(), name

def test_changes_keep_their_blanks_braces_and_numbers():
    run = tool('run_experiment')
    changes = run.split_changes(' source=data/sst2 arms=[dense, no anchor]  elsewhere={"yelp": "data/yelp"} learning_rate=1e-4 ')
    assert run.with_numbers(run.overridden({}, changes)) == dict(source='data/sst2', arms=['dense', 'no anchor'], elsewhere={'yelp': 'data/yelp'}, learning_rate=1e-4)
    assert run.split_changes('') == []
    assert run.with_numbers(dict(training=dict(a='2e-3', b='e-3', c=['1.5e3']))) == dict(training=dict(a=.002, b='e-3', c=[1500.]))

@pytest.mark.slow
def test_figures_are_drawn_from_the_committed_results():
    subprocess.run([sys.executable, ROOT/'tools/paper.py', '--draw'], check=True, cwd=ROOT)
    assert not subprocess.run(['git', 'status', '--porcelain', 'paper/figures'], check=True, cwd=ROOT, capture_output=True, text=True).stdout

def test_the_table_of_targets_says_what_is_met_missed_and_not_run(tmp_path):
    "Made of other results than the committed ones, so that it is read and not typed."
    shutil.copytree(ROOT/'paper/results', tmp_path/'results'); (tmp_path/'bench').mkdir()
    (tmp_path/'results/imdb.json').unlink()
    file = tmp_path/'results/sst2.json'; found = json.loads(file.read_text())
    found['metrics'] |= dict(difference_to_dense=dict(mean=-.02, low=-.03, high=-.015, level=.95, size=9), active_dims=39.); file.write_text(json.dumps(found))
    step = dict(backbone='offline', dtype='float32', words=50, look_seconds=1., dense_seconds=1., lexical_seconds=1.5, ratio=1.5, ratio_first_epoch=1.75)
    (tmp_path/'bench/step_offline_50.json').write_text(json.dumps(step))
    names = dict(display=lambda x: None)
    for cell in cells(ROOT/'paper/figures.ipynb'):
        if cell['id'] in ('23d55ffa', '99e5562f', 'step0002', 'targets2'): exec(source(cell), names)
        if cell['id'] == '23d55ffa': names |= dict(results=str(tmp_path/'results'), out=str(tmp_path/'figures'))
    said = {(r, what): verdict for r, what, verdict in names['targets'][['run', 'what', 'verdict']].itertuples(index=False)}
    assert said['sst2', 'accuracy minus dense, points'] == 'missed by 1' and said['sst2', 'active dims'] == 'met'
    assert said['imdb', 'reference share'] == said['bench/step_bert-base', 'whole training step over dense, bert-base'] == 'not run'
    assert [v for (r, what), v in said.items() if r == 'bench/step_offline_50' and what.startswith('whole')] == ['met', 'missed by 0.15']
    assert (tmp_path/'figures/targets.md').read_text().count('not run') == sum(v == 'not run' for v in said.values())

def test_readme_is_made_from_the_index(): assert (ROOT/'README.md').read_text() == tool('readme').render()

def test_requirements_are_pinned():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    name = lambda r: re.split(r'[<>=!\[ ]', r)[0].lower().replace('_', '-')
    pinned = {name(l) for l in (ROOT/'constraints.txt').read_text().splitlines() if l}
    wanted = {name(r) for key in ('requirements', 'dev_requirements') for r in shlex.split(ini['DEFAULT'][key])}
    assert wanted <= pinned

def test_quarto_configuration_is_one_file():
    assert (ROOT/'nbs/_quarto.yml').is_symlink() and (ROOT/'nbs/_quarto.yml').resolve() == ROOT/'_quarto.yml'

def test_no_machine_paths():
    home = '/ro' + 'ot/'
    for pattern in ('nbs/**/*.ipynb', 'lexical_sae/*.py', 'paper/**/*.json', 'tools/*.py', '*.md'):
        for f in ROOT.glob(pattern):
            text = f.read_text()
            assert not re.search(r'(?<![\w.])/(work|tmp/proto)/', text) and home not in text, f'{f} names a path of one machine'
    for f in CHAPTERS: assert '/tmp/' not in json.dumps([c.get('outputs') for c in cells(f)]), f'{f} shows a path of one machine'

@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, ROOT], check=True)
    wheel, = tmp_path.glob('*.whl')
    venv.create(tmp_path/'env', with_pip=True)
    python = tmp_path/'env/bin/python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', '-c', ROOT/'constraints.txt', wheel], check=True)
    code = '''
import lexical_sae, lexical_sae.bias, lexical_sae.readers as r
assert lexical_sae.bias.identity_lexicon() and lexical_sae.explain_model_spans
exp = lexical_sae.LexicalSAE.from_backbone(r.offline_backbone()).explain('a gorgeous, witty film')
print(len(exp.features), exp.error, lexical_sae.__file__)'''
    out = subprocess.run([python, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True,
                         env=os.environ | {'LEXICAL_SAE_ASSETS': str(ROOT/'assets'), 'PYTHONPATH': ''}).stdout
    count, error, where = out.split()
    assert int(count) > 20 and float(error) <= 1e-5 and str(tmp_path/'env') in where

@pytest.mark.slow
def test_an_experiment_runs_from_its_parameter_file(tmp_path):
    params = yaml.safe_load((ROOT/'paper/params/verify_full.yaml').read_text()) | {'output_dir': str(tmp_path)}
    file = tmp_path/'verify.yaml'; file.write_text(yaml.safe_dump(params))
    out = subprocess.run([sys.executable, ROOT/'tools/run_experiment.py', file], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    folder = tmp_path/'verify_full'
    metrics = json.loads((folder/'results.json').read_text())['metrics']
    assert metrics['identity_error'] <= 1e-5 and 0 < metrics['active_dims'] < 1000 and 'dense' in metrics
    report = (folder/'report.html').read_text()
    assert out.strip().splitlines()[-1].startswith('report ') and '<html' in report and 'Lambda ' in report and ': the constraint ' in report
    assert (folder/'model/model.safetensors').exists()

@pytest.mark.parametrize('arguments, sentence', [(['missing.yaml'], 'No parameter file'), (['paper/params/demo.yaml', 'num_epochs=1'], "did you mean 'num_train_epochs'?"),
                                                 (['paper/params/demo.yaml', 'seed'], 'is not NAME=VALUE')])
def test_a_wrong_call_is_answered_with_one_sentence(arguments, sentence):
    run = subprocess.run([sys.executable, ROOT/'tools/run_experiment.py', *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode and sentence in run.stderr and 'Traceback' not in run.stderr

def test_a_recorded_command_names_no_folder_of_one_machine():
    typed = tool('run_experiment').typed
    assert typed(['source=/data/sst2', 'seed=1', 'elsewhere={"yelp":"/data/yelp","imdb":"/data/imdb"}']) == 'source=FOLDER seed=1 elsewhere={"yelp":"FOLDER","imdb":"FOLDER"}'
    assert typed(['source=data/sst2', 'model_name=answerdotai/ModernBERT-base']) == 'source=data/sst2 model_name=answerdotai/ModernBERT-base'
