"Chapters 05a and 05b: who may be read, error sentences, independence of batches, and the two experiments end to end."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from lexical_sae.dense import DenseClassifier
from lexical_sae.dla import ClassifierHead, circuit_state
from lexical_sae.explainers import WORD_METHODS, Reader, compare_explainers, explain_dims, explain_words
from lexical_sae.faithfulness import (greedy_scores, greedy_word_scores, measure_faithfulness, off_distribution, rationale_agreement, word_scores,
                                      words_curve)
from lexical_sae.grounding import centred_contributions
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.scaling import removal_effects
from lexical_sae.words import word_spans

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ['a wonderful film about a river bank', 'the plot is dull and the actors are bored', 'she took money to the bank', 'he sat on the bank of the river, and read']
LABELS = [1, 0, 1, 0]

def config():
    return BertConfig(vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=.3,
                      max_position_embeddings=48)

@pytest.fixture(scope='module')
def tokenizer(): return AutoTokenizer.from_pretrained(ROOT/'assets/minilm-mlm')

def build(tokenizer, names=('neg', 'pos')):
    torch.manual_seed(0)
    made = LexicalSAEForSequenceClassification.from_backbone(BertForMaskedLM(config()), label_names=list(names), tokenizer=tokenizer, check=False,
                                                             initial_words=30, classifier_hidden=8)
    with torch.no_grad(): made.head.fc2.weight.normal_()
    made.start_threshold(TEXTS)
    return made.eval()

@pytest.fixture(scope='module')
def model(tokenizer): return build(tokenizer)

@pytest.fixture(scope='module')
def twin():
    torch.manual_seed(0)
    return DenseClassifier(BertModel(config(), add_pooling_layer=False), 2).eval()

# ---- the reader ------------------------------------------------------------------------------------------------
def test_logits_do_not_depend_on_order_or_batch(model, twin, tokenizer):
    for reader in (Reader(model), Reader(twin, tokenizer)):
        alone = torch.cat([reader.read([t]) for t in TEXTS])
        assert torch.allclose(reader.read(TEXTS, batch_size=3), alone, atol=1e-4) and reader.readings == 8
        assert torch.allclose(reader.read(TEXTS[::-1]), alone.flip(0), atol=1e-4)

def test_reader_reads_what_the_model_reads(model, twin, tokenizer):
    with torch.no_grad():
        assert torch.allclose(Reader(model).read(TEXTS), model.classify(model.encode(**model.batch(TEXTS))).logits, atol=1e-4)
        enc = tokenizer(TEXTS, padding=True, return_tensors='pt')
        assert torch.allclose(Reader(twin, tokenizer).read(TEXTS), twin(enc['input_ids'], enc['attention_mask']).logits, atol=1e-4)

def test_reader_knows_positions_that_padding_takes(tokenizer):
    "A RoBERTa of 40 positions reads 38 tokens."
    shape = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=40, pad_token_id=1)
    reader = Reader(DenseClassifier(RobertaModel(RobertaConfig(**shape), add_pooling_layer=False)).eval(), tokenizer)
    assert reader.max_length == 38 and reader.read(['bank '*100]).isfinite().all()
    assert Reader(reader.model, tokenizer, max_length=5).batch(['bank '*100])['input_ids'].shape == (1, 5)

def test_a_reader_says_what_it_cuts(model, recwarn):
    Reader(model).batch(['bank', 'bank '*100, 'river '*90])
    assert [str(w.message) for w in recwarn] == ['2 of 3 texts are longer than 48 tokens and were truncated.']
    Reader(model, max_length=5).batch(['bank '*100]); Reader(model).batch(TEXTS)
    assert len(recwarn) == 1

def test_of_keeps_a_reader(model):
    reader = Reader(model, max_length=7)
    assert Reader.of(reader) is reader and Reader.of(model).max_length == 48

LONG = [f'{t} , though {u} and {t} {i} times' for i, (t, u) in enumerate(zip(TEXTS, TEXTS[::-1]))]

