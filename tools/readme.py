"README.md from nbs/index.ipynb: the same bytes whether or not Quarto is installed."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parents[1]

class HideInput(Preprocessor):
    "Cells marked `#| echo: false` show their output only."
    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == 'code' and re.search(r'^#\|\s*echo:\s*false', cell.source, flags=re.M): cell.source = ''
        return cell, resources

def render() -> str:
    nb = nbformat.read(ROOT/'nbs/index.ipynb', as_version=4)
    exporter = MarkdownExporter(); exporter.register_preprocessor(HideInput, enabled=True)
    body, _ = exporter.from_notebook_node(nb)
    body = re.sub(r'```(python)?\n\s*```\n', '', body).replace('](images/', '](nbs/images/')
    return '<!-- made from nbs/index.ipynb by `make readme` -->\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

if __name__ == '__main__':
    (ROOT/'README.md').write_text(render(), encoding='utf-8')
    print(f"README.md, {len(render().splitlines())} lines", file=sys.stderr)
