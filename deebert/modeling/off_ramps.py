"""The off-ramp: what it reads of a layer's hidden states, its classifier, and the encoder that holds the off-ramps.

Shapes: B batch, T tokens, H hidden, C labels. The pooled state (B, H) is what an off-ramp's classifier reads.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deebert.modeling.config import add_highway_fields, config_rule, set_threshold

OFF_RAMP_PARAMETER = re.compile(r"\.(highway|highway_embeddings|learn_to_exit)\.")


def is_off_ramp(parameter_name: str) -> bool:
    """Whether a parameter belongs to the off-ramps (or their learning-to-exit head) rather than to the backbone."""
    return OFF_RAMP_PARAMETER.search(parameter_name) is not None


def classifier_dropout(config) -> float:
    """The dropout before a classifier, as HF's classification heads choose it."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class OwnInit:
    """Mixin in front of an HF model: modules with an `init_parameters` method are initialised by it."""

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "init_parameters"):
            module.init_parameters()
        else:
            super()._init_weights(module)


class Pooling(nn.Module):
    """Hidden states (B, T, H) and `mean_weights` (B, T), or None -> pooled state (B, H). Built from the config."""

    operations = 0  # floating-point operations for each number of the hidden states, see evaluation/cost.py

    def __init__(self, config):
        super().__init__()


