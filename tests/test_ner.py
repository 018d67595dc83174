"Tagging: losses and gradients over families, entity scores against seqeval, edge cases, one instance for both tasks, the pipeline, the experiment."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from torch import nn
from transformers import DataCollatorForTokenClassification, pipeline

from lexical_sae.decode import ThresholdFitter
from lexical_sae.dla import identity_error
from lexical_sae.entities import EntityScores, TagPredictions, entity_counts, entity_errors, entity_scores, paired_f1, spans, tag_calibration
from lexical_sae.grounding import FrozenReference
from lexical_sae.model import LexicalSAEForTokenClassification
from lexical_sae.ner import DenseTagger, TaggingTrainer, dense_tag_logits, predict_dense_tags, predict_tags, start_at_prior, tag_batches, tagging_tokenizer, word_batches
from lexical_sae.tag_explain import TagCircuitFitter, TagGroundingFitter, explain_entities, tag_associations
from lexical_sae.testing import tiny_bert, tiny_model, tiny_tokenizer
from lexical_sae.train import LexicalTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
TAGS = ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']
WORDS = 'anna lee berlin paris lives works in and at visited film club bank city woman man'.split()

@pytest.fixture
def tokenizer(): return tiny_tokenizer(['##lin', 'ber', *WORDS], size=0)

def tagger(tokenizer, **kwargs):
    return tiny_model(LexicalSAEForTokenClassification, tokenizer, dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.), label_names=TAGS,
                      **dict(classifier_hidden=8, vocabulary='all', initial_words=8) | kwargs)

SENTENCES = [['anna', 'lee', 'visited', 'berlin'], ['paris', 'and', 'berlin'], ['man']]

@pytest.mark.parametrize('hidden', [8, 0])
@pytest.mark.parametrize('gate', ['jumprelu', 'drelu'])
def test_training_forward_equals_the_stored_tensor(tokenizer, gate, hidden):
    model = tagger(tokenizer, gate=gate, classifier_hidden=hidden).train()
    batch = model.batch([' '.join(s) for s in SENTENCES])
    labels = torch.full(batch['input_ids'].shape, -100); labels[:, 1] = torch.tensor([1, 3, 0]); labels[0, 2] = 2
    out = model(**batch, labels=labels)
    seq = model.encode(**batch)
    naive = nn.functional.cross_entropy(model.head(model.activation(seq.logits()))[labels >= 0], labels[labels >= 0])
    assert abs(out.loss.item() - naive.item()) < 1e-5
    weights = [p for p in model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(x, weights, allow_unused=True, materialize_grads=True) for x in (out.loss, naive))
    assert sum(g.abs().sum() for g in theirs) > 0
    for p, a, b in zip(weights, mine, theirs):
        if p is model.activation.log_theta: b = b*model.activation.allowed   # a word that may not open keeps its threshold
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert len(out.state.logits) == 4                                      # only the labelled positions were decoded

def test_start_threshold_of_positions_needs_few_rows_at_a_time(tokenizer, monkeypatch):
    model, texts, sizes = tagger(tokenizer), [' '.join(WORDS[i % 8:]*2) for i in range(30)], []
    update = ThresholdFitter.update
    monkeypatch.setattr(ThresholdFitter, 'update', lambda self, z, rows: (sizes.append(len(z)), update(self, z, rows)))
    found = model.start_threshold(texts, per_position=True)
    model.logit_shift.zero_()
    seq = model.encode(**model.batch(texts, max_length=128))
    stored = ThresholdFitter(*model.decoder(), model.activation.allowed, 8); update(stored, seq.logits()[seq.keep], seq.rows)
    expected = stored.fit()
    assert sum(sizes) == len(seq.rows) > 256 >= max(sizes)
    assert found.theta == pytest.approx(expected.theta, rel=1e-5) and found.spread == pytest.approx(expected.spread, rel=1e-6)

