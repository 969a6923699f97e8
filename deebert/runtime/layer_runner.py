"""A model's layers one at a time, for runtimes that decide themselves which samples run where.

Step i, from 0, ends at exit i: it runs one layer, the first one the embeddings too. Where there is an exit before the
first layer, step 0 is the embeddings alone. Shapes: b samples, T tokens, H hidden, C labels.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class LayerSteps(Protocol):
    """What continuous batching needs of a model: a `LayerRunner` of a PyTorch model, or an `OnnxDeeBert`."""

    def step(
        self,
        i: int,
        inputs: Tensor | np.ndarray,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        consult: bool = True,
    ) -> tuple[Tensor | np.ndarray, Tensor | None, Tensor | None]:
        """Step i, from 0, and the exit after it.

        inputs: input_ids (b, T) for the first step, for others the hidden states (b, T, H) of the previous step.
        attention_mask: (b, T). token_type_ids: (b, T), of the first step only. consult: whether the exit runs too.

        Returns hidden states (b, T, H), after the last step perhaps (b, 1, H); logits (b, C); and the certainty (b,) of
        the learning-to-exit head or None. Without `consult` logits and certainty may be None.
        """


class LayerRunner:
    """The steps of a PyTorch model in evaluation, whose attention takes additive masks: eager or sdpa."""

    def __init__(self, model):
        self.model, self.base = model, model.base_model
        self.blocks, self.off_ramps = self.base.encoder.blocks, self.base.encoder.off_ramps()
        self.last = len(self.blocks) - 1

    def step(
        self,
        i: int,
        inputs: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        consult: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `LayerSteps.step`."""
        hidden = self.layer(i, inputs, self.additive_mask(attention_mask), token_type_ids)
        if not consult:
            return hidden, None, None
        return hidden, *self.exit(i, hidden, self.model.pooling_weights(attention_mask))

    def additive_mask(self, attention_mask: Tensor) -> Tensor:
        """(b, T) -> what layers add to their attention scores (b, 1, 1, T)."""
        dtype = self.model.dtype
        return (attention_mask == 0).to(dtype)[:, None, None] * torch.finfo(dtype).min

    def layer(self, i: int, inputs: Tensor, mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Step i without its exit. mask: see `additive_mask`.

        The last step's layer is computed for the first token only, where the final classifier reads no other.
        """
        hidden = self.base.embed(inputs, token_type_ids) if i == 0 else inputs
        if i == self.last and self.model.config.first_token_only:
            return self.base.encoder.first_token_layer(hidden, mask)
        return self.blocks[i](hidden, mask)

    def exit(self, i: int, hidden: Tensor, pooling_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Exit i, also the last: logits (b, C), and the certainty (b,) or None."""
        if i == self.last:
            return self.model.final_logits(self.model.final_state(hidden, pooling_weights)), None
        return self.off_ramps[i](hidden, pooling_weights)