@pytest.mark.parametrize('network', ['model', 'twin'])
def test_a_long_text_is_measured_as_the_part_that_is_read(request, tokenizer, network):
    "Words beyond the limit are no units: they are neither counted nor pulled into view when others go."
    reader = Reader(request.getfixturevalue(network), tokenizer, max_length=9)
    parts = [reader.read_part(t) for t in LONG]
    assert all(t.startswith(p) and len(word_spans(t)) > 2*len(word_spans(p)) for t, p in zip(LONG, parts)) and reader.read_parts(parts) == parts
    def equal(of): assert of(LONG).equals(of(parts)) if isinstance(of(LONG), pd.DataFrame) else str(of(LONG)) == str(of(parts))
    methods = {'random': 'random', 'greedy': 'greedy', 'occlusion': lambda r, t: explain_words(r, t, 'occlusion').scores} | ({'dla': 'dla'} if reader.exact else {})
    equal(lambda texts: measure_faithfulness(reader, texts, methods, level='words', progress=False))
    equal(lambda texts: compare_explainers(reader, texts, progress=False, samples=20, steps=4)[1])
    equal(lambda texts: greedy_word_scores(reader, texts[0]))
    order = [torch.arange(len(word_spans(t)), dtype=torch.float).flip(0) for t in LONG]
    equal(lambda texts: words_curve(reader, texts, order).without)
    if reader.exact:
        equal(lambda texts: word_scores(reader, texts)); equal(lambda texts: measure_faithfulness(reader, texts, progress=False))
        equal(lambda texts: off_distribution(reader, TEXTS, texts))

def test_the_part_that_a_twin_reads_is_the_models(model, twin, tokenizer):
    for n in range(3, 20): assert [Reader(twin, tokenizer, n).read_part(t) for t in LONG] == [model.read_part(t, n) for t in LONG] == Reader(model, max_length=n).read_parts(LONG)