def test_no_gradient_at_all_closed_gates(tokenizer):
    model = tagger(tokenizer); model.activation.set_threshold(1e6, 1.)
    state = model.tag_state(model.encode(**model.batch(['anna lee'])))
    assert state.num_active.sum() == 0 and identity_error(state) == 0
    state.logits.sum().backward()
    assert model.head.fc2.bias.grad.abs().sum() > 0

def test_a_word_spelled_like_a_special_token_moves_no_other_tag(tokenizer):
    "It has no position of its own and is no entity; the words around it, and the next sentence, keep theirs."
    model, sentences = tagger(tokenizer).eval(), [['berlin', '[SEP]', 'anna', '[PAD]', 'paris'], ['anna', 'lee', 'visited']]
    (batch, state), = tag_batches(model, sentences, progress=False)
    assert batch.words == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 1), (1, 2)] and len(state.logits) == 6 and int(batch.first.sum()) == 6
    both, alone = predict_tags(model, sentences).tags, predict_tags(model, sentences[1:]).tags
    assert both[0][1] == both[0][3] == 'O' and both[1] == alone[0]

def test_one_instance_tags_and_classifies_and_the_pipeline_agrees(tokenizer, tmp_path):
    model = tagger(tokenizer).eval(); model.save_pretrained(tmp_path/'model')
    text = 'anna lee visited berlin'
    with torch.no_grad():
        seq = model.encode(**model.batch([text]))
        assert identity_error(model.classify(seq)) <= 1e-5 and identity_error(model.tag_state(seq)) <= 1e-5
    tag = pipeline('token-classification', model=str(tmp_path/'model'), aggregation_strategy='first')
    rng, orphans = np.random.default_rng(0), 0
    for n in rng.integers(1, 9, size=40):
        text = ' '.join(rng.choice([*WORDS, 'berlinlin', 'Anna,', '(lee)', 'paris-berlin'], size=n))
        exp = explain_entities(model, text)
        assert [(e.type, e.start, e.end) for e in exp.entities] == [(e['entity_group'], e['start'], e['end']) for e in tag(text)]
        orphans += len(exp.entities) - len(spans([t for _, t, _ in exp.tags]))
    assert orphans > 0                                                     # tags such as an I- after O: no entity for the strict score

@pytest.mark.gpu
def test_measures_are_the_same_on_a_gpu(tokenizer):
    model, gold = tagger(tokenizer).eval(), [['B-PER', 'I-PER', 'O', 'B-LOC'], ['B-LOC', 'O', 'B-LOC'], ['O']]
    def measure():
        circuits, fitter = TagCircuitFitter(outside=-1), TagGroundingFitter(model, FrozenReference.of(model), tag_associations(SENTENCES*5, gold*5, ['O', 'PER', 'LOC']))
        for batch, state in tag_batches(model, SENTENCES): circuits.update(state); fitter.update(batch, state, SENTENCES)
        return circuits.fit().to_numpy(), pd.json_normalize(fitter.fit()).to_numpy()
    here = measure(); model.to('cuda')
    for a, b in zip(here, measure()): np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1e-3)

def test_trainer_minimises_and_the_reference_stays(tokenizer, tmp_path):
    model = tagger(tokenizer)
    data = [dict(input_ids=[2, 7, 8, 16, 9, 3], attention_mask=[1]*6, labels=[-100, 1, 2, 0, 3, -100], example_id=i, length=6) for i in range(16)]
    start_at_prior(model, [[1, 2, 0, 3]])
    args = LexicalTrainingArguments(str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3, active_target=4., warmup_fraction=.3, logging_steps=5,
                                    save_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True)
    trainer = TaggingTrainer(model, args, train_dataset=data)
    before = trainer.reference.reference.backbone.state_dict()['bert.embeddings.word_embeddings.weight'].clone()
    trainer.train()
    logs = [h for h in trainer.state.log_history if 'ce' in h]
    assert logs[-1]['ce'] < logs[0]['ce'] and {'anchor', 'completeness', 'tau'} <= set(logs[-1])
    assert torch.equal(before, trainer.reference.reference.backbone.state_dict()['bert.embeddings.word_embeddings.weight'])

