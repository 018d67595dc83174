"Chapters 05c to 05g and the senses: error sentences, edge cases and regressions that the chapters leave out."
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from lexical_sae import layerwise, scaling
from lexical_sae.baselines import Baselines, PostHocSAE, fit_bag_of_words, fit_sae, measure_baselines, measure_model, measure_sae, pooled_states, sae_state
from lexical_sae.dense import DenseClassifier
from lexical_sae.dla import identity_error, relative_gap
from lexical_sae.grounding import FrozenReference, measure_grounding
from lexical_sae.layerwise import METHODS, edited_layers, find_layers, layer_contributions, measure_layers, split_by_layer
from lexical_sae.long_context import PeakMemory, classify_windows, hide_needle, measure_long_context, pool_windows, windows_of
from lexical_sae.backbone import sample_sentences
from lexical_sae.model import LexicalSAE, LexicalSAEConfig, LexicalSAEForSequenceClassification
from lexical_sae.polysemy import WicPair, _contexts_of, _judge, expand_senses, load_wic, measure_wic, most_varied_words
from lexical_sae.results import PairedDifference
from lexical_sae.scaling import (ScalingFitter, best_probe, compute_ablation_sparsity, compute_downstream_loss, logistic_probes, measure_scaling,
                                 removal_effects)
from lexical_sae.senses import SenseExpander
from lexical_sae.setup_training import DENSE, TrainingConfig, arguments_for
from lexical_sae.train import LexicalTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer', 'ignore:.*were truncated', 'ignore:.*slots start at random')
TEXTS = ['a wonderful film about a river bank', 'the plot is dull and the actors are bored', 'she took money to the bank', 'he sat on the bank of the river']
LABELS = [1, 0, 1, 0]

@pytest.fixture(scope='module')
def tokenizer(): return AutoTokenizer.from_pretrained(ROOT/'assets/minilm-mlm')

def config(**kwargs):
    return BertConfig(vocab_size=30522, **(dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=.3,
                                                max_position_embeddings=48) | kwargs))

@pytest.fixture
def model(tokenizer): return build(tokenizer)

def build(tokenizer, cls=LexicalSAE, **kwargs):
    torch.manual_seed(0)
    made = cls.from_backbone(BertForMaskedLM(config()), tokenizer=tokenizer, check=False, **(dict(initial_words=30, classifier_hidden=8) | kwargs))
    with torch.no_grad(): made.head.fc2.weight.normal_()
    return made

def classified(model, texts=TEXTS):
    with torch.no_grad(): return model.classify(model.encode(**model.batch(texts)))

# ---- baselines -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs, sentence', [(dict(kind='gated'), "Unknown kind 'gated'"), (dict(active=9), 'Cannot open 9 of 8'), (dict(active=0), 'Cannot open 0 of 8')])
def test_sae_refuses(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence): PostHocSAE(torch.randn(10, 4), 8, **({'active': 2} | kwargs))

@pytest.mark.parametrize('kind', ['topk', 'jumprelu'])
def test_sae_is_deterministic_and_hits_its_number(kind):
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    a, b = (fit_sae(x, 3, kind, 24, steps=60, batch_size=64, progress=False) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert (a.features(x) > 0).sum(-1).float().mean().item() == pytest.approx(3, abs=.05)
    assert torch.allclose(a.decoder.weight.norm(dim=0), torch.ones(24), atol=1e-5)

def test_attribution_through_the_autoencoder_is_exact_about_the_substitute_only():
    x, head = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), nn.Linear(8, 3)
    sae = fit_sae(x, 3, 'topk', 16, steps=30, progress=False)
    with torch.no_grad():
        state = sae_state(sae, head, x)
        assert identity_error(state) <= 1e-5 and torch.allclose(state.logits, head(sae(x)), atol=1e-4)
        assert relative_gap(head(x), state.attribution(), state.b_eff).max() > 1e-2
        row = measure_sae(sae, head, x, [0]*50, batch_size=7)
    with pytest.raises(ValueError, match='at least two'): measure_sae(sae, head, x[:1], [0])
    assert row.attribution_worst == pytest.approx(relative_gap(head(x), state.attribution(), state.b_eff).max().item(), rel=1e-4)

