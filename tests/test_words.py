"What a dimension is called: three families of tokenizers, random text, and everything that must be refused."
import unicodedata
from pathlib import Path

import pytest, torch, transformers
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lexical_sae.words import (NEGATIONS, TokenKind, _BYTES, _NEGATION_TAILS, aggregate_subword_attributions, align_words,
    clean_token, content_word_mask, get_clean_vocab_mask, is_stop_word, normalise_word, read_vocabulary, stop_words,
    surface_forms, text_words, token_kind, token_text, vocabulary_mask, vocabulary_words, word_spans, word_to_id, words_from_offsets)

SENTENCES = ["A gorgeous, witty, seductive movie.", "Don't you love the witty films?", "The café's films weren't good.",
    "Good films, better movies; the best are never long.", "It's a good movie and the Films are not too long. Not without wit."]*20
SIGNS = dict(bos_token='<s>', eos_token='</s>', cls_token='<s>', sep_token='</s>', pad_token='<pad>', unk_token='<unk>', mask_token='<mask>')
SPECIALS = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']

def wrap(t):
    t.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=t, **SIGNS)

def byte_level(vocab_size=420, trim=True):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim), decoders.ByteLevel()
    t.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                         special_tokens=SPECIALS, show_progress=False))
    return wrap(t)

def unigram(split=True, normalizer=None):
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(split=split), decoders.Metaspace()
    if normalizer: t.normalizer = normalizer
    t.train_from_iterator(SENTENCES, trainers.UnigramTrainer(vocab_size=150, unk_token='<unk>', special_tokens=SPECIALS, show_progress=False))
    return wrap(t)

def fixed(entries, **parts):
    "A tokenizer of a given vocabulary."
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIALS + entries)}, unk_token='<unk>'))
    for k, v in parts.items(): setattr(t, k, v)
    return wrap(t)

TOKENIZERS = dict(
    wordpiece=AutoTokenizer.from_pretrained(Path(__file__).parent.parent/'assets/minilm-mlm'),
    bytelevel=byte_level(), bytelevel_untrimmed=byte_level(trim=False), metaspace=unigram(),
    metaspace_nfkc=unigram(normalizer=normalizers.NFKC()), metaspace_unsplit=unigram(split=False))
WORDPIECE, BYTES, META = (TOKENIZERS[k] for k in ('wordpiece', 'bytelevel', 'metaspace'))
each = pytest.mark.parametrize('name', TOKENIZERS)

texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(
    ["don't", 'witty', ',', '.', ' ', '  ', '\n', '\t', '😀', '👩‍👩‍👧', '👍🏽', 'café', 'cafe\u0301', '你好', 'ไทย', 'नमस्ते', 'feel-good', '"', "'", '’s',
     '[SEP]', '</s>', '<mask>', '\u00ad', '\u200d', '\ufeff', 'ﬁlm', '½', '_', 'unforgettably', '\u0301', '\x00', '▁', 'Ġ', '1,000.5']), max_size=14).map(''.join))
many = settings(max_examples=120, deadline=None)

# alignment

@each
@many
@given(text=texts, cut=st.one_of(st.none(), st.integers(3, 12)))
def test_every_token_is_in_exactly_one_word(name, text, cut):
    tokenizer = TOKENIZERS[name]
    words = align_words(tokenizer, text, cut)
    enc = tokenizer(text, truncation=cut is not None, max_length=cut, return_special_tokens_mask=True, return_offsets_mapping=True)
    read = ''.join(text[s:e] for s, e in enc.offset_mapping)
    assert sorted(p for w in words for p in w.tokens) == [p for p, s in enumerate(enc.special_tokens_mask) if not s]
    for w in words:
        assert w.tokens and w.text == text[w.start:w.end] and w.text == w.text.strip()
        assert list(w.tokens) == sorted(w.tokens)
        assert w.text or not read.strip()  # only where nothing but space is read has a word no characters
    for a, b in zip(words, words[1:]): assert a.end <= b.start and a.tokens[-1] < b.tokens[0]

@many
@given(text=texts)
def test_words_cover_all_but_space(text):
    "Byte-level BPE loses no character, so neither do its words; and tokens never shift words by a character."
    covered = {i for s, e in word_spans(text) for i in range(s, e)}
    assert covered >= {i for i, c in enumerate(text) if not c.isspace()}
    for tokenizer in (BYTES, TOKENIZERS['bytelevel_untrimmed']):
        read = {i for w in align_words(tokenizer, text) for i in range(w.start, w.end)}
        assert read >= {i for i, c in enumerate(text) if not c.isspace()}

