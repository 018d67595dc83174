"""Seconds of a full report on a task's test texts, tier by tier; prints one JSON line.
bench_report.py MODEL TASK SOURCE: a trained model's folder, the task that it was trained on, and where that lies.
The dense twin beside it is not trained: reading it costs the same."""
import json, sys, time

import torch
from transformers import AutoModel
from transformers.utils import logging

from lexical_sae.data import load_task, offline_backbone
from lexical_sae.dense import DenseClassifier
from lexical_sae.eval import TIERS, EvaluationData, evaluate
from lexical_sae.grounding import FrozenReference
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.results import hardware

def main(folder, task, source):
    logging.set_verbosity_error(); logging.disable_progress_bar()
    data, model = load_task(task, source), LexicalSAEForSequenceClassification.from_pretrained(folder)
    dense = DenseClassifier(AutoModel.from_pretrained(offline_backbone(), dtype=torch.float32), model.config.num_labels)
    held_out = EvaluationData(data['test']['text'][:], data['test']['label'][:], data['train']['text'][:], data['train']['label'][:],
                              reference=FrozenReference.load(model, str(offline_backbone())), dense=dense)
    begin = time.perf_counter()
    report = evaluate(model, held_out, TIERS, max_length=64, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(dict(task=task, texts=report.texts, train_texts=len(held_out.train_texts), seconds=time.perf_counter() - begin,
                          tiers=report.seconds, threads=torch.get_num_threads(), hardware=hardware())))

if __name__ == '__main__': main(*sys.argv[1:])