def test_accuracies_are_told_in_one_precision():
    "Where the explanation is right as often as the model, nothing is lost: not a rounding."
    x, head = torch.randn(49, 8, generator=torch.Generator().manual_seed(0)), nn.Linear(8, 3)
    sae = fit_sae(x, 3, 'topk', 16, steps=30, progress=False)
    with torch.no_grad(): own, told = head(x).argmax(-1), sae_state(sae, head, x).logits.argmax(-1)
    agreed = (own == told).nonzero()[:, 0][0].item()
    labels = [3]*49; labels[agreed] = own[agreed].item()                 # both are right about one text, and no other
    assert measure_sae(sae, head, x, labels).accuracy_loss == 0.

def test_pooled_states_follow_the_order_of_the_texts(tokenizer):
    torch.manual_seed(0)
    dense = DenseClassifier(BertModel(config(), add_pooling_layer=False), 2).eval()
    together, alone = pooled_states(dense, TEXTS, tokenizer, batch_size=3), torch.cat([pooled_states(dense, [t], tokenizer) for t in TEXTS])
    assert torch.allclose(together, alone, atol=1e-4) and not dense.head._forward_pre_hooks
    with torch.no_grad(): logits = dense(**{k: v for k, v in tokenizer(TEXTS[:1], return_tensors='pt').items() if k != 'token_type_ids'}).logits
    assert torch.allclose(dense.head(alone[:1]), logits, atol=1e-4)

def test_baselines_refuse(model):
    with pytest.raises(ValueError, match='nothing to separate'): fit_bag_of_words(TEXTS, [1]*4)
    with pytest.raises(ValueError, match='two classes'): measure_baselines(model, TEXTS, LABELS, TEXTS*4, LABELS*4, lexicon={'dull': -1.}, positive_class=2)

def test_our_row_matches_the_state(model):
    row, state = measure_model(model, TEXTS, LABELS, batch_size=3), classified(model)
    assert row.active == pytest.approx(state.num_active.float().mean().item()) and row.attribution_worst <= 1e-5
    assert row.right.tolist() == (state.logits.argmax(-1) == torch.tensor(LABELS)).tolist()
    json.dumps(Baselines((row, row)).to_dict())

# ---- scaling ---------------------------------------------------------------------------------------------------
def test_removal_effects_equal_the_long_way(model):
    state = classified(model)
    effect, chosen = removal_effects(state), state.logits.argmax(-1)
    for b, j in (state.sparse_vector > 0).nonzero()[::7].tolist():
        s = state.sparse_vector[b:b+1].clone(); s[0, j] = 0
        with torch.no_grad(): lost = (state.logits[b] - model.head(s)[0])
        assert effect[b, j].item() == pytest.approx((lost[chosen[b]] - lost.mean()).item(), abs=1e-4)
    assert (effect[state.sparse_vector == 0] == 0).all()

def test_ablation_sparsity_does_not_depend_on_scale():
    v = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(compute_ablation_sparsity(v), compute_ablation_sparsity(-300*v), rtol=1e-4)
    assert ((1 <= compute_ablation_sparsity(v)) & (compute_ablation_sparsity(v) <= 40)).all()

def test_separable_probe_stays_finite():
    w, b = logistic_probes(torch.tensor([[0.], [0.], [1.], [1.]]), torch.tensor([0., 0, 1, 1]))
    assert torch.isfinite(w).all() and torch.isfinite(b).all() and w > 1

def test_sparse_and_dense_probes_agree():
    g = torch.Generator().manual_seed(0)
    s, y = torch.rand(80, 20, generator=g)*(torch.rand(80, 20, generator=g) < .4), torch.rand(80, generator=g) < .5
    assert best_probe('x', s, y, list(map(str, range(20)))) == best_probe('x', s.to_sparse(), y, list(map(str, range(20))))
    assert best_probe('x', torch.zeros(8, 3), torch.tensor([0, 1]*4), ['a', 'b', 'c']) is None

def test_scaling_refuses_and_serialises(model):
    with pytest.raises(ValueError, match="Concept 'x' has 1 values for 4 texts"): measure_scaling(model, TEXTS, concepts={'x': [1]})
    with pytest.raises(ValueError, match='No text was seen'): ScalingFitter(model).fit()
    with pytest.raises(ValueError, match='is empty'): compute_downstream_loss(model, [' '], TEXTS)
    with pytest.raises(ValueError, match='No token was masked'): compute_downstream_loss(model, ['a'], TEXTS)
    json.dumps(measure_scaling(model, TEXTS, LABELS, TEXTS).to_dict())
    assert measure_scaling(model, TEXTS).frontier == ()

