"""The off-ramp: what it reads of a layer's hidden states, and its classifier.

Shapes: B batch, T tokens, H hidden, C labels. The pooled state (B, H) is what an off-ramp's classifier reads.
"""

import torch
from torch import Tensor, nn


def is_off_ramp(parameter_name: str) -> bool:
    """Whether a parameter belongs to the off-ramps rather than to the backbone."""
    return ".highway." in parameter_name or ".highway_embeddings." in parameter_name


def classifier_dropout(config) -> float:
    """The dropout before a classifier, as HF's classification heads choose it."""
    dropout = getattr(config, "classifier_dropout", None)  # MPNet's config has none
    return config.hidden_dropout_prob if dropout is None else dropout


def first_token(hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
    """The paper's choice, the first token's state: (B, T, H) -> (B, H)."""
    return hidden_states[:, 0]


def mean_of_tokens(hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
    """The mean over the tokens that are no padding: (B, T, H), `mean_weights` (B, T) or None for all -> (B, H)."""
    if pooling_weights is None:
        return hidden_states.mean(dim=1)
    return torch.bmm(pooling_weights.to(hidden_states.dtype).unsqueeze(1), hidden_states).squeeze(1)


POOLINGS = {"first": first_token, "mean": mean_of_tokens}  # of an off-ramp
CLASSIFIER_POOLINGS = {"cls": first_token, "mean": mean_of_tokens}  # of the final classifier, by ModernBERT's names


def mean_weights(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) mask -> (B, T) weights of a mean over the tokens, for all off-ramps: 0 for padding, each row sums to 1."""
    weights = (attention_mask != 0).to(dtype)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


class HighwayPooler(nn.Module):
    """BERT's pooler, dense + tanh: (B, H) -> (B, H)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.tanh(self.dense(pooled))


HEADS = ("pooler", "linear")
NEEDS_ALL_TOKENS = (
    "exit_before_first_layer: the first token's embedding is the same in every text; set highway_pooling to mean"
)


class Highway(nn.Module):
    """One off-ramp: pooling, BERT's pooler, dropout, linear classifier (section 3.1).

    With `config.highway_head` "linear" there is no pooler, and a thousandth of the weights and of the cost remain.
    """

    def __init__(self, config):
        super().__init__()
        if config.highway_pooling not in POOLINGS:
            raise ValueError(f"highway_pooling is {config.highway_pooling!r}; choose one of {', '.join(POOLINGS)}")
        if config.highway_head not in HEADS:
            raise ValueError(f"highway_head is {config.highway_head!r}; choose one of {', '.join(HEADS)}")
        self.pool = POOLINGS[config.highway_pooling]
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False) if config.pre_norm else None
        self.pooler = HighwayPooler(config) if config.highway_head == "pooler" else None
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, pooling_weights: Tensor | None = None) -> Tensor:
        """(B, T, H) -> logits (B, C)."""
        return self.classify(self.pooled_state(hidden_states, pooling_weights))

    def pooled_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, H), normalised here where the backbone's layers do not normalise their output."""
        pooled = self.pool(hidden_states, pooling_weights)
        return pooled if self.norm is None else self.norm(pooled)

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, H) -> logits (B, C)."""
        features = pooled if self.pooler is None else self.pooler(pooled)
        return self.classifier(self.dropout(features) if self.training else features)