def test_word_rules():
    text = " “Don't,” she said:  feel-good, 3.5 stars... 你好\n"
    words = [w.text for w in align_words(WORDPIECE, text)]
    assert words == ['“', "Don't", ',”', 'she', 'said', ':', 'feel', '-', 'good', ',', '3', '.', '5', 'stars', '...', '你', '好']
    assert [w.text for w in align_words(BYTES, text)] == words
    assert align_words(BYTES, 'a  \n')[0].tokens == (1, 2, 3, 4)           # space behind the last word joins it
    assert [w.text for w in align_words(BYTES, '   ')] == [''] and align_words(BYTES, '') == []
    assert [w.text for w in align_words(WORDPIECE, 'wit\u00adty film')] == ['wit\u00adty', 'film']  # the tokenizer drops the soft hyphen

def test_a_token_over_several_words_joins_them():
    words = words_from_offsets('of the e-mail.', [(0, 0), (0, 6), (6, 14), (0, 0)], [1, 0, 0, 1])
    assert [(w.text, w.tokens) for w in words] == [('of the', (1,)), ('e-mail.', (2,))]

def test_emoji_of_several_tokens_is_one_word():
    words = align_words(BYTES, 'so 😀')
    assert words[-1].text == '😀' and len(words[-1].tokens) >= 4

def test_offsets_are_required():
    class Slow: is_fast = False
    with pytest.raises(ValueError, match='fast version'): align_words(Slow(), 'text')

# aggregation

@pytest.mark.parametrize('name', ['wordpiece', 'bytelevel', 'metaspace'])
@many
@given(text=texts, data=st.data())
def test_the_sum_is_conserved(name, text, data):
    tokenizer, add, pads = TOKENIZERS[name], data.draw(st.booleans()), data.draw(st.integers(0, 3))
    ids = tokenizer(text, add_special_tokens=add).input_ids
    left = data.draw(st.booleans())
    ids = [tokenizer.pad_token_id]*pads*left + ids + [tokenizer.pad_token_id]*pads*(not left)
    scores = torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=len(ids), max_size=len(ids))), dtype=torch.float64)
    got = aggregate_subword_attributions(torch.tensor(ids, dtype=torch.long), scores, tokenizer, text)
    assert sum(a for _, a in got) == pytest.approx(scores.sum().item(), abs=1e-9)
    biggest = aggregate_subword_attributions(ids, scores, tokenizer, text, method='max_abs')
    assert [w for w, _ in got] == [w for w, _ in biggest]
    if ids: assert max((abs(a) for _, a in biggest)) == scores.abs().max().item()

@pytest.mark.parametrize('name', ['wordpiece', 'bytelevel', 'metaspace'])
def test_cut_texts(name):
    tokenizer, text = TOKENIZERS[name], "The witty films weren't good, gorgeous seductive movies are never long."
    ids = tokenizer(text, truncation=True, max_length=9).input_ids
    got = aggregate_subword_attributions(ids, [1.]*9, tokenizer, text)
    assert sum(a for _, a in got) == 9 and got[0] == (tokenizer.cls_token, 1.) and got[-1] == (tokenizer.sep_token, 1.)
    padded = aggregate_subword_attributions(ids + [tokenizer.pad_token_id]*3, [1.]*12, tokenizer, text)
    assert padded == got + [(tokenizer.pad_token, 3.)]

def test_golden_aggregation():
    ids = WORDPIECE("Unforgettably, it isn't.").input_ids
    tokens = WORDPIECE.convert_ids_to_tokens(ids)
    assert tokens == ['[CLS]', 'un', '##for', '##get', '##ta', '##bly', ',', 'it', 'isn', "'", 't', '.', '[SEP]']
    scores = [.5, 1, -4, 2, 0, 0, .25, 0, 1, 1, -3, 0, .125]
    assert aggregate_subword_attributions(ids, scores, WORDPIECE, "Unforgettably, it isn't.") == [
        ('[CLS]', .5), ('Unforgettably', -1.), (',', .25), ('it', 0.), ("isn't", -1.), ('.', 0.), ('[SEP]', .125)]
    assert dict(aggregate_subword_attributions(ids, scores, WORDPIECE, "Unforgettably, it isn't.", 'max_abs'))['Unforgettably'] == -4

@pytest.mark.parametrize('ids, scores, method, message', [
    ([101, 2204, 102], [0., 1., 0.], 'mean', "method='mean' is not known"),
    ([101, 2204, 102], [0., 1.], 'sum', '3 token ids but 2 scores'),
    ([101, 2919, 102], [0., 1., 0.], 'sum', 'not what this tokenizer makes'),
    ([], [], 'sum', 'not what this tokenizer makes')])