def tag_rows(labels, n=16):
    return [dict(input_ids=[2, 7, 8, 16, 9, 3], attention_mask=[1]*6, labels=[-100, *labels, -100], example_id=i, length=6) for i in range(n)]

def tag_arguments(folder, **kwargs):
    return LexicalTrainingArguments(str(folder), **dict(max_steps=8, per_device_train_batch_size=8, learning_rate=3e-3, active_target=2., logging_steps=1,
                                                        save_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True) | kwargs)

@pytest.mark.parametrize('form', ['triplet', 'cosine'])
def test_every_objective_reaches_a_tagger(tokenizer, tmp_path, form):
    every = dict(separation_weight=1., flops_weight=1., revival_weight=1., mlm_weight=1.)
    trainer = TaggingTrainer(tagger(tokenizer), tag_arguments(tmp_path, separation_form=form, sparsity='l1', **every), train_dataset=tag_rows([1, 2, 0, 3]))
    trainer.centroids.centroids[4] = 7.; trainer.centroids.seen[4] = True
    trainer.train()
    last = [h for h in trainer.state.log_history if 'ce' in h][-1]
    assert all(last[k] != 0 for k in ('separation', 'flops', 'mlm', 'band')) and 'revival' in last
    assert (trainer.centroids.centroids[4] == 7).all()                     # no word is I-LOC
    assert (trainer.centroids.centroids[:4].abs().sum(1) > 0).all()
    assert trainer.frequencies.texts == 16*4                               # positions of the texts that are read before the first step

@pytest.mark.parametrize('given', [dict(patience=1), dict(class_weights='balanced'), dict(class_weights=[1.]*5), dict(evidence_weight=.3),
                                   dict(load_best_model_at_end=True, save_strategy='steps', eval_strategy='steps')], ids=lambda g: next(iter(g)))
def test_what_stays_out_of_tagging_is_refused(tokenizer, tmp_path, given):
    with pytest.raises(ValueError, match=f'{next(iter(given))} does nothing for tags'):
        TaggingTrainer(tagger(tokenizer), tag_arguments(tmp_path, **given), train_dataset=tag_rows([1, 2, 0, 3]))

def test_best_tagger_by_its_loss(tokenizer, tmp_path):
    args = tag_arguments(tmp_path, max_steps=6, load_best_model_at_end=True, metric_for_best_model='loss', save_strategy='steps', eval_strategy='steps', save_steps=2, eval_steps=2)
    trainer = TaggingTrainer(tagger(tokenizer), args, train_dataset=tag_rows([1, 2, 0, 3]), eval_dataset=tag_rows([1, 2, 0, 3], 8))
    trainer.train()
    assert trainer.state.best_model_checkpoint

def test_prior_is_the_log_frequency(tokenizer):
    model = tagger(tokenizer); start_at_prior(model, [[0, 0, 1]])
    torch.testing.assert_close(model.head.fc2.bias.exp(), torch.tensor([3, 2, 1, 1, 1])/8.)
    start_at_prior(model, [[-100, 0, 0, 1, -100]])                         # labels of tokens may stay as they are
    torch.testing.assert_close(model.head.fc2.bias.exp(), torch.tensor([3, 2, 1, 1, 1])/8.)

@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8).flatmap(lambda g: st.tuples(st.just(g), st.lists(st.sampled_from(TAGS), min_size=len(g), max_size=len(g)))),
                min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_seqeval(pairs):
    gold, predicted = map(list, zip(*pairs))
    right, found, labelled = entity_counts(gold, predicted).sum(0)
    if not labelled: return                                                # seqeval reports no type then
    micro = classification_report(gold, predicted, output_dict=True, mode='strict', scheme=IOB2, zero_division=0)['micro avg']
    assert micro['support'] == labelled and abs(micro['recall'] - right/labelled) < 1e-9
    assert abs(micro['precision'] - (right/found if found else 0)) < 1e-9
    sheet = entity_errors([['w']*len(g) for g in gold], gold, predicted)
    assert (sheet.labelled != '').sum() == labelled - right                # every missed or mistaken entity is one row