def test_a_part_is_read_whole(tokenizer):
    "Cut within a word, the rest of it may take more tokens than the whole did: the part is cut until it fits."
    class Syllables:
        "Two letters a token but for one word, which is one token when it is whole."
        is_fast, mask_token = True, '?'
        def num_special_tokens_to_add(self): return 0
        def __call__(self, text, truncation, max_length, **_):
            whole = [(0, 8), (8, 10)] if text.startswith('abcdefgh') and len(text) > 9 else [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
            return {'offset_mapping': whole[:max_length]}
    reader = Reader.__new__(Reader)
    reader.tokenizer, reader.max_length, reader.config = Syllables(), 1, BertConfig()
    reader.config.max_positions = 9
    assert reader.read_part('abcdefghij') == 'ab' == reader.read_part('ab')

def test_a_warning_says_what_is_left_out(model, recwarn):
    measure_faithfulness(model, [*TEXTS, 'bank '*100], ('random',), level='words', progress=False)
    assert [str(w.message) for w in recwarn if 'truncated' in str(w.message)] == ['1 of 5 texts are longer than 48 tokens and were truncated.']

# ---- faithfulness ----------------------------------------------------------------------------------------------
def test_every_text_with_a_reader_or_a_model(model):
    for level in ('dims', 'words'):
        a, b = (measure_faithfulness(m, TEXTS, ('dla', 'random'), level=level, progress=False) for m in (model, Reader(model)))
        assert a.equals(b) and (a.filter(like='flipped@') <= 1).all(axis=None)

def test_gradient_and_exact_scores_erase_alike(model):
    "Theorem 1: the same scores on the same texts, so the same table."
    by = lambda method: lambda model, text: explain_dims(model, text, method).scores
    table = measure_faithfulness(model, TEXTS, {'dla': 'dla'} | {m: by(m) for m in ('gradient_x_input', 'random')}, progress=False)
    assert table.loc['gradient_x_input'].values == pytest.approx(table.loc['dla'].values, abs=1e-5)
    assert abs(table.loc['random'] - table.loc['dla']).max() > 1e-3     # the test can tell methods apart

def test_the_dense_twin_is_measured_on_words(twin, tokenizer):
    reader = Reader(twin, tokenizer)
    methods = {'occlusion': lambda r, t: explain_words(r, t, 'occlusion').scores, 'greedy': 'greedy', 'random': 'random'}
    table = measure_faithfulness(reader, TEXTS, methods, level='words', progress=False)
    assert table.loc['greedy', 'comprehensiveness'] >= table.loc['random', 'comprehensiveness']
    for t in TEXTS: assert greedy_word_scores(reader, t).argmax() == explain_words(reader, t, 'occlusion').scores.argmax()   # two classes: the first step is occlusion

def test_a_twin_of_yes_and_no_is_not_measured_on_one_class(tokenizer):
    several = DenseClassifier(BertModel(config(), add_pooling_layer=False), 2, multilabel=True).eval()
    with pytest.raises(ValueError, match='is a yes or no'): measure_faithfulness(Reader(several, tokenizer), TEXTS, ('random',), level='words')

@pytest.mark.parametrize('kwargs', [dict(), dict(level='words'), dict(methods=('random',))])
def test_the_dense_twin_has_no_exact_answer(twin, tokenizer, kwargs):
    with pytest.raises(ValueError, match="use level='words' and methods without 'dla'"): measure_faithfulness(Reader(twin, tokenizer), TEXTS, **kwargs)

def test_refusals(model, twin):
    with pytest.raises(ValueError, match='does not know its tokenizer'): measure_faithfulness(twin, TEXTS, ('random',), level='words')
    with pytest.raises(ValueError, match="'dims' or 'words', got 'tokens'"): measure_faithfulness(model, TEXTS, level='tokens')
    with pytest.raises(ValueError, match='no word to explain'): explain_words(model, ' ')

def test_whole_numbers_of_words_take_them_all(model):
    scores = [word_scores(model, t) for t in TEXTS]
    curve = words_curve(model, TEXTS, scores, bins=(100,))
    assert torch.allclose(curve.alone[:, 0], curve.before, atol=1e-5) and curve.kept.all()
    nothing = Reader(model).read(['[MASK]']).softmax(-1)[0]
    chosen = Reader(model).read(TEXTS).argmax(-1)
    assert torch.allclose(curve.without[:, 0], nothing[chosen], atol=1e-5)

def test_mode_is_given_back(model):
    model.train()
    measure_faithfulness(model, TEXTS, ('random',), progress=False); off_distribution(model, TEXTS, TEXTS[:2])
    assert model.training
    model.eval()

def test_no_answer_depends_on_the_mode(model, twin, tokenizer):
    "Dropout draws anew at every reading: who is asked in training mode answers as in evaluation, and is given back as it was."
    scores, ask = [torch.arange(float(len(word_spans(t)))) for t in TEXTS], [lambda: explain_dims(model, TEXTS[0], 'dla').scores, lambda: explain_dims(model, TEXTS[0], 'greedy').scores,
        lambda: word_scores(model, TEXTS[0]), lambda: torch.cat(word_scores(model, TEXTS)), lambda: words_curve(model, TEXTS, scores).without, lambda: greedy_word_scores(model, TEXTS[0]),
        lambda: explain_words(model, TEXTS[0]).scores, lambda: greedy_word_scores(Reader(twin, tokenizer), TEXTS[0]), lambda: words_curve(Reader(twin, tokenizer), TEXTS, scores).alone]
    quiet = [f() for f in ask]
    model.train(); twin.train()
    assert not torch.equal(Reader(twin, tokenizer).read(TEXTS), Reader(twin, tokenizer).read(TEXTS))    # there is something to depend on
    loud = [f() for f in ask]
    assert model.training and twin.training
    model.eval(); twin.eval()
    for a, b in zip(quiet, loud): assert torch.equal(a, b)

def test_off_distribution_erases_what_was_asked_for(model):
    "The distance of a text with nothing but its loudest word left grows with the share."
    found = [off_distribution(model, TEXTS, TEXTS, share)['dimensions zeroed']['distance'] for share in (.05, .5, .9)]
    assert found[0] < found[1] < found[2]

# ---- rationales ------------------------------------------------------------------------------------------------
def test_iou_is_one_for_the_same_marks_and_needs_lengths():
    marks = [torch.tensor([0, 1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0, 0]).bool()]
    found = rationale_agreement([m.float() for m in marks[:1]], marks[:1])
    assert found == pytest.approx(dict(token_f1=1, iou_f1=1, auprc=1, average_precision=1, share=.6, texts=1))
    with pytest.raises(ValueError, match='Text 1 has 4 scores but 5 marks'): rationale_agreement([torch.ones(5), torch.ones(4)], marks)

def test_iou_averages_precision_and_recall_before_f1():
    "One of one span right, and one of two against one of one: precision (1 + 1)/2, recall (1 + 1/2)/2."
    marks = [torch.tensor([1, 1, 0, 0, 0, 0]).bool(), torch.tensor([1, 1, 0, 0, 0, 1]).bool()]
    scores = [torch.tensor([9., 8, 1, 1, 1, 1]), torch.tensor([9., 8, 1, 1, 1, 1])]
    assert rationale_agreement(scores, marks, share=1/3)['iou_f1'] == pytest.approx(2*1*.75/1.75)

# ---- explainers ------------------------------------------------------------------------------------------------
def test_all_methods_on_both_networks(model, twin, tokenizer):
    for network, methods in ((model, WORD_METHODS), (twin, [m for m in WORD_METHODS if m != 'dla'])):
        table, scores = compare_explainers(network, TEXTS[:2], WORD_METHODS, tokenizer, progress=False, samples=20, steps=4)
        assert list(scores) == list(methods) == list(table.index)
        assert all(len(s) == len(word_spans(t)) and s.isfinite().all() for found in scores.values() for s, t in zip(found, TEXTS))

@pytest.mark.parametrize('method', WORD_METHODS)
def test_a_text_of_one_word_is_explained(model, method):
    found = explain_words(model, 'superb', method, samples=20, steps=4)
    assert found.scores.shape == (1,) and found.scores.isfinite().all()
    if method == 'kernel_shap': assert found.scores.item() == pytest.approx(explain_words(model, 'superb', 'occlusion').scores.item())

@pytest.mark.parametrize('method', ['lime', 'kernel_shap'])
def test_a_seed_is_a_seed_and_leaves_the_callers_alone(model, method):
    score = lambda seed: explain_words(model, TEXTS[0], method, seed, samples=20).scores
    torch.manual_seed(5); np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    a, b, c = score(0), score(0), score(1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all() and np.random.get_state()[2] == before[2]

def test_integrated_gradients_converge_where_padding_has_no_position(tokenizer):
    "RoBERTa counts the tokens that are no padding: a baseline of padding tokens, read as ids, would stand at other positions than the path."
    torch.manual_seed(0)
    shape = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=40,
                 pad_token_id=tokenizer.pad_token_id, initializer_range=.5)
    reader = Reader(DenseClassifier(RobertaModel(RobertaConfig(**shape), add_pooling_layer=False)).eval(), tokenizer)
    gaps = [sum(explain_words(reader, t, 'integrated_gradients', steps=n).delta for t in TEXTS)/len(TEXTS) for n in (4, 32, 256)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < .005

@pytest.mark.parametrize('classes', [2, 3])
def test_word_scores_are_the_explanations_less_the_average_class(tokenizer, classes):
    made = build(tokenizer, [f'c{i}' for i in range(classes)])
    for t in TEXTS:
        at = [start for start, _ in word_spans(t)]
        def parts(c):
            "Of one logit alone; for two classes `explain` gives the difference of both, which is twice the centred one."
            found = {w.start: w.contribution for w in made.explain(t, target=c).words}
            return torch.tensor([found[i] for i in at])
        c = int(Reader(made).read([t]).argmax())
        wanted = parts(c)/2 if classes == 2 else parts(c) - sum(map(parts, range(3)))/3
        assert word_scores(made, t).tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
        assert explain_words(made, t).scores.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)

# ---- experiments -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def trained(tmp_path_factory, tokenizer):
    "A model, a dense backbone and a task with marked words, as folders."
    folder = tmp_path_factory.mktemp('task')
    build(tokenizer).save_pretrained(folder/'model')
    rows = [dict(text=f'{t} {i}', label=('NEG', 'POS')[l], rationale_tokens=[[0, 2], [3, 4]] if i % 2 else [])
            for i, (t, l) in enumerate(zip(TEXTS*6, LABELS*6))]
    (folder/'data').mkdir()
    for name, part in dict(train=rows, test=rows[:8]).items(): (folder/'data'/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, part)))
    return folder

