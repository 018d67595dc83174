"Identity, routing, tiling and pool-then-gate on nine backbone families, tied and untied, in float32 and float64; saving and reloading."
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (AlbertConfig, AutoModelForMaskedLM, BertConfig, DebertaV2Config, DistilBertConfig, ElectraConfig, ModernBertConfig,
                          MPNetConfig, RobertaConfig, RobertaPreLayerNormConfig, XLMRobertaConfig)

from lexical_sae.decode import naive_decode, pooled_decode
from lexical_sae.dla import identity_error, route_to_positions
from lexical_sae.backbone import projection
from lexical_sae.model import LexicalSAE, LexicalSAEForSequenceClassification

V, D = 83, 16
SMALL = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40)
CONFIGS = {
    'bert': lambda **k: BertConfig(**SMALL, **k),
    'distilbert': lambda **k: DistilBertConfig(vocab_size=V, dim=D, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40, **k),
    'roberta': lambda **k: RobertaConfig(**SMALL, pad_token_id=1, **k),
    'modernbert': lambda **k: ModernBertConfig(**SMALL, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, **k),
    'albert': lambda **k: AlbertConfig(**SMALL, embedding_size=8, **k),
    'electra': lambda **k: ElectraConfig(**SMALL, embedding_size=8, **k),
    'roberta-prelayernorm': lambda **k: RobertaPreLayerNormConfig(**SMALL, pad_token_id=1, **k),
    'mpnet': lambda **k: MPNetConfig(**SMALL, **k),
    'xlm-roberta': lambda **k: XLMRobertaConfig(**SMALL, pad_token_id=1, **k),
    'deberta-v2': lambda **k: DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=['p2c', 'c2p'], legacy=True, **k),
    'deberta-v2-inline': lambda **k: DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=['p2c', 'c2p'], legacy=False, **k),
}
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}

def backbone(family, tied=True):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(CONFIGS[family](tie_word_embeddings=tied)).eval()
    for p in model.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=.3)
    _, bias = projection(model)
    if bias is not None: nn.init.normal_(bias, std=.3)
    return model

def build(family, tied=True, dtype=torch.float32, cls=LexicalSAE, **kwargs):
    model = cls.from_backbone(backbone(family, tied), num_labels=3, init_threshold=.1, vocabulary='all', classifier_hidden=8, **kwargs)
    for p in model.head.parameters(): nn.init.normal_(p, std=.5)
    return model.to(dtype).eval()

def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (3, 9), generator=g)
    mask = (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    return ids, mask

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')

@pytest.mark.parametrize('dtype', BOUND, ids=['float32', 'float64'])
@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('family', CONFIGS)
def test_theorems(family, tied, dtype):
    model, (ids, mask), bound = build(family, tied, dtype), batch(), BOUND[dtype]
    with torch.no_grad():
        plain = backbone(family, tied).to(dtype)(input_ids=ids, attention_mask=mask).logits      # what the unlifted model says
        seq = model(ids, mask)
        weight, bias = model.decoder()
        z = seq.h @ weight.T + bias
        assert ((z - plain).abs()[mask.bool()].max()/plain.abs().max()) < bound*10               # lifting changed nothing
        state = model.classify(seq, mask)
        assert 0 < state.num_active.min() and state.num_active.sum() < 3*V                       # there is something to gate
        assert identity_error(state) <= bound
        routed = route_to_positions(state.attribution(), state.position, 9)
        assert ((routed.sum(-1) + state.b_eff - state.logits).abs()/state.attribution().abs().sum(-1).clamp(min=1)).max() <= bound
        assert (routed[~mask.bool()[:, None].expand_as(routed)] == 0).all()                      # nothing is said by padding
        gated_first = model.activation(z).masked_fill(~mask.bool()[..., None], 0).max(1).values  # theorem 2
        assert (gated_first - state.sparse_vector).abs().max() <= bound*10*z.abs().max()
        tag_state = model.tag_state(seq)
        assert identity_error(tag_state) <= bound
    for tile in (1, 7, V):                                                                       # theorem 4
        h1, h2 = seq.h.clone().requires_grad_(), seq.h.clone().requires_grad_()
        w1, w2 = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        a, b = pooled_decode(h1, w1, bias, mask.bool(), tile=tile)[0], naive_decode(h2, w2, bias, mask.bool())[0]
        scale = b.abs().max()
        assert (a - b).abs().max() <= bound*10*scale
        (model.activation(a)**2).sum().backward(); (model.activation(b)**2).sum().backward()
        for x, y in ((h1, h2), (w1, w2)): assert (x.grad - y.grad).abs().max() <= bound*100*y.grad.abs().max()

@pytest.mark.parametrize('family', CONFIGS)
def test_autograd_is_the_witness(family):
    model, (ids, mask) = build(family, dtype=torch.float64), batch()
    state = model.classify(model(ids, mask))
    for c in range(3):
        g, = torch.autograd.grad(state.logits[:, c].sum(), state.sparse_vector, retain_graph=True)
        assert (g - state.W_eff[:, c]).abs().max() < 1e-12

@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('family', CONFIGS)
def test_reload_is_bit_equal(family, tied, tmp_path):
    model, (ids, mask) = build(family, tied), batch()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='No tokenizer'): again = LexicalSAE.from_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(again.classify(again(ids, mask)).logits, model.classify(model(ids, mask)).logits)
    shares = lambda m: m.decoder()[0].data_ptr() == m.backbone.get_input_embeddings().weight.data_ptr()
    assert shares(again) == shares(model)

