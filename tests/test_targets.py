"Heads that say yes or no: explanations, grounding and pipelines of a single logit and of several."
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from lexical_sae.explain import ClassWordsFitter
from lexical_sae.grounding import FrozenReference, measure_grounding
from lexical_sae.model import LexicalSAEForSequenceClassification
from lexical_sae.targets import MULTILABEL

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ['a wonderful film about a river bank', 'the plot is dull and the actors are bored', 'she took money to the bank']

@pytest.fixture(scope='module', params=[['toxic'], ['funny', 'sad'], ['funny', 'sad', 'long']], ids=['one', 'two', 'three'])
def model(request):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=.3,
                        max_position_embeddings=32)
    tokenizer = AutoTokenizer.from_pretrained(ROOT/'assets/minilm-mlm')
    made = LexicalSAEForSequenceClassification.from_backbone(BertForMaskedLM(config), tokenizer=tokenizer, check=False, initial_words=30,
                                                             classifier_hidden=8, label_names=request.param, problem_type=MULTILABEL)
    with torch.no_grad():
        for p in made.head.parameters(): p.normal_()
    return made.eval()

def logits(model):
    with torch.no_grad(): return model(**model.batch(TEXTS)).logits

def test_explanations_are_of_the_logit_itself(model):
    exp, row = model.explain(TEXTS[0]), logits(model)[0]
    assert exp.against is None and exp.error <= 1e-5
    assert exp.logit == pytest.approx(row.max().item(), abs=1e-4) and exp.probability == pytest.approx(row.max().sigmoid().item(), abs=1e-5)
    assert exp.bias + sum(f.contribution for f in exp.features) == pytest.approx(exp.logit, abs=1e-3)

def test_grounding_counts_answers_and_contributions(model):
    said = (logits(model) > 0).float()
    labels = said.clone(); labels[0, 0] = 1 - labels[0, 0]                 # one wrong answer
    found = measure_grounding(model, TEXTS, labels.tolist(), FrozenReference.of(model))
    assert found.accuracy == pytest.approx(1 - 1/labels.numel()) and found.identity_error <= 1e-5
    assert 0 < found.reference_share <= 1 and 0 < found.bias_share < 1     # nothing is centred away, not even of a single logit

def test_words_of_a_single_class_are_not_centred_away(model):
    fitter = ClassWordsFitter(model)
    with torch.no_grad(): fitter.update(model.classify(model.encode(**model.batch(TEXTS))))
    assert fitter.total.abs().sum() > 0 and len(fitter.fit(3))

def test_saved_and_in_a_pipeline(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = LexicalSAEForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.problem_type == MULTILABEL and torch.equal(logits(again.eval()), logits(model))
    found = pipeline('text-classification', model=str(tmp_path))(TEXTS[0])[0]
    assert found['score'] == pytest.approx(logits(model)[0].max().sigmoid().item(), abs=1e-5)
