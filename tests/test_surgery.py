"Removal over backbone families, gates and heads; what a certificate catches; bad input in one sentence."
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import lexical_sae
from lexical_sae.activation import GATES, make_gate
from lexical_sae.certificate import STATEMENT, Certificate, challenge, maximal_inputs, state_hash, suppress_token_globally, untie_decoder, verify
from lexical_sae.dla import ClassifierHead, circuit_state, identity_error
from lexical_sae.model import LexicalSAE, LexicalSAEForSequenceClassification, LexicalSAEForTokenClassification
from lexical_sae.discovery import get_top_tokens
from lexical_sae.surgery import EffectFitter, SuppressedModel, list_forms, select_dims, without
from lexical_sae.testing import tiny_tokenizer
from test_families import BOUND, CONFIGS, V, backbone, batch, build

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')
TEXTS = ['the film and the plot', 'films about a gay film', 'a good film', 'bad plot , good films', 'gays in films']

WORDS = 'a the film films ##film filming gay gays good bad plot and in about ,'.split()

def reader(cls=LexicalSAEForSequenceClassification, **kwargs):
    "A tiny model with a tokenizer."
    model = cls.from_backbone(backbone('bert'), num_labels=3, tokenizer=tiny_tokenizer(WORDS, V), check=False, init_threshold=.1, vocabulary='all',
                              classifier_hidden=8, **kwargs)
    for p in model.head.parameters(): nn.init.normal_(p, std=.5)
    return model.eval()

def run(model):
    ids, mask = batch()
    with torch.no_grad(): return model.classify(model.encode(ids, mask), mask)

def open_ids(model, n=5):
    "The words that are open in most texts: there is something to remove."
    return (run(model).sparse_vector > 0).sum(0).topk(n).indices.tolist()

def both_heads(model):
    "What the document head and the tag head say."
    with torch.no_grad(): return run(model), model.tag_state(model.encode(*batch()))

def assert_theorems(document, tags, ids, bound):
    "Closed is exactly zero, pooled and per position, and the parts add up."
    assert_closed(document, ids)
    assert len(tags.active.dim) and not torch.isin(tags.active.dim, torch.tensor(ids)).any()
    assert identity_error(document) <= bound and identity_error(tags) <= bound

def assert_closed(state, ids):
    s = state.sparse_vector[:, ids]
    assert torch.equal(s, torch.zeros_like(s)) and not s.signbit().any()

@pytest.mark.parametrize('dtype', BOUND, ids=['float32', 'float64'])
@pytest.mark.parametrize('family', CONFIGS)
def test_view_and_permanent_change_obey_the_theorems(family, dtype):
    model, bound = build(family, dtype=dtype), BOUND[dtype]
    ids, before = open_ids(model), run(model)
    assert (before.sparse_vector[:, ids] > 0).any()
    quiet = SuppressedModel(model, ids)
    viewed, viewed_tags = both_heads(quiet)
    assert_theorems(viewed, viewed_tags, ids, bound)
    assert torch.equal(run(quiet.restore()).logits, before.logits) and torch.equal(run(model).logits, before.logits)
    certificate = suppress_token_globally(model, ids)
    document, tags = both_heads(model)
    assert_theorems(document, tags, ids, bound)
    assert torch.equal(document.logits, viewed.logits) and torch.equal(tags.logits, viewed_tags.logits)
    assert verify(model, certificate) and sum(c['breaches'] for c in certificate.challenges) == 0
    assert sum(c['would_open'] for c in certificate.challenges) > 0                  # the attacks were no straw men

@pytest.mark.parametrize('kwargs', [dict(gate='drelu'), dict(pooling='attention'), dict(topk_per_position=3), dict(pooling='attention', topk_per_position=2), dict(classifier_hidden=0)], ids=str)
def test_every_gate_pooling_and_head(kwargs):
    model = _linear() if kwargs == dict(classifier_hidden=0) else build('bert', **kwargs)
    ids = open_ids(model)
    quiet, changed = SuppressedModel(model, ids), copy.deepcopy(model)
    suppress_token_globally(changed, ids)
    states = [both_heads(m) for m in (quiet, changed)]
    for document, tags in states: assert_theorems(document, tags, ids, 1e-5)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(*states))
    assert all(c.breaches == 0 for m in (quiet, changed) for c in challenge(m, ids))

