"""The encoder that holds the off-ramps and runs the layers with exits, and the backbone around it.

A new backbone is made of these. Shapes: B batch, T tokens, H hidden, C labels, E exits; b samples are still active.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deebert.modeling.config import replacing_a_part, set_threshold
from deebert.modeling.early_exit import ExitRequest, run_with_exits
from deebert.modeling.first_token import first_token_layer
from deebert.modeling.off_ramps import NEEDS_ALL_TOKENS, Highway

if hasattr(os, "register_at_fork"):  # not on Windows
    # A forked process has none of PyTorch's threads, and would wait for them: it computes with one.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def unchanged(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
    """What runs before exit 0: no layer."""
    return hidden_states


class HighwayEncoder:
    """Mixin in front of an HF encoder class with a list of layers `self.layer`: adds the off-ramps.

    highway: those after layers 1 to N-1, as in the original. highway_embeddings: exit 0, None without one.
    """

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        if config.exit_before_first_layer and config.highway_pooling == "first":
            raise ValueError(NEEDS_ALL_TOKENS)
        self.highway = nn.ModuleList(Highway(config) for _ in range(config.num_hidden_layers - 1))
        self.highway_embeddings = Highway(config) if config.exit_before_first_layer else None

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold(s), in the config that all modules share. Raises ValueError."""
        set_threshold(self.config, value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    @property
    def off_ramps(self) -> list[Highway]:
        """All off-ramps, (E-1,) in the order of the exits."""
        return list(self.highway) if self.highway_embeddings is None else [self.highway_embeddings, *self.highway]

    @property
    def blocks(self) -> list[Callable]:
        """What runs between each exit and the one before it, (E,): a layer, before exit 0 none.

        Each is (hidden states (b, T, H), mask as the attention takes it or None, more) -> hidden states (b, T, H).
        """
        return self.with_exit_0(self.layer)

    def with_exit_0(self, layers: Sequence[Callable]) -> list[Callable]:
        """The layers, after a block that does nothing where there is an exit 0."""
        return list(layers) if self.highway_embeddings is None else [unchanged, *layers]

    def first_token_layer(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The last layer for the first token alone: (b, T, H) -> (b, 1, H), where `config.first_token_only` is set."""
        return first_token_layer(self.layer[-1], hidden_states, attention_mask)

    def layer_mask(self, mask: Tensor | None, inputs: Tensor) -> Tensor | None:
        """What the layers take as their mask: the padding's, (b, 1, 1, T) or None; another encoder may add to it.

        inputs: what the batch is, (b, T) or (b, T, H).
        """
        return mask

    def init_highway_pooler(self, pooler: nn.Module) -> None:
        """Copies the backbone's pooler into every off-ramp's pooler: their initialisation in the original."""
        for off_ramp in self.off_ramps:
            if off_ramp.pooler is not None:
                off_ramp.pooler.load_state_dict(pooler.state_dict())

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        exits: ExitRequest | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The backbone's own pass through the layers, or one with exits, as requested (see `run`).

        position_ids serve packed sequences in HF's layers. A classifier has none, and they would not fit a batch that
        shrinks, so that layers with exits after them do not get them.
        """
        if exits is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("position_ids", "use_cache")}
        blocks = [partial(block, **kwargs) for block in self.blocks]
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.run(exits, blocks, hidden_states, attention_mask)
        )

    def run(
        self, request: ExitRequest, blocks: Sequence[Callable], hidden_states: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Runs the blocks with the off-ramps between them on embeddings (B, T, H); the request holds who exits.

        Returns the hidden states after the last layer, (b, T, H) or (b, 1, H), of the samples that did not exit.
        """
        if request.first_token_only:
            blocks = [*blocks[:-1], self.first_token_layer]
        off_ramps = self.off_ramps
        if request.train_off_ramps:
            off_ramps = [torch.enable_grad()(off_ramp.__call__) for off_ramp in off_ramps]
        batch = request.batch
        batch.hidden_states, batch.attention_mask = hidden_states, self.layer_mask(attention_mask, hidden_states)
        run_with_exits(blocks, off_ramps, request)
        return batch.hidden_states[: len(batch)]


class HighwayModel:
    """Mixin in front of an HF encoder-only model with an `encoder`: replaces that by one with off-ramps."""

    encoder_class: type
    encoder_name: ClassVar[str] = "encoder"

    def __init__(self, config, *args, **kwargs):
        with replacing_a_part(config, self.config_class):
            super().__init__(config, *args, **kwargs)
            setattr(self, self.encoder_name, self.encoder_class(config))
        self.post_init()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids and types (b, T) -> hidden states before the first layer (b, T, H)."""
        return self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)

    def init_highway_pooler(self) -> None:
        """Starts every off-ramp's pooler as a copy of the model's pooler, as the original does before training."""
        self.encoder.init_highway_pooler(self.pooler)
