"How many words stay open, in the precision in which they are counted."
import pytest
import torch

from safetensors.torch import load_file

from lexical_sae.optimisation import evaluation_mode
from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments
from training_run import collate, model, texts

def test_k_is_settled_in_the_precision_in_which_the_model_is_read(tmp_path):
    "A word whose logit is as small as bfloat16's rounding error is open in one precision and closed in the other."
    args = LexicalTrainingArguments(str(tmp_path), max_steps=12, per_device_train_batch_size=16, report_to='none', save_strategy='no', use_cpu=True, disable_tqdm=True, active_target=4., bf16=True,
        per_device_eval_batch_size=8)
    trainer, halved = LexicalTrainer(model(0.), args, train_dataset=texts(), eval_dataset=texts(24), data_collator=collate), []
    trainer.model.backbone.register_forward_hook(lambda *_: halved.append(torch.is_autocast_enabled('cpu')))
    settle, settled = trainer.level.settle, []
    def settling(gate, measure):
        settled.append((len(halved), settle(gate, measure)))
        return settled[-1][1]
    trainer.level.settle = settling
    trainer.train()
    (before, active), = settled
    assert all(halved[:before]) and len(halved) > before and not any(halved[before:])
    batch, net = collate(texts(24)), trainer.model.eval()
    with torch.no_grad(): counts = net.classify(net.encode(batch['input_ids'], batch['attention_mask'])).num_active
    assert counts.float().mean().item() == pytest.approx(active) and active <= 4

def run(folder, train_dataset=None, **given):
    settings = dict(per_device_train_batch_size=16, per_device_eval_batch_size=8, report_to='none', save_strategy='no', use_cpu=True, disable_tqdm=True, active_target=4., learning_rate=5e-3)
    return LexicalTrainer(model(0.), LexicalTrainingArguments(str(folder), **settings | given), train_dataset=train_dataset or texts(), eval_dataset=texts(24), data_collator=collate)

def test_a_model_is_judged_at_the_thresholds_at_which_it_is_handed_out(tmp_path):
    trainer = run(tmp_path, max_steps=24, eval_strategy='steps', eval_steps=6, save_strategy='steps', save_steps=6, load_best_model_at_end=True, save_total_limit=1)
    trainer.train()
    judged = [h['eval_active'] for h in trainer.state.log_history if 'eval_constrained' in h]
    assert len(judged) > 1 and max(judged) <= 4 and trainer.choice.active <= 4          # training itself stays near 4, above as often as below
    assert trainer.evaluate()['eval_active'] == pytest.approx(trainer.choice.active, abs=.05)

def test_schedule_free_averages_do_not_pull_the_level_back(tmp_path):
    trainer = run(tmp_path, max_steps=24, optim='schedule_free_adamw', gate_learning_rate=0., warmup_fraction=.25)
    moved, step = [], trainer.level.step
    trainer.level.step = lambda *given: moved.append(step(*given)) or moved[-1]
    trainer.finish = lambda: None
    begun = trainer.model.activation.log_theta.detach().mean().item()
    trainer.train()
    assert abs(sum(moved)) > .05 and trainer.model.activation.log_theta.detach().mean().item() - begun == pytest.approx(sum(moved), rel=.1)

def test_schedule_free_models_are_kept_with_averaged_thresholds(tmp_path):
    "An evaluation settles the thresholds for a while; what is put back is the average, which a checkpoint then holds."
    trainer = run(tmp_path, max_steps=24, optim='schedule_free_adamw', warmup_fraction=.25, eval_strategy='steps', eval_steps=12, save_strategy='steps', save_steps=12)
    gate, averages, judged = trainer.model.activation, [], trainer._as_settled
    def watched():
        evaluation_mode(trainer.optimizer); averages.append(gate.log_theta.detach().clone()); evaluation_mode(trainer.optimizer, on=False)
        return judged()
    trainer._as_settled = watched
    trainer.train()
    assert len(averages) == 2
    for x, step in zip(averages, (12, 24)): assert torch.allclose(load_file(tmp_path/f'checkpoint-{step}/model.safetensors')['activation.log_theta'], x, atol=1e-5)

def test_trackers_and_constraint_move_once_per_optimiser_step(tmp_path):
    trainer = run(tmp_path, max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=4, separation_weight=.1, warmup_fraction=.2)
    trainer.train()
    assert int(trainer.level.steps) == 10 and int(trainer.frequencies.updates) == 10

def test_a_dead_word_is_rarer_than_under_the_untrained_gate(tmp_path):
    "Counted on texts drawn at random, not on the first batch, which holds the longest."
    rows = texts(uneven=True)
    trainer, batch = run(tmp_path, max_steps=2, train_sampling_strategy='group_by_length', train_dataset=rows), collate(rows)
    with torch.no_grad(): expected = (trainer.model.eval().classify(trainer.model.encode(batch['input_ids'], batch['attention_mask'])).sparse_vector > 0).float().mean(0)
    drawn = torch.get_rng_state()
    trainer.begin()
    assert torch.allclose(trainer.frequencies.start, expected) and int(trainer.frequencies.texts) == len(rows) and torch.equal(torch.get_rng_state(), drawn)
    trainer.train()
    assert torch.allclose(trainer.frequencies.start, expected) and int(trainer.frequencies.updates) == 2          # training adds nothing to it
    again = run(tmp_path, max_steps=2, train_sampling_strategy='group_by_length', train_dataset=rows); again.train()
    assert torch.allclose(again.frequencies.start, expected)

def test_too_few_words_are_said(tmp_path):
    trainer = run(tmp_path, max_steps=2, active_target=60., level_rate=1e-6)
    trainer.level.settle = lambda gate, measure: 3.
    with pytest.warns(UserWarning, match='3.0 words where 60 are allowed'): trainer.train()
    trainer.level.settle = lambda gate, measure: 0.
    with pytest.raises(RuntimeError, match='All gates closed'): trainer.finish()

def test_attention_is_plain_while_training_in_bfloat16_on_a_cpu(tmp_path):
    "Autocast begins inside the model's forward, after the choice of attention."
    trainer, used = run(tmp_path, max_steps=2, bf16=True), []
    trainer.model.backbone.register_forward_pre_hook(lambda backbone, _: used.append((torch.is_grad_enabled(), backbone.config._attn_implementation)))
    trainer.train()
    assert {how for grad, how in used if grad} == {'eager'} and trainer.model.backbone.config._attn_implementation == 'sdpa'
