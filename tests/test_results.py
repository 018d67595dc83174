"Results files: one shape, whole or not at all, no NaN, nothing private."
import errno
import json
import os

import numpy as np
import pytest
import torch

from lexical_sae import results
from lexical_sae.results import atomic_write, paired_bootstrap, plain, public_text, read_results, results_table, write_results

RUN = dict(experiment='run', command='make demo', data={'name': 'toy', 'sizes': {'train': 3}, 'fingerprint': 'f'}, backbone='b', seed=0,
           parameters={}, metrics={'accuracy': .5})


def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path/'a.json', 'old')
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(results.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*untouched') as caught: atomic_write(path, 'new')
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(fd): raise KeyboardInterrupt
    monkeypatch.setattr(results.os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt): atomic_write(tmp_path/'a', b'x')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('bad, name', [
    ({'accuracy': float('nan')}, 'metrics.accuracy is nan'), ({'dense': {'step_seconds': np.float32('inf')}}, 'metrics.dense.step_seconds is inf'),
    ({'per_class': torch.tensor([1., float('nan')])}, r'metrics.per_class\[1\] is nan')])
def test_no_number_that_is_not_finite(tmp_path, bad, name):
    with pytest.raises(ValueError, match=name): write_results(tmp_path, **RUN | {'metrics': bad})
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_json_types(tmp_path):
    metrics = {'a': np.int64(3), 'b': np.float16(.5), 'c': torch.tensor(2), 'd': np.array([[1, 2]]), 'e': np.bool_(False), 'f': None, 3: (1, 2)}
    written = write_results(tmp_path, **RUN | {'metrics': metrics})
    assert written['metrics'] == {'a': 3, 'b': .5, 'c': 2, 'd': [[1, 2]], 'e': False, 'f': None, '3': [1, 2]}
    assert json.loads((tmp_path/'results.json').read_text()) == written == read_results(tmp_path)
    with pytest.raises(TypeError, match='parameters.model is a'): write_results(tmp_path, **RUN | {'parameters': {'model': object()}})


@pytest.mark.parametrize('text, public', [
    ('/home/ada/runs/model', 'model'), ('--out=/home/ada/runs/x --n 3', '--out=x --n 3'), ("'/home/ada/a.yaml'", "'a.yaml'"),
    (r'C:\Users\ada\x.json', 'x.json'), ('a/b/c', 'a/b/c'), ('1 / 2 and/or </s> https://arxiv.org/abs/2310.1', '1 / 2 and/or </s> https://arxiv.org/abs/2310.1')])
def test_private_paths(text, public): assert public_text(text) == public


def test_no_private_path_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results('runs/a', **RUN | {'command': [str(tmp_path/'tool.py'), '--out', '/home/ada/secret place/out'], 'backbone': tmp_path/'assets'/'m',
                                     'parameters': {'output_dir': str(tmp_path/'runs'), 'other': ['/home/ada/x/y']}})
    text = (tmp_path/'runs/a/results.json').read_text()
    assert str(tmp_path) not in text and 'ada' not in text
    found = json.loads(text)
    assert (found['backbone'], found['command'], found['parameters']) == ('assets/m', 'tool.py --out out', {'output_dir': 'runs', 'other': ['y']})


def test_reading_refuses(tmp_path):
    path = tmp_path/'results.json'
    good = write_results(tmp_path, **RUN)
    def refuse(content, message):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message): read_results(tmp_path)
    refuse(json.dumps(good)[:-20], 'not valid JSON.*run the experiment again')
    refuse(json.dumps(good).replace('0.5', 'NaN'), 'contains NaN')
    refuse([1], 'holds no results')
    refuse(good | {'schema_version': 2}, 'schema version 2, and this code reads version 1')
    refuse({k: v for k, v in good.items() if k not in ('metrics', 'seed')}, 'lacks seed, metrics')
    refuse(good | {'extra': 1}, 'does not know: extra')
    refuse(good | {'seed': '0'}, 'seed should be int, not str')
    refuse(good | {'data': {'name': 'x'}}, 'data lacks sizes, fingerprint')
    path.unlink()
    with pytest.raises(FileNotFoundError, match='there are no results at'): read_results(tmp_path)


def test_writing_checks_too(tmp_path):
    with pytest.raises(ValueError, match='data lacks fingerprint'): write_results(tmp_path, **RUN | {'data': {'name': 'x', 'sizes': {}}})
    assert list(tmp_path.iterdir()) == []


def test_table(tmp_path):
    write_results(tmp_path/'a', **RUN | {'metrics': {'own': 1, 'active_dims': 20, 'accuracy': .8, 'words': ['x'], 'dense': {'accuracy': .9}}})
    write_results(tmp_path/'deep'/'b', **RUN | {'experiment': 'other', 'seed': 1})
    table = results_table(tmp_path)
    assert list(table.columns) == ['data', 'backbone', 'seed', 'accuracy', 'active_dims', 'own', 'dense.accuracy']
    assert table.loc['run', 'dense.accuracy'] == .9 and table.loc['other', 'seed'] == 1
    assert len(results_table([tmp_path/'a', read_results(tmp_path/'deep'/'b')])) == 2
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no results.json was found'): results_table(tmp_path/'empty')
    with pytest.raises(ValueError, match='no results.json was found'): results_table([])


def test_bootstrap_by_hand():
    # 40 wins, 10 losses, 50 ties: mean .3, and the percentile interval must be close to the normal one
    a = np.r_[np.ones(40), np.zeros(10), np.ones(50)]
    b = np.r_[np.zeros(40), np.ones(10), np.ones(50)]
    found = paired_bootstrap(a, b, n=4000)
    half = 1.96*(a - b).std()/10
    assert found.mean == pytest.approx(.3) and found.size == 100 and found.clear
    assert [found.low, found.high] == pytest.approx([.3 - half, .3 + half], abs=.02)
    back = paired_bootstrap(b, a, n=4000)
    assert not paired_bootstrap(a, np.roll(a, 1)).clear and back.mean == -found.mean and back.clear
    assert paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b) == paired_bootstrap(torch.tensor(a), list(b))


def test_bootstrap_covers():
    # a true difference of zero is inside about 95 of 100 intervals
    rng = np.random.default_rng(0)
    inside = sum(not paired_bootstrap(rng.random(200) < .8, rng.random(200) < .8, n=400, seed=i).clear for i in range(100))
    assert 88 <= inside <= 100


@pytest.mark.parametrize('a, b', [([], []), ([1, 0], [1]), ([[1]], [[1]]), ([1., float('nan')], [1., 0.])])
def test_bootstrap_refuses(a, b):
    with pytest.raises(ValueError, match='same items|not finite'): paired_bootstrap(a, b)


def test_plain_dataclass():
    assert plain(paired_bootstrap([1, 0], [1, 0])) == {'mean': 0., 'low': 0., 'high': 0., 'level': .95, 'size': 2}
