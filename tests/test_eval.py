"Chapters 05 and 05aa: every tier against a slow recomputation, independence of batches and of other tiers, edge cases, error sentences."
import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lexical_sae.circuits import CompletenessFitter, SeparationFitter, circuit_sizes, separate
from lexical_sae.entities import entity_scores
from lexical_sae.eval import CHEAP, TIERS, EvaluationData, MechanisticReport, evaluate
from lexical_sae.faithfulness import Reader, measure_faithfulness
from lexical_sae.grounding import FrozenReference, centred_contributions
from lexical_sae.model import LexicalSAEForSequenceClassification, LexicalSAEForTokenClassification
from lexical_sae.ner import predict_tags, tag_batches
from lexical_sae.tag_explain import centred_tag_contributions
from lexical_sae.testing import SYLLABLES, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(40)
LABELS = [int(t < 'f') for t in TEXTS]
SENTENCES = [t.split() for t in TEXTS[:12]]
GOLD = [['B-X'] + ['O']*(len(s) - 1) for s in SENTENCES]

def build(kind, labels, **kwargs):
    return tiny_model(kind, tiny_tokenizer(SYLLABLES, marked=False), dict(initializer_range=.3), label_names=list(labels), vocabulary='all',
                      **dict(classifier_hidden=8, initial_words=12) | kwargs)

@pytest.fixture(params=[8, 0], ids=['mlp', 'linear'])
def model(request):
    made = build(LexicalSAEForSequenceClassification, ('no', 'yes', 'so'), classifier_hidden=request.param)
    made.start_threshold(TEXTS)
    with torch.no_grad():                                                  # random weights would call every text the same
        made.head.fc2.bias -= classified(made).logits.mean(0)
    return made.eval()

@pytest.fixture
def tagger():
    made = build(LexicalSAEForTokenClassification, ('O', 'B-X', 'I-X'))
    made.start_threshold(TEXTS, per_position=True)
    with torch.no_grad(): made.head.fc2.bias -= torch.cat([s.logits for _, s in tag_batches(made, SENTENCES)]).mean(0)
    return made.eval()

def classified(model, texts=TEXTS):
    with torch.no_grad(): return model.classify(model.encode(**model.batch(texts)))

def data(model, n=20, **kwargs):
    own = dict(texts=TEXTS[:n], labels=LABELS[:n], train_texts=TEXTS[n:], train_labels=LABELS[n:], reference=FrozenReference.of(model))
    return EvaluationData(**own | kwargs)

def figures(report): return {k: v for k, v in report.to_dict().items() if k != 'seconds'}

# ---- circuits ----------------------------------------------------------------------------------------------------
def test_completeness_equals_the_long_way(model):
    state, labels = classified(model), torch.tensor(LABELS)
    fitter = CompletenessFitter(shares=(.1, .5), counts=(1, 3)); fitter.update(state, labels)
    found, part = fitter.fit(), centred_contributions(state).detach()
    assert len(set(state.logits.argmax(-1).tolist())) > 1                  # there is something to lose
    for name, size in (('10%', .1), ('50%', .5), ('1 word', 1), ('3 words', 3)):
        agree, right, kl, words = [], [], [], []
        for b in range(len(TEXTS)):
            order = [j for j in part[b].abs().argsort(descending=True).tolist() if part[b, j] != 0]
            kept = order[:max(1, math.ceil(size*len(order) - 1e-6)) if isinstance(size, float) else size]
            s = torch.zeros_like(state.sparse_vector[b:b + 1]); s[0, kept] = state.sparse_vector[b, kept]
            with torch.no_grad(): p, q = (x.double().softmax(-1) for x in (model.head(s)[0], state.logits[b]))
            agree.append(p.argmax() == q.argmax()); right.append(p.argmax() == labels[b])
            words.append(len(kept)); kl.append((q*(q/p).log()).sum().item())
        row = found.loc[name]
        full = (state.logits.argmax(-1) == labels).double().mean().item()
        assert row.agreement == pytest.approx(np.mean(agree)) and row.accuracy == pytest.approx(np.mean(right)) and row.words == np.mean(words)
        assert row.kl == pytest.approx(np.mean(kl), abs=1e-4) and row.accuracy_kept == pytest.approx(np.mean(right)/full)

