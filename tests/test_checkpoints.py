"What may be read from disk and what is refused; what a run that breaks leaves; pushing to the hub; a saved model in a new process."
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lexical_sae.backbone import load_backbone
from lexical_sae.model import LexicalSAE, LexicalSAEForSequenceClassification
from lexical_sae.surgery import SuppressedModel
from lexical_sae.train import LexicalTrainer, LexicalTrainingArguments
from test_families import backbone, batch, build
from test_surgery import TEXTS, reader
from training_run import collate, model as toy_model, texts as toy_texts

pytestmark = pytest.mark.filterwarnings('ignore:No tokenizer')

def without_head(folder):
    weights = {k: v for k, v in load_file(folder/'model.safetensors').items() if not k.startswith('head')}
    save_file(weights, folder/'model.safetensors', metadata={'format': 'pt'})

def pickled(folder):
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()

def halved(folder, name):
    file = folder/name
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2])

@pytest.mark.parametrize('damage, sentence', [
    (without_head, 'incomplete .4 missing, such as head.fc1.bias.*save the model again'),
    (pickled, 'no safetensors weights, and pickled ones are not read'),
    (lambda folder: halved(folder, 'model.safetensors'), 'damaged or half written'),
    (lambda folder: halved(folder, 'config.json'), 'not a valid JSON file'),
    (lambda folder: (folder/'config.json').unlink(), 'no saved Lexical-SAE.*from_backbone')])
def test_a_damaged_model_is_never_used(damage, sentence, tmp_path):
    build('bert').save_pretrained(tmp_path)
    LexicalSAE.from_pretrained(tmp_path)                                 # it was whole
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=sentence): LexicalSAE.from_pretrained(tmp_path)

@pytest.mark.parametrize('damage, sentence', [
    (pickled, 'no safetensors weights, and pickled ones are not read'),
    (lambda folder: halved(folder, 'model.safetensors'), 'damaged or half written')])
def test_a_damaged_backbone_is_never_used(damage, sentence, tmp_path):
    backbone('bert').save_pretrained(tmp_path)
    load_backbone(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence): load_backbone(tmp_path)

def test_the_head_of_a_deberta_is_found_where_its_config_does_not_name_it(tmp_path):
    "Checkpoints from the time of its first release have the newer head and no `legacy` in their config; one without any head is refused."
    own = backbone('deberta-v2-inline'); own.save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text()); del config['legacy']
    (tmp_path/'config.json').write_text(json.dumps(config))
    ids, mask = batch()
    with torch.no_grad():
        said = own(ids, mask).logits
        assert torch.equal(load_backbone(tmp_path)(ids, mask).logits, said)
    model = LexicalSAE.from_backbone(load_backbone(tmp_path)); model.save_pretrained(tmp_path/'model')
    assert torch.equal(LexicalSAE.from_pretrained(tmp_path/'model').encode(ids, mask).h, model.encode(ids, mask).h)
    own.deberta.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no trained language-model head .missing: lm_predictions'): load_backbone(tmp_path)

def test_a_language_model_is_no_saved_classifier(tmp_path):
    backbone('bert').save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no saved Lexical-SAE.*from_backbone'): LexicalSAE.from_pretrained(tmp_path)

def test_loading_info_on_request(tmp_path):
    build('bert').save_pretrained(tmp_path)
    model, info = LexicalSAE.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LexicalSAE) and not info['missing_keys']

def test_a_full_disk_keeps_the_earlier_model(tmp_path, monkeypatch):
    model = reader()
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(model.tokenizer, 'save_pretrained', full)        # the last thing to be written
    torch.nn.init.normal_(model.head.fc2.weight)
    with pytest.raises(OSError, match='No space left'): model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before

class FakeHub:
    "Takes what would be uploaded."
    def create_repo(self, repo_id, **kwargs):
        self.created = kwargs | dict(repo_id=repo_id)
        return type('Repo', (), dict(repo_id=repo_id))
    def create_commit(self, operations, **kwargs):
        self.commit = kwargs
        self.files = {o.path_in_repo: open(o.path_or_fileobj, 'rb').read() for o in operations}
        return 'address'

