"""Early exit, independent of the backbone: the off-ramp, the exit rule, and the layer loop that all backbones share.

Shapes: B batch, T tokens, H hidden, N layers, C labels; b <= B is what is left of a batch when samples have exited.
An off-ramp ("highway" in the original's parameter names) sits behind every layer but the last. The last layer keeps the
model's own pooler and classifier.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

NO_EXIT = -1.0  # the default threshold: an entropy is never below it


@dataclass(kw_only=True)
class HighwayConfig:
    """The fields that early exit adds to a backbone's config. Checkpoints without them get these defaults, the paper's.

    early_exit_entropy: a sample exits at the first off-ramp whose entropy (nats) is below it. One number, or one
        per layer (N-1 off-ramps; an N-th value is allowed and has no meaning). <= 0: nothing exits early.
    highway_pooling: what an off-ramp reads, a key of POOLINGS.
    """

    early_exit_entropy: float | list[float] = NO_EXIT
    highway_pooling: str = "first"


def first_token(hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
    """The paper's choice: (B, T, H) -> (B, H), the first token's state."""
    return hidden_states[:, 0]


def mean_of_tokens(hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
    """(B, T, H) -> (B, H), the mean over the tokens that are not padding; over all where token_weights is None."""
    if token_weights is None:
        return hidden_states.mean(dim=1)
    return torch.bmm(token_weights.to(hidden_states.dtype).unsqueeze(1), hidden_states).squeeze(1)


def weigh_tokens(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) mask -> (B, T) weights of a mean over the tokens: 0 for padding, rows that add up to 1."""
    weights = (attention_mask != 0).to(dtype)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


# What an off-ramp can read. Shared by all off-ramps of a pass, weigh_tokens is computed once for them.
POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"first": first_token, "mean": mean_of_tokens}


class HighwayPooler(nn.Module):
    """BERT's pooler (dense + tanh) on what `config.highway_pooling` selects."""

    def __init__(self, config):
        super().__init__()
        if config.highway_pooling not in POOLINGS:
            raise ValueError(f"highway_pooling is {config.highway_pooling!r}; choose one of {', '.join(POOLINGS)}")
        self.pool = POOLINGS[config.highway_pooling]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None = None) -> Tensor:
        return torch.tanh(self.dense(self.pool(hidden_states, token_weights)))  # (B, H)


class Highway(nn.Module):
    """One off-ramp: pooler, dropout, linear classifier. (B, T, H) -> logits (B, C). Paper, section 3.1."""

    def __init__(self, config):
        super().__init__()
        self.pooler = HighwayPooler(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None = None) -> Tensor:
        return self.classifier(self.dropout(self.pooler(hidden_states, token_weights)))


def classifier_dropout(config) -> float:
    """The dropout before a classifier, as HF's classification heads choose it."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (..., C) -> (...), in float32 or better.

    Finite for any finite logits (the original's exp overflows) and for logits of -inf; NaN logits give NaN.
    """
    p = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(p).sum(dim=-1)  # entr(p) is -p ln p, and 0 at p = 0


def should_exit(logits: Tensor, threshold: float | Tensor) -> Tensor:
    """The exit rule: whether samples with these off-ramp logits (..., C) leave, (...) bool. NaN entropy: never."""
    return entropy(logits) < threshold