def test_everything_kept_is_the_model_itself(model):
    fitter = CompletenessFitter(shares=(1.,), counts=(len(model.tokenizer),)); fitter.update(classified(model), torch.tensor(LABELS))
    found = fitter.fit()
    assert found.agreement.tolist() == [1, 1] and found.kl.tolist() == pytest.approx([0, 0], abs=1e-5) and found.accuracy_kept.tolist() == [1, 1]

def test_circuits_do_not_depend_on_batches(model):
    parts = [(CompletenessFitter(), SeparationFitter(model)) for _ in range(2)]
    for (complete, apart), size in zip(parts, (len(TEXTS), 7)):
        for i in range(0, len(TEXTS), size):
            state = classified(model, TEXTS[i:i + size])
            complete.update(state, torch.tensor(LABELS[i:i + size])); apart.update(state)
    (a, x), (b, y) = parts
    np.testing.assert_allclose(a.fit().to_numpy(), b.fit().to_numpy(), atol=1e-5)
    np.testing.assert_allclose(x.fit().cosine, y.fit().cosine, atol=1e-5)

def test_a_text_without_open_words_keeps_its_prediction(model):
    model.activation.set_threshold(1e6, 1.)
    fitter = CompletenessFitter(); fitter.update(classified(model))
    found = fitter.fit()
    assert (found.words == 0).all() and (found.agreement == 1).all() and 'accuracy' not in found

def test_separation_bounds_and_symmetry():
    mean = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    found = separate(mean, list('abcd'), [str(i) for i in range(300)])
    for table in (found.cosine, found.jaccard):
        assert (0 <= table).all() and (table <= 1 + 1e-9).all() and np.allclose(table, table.T) and np.allclose(np.diag(table), 1)
    louder = separate(mean*torch.tensor([[9.], [1.], [.1], [3.]]), list('abcd'), [str(i) for i in range(300)])
    assert np.allclose(louder.cosine, found.cosine) and np.allclose(louder.jaccard, found.jaccard)       # a class's scale does not matter

def test_silent_words_are_not_shared():
    for V in (3, 60, 5000):
        apart = separate(torch.eye(2, V), ['a', 'b'], [str(i) for i in range(V)]).to_dict()
        assert (apart['jaccard'], apart['cosine'], apart['words']) == (0, 0, {'a': ['0'], 'b': ['1']})
    against = separate(torch.tensor([[-1., -2.], [1., 0.]]), ['a', 'b'], ['x', 'y'])                     # nothing speaks for the first
    assert against.words[0] == () and against.jaccard[0, 1] == 0 and np.isfinite(against.cosine).all()

# ---- the report --------------------------------------------------------------------------------------------------
def test_a_tier_alone_says_what_it_says_among_all(model):
    held = data(model)
    full = evaluate(model, held, TIERS, limit=8)
    for tier in TIERS:
        alone = evaluate(model, held, (tier,), limit=8)
        assert list(alone.tiers) == [tier] == list(alone.seconds) and figures(alone)[tier] == figures(full)[tier]

def test_order_and_repetition_of_tiers(model):
    found = evaluate(model, data(model), ('circuits', 'accuracy', 'circuits'))
    assert list(found.tiers) == ['circuits', 'accuracy'] and found.texts == 20

def test_accuracy_and_identity_are_the_models_own(model):
    found, state = evaluate(model, data(model)), classified(model, TEXTS[:20])
    assert found['accuracy']['accuracy'] == pytest.approx((state.logits.argmax(-1) == torch.tensor(LABELS[:20])).double().mean().item())
    assert found['identity']['identity_error'] <= 1e-5
    assert found['grounding']['active_dims'] == pytest.approx(state.num_active.double().mean().item())

