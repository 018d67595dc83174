"Sparse, exact, editable text classifiers whose features are words."
__version__ = "0.0.1"

from lexical_sae.model import (LexicalSAE, LexicalSAEConfig, LexicalSAEForSequenceClassification, LexicalSAEForTokenClassification,
                               SparseSequence)
from lexical_sae.explain import Explanation, explain_model_spans
from lexical_sae.surgery import SuppressedModel
from lexical_sae.certificate import suppress_token_globally
from lexical_sae.dla import CircuitState, TagCircuitState, circuit_mask, compute_active_slice_weff, compute_attribution_tensor, identity_error

__all__ = ['LexicalSAE', 'LexicalSAEConfig', 'LexicalSAEForSequenceClassification', 'LexicalSAEForTokenClassification', 'SparseSequence',
           'Explanation', 'explain_model_spans', 'CircuitState', 'TagCircuitState', 'circuit_mask', 'compute_active_slice_weff',
           'compute_attribution_tensor', 'identity_error', 'SuppressedModel', 'suppress_token_globally']