def _linear():
    model = LexicalSAE.from_backbone(backbone('bert'), num_labels=3, init_threshold=.1, vocabulary='all', classifier_hidden=0)
    for p in model.head.parameters(): nn.init.normal_(p, std=.5)
    return model.eval()

@pytest.mark.parametrize('gate', GATES)
def test_a_word_is_removed_in_all_its_senses(gate):
    model = reader(sense_words=[7, 8], gate=gate)                        # film, films
    slots = model.senses.slots.flatten().tolist()
    assert select_dims(model, 'film') == select_dims(model, 'films?', 'regex') == sorted(slots) and set(slots) > {7, 8}
    assert select_dims(model, 'film', 'entry') == sorted(model.senses.slots[0].tolist()) and select_dims(model, [V]) == [V]
    assert set(list_forms(model, 'film').id) >= set(slots)
    with torch.no_grad(): before = model.classify(model.encode(**model.batch(TEXTS)))
    assert (before.sparse_vector[:, slots[1::2]] > 0).any() and (before.sparse_vector[:, [7, 8]] > 0).any()       # both senses speak
    attacked = challenge(model, slots, TEXTS)
    assert all(c.breaches > 0 for c in attacked)                         # an open gate is found open
    certificate = suppress_token_globally(model, 'film', texts=TEXTS, zero_rows=True)
    with torch.no_grad(): after = model.classify(model.encode(**model.batch(TEXTS)))
    assert_closed(after, slots)
    assert identity_error(after) <= 1e-5 and (model.decoder()[0][[7, 8]] == 0).all()
    assert verify(model, certificate, TEXTS) and certificate.ids == sorted(slots) and 'film#2' in certificate.words

def test_one_sense_can_go_alone_and_its_word_keeps_its_row():
    model = reader(sense_words=[7, 8])
    certificate = suppress_token_globally(model, V, zero_rows=True)      # film#2
    assert certificate.words == ['film#2'] and 'film#1' in certificate.kin and model.activation.allowed[7]
    assert (model.decoder()[0][7] != 0).any() and sum(c['would_open'] for c in certificate.challenges) > 0

def test_every_dimension_and_its_kin_is_attacked():
    model = reader()
    certificate = suppress_token_globally(model, 'gay', match='entry')
    assert certificate.ids == [11] and certificate.kin == ['gays']       # three letters: only its own forms
    by_name = {c['attack']: c['inputs'] for c in certificate.challenges}
    assert by_name['each word and its kin, eight times'] == 2 and by_name['gradient ascent on the embeddings'] == 1
    assert {c.attack: c.inputs for c in challenge(model, list(range(20, 70)), limit=16)} == {
        'each word and its kin, eight times': 50, 'random tokens': 16, 'gradient ascent on the embeddings': 50}
    assert suppress_token_globally(reader(), 'film', match='entry').kin == ['films', '##film', 'filming']
    assert suppress_token_globally(reader(), 2).ids == [2]               # a sign that frames texts cannot stand in one, but can be closed

@pytest.mark.parametrize('gate', GATES)
def test_the_statement_describes_the_gate(gate):
    g, z = make_gate(gate, 1, threshold=.5), torch.tensor([[2.]])
    value = {'JumpReLU': 'z[j] (JumpReLU)', 'DReLU': 'z[j] - theta[j] (DReLU)'}[type(g).__name__]
    assert value in STATEMENT
    torch.testing.assert_close(g(z).item(), eval(value.split(' (')[0], dict(z=z[0], theta=g.theta, j=0)).item())

@pytest.mark.parametrize('gate', GATES)
def test_closed_gate_is_zero_for_any_number(gate):
    g = make_gate(gate, 3)
    g.allowed[1] = False
    z = torch.tensor([[torch.nan]*3, [torch.inf]*3, [-torch.inf]*3, [3e38]*3, [-0.]*3])
    s = g(z)[:, 1]
    assert torch.equal(s, torch.zeros(5)) and not s.signbit().any()

def test_the_view_costs_v_bytes_and_no_pass():
    model = build('bert')
    storage = lambda m: {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*m.parameters(), *m.buffers()]}
    quiet = SuppressedModel(model, [7, 8])
    assert sum(n for p, n in storage(quiet).items() if p not in storage(model)) == V
    assert dict(quiet.named_parameters()).keys() == dict(model.named_parameters()).keys() == {k for k in model.state_dict() if k in dict(model.named_parameters())}
    counts = {'backbone': 0, 'head': 0}
    for name in counts: getattr(model, name).register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    run(quiet)
    assert counts == {'backbone': 1, 'head': 1}

