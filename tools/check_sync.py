"Do the notebooks and the exported modules agree?  Works on a copy, so the tree is left as it is."
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ('nbs', 'lexical_sae', 'settings.ini', 'setup.py', 'pyproject.toml', '_quarto.yml')
WATCHED = ('nbs', 'lexical_sae')

def snapshot(root):
    files = [f for part in WATCHED for f in (root/part).rglob('*') if f.is_file() and f.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in f.parts]
    return {f.relative_to(root): f.read_text() for f in files}

def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'tree'; copy.mkdir()
        for part in PARTS:
            source = ROOT/part
            shutil.copytree(source, copy/part, symlinks=True) if source.is_dir() else shutil.copy(source, copy/part)
        before = snapshot(copy)
        for module in (copy/'lexical_sae').glob('*.py'):
            if not module.name.startswith('_'): module.unlink()
        for command in ('nbdev_clean', 'nbdev_export'): subprocess.run([Path(sys.executable).parent/command], cwd=copy, check=True)
        after = snapshot(copy)
    differ = sorted(str(f) for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if differ: sys.exit("Notebooks and modules differ; run nbdev_clean && nbdev_export, and commit both:\n  " + '\n  '.join(differ))
    print(f'{len(before)} files in step')

if __name__ == '__main__': main()
