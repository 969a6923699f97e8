"""Continuous batching: samples still active in a batch that has emptied wait for others, so that deep layers run full.

The name is that of serving systems for language models. It works for PyTorch models and exported ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from deebert.modeling.config import config_cutoffs, has_several_labels
from deebert.modeling.early_exit import ActiveBatch, ExitedSamples, exits_now
from deebert.modeling.exit_rules import ExitRule, prediction_entropy
from deebert.runtime.exported import ExitOutput
from deebert.utils.arrays import Array, functions_of, to_numpy, token_lengths


class StreamedBatch(ActiveBatch):
    """Samples that may have cut-offs (b, E-1) of their own."""

    cutoffs: np.ndarray | None = None

    def keep(self, staying: np.ndarray) -> None:
        self.cutoffs = None if self.cutoffs is None else self.cutoffs[staying]
        super().keep(staying)


class LayerSteps(Protocol):
    """What continuous batching needs of a model: a `LayerRunner` of a PyTorch model, or an `OnnxDeeBert`."""

    def inputs(self, *given: Array | None) -> list[Array | None]:
        """Arrays (b, T) of integers, of numpy or PyTorch, as the runtime takes them; None stays None."""

    def step(
        self,
        i: int,
        inputs: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        consult: bool = True,
    ) -> tuple[Array, Array | None]:
        """Step i, from 0, and the exit after it.

        inputs: input_ids (b, T) for the first step, for others the hidden states (b, T, H) of the previous step.
        attention_mask: (b, T). token_type_ids: (b, T), of the first step only. consult: whether the exit runs too.

        Returns hidden states (b, T, H), after the last step perhaps (b, 1, H); logits (b, C). Without `consult`
        logits may be None.
        """


def joined(batches: Sequence[StreamedBatch]) -> StreamedBatch:
    """One batch of several that wait at the same layer, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    states, cutoffs = [batch.rule_state for batch in batches], [batch.cutoffs for batch in batches]
    batch = StreamedBatch(
        index=np.concatenate([batch.index for batch in batches]),
        lengths=np.concatenate([batch.lengths for batch in batches]),
        hidden_states=stacked([batch.hidden_states for batch in batches]),
        attention_mask=stacked([batch.attention_mask for batch in batches]),
        rule_state=None if states[0] is None else functions_of(states[0]).concatenate(states),
    )
    batch.cutoffs = None if cutoffs[0] is None else np.concatenate(cutoffs)
    return batch


