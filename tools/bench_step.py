"""Time of a whole training step of a Lexical-SAE and of its dense twin, interleaved in one process; prints one JSON line.

What is timed is what a trainer does between two batches: its own `training_step` (forward, losses, the teacher's answers, backward), clipping, optimiser, schedule, and what follows a step (dual step, trackers,
level control). Level control looks at held-out texts every so many steps; a look is timed by itself and shared out over these.

bench_step.py offline|bert-base|tiny [native|float32|bfloat16] [words a text opens] [rounds]; native: bfloat16 where the machine multiplies in it
bench_step.py precisions: those that the machine multiplies in
bench_step.py readme [FOLDER]: writes README.md of what was measured, and whether it is as fast as is wanted
"""
import contextlib, json, statistics, sys, tempfile, time, warnings
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, TrainingArguments, set_seed
from transformers.utils import logging

from lexical_sae.data import offline_backbone
from lexical_sae.dense import DenseClassifier, DenseTrainer
from lexical_sae.backbone import has_bfloat16, sample_sentences
from lexical_sae.grounding import WordAssociations
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.results import atomic_write, hardware
from lexical_sae.setup_training import DENSE, OURS, RECIPE, TrainingConfig
from lexical_sae.train import _LOOK_EVERY, LexicalTrainer, LexicalTrainingArguments

B, L, C = 32, 64, 2
WANTED = {'offline': 1.6, 'bert-base': 1.25}       # times the dense twin's step
SHAPES = {'bert-base': {}, 'tiny': dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=L)}

def models(which, words):
    "A Lexical-SAE and its dense twin on the offline backbone, or on random weights of a shape."
    set_seed(0)
    tokenizer, settings = AutoTokenizer.from_pretrained(offline_backbone()), dict(initial_words=words, num_labels=C)
    make = LexicalSAEForSequenceClassification.from_backbone
    if which == 'offline': return make(str(offline_backbone()), **settings), AutoModel.from_pretrained(offline_backbone(), dtype=torch.float32)
    config = BertConfig(**SHAPES[which])
    return make(BertForMaskedLM(config), tokenizer=tokenizer, check=False, **settings), BertModel(config, add_pooling_layer=False)

def full_texts(tokenizer, n):
    "n texts of L tokens, of real sentences, tokenised as rows of a data set."
    sentences, pick = sample_sentences(), torch.Generator().manual_seed(0)
    texts = [' '.join(sentences[j] for j in torch.randperm(len(sentences), generator=pick)[:8]) for _ in range(n)]
    rows = tokenizer(texts, truncation=True, max_length=L, padding='max_length')
    return [dict(input_ids=ids, attention_mask=mask, labels=i % C, example_id=i) for i, (ids, mask) in enumerate(zip(rows['input_ids'], rows['attention_mask']))]

def trainers(which, words, rounds, bf16, folder):
    "Both with the default recipe; ours with a teacher, word associations and held-out texts. A batch for each round, and one more."
    ours, encoder = models(which, words)
    learned, held_out = (rounds + 1)*B, TrainingConfig.validation_samples
    rows = full_texts(ours.tokenizer, learned + held_out)
    texts = ours.tokenizer.batch_decode([r['input_ids'] for r in rows], skip_special_tokens=True)
    ours.start_threshold(texts[:256])
    common = RECIPE | dict(max_steps=1000, per_device_train_batch_size=B, use_cpu=True, report_to='none', bf16=bf16, learning_rate=1e-6, remove_unused_columns=False)   # a small rate: the steps must not change what is measured
    dense = DenseTrainer(DenseClassifier(encoder, C), TrainingArguments(folder, **common), train_dataset=rows[:learned], head_multiplier=DENSE['head_multiplier'])
    known = WordAssociations.fit(texts[:learned], [r['labels'] for r in rows[:learned]], C, minimum=1)                # every word is known: the whole loss is computed
    args = LexicalTrainingArguments(folder, **common | OURS | dict(gate_learning_rate=1e-6, level_rate=1e-9, per_device_eval_batch_size=2*B))
    return dense, LexicalTrainer(ours, args, teacher=torch.randn(learned, C), associations=known, train_dataset=rows[:learned], eval_dataset=rows[learned:])

def in_the_middle(trainer):
    "A trainer as it is after the warm-up, every loss on; its model, wrapped for training."
    trainer.state.max_steps = trainer.args.max_steps
    trainer.current_gradient_accumulation_steps = 1
    model, _ = trainer._prepare_for_training(trainer.args.max_steps, None, None)
    if isinstance(trainer, LexicalTrainer):
        trainer.geco.update(ce=.5, active=1.); trainer.active_ema = 4*trainer.args.active_target
        trainer.frequencies.observe_start(torch.zeros(trainer._net.num_dims), 1)
    return model

