"A tiny run from a config for the tests of crashes: setup_run.py FOLDER [key=json ...], the keys of `TrainingConfig`; writes what the run ended with."
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from lexical_sae.setup_training import TrainingConfig, setup_and_train
from lexical_sae.testing import tiny_checkpoint
from lexical_sae.train import LexicalTrainer
from lexical_sae.watch import ProgressLines

def write_texts(path, n=160):
    "Films are good or bad, with other words around that."
    pick, rows = np.random.default_rng(0), ['text,label']
    for i in range(n):
        around = pick.choice('a the film plot films plots witty filming not'.split(), size=int(pick.integers(2, 9)))
        rows.append(f"{' '.join(around)} {pick.choice(['good', 'great'] if i % 2 else ['bad', 'dull'])} {i},{'pos' if i % 2 else 'neg'}")
    path.write_text('\n'.join(rows) + '\n')

def wait_at(step, folder):
    "The run says when it has made so many steps, and waits there to be killed."
    dual_step = LexicalTrainer.dual_step
    def waiting(self):
        dual_step(self)
        if self.state.global_step == step: (folder/'reached').touch(); time.sleep(600)
    LexicalTrainer.dual_step = waiting

def main(folder, *options):
    warnings.filterwarnings('ignore')
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    given = {k: json.loads(v) for k, v in (o.split('=', 1) for o in options)}
    if stop := given.pop('stop_at_step', 0): wait_at(stop, folder)
    if not (folder/'mine.csv').exists(): write_texts(folder/'mine.csv'); tiny_checkpoint(folder/'backbone')
    training = dict(warmup_steps=2, logging_steps=1, use_cpu=True) | given.pop('training', {})
    config = TrainingConfig(**dict(active_target=10., target_accuracy=.95, dataset_name='mine', source=str(folder/'mine.csv'), model_name=str(folder/'backbone'), output_dir=str(folder/'run'),
        batch_size=8, learning_rate=2e-3, training=training, model=dict(initial_words=40, classifier_hidden=8, check=False)) | given)
    trained = setup_and_train(config)
    trainer = trained.trainer
    begun_at = next(c.first for c in trainer.callback_handler.callbacks if isinstance(c, ProgressLines))
    log = [{k: v for k, v in h.items() if 'runtime' not in k and 'per_second' not in k} for h in trainer.state.log_history]
    ends = dict(log=log, begun_at=begun_at, chosen=str(trainer.choice),
                weights={name: p.detach().double().flatten().tolist() for name, p in trained.model.named_parameters()})
    (folder/'ends0.json').write_text(json.dumps(ends))

if __name__ == '__main__': main(*sys.argv[1:])