def test_sentences_without_entities_score_zero_not_an_error():
    scores = entity_scores([['O', 'O']], [['O', 'O']])
    assert scores.entity_f1 == 0 and scores.tag_accuracy == 1

def test_bad_input_says_what_to_do(tokenizer):
    model = tagger(tokenizer)
    for call, words in ((lambda: entity_scores([['O']], []), 'labelled and 0 predicted'), (lambda: entity_scores([['O']], [['O', 'O']]), '1 tags and 2 predictions'),
                        (lambda: entity_scores([['E-PER']], [['O']]), 'not BIO2'),
                        (lambda: entity_scores([['B-']], [['O']]), "Tag 'B-' of sentence 0 is not BIO2"), (lambda: entity_scores([[]], [[]]), 'Sentence 0 is empty'),
                        (lambda: paired_f1([['O']], [['O']], [['O', 'O']]), '1 tags and 2 predictions'), (lambda: paired_f1([['O']], [['O', 'O']], [['O']]), '1 tags and 2 predictions'),
                        (lambda: tag_calibration([['O', 'O']], TagPredictions([['O']], [[1.]])), '2 tags and 1 predictions'),
                        (lambda: start_at_prior(model, [[0, 7]]), 'outside 0..4'), (lambda: predict_tags(model, [['a'], []]), 'Sentence 1 is empty'),
                        (lambda: predict_tags(model, ['a b']), 'is a string'), (lambda: explain_entities(model, 'anna', 'mean'), "choose 'sum' or 'max_abs'"),
                        (lambda: TagCircuitFitter().fit(), 'No entity'), (lambda: TagGroundingFitter(model, FrozenReference.of(model)).fit(), 'No word was seen'),
                        (lambda: model(**model.batch(['anna']), labels=torch.full((1, 3), 9)), 'outside 0..4')):
        with pytest.raises(ValueError, match=words): call()

def test_no_word_is_lost(tokenizer):
    model = tagger(tokenizer)
    sentences = [['anna']*100, ['berlinlinlin'*30, 'paris'], ['man', '\u200b', 'woman']]
    seen = sorted(w for b, _ in tag_batches(model, sentences, 2) for w in b.words)
    assert seen == [(0, i) for i in range(100)] + [(1, 0), (1, 1), (2, 0), (2, 2)]
    assert [len(t) for t in predict_tags(model, sentences).tags] == [100, 2, 3]

def test_training_goes_on_after_a_glance(tokenizer):
    model = tagger(tokenizer).train()
    batches = tag_batches(model, SENTENCES, 1); next(batches)
    assert not model.training
    batches.close()
    assert model.training

def trained(kind):
    "A small byte-level BPE or SentencePiece-like tokenizer."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = ['<pad>', '<s>', '</s>', '<unk>', '<mask>']
    if kind == 'byte BPE':
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token='<unk>')
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator([' '.join(WORDS)]*50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>', mask_token='<mask>')

@pytest.mark.parametrize('kind', ['byte BPE', 'SentencePiece'])
def test_labels_sit_on_first_pieces_of_other_tokenizers(kind, tmp_path):
    trained(kind).save_pretrained(tmp_path)
    tokenizer = tagging_tokenizer(str(tmp_path))
    sentences = [['anna', 'visited', 'Zürich', 'and', 'paris'], ['paris']]
    batch, = word_batches(tokenizer, sentences, 64)
    assert batch.words == [(0, i) for i in range(5)] + [(1, 0)]
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch.encoding['input_ids']]
    first = [t for row, keep in zip(tokens, batch.first.tolist()) for t, k in zip(row, keep) if k]
    assert all(t[0] in 'Ġ▁' for t in first) and len(tokens[0]) > 5         # every word begins with its blank, some have several pieces