def test_frontier_ends_at_the_models_own_accuracy(model):
    found = measure_scaling(model, TEXTS*3, LABELS*3, batch_size=5)
    assert found.frontier[-1].k == 0 and found.frontier[-1].accuracy == pytest.approx(measure_model(model, TEXTS*3, LABELS*3).accuracy)
    assert all(p.active <= p.k for p in found.frontier[:-1])

# ---- layers ----------------------------------------------------------------------------------------------------
def test_hooks_are_gone_after_an_error(model):
    batch = model.batch(TEXTS)
    layers = find_layers(model.backbone, **batch)
    with pytest.raises(RuntimeError, match='stop'), edited_layers(layers, lambda *a: (_ for _ in ()).throw(RuntimeError('stop'))): model.encode(**batch)
    assert not any(layer._forward_hooks for layer in layers)

@pytest.mark.parametrize('method', ['ablation', 'lens', 'linear'])
def test_layers_do_not_depend_on_the_batch(model, method):
    batch, alone = model.batch(TEXTS), model.batch(TEXTS[:1])
    state = classified(model)
    ids = (state.sparse_vector[0] > 0).nonzero()[:, 0]
    where = torch.zeros_like(ids), state.position[0, ids].long(), ids
    for a, b in zip(split_by_layer(model, batch, *where, method), split_by_layer(model, alone, *where, method)): assert torch.allclose(a, b, atol=1e-3)

@pytest.mark.parametrize('methods, passes', [(('ablation',), 4), (('lens',), 3), (('linear',), 4), (METHODS, 11)])
@pytest.mark.parametrize('N', [2, 4])
def test_passes_for_the_layers(tokenizer, methods, passes, N):
    "Each method looks for the layers, classifies and reads z; then a pass for each layer, and one for the embeddings unless the lens has it already."
    torch.manual_seed(0)
    model, calls = LexicalSAE.from_backbone(BertForMaskedLM(config(num_hidden_layers=N)), tokenizer=tokenizer, check=False, initial_words=30), []
    model.backbone.bert.embeddings.register_forward_hook(lambda *_: calls.append(1))
    measure_layers(model, TEXTS, methods)
    assert len(calls) == len(methods)*N + passes

def test_layers_refuse_attention_pooling(tokenizer):
    with pytest.raises(ValueError, match='max pooling only'): layer_contributions(build(tokenizer, pooling='attention'), TEXTS[0])

def test_layer_reports_serialise(model):
    json.dumps(measure_layers(model, TEXTS).to_dict() | {'one': layer_contributions(model, TEXTS[0]).to_dict()})

# ---- long texts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('window, overlap', [(12, 0), (12, 5), (48, 16), (None, 0)])
def test_windows_cover_every_token(model, window, overlap):
    text = ' '.join(sample_sentences()[:12])
    cut = windows_of(model, text, window, overlap)
    spans = cut.offsets[cut.attention_mask.bool()].tolist()
    plain = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)['offset_mapping']
    assert set(plain) <= {tuple(s) for s in spans} and cut.input_ids.shape[1] <= (window or 48)

def test_windows_do_not_depend_on_their_batch(model):
    cut = windows_of(model, ' '.join(sample_sentences()[:12]), 16, 4)
    dims = model.open_dims()
    one, many = pool_windows(model, cut, 1), pool_windows(model, cut, 100)
    assert torch.allclose(one[0][dims], many[0][dims], atol=1e-5) and len(cut.input_ids) > 5

@pytest.mark.parametrize('kwargs', [dict(pooling='attention'), dict(topk_per_position=3)])
def test_windows_refuse_other_pools(tokenizer, kwargs):
    with pytest.raises(ValueError, match="pooling='max'"): classify_windows(build(tokenizer, **kwargs), TEXTS[0])

def test_needles_fit_and_stay_whole(tokenizer):
    for length in (20, 60, 200):
        for depth in (0., .4, 1.):
            stack = hide_needle(TEXTS[0], sample_sentences(), length, depth, tokenizer)
            assert stack.text[stack.start:stack.end] == TEXTS[0] and len(tokenizer(stack.text)['input_ids']) <= length
    with pytest.raises(ValueError, match='depth must lie'): hide_needle('a', ['b'], 9, 2., tokenizer)