def test_refused_aggregation(ids, scores, method, message):
    with pytest.raises(ValueError, match=message): aggregate_subword_attributions(ids, scores, WORDPIECE, 'good', method)

def test_scores_may_carry_a_gradient():
    scores = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    assert aggregate_subword_attributions(torch.tensor([101, 2204, 102]), scores, WORDPIECE, 'good')[1] == ('good', 1.)

# families

def test_families_are_read_from_the_machinery():
    assert {n: token_kind(t).name for n, t in TOKENIZERS.items()} == {n: n.split('_')[0] for n in TOKENIZERS}
    llama = fixed(['▁good', 'ing'], decoder=decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse()]))
    assert token_kind(llama) == TokenKind('metaspace', '▁')
    clip = wrap(Tokenizer(models.BPE({'a</w>': 0}, [], end_of_word_suffix='</w>')))
    assert token_kind(clip) == TokenKind('suffix', '</w>')
    other_prefix = wrap(Tokenizer(models.WordPiece({'a': 0, '@@b': 1}, continuing_subword_prefix='@@')))
    assert token_kind(other_prefix) == TokenKind('wordpiece', '@@')
    assert token_kind(fixed(['good', 'bad'])).name == 'plain'
    assert token_kind(fixed(['good', '##ing', '##ed'])).name == 'wordpiece'          # no machinery says so: the entries do
    assert token_kind(fixed([f'word{i}' for i in range(200)] + ['##'])).name == 'plain'  # one stray entry is no convention

_SPM = [(t, 0.) for t in ('<s>', '<pad>', '</s>', '<unk>', '[CLS]', '[SEP]', '<mask>', '[MASK]')] + [('▁good', -1.), ('▁', -2.), ('film', -2.), ('s', -3.)]
_WP = {t: i for i, t in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '<s>', '</s>', '<pad>', '<unk>', '<mask>', 'good', '##film', '##s'])}
_BPE = {t: i for i, t in enumerate(['<s>', '<pad>', '</s>', '<unk>', '<mask>', '[CLS]', '[SEP]', '[PAD]', '[MASK]', '[UNK]', 'g', 'o', 'd', 'Ġ', 'go', 'od', 'good', 'Ġgood'])}
_MERGES = [('g', 'o'), ('o', 'd'), ('go', 'od'), ('Ġ', 'good')]

@pytest.mark.parametrize('name, kind, vocabulary', [
    *((n, 'metaspace', dict(vocab=_SPM)) for n in ('XLMRobertaTokenizer', 'AlbertTokenizer', 'DebertaV2Tokenizer', 'CamembertTokenizer')),
    *((n, 'wordpiece', dict(vocab=_WP)) for n in ('BertTokenizer', 'DistilBertTokenizer', 'ElectraTokenizer', 'MPNetTokenizer')),
    *((n, 'bytelevel', dict(vocab=_BPE, merges=_MERGES)) for n in ('RobertaTokenizer', 'DebertaTokenizer'))])
def test_tokenizer_classes_of_transformers(name, kind, vocabulary):
    tokenizer = getattr(transformers, name)(**vocabulary)
    assert token_kind(tokenizer).name == kind
    assert [w for w, m in zip(vocabulary_words(tokenizer), content_word_mask(tokenizer).tolist()) if m] == ['good']
    good = word_to_id(tokenizer, 'Good')
    words = align_words(tokenizer, 'good good')
    assert [w.text for w in words] == ['good', 'good'] and words[-1].tokens == (tokenizer('good good').input_ids.index(good, 2),)

