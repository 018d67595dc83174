"What a config becomes before anything is trained."
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import BertConfig, BertModel

from lexical_sae import setup_training
from lexical_sae.arms import measure_trained
from lexical_sae.backbone import best_device
from lexical_sae.data import load_task, offline_backbone
from lexical_sae.dense import DenseClassifier
from lexical_sae.explainers import WORD_METHODS, Reader, compare_explainers
from lexical_sae.dla import FactoredLinear
from lexical_sae.grounding import FrozenReference, measure_grounding
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.setup_training import TrainingConfig, arguments_for, fit_dense, set_up, setup_and_train
from lexical_sae.setup_training import _learned_and_watched, _prepare, _twin_key
from lexical_sae.surgery import SuppressedModel
from lexical_sae.testing import tiny_checkpoint
from lexical_sae.watch import ReferenceCache

@pytest.fixture
def csv(tmp_path):
    path = tmp_path/'mine.csv'
    path.write_text('text,label\n' + ''.join(f'a {w} film,{label}\n' for w, label in (('good', 'pos'), ('dull', 'neg'), ('bad', 'neg'))*8))
    return str(path)

def config(csv, **given): return TrainingConfig(dataset_name='mine', source=csv, max_length=16, batch_size=8, **given)

def test_a_dataset_may_be_named_by_its_path(csv):
    by_name, by_source = load_task(csv), load_task('mine', csv)
    assert by_name['train'][:] == by_source['train'][:] and by_name['test'][:] == by_source['test'][:]

def test_the_twin_learns_with_the_same_class_weights(csv, tmp_path):
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    twin, ids, labels = DenseClassifier(encoder, 2, class_weights=torch.tensor([1., 3.])).eval(), torch.tensor([[5, 6], [7, 8]]), torch.tensor([0, 1])
    out = twin(ids, labels=labels)
    assert out['loss'].item() == pytest.approx(F.cross_entropy(out['logits'], labels, weight=torch.tensor([1., 3.])).item())
    setup = set_up(config(csv, output_dir=str(tmp_path), training=dict(max_steps=1, warmup_steps=0, class_weights='balanced')))
    yes = torch.bincount(torch.tensor(setup.tokens['train']['labels'][:]))
    assert torch.allclose(fit_dense(setup)[0].class_weights, len(setup.tokens['train'])/(2*yes))

def test_a_kept_twin_depends_on_what_it_is_trained_with(csv):
    key = lambda **training: _twin_key(set_up(config(csv, training=training)))
    assert key() == key(anchor_weight=3., optim='schedule_free_adamw', logging_steps=7)
    for changed in (dict(label_smoothing=.3), dict(class_weights='balanced'), dict(max_grad_norm=.1), dict(weight_decay=.1)): assert key(**changed) != key()

def test_a_kept_twin_of_another_config_is_refused(csv, tmp_path):
    "Also where the other config asked for something that this one does not mention."
    made = lambda **training: set_up(config(csv, output_dir=str(tmp_path/'run'), twin=str(tmp_path/'twin'), training=training))
    fit_dense(made(max_steps=1, warmup_steps=0))
    assert fit_dense(made(max_steps=1, warmup_steps=0))[1] > 0
    with pytest.raises(ValueError, match='dense twin of another max_steps'): fit_dense(made(warmup_steps=0))

def test_a_configuration_needs_a_hub(csv):
    with pytest.raises(ValueError, match='leave it out'): load_task('mine', csv, config='x')

def test_one_evaluation_is_one(csv):
    setup = set_up(config(csv, evaluations=1, validation_share=.3))
    assert 0 < arguments_for(setup).eval_steps < 1                        # a share of all steps; 1 is every step
    with pytest.raises(ValueError, match='evaluations must be'): config(csv, evaluations=-1)

def test_the_reference_says_the_same_words_wherever_the_gates_start():
    auto, number = (LexicalSAEForSequenceClassification.from_backbone(str(offline_backbone()), num_labels=2, init_threshold=start) for start in ('auto', 1.))
    assert number.activation.theta[0].item() == pytest.approx(1.)
    assert number.config.start_theta + auto.logit_shift.item() == pytest.approx(auto.config.start_theta) and number.config.start_theta > 2

def test_what_the_head_start_reads_the_reference_need_not_read(csv):
    "And it is what the reference would have said to the trainer, in whose precision it is read; kept in bfloat16."
    setup = set_up(config(csv))
    args, device = arguments_for(setup), setup.model.device
    learned, cache = _learned_and_watched(setup)[0], ReferenceCache(setup.reference)
    _prepare(setup, args, learned, cache)
    batch = setup.collator(list(learned))
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16): expected = setup.reference.encode(batch['input_ids'].to(device), batch['attention_mask'].to(device))
    mask = batch['attention_mask'].bool()
    setup.reference.encode = None                                        # nobody may ask it
    found = cache(batch['input_ids'], batch['attention_mask'], batch['example_id'])
    assert torch.allclose(found[mask].float(), expected.cpu()[mask].float(), rtol=.02, atol=.02)

@pytest.mark.parametrize('halved', [True, False])
def test_the_reference_is_read_in_the_precision_that_is_trained_in(csv, tmp_path, monkeypatch, halved):
    "Which is what is kept of it; whoever judges a model reads without autocast."
    read, encode = [], FrozenReference.encode
    def noted(self, *args, **kwargs):
        read.append((torch.is_grad_enabled(), torch.is_autocast_enabled(self.backbone.device.type)))
        return encode(self, *args, **kwargs)
    monkeypatch.setattr(FrozenReference, 'encode', noted)
    setup_and_train(config(csv, output_dir=str(tmp_path), head_start=False, distil=False, validation_share=.3, evaluations=1, training=dict(max_steps=2, warmup_steps=0, bf16=halved)))
    assert (True, halved) in read and not {(True, not halved), (False, True)} & set(read)