def one_step(trainer, model, batch):
    "Seconds of one step, as `train` makes it; at a step after which level control does not look."
    trainer.state.global_step = 60*_LOOK_EVERY
    begin = time.perf_counter()
    trainer.training_step(model, dict(batch))
    trainer._clip_grad_norm(model); trainer.optimizer.step(); trainer.lr_scheduler.step(); model.zero_grad()
    trainer.state.global_step += 1
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    return time.perf_counter() - begin

def measure(dense, lexical, rounds):
    "Seconds of a step of each kind (medians; the first round warms up), and of a look. A batch is read twice: the reference reads it for the first time, then it is remembered."
    twin, ours, times, looks = in_the_middle(dense), in_the_middle(lexical), dict(dense=[], first_epoch=[], lexical=[]), []
    for i in range(rounds + 1):
        batch = lexical.data_collator(lexical.train_dataset[i*B:(i + 1)*B])
        for kind, step in dict(dense=partial(one_step, dense, twin), first_epoch=partial(one_step, lexical, ours), lexical=partial(one_step, lexical, ours)).items(): times[kind].append(step(batch))
    for turn in range(2):
        begin = time.perf_counter(); lexical._held_out_active(turn); looks.append(time.perf_counter() - begin)
    return {kind: statistics.median(seconds[1:]) for kind, seconds in times.items()}, min(looks)

def main(which, dtype='native', words='400', rounds='4'):
    if dtype == 'native': dtype = 'bfloat16' if has_bfloat16() else 'float32'
    warnings.filterwarnings('ignore'); logging.set_verbosity_error(); logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(sys.stderr):
        dense, lexical = trainers(which, float(words), int(rounds), dtype == 'bfloat16', tmp)
        seconds, look = measure(dense, lexical, int(rounds))
    for kind in ('first_epoch', 'lexical'): seconds[kind] += look/_LOOK_EVERY
    active = lexical.terms.pop('active')
    print(json.dumps(dict(backbone=which, dtype=dtype, words=round(sum(active)/len(active)), rounds=int(rounds), **{f'{k}_seconds': round(v, 4) for k, v in seconds.items()}, look_seconds=round(look, 4),
                          look_every=_LOOK_EVERY, terms=sorted(lexical.terms), ratio=round(seconds['lexical']/seconds['dense'], 2), ratio_first_epoch=round(seconds['first_epoch']/seconds['dense'], 2), hardware=hardware())))

def verdict(ratio, wanted):
    "In words: whether a step is as fast as is wanted."
    return '' if wanted is None else 'met' if ratio <= wanted else f'missed by {ratio - wanted:.2f}'

PAGE = """# Timings

Medians of one run each; every file names its processor and its number of threads. `make bench` writes the files and this page.

| file | command |
|---|---|
| `step_*.json`, `tagging_*.json` | `make bench` |
| `report_sst2.json` | `python tools/bench_report.py runs/sst2/model sst2 FOLDER`, all cores; the model of `make run PARAMS=paper/params/sst2.yaml` |

## A training step against the dense twin's

{B} texts of {L} tokens. A whole step: forward, losses, the teacher's answers, backward, clipping, optimiser, dual step, trackers and level control, whose look at held-out texts is shared out over the steps between two looks.
What the frozen reference says of a text is remembered: the head start reads up to ten thousand texts with the untrained model, and a text beyond these is read when it is trained on for the first time.

| backbone | open words | precision | dense, seconds | with what is remembered: times dense | with that reading: times dense | wanted | remembered | with that reading |
|---|---|---|---|---|---|---|---|---|
{rows}
"""

def readme(folder='paper/bench'):
    "The page beside the files: made of them, so that what it says of them is so."
    rows = []
    for file in sorted(Path(folder).glob('step_*.json')):
        r = json.loads(file.read_text())
        wanted = WANTED.get(r['backbone'])
        cells = (r['backbone'], r['words'], r['dtype'], f"{r['dense_seconds']:.2f}", f"{r['ratio']:.2f}", f"{r['ratio_first_epoch']:.2f}", wanted or '', verdict(r['ratio'], wanted), verdict(r['ratio_first_epoch'], wanted))
        rows.append('| ' + ' | '.join(map(str, cells)) + ' |')
    atomic_write(Path(folder)/'README.md', PAGE.format(B=B, L=L, rows='\n'.join(rows)))

def precisions():
    "A machine that only imitates bfloat16 says nothing of its speed."
    print('float32', *(['bfloat16'] if has_bfloat16() else []))

if __name__ == '__main__':
    match sys.argv[1:]:
        case ['precisions']: precisions()
        case ['readme', *folder]: readme(*folder)
        case arguments: main(*arguments)