def test_the_seed_draws_the_samples(model):
    run = lambda seed: figures(evaluate(model, data(model, 30), ('layers',), seed=seed, limit=5))['layers']
    assert run(1) == run(1) and run(1) != run(2)
    every = lambda limit: figures(evaluate(model, data(model, 30), ('layers',), limit=limit))['layers']
    assert every(0) == every(30) == every(1000)

def test_without_labels(model):
    found = evaluate(model, data(model, labels=None), ('identity', 'grounding', 'circuits'))
    assert 'accuracy' not in found['circuits']['completeness']['1 word'] and found['identity']['identity_error'] <= 1e-5

@pytest.mark.parametrize('training', [True, False])
def test_the_mode_of_the_model_comes_back(model, training):
    model.train(training); evaluate(model, data(model)); assert model.training == training
    def stop(line): raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): evaluate(model, data(model), report=stop)
    assert model.training == training

def test_one_predicted_class_has_no_separation_and_no_picture(model):
    with torch.no_grad(): model.head.fc2.bias[1] += 1e3
    found = evaluate(model, data(model), CHEAP)
    assert 'separation' not in found['circuits'] and 'completeness' in found['circuits'] and 'circuits' not in found.parts
    with pytest.raises(ValueError, match='No tier of this report has a picture'): evaluate(model, data(model), ('accuracy', 'circuits')).plot()
    json.dumps(found.to_dict())

def drawn(report):
    "The bars of a sheet: tier -> title -> lengths."
    return {row.get_suptitle(): {ax.get_title(): [b.get_width() for b in ax.patches] for ax in row.axes} for row in report.plot().subfigs}

def test_the_sheet_draws_the_figures(model):
    found = evaluate(model, data(model), ('comparisons', 'faithfulness', 'grounding', 'identity'), limit=5)
    sheet, column = drawn(found), lambda rows, what: [r[what] for r in rows.values() if what in r]
    assert list(sheet) == ['comparisons', 'faithfulness', 'grounding']
    assert sheet['comparisons'] == {'accuracy': column(found['comparisons'], 'accuracy'), 'active features': column(found['comparisons'], 'active')}
    assert sheet['faithfulness'] == {f'comprehensiveness, {level}': column(found['faithfulness'][level], 'comprehensiveness') for level in ('dims', 'words')}
    ground = found['grounding']
    assert sheet['grounding'] == {'share of the contributions': [ground[k] for k in ('input_share', 'reference_share', 'association_agreement')]}

def test_the_sheet_of_a_tagger(tagger):
    sheet = drawn(tagged(tagger))
    assert list(sheet) == ['grounding', 'circuits'] and set(sheet['grounding']) == {'O', 'X'}
    assert all(v > 0 for row in sheet['grounding'].values() for v in row)
    tagger.activation.set_threshold(1e6, 1.)
    with pytest.raises(ValueError, match='No tier of this report has a picture'): tagged(tagger, ('grounding',)).plot()

def test_the_table_holds_every_number_and_no_other():
    tiers = {'accuracy': {'accuracy': .5, 'known': True}, 'circuits': {'a': {'b': 2, 'words': ['x']}}}
    report = MechanisticReport(tiers, {'accuracy': 1., 'circuits': 2.}, 3, 7)
    table = report.to_frame().value
    assert table.to_dict() == {('accuracy', 'accuracy'): .5, ('circuits', 'a.b'): 2}
    assert report.to_markdown().splitlines()[2:] == ['| accuracy | accuracy | 0.5 |', '| circuits | a.b | 2 |']
    assert (report.to_dict()['texts'], report.to_dict()['seed'], report.to_dict()['seconds']['circuits']) == (3, 7, 2.)