@pytest.fixture
def fake_hub(monkeypatch):
    def no_card(*args, **kwargs): raise EntryNotFoundError('none')
    fake = FakeHub()
    monkeypatch.setattr(hub, 'hf_api', lambda: fake); monkeypatch.setattr(ModelCard, 'load', no_card)
    return fake

@pytest.mark.parametrize('while_saving', [False, True])
def test_what_is_pushed_is_the_whole_model(fake_hub, while_saving, tmp_path):
    model = reader()
    if while_saving: model.save_pretrained(tmp_path/'here', push_to_hub=True, repo_id='me/words', private=True, commit_message='Words', token='t')
    else: model.push_to_hub('me/words', private=True, commit_message='Words', token='t')
    assert fake_hub.created == dict(repo_id='me/words', private=True, token='t', exist_ok=True) and fake_hub.commit['commit_message'] == 'Words'
    far = tmp_path/'far'; far.mkdir()
    for name, content in fake_hub.files.items(): (far/name).write_bytes(content)
    again = LexicalSAEForSequenceClassification.from_pretrained(far)     # as someone else would download it
    assert [p.probabilities for p in again.predict(TEXTS)] == [p.probabilities for p in model.predict(TEXTS)]

def test_pipelines_after_importing_the_package_alone(tmp_path):
    model = reader()
    model.save_pretrained(tmp_path)
    code = '''
import sys, json, lexical_sae
from transformers import pipeline
say = {task: pipeline(task, model=sys.argv[1])('the film and the plot') for task in ('text-classification', 'token-classification')}
print(json.dumps(say, default=float))'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, check=True)
    said, (own,) = json.loads(done.stdout.splitlines()[-1]), model.predict(['the film and the plot'])
    found = said['text-classification'][0]
    assert found['label'] == own.label and found['score'] == pytest.approx(own.probability, abs=1e-5)
    assert [e['word'] for e in said['token-classification']] == ['the', 'film', 'and', 'the', 'plot']

class Poison(TrainerCallback):
    "Makes a gradient, or a weight, NaN at one step."
    def __init__(self, kind): self.kind = kind
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.kind == 'gradient' and state.global_step == 3: model.head.fc2.weight.grad.fill_(float('nan'))
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.kind == 'weight' and state.global_step == 3: model.head.fc2.weight.detach().fill_(float('nan'))

@pytest.mark.parametrize('kind, sentence', [('weight', 'loss is not finite at step 4'), ('gradient', 'weights are not finite after step 4')])
def test_the_last_good_checkpoint_stays_and_is_named(kind, sentence, tmp_path):
    args = LexicalTrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=16, learning_rate=2e-3, report_to='none',
                                    save_strategy='steps', save_steps=2, save_total_limit=1, use_cpu=True, disable_tqdm=True, active_target=8.)
    trainer = LexicalTrainer(toy_model(0.), args, train_dataset=toy_texts(), data_collator=collate, callbacks=[Poison(kind)])
    with pytest.raises(FloatingPointError, match=f'{sentence} .*last good checkpoint: {tmp_path}/checkpoint-2'): trainer.train()
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ['checkpoint-2']
    assert all(p.isfinite().all() for p in LexicalSAEForSequenceClassification.from_pretrained(tmp_path/'checkpoint-2').parameters())

@pytest.mark.parametrize('say', [lambda m, t: m.predict([t, 'a film']), lambda m, t: m.explain(t),
                                 lambda m, t: SuppressedModel(m, ['plot']).predict([t, 'a film'])], ids=['predict', 'explain', 'view'])
def test_long_texts_are_cut_and_counted(say):
    model = reader()
    with pytest.warns(UserWarning, match='1 of . texts are longer than 40 tokens and were truncated'): said = say(model, 'the film '*30)
    assert said
