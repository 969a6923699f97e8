"""Early exit, on one page: samples come in, layers run, some samples exit, the rest goes on.

    exits_now        the decision     is this sample certain enough? (first_exit_layer: for all layers at once)
    ActiveBatch      the compaction   the samples still in the network, padded no longer than the longest of them
    ExitedSamples    the gathering    logits and exit layers, given back in input order
    run_with_exits   the loop         that uses all three

This file knows neither BERT nor off-ramps. Read on in exit_rules.py (uncertainties), off_ramps.py (logits), then
classifier.py (how the loop gets into the model). The runtimes in deebert/runtime use the same decision, compaction and
gathering; the ONNX graph has to repeat the decision as operators of its own. Layers compute with tensors or, in ONNX
Runtime, with numpy arrays. The positions of the samples are always numpy arrays.

An exit is an off-ramp or, at the end, the final classifier. Exits are counted by i, from 0. The layer of exit i is
`config.exit_layers[i]`: layers are counted from 1, and layer 0 is the exit before the first layer.

Shapes: B samples came in, b of them are still active; T tokens, H hidden, N layers, E exits, C labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deebert.modeling.exit_rules import ExitRule
from deebert.utils.arrays import Array, functions_of, like, to_numpy, without_gradient


def exits_now(uncertainty, cutoff):
    """THE decision: does a sample exit here? Elementwise, for floats, numpy arrays and tensors.

    A cut-off of infinity lets every sample exit, also one whose uncertainty is NaN.
    """
    return (uncertainty < cutoff) | (cutoff == math.inf)


def cutoff_array(cutoffs: float | Sequence[float] | np.ndarray, compared: Array | None = None) -> np.ndarray:
    """Cut-offs in the precision of the uncertainties that they are compared with, else in float32.

    Values that are too large for this type become infinite.
    """
    precise = compared is not None and compared.dtype.itemsize == 8
    with np.errstate(over="ignore"):
        return np.asarray(cutoffs, np.float64 if precise else np.float32)


def first_exit_layer(uncertainties: Array, cutoffs: Sequence[float], first: int = 1) -> Array:
    """The exit layer (B,) of each sample, from its uncertainties (B, E-1) at all off-ramps.

    first: the layer of the first off-ramp.
    """
    exits = exits_now(uncertainties, like(cutoff_array(cutoffs, uncertainties), uncertainties))
    return (~exits).cumprod(axis=1).sum(axis=1) + first  # as many off-ramps as come before the first exit


@dataclass
class ActiveBatch:
    """The samples that are still in the network. Index, lengths and cut-offs are numpy's, on the host."""

    index: np.ndarray  # (b,) position of each sample in the input
    lengths: np.ndarray | None = None  # (b,) position of the last token + 1
    hidden_states: Array | None = None  # (b, T, H)
    attention_mask: Array | None = None  # as the layers take it: (b, T), (b, 1, 1, T) or (b, 1, T, T)
    pooling_weights: Array | None = None  # (b, T) for the off-ramps' pooling; None: there is no padding
    rule_state: Array | None = None  # (b, ...) of a stateful exit rule
    cutoffs: np.ndarray | None = None  # (b, E-1) of each sample, where samples have their own

    def __len__(self) -> int:
        return len(self.index)

    @property
    def longest(self) -> int | None:
        """The number of tokens that the batch needs, at least 1 (a row may be padding only). None: keep all."""
        return None if self.lengths is None or len(self) == 0 else max(1, int(self.lengths.max()))

    def keep(self, staying: np.ndarray) -> None:
        """THE compaction: keeps the samples `staying`, (b,) bool, and the tokens up to the longest one."""
        self.index = self.index[staying]
        self.lengths = None if self.lengths is None else self.lengths[staying]
        self.cutoffs = None if self.cutoffs is None else self.cutoffs[staying]
        if self.hidden_states is None:  # the tensors are elsewhere, as in the CUDA runtime
            return
        rows, tokens = like(np.flatnonzero(staying), self.hidden_states), slice(self.longest)
        self.hidden_states = self.hidden_states[rows, tokens]
        if self.rule_state is not None:
            self.rule_state = self.rule_state[rows]
        if self.pooling_weights is not None:
            self.pooling_weights = self.pooling_weights[rows, tokens]
        if self.attention_mask is not None:
            mask = self.attention_mask[rows]
            self.attention_mask = mask[:, tokens] if mask.ndim == 2 else mask[..., tokens, tokens]