def test_refusals(model, tagger):
    held = data(model)
    with pytest.raises(ValueError, match="Unknown tier 'x'"): evaluate(model, held, ('accuracy', 'x'))
    with pytest.raises(ValueError, match="Unknown class 'maybe': choose one of no, yes, so"):
        evaluate(model, data(model, positive_class='maybe'), ('grounding',))
    with pytest.raises(ValueError, match='train_labels has 1 entries for 20 texts'): data(model, train_labels=[1])
    with pytest.raises(ValueError, match='labels has 2 entries for 0 texts'): EvaluationData([], [1, 0])
    for tier in TIERS[len(CHEAP):]:
        with pytest.raises(ValueError, match=f"The tier '{tier}' asks about texts"): evaluate(tagger, EvaluationData(SENTENCES, GOLD), (tier,))

def test_the_table_holds_short_lists():
    frontier = [dict(k=1, accuracy=.5, inner=[dict(name='a', x=1.)]), dict(k=5, accuracy=.75)]
    tiers = {'scaling': {'frontier': frontier, 'same': [dict(k=1, v=2), dict(k=1, v=3)], 'mixed': [1, 'x', None, True, {}], 'short': list(range(9)), 'long': [0]*17, 'a|b': 4, 'none': []}}
    report = MechanisticReport(tiers, {'scaling': 1.}, 3, 7)
    own = {'frontier.k=1.accuracy': .5, 'frontier.k=1.inner.name=a.x': 1., 'frontier.k=5.accuracy': .75, 'same[0].k': 1, 'same[0].v': 2, 'same[1].k': 1, 'same[1].v': 3, 'mixed[0]': 1}
    assert report.to_frame().loc['scaling'].value.to_dict() == own | {f'short[{i}]': i for i in range(9)} | {'a|b': 4}
    assert len(report.to_frame(20)) == len(own) + 9 + 1 + 17
    assert len(report.to_markdown().splitlines()) == 2 + len(own) + 1 and r'| scaling | a\|b | 4 |' in report.to_markdown()

def test_the_sheet_stays_a_sheet_with_many_classes():
    names = [f'c{i}' for i in range(20)]
    apart = separate(torch.eye(20, 30), names, [f'w{i}' for i in range(30)])
    report = MechanisticReport({'circuits': {}}, {'circuits': 1.}, 3, 7, {'circuits': apart})
    row, = report.plot().subfigs
    assert row.get_suptitle() == 'circuits: the first 8 of 20' and [ax.get_title() for ax in row.axes] == names[:8]

def maskless(made):
    made.tokenizer = copy.deepcopy(made.tokenizer)
    made.tokenizer.mask_token = None

@pytest.mark.parametrize('lacking, change, sentence', [
    (dict(train_labels=None), None, 'Comparisons train baselines: give labels, train_texts and train_labels'),
    (dict(labels=None), None, 'Accuracy needs labels'),
    (dict(train_labels=[1]*20), None, 'All training labels are the same'),
    (dict(positive_class='maybe'), None, "Unknown class 'maybe': choose one of no, yes, so"),
    (dict(positive_class=3), None, "Unknown class '3': choose one of no, yes, so"),
    (dict(positive_class='yes', train_labels=[0, 1, 2, 0]*5), None, 'a lexicon against two classes'),
    (dict(positive_class='so'), None, 'a lexicon against two classes'),
    (dict(train_texts=[*TEXTS[20:39], ' ']), None, 'Text 19 is empty'),
    ({}, maskless, "no mask token.*leave the tier 'scaling' or train_texts out"),
    ({}, lambda made: setattr(made, 'query', nn.Parameter(torch.zeros(4))), "leave the tier 'layers' out")])
def test_what_is_missing_is_said_before_anything_runs(model, monkeypatch, lacking, change, sentence):
    held = data(model, **lacking)
    if change: change(model)
    monkeypatch.setattr(type(model), 'encode', lambda *args, **kwargs: pytest.fail('a text was read'))
    with pytest.raises(ValueError, match=sentence): evaluate(model, held, TIERS)

