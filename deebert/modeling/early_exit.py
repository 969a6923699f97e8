"""Early exit, on one page: samples come in, layers run, some samples exit, the rest goes on.

    exits_now        the decision     is this sample certain enough? (first_exit_layer: for all layers at once)
    ActiveBatch      the compaction   the samples still in the network, padded no longer than the longest of them
    ExitedSamples    the gathering    logits and exit layers, given back in input order
    run_with_exits   the loop         that uses all three

This file knows neither BERT nor off-ramps. Read on in exit_rules.py (uncertainties), off_ramps.py (logits), then
classifier.py (how the loop gets into the model). The runtimes in deebert/runtime use the same decision, compaction and
gathering; the ONNX graph has to repeat the decision as operators of its own.

An exit is an off-ramp or, at the end, the final classifier. Exits are counted by i, from 0. The layer of exit i is
`config.exit_layers[i]`: layers are counted from 1, and layer 0 is the exit before the first layer.

Shapes: B samples came in, b of them are still active; T tokens, H hidden, N layers, E exits, C labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deebert.modeling.exit_rules import ExitRule


def exits_now(uncertainty, cutoff):
    """THE decision: does a sample exit here? Elementwise, for floats, numpy arrays and tensors.

    A cut-off of infinity lets every sample exit, also one whose uncertainty is NaN.
    """
    return (uncertainty < cutoff) | (cutoff == math.inf)


def first_exit_layer(uncertainties: Tensor, cutoffs: Sequence[float], first: int = 1) -> Tensor:
    """The exit layer (B,) of each sample, from its uncertainties (B, E-1) at all off-ramps.

    first: the layer of the first off-ramp.
    """
    exits = exits_now(uncertainties, torch.tensor(cutoffs, device=uncertainties.device))
    exits = torch.cat([exits, exits.new_ones(len(exits), 1)], dim=1)  # after layer N every sample exits
    return exits.int().argmax(dim=1) + first  # argmax gives the first of equals


@dataclass
class ActiveBatch:
    """The samples that are still in the network. Fields are tensors or, in the CUDA runtime, numpy arrays."""

    index: Tensor | np.ndarray  # (b,) position of each sample in the input; on the CPU
    lengths: Tensor | np.ndarray | None = None  # (b,) position of the last token + 1; on the CPU: needs no GPU wait
    hidden_states: Tensor | np.ndarray | None = None  # (b, T, H); an array from ONNX Runtime
    attention_mask: Tensor | None = None  # as the layers take it: (b, T), (b, 1, 1, T) or (b, 1, T, T)
    pooling_weights: Tensor | None = None  # (b, T) for the off-ramps' pooling; None: there is no padding
    rule_state: Tensor | None = None  # (b, ...) of a stateful exit rule
    cutoffs: Tensor | None = None  # (b, E-1) of each sample, on the CPU, where samples have their own

    def __len__(self) -> int:
        return len(self.index)

    @property
    def longest(self) -> int | None:
        """The number of tokens that the batch needs, at least 1 (a row may be padding only). None: keep all."""
        return None if self.lengths is None or len(self) == 0 else max(1, int(self.lengths.max()))

    def keep(self, staying: Tensor | np.ndarray) -> None:
        """THE compaction: keeps the samples `staying`, (b,) bool on the CPU, and the tokens up to the longest one."""
        self.index = self.index[staying]
        self.lengths = None if self.lengths is None else self.lengths[staying]
        self.cutoffs = None if self.cutoffs is None else self.cutoffs[staying]
        if self.hidden_states is None:  # the tensors are elsewhere, as in the CUDA runtime
            return
        rows, tokens = staying.nonzero().squeeze(1), slice(self.longest)
        if isinstance(self.hidden_states, np.ndarray):
            self.hidden_states = self.hidden_states[rows.numpy(), tokens]
        else:
            rows = rows.to(self.hidden_states.device)
            self.hidden_states = self.hidden_states[rows, tokens]
        if self.rule_state is not None:
            self.rule_state = self.rule_state[rows]
        if self.pooling_weights is not None:
            self.pooling_weights = self.pooling_weights[rows, tokens]
        if self.attention_mask is not None:
            mask = self.attention_mask[rows]
            self.attention_mask = mask[:, tokens] if mask.dim() == 2 else mask[..., tokens, tokens]


@dataclass
class ExitedSamples:
    """THE gathering: with which logits each sample exited, and where."""

    index: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    layers: list[Tensor] = field(default_factory=list)

    def add(self, index: Tensor, logits: Tensor, layer: int) -> None:
        """The samples at these input positions (b,) exit after this layer with these logits (b, C)."""
        self.index.append(index)
        self.logits.append(logits)
        self.layers.append(torch.full_like(index, layer))

    def in_input_order(self) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and exit layers (B,), once all samples have exited."""
        if len(self.index) == 1:  # all samples exited together, and a batch keeps their order
            return self.logits[0], self.layers[0].to(self.logits[0].device)
        logits, layers = torch.cat(self.logits), torch.cat(self.layers)
        order = torch.cat(self.index).argsort()
        return logits[order], layers[order].to(logits.device)


def let_exit(
    batch: ActiveBatch, exited: ExitedSamples, layer: int, logits: Tensor, uncertainty: Tensor | float, cutoff: float
) -> None:
    """Moves the samples that exit after this layer out of the batch, with their logits (b, C).

    uncertainty: (b,), or a number for a single sample.
    """
    alone = isinstance(uncertainty, float)
    exiting = exits_now(uncertainty if alone else uncertainty.cpu(), cutoff)  # waits for the device, once
    count = int(exiting if alone else exiting.count_nonzero())
    if count == len(batch):
        exited.add(batch.index, logits, layer)
        batch.index = batch.index[:0]
    elif count > 0:
        exited.add(batch.index[exiting], logits[exiting], layer)
        batch.keep(~exiting)


def run_with_exits(
    layers: Sequence[Callable[[Tensor, Tensor | None], Tensor]],
    off_ramps: Sequence[Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]],
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
