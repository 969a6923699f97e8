"""Many batches at once: samples that stay in a batch that has emptied wait for others, so that deep layers run full.

Works on whatever has `config` and `step` (see `HighwayClassifier.step`): PyTorch models and exported ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from deebert.modeling.classifier import HighwayClassifierOutput
from deebert.modeling.early_exit import config_rule
from deebert.modeling.exit_rules import below, entropy
from deebert.runtime.onnx_runtime import OnnxDeeBert, one_torch_thread


@dataclass
class Group:
    """Samples on their way through the layers together.

    inputs: input_ids (b, T) before the first layer, hidden states (b, T, H) later. mask: (b, T). rows: (b,) positions
    in the whole input. memory: (b, ...) of the exit rule. token_type_ids: (b, T), before the first layer.
    """

    inputs: Tensor
    mask: Tensor
    rows: Tensor
    memory: Tensor | None = None
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, stay: Tensor) -> "Group":
        """These samples (b,) bool, without padding that none of them needs."""
        mask = self.mask[stay]
        length = int(mask.any(dim=0).nonzero().max()) + 1 if len(mask) else 0
        memory = None if self.memory is None else self.memory[stay]
        return Group(self.inputs[stay, :length], mask[:, :length], self.rows[stay], memory)


def merge(groups: Sequence[Group]) -> Group:
    """One group of several that wait at the same layer, padded to the longest."""
    if len(groups) == 1:
        return groups[0]
    length = max(group.mask.shape[1] for group in groups)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        padded = [
            tensor.new_zeros(len(tensor), length, *tensor.shape[2:]).index_copy(
                1, torch.arange(tensor.shape[1], device=tensor.device), tensor
            )
            for tensor in tensors
        ]
        return torch.cat(padded)

    memory = None if groups[0].memory is None else torch.cat([group.memory for group in groups])
    rows = torch.cat([group.rows for group in groups])
    return Group(joined([group.inputs for group in groups]), joined([group.mask for group in groups]), rows, memory)


@torch.inference_mode()
def classify_refilled(
    model,
    batches: Iterable[Mapping[str, Tensor]],
    batch_size: int,
    exit_threshold: float | Sequence[float] | None = None,
) -> HighwayClassifierOutput:
    """Classifies batches of input_ids, attention_mask and, perhaps, token_type_ids, all (b, T); b up to batch_size.

    A group goes on as long as at least half of a batch is left of it. Fewer wait at their layer until those who follow
    make it a batch again, which may then be larger than batch_size; at the end all that wait go on together. Returns
    logits and exit layers of all samples in the order of the input, the same as batch by batch. Raises ValueError for
    thresholds the model does not have, and where there are no batches.
    """
    rule, layers = config_rule(model.config), model.config.num_hidden_layers
    threshold = model.config.exit_threshold if exit_threshold is None else exit_threshold
    cutoffs = rule.cutoffs(threshold, layers)
    waiting: list[list[Group]] = [[] for _ in range(layers)]  # at each layer
    answers: list[tuple[Tensor, Tensor, int]] = []  # rows, logits, exit layer

    def run(group: Group, layer: int) -> None:
        """Through the layers, until too few are left."""
        while len(group):
            if group_waits(group, layer):
                waiting[layer].append(group)
                return
            group = merge([*waiting[layer], group])
            waiting[layer].clear()
            hidden, logits, certainty = model.step(layer, group.inputs, group.mask, group.token_type_ids)
            if layer == layers - 1:
                answers.append((group.rows, logits, layers))
                return
            uncertainty, memory = rule.uncertainty(logits, certainty, group.memory)
            stay = ~below(uncertainty, cutoffs[layer])
            answers.append((group.rows[~stay], logits[~stay], layer + 1))
            group = Group(hidden, group.mask, group.rows, memory)
            if not stay.all():
                group = group.take(stay)
            layer += 1

    def group_waits(group: Group, layer: int) -> bool:
        return not flushing and len(group) + sum(map(len, waiting[layer])) < batch_size / 2 and layer > 0

    flushing, seen = False, 0
    with one_torch_thread() if isinstance(model, OnnxDeeBert) else nullcontext():
        for batch in batches:
            ids = batch["input_ids"]
            rows = torch.arange(seen, seen + len(ids), device=ids.device)
            seen += len(ids)
            run(Group(ids, batch["attention_mask"], rows, token_type_ids=batch.get("token_type_ids")), 0)
        flushing = True
        for layer in range(layers):
            if waiting[layer]:
                group = merge(waiting[layer])
                waiting[layer].clear()
                run(group, layer)
    if not answers:
        raise ValueError("there is nothing to classify")
    order = torch.cat([rows for rows, _, _ in answers]).argsort()
    logits = torch.cat([logits for _, logits, _ in answers])[order]
    exit_layer = torch.cat([torch.full_like(rows, layer) for rows, _, layer in answers])[order]
    return HighwayClassifierOutput(logits=logits, exit_layer=exit_layer, entropy=entropy(logits))
