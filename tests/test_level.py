"How many words stay open, in the precision in which they are counted."
import pytest
import torch

from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments
from training_run import collate, model, texts

def test_k_is_settled_in_the_precision_in_which_the_model_is_read(tmp_path):
    "A word whose logit is as small as bfloat16's rounding error is open in one precision and closed in the other."
    args = LexicalTrainingArguments(str(tmp_path), max_steps=12, per_device_train_batch_size=16, report_to='none', save_strategy='no', use_cpu=True, disable_tqdm=True, active_target=4., bf16=True,
        per_device_eval_batch_size=8)
    trainer, halved = LexicalTrainer(model(0.), args, train_dataset=texts(), eval_dataset=texts(24), data_collator=collate), []
    trainer.model.backbone.register_forward_hook(lambda *_: halved.append(torch.is_autocast_enabled('cpu')))
    settle, settled = trainer.level.settle, []
    trainer.level.settle = lambda gate, measure: settled.append((len(halved), settle(gate, measure)))
    trainer.train()
    (before, active), = settled
    assert all(halved[:before]) and len(halved) > before and not any(halved[before:])
    batch, net = collate(texts(24)), trainer.model.eval()
    with torch.no_grad(): counts = net.classify(net.encode(batch['input_ids'], batch['attention_mask'])).num_active
    assert counts.float().mean().item() == pytest.approx(active) and active <= 4.1