def test_dense_twin_tags_every_word(tokenizer):
    torch.manual_seed(0)
    encoder = tiny_bert(len(tokenizer)).bert
    twin = DenseTagger(encoder, 5).eval()
    found = predict_dense_tags(twin, tokenizer, SENTENCES, TAGS, 32)
    assert [len(t) for t in found.tags] == [4, 3, 1] and all(.2 <= p <= 1 for s in found.probability for p in s)

def test_dense_twin_teaches_token_by_token(tokenizer, tmp_path):
    torch.manual_seed(0)
    encoder = tiny_bert(len(tokenizer)).bert
    twin = DenseTagger(encoder, 5)
    data = [dict(input_ids=[2, 7, 3], attention_mask=[1]*3, labels=[-100, 1, -100], example_id=0, length=3),
            dict(input_ids=[2, 7, 8, 9, 3], attention_mask=[1]*5, labels=[-100, 1, 2, 0, -100], example_id=1, length=5)]
    found = dense_tag_logits(twin, data, DataCollatorForTokenClassification(tokenizer), batch_size=2)
    assert found.shape == (2, 5, 5)
    with torch.no_grad():
        for i, row in enumerate(data): torch.testing.assert_close(found[i, :row['length']], twin(torch.tensor([row['input_ids']])).logits[0], atol=1e-5, rtol=1e-5)
    args = LexicalTrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, save_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True)
    trainer = TaggingTrainer(tagger(tokenizer), args, teacher=found, train_dataset=data, data_collator=DataCollatorForTokenClassification(tokenizer))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first['distillation'] > 0 and first['loss'] == pytest.approx(.5*(first['ce'] + first['distillation']) + first['anchor'], abs=1e-3)

def test_probabilities_of_one_bin():
    found = tag_calibration([['O', 'B-X']], TagPredictions([['O', 'O']], [[1., 1.]]))
    assert found.error == .5 and found.table.words.tolist() == [2]

@pytest.mark.slow
def test_bench_compares_both_paths():
    done = subprocess.run([sys.executable, str(ROOT/'tools/bench_tagging.py'), 'both', 'float32', '8', '1', '1'], check=True, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found['worst_gradient_norm_difference'] < .01 and {'naive', 'pairs', 'times_less_memory', 'times_faster'} <= set(found)

@pytest.mark.slow
def test_experiment_runs_on_a_few_sentences(tmp_path):
    rows = '\n\n'.join('anna B-PER\nlee I-PER\nvisited O\nberlin B-LOC\n. O' if i % 2 else 'the O\nfilm O\nclub O\nin O\nparis B-LOC' for i in range(60))
    folder = tmp_path/'data'; folder.mkdir()
    for split in ('train', 'test'): (folder/f'{split}.txt').write_text(rows + '\n')
    params = yaml.safe_load((ROOT/'paper/params/conll2003_verify.yaml').read_text())
    params |= dict(source=str(folder), output_dir=str(tmp_path), train_samples=40, test_samples=20, num_train_epochs=2, topk_curve=[1, 10])
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(params))
    subprocess.run([sys.executable, str(ROOT/'tools/run_experiment.py'), str(tmp_path/'p.yaml')], check=True, cwd=ROOT)
    metrics = json.loads((tmp_path/'conll2003_verify/results.json').read_text())['metrics']
    assert metrics['identity_error'] <= 1e-5 and {'entity_f1', 'topk', 'circuits', 'dense', 'types'} <= set(metrics)
    assert set(metrics['type_words']) <= {'O', 'PER', 'LOC'} and all(0 < len(words) <= 15 and words[0]['contribution'] >= words[-1]['contribution'] > 0 for words in metrics['type_words'].values())
    assert set(metrics['examples']) == {'right', 'wrong type'} and all({'text', 'entities', 'tags'} <= set(e) for kind in metrics['examples'].values() for e in kind)
    curves = json.loads((tmp_path/'conll2003_verify/results.json').read_text())['curves']
    assert curves['step'][0] == 1