def test_view_shares_mode_dtype_and_training():
    model = build('bert')
    quiet = SuppressedModel(model, [7])
    quiet.train(); assert model.training and model.backbone.training
    model.eval(); assert not quiet.training
    quiet.double(); assert model.head.fc1.weight.dtype == torch.float64 and quiet.activation.spread.dtype == torch.float64 and not quiet.activation.allowed[7]
    model.head.fc2.weight.data.zero_(); assert (quiet.head.fc2.weight == 0).all()
    twin = copy.deepcopy(quiet)
    assert not twin.activation.allowed[7] and twin.head.fc2.weight.data_ptr() != quiet.head.fc2.weight.data_ptr()
    model.float(); assert quiet.activation.spread.dtype == torch.float32 and 'activation.spread' in quiet.state_dict()
    inner = SuppressedModel(quiet, [9])
    assert inner.removed == [9] and not inner.activation.allowed[[7, 9]].any() and quiet.removed == [7]
    assert inner.suppress([11]).removed == [9, 11] and inner.restore([11]).removed == [9]

def test_a_view_follows_what_its_model_closes_later():
    model = build('bert')
    quiet = SuppressedModel(model, [7]); inner = SuppressedModel(quiet, [11])
    suppress_token_globally(model, [9])
    for view in (quiet, inner):
        assert not view.activation.allowed[[7, 9]].any() and not view.state_dict()['activation.allowed'][9] and 9 not in view.removed
        assert_closed(run(view), [7, 9])
    quiet.restore()
    assert quiet.activation.allowed[7] and inner.activation.allowed[7] and not quiet.activation.allowed[9] and inner.removed == [11]
    model.double()
    assert quiet.activation.spread.dtype == torch.float64

def test_training_through_the_view_trains_the_model():
    model = build('bert')
    quiet, before = SuppressedModel(model, [7]).train(), model.head.fc1.weight.detach().clone()
    ids, mask = batch()
    loss = quiet.classify(quiet.encode(ids, mask), mask).logits.square().sum()
    torch.optim.SGD(quiet.parameters(), lr=.1).step(lambda: (loss.backward(), loss)[1])
    assert not torch.equal(model.head.fc1.weight, before) and (model.head.fc1.weight[:, 7] == before[:, 7]).all()

@pytest.mark.parametrize('cls', [LexicalSAE, LexicalSAEForSequenceClassification, LexicalSAEForTokenClassification])
def test_a_saved_view_is_an_ordinary_model(cls, tmp_path):
    model = build('bert', cls=cls)
    ids = open_ids(model)
    quiet = SuppressedModel(model, ids)
    quiet.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='No tokenizer'): again = cls.from_pretrained(tmp_path)
    assert type(again) is cls and torch.equal(run(again).logits, run(quiet).logits)
    assert json.loads((tmp_path/'config.json').read_text())['architectures'] == [cls.__name__]

@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('family', [f for f in CONFIGS if f != 'deberta-v2-inline'])
def test_zeroed_rows_leave_the_reading_side_alone_and_survive_saving(family, tied, tmp_path):
    model, plain = build(family, tied), build(family, tied)
    ids, embeddings = open_ids(model), model.backbone.get_input_embeddings().weight.detach().clone()
    certificate = suppress_token_globally(model, ids, zero_rows=True)
    suppress_token_globally(plain, ids)
    weight, bias = model.decoder()
    assert (weight[ids] == 0).all() and torch.equal(model.backbone.get_input_embeddings().weight, embeddings)
    assert torch.equal(run(model).logits, run(plain).logits) and identity_error(run(model)) <= 1e-5
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='No tokenizer'): again = LexicalSAE.from_pretrained(tmp_path)
    assert torch.equal(run(again).logits, run(model).logits) and verify(again, certificate)

def test_a_projection_that_cannot_be_untied_says_so():
    model = build('deberta-v2-inline')
    with pytest.raises(ValueError, match='the closed gate is enough'): suppress_token_globally(model, [7], zero_rows=True)
    with pytest.raises(ValueError, match='the closed gate is enough'): untie_decoder(model)
    assert model.activation.allowed.all()                                # refused, so nothing was changed