def test_reload_in_a_new_process(tmp_path):
    model, (ids, mask) = build('bert'), batch()
    model.save_pretrained(tmp_path)
    with torch.no_grad(): torch.save(model.classify(model(ids, mask)).logits, tmp_path/'logits.pt')
    code = f'''
import torch, warnings; warnings.simplefilter("ignore")
from lexical_sae.model import LexicalSAE
m = LexicalSAE.from_pretrained(r"{tmp_path}")
ids, mask = torch.tensor({ids.tolist()}), torch.tensor({mask.tolist()})
with torch.no_grad(): print(torch.equal(m.classify(m(ids, mask)).logits, torch.load(r"{tmp_path}/logits.pt", weights_only=True)))'''
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'True'

@pytest.mark.parametrize('family', CONFIGS)
def test_a_text_may_be_as_long_as_the_model_says(family):
    model = build(family)
    ids = torch.randint(5, V, (1, min(model.config.max_positions, 60)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): assert model.classify(model.encode(ids, torch.ones_like(ids))).logits.isfinite().all()

def test_head_stays_in_float32_under_autocast():
    model, (ids, mask) = build('bert'), batch()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        state, tags = model.classify(model(ids, mask)), model.tag_state(model(ids, mask))
        assert {x.dtype for x in (state.logits, state.b_eff, state.W_eff, tags.b_eff)} == {torch.float32}
        assert max(identity_error(state), identity_error(tags)) <= 1e-5
    assert identity_error(state) <= 1e-5

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('family', CONFIGS)
def test_half_of_the_model_is_never_the_head(family, dtype, tmp_path):
    "Loaded or cast in half precision, the backbone is halved; gate and head are not, and ids and masks stay what they are."
    model, (ids, mask) = build(family), batch()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='No tokenizer'): loaded = LexicalSAE.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, model.to(dtype)):
        assert {p.dtype for p in half.backbone.parameters()} == {dtype} and half.activation.allowed.dtype == torch.bool
        assert {p.dtype for m in (half.head, half.activation) for p in m.parameters()} == {torch.float32}
        with torch.no_grad(): seq = half(ids, mask); state, tags = half.classify(seq, mask), half.tag_state(seq)
        assert state.num_active.min() > 0 and max(identity_error(state), identity_error(tags)) <= 1e-5
    assert half.double().head.fc1.weight.dtype == torch.float64                                  # better is allowed

def test_deepcopy_keeps_the_projection_lifted():
    model, (ids, mask) = build('bert'), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad(): assert torch.equal(twin(ids, mask).h, model(ids, mask).h)

def test_forward_takes_no_kwargs():
    "Under gradient accumulation the Trainer skips its division when a forward takes **kwargs."
    import inspect
    for cls in LexicalSAEForSequenceClassification.__mro__[:2]:
        assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values())

@pytest.mark.parametrize('pooling', ['max', 'attention'])
def test_topk_words_come_from_their_loudest_position(pooling):
    model, (ids, mask) = build('bert', pooling=pooling, topk_per_position=3), batch()
    if model.query is not None: nn.init.normal_(model.query)
    with torch.no_grad():
        seq = model(ids, mask); state, said = model.classify(seq), seq.dense()
        if model.query is not None: said = said*model.attention(seq)[..., None]
    open_ = state.sparse_vector > 0
    assert open_.sum() > 9 and torch.equal(state.position[open_].long(), said.argmax(1)[open_])
