"""The classifier of backbones that keep the head of Hugging Face's own class, so that its checkpoints load as they are.

BERT and RoBERTa have the original's head instead: the backbone's pooler and one linear classifier (classifier.py).
"""

from typing import ClassVar

from torch import Tensor

from deebert.modeling.classifier import HighwayClassifier
from deebert.modeling.config import add_highway_fields


class StockHeadClassifier(HighwayClassifier):
    """Mixin in front of an HF sequence classification class: its own head, after a backbone with off-ramps.

    model_class: the backbone with off-ramps. model_options: keyword arguments for it.
    """

    model_class: type
    model_options: ClassVar[dict] = {}

    def __init__(self, config):
        add_highway_fields(config, self.config_class)
        super().__init__(config)  # HF's class with its head, and with a backbone without off-ramps
        setattr(self, self.base_model_prefix, self.model_class(config, **self.model_options))
        self.post_init()

    def final_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """The first token's state: (b, T, H) -> (b, H)."""
        return hidden_states[:, 0]

    def classify(self, state: Tensor) -> Tensor:
        """HF's head, which takes the hidden states of all tokens, and reads the first: (b, H) -> (b, C)."""
        return self.classifier(state.unsqueeze(1))