def token_lengths(attention_mask: Array | None) -> np.ndarray | None:
    """(B, T) mask -> (B,): the position of each sample's last token + 1. None for other masks."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return (to_numpy(attention_mask != 0) * np.arange(1, attention_mask.shape[1] + 1)).max(axis=1)


@dataclass
class ExitedSamples:
    """THE gathering: with which logits each sample exited, and where."""

    index: list[np.ndarray] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    layers: list[np.ndarray] = field(default_factory=list)

    def add(self, index: np.ndarray, logits: Array, layer: int) -> None:
        """The samples at these input positions (b,) exit after this layer with these logits (b, C)."""
        self.index.append(index)
        self.logits.append(logits)
        self.layers.append(np.full_like(index, layer))

    def in_input_order(self) -> tuple[Array, Array]:
        """Logits (B, C) and exit layers (B,), once all samples have exited."""
        if len(self.index) == 1:  # all samples exited together, and a batch keeps their order
            return self.logits[0], like(self.layers[0], self.logits[0])
        logits, layers = functions_of(self.logits[0]).concatenate(self.logits), np.concatenate(self.layers)
        order = np.concatenate(self.index).argsort()
        return logits[like(order, logits)], like(layers[order], logits)


@dataclass
class ExitOutput:
    """What early exit gives for a batch.

    logits: (B, C) of each sample's exit.
    exit_layer: (B,) the layer, from 1, at which each sample exited; 0: before the first layer.
    entropy: (B,) of `logits`, in nats; where a sample may have several labels, the largest binary entropy of a label.
    all_logits: (B, E, C) of every exit, the final classifier last; only if requested.
    all_certainties: (B, E-1) of the learning-to-exit head, with all_logits, where the model has one.
    """

    logits: Array | None = None
    exit_layer: Array | None = None
    entropy: Array | None = None
    all_logits: Array | None = None
    all_certainties: Array | None = None


def output_of_all_exits(
    exits: Sequence[tuple[Array, Array | None]], rule: ExitRule, cutoffs: Sequence[float], exit_layers: range
) -> ExitOutput:
    """What follows from every exit: where each sample would exit, and with which logits.

    exits: of each, logits (B, C) and, but for the last, the certainty (B,) of a learning-to-exit head or None.
    exit_layers: the layer of each exit.
    """
    xp = functions_of(exits[0][0])
    all_logits = xp.stack([logits for logits, _ in exits], axis=1)
    certainties = [certainty for _, certainty in exits[:-1] if certainty is not None]
    all_certainties = xp.stack(certainties, axis=1) if certainties else None
    uncertainties = without_gradient(rule.uncertainties(without_gradient(all_logits), all_certainties))
    exit_layer = first_exit_layer(uncertainties, cutoffs, exit_layers[0])
    logits = all_logits[like(np.arange(len(all_logits)), all_logits), exit_layer - exit_layers[0]]
    return ExitOutput(logits, exit_layer, all_logits=all_logits, all_certainties=all_certainties)


def let_exit(
    batch: ActiveBatch,
    exited: ExitedSamples,
    layer: int,
    logits: Array,
    uncertainty: Array | float,
    cutoff: float | np.ndarray,
) -> None:
    """Moves the samples that exit after this layer out of the batch, with their logits (b, C).

    uncertainty: (b,), or a number for a single sample. cutoff: of all, or (b,) of each.
    """
    if isinstance(uncertainty, float):
        exiting = np.array([exits_now(uncertainty, cutoff)])
    else:
        uncertainty = to_numpy(uncertainty)  # waits for the device, once
        exiting = exits_now(uncertainty, cutoff_array(cutoff, uncertainty))
    count = np.count_nonzero(exiting)
    if count == len(batch):
        exited.add(batch.index, logits, layer)
        batch.index = batch.index[:0]
    elif count > 0:
        exited.add(batch.index[exiting], logits[exiting], layer)
        batch.keep(~exiting)


def run_with_exits(
    layers: Sequence[Callable[[Array, Array | None], Array]],
    off_ramps: Sequence[Callable[[Array, Array | None], tuple[Array, Array | None]]],
    batch: ActiveBatch,
    exited: ExitedSamples,
    rule: ExitRule,
    cutoffs: Sequence[float],
    exit_layers: Sequence[int],
) -> None:
    """THE loop: runs the layers until all samples have exited, or there are no more layers.

    The samples that are left in `batch` are the caller's: it adds them to `exited` with the final classifier's logits.

    layers: what runs before each exit (see `HighwayEncoder.blocks`), (hidden states, attention mask) -> hidden states.
    off_ramps: (E-1,) (hidden states, pooling weights) -> logits (b, C) and the certainty (b,) of a learning-to-exit
    head, or None. cutoffs: (E-1,) of the off-ramps. exit_layers: (E,) the layer of each exit.
    """
    for i, layer in enumerate(layers):
        batch.hidden_states = layer(batch.hidden_states, batch.attention_mask)
        if not rule.consults(cutoffs, i):
            continue
        logits, certainty = off_ramps[i](batch.hidden_states, batch.pooling_weights)
        uncertainty_of = rule.uncertainty_alone if len(batch) == 1 else rule.uncertainty  # faster for a single sample
        uncertainty, batch.rule_state = uncertainty_of(logits, certainty, batch.rule_state)
        let_exit(batch, exited, exit_layers[i], logits, uncertainty, cutoffs[i])
        if len(batch) == 0:
            break
