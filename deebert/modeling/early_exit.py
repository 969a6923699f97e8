"""Early exit, on one page: samples come in, layers run, some samples exit, the rest goes on.

    exits_now        the decision     is this sample certain enough?
    ActiveBatch      the compaction   the samples still in the network, padded no longer than the longest of them
    ExitedSamples    the gathering    logits and exit layers, given back in input order
    run_with_exits   the loop         that uses all three, on the state of one forward pass, an ExitRequest

Read on in exit_rules.py (uncertainties), off_ramps.py (logits), encoder.py (runs the loop) and classifier.py (makes the
request, reads the result). Arrays are tensors or numpy's, as in ONNX Runtime; positions in the input are numpy's.
An exit is an off-ramp or, at the end, the final classifier; i counts them from 0. Layers are counted from 1: layer 0 is
the exit before the first one. B samples came in, b are still active; T tokens, H hidden, E exits, C labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deebert.modeling.exit_rules import ExitRule
from deebert.utils.arrays import Array, functions_of, like, to_numpy


def exits_now(uncertainty: Array | float, cutoff: Array | float) -> Array | bool:
    """THE decision: does a sample exit here? Elementwise. At an infinite cut-off each does, also where it is NaN."""
    return (uncertainty < cutoff) | (cutoff == math.inf)


def first_exit_layer(uncertainties: Array, cutoffs: Sequence[float], first: int = 1) -> Array:
    """The exit layer (B,) of samples with these uncertainties (B, E-1). first: the layer of the first off-ramp."""
    exits = exits_now(uncertainties, like(np.asarray(cutoffs, np.float32), uncertainties))
    return (~exits).cumprod(axis=1).sum(axis=1) + first  # 1 until the first exit, then 0


def exits_of(all_logits: Array, rule: ExitRule, cutoffs: Sequence[float], exit_layers: range) -> tuple[Array, Array]:
    """From the logits (B, E, C) of all exits: the logits (B, C) and the layer (B,) at which each sample exits."""
    exit_layer = first_exit_layer(rule.uncertainties(all_logits), cutoffs, exit_layers[0])
    return all_logits[like(np.arange(len(all_logits)), all_logits), exit_layer - exit_layers[0]], exit_layer


@dataclass
class ActiveBatch:
    """The samples that are still in the network."""

    index: np.ndarray  # (b,) position of each sample in the input
    lengths: np.ndarray | None = None  # (b,) position of the last token + 1; None: no token is ever cut off
    hidden_states: Array | None = None  # (b, T, H); None before the first layer
    attention_mask: Array | None = None  # as the layers take it: (b, T), (b, 1, 1, T) or (b, 1, T, T)
    pooling_weights: Array | None = None  # (b, T) for the off-ramps' pooling; None: there is no padding
    rule_state: Array | None = None  # (b, ...) of a stateful exit rule

    def __len__(self) -> int:
        return len(self.index)

    @property
    def longest(self) -> int | None:
        """Tokens that the batch needs, at least 1 (a row may be padding only). None: all."""
        return None if self.lengths is None or len(self) == 0 else max(1, int(self.lengths.max()))

    def keep(self, staying: np.ndarray) -> None:
        """THE compaction: keeps the samples `staying`, (b,) bool, and the tokens up to the longest one."""
        self.index = self.index[staying]
        self.lengths = None if self.lengths is None else self.lengths[staying]
        rows, tokens = like(np.flatnonzero(staying), self.hidden_states), slice(self.longest)
        self.hidden_states = self.hidden_states[rows, tokens]
        self.rule_state = None if self.rule_state is None else self.rule_state[rows]
        self.pooling_weights = None if self.pooling_weights is None else self.pooling_weights[rows, tokens]
        if (mask := self.attention_mask) is not None:
            self.attention_mask = mask[rows, tokens] if mask.ndim == 2 else mask[rows][..., tokens, tokens]


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
class ExitRequest:
    """State of one forward pass: exit rule and cut-offs, the active samples, and the logits of those that exited."""

    batch: ActiveBatch
    rule: ExitRule
    cutoffs: Sequence[float]  # (E-1,) of the off-ramps
    exit_layers: range  # (E,) the layer of each exit
    first_token_only: bool = False  # compute only the first token in the last layer; nothing else is used afterwards
    train_off_ramps: bool = False  # with gradients for the off-ramps, also where the layers run without
    exited: ExitedSamples = field(default_factory=ExitedSamples)

    def consults(self, i: int) -> bool:
        """Whether off-ramp i runs."""
        return self.rule.consults(self.cutoffs, i)

    def let_exit(self, i: int, logits: Array) -> None:
        """The active samples that are certain enough exit with the logits (b, C) of off-ramp i."""
        batch, layer = self.batch, self.exit_layers[i]
        uncertainty, batch.rule_state = self.rule.uncertainty(logits, batch.rule_state)
        uncertainty = uncertainty.item() if len(batch) == 1 else to_numpy(uncertainty)  # waits for the device, once
        exiting = exits_now(uncertainty, self.cutoffs[i])
        count = np.count_nonzero(exiting)
        if count == len(batch):
            self.exited.add(batch.index, logits, layer)
            batch.index = batch.index[:0]
        elif count > 0:
            self.exited.add(batch.index[exiting], logits[exiting], layer)
            batch.keep(~exiting)


def run_with_exits(layers: Sequence[Callable], off_ramps: Sequence[Callable], request: ExitRequest) -> None:
    """THE loop: runs the layers until all samples have exited, or there are no more layers.

    layers: (E,) (hidden states, attention mask) -> hidden states. off_ramps: (E-1,) (hidden states, pooling weights) ->
    logits (b, C). Samples that are left in the batch exit with the final classifier's logits, which the caller adds.
    """
    batch = request.batch
    for i, layer in enumerate(layers):
        batch.hidden_states = layer(batch.hidden_states, batch.attention_mask)
        if request.consults(i):
            request.let_exit(i, off_ramps[i](batch.hidden_states, batch.pooling_weights))
        if not len(batch):
            break
