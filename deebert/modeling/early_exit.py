"""Early exit, independent of the backbone: the off-ramp, the pass through the layers, and the loop all backbones share.

Shapes: B batch, T tokens, H hidden, N layers, C labels; b <= B is what is left of a batch when samples have exited.
An off-ramp ("highway" in the original's parameter names) sits behind every layer but the last. The last layer keeps the
model's own pooler and classifier. exit_rules.py says when a sample leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deebert.modeling.exit_rules import NO_EXIT, ExitRule, first_exit_layer, make_rule, plain_threshold

ALIASES = {"early_exit_entropy": "exit_threshold"}  # the original's name for it, and that of version 0.5


@dataclass(kw_only=True)
class HighwayConfig:
    """The fields that early exit adds to a backbone's config. Checkpoints without them get these defaults, the paper's.

    exit_threshold: the threshold; a sample exits at the first off-ramp whose uncertainty (entropy in nats, unless
        exit_rule says otherwise) is below it. One number, or one per layer (N-1 off-ramps; an N-th value is allowed
        and has no meaning). <= 0: nothing exits early.
    exit_rule: what the uncertainty is, a key of exit_rules.EXIT_RULES.
    patience_tolerance: how far answers of a regression model may differ and agree, for the rule patience.
    exit_temperatures: N numbers, the last the final classifier's; an exit's logits are divided by its own. None: by 1.
    highway_pooling: what an off-ramp reads, a key of POOLINGS.
    train_strategy, distill, distill_temperature: how the model was trained (see objectives.py).
    """

    exit_threshold: float | list[float] = NO_EXIT
    exit_rule: str = "entropy"
    patience_tolerance: float = 0.5
    exit_temperatures: list[float] | None = None
    highway_pooling: str = "first"
    train_strategy: str = "two_stage"
    distill: float = 0.0
    distill_temperature: float = 2.0


def config_rule(config) -> ExitRule:
    """The exit rule of a config. Raises ValueError for an unknown one."""
    return make_rule(config.exit_rule, config.num_labels, config.patience_tolerance)


def set_threshold(config, value: float | Sequence[float]) -> None:
    """Stores a threshold, or one per layer, in a config. Raises ValueError (see `ExitRule.cutoffs`)."""
    config_rule(config).cutoffs(value, config.num_hidden_layers)
    config.exit_threshold = plain_threshold(value)


def set_rule(config, name: str, threshold: float | Sequence[float], has_head: bool) -> None:
    """Stores rule and threshold in a config of a model with or without a learning-to-exit head. Raises ValueError."""
    rule = make_rule(name, config.num_labels, config.patience_tolerance)
    rule.cutoffs(threshold, config.num_hidden_layers)
    rule.check_head(has_head)
    config.exit_rule, config.exit_threshold = name, plain_threshold(threshold)


class Pooling(nn.Module):
    """(B, T, H) and the result of pooling_weights_of -> (B, H): what an off-ramp reads. Made of the config."""

    def __init__(self, config):
        super().__init__()


class FirstToken(Pooling):
    """The paper's choice: the first token's state."""

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
        return hidden_states[:, 0]


class MeanOfTokens(Pooling):
    """The mean over the tokens that are not padding; over all where token_weights is None."""

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
        if token_weights is None:
            return hidden_states.mean(dim=1)
        return torch.bmm(token_weights.to(hidden_states.dtype).unsqueeze(1), hidden_states).squeeze(1)


class AttentionOverTokens(Pooling):
    """A mean weighted by how well tokens match a learned query. It starts as the plain mean."""

    def __init__(self, config):
        super().__init__(config)
        self.query = nn.Parameter(torch.zeros(config.hidden_size))

    def init_parameters(self) -> None:
        initialization.zeros_(self.query)

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
        match = hidden_states @ self.query / math.sqrt(len(self.query))  # (B, T)
        if token_weights is not None:
            match = match.masked_fill(token_weights == 0, torch.finfo(match.dtype).min)
        weights = torch.softmax(match, dim=1, dtype=torch.float32).to(hidden_states.dtype)
        return torch.bmm(weights.unsqueeze(1), hidden_states).squeeze(1)


POOLINGS = {"first": FirstToken, "mean": MeanOfTokens, "attention": AttentionOverTokens}


def pooling_weights_of(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) mask -> (B, T) weights of a mean over the tokens: 0 for padding, rows that add up to 1.

    Computed once for all off-ramps of a pass.
    """
    weights = (attention_mask != 0).to(dtype)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