def first_exits(all_logits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit layer (B,), 1-based, of each sample, from the logits (B, N, C) of all exits and N-1 thresholds."""
    thresholds = torch.tensor(thresholds, dtype=torch.float32, device=all_logits.device)
    leaves = should_exit(all_logits[:, :-1], thresholds)  # (B, N-1)
    leaves = torch.cat([leaves, leaves.new_ones(len(leaves), 1)], dim=1)  # whoever is left answers after layer N
    return leaves.int().argmax(dim=1) + 1  # argmax gives the first of equals


def as_thresholds(value: float | Sequence[float], num_layers: int, num_labels: int) -> list[float]:
    """One threshold for each of the N-1 off-ramps, from one number or one per layer. Raises ValueError."""
    per_layer = [float(value)] * (num_layers - 1) if isinstance(value, Real) else [float(v) for v in value]
    if len(per_layer) not in (num_layers - 1, num_layers):
        raise ValueError(
            f"early_exit_entropy has {len(per_layer)} values; a model of {num_layers} layers takes one number, "
            f"or {num_layers - 1}: one for each off-ramp"
        )
    per_layer = per_layer[: num_layers - 1]
    if any(math.isnan(v) for v in per_layer):
        raise ValueError("early_exit_entropy is NaN; give a number of nats")
    if num_labels == 1 and any(v > 0 for v in per_layer):
        raise ValueError(
            "early_exit_entropy needs at least two labels: with one (regression) every entropy is 0 "
            "and every sample would exit at layer 1. Use -1"
        )
    return per_layer


@dataclass
class HighwayPass:
    """One pass through the layers: what it asks of the off-ramps, who is still in, and what was answered.

    A full pass asks every off-ramp about every sample. An early-exit pass asks those whose threshold is above 0, and
    samples that exit leave the batch.
    """

    thresholds: list[float]  # (N-1,)
    token_weights: Tensor | None = None  # (b, T) for the off-ramps' pooling; None: no padding
    full: bool = False
    grad: bool = False  # whether the off-ramps are to be trained
    lengths: Tensor | None = None  # (b,) on the CPU: position of the last token + 1, so that no layer waits for it
    rows: Tensor | None = None  # (b,) positions in the original batch; None: nobody has left
    answers: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)  # (layer, logits, rows)

    def asks(self, layer: int) -> bool:
        """Whether there is an off-ramp behind this layer (0-based) to be consulted."""
        return layer < len(self.thresholds) and (self.full or self.thresholds[layer] > 0)

    def leave(self, layer: int, logits: Tensor) -> Tensor | None:
        """Takes the off-ramp's logits (b, C) behind a layer. Returns the rows that stay, None where all do."""
        if self.full:
            self.answers.append((layer, logits, None))
            return None
        if self.thresholds[layer] == math.inf:  # takes everybody, NaN too
            count = len(logits)
        else:
            leaves = should_exit(logits, self.thresholds[layer]).cpu()  # the one device synchronisation of a layer
            count = int(leaves.count_nonzero())
        if count == 0:
            return None
        if count == len(logits):
            self.answers.append((layer, logits, self.rows))
            return logits.new_empty(0, dtype=torch.long)
        if self.rows is None:
            self.rows = torch.arange(len(logits), device=logits.device)
        gone, stay = (rows.nonzero().squeeze(1).to(logits.device) for rows in (leaves, ~leaves))
        self.answers.append((layer, logits[gone], self.rows[gone]))
        self.rows = self.rows[stay]
        return stay

    def shrink(self, stay: Tensor, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keeps the rows `stay`, and the padding down to the longest of them, of hidden states and attention mask."""
        length = hidden_states.shape[1]
        if self.lengths is not None:
            self.lengths = self.lengths[stay.cpu()]
            length = int(self.lengths.max())
        if self.token_weights is not None:
            self.token_weights = self.token_weights[stay, :length]
        if mask is not None:  # (b, T) for flash attention, (b, 1, T, T) for sdpa and eager
            mask = mask[stay]
            mask = mask[:, :length] if mask.dim() == 2 else mask[..., :length, :length]
        return hidden_states[stay, :length], mask

    def collect(self, final_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and exit layers (B,), 1-based, in input order, once the rest (b, C) has its final logits."""
        parts = [(layer + 1, logits, rows) for layer, logits, rows in self.answers]
        if len(final_logits):
            parts.append((len(self.thresholds) + 1, final_logits, self.rows))
        layers = torch.cat([torch.full((len(logits),), layer) for layer, logits, _ in parts]).to(final_logits.device)
        logits = torch.cat([logits for _, logits, _ in parts])
        if len(parts) == 1:
            return logits, layers
        order = torch.cat([rows for _, _, rows in parts]).argsort()
        return logits[order], layers[order]


class HighwayEncoder:
    """Mixin in front of an HF encoder class with a list of layers `self.layer`: adds the off-ramps and the exits."""

    def __init__(self, config):
        super().__init__(config)
        self.highway = nn.ModuleList(Highway(config) for _ in range(config.num_hidden_layers - 1))

    def set_early_exit_entropy(self, value: float | Sequence[float]) -> None:
        """Sets the threshold(s), in the config shared by the whole model. Raises ValueError (see `as_thresholds`)."""
        as_thresholds(value, self.config.num_hidden_layers, self.config.num_labels)
        self.config.early_exit_entropy = float(value) if isinstance(value, Real) else [float(v) for v in value]

    def init_highway_pooler(self, pooler: nn.Module) -> None:
        """Copies the backbone's pooler into every off-ramp's, their initialisation in the original."""
        for highway in self.highway:
            highway.pooler.load_state_dict(pooler.state_dict())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        highway_pass: HighwayPass | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layer loop. `last_hidden_state` (b, T, H) holds the samples that no off-ramp took.

        Without a `highway_pass` it is the backbone's own loop. position_ids serve packed sequences in HF's layers. A
        classifier has none, and they would not fit a batch that shrinks: they end in the embeddings.
        """
        if highway_pass is None:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **kwargs
            )
        for i, layer in enumerate(self.layer):
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            if not highway_pass.asks(i):
                continue
            with torch.set_grad_enabled(highway_pass.grad):
                logits = self.highway[i](hidden_states, highway_pass.token_weights)
            stay = highway_pass.leave(i, logits)
            if stay is None:
                continue
            if len(stay) == 0:
                hidden_states = hidden_states[:0]
                break
            hidden_states, attention_mask = highway_pass.shrink(stay, hidden_states, attention_mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)
