"Run one experiment notebook from a parameter file with papermill: run_experiment.py paper/params/NAME.yaml [NAME=VALUE ...], or the changes in the variable SET."
import difflib
import os
import re
import sys
import tempfile
from pathlib import Path

import papermill as pm
import yaml
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
SOCKETS = tempfile.TemporaryDirectory(prefix='lexical-')                  # of this process: experiments that run side by side in one checkout would hear each other's kernels
KERNEL = dict(kernel_name='python3', progress_bar=False, log_output=False, stdout_file=sys.stdout,
              config=Config(KernelManager=dict(transport='ipc', ip=f'{SOCKETS.name}/kernel')))         # not a port of the machine, which its other users could listen to

def overridden(params, changes):
    "The parameters with NAME=VALUE changes, values read as YAML."
    for change in changes:
        name, equals, value = change.partition('=')
        if not equals: sys.exit(f"'{change}' is not NAME=VALUE: write, for example, source=data/sst2.")
        params[name] = yaml.safe_load(value)
    return params

def split_changes(text):
    "NAME=VALUE NAME=VALUE, where values may have blanks: arms=[dense, no anchor] seed=1."
    return [change for change in re.split(r'\s+(?=[\w:]+=)', text.strip()) if change]

def with_numbers(value):
    "YAML reads 1e-4 as text; nobody means that."
    if isinstance(value, dict): return {k: with_numbers(v) for k, v in value.items()}
    if isinstance(value, list): return [with_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r'[-+]?\d+(\.\d*)?e[-+]?\d+', value) else value

def check_names(params, notebook):
    "papermill would take a mistyped name and run with the default."
    known = pm.inspect_notebook(str(notebook))
    for name in params:
        if name in known: continue
        close = difflib.get_close_matches(name, known, 1)
        sys.exit(f"The experiment {notebook.stem} has no parameter '{name}': " + (f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(known)}."))

def typed(changes):
    "What was typed, without the folders of one machine."
    return ' '.join(re.sub(r'(?<![\w.])/[^\s,:"\'}\]]+', 'FOLDER', change) for change in changes)

def main(params_file, *changes):
    path = Path(params_file)
    if not path.is_file(): sys.exit(f"No parameter file {path}: choose one of {', '.join(sorted(p.stem for p in (ROOT/'paper/params').glob('*.yaml')))}.")
    params = with_numbers(overridden(yaml.safe_load(path.read_text()), changes))
    notebook = ROOT/'nbs/experiments'/f"{params.pop('notebook', 'classification')}.ipynb"
    check_names(params, notebook)
    if 'experiment_name' not in params: sys.exit(f"{path} has no experiment_name: give it one, its results are kept under that name.")
    os.chdir(ROOT)
    print(f"== experiment {params['experiment_name']}", *changes, flush=True)
    params.setdefault('command', f'make run PARAMS={params_file}' + (f" SET='{typed(changes)}'" if changes else ''))
    out = Path(params.get('output_dir', 'runs'))/params['experiment_name']
    out.mkdir(parents=True, exist_ok=True)
    # the kernel of this environment, whatever kernels the user has installed
    os.environ['JUPYTER_PATH'] = str(Path(sys.prefix)/'share/jupyter')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore:IProgress not found')
    try: pm.execute_notebook(str(notebook), str(out/notebook.name), parameters=params, cwd=str(ROOT), stderr_file=sys.stderr, **KERNEL)
    except pm.PapermillExecutionError as e: sys.exit(f"The experiment failed: {e.ename}: {e.evalue}\nThe notebook up to the failing cell is {out/notebook.name}.")
    summary(out, notebook)

def summary(out, notebook):
    "The lines that people look for; an experiment has those that it measured."
    from lexical_sae.results import headline, read_results
    print()
    if (out/'model').exists(): print(f"model      {out/'model'}")
    print(f"results    {out/'results.json'}\nnotebook   {out/notebook.name}", *headline(read_results(out)), sep='\n')
    if (out/'report.html').exists(): print(f"report {(out/'report.html')}")

if __name__ == '__main__': main(sys.argv[1], *(sys.argv[2:] or split_changes(os.environ.get('SET', ''))))