class HighwayPooler(nn.Module):
    """BERT's pooler, dense + tanh: (B, H) -> (B, H)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, read: Tensor) -> Tensor:
        return torch.tanh(self.dense(read))


class Highway(nn.Module):
    """One off-ramp: what `config.highway_pooling` selects, pooler, dropout, linear classifier. Paper, section 3.1."""

    def __init__(self, config):
        super().__init__()
        if config.highway_pooling not in POOLINGS:
            raise ValueError(f"highway_pooling is {config.highway_pooling!r}; choose one of {', '.join(POOLINGS)}")
        self.pool = POOLINGS[config.highway_pooling](config)
        self.pooler = HighwayPooler(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, H) -> logits (B, C), and what they were read from (B, H)."""
        read = self.pool(hidden_states, token_weights)
        return self.answer(read), read

    def answer(self, read: Tensor) -> Tensor:
        """(B, H) -> logits (B, C)."""
        return self.classifier(self.dropout(self.pooler(read)))


class LearnToExit(nn.Linear):
    """BERxiT's learning-to-exit head, one for all layers: what an off-ramp reads (B, H) -> its certainty (B,), 0 to 1.

    Xin et al., EACL 2021, section 3.3; trained by `objectives.certainty_losses`. It starts at a certainty of 1/2.
    """

    def __init__(self, config):
        super().__init__(config.hidden_size, 1)

    def init_parameters(self) -> None:
        initialization.zeros_(self.weight)
        initialization.zeros_(self.bias)

    def forward(self, read: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(read).squeeze(-1).float())


