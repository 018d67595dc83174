"The report in a real browser: nothing runs, nothing overflows, colours are there. Needs chromium."
import html
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from lexical_sae.explain import report_html
from test_surgery import TEXTS, reader

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='no chromium here'), pytest.mark.filterwarnings('ignore:No tokenizer')]
MEASURE = '''<pre id="measured"></pre><script>
const all = s => [...document.querySelectorAll(s)];
document.getElementById('measured').textContent = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: innerWidth, explanations: all('.lx').length, title: document.title,
  coloured: all('.lx .text span').filter(e => !/, 0\\)$/.test(getComputedStyle(e).backgroundColor)).length,
  bars: all('.lx .bar i').filter(e => e.getBoundingClientRect().width > 20).length,
  beside: all('.lx').every(e => e.children[1].getBoundingClientRect().right <= e.children[2].getBoundingClientRect().left)})</script>'''

@pytest.mark.parametrize('width', [1200, 500], ids=['desk', 'phone'])
def test_the_report_in_a_browser(width, tmp_path):
    model = reader(label_names=['bad', 'good', '<b>odd</b>'])
    attack = '<script>document.title="owned"</script> the film'
    tables = {f'Most important words: {n}': pd.DataFrame(dict(word=['film', 'plot'], total=[1.5, .5], mean=[.1, .2], texts=[3, 4])) for n in 'abc'}
    page = report_html('A report', attack, {'accuracy': '0.8'} | {f'figure {i}': '0.99' for i in range(6)}, tables,
                       explanations={attack: [model.explain(t) for t in TEXTS + [attack, 'film'*30]]})
    file = tmp_path/'report.html'; file.write_text(page.replace('</html>', MEASURE + '</html>'))
    dom = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile',
                          f'--window-size={width},900', '--dump-dom', file.as_uri()], check=True, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search('<pre id="measured">(.*?)</pre>', dom)[1]))
    assert seen['title'] == 'A report' and seen['explanations'] == len(TEXTS) + 2
    assert seen['wide'] <= seen['window'], seen                          # nothing to scroll sideways
    assert seen['coloured'] >= len(TEXTS) and seen['bars'] >= len(TEXTS)
    assert seen['beside'] == (width > 720)                               # the words beside the text, below it on a phone
