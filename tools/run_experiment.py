"Run one experiment notebook from a parameter file with papermill: run_experiment.py paper/params/NAME.yaml [NAME=VALUE ...]"
import os
import re
import sys
from pathlib import Path

import papermill as pm
import yaml

ROOT = Path(__file__).resolve().parents[1]

def overridden(params, changes):
    "The parameters with NAME=VALUE changes, values read as YAML."
    for change in changes:
        name, equals, value = change.partition('=')
        if not equals: sys.exit(f"'{change}' is not NAME=VALUE: write, for example, source=data/sst2.")
        params[name] = yaml.safe_load(value)
    return params

def typed(changes):
    "What was typed, without the folders of one machine."
    return ' '.join(re.sub(r'(?<![\w.])/[^\s,:"\'}\]]+', 'FOLDER', change) for change in changes)

def main(params_file, *changes):
    path = Path(params_file)
    if not path.is_file(): sys.exit(f"No parameter file {path}: choose one of {', '.join(sorted(p.stem for p in (ROOT/'paper/params').glob('*.yaml')))}.")
    params = overridden(yaml.safe_load(path.read_text()), changes)
    notebook = ROOT/'nbs/experiments'/f"{params.pop('notebook', 'classification')}.ipynb"
    os.chdir(ROOT)
    params.setdefault('command', f'make run PARAMS={params_file}' + (f" SET='{typed(changes)}'" if changes else ''))
    out = Path(params.get('output_dir', 'runs'))/params['experiment_name']
    out.mkdir(parents=True, exist_ok=True)
    # the kernel of this environment, whatever kernels the user has installed
    os.environ['JUPYTER_PATH'] = str(Path(sys.prefix)/'share/jupyter')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore:IProgress not found')
    try: pm.execute_notebook(str(notebook), str(out/notebook.name), parameters=params, kernel_name='python3', cwd=str(ROOT), progress_bar=False,
                             log_output=False, stdout_file=sys.stdout, stderr_file=sys.stderr)
    except pm.PapermillExecutionError as e: sys.exit(f"The experiment failed: {e.ename}: {e.evalue}\nThe notebook up to the failing cell is {out/notebook.name}.")
    summary(out, notebook)

def summary(out, notebook):
    "The lines that people look for; an experiment has those that it measured."
    from lexical_sae.results import headline, read_results
    print()
    if (out/'model').exists(): print(f"model      {out/'model'}")
    print(f"results    {out/'results.json'}\nnotebook   {out/notebook.name}", *headline(read_results(out)), sep='\n')
    if (out/'report.html').exists(): print(f"report {(out/'report.html')}")

if __name__ == '__main__': main(*sys.argv[1:])