def test_memory_is_that_of_the_device_the_block_runs_on(monkeypatch):
    "A GPU that is there and idle says nothing about a block on the CPU."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for name in ('reset_peak_memory_stats', 'memory_allocated', 'max_memory_allocated'):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail('asked the GPU'))
    with PeakMemory(torch.device('cpu')) as peak: torch.ones(2**20)
    assert peak.mib is None or peak.mib >= 0

def test_memory_of_a_gpu_is_its_allocators(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', asked.append)
    for name, mib in (('memory_allocated', 3), ('max_memory_allocated', 8)):
        monkeypatch.setattr(torch.cuda, name, lambda device, mib=mib: asked.append(device) or mib*2**20)
    with PeakMemory('cuda:1') as peak: pass
    assert peak.mib == 5 and set(asked) == {torch.device('cuda:1')}

@pytest.mark.gpu
def test_chapters_measure_the_same_on_a_gpu(tokenizer):
    made = build(tokenizer, LexicalSAEForSequenceClassification)
    torch.manual_seed(0)
    dense = DenseClassifier(BertModel(config(), add_pooling_layer=False), 2)
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    def figures(device):
        model = made.to(device)
        sae, head = fit_sae(states.to(device), 3, 'jumprelu', 16, steps=5, progress=False), nn.Linear(8, 2, device=device)
        assert measure_sae(sae, head, states.to(device), [0]*50).features == 16
        long = measure_long_context(model, TEXTS, LABELS, lengths=(60,), windows=(24,), progress=False)
        systems = measure_baselines(model, TEXTS, LABELS, TEXTS*4, LABELS*4, dense.to(device), steps=5, num_features=64, progress=False)
        return [measure_scaling(model, TEXTS, LABELS, TEXTS).removal_sparsity, *(r.z for r in measure_layers(model, TEXTS).reports.values()),
                *(p.needle_share for p in long.points), systems.rows[0].active]
    assert figures('cuda') == pytest.approx(figures('cpu'), rel=1e-2)

def test_long_context_refuses(model):
    with pytest.raises(ValueError, match='2 texts have 1 labels'): measure_long_context(model, TEXTS[:2], [1])

# ---- senses ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('args, sentence', [(([1], 3, 4, 1), 'at least 2 senses'), (([1, 1], 3, 4, 2), 'listed twice'), (([3], 3, 4, 2), 'Dimension 3 is not in the vocabulary')])
def test_sense_expander_refuses(args, sentence):
    with pytest.raises(ValueError, match=sentence): SenseExpander(*args)

@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize('gate', ['jumprelu', 'drelu'])
@pytest.mark.parametrize('hidden', [0, 8])
def test_identity_holds_with_senses(tokenizer, dtype, bound, gate, hidden):
    made = build(tokenizer, gate=gate, classifier_hidden=hidden)
    opened = (classified(made).sparse_vector > 0).any(0).nonzero()[:, 0].tolist()[:10]
    made = expand_senses(made, opened, TEXTS, num_senses=3).to(dtype)
    state = classified(made)
    assert identity_error(state) <= bound and made.num_dims == 30522 + 20
    g, = torch.autograd.grad(made.head(s := state.sparse_vector.clone().requires_grad_())[:, 1].sum(), s)
    assert (g - state.W_eff[:, 1]).abs().max() < 10*bound
    slots = state.sparse_vector[:, made.senses.slots]
    assert (slots.amax(-1) > 0).any()                                    # some expanded word speaks

def test_loudest_slot_has_the_words_full_magnitude(tokenizer):
    plain = build(tokenizer)
    before = classified(plain).sparse_vector
    opened = (before > 0).any(0).nonzero()[:, 0].tolist()[:10]
    after = classified(made := expand_senses(plain, opened, TEXTS)).sparse_vector
    assert torch.allclose(after[:, made.senses.slots].amax(-1), before[:, opened], atol=1e-5) and (before[:, opened] > 0).any()
    others = [j for j in range(30522) if j not in set(opened)]
    assert torch.equal(after[:, others], before[:, others])

def test_expanded_models_train_measure_and_ground(tokenizer):
    made = build(tokenizer, LexicalSAEForSequenceClassification)
    opened, plain = (classified(made).sparse_vector > 0).sum(0).topk(5).indices.tolist(), FrozenReference.of(made)
    expand_senses(made, opened, TEXTS).train()
    known = FrozenReference(plain.backbone, plain.shift, made.base_ids)  # as the experiment does: no second copy of the weights
    out = made(**made.batch(TEXTS), labels=torch.tensor(LABELS))
    out.loss.backward()
    assert made.senses.keys.grad.abs().sum() > 0 and torch.isfinite(made.senses.keys.grad).all()
    found = measure_grounding(made.eval(), TEXTS, LABELS, FrozenReference.of(made))
    assert measure_grounding(made, TEXTS, LABELS, known) == found
    assert found.identity_error <= 1e-5 and found.active_dims > 0
    assert measure_layers(made, TEXTS, methods=('lens',))['lens'].remainder_share < 1e-4
    with pytest.raises(ValueError, match='without TopK and senses'): classify_windows(made, TEXTS[0])
    assert measure_scaling(made, TEXTS, LABELS, TEXTS).downstream.all_tokens.tokens > 0

def test_senses_refuse_what_is_not_built(tokenizer, model):
    with pytest.raises(ValueError, match="pooling='max'"): LexicalSAEConfig(sense_words=[5], pooling='attention')
    with pytest.raises(ValueError, match="pooling='max'"): expand_senses(build(tokenizer, pooling='attention'), ['bank'], TEXTS)
    with pytest.raises(ValueError, match='zzqq'): expand_senses(model, ['zzqq'], TEXTS)
    with pytest.warns(UserWarning, match='1 of 2 words occur in fewer than 2 different texts \\(zebra\\)'): expand_senses(model, ['bank', 'zebra'], TEXTS)
    with pytest.raises(NotImplementedError, match='Tagging is not built'): model.tag(model.encode(**model.batch(TEXTS)))

def test_varied_words_need_occurrences(model):
    assert most_varied_words(model, TEXTS, minimum=100) == [] and 'bank' in most_varied_words(model, TEXTS, k=5, minimum=3)

def test_contexts_of_a_word_are_its_own(model):
    "Goods and goodness are other words; a capital letter makes none."
    h = _contexts_of(model, 'good', ['the goods are here', 'my goodness', 'for their own good', 'Good films are rare'], 10)
    with torch.no_grad(): own = [model.encode(**model.batch([t])).h[0, p] for t, p in (('for their own good', 4), ('Good films are rare', 1))]
    assert torch.allclose(h, torch.stack(own), atol=1e-5)

def test_varied_words_are_read_without_dropout(model):
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    most_varied_words(model.train(), TEXTS, minimum=3); hook.remove()
    assert seen == [False] and model.training

def test_wic_reads_paths_and_refuses(tmp_path, model):
    frame = pd.DataFrame(dict(text=['bank']*2, sentence1=[TEXTS[0]]*2, sentence2=TEXTS[2:], label=[0, 1]))
    frame.to_parquet(tmp_path/'train.parquet')
    assert load_wic(tmp_path)[1] == WicPair('bank', TEXTS[0], TEXTS[3], True)
    frame.drop(columns='sentence1').to_csv(tmp_path/'other.csv')
    with pytest.raises(ValueError, match='no Word-in-Context pairs'): load_wic(tmp_path/'other.csv')
    with pytest.raises(ValueError, match='no pair'): measure_wic(model, [])
    with pytest.raises(ValueError, match='No word was found'): measure_wic(model, [WicPair('zebra', 'a', 'b', True)])

# ---- tables of the paper ------------------------------------------------------------------------------------------
def tabled(cell, metrics):
    "What a cell of the figures' notebook tables of a result with these metrics."
    source = next(''.join(c['source']) for c in json.loads((ROOT/'paper/figures.ipynb').read_text())['cells'] if c['id'] == cell)
    tables = {}
    names = dict(vars(layerwise) | vars(scaling), pd=pd, PairedDifference=PairedDifference, needs=lambda *_: [dict(metrics=metrics)], figure=lambda _: plt.close('all'), display=lambda _: None,
                 table=lambda frame, name: tables.setdefault(name, frame))
    exec(source, names)
    return tables

def test_tables_read_results_of_both_ages(model, capsys):
    "A share that earlier results took between two readings that know nothing is not shown, and their names are today's."
    measured, layers = measure_scaling(model, TEXTS*2, LABELS*2, TEXTS, {'first': [1, 0]*4}, FrozenReference.of(model)).to_dict(), measure_layers(model, TEXTS).to_dict()
    measured['probes'] = measured['probes'] or [dict(concept='none', loss=0.)]
    now = tabled('486e5fe2', dict(layers=layers, scaling=measured))['scaling'].index
    new = {f'{kind}_tokens, {k}' for kind in ('all', 'word') for k in ('recovered', 'uniform', 'reference')}
    assert new <= set(now)
    measured['downstream'] = {k: {n: x for n, x in v.items() if n not in ('uniform', 'reference')} if isinstance(v, dict) else v for k, v in measured['downstream'].items()}
    earlier = tabled('486e5fe2', dict(layers=layers, scaling=measured))['scaling'].index
    assert not new & set(earlier) and {'word_tokens, full', 'reference'} <= set(earlier)
    judged = _judge([WicPair('bank', '', '', i < 4) for i in range(10)], range(10), [i % 3 > 0 for i in range(10)], np.arange(10.))
    wic = dict(before=judged.to_dict(), after=judged.to_dict(), after_minus_before=vars(judged.minus(judged)))
    assert tabled('fig-wic', wic)['word_in_context'].slot_balanced.notna().all() and 'minus before: +0.0' in capsys.readouterr().out
    old = {when: {dict(majority='chance', slot_minus_majority='slot_minus_chance').get(k, k): v for k, v in wic[when].items() if k not in ('slot_balanced', 'slot_kappa')} for when in ('before', 'after')}
    assert tabled('fig-wic', old)['word_in_context'].majority.tolist() == [.6, .6]

# ---- experiments -----------------------------------------------------------------------------------------------
def experiment(tmp_path, **params):
    file = tmp_path/'params.yaml'
    file.write_text(yaml.safe_dump(params | {'output_dir': str(tmp_path)}))
    subprocess.run([sys.executable, ROOT/'tools/run_experiment.py', file], check=True, capture_output=True, text=True, cwd=tmp_path)
    return json.loads((tmp_path/params['experiment_name']/'results.json').read_text())

def defaults_of(notebook):
    "The parameters of an experiment, as its notebook gives them."
    found = {}
    for cell in json.loads((ROOT/f'nbs/experiments/{notebook}.ipynb').read_text())['cells']:
        if 'parameters' in cell['metadata'].get('tags', []): exec(''.join(cell['source']), found)
    return {k: v for k, v in found.items() if k != '__builtins__' and k not in ('experiment_name', 'command', 'output_dir', 'model_name')}

def test_backbones_follow_the_classification_recipe():
    "Named defaults are the same; what is not named is what the library does by default."
    ours, theirs = defaults_of('backbones'), defaults_of('classification')
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 15 and {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    named = {f.name for f in fields(TrainingConfig)} & ours.keys() - {'training', 'dense'}      # there a yes or no, here the twin's rates
    training = {f.name for f in fields(LexicalTrainingArguments)} & ours.keys() - named
    config = TrainingConfig(**{k: ours[k] for k in named}, training={k: ours[k] for k in training})
    args = arguments_for(SimpleNamespace(config=config, tokens={'train': range(10_000)}, batch_size=config.batch_size, accumulation=1, model=SimpleNamespace(device=torch.device('cpu'))))
    same = {k for k in theirs if hasattr(args, k)}
    assert len(same) > 20 and {k: getattr(args, k) for k in same} == {k: theirs[k] for k in same}
    assert (theirs['dense_head_multiplier'], theirs['validation_samples']) == (DENSE['head_multiplier'], config.validation_samples)

def test_a_backbone_is_refused_before_training_only(tmp_path):
    "What fails in a training is no refusal of the backbone: it stops the run."
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs/experiments/backbones.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    loop = next(c for c in cells if c.startswith('metrics, refused = '))
    def set_up(name):
        if name == 'decoder': raise ValueError('reads one side only')
        return name
    def measure(setup): raise RuntimeError('the loss is not finite')
    given = dict(gc=gc, tempfile=tempfile, Path=Path, out=tmp_path, say=lambda *_: None, config_of=lambda name, *_: name, set_up=set_up, dense=False)
    with pytest.raises(RuntimeError, match='not finite'): exec(loop, given | dict(backbones=['decoder', 'bert'], measure=measure))
    ran = given | dict(backbones=['decoder', 'bert'], measure=lambda setup: dict(accuracy=1., active_dims=1., identity_error=0.))
    exec(loop, ran)
    assert ran['refused'] == {'decoder': 'reads one side only'} and ran['metrics']['decoder'] is None and ran['metrics']['bert']['accuracy'] == 1.

@pytest.mark.slow
def test_backbones_from_random_folders(tmp_path, tokenizer):
    "Two random models and a decoder, which is refused while the others go on."
    from transformers import GPT2Config, GPT2LMHeadModel, ElectraConfig, ElectraForMaskedLM
    torch.manual_seed(0)
    shape = dict(vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for name, made in (('bert', BertForMaskedLM(config())), ('electra', ElectraForMaskedLM(ElectraConfig(**shape, embedding_size=8))),
                       ('gpt2', GPT2LMHeadModel(GPT2Config(vocab_size=30522, n_embd=16, n_layer=1, n_head=2)))):
        made.save_pretrained(tmp_path/name); tokenizer.save_pretrained(tmp_path/name)
    rows = [dict(text=t, label=('neg', 'pos')[l]) for t, l in zip(TEXTS*6, LABELS*6)]
    (tmp_path/'train.jsonl').write_text('\n'.join(map(json.dumps, rows))); (tmp_path/'test.jsonl').write_text('\n'.join(map(json.dumps, rows[:8])))
    found = experiment(tmp_path, notebook='backbones', experiment_name='b', dataset_name='toy', source=str(tmp_path), model_name=[str(tmp_path/n) for n in ('bert', 'gpt2', 'electra')],
                       check_head=False, num_train_epochs=1, warmup_steps=1, max_length=32, positive_class=None)
    assert set(found['metrics']) == {'bert', 'gpt2', 'electra'} and found['metrics']['gpt2'] is None and 'gpt2' in found['parameters']['refused']
    assert all(found['metrics'][n]['identity_error'] <= 1e-5 and found['metrics'][n]['layers'] >= 1 for n in ('bert', 'electra'))

@pytest.mark.slow
def test_word_in_context_with_slots_from_a_task(tmp_path):
    "Slots are given to the words that occur, and judged before and after training."
    rows = [dict(text=t, label=('neg', 'pos')[l]) for t, l in zip(TEXTS*6, LABELS*6)]
    (tmp_path/'train.jsonl').write_text('\n'.join(map(json.dumps, rows))); (tmp_path/'test.jsonl').write_text('\n'.join(map(json.dumps, rows[:8])))
    pairs = [dict(text=w, sentence1=TEXTS[0], sentence2=TEXTS[i], label=i % 2) for i in (2, 3) for w in ('bank', 'zebra')]
    (tmp_path/'wic.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
    found = experiment(tmp_path, notebook='word_in_context', experiment_name='w', dataset_name='toy', source=str(tmp_path), wic=str(tmp_path/'wic.jsonl'), min_texts=3,
                       max_length=32, training=dict(num_train_epochs=1, warmup_steps=1))
    metrics = found['metrics']
    assert metrics['after_minus_before']['size'] == 2 and metrics['after_minus_before']['mean'] == metrics['after']['slot_accuracy'] - metrics['before']['slot_accuracy']
    assert metrics['words_with_slots'] == 1 and metrics['pairs_asked'] == metrics['before']['pairs'] == metrics['after']['pairs'] == 2
    assert metrics['identity_error'] <= 1e-5

@pytest.mark.slow
def test_long_context_from_a_random_model(tmp_path, tokenizer):
    build(tokenizer, LexicalSAEForSequenceClassification, label_names=['neg', 'pos']).save_pretrained(tmp_path/'model')
    rows = [dict(text=t, label=('neg', 'pos')[l]) for t, l in zip(TEXTS, LABELS)]
    for split in ('train', 'test'): (tmp_path/f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = experiment(tmp_path, notebook='long_context', experiment_name='l', dataset_name='toy', source=str(tmp_path), model_name=str(tmp_path/'model'), lengths=[40, 90], windows=[None, 24], overlap=4)
    assert found['metrics']['limit'] == 48 and found['metrics']['identity_error'] <= 1e-5 and len(found['curves']['accuracy']) == 5
