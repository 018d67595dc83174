"A tiny training run for the tests of processes and crashes: training_run.py FOLDER [key=json ...]; prints nothing, writes what the run ended with."
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments

def texts(n=96, uneven=False, seed=1):
    "The class is whether token 7 or token 8 stands in the text; of 8 tokens, or of 4 to 8."
    g, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids = torch.randint(10, 60, (8,), generator=g)
        ids[int(torch.randint(0, 8, (1,), generator=g))] = 7 + i % 2
        if uneven: ids = ids[:4 + i % 5]; ids[0] = 7 + i % 2
        rows.append(dict(input_ids=ids.tolist(), attention_mask=[1]*len(ids), labels=i % 2, example_id=i))
    return rows

def collate(rows):
    L = max(len(r['input_ids']) for r in rows)
    return {k: torch.tensor([r[k] + [0]*(L - len(r[k])) if isinstance(r[k], list) else r[k] for r in rows]) for k in rows[0]}

def model(dropout):
    set_seed(0)
    backbone = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
                                          initializer_range=.3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.))
    return LexicalSAEForSequenceClassification.from_backbone(backbone, init_threshold=1., vocabulary='all', classifier_hidden=16)

def teacher(n=96):
    "Answers of a dense twin that is more or less sure."
    sure = 4*torch.rand(n, generator=torch.Generator().manual_seed(5))
    right = F.one_hot(torch.arange(n) % 2, 2)
    return sure[:, None]*right

class Associations:
    "Every word points to one of the two classes, for no reason."
    def of_dimensions(self, model):
        toward = torch.randn(model.num_dims, generator=torch.Generator().manual_seed(6))
        return torch.stack([toward, -toward], 1)                         # [V,C]

class Slow(LexicalTrainer):
    "Says where it is, and waits there to be killed."
    def __init__(self, *args, stop_in_checkpoint=0, stop_at_step=0, **kwargs):
        self.stop_in_checkpoint, self.stop_at_step, self.read = stop_in_checkpoint, stop_at_step, []
        super().__init__(*args, **kwargs)
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training: self.read.append(inputs['example_id'].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)
    def wait(self): Path(self.args.output_dir, 'reached').touch(); time.sleep(600)
    def _save_method(self, folder):
        if self.state.global_step == self.stop_in_checkpoint: self.wait()
        super()._save_method(folder)
    def dual_step(self):
        super().dual_step()
        if self.state.global_step == self.stop_at_step: self.wait()

def main(folder, *options):
    warnings.filterwarnings('ignore')
    given = dict(o.split('=', 1) for o in options)
    given = {k: json.loads(v) for k, v in given.items()}
    stop = {k: given.pop(k) for k in ('stop_in_checkpoint', 'stop_at_step') if k in given}
    dropout, held_out, uneven = given.pop('dropout', 0.), given.pop('held_out', 0), given.pop('uneven', False)
    own = int(os.environ.get('RANK', 0)) if given.pop('own_held_out', False) else 0             # each process watches other texts
    taught, associated = given.pop('taught', False), given.pop('associated', False)
    settings = dict(max_steps=24, backbone_dropout=None, per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=1, report_to='none', save_strategy='no',
        use_cpu=True, disable_tqdm=True, active_target=4., anchor_margin=1., warmup_fraction=.25, target_accuracy=.97, revival_weight=.01, separation_weight=.1,
        adam_epsilon=1e-6) | given                                       # a gradient that is rounding alone moves nothing
    trainer = Slow(model(dropout), LexicalTrainingArguments(folder, **settings), teacher=teacher() if taught else None, associations=Associations() if associated else None,
        train_dataset=texts(uneven=uneven), eval_dataset=texts(held_out, uneven, seed=1 + own) if held_out else None, data_collator=collate, **stop)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    method = {k: v.double().flatten().tolist() for k, v in trainer._method().state_dict().items() if not v.double().isnan().any()}
    ends = dict(step=trainer.state.global_step, log=[h for h in trainer.state.log_history if 'ce' in h], method=method, active=trainer.active_ema, read=trainer.read,
                evaluation=trainer.evaluate() if held_out else None, weights=[p.detach().double().norm().item() for p in trainer.model.parameters()])
    Path(folder).mkdir(exist_ok=True)
    Path(folder, f'ends{trainer.args.process_index}.json').write_text(json.dumps(ends))
    trainer.accelerator.end_training()                                   # or gloo's threads may abort the interpreter as it leaves

if __name__ == '__main__': main(*sys.argv[1:])