class FirstToken(Pooling):
    """The paper's choice: the first token's state."""

    def forward(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        return hidden_states[:, 0]


class MeanOfTokens(Pooling):
    """The mean over the tokens that are not padding; over all tokens where pooling_weights is None."""

    operations = 2

    def forward(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        if pooling_weights is None:
            return hidden_states.mean(dim=1)
        return torch.bmm(pooling_weights.to(hidden_states.dtype).unsqueeze(1), hidden_states).squeeze(1)


class AttentionOverTokens(Pooling):
    """A mean weighted by how well tokens match a learned query. It starts as the plain mean."""

    operations = 4

    def __init__(self, config):
        super().__init__(config)
        self.query = nn.Parameter(torch.zeros(config.hidden_size))

    def init_parameters(self) -> None:
        initialization.zeros_(self.query)

    def forward(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        match = hidden_states @ self.query / math.sqrt(len(self.query))  # (B, T)
        if pooling_weights is not None:
            match = match.masked_fill(pooling_weights == 0, torch.finfo(match.dtype).min)
        weights = torch.softmax(match, dim=1, dtype=torch.float32).to(hidden_states.dtype)
        return torch.bmm(weights.unsqueeze(1), hidden_states).squeeze(1)


POOLINGS = {"first": FirstToken, "mean": MeanOfTokens, "attention": AttentionOverTokens}


def mean_weights(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) mask -> (B, T) weights of a mean over the tokens: 0 for padding, each row sums to 1.

    Computed once for all off-ramps of a pass.
    """
    weights = (attention_mask != 0).to(dtype)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


def token_lengths(attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) mask -> (B,) on the CPU: the position of each sample's last token + 1. None for other masks."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return ((attention_mask != 0) * positions).amax(dim=1).cpu()


class HighwayPooler(nn.Module):
    """BERT's pooler, dense + tanh: (B, H) -> (B, H)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.tanh(self.dense(pooled))


HEADS = ("pooler", "linear")
NEEDS_ALL_TOKENS = (
    "exit_before_first_layer: the first token's embedding is the same in every text; "
    "set highway_pooling to mean or attention"
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
        self.pool = POOLINGS[config.highway_pooling](config)
        self.pooler = HighwayPooler(config) if config.highway_head == "pooler" else None
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, pooling_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, H) -> logits (B, C) and the pooled state (B, H)."""
        pooled = self.pool(hidden_states, pooling_weights)
        return self.classify(pooled), pooled

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, H) -> logits (B, C)."""
        features = pooled if self.pooler is None else self.pooler(pooled)
        return self.classifier(self.dropout(features) if self.training else features)


class LearnToExit(nn.Linear):
    """BERxiT's learning-to-exit head, one for all layers: pooled state (B, H) -> certainty (B,), from 0 to 1.

    Xin et al., EACL 2021, section 3.3; trained by `training.strategies.certainty_losses`. It starts at 1/2.
    """

    def __init__(self, config):
        super().__init__(config.hidden_size, 1)

    def init_parameters(self) -> None:
        initialization.zeros_(self.weight)
        initialization.zeros_(self.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(pooled).squeeze(-1).float())


LayerLoop = Callable[[list[Callable], Tensor, Tensor | None], Tensor]  # blocks, hidden states, mask -> hidden states


def unchanged(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
    """What runs before exit 0: no layer."""
    return hidden_states


# Hidden states (b, T, H) and pooling weights (b, T) or None -> calibrated logits (b, C), and the certainty (b,) of the
# learning-to-exit head, if there is one.
OffRamp = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def _off_ramp(highway, temperature, learn_to_exit, hidden_states, pooling_weights):
    logits, pooled = highway(hidden_states, pooling_weights)
    if temperature is not None:
        logits = logits / temperature
    return logits, None if learn_to_exit is None else learn_to_exit(pooled)


class HighwayEncoder:
    """Mixin in front of an HF encoder class with a list of layers `self.layer`: adds the off-ramps.

    highway: those after layers 1 to N-1, as in the original. highway_embeddings: exit 0, None without one.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.exit_before_first_layer and config.highway_pooling == "first":
            raise ValueError(NEEDS_ALL_TOKENS)
        self.highway = nn.ModuleList(Highway(config) for _ in range(config.num_hidden_layers - 1))
        self.highway_embeddings = Highway(config) if config.exit_before_first_layer else None
        self.learn_to_exit = LearnToExit(config) if config_rule(config).learned else None

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold(s), in the config that the whole model shares. Raises ValueError."""
        set_threshold(self.config, value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    @property
    def highways(self) -> list[Highway]:
        """The modules of all off-ramps, (E-1,) in the order of the exits."""
        return list(self.highway) if self.highway_embeddings is None else [self.highway_embeddings, *self.highway]

    @property
    def blocks(self) -> list[Callable]:
        """What runs between each exit and the one before it, (E,): a layer, before exit 0 none."""
        return list(self.layer) if self.highway_embeddings is None else [unchanged, *self.layer]

    def init_highway_pooler(self, pooler: nn.Module) -> None:
        """Copies the backbone's pooler into every off-ramp's pooler: their initialisation in the original."""
        for highway in self.highways:
            if highway.pooler is not None:
                highway.pooler.load_state_dict(pooler.state_dict())

    def off_ramps(self) -> list[OffRamp]:
        """The off-ramps as functions, looked up once for a pass: a lookup takes as long as a small matrix product."""
        highways = self.highways
        temperatures = self.config.exit_temperatures or [None] * len(self.blocks)  # the last is the final classifier's
        return [
            partial(_off_ramp, highway, temperature, self.learn_to_exit)
            for highway, temperature in zip(highways, temperatures[: len(highways)], strict=True)
        ]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_loop: LayerLoop | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The backbone's own loop over the layers, or `layer_loop` in its place.

        position_ids serve packed sequences in HF's layers. A classifier has none, and they would not fit a batch that
        shrinks, so `layer_loop` does not get them.
        """
        if layer_loop is None:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **kwargs
            )
        layers = [partial(block, **kwargs) for block in self.blocks]
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=layer_loop(layers, hidden_states, attention_mask)
        )


class HighwayModel(OwnInit):
    """Mixin in front of an HF encoder-only model: replaces its encoder by one with off-ramps."""

    encoder_class: type

    def __init__(self, config, add_pooling_layer: bool = True):
        add_highway_fields(config, self.config_class)
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.encoder = self.encoder_class(config)
        self.post_init()

    def init_highway_pooler(self) -> None:
        """Starts every off-ramp's pooler as a copy of the model's pooler, as the original does before training."""
        self.encoder.init_highway_pooler(self.pooler)