def test_ids_of_every_kind_are_taken_and_refusals_change_nothing():
    for words in (np.int64(7), [np.int64(7)], np.array([7]), torch.tensor([7]), 7):
        certificate = suppress_token_globally(build('bert'), words)
        assert certificate.asked == certificate.ids == [7] and json.loads(certificate.to_json())['asked'] == [7]
    model = reader(); allowed = model.activation.allowed.clone()
    for call in (lambda: suppress_token_globally(model, 7.5), lambda: suppress_token_globally(model, [7], texts='one string'),
                 lambda: suppress_token_globally(model, ['film', 'nowhere']), lambda: suppress_token_globally(model, [7], match='stem')):
        with pytest.raises(ValueError): call()
        assert torch.equal(model.activation.allowed, allowed)

def test_every_kind_of_tampering_is_noticed():
    model = build('bert')
    certificate = suppress_token_globally(model, open_ids(model))
    assert verify(model, certificate)
    for name, p in model.state_dict().items():
        other = copy.deepcopy(model)
        tensor = other.state_dict()[name]
        if tensor.dtype == torch.bool: tensor.view(-1)[0] ^= True
        elif tensor.is_floating_point(): tensor.view(-1)[0] += 1.
        else: continue
        assert not verify(other, certificate), name
    other = build('bert', gate='drelu'); other.activation.allowed[certificate.ids] = False
    assert any('gate is a DReLU' in p for p in verify(other, certificate).problems)

def test_certificate_is_json_and_damage_is_one_sentence(tmp_path):
    model = build('bert')
    certificate = suppress_token_globally(model, [7, 8])
    file = certificate.save(tmp_path/'c.json')
    assert Certificate.load(file) == certificate and certificate.weights == state_hash(model) and len(certificate.weights) == 64
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match='is not a certificate'): Certificate.load(file)
    file.write_text('{"ids": [1]}')
    with pytest.raises(ValueError, match='is not a certificate'): Certificate.load(file)
    for ids in ([V + 5], [-1], []): assert 'does not have' in str(verify(model, Certificate(**{**vars(certificate), 'ids': ids})))
    for field, wrong in (('ids', ['seven']), ('ids', [7.5]), ('ids', 7), ('words', 'film'), ('rows_zeroed', 'no'), ('weights', None), ('effect', [])):
        file.write_text(json.dumps({**json.loads(certificate.to_json()), field: wrong}))
        with pytest.raises(ValueError, match=f'is not a certificate \\({field} of the wrong type'): Certificate.load(file)

def test_gradient_ascent_gets_louder_than_where_it_started():
    model = build('bert')
    ids = open_ids(model, 3)
    def loudest(steps):
        seq = maximal_inputs(model, ids, steps=steps)
        z = torch.einsum('rld,rd->rl', seq.h, model.decoder()[0][ids]).amax(1)
        return z.sum().item()
    assert loudest(20) > loudest(0) + 1 and not model.backbone.get_input_embeddings()._forward_hooks

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 1))
def test_prediction_is_exact_for_linear_heads_and_while_no_unit_flips(seed, hidden):
    torch.manual_seed(seed)
    head = ClassifierHead(12, 3, 6*hidden)
    for p in head.parameters(): nn.init.normal_(p)
    with torch.no_grad(): state = circuit_state(torch.relu(torch.randn(4, 12)), head)
    ids = torch.randperm(12)[:4].tolist()
    after = without(state, ids)
    gap = (after.logits - state.logits + state.attribution()[..., ids].sum(-1)).abs().max(-1).values
    same = torch.ones(4, dtype=torch.bool) if not hidden else (after.units == state.units).all(-1)
    assert (gap[same] <= 1e-4).all() and torch.equal(without(state, []).logits, state.logits)

