"""The encoder that holds the off-ramps and runs the layers with exits, and the backbone around it.

A new backbone is made of these. Shapes: B batch, T tokens, H hidden, C labels, E exits; b samples are still active.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from deebert.modeling.config import ThresholdSetters, building_with
from deebert.modeling.early_exit import ExitRequest, run_with_exits
from deebert.modeling.first_token import attend, bypassed, can_stand_in
from deebert.modeling.off_ramps import NEEDS_ALL_TOKENS, Highway

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # it would wait for threads that it lacks


class HighwayEncoder(ThresholdSetters):
    """Mixin in front of an HF encoder class with a list of layers `self.layer`: adds the off-ramps.

    highway: those after layers 1 to N-1, as in the original. highway_embeddings: exit 0, None without one.
    attention_path: the names of the modules from a layer to its attention.
    """

    attention_path: ClassVar[Sequence[str]] = ("attention", "self")

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        if config.exit_before_first_layer and config.highway_pooling == "first":
            raise ValueError(NEEDS_ALL_TOKENS)
        self.highway = nn.ModuleList(Highway(config) for _ in range(config.num_hidden_layers - 1))
        self.highway_embeddings = Highway(config) if config.exit_before_first_layer else None
        self.layer_classes = [type(module) for module in bypassed(self.layer[-1], self.attention_path)]

    @property
    def off_ramps(self) -> list[Highway]:
        """All off-ramps, (E-1,) in the order of the exits."""
        return [*([] if self.highway_embeddings is None else [self.highway_embeddings]), *self.highway]

    def run_layer(self, i: int, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """Layer i, from 0: (b, T, H) and the mask as its attention takes it -> (b, T, H)."""
        return self.layer[i](hidden_states, attention_mask, **kwargs)

    def first_token_layer(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The last layer, as BERT has it, for the first token alone: (b, T, H) -> (b, 1, H).

        A pass calls it only where `can_shorten_last_layer`, an export where `config.first_token_only`.
        attention_mask: as scaled_dot_product_attention takes it, (b, 1, 1 or T, T), or None.
        """
        layer, attention, first = self.layer[-1], self.layer[-1].attention.self, hidden_states[:, :1]
        query, key, value = attention.query(first), attention.key(hidden_states), attention.value(hidden_states)
        attended = layer.attention.output(attend(attention, query, key, value, attention_mask), first)
        return layer.output(layer.intermediate(attended), attended)

    def can_shorten_last_layer(self) -> bool:
        """Whether `first_token_layer` gives what the last layer gives."""
        return can_stand_in(self.config, self.layer[-1], self.attention_path, self.layer_classes)

    def layer_mask(self, mask: Tensor | None, inputs: Tensor) -> Tensor | None:
        """The mask as the layers take it, of inputs (b, T) or (b, T, H): as it is, unless a backbone adds to it."""
        return mask

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, exits: ExitRequest | None = None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The backbone's own pass through the layers, or one with exits, as requested (see `run`).

        With exits the layers get neither use_cache nor position_ids, which do not fit a batch that shrinks.
        """
        if exits is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("position_ids", "use_cache")}
        last_hidden_state = self.run(exits, hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last_hidden_state)

    def run(self, request: ExitRequest, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """Runs the layers with the off-ramps between them on embeddings (B, T, H); the request holds who exits.

        Returns the hidden states after the last layer, (b, T, H) or (b, 1, H), of the samples that did not exit.
        """
        blocks = [partial(self.run_layer, i, **kwargs) for i in range(len(self.layer))]
        if request.first_token_only:
            blocks[-1] = self.first_token_layer
        if self.highway_embeddings is not None:
            blocks = [lambda hidden_states, mask: hidden_states, *blocks]  # before exit 0 no layer runs
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
        with building_with(config, self.config_class):
            super().__init__(config, *args, **kwargs)
            setattr(self, self.encoder_name, self.encoder_class(config))
        self.post_init()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids (b, T), and types where there are any -> hidden states before the first layer (b, T, H)."""
        types = {"token_type_ids": token_type_ids} if self.config.type_vocab_size else {}
        return self.embeddings(input_ids, **types)

    def init_highway_pooler(self) -> None:
        """Starts every off-ramp's pooler as a copy of the model's pooler, as the original does before training."""
        for off_ramp in self.encoder.off_ramps:
            if off_ramp.pooler is not None:
                off_ramp.pooler.load_state_dict(self.pooler.state_dict())