def test_a_run_that_never_asks_the_reference_keeps_nothing_for_it(csv):
    setup = set_up(config(csv, training=dict(anchor_weight=0., reference_share=0.)))
    cache = ReferenceCache(setup.reference)
    _prepare(setup, arguments_for(setup), _learned_and_watched(setup)[0], cache)
    assert not cache.store

def test_words_that_are_not_read_are_no_words_of_the_text():
    model = LexicalSAEForSequenceClassification.from_backbone(str(offline_backbone()), num_labels=2, initial_words=60, classifier_hidden=0)
    with torch.no_grad(): model.head.fc2.weight.normal_()
    text, reference = 'the film was', FrozenReference.of(model)
    share = lambda t: measure_grounding(model, [t], reference=reference, max_length=5).input_share
    with torch.no_grad(): said = model.classify(model.encode(**model.batch([text]))).sparse_vector[0].topk(20).indices
    assert share(text + ' ' + ' '.join(model.words[i] for i in said.tolist())) == pytest.approx(share(text)) and share(text) < 1

def test_what_was_trained_in_bfloat16_answers_in_its_own_precision(csv, tmp_path):
    "As it will when it is read from its folder."
    halved, few = [], dict(max_steps=1, warmup_steps=0, bf16=True)
    trained = setup_and_train(config(csv, output_dir=str(tmp_path/'run'), training=few))
    twin, batch = fit_dense(trained.setup)[0], trained.model.batch(['a good film'])
    for network, inside in ((trained.model, trained.model.backbone), (twin, twin.encoder)):
        inside.register_forward_hook(lambda *_: halved.append(torch.is_autocast_enabled(best_device().type)))
        assert not network.training
        network(**batch)
    assert halved == [False, False]
    word = int(trained.model(**batch).state.sparse_vector[0].argmax())
    assert SuppressedModel(trained.model, word)(**batch).state.sparse_vector[0, word] == 0       # a view of it reads through its own gate

def test_a_rate_from_a_range_test_is_used_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    "It is tested on what is trained then: a head that has been started, with the classes' weights."
    (tmp_path/'films.csv').write_text('text,label\n' + ''.join(f"a {'dull' if i % 3 else 'good'} film {i},{'neg' if i % 3 else 'pos'}\n" for i in range(60)))
    seen, test = [], setup_training.learning_rate_range_test
    def watched(model, batches, **kwargs):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        found = test(model, batches, **kwargs)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
        seen.append((found, model.class_weights, model.label_smoothing, type(model.head.fc1), kwargs, before))
        return found
    monkeypatch.setattr(setup_training, 'learning_rate_range_test', watched)
    asked = dict(max_steps=4, warmup_steps=0, logging_steps=1, lr_scheduler_type='constant', class_weights='balanced', label_smoothing=.2, use_cpu=True)
    trained = setup_and_train(config(str(tmp_path/'films.csv'), output_dir=str(tmp_path/'run'), model_name=tiny_checkpoint(tmp_path/'backbone'), learning_rate=None, distil=False, training=asked,
                                     model=dict(initial_words=40, classifier_hidden=8, check=False)))
    ((found, weights, smoothing, first, given, before),) = seen
    trainer = trained.trainer
    assert 1e-6 < found.suggestion < 1e-2 and trainer.args.learning_rate == found.suggestion
    assert {g['name']: g['lr'] for g in trainer.optimizer.param_groups} == pytest.approx(dict(backbone=found.suggestion, head=2*found.suggestion, gate=2e-3))
    assert [h['learning_rate'] for h in trainer.state.log_history if 'ce' in h] == pytest.approx(4*[found.suggestion])
    assert first is FactoredLinear and given['head_multiplier'] == 2. and smoothing == trainer.model.label_smoothing == .2
    assert torch.equal(weights, trainer.model.class_weights) and weights[0] != weights[1]
    theta = trainer.model.activation.log_theta
    assert not torch.equal(theta, before['activation.log_theta']) and trainer.model.head.fc1.weight.shape == (8, trainer.model.num_dims)      # trained from there, and unfolded

@pytest.mark.gpu
def test_a_run_takes_place_on_the_gpu(csv, tmp_path):
    "From the head start to the explanations; what training alone would show, no other test asks of a GPU."
    trained = setup_and_train(config(csv, output_dir=str(tmp_path/'run'), training=dict(max_steps=4, warmup_steps=1)))
    twin = fit_dense(trained.setup)[0]
    assert {p.device.type for network in (trained.model, twin) for p in network.parameters()} == {best_device().type}
    assert measure_trained(trained)[0]['identity_error'] < 1e-5
    table, _ = compare_explainers(Reader(trained.model, max_length=16), ['a good film', 'a dull film'], WORD_METHODS, steps=4, samples=8)
    assert set(table.index) == set(WORD_METHODS) and table.seconds.notna().all()

def test_processes_may_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True); monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for rank, index in ((None, 0), ('1', 1), ('2', 0)):
        monkeypatch.delenv('LOCAL_RANK', raising=False) if rank is None else monkeypatch.setenv('LOCAL_RANK', rank)
        assert best_device() == torch.device('cuda', index)