def experiment(folder, **params):
    file = folder/'params.yaml'
    given = dict(output_dir=str(folder/'runs'), dataset_name='toy', source=str(folder/'data'), model_name=str(folder/'model'), max_length=32, steps=3,
                 samples=12)
    file.write_text(yaml.safe_dump(given | params))
    done = subprocess.run([sys.executable, ROOT/'tools/run_experiment.py', file], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads((folder/'runs'/params['experiment_name']/'results.json').read_text())['metrics'], done.stdout

@pytest.mark.slow
def test_faithfulness_with_rationales(trained):
    "Class names in capitals, texts without a mark, no greedy oracle; every method on dimensions has all texts."
    found, said = experiment(trained, notebook='faithfulness', experiment_name='f', explained=6, rationales=True, greedy_words=False)
    always, = re.findall(r'^measures = (\[.*?\])', '\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs/experiments/faithfulness.ipynb').read_text())['cells']), re.M)
    assert set(ast.literal_eval(always)) == set(found) - {'accuracy'}
    assert 'greedy' not in found['words'] and 'greedy' in found['dims'] and set(found['words']) == set(WORD_METHODS)
    assert {m for m, c in found['cost_against_dla'].items() if 'seconds_together' in c} == {'integrated_gradients', 'occlusion', 'lime', 'kernel_shap'}
    assert found['dims']['gradient_x_input'] == pytest.approx(found['dims']['dla'], abs=1e-5) and found['distance_to_exact']['gradient_x_input'] < 1e-5
    assert found['texts_without_rationale'] == 3 and {r['texts'] for r in found['rationales'].values()} == {3}
    assert found['words_read'] == dict(share=1., cut=0, texts=8) and '3 of 6 texts have no marked word' in said
    found, said = experiment(trained, notebook='faithfulness', experiment_name='g', explained=2, max_length=6, methods=['dla', 'random'])
    assert found['words_read']['cut'] == 8 and found['words_read']['share'] < .8 and 'greedy' in found['words'] and not found['rationales']