@pytest.mark.parametrize('labels, C', [([1., 0., 1.], 1), ([[1., 0.], [0., 0.], [1., 1.]], 2)], ids=['one logit', 'two questions'])
def test_yes_and_no_are_counted_as_answers(labels, C):
    model = LexicalSAEForSequenceClassification.from_backbone(backbone('bert'), init_threshold=.1, vocabulary='all', classifier_hidden=8,
                                                              label_names=[f'q{i}' for i in range(C)], problem_type='multi_label_classification').eval()
    with torch.no_grad():
        for p in model.head.parameters(): p.normal_()
        seq = model.encode(*batch()); state = model.classify(seq); gone = [int(state.sparse_vector[0].argmax())]
        fitter = EffectFitter(model, [gone]); fitter.update(seq, state, torch.tensor(labels))
        s = state.sparse_vector.clone(); s[:, gone] = 0
    effect, y, after = fitter.fit(), torch.tensor(labels).view(3, C) > .5, circuit_state(s, model.head).logits
    assert effect.accuracy_before == pytest.approx(((state.logits > 0) == y).float().mean().item())
    assert effect.accuracy_after == pytest.approx(((after > 0) == y).float().mean().item())
    assert effect.label_flips == ((after > 0) != (state.logits > 0)).any(-1).sum().item()
    with pytest.raises(ValueError, match='yes or no of each'): get_top_tokens(model, ['a text'])

def test_topk_words_move_up_and_the_effect_recomputes_them():
    model = build('bert', topk_per_position=2)
    ids, (tokens, mask) = open_ids(model), batch()
    fitter = EffectFitter(model, [ids])
    with torch.no_grad():
        seq = model.encode(tokens, mask); state = model.classify(seq)
        truth = SuppressedModel(model, ids).classify(SuppressedModel(model, ids).encode(tokens, mask))
    fitter.update(seq, state)
    assert abs(fitter.fit().actual - (truth.logits - state.logits).abs().mean().item()) < 1e-6
    assert (truth.sparse_vector > 0)[:, [j for j in range(V) if j not in ids]].sum() > (state.sparse_vector > 0)[:, [j for j in range(V) if j not in ids]].sum()

@pytest.mark.parametrize('kwargs', [{}, dict(pooling='attention'), dict(sense_words=[7, 8])], ids=str)
def test_spans_divide_what_classes_and_groups_say(kwargs):
    model, y, member, among = reader(**kwargs), [0, 1, 1, 2, 0], [True, True, False, False, True], [True, False, True, True, True]
    found = get_top_tokens(model, TEXTS, y, {'gay': member}, among, target=2, spans=True)
    total = found.spans.groupby(['kind', 'name']).total.sum()
    with torch.no_grad(): part = model.classify(model.encode(**model.batch(TEXTS))).attribution().sum(-1)
    part = part - part.mean(1, keepdim=True)
    assert part.abs().max() > .1
    torch.testing.assert_close(total['all', ''], part[:, 2].sum().item(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total['group', 'gay'], part[[0, 4], 2].sum().item(), rtol=1e-4, atol=1e-4)
    for c, rows in enumerate([[0, 4], [1, 2], [3]]):
        torch.testing.assert_close(total['class', f'LABEL_{c}'], part[rows, c].sum().item(), rtol=1e-4, atol=1e-4)
    times = found.spans[found.spans.kind == 'all'].set_index('word').times
    assert times['film'] == 3 and times.sum() == sum(len(t.split()) for t in TEXTS)
    short = get_top_tokens(model, TEXTS, y, spans=True, max_length=3).spans
    assert short[short.kind == 'all'].times.sum() == len(TEXTS)          # [CLS], one word, [SEP]

@pytest.mark.parametrize('call, sentence', [
    (lambda m: SuppressedModel(m, [V]), 'is not an id'),
    (lambda m: SuppressedModel(m, []), 'No word was given'),
    (lambda m: SuppressedModel(m, 7.5), 'neither a word nor an id'),
    (lambda m: challenge(m, [V]), 'is not an id'),
    (lambda m: SuppressedModel(m, [3], match='stem'), "Unknown match 'stem'"),
    (lambda m: SuppressedModel(m, list(range(V))), 'leave at least one'),
    (lambda m: suppress_token_globally(m, list(range(V))), 'leave at least one'),
    (lambda m: SuppressedModel(m, 'film'), 'no tokenizer'),
    (lambda m: suppress_token_globally(SuppressedModel(m, [3]), [4]), 'is a view'),
    (lambda m: EffectFitter(m, [[1]]).fit(), 'No text was seen'),
    (lambda m: get_top_tokens(m, ['a'], target='toxic'), "Unknown target 'toxic'"),
], ids=lambda x: x if isinstance(x, str) else '')
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence): call(build('bert'))

def test_published_names_are_at_the_top():
    assert lexical_sae.SuppressedModel is SuppressedModel and lexical_sae.suppress_token_globally is suppress_token_globally
