"""Continuous batching: samples still active in a batch that has emptied wait for others, so that deep layers run full.

The name is that of serving systems for language models. It works for PyTorch models and exported ones.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.config import config_cutoffs, has_several_labels
from deebert.modeling.early_exit import ActiveBatch, ExitedSamples, let_exit
from deebert.modeling.exit_rules import ExitRule, prediction_entropy
from deebert.modeling.off_ramps import token_lengths
from deebert.runtime.layer_runner import LayerRunner, LayerSteps


def joined(batches: Sequence[ActiveBatch]) -> ActiveBatch:
    """One batch of several that wait at the same layer, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.attention_mask.shape[1] for batch in batches)

    def padded(tensor: Tensor) -> Tensor:  # (b, T, ...) -> (b, length, ...)
        room = tensor.new_zeros(len(tensor), length, *tensor.shape[2:])
        room[:, : tensor.shape[1]] = tensor
        return room

    states = [batch.rule_state for batch in batches]
    return ActiveBatch(
        index=torch.cat([batch.index for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        hidden_states=torch.cat([padded(batch.hidden_states) for batch in batches]),
        attention_mask=torch.cat([padded(batch.attention_mask) for batch in batches]),
        rule_state=None if states[0] is None else torch.cat(states),
    )


class ContinuousBatcher:
    """Runs batches through the layers. A batch of which less than half is left waits until others join it.

    cutoffs: (N-1,) of the off-ramps. After `flush`, `exited` holds all samples in the order of the input.
    """

    def __init__(self, steps: LayerSteps, rule: ExitRule, cutoffs: Sequence[float], batch_size: int):
        self.steps, self.rule, self.cutoffs, self.batch_size = steps, rule, cutoffs, batch_size
        self.waiting: list[list[ActiveBatch]] = [[] for _ in range(len(cutoffs) + 1)]  # at each layer
        self.exited = ExitedSamples()
        self.samples = 0

    def add(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> None:
        """Runs a batch (b, T), b up to batch_size, and those that wait for it, as deep as they are large enough."""
        index = torch.arange(self.samples, self.samples + len(input_ids))
        self.samples += len(input_ids)
        batch = ActiveBatch(index, token_lengths(attention_mask), input_ids, attention_mask)
        self._run(batch, 0, token_type_ids)

    def flush(self) -> None:
        """Runs all that wait to the end."""
        for layer, batches in enumerate(self.waiting):
            if batches:
                self._run(self._with_waiting(None, layer), layer, flushing=True)

    def _run(
        self, batch: ActiveBatch, layer: int, token_type_ids: Tensor | None = None, flushing: bool = False
    ) -> None:
        while len(batch):
            waiting = sum(map(len, self.waiting[layer]))
            if layer > 0 and not flushing and len(batch) + waiting < self.batch_size / 2:
                self.waiting[layer].append(batch)
                return
            batch = self._with_waiting(batch, layer)
            self._step(batch, layer, token_type_ids)
            layer += 1

    def _with_waiting(self, batch: ActiveBatch | None, layer: int) -> ActiveBatch:
        batches = [*self.waiting[layer], *([] if batch is None else [batch])]
        self.waiting[layer].clear()
        return joined(batches)

    def _step(self, batch: ActiveBatch, i: int, token_type_ids: Tensor | None) -> None:
        """Layer i, from 0, and the exit after it, unless nothing can exit there."""
        last = i == len(self.cutoffs)
        consult = last or self.rule.consults(self.cutoffs, i)
        hidden, logits, certainty = self.steps.step(
            i, batch.hidden_states, batch.attention_mask, token_type_ids if i == 0 else None, consult
        )
        batch.hidden_states = hidden
        if last:
            self.exited.add(batch.index, logits, i + 1)
            batch.index = batch.index[:0]
        elif consult:
            uncertainty, batch.rule_state = self.rule.uncertainty(logits, certainty, batch.rule_state)
            let_exit(batch, self.exited, i + 1, logits, uncertainty, self.cutoffs[i])


@torch.inference_mode()
def classify_stream(
    model,
    batches: Iterable[Mapping[str, Tensor]],
    batch_size: int,
    exit_threshold: float | Sequence[float] | None = None,
) -> HighwayClassifierOutput:
    """Classifies batches of input_ids, attention_mask and, perhaps, token_type_ids, all (b, T); b up to batch_size.

    model: a PyTorch model in evaluation, or an `OnnxDeeBert`. Batches that were joined may be larger than batch_size.
    Returns logits and exit layers of all samples in the order of the input, the same as batch by batch. Raises
    ValueError for thresholds that the model does not have, and where there are no batches.
    """
    steps = model if hasattr(model, "step") else LayerRunner(model)
    batcher = ContinuousBatcher(steps, *config_cutoffs(model.config, exit_threshold), batch_size)
    with steps.running():
        for batch in batches:
            batcher.add(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        batcher.flush()
    if not batcher.samples:
        raise ValueError("there is nothing to classify")
    logits, exit_layer = batcher.exited.in_input_order()
    nats = prediction_entropy(logits, has_several_labels(model.config))
    return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=nats)
