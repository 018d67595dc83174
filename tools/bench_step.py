"""Median time of a whole training step (forward, losses, backward, optimiser) of a Lexical-SAE and of its dense twin,
interleaved in one process; prints one JSON line.
bench_step.py offline|bert-base [native|float32|bfloat16] [words a text opens] [steps]; native: bfloat16 where the machine multiplies in it"""
import contextlib, json, statistics, sys, tempfile, time, warnings

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, TrainingArguments, set_seed
from transformers.utils import logging

from lexical_sae.data import offline_backbone
from lexical_sae.dense import DenseClassifier, DenseTrainer
from lexical_sae.backbone import has_bfloat16, sample_sentences
from lexical_sae.grounding import WordAssociations
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.results import hardware
from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments

B, L, C = 32, 64, 2

def models(which, words):
    "A Lexical-SAE and its dense twin on the offline backbone, or on random weights of BERT-base's shape."
    set_seed(0)
    tokenizer, settings = AutoTokenizer.from_pretrained(offline_backbone()), dict(initial_words=words, num_labels=C)
    make = LexicalSAEForSequenceClassification.from_backbone
    if which == 'offline': return make(str(offline_backbone()), **settings), AutoModel.from_pretrained(offline_backbone(), dtype=torch.float32)
    config = BertConfig()
    return make(BertForMaskedLM(config), tokenizer=tokenizer, check=False, **settings), BertModel(config, add_pooling_layer=False)

def full_batch(model):
    "B texts of L tokens, of real sentences; the gates start where they open so many words of these."
    sentences = sample_sentences()
    texts = [' '.join(sentences[(i + j) % len(sentences)] for j in range(8)) for i in range(B)]
    batch = model.tokenizer(texts, truncation=True, max_length=L, padding='max_length', return_tensors='pt')
    model.start_threshold(model.tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True))
    return dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=torch.arange(B) % C)

def associations(model, batch):
    "Every word of the batch is known, so that the whole loss is computed."
    return WordAssociations.fit(model.tokenizer.batch_decode(batch['input_ids'], skip_special_tokens=True), batch['labels'].tolist(), C, minimum=1)

def in_the_middle(trainer, model):
    "A trainer as it is after the warm-up, every loss on."
    trainer.state.max_steps, trainer.state.global_step = 100, 60
    trainer.create_optimizer(); trainer.optimizer.zero_grad()
    if isinstance(trainer, LexicalTrainer):
        trainer.geco.update(ce=.5, active=1.); trainer.active_ema = 4*trainer.args.active_target
        trainer.frequencies.observe_start(torch.zeros(model.num_dims), 1)
    model.train()

def one_step(trainer, model, batch, dtype):
    "Seconds of one step."
    begin = time.perf_counter()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32): loss = trainer.compute_loss(model, dict(batch))
    loss.backward(); trainer.optimizer.step(); trainer.optimizer.zero_grad()
    return time.perf_counter() - begin

def main(which, dtype='native', words='400', steps='9'):
    if dtype == 'native': dtype = 'bfloat16' if has_bfloat16() else 'float32'
    warnings.filterwarnings('ignore'); logging.set_verbosity_error(); logging.disable_progress_bar()
    ours, encoder = models(which, float(words))
    twin, batch, dtype = DenseClassifier(encoder, C), full_batch(ours), getattr(torch, dtype)
    common = dict(use_cpu=True, report_to='none', learning_rate=1e-6)      # small: the steps must not change what is measured
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(sys.stderr):
        dense = DenseTrainer(twin, TrainingArguments(tmp, remove_unused_columns=False, **common))
        lexical = LexicalTrainer(ours, LexicalTrainingArguments(tmp, gate_learning_rate=1e-6, **common), associations=associations(ours, batch))
    in_the_middle(dense, twin); in_the_middle(lexical, ours)
    kinds = {'dense': (dense, twin, batch), 'first_epoch': (lexical, ours, batch),
        'lexical': (lexical, ours, batch | {'example_id': torch.arange(B)})}
    times = {k: [] for k in kinds}
    for _ in range(int(steps) + 1):
        for k, what in kinds.items(): times[k].append(one_step(*what, dtype))
    seconds = {k: statistics.median(v[1:]) for k, v in times.items()}       # the first step warms up
    print(json.dumps(dict(backbone=which, dtype=str(dtype).split('.')[-1], words=round(sum(lexical.terms['active'])/len(lexical.terms['active'])),
                          **{f'{k}_seconds': round(v, 4) for k, v in seconds.items()}, ratio=round(seconds['lexical']/seconds['dense'], 2),
                          ratio_first_epoch=round(seconds['first_epoch']/seconds['dense'], 2), hardware=hardware())))

if __name__ == '__main__': main(*sys.argv[1:])