def stacked(parts: Sequence[Array]) -> Array:
    """Arrays (b, T, ...) one after the other, with zeros up to the longest T."""
    shape = (sum(map(len, parts)), max(part.shape[1] for part in parts), *parts[0].shape[2:])
    room = np.zeros(shape, parts[0].dtype) if isinstance(parts[0], np.ndarray) else parts[0].new_zeros(shape)
    start = 0
    for part in parts:
        room[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return room


class ContinuousBatcher:
    """Runs batches through the layers. Where fewer than batch_size / 2 samples are active, they wait for others.

    cutoffs: (E-1,) of the off-ramps. exit_layers: (E,) the layer of each exit. exited: its `add` is called with the
    samples that exit. The default, an `ExitedSamples`, returns them in input order after `flush`; a server gives an
    object of its own.
    """

    def __init__(
        self,
        steps: LayerSteps,
        rule: ExitRule,
        cutoffs: Sequence[float],
        exit_layers: Sequence[int],
        batch_size: int,
        exited: ExitedSamples | None = None,
    ):
        self.steps, self.rule, self.cutoffs, self.batch_size = steps, rule, cutoffs, batch_size
        self.exit_layers = exit_layers
        self.waiting: list[list[StreamedBatch]] = [[] for _ in exit_layers]  # before each step
        self.exited = ExitedSamples() if exited is None else exited
        self.samples = 0

    def add(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        cutoffs: np.ndarray | None = None,
    ) -> None:
        """Runs a batch (b, T), b up to batch_size, and those that wait for it, until too few samples are active.

        cutoffs: (b, E-1) of these samples in place of the batcher's; then all batches need them.
        """
        index = np.arange(self.samples, self.samples + len(input_ids))
        self.samples += len(input_ids)
        ids, mask, types = self.steps.inputs(input_ids, attention_mask, token_type_ids)
        batch = StreamedBatch(index, token_lengths(mask), ids, mask)
        batch.cutoffs = cutoffs
        self._run(batch, 0, types)

    def flush(self) -> None:
        """Runs all that wait to the end."""
        for i, batches in enumerate(self.waiting):
            if batches:
                self._run(self._with_waiting(None, i), i, flushing=True)

    def _run(self, batch: StreamedBatch, i: int, token_type_ids: Array | None = None, flushing: bool = False) -> None:
        while len(batch):
            waiting = sum(map(len, self.waiting[i]))
            if i > 0 and not flushing and len(batch) + waiting < self.batch_size / 2:
                self.waiting[i].append(batch)
                return
            batch = self._with_waiting(batch, i)
            self._step(batch, i, token_type_ids)
            i += 1

    def _with_waiting(self, batch: StreamedBatch | None, i: int) -> StreamedBatch:
        batches = [*self.waiting[i], *([] if batch is None else [batch])]
        self.waiting[i].clear()
        return joined(batches)

    def _step(self, batch: StreamedBatch, i: int, token_type_ids: Array | None) -> None:
        """Step i, from 0, and the exit after it, unless nothing can exit there."""
        last = i == len(self.cutoffs)
        consult = last or self._consults(batch, i)
        hidden, logits = self.steps.step(
            i, batch.hidden_states, batch.attention_mask, token_type_ids if i == 0 else None, consult
        )
        batch.hidden_states = hidden
        if last:
            self.exited.add(batch.index, logits, self.exit_layers[i])
            batch.index = batch.index[:0]
        elif consult:
            uncertainty, batch.rule_state = self.rule.uncertainty(logits, batch.rule_state)
            cutoff = self.cutoffs[i] if batch.cutoffs is None else batch.cutoffs[:, i]
            exiting = exits_now(to_numpy(uncertainty), cutoff)
            if exiting.any():
                self.exited.add(batch.index[exiting], logits[exiting], self.exit_layers[i])
                batch.keep(~exiting)

    def _consults(self, batch: StreamedBatch, i: int) -> bool:
        """Whether the off-ramp after step i, from 0, has to run. A state is kept for all samples or for none."""
        if batch.cutoffs is None:
            return self.rule.consults(self.cutoffs, i)
        return self.rule.stateful or bool((batch.cutoffs[:, i] > 0).any())


def layer_steps(model) -> LayerSteps:
    """The steps of a PyTorch model in evaluation; an `OnnxDeeBert` and a `LayerRunner` have them."""
    if hasattr(model, "step"):
        return model
    from deebert.runtime.layer_runner import LayerRunner  # PyTorch is here, since its model is

    return LayerRunner(model)


def classify_stream(
    model,
    batches: Iterable[Mapping[str, Array]],
    batch_size: int,
    exit_threshold: float | Sequence[float] | None = None,
    exit_rule: str | None = None,
) -> ExitOutput:
    """Classifies batches of input_ids, attention_mask and, perhaps, token_type_ids, all (b, T); b up to batch_size.

    model: a PyTorch model in evaluation, or an `OnnxDeeBert`. Batches that were joined may be larger than batch_size.
    Returns logits and exit layers of all samples in the order of the input, the same as batch by batch; arrays of the
    kind in which the model computes, for tensors as input tensors. Raises ValueError for thresholds that the model does
    not have, and where there are no batches.
    """
    rule, cutoffs = config_cutoffs(model.config, exit_threshold, exit_rule)
    batcher = ContinuousBatcher(layer_steps(model), rule, cutoffs, model.config.exit_layers, batch_size)
    as_arrays = True
    for batch in batches:
        batcher.add(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        as_arrays = isinstance(batch["input_ids"], np.ndarray)
    batcher.flush()
    if not batcher.samples:
        raise ValueError("there is nothing to classify")
    logits, exit_layer = batcher.exited.in_input_order()
    output = ExitOutput(logits, exit_layer, prediction_entropy(logits, has_several_labels(model.config)))
    if as_arrays:
        return output
    from deebert.runtime.layer_runner import as_tensors

    return as_tensors(output)