def test_what_no_tier_needs_is_not_asked_for(model):
    found = evaluate(model, data(model, positive_class='maybe', train_labels=None), ('circuits', 'scaling'))
    assert list(found.tiers) == ['circuits', 'scaling']
    maskless(model)
    assert evaluate(model, data(model, train_texts=None, train_labels=None), ('scaling',))['scaling']['downstream'] is None

# ---- taggers -----------------------------------------------------------------------------------------------------
def tagged(tagger, tiers=CHEAP, **kwargs):
    own = dict(texts=SENTENCES, labels=GOLD, train_texts=SENTENCES, train_labels=GOLD, reference=FrozenReference.of(tagger))
    return evaluate(tagger, EvaluationData(**own | kwargs), tiers)

def test_tagger_accuracy_is_that_of_its_tags(tagger):
    found = tagged(tagger)
    assert found['accuracy'] == entity_scores(GOLD, predict_tags(tagger, SENTENCES).tags).to_dict() and found['identity']['identity_error'] <= 1e-5

def test_tagger_circuits_equal_the_long_way(tagger):
    rows, tags = [], [['O', *said[1:]] for said in predict_tags(tagger, SENTENCES).tags]       # right but for first words
    for batch, s in tag_batches(tagger, SENTENCES):
        every = torch.stack([s.attribution(c) for c in range(s.logits.shape[1])], 1).detach()    # [n,C]
        part = every.gather(1, s.logits.argmax(-1)[s.active.row, None])[:, 0] - every.mean(1)
        for r in range(len(s.logits)):
            mine = s.active.row == r
            rows.append((s.sparse_vector.to_dense()[r], part[mine], s.active.dim[mine], s.logits[r].detach(),
                         ('O', 'B-X', 'I-X').index(tags[batch.words[r][0]][batch.words[r][1]])))
    rows = [r for r in rows if r[3].argmax() != 0]                         # positions that are not O
    found = tagged(tagger, ('circuits',), labels=tags)['circuits']['completeness']
    assert rows and list(found) == list(circuit_sizes())
    for name, size in circuit_sizes().items():
        words, kept, flipped, drop, kl, right = [], [], [], [], [], []
        for s, part, dim, logits, gold in rows:
            own = logits.argmax()
            k = size.get('count') or max(1, math.ceil(size['share']*len(part) - 1e-6))
            mine = dim[part.abs().argsort(descending=True)[:k]]
            inside = torch.zeros_like(s); inside[mine] = s[mine]
            with torch.no_grad(): alone, rest = tagger.head(inside[None])[0], tagger.head((s - inside)[None])[0]
            words.append(len(mine)); kept.append(alone.argmax() == own); flipped.append(rest.argmax() != own); drop.append((logits.softmax(-1) - rest.softmax(-1))[own].item())
            p, q = alone.double().softmax(-1), logits.double().softmax(-1)
            kl.append((q*(q/p).log()).sum().item()); right.append(int(alone.argmax()) == gold)
        full = np.mean([int(logits.argmax()) == gold for _, _, _, logits, gold in rows])
        assert found[name]['kl'] == pytest.approx(np.mean(kl), abs=1e-4) and found[name]['accuracy'] == pytest.approx(np.mean(right))
        assert 0 < full < 1 and found[name]['accuracy_kept'] == pytest.approx(np.mean(right)/full)
        assert found[name]['completeness'] == pytest.approx(np.mean(kept)) and found[name]['removability'] == pytest.approx(np.mean(flipped))
        assert found[name]['words'] == pytest.approx(np.mean(words)) and found[name]['probability_drop'] == pytest.approx(np.mean(drop), abs=1e-5)