def test_bytes():
    assert len(_BYTES) == 256 and {chr(c) for c in _BYTES} == set(pre_tokenizers.ByteLevel.alphabet())
    kind = token_kind(BYTES)
    for text in (' café', '你好', ' 😀', '\n', 'œ'):
        spelled = ''.join(t for t, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
        assert token_text(spelled, kind) == text
    assert clean_token('Ċ', kind) == 'Ċ' and clean_token('ð', kind) == '\\xf0'

@each
def test_names_decode_as_the_tokenizer_does(name):
    tokenizer = TOKENIZERS[name]
    names, special = vocabulary_words(tokenizer), set(tokenizer.all_special_ids)
    assert len(names) == len(tokenizer) and all(names)
    for i in range(0, len(tokenizer), 1 + len(tokenizer)//500):
        text = tokenizer.decode([i]).strip()
        if i in special or not text or '\ufffd' in text or ' ' in names[i]: continue
        assert names[i] == (text.removeprefix('##') if name == 'wordpiece' and text != '##' else text)

# masks

@each
def test_masks_are_nested_and_clean(name):
    tokenizer = TOKENIZERS[name]
    size = len(tokenizer) + 7
    clean, content, everything = get_clean_vocab_mask(tokenizer, size), content_word_mask(tokenizer, size), vocabulary_mask(tokenizer, 'all', size)
    assert clean.shape == content.shape == everything.shape == (size,) and clean.dtype == torch.bool
    assert not (content & ~clean).any() and not (clean & ~everything).any() and not everything[-7:].any() and content.any()
    assert everything.sum().item() == len(tokenizer) - len(set(tokenizer.all_special_ids))
    assert torch.equal(clean[:-7], get_clean_vocab_mask(tokenizer))
    words = vocabulary_words(tokenizer, size)
    for i in clean.nonzero()[:, 0].tolist():
        letters = [c for c in words[i] if c not in "'’-"]
        assert all(unicodedata.category(c)[0] in 'LM' for c in letters) and i not in tokenizer.all_special_ids
        assert len(words[i]) > 1 or words[i] in 'aiAI'
    for i in content.nonzero()[:, 0].tolist(): assert not is_stop_word(words[i])

def test_negations_are_kept_in_every_family():
    said = ['no', 'not', 'never', 'nothing', 'none', 'nor', 'neither', 'cannot', 'without', "don't", "n't", 'didn']
    dropped = ['the', 'from', "it's", "they'll", 'of', 'The']
    families = [fixed(said + dropped), fixed(['▁' + w for w in said + dropped], pre_tokenizer=pre_tokenizers.Metaspace()),
                fixed(['Ġ' + w for w in said + dropped], pre_tokenizer=pre_tokenizers.ByteLevel())]
    for tokenizer in families:
        names = vocabulary_words(tokenizer)
        assert [w for w, m in zip(names, content_word_mask(tokenizer).tolist()) if m] == said
    tails = fixed(["'t", "n't", "'s", 'good', 'Ġgood'], pre_tokenizer=pre_tokenizers.ByteLevel())
    assert content_word_mask(tails).tolist() == [False]*5 + [True, True, False, False, True]

def test_letters_of_other_scripts_are_words_but_not_english():
    entries = ['привет', 'नमस्ते', '你', '你好', 'café', 'cafe\u0301', 'b', 'a', 'e-mail', '-mail', 'mail-', '1st', '½', 'i']
    tokenizer = fixed(['▁' + w for w in entries], pre_tokenizer=pre_tokenizers.Metaspace())
    pick = lambda mask: [w for w, m in zip(vocabulary_words(tokenizer), mask.tolist()) if m]
    assert pick(get_clean_vocab_mask(tokenizer)) == ['привет', 'नमस्ते', '你好', 'café', 'cafe\u0301', 'a', 'e-mail', 'i']
    assert pick(content_word_mask(tokenizer)) == ['café', 'cafe\u0301', 'e-mail']

def test_added_tokens_are_noticed():
    tokenizer = fixed(['▁good'], pre_tokenizer=pre_tokenizers.Metaspace())
    assert len(vocabulary_words(tokenizer)) == 6
    tokenizer.add_tokens(['blursday'])
    tokenizer.add_special_tokens({'additional_special_tokens': ['<e>']} if hasattr(tokenizer, 'additional_special_tokens')
                                 else {'extra_special_tokens': ['<e>']})
    assert vocabulary_words(tokenizer)[6:] == ['blursday', '<e>'] and get_clean_vocab_mask(tokenizer).tolist()[5:] == [True, True, False]
    assert word_to_id(tokenizer, 'blursday') == 6 and not vocabulary_mask(tokenizer, 'all')[7]

def test_holes_in_the_ids_are_never_words():
    t = Tokenizer(models.WordLevel({'<s>': 0, '<unk>': 1, '</s>': 2, '<pad>': 3, '<mask>': 4, 'good': 9}, unk_token='<unk>'))
    tokenizer = wrap(t)
    assert vocabulary_words(tokenizer)[5:] == ['[row 5]', '[row 6]', '[row 7]', '[row 8]', 'good']
    assert vocabulary_mask(tokenizer, 'all').nonzero()[:, 0].tolist() == [9]
    with pytest.raises(ValueError, match='not an id'): word_to_id(tokenizer, 7)

def test_stop_words_file():
    words = stop_words()
    assert len(words) > 150 and not words & NEGATIONS and not words & _NEGATION_TAILS
    assert all(w == normalise_word(w) and w.isalpha() for w in words)
    assert not words & {'like', 'good', 'bad', 'too', 'very', 'only', 'more', 'one', 'didn', 'don', 'won'}
    assert words >= {'the', 'of', 'from', 'and', 'i', 'is', 'would', 'who', 'll'}

def test_refused_vocabularies():
    with pytest.raises(ValueError, match='belongs to this model'): vocabulary_mask(WORDPIECE, 'words', 1000)
    with pytest.raises(ValueError, match="choose 'words', 'all' or a list"): vocabulary_mask(WORDPIECE, 'word')
    with pytest.raises(ValueError, match='no dimension'): vocabulary_mask(WORDPIECE, [])
    with pytest.raises(ValueError, match='no dimension'): vocabulary_mask(fixed(['▁你', '▁好'], pre_tokenizer=pre_tokenizers.Metaspace()))
    with pytest.raises(ValueError, match="'blursday'.*'##sd'.*'brillant'.*near words: 'brilliant'"):
        vocabulary_mask(WORDPIECE, ['good', 'blursday', 'brillant'])
    with pytest.raises(ValueError, match='and 2 more'): vocabulary_mask(WORDPIECE, [f'blursday{i}' for i in range(7)])
    with pytest.raises(ValueError, match="'\\[CLS\\]' is not one"): vocabulary_mask(WORDPIECE, ['[CLS]'])

# words and ids

@each
def test_every_whole_word_finds_an_entry_of_its_name(name):
    tokenizer = TOKENIZERS[name]
    v = read_vocabulary(tokenizer)
    for i in range(0, len(v.tokens), 1 + len(v.tokens)//1000):
        if not v.whole[i]: continue
        assert word_to_id(tokenizer, v.words[i]) == i and i in surface_forms(tokenizer, v.words[i]).values()
        assert word_to_id(tokenizer, v.tokens[i]) == i or v.tokens[i] in _NEGATION_TAILS

def test_the_word_is_preferred_to_the_piece():
    tokenizer = fixed(['good', 'Ġgood', 'ĠGood', 'Ġ1999', '1999', '!', 'Ġ!', 'ing'], pre_tokenizer=pre_tokenizers.ByteLevel())
    found = lambda w: read_vocabulary(tokenizer).tokens[word_to_id(tokenizer, w)]
    assert [found(w) for w in ('good', ' good', 'Good', 'GOOD', 'Ġgood', '1999', '!')] == ['Ġgood', 'Ġgood', 'ĠGood', 'Ġgood', 'Ġgood', 'Ġ1999', '!']
    with pytest.raises(ValueError, match="'ing' is not one"): word_to_id(tokenizer, 'ing')
    assert word_to_id(tokenizer, read_vocabulary(tokenizer).ids['ing']) == len(tokenizer) - 1
    assert surface_forms(tokenizer, 'good').keys() == {'good', ' good', ' Good'}

@pytest.mark.parametrize('word, message', [('', 'empty'), ('  ', 'empty'), ('blursday', "split into 'blur', '##sd', '##ay'"),
    ('brillant', "'brilliant'"), ('[MASK]', "read as '\\[MASK\\]'"), ('😀😀😀', 'near words: none')])
def test_unknown_words_are_one_sentence(word, message):
    with pytest.raises(ValueError, match=message) as e: word_to_id(WORDPIECE, word)
    assert str(e.value).count('. ') == 0 and str(e.value).endswith('.')

def test_surface_forms():
    assert surface_forms(WORDPIECE, 'movie').keys() == {'movie', 'movies'}
    assert surface_forms(WORDPIECE, 'Lady').keys() == {'lady', 'ladies'} and surface_forms(WORDPIECE, 'class').keys() == {'class', 'classes'}
    assert 'day' not in surface_forms(WORDPIECE, 'days') and surface_forms(WORDPIECE, 'boy').keys() == {'boy', 'boys'}
    assert 'man' in surface_forms(WORDPIECE, 'man') and WORDPIECE.convert_tokens_to_ids('##man') not in surface_forms(WORDPIECE, 'man').values()
    assert surface_forms(fixed(["▁movie", "▁movie's", "▁movies'", "▁Movies", "movie", "▁MOVIE"], pre_tokenizer=pre_tokenizers.Metaspace()),
                         'movie').keys() == {' movie', 'movie', ' MOVIE', ' Movies', " movie's", " movies'"}

@many
@given(w=st.text(max_size=12))
def test_normalising_twice_changes_nothing(w):
    assert normalise_word(normalise_word(w)) == normalise_word(w) == normalise_word(f' {w} ')

def test_text_words():
    assert text_words("The café’s witty -- it isn't Feel-Good…") == {'the', "cafe's", 'cafe', 's', 'witty', 'it', "isn't", 'isn', 't', 'feel', 'good'}
    assert text_words('') == set()