def classifier_dropout(config) -> float:
    """The dropout before a classifier, as HF's classification heads choose it."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


@dataclass
class HighwayPass:
    """One pass through the layers: what it asks of the off-ramps, who is still in, and what was answered.

    A full pass asks every off-ramp about every sample. An early-exit pass asks those whose limit is above 0 (all, where
    the rule stateful), and samples that exit leave the batch.
    """

    rule: ExitRule
    cutoffs: list[float]  # (N-1,) uncertainties below which samples leave
    token_weights: Tensor | None = None  # (b, T) for the off-ramps' pooling; None: no padding
    full: bool = False
    grad: bool = False  # whether the off-ramps are to be trained
    whole: bool = True  # whether anybody reads more than the first token behind the last layer
    lengths: Tensor | None = None  # (b,) on the CPU: position of the last token + 1, so that no layer waits for it
    rows: Tensor | None = None  # (b,) positions in the original batch; None: nobody has left
    memory: Tensor | None = None  # (b, ...) of the rule
    answers: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)  # (layer, logits, rows)
    certainties: list[Tensor] = field(default_factory=list)  # (B,) of each off-ramp, in a full pass with a head for it

    def asks(self, layer: int) -> bool:
        """Whether there is an off-ramp behind this layer (0-based) to be consulted."""
        if layer >= len(self.cutoffs):
            return False
        if self.rule.stateful and any(0 < limit < math.inf for limit in self.cutoffs[layer:]):
            return True
        return self.full or self.cutoffs[layer] > 0

    def leave(
        self, layer: int, logits: Tensor, certainty: Tensor | None = None, uncertainty: Tensor | None = None
    ) -> Tensor | None:
        """Takes an off-ramp's logits (b, C), certainty (b,) and, where it is known, the rule's uncertainty (b,).

        Returns the rows that stay, None where all do.
        """
        if self.full:
            self.answers.append((layer, logits, None))
            if certainty is not None:
                self.certainties.append(certainty)
            return None
        if self.cutoffs[layer] == math.inf:  # takes everybody, NaN too
            count = len(logits)
        else:
            if uncertainty is None:
                uncertainty, self.memory = self.rule.uncertainty(logits, certainty, self.memory)
            leaves = (uncertainty < self.cutoffs[layer]).cpu()  # the one device synchronisation of a layer
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
        if self.memory is not None:
            self.memory = self.memory[stay]
        if mask is not None:  # (b, T) for flash attention, (b, 1, T, T) for sdpa and eager
            mask = mask[stay]
            mask = mask[:, :length] if mask.dim() == 2 else mask[..., :length, :length]
        return hidden_states[stay, :length], mask

    def exit(
        self,
        layer: int,
        logits: Tensor,
        certainty: Tensor | None,
        hidden_states: Tensor,
        mask: Tensor | None,
        uncertainty: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and mask of those that go on behind this layer; no rows where all have left. See `leave`."""
        stay = self.leave(layer, logits, certainty, uncertainty)
        if stay is None:
            return hidden_states, mask
        if len(stay) == 0:
            return hidden_states[:0], mask
        return self.shrink(stay, hidden_states, mask)

    def collect_all(self, final_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of a full pass: logits (B, C), exit layers (B,), the logits of all exits (B, N, C), certainties (B, N-1)."""
        all_logits = torch.stack([answer for _, answer, _ in self.answers] + [final_logits], dim=1)
        certainties = torch.stack(self.certainties, dim=1) if self.certainties else None
        with torch.no_grad():
            layers = first_exit_layer(self.rule.uncertainties(all_logits, certainties), self.cutoffs)
        rows = torch.arange(len(layers), device=layers.device)
        return all_logits[rows, layers - 1], layers, all_logits, certainties

    def collect(self, final_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and exit layers (B,), 1-based, in input order, once the rest (b, C) has its final logits."""
        parts = [(layer + 1, logits, rows) for layer, logits, rows in self.answers]
        if len(final_logits):
            parts.append((len(self.cutoffs) + 1, final_logits, self.rows))
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
        self.learn_to_exit = LearnToExit(config) if config_rule(config).learned else None

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold(s), in the config shared by the whole model. Raises ValueError."""
        set_threshold(self.config, value)

    def init_highway_pooler(self, pooler: nn.Module) -> None:
        """Copies the backbone's pooler into every off-ramp's, their initialisation in the original."""
        for highway in self.highway:
            highway.pooler.load_state_dict(pooler.state_dict())

    def exit_answer(self, i: int, hidden_states: Tensor, token_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Off-ramp i's logits (b, C), calibrated, and the learning-to-exit head's certainty (b,), if there is one."""
        logits, read = self.highway[i](hidden_states, token_weights)
        if self.config.exit_temperatures is not None:
            logits = logits / self.config.exit_temperatures[i]
        return logits, None if self.learn_to_exit is None else self.learn_to_exit(read)

    def last_layer(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """The last layer in evaluation: (b, T, H) -> (b, 1, H), the first token's state, the one that is classified.

        mask: as scaled_dot_product_attention takes it, (b, 1, 1 or T, T), or None. All tokens are looked
        at, but about four fifths of the layer's products are saved. Forward hooks of the layer as a whole, and of its
        attention, are not called.
        """
        layer = self.layer[-1]
        attention, first = layer.attention.self, hidden_states[:, :1]

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)

        read = nn.functional.scaled_dot_product_attention(
            heads(attention.query(first)),
            heads(attention.key(hidden_states)),
            heads(attention.value(hidden_states)),
            attn_mask=None if mask is None else mask[:, :, :1],
            scale=attention.scaling,
        )
        attended = layer.attention.output(read.transpose(1, 2).flatten(2), first)
        return layer.output(layer.intermediate(attended), attended)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        highway_pass: HighwayPass | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layer loop. `last_hidden_state` holds the samples that no off-ramp took: (b, T, H), (b, 1, H) of a pass
        that is not whole.

        Without a `highway_pass` it is the backbone's own loop. position_ids serve packed sequences in HF's layers. A
        classifier has none, and they would not fit a batch that shrinks: they end in the embeddings.
        """
        if highway_pass is None:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **kwargs
            )
        for i, layer in enumerate(self.layer):
            if i == len(self.highway) and not highway_pass.whole:
                hidden_states = self.last_layer(hidden_states, attention_mask)
                break
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            if not highway_pass.asks(i):
                continue
            with torch.set_grad_enabled(highway_pass.grad):
                answer = self.exit_answer(i, hidden_states, highway_pass.token_weights)
            hidden_states, attention_mask = highway_pass.exit(i, *answer, hidden_states, attention_mask)
            if len(hidden_states) == 0:
                break
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)