def test_tagger_separation_equals_the_long_way(tagger):
    total = {'O': torch.zeros(tagger.num_dims), 'X': torch.zeros(tagger.num_dims)}
    for _, s in tag_batches(tagger, SENTENCES):
        part, own = centred_tag_contributions(s).detach(), s.logits.argmax(-1)
        for r, j, a in zip(s.active.row.tolist(), s.active.dim.tolist(), part): total['O' if own[r] == 0 else 'X'][j] += a
    found = tagged(tagger, ('circuits',))['circuits']['separation']
    here = {t: v.clamp(min=0) for t, v in total.items()}
    assert found['cosine'] == pytest.approx(nn.functional.cosine_similarity(here['O'], here['X'], dim=0).item(), abs=1e-5)
    tops = {t: {tagger.words[j] for j in v.topk(min(50, len(v))).indices.tolist() if v[j] > 0} for t, v in here.items()}
    assert {t: set(w) for t, w in found['words'].items()} == tops
    assert found['jaccard'] == pytest.approx(len(tops['O'] & tops['X'])/len(tops['O'] | tops['X']))

def test_a_tagger_that_says_one_tag(tagger):
    with torch.no_grad(): tagger.head.fc2.bias[0] += 1e3
    found = tagged(tagger)
    assert found['circuits'] == {'completeness': {}}                       # no entity, nothing to separate
    json.dumps(found.to_dict())

def test_tagger_tiers_alone_and_without_labels(tagger):
    full = figures(tagged(tagger))
    for tier in CHEAP: assert figures(tagged(tagger, (tier,)))[tier] == full[tier]
    assert set(tagged(tagger, CHEAP[1:], labels=None).tiers) == set(CHEAP[1:])

def test_faithfulness_reads_as_much_as_the_other_tiers(model):
    run = lambda n: figures(evaluate(model, data(model), ('faithfulness',), max_length=n, limit=5))['faithfulness']
    short = measure_faithfulness(Reader(model, max_length=5), TEXTS[:20], ('dla',), progress=False).loc['dla'].to_dict()
    assert run(5)['dims']['dla'] == pytest.approx(short) and run(5)['dims'] != run(None)['dims']
    assert run(5)['distance_to_training'] != run(None)['distance_to_training']

def test_the_reference_is_loaded_once_for_all_tiers(model, monkeypatch):
    calls, wanted = [], evaluate(model, data(model), ('grounding', 'scaling'))
    def load(asked): calls.append(asked); return FrozenReference.of(asked)
    monkeypatch.setattr(FrozenReference, 'load', load)
    found = evaluate(model, data(model, reference=None), ('grounding', 'scaling'))
    assert figures(found) == figures(wanted) and len(calls) == 1
    assert found['scaling']['downstream']['reference'] is not None
    evaluate(model, data(model, reference=None), ('circuits',)); assert len(calls) == 1

# ---- where every class is a yes or no ----------------------------------------------------------------------------
@pytest.mark.parametrize('names', [['toxic'], ['funny', 'sad'], ['funny', 'sad', 'long']], ids=['one', 'two', 'three'])
def test_yes_and_no_are_measured_where_they_can_be(names):
    made = build(LexicalSAEForSequenceClassification, names, problem_type='multi_label_classification')
    said = (classified(made, TEXTS[:20]).logits > 0).int()
    labels = said[:, 0].tolist() if len(names) == 1 else said.tolist()     # one column may come as plain numbers
    held = data(made, labels=labels, train_labels=labels)
    found = evaluate(made, held)
    assert list(found.tiers) == ['accuracy', 'identity', 'grounding'] and found['accuracy']['accuracy'] == 1
    assert found['identity']['identity_error'] <= 1e-5 and 'association_agreement' not in found['grounding']
    for tier in TIERS[3:]:
        with pytest.raises(ValueError, match=f"The tier '{tier}' compares the classes of a text"): evaluate(made, held, (tier,))
    with pytest.raises(ValueError, match='Every class of this model is a yes or no'): measure_faithfulness(made, TEXTS[:2], ('random',))
