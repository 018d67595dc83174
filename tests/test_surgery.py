"Removal over backbone families, gates and heads; what a certificate catches; bad input in one sentence."
import copy
import json

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import pipeline

import lexical_sae
from lexical_sae.activation import GATES, make_gate
from lexical_sae.certificate import Certificate, challenge, maximal_inputs, state_hash, suppress_token_globally, untie_decoder, verify
from lexical_sae.dla import ClassifierHead, circuit_state, identity_error
from lexical_sae.model import LexicalSAE, LexicalSAEForSequenceClassification, LexicalSAEForTokenClassification
from lexical_sae.surgery import EffectFitter, SuppressedModel, get_top_tokens, removal_candidates, removal_effect, select_dims, without
from test_families import BOUND, CONFIGS, V, batch, build

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')

def run(model):
    ids, mask = batch()
    with torch.no_grad(): return model.classify(model.encode(ids, mask), mask)

def open_ids(model, n=5):
    "The words that are open in most texts: there is something to remove."
    return (run(model).sparse_vector > 0).sum(0).topk(n).indices.tolist()

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
    viewed = run(quiet)
    with torch.no_grad(): tags = quiet.tag_state(quiet.encode(*batch()))
    assert_closed(viewed, ids)
    assert not torch.isin(tags.active.dim, torch.tensor(ids)).any()
    assert identity_error(viewed) <= bound and identity_error(tags) <= bound
    assert torch.equal(run(quiet.restore()).logits, before.logits) and torch.equal(run(model).logits, before.logits)
    certificate = suppress_token_globally(model, ids)
    assert torch.equal(run(model).logits, viewed.logits) and identity_error(run(model)) <= bound
    assert verify(model, certificate) and sum(c['breaches'] for c in certificate.challenges) == 0
    assert sum(c['would_open'] for c in certificate.challenges) > 0                  # the attacks were no straw men

@pytest.mark.parametrize('kwargs', [dict(gate='drelu'), dict(pooling='attention'), dict(topk_per_position=3), dict(pooling='attention', topk_per_position=2), dict(classifier_hidden=0)], ids=str)
def test_every_gate_pooling_and_head(kwargs):
    model = _linear() if kwargs == dict(classifier_hidden=0) else build('bert', **kwargs)
    ids = open_ids(model)
    after = run(SuppressedModel(model, ids))
    assert_closed(after, ids)
    assert identity_error(after) <= 1e-5
    assert all(c.breaches == 0 for c in challenge(SuppressedModel(model, ids), ids))

def _linear():
    from test_families import backbone
    model = LexicalSAE.from_backbone(backbone('bert'), num_labels=3, init_threshold=.1, vocabulary='all', classifier_hidden=0)
    for p in model.head.parameters(): nn.init.normal_(p, std=.5)
    return model.eval()

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
    inner = SuppressedModel(quiet, [9])
    assert inner.removed == [9] and not inner.activation.allowed[[7, 9]].any() and quiet.removed == [7]
    assert inner.suppress([11]).removed == [9, 11] and inner.restore([11]).removed == [9]

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
    assert 'does not have' in str(verify(model, Certificate(**{**vars(certificate), 'ids': [V + 5]})))

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

@pytest.mark.parametrize('call, sentence', [
    (lambda m: SuppressedModel(m, [V]), 'is not an id'),
    (lambda m: SuppressedModel(m, []), 'No word was given'),
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