@pytest.mark.slow
def test_comparison_explains_both_networks(trained):
    found, _ = experiment(trained, notebook='comparison', experiment_name='c', explained=1, training=dict(num_train_epochs=1, warmup_steps=1),
                          positive_class=None, published=str(ROOT/'paper/published.yaml'))
    ours, twin = found['explainers']['Lexical-SAE'], found['explainers']['dense twin']
    assert set(ours) == set(WORD_METHODS) | {'greedy'} and set(twin) == set(ours) - {'dla'} and found['explained'] == 1
    assert ours['dla']['readings'] == 1 and all(0 <= r['flipped@10'] <= 1 for r in (ours | twin).values())

def test_one_logit_is_explained_by_its_own_parts(tokenizer):
    "A question has no other class whose mean could be taken away."
    torch.manual_seed(0)
    asked = LexicalSAEForSequenceClassification.from_backbone(BertForMaskedLM(config()), label_names=['yes'], problem_type='multi_label_classification', tokenizer=tokenizer, check=False,
                                                              initial_words=30, classifier_hidden=8).eval()
    with torch.no_grad(): asked.head.fc2.weight.normal_()
    for t in TEXTS[:2]:
        state, scores = Reader(asked).state([t]), word_scores(asked, t)
        assert scores.abs().max() > 1e-3 and scores.sum().item() == pytest.approx((state.logits - state.b_eff).item(), abs=1e-4)
        assert explain_words(asked, t, 'occlusion').scores.abs().max() > 1e-4
        own = state.attribution(torch.zeros(1, dtype=torch.long))
        for found in (centred_contributions(state), explain_dims(asked, t, 'dla').scores, explain_dims(asked, t, 'gradient_x_input').scores):
            assert torch.allclose(found.flatten(), own.flatten(), atol=1e-5)
        j, lost = int(own[0].argmax()), removal_effects(state)
        assert lost[0, j].item() == pytest.approx((state.logits - asked.head(state.sparse_vector.index_fill(1, torch.tensor([j]), 0.))).item(), abs=1e-5)
        assert sorted(greedy_scores(state)[0].topk(int(state.num_active)).indices.tolist()) == state.sparse_vector[0].nonzero()[:, 0].tolist()

def test_a_sure_prediction_still_has_an_order():
    "The probability is 1 to the last bit whatever goes, its odds are not."
    head = ClassifierHead(3, 2, hidden=0)
    with torch.no_grad(): head.fc2.weight[1] = torch.tensor([1., 3., 2.]); head.fc2.bias[1] = 60.
    assert greedy_scores(circuit_state(torch.ones(1, 3), head))[0].argsort(descending=True).tolist() == [1, 2, 0]

def test_three_classes_are_taken_apart_by_probability(tokenizer):
    "Each step of the oracle against every trial, by the head as it is."
    state = Reader(build(tokenizer, ['a', 'b', 'c'])).state(TEXTS)
    scores = greedy_scores(state)
    for b, s in enumerate(state.sparse_vector):
        c, left = state.logits[b].argmax(), s.nonzero()[:, 0].tolist()
        for j in scores[b].argsort(descending=True)[:min(5, len(left))].tolist():
            without = torch.stack([state.head(s.clone().index_fill(0, torch.tensor([i]), 0.)[None])[0].double().softmax(-1)[c] for i in left])
            assert without[left.index(j)] <= without.min() + 1e-6
            s = s.index_fill(0, torch.tensor([j]), 0.); left.remove(j)
