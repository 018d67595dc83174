"What a run logs reaches the places that `report_to` names."
from numbers import Real

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback

from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments
from training_run import Associations, collate, model, teacher, texts

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')

TERMS = {'ce', 'distillation', 'anchor', 'evidence', 'completeness', 'separation', 'band', 'flops', 'revival'}
STATE = {'lambda', 'tau', 'active', 'dead', 'theta', 'theta_min', 'theta_max', 'reference_share', 'input_share', 'association_agreement', 'loss', 'learning_rate'}
HELD_OUT = {f'eval_{k}' for k in ('ce', 'accuracy', 'active', 'reference_share', 'tau', 'constrained')}

class Place(TrainerCallback):
    "As TensorBoard and its like are called; they drop with a warning what is no number."
    seen = None
    def on_train_begin(self, args, state, control, **kwargs): Place.seen = []
    def on_log(self, args, state, control, logs=None, **kwargs): Place.seen.append((state.global_step, dict(logs)))

def test_terms_constraint_gate_and_grounding_reach_what_report_to_names(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, 'place', Place)
    args = LexicalTrainingArguments(str(tmp_path), report_to='place', max_steps=24, per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=4, eval_strategy='steps', eval_steps=12,
                                    save_strategy='no', use_cpu=True, disable_tqdm=True, active_target=4., separation_weight=.1, flops_weight=1e-3, revival_weight=.01)
    trainer = LexicalTrainer(model(0.), args, teacher=teacher(), associations=Associations(), train_dataset=texts(), eval_dataset=texts(24), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    training, held_out = ({step: logs for step, logs in Place.seen if key in logs} for key in ('ce', 'eval_ce'))
    assert list(training) == [4, 8, 12, 16, 20, 24] and list(held_out) == [12, 24]
    assert TERMS | STATE <= training[24].keys() and HELD_OUT <= held_out[24].keys()
    assert TERMS - training[4].keys() == {'completeness', 'separation', 'band', 'flops', 'revival'} and 'tau' not in training[4]      # in the warm-up
    assert all(isinstance(v, Real) for _, logs in Place.seen for v in logs.values())
    for step, logs in training.items(): assert next(h for h in trainer.state.log_history if h['step'] == step and 'ce' in h).items() >= logs.items()      # what the results are made of
