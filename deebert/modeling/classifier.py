"""The classifier that both backbones share: embed, run the layers with exits, score, loss."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from deebert.modeling.early_exit import (
    HighwayConfig,
    HighwayPass,
    classifier_dropout,
    config_rule,
    pooling_weights_of,
    set_rule,
)
from deebert.modeling.exit_rules import NO_EXIT, entropy


@dataclass
class HighwayClassifierOutput(SequenceClassifierOutput):
    """HF's classifier output (loss, logits (B, C), hidden_states, attentions) and what early exit adds.

    exit_layer: (B,) 1-based layer whose answer `logits` holds.
    entropy: (B,) of `logits`, in nats.
    all_logits: (B, N, C) of every exit, the final classifier last; only if asked for.
    all_certainties: (B, N-1) of the learning-to-exit head, with all_logits, where the model has one.
    """

    exit_layer: torch.LongTensor | None = None
    entropy: torch.FloatTensor | None = None
    all_logits: torch.FloatTensor | None = None
    all_certainties: torch.FloatTensor | None = None


def add_highway_fields(config) -> None:
    """Gives a plain HF config the fields of HighwayConfig that it lacks."""
    for field in dataclasses.fields(HighwayConfig):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)


class HighwayInit:
    """Mixin: modules with an initialisation of their own, `init_parameters`, get that one."""

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "init_parameters"):
            module.init_parameters()
        else:
            super()._init_weights(module)


class HighwayModel(HighwayInit):
    """Mixin in front of an HF encoder-only model: exchanges its encoder for one with off-ramps."""

    encoder_class: type

    def __init__(self, config, add_pooling_layer: bool = True):
        add_highway_fields(config)
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.encoder = self.encoder_class(config)
        self.post_init()

    def init_highway_pooler(self) -> None:
        """Starts every off-ramp's pooler as a copy of the model's pooler, as the original does before training."""
        self.encoder.init_highway_pooler(self.pooler)


class HighwayClassifier(HighwayInit):
    """Mixin in front of an HF sequence classification class."""

    # The original has an off-ramp behind the last layer too, never trained and yet consulted. It is not carried over.
    # The learning-to-exit head of a model that exits by another rule is not needed.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"encoder\.highway\.\d+\.", r"encoder\.learn_to_exit\."]

    def init_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold in the exit rule's units, one or one per layer; it is saved, too. Raises ValueError."""
        self.base_model.encoder.set_exit_threshold(value)

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule (a key of EXIT_RULES) and threshold, which are saved with the model. Raises ValueError.

        A model saved with another rule than learned is loaded without the learning-to-exit head.
        """
        set_rule(self.config, name, threshold, self.base_model.encoder.learn_to_exit is not None)

    def set_trained(self, *, backbone: bool, highways: bool) -> None:
        """Chooses what is trained: the backbone with its classifier, and the off-ramps with all that exits need."""
        self.requires_grad_(backbone)
        encoder = self.base_model.encoder
        for module in (encoder.highway, encoder.learn_to_exit):
            if module is not None:
                module.requires_grad_(highways)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        train_highway: bool = False,
        output_layer: int | None = None,
        output_all_exits: bool = False,
        exit_threshold: float | Sequence[float] | None = None,
        **kwargs,
    ) -> HighwayClassifierOutput:
        """Classifies a batch; each sample leaves at its own layer and comes back in its own place.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T), as for HF's models.
            inputs_embeds: (B, T, H) in place of input_ids.
            labels: (B,) long, or float where there is one label: adds the loss of the returned logits.
            train_highway: no gradient is kept for the backbone. All exits are returned, and the loss is the sum of the
                off-ramps' (paper, section 3.2; training.py makes its own of all exits, see objectives.py).
            output_layer: 0-based; every sample gets this exit's answer, and nothing behind it runs.
            output_all_exits: also return `all_logits` (B, N, C). Runs every layer.
            exit_threshold: in place of the config's threshold, for this call. In training mode no sample exits.
            kwargs: `output_hidden_states`, `output_attentions` (both run every layer for every sample), `return_dict`.

        Raises ValueError for thresholds or an output_layer that the model does not have.
        """
        keep_all = output_all_exits or train_highway
        rule, cutoffs = config_rule(self.config), self._limits(exit_threshold, output_layer)
        whole = self._wants_every_token(kwargs)
        exits = None  # stage 1, for one, runs the backbone's own loop
        if keep_all or any(t > 0 for t in cutoffs):
            exits = HighwayPass(
                rule=rule,
                cutoffs=cutoffs,
                token_weights=self.token_weights(attention_mask),
                lengths=token_lengths(attention_mask),
                full=keep_all or self._wants_every_layer(kwargs),
                grad=torch.is_grad_enabled(),
                whole=whole,
            )
        elif not whole:
            exits = HighwayPass(rule, cutoffs, whole=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not train_highway):
            outputs = self.base_model(
                input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                highway_pass=exits,
                return_dict=True,
                **kwargs,
            )
            logits = self.final_answer(outputs.pooler_output)  # (b, C), b = 0 when all have left

        all_logits = all_certainties = None
        if exits is None:
            exit_layer = torch.full((len(logits),), self.config.num_hidden_layers, device=logits.device)
        elif exits.full:
            logits, exit_layer, all_logits, all_certainties = exits.collect_all(logits)
        else:
            logits, exit_layer = exits.collect(logits)

        loss = None
        if labels is not None:
            answers = all_logits[:, :-1].unbind(dim=1) if train_highway else [logits]
            loss = sum(self._loss(answer, labels) for answer in answers)
        return HighwayClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            exit_layer=exit_layer,
            entropy=entropy(logits.detach()),
            all_logits=all_logits if keep_all else None,
            all_certainties=all_certainties if keep_all else None,
        )

    def step(
        self,
        i: int,
        inputs: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        answer: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Layer i alone, from 0, with the exit behind it: for runtimes that decide themselves which samples go where.

        Args:
            inputs: input_ids (b, T) of the first layer, of others the hidden states (b, T, H) of the layer before.
            attention_mask: (b, T). token_type_ids: (b, T), of the first layer only.
            answer: whether the exit is asked; otherwise its logits are None.

        Returns hidden states (b, T, H), of the last layer (b, 1, H), logits (b, C), and the learning-to-exit head's
        certainty (b,) or None. Of a model in evaluation, with an attention backend that takes additive masks: eager or
        sdpa.
        """
        hidden = self.layer(i, inputs, self.layer_mask(attention_mask), token_type_ids)
        if not answer:
            return hidden, None, None
        weights = self.token_weights(attention_mask) if i < self.config.num_hidden_layers - 1 else None
        return hidden, *self.exit_answer(i, hidden, weights)

    def layer_mask(self, attention_mask: Tensor) -> Tensor:
        """(b, T) -> what layers add to their attention scores (b, 1, 1, T)."""
        return (attention_mask == 0).to(self.dtype)[:, None, None] * torch.finfo(self.dtype).min

    def layer(self, i: int, inputs: Tensor, mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Layer i, from 0, the first with the embeddings, the last of the first token; see `step` and `layer_mask`."""
        base = self.base_model
        hidden = base.embeddings(input_ids=inputs, token_type_ids=token_type_ids) if i == 0 else inputs
        if i == self.config.num_hidden_layers - 1:
            return base.encoder.last_layer(hidden, mask)
        return base.encoder.layer[i](hidden, mask)

    def exit_answer(self, i: int, hidden: Tensor, token_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Behind layer i, the last too: logits (b, C), and the learning-to-exit head's certainty (b,) or None."""
        base = self.base_model
        if i == self.config.num_hidden_layers - 1:
            return self.final_answer(base.pooler(hidden)), None
        return base.encoder.exit_answer(i, hidden, token_weights)

    def final_answer(self, pooled: Tensor) -> Tensor:
        """(b, H) -> logits (b, C), calibrated."""
        logits = self.classifier(self.dropout(pooled))
        return logits if self.config.exit_temperatures is None else logits / self.config.exit_temperatures[-1]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """HF's own choice: cross-entropy, or mean squared error where there is one label."""
        labels = labels.to(logits.dtype) if self.num_labels == 1 else labels
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

    def _limits(self, value: float | Sequence[float] | None, output_layer: int | None) -> list[float]:
        num_layers = self.config.num_hidden_layers
        if output_layer is not None:
            if not 0 <= output_layer < num_layers:
                raise ValueError(f"output_layer is {output_layer}; the model has exits 0 to {num_layers - 1}")
            return [math.inf if i == output_layer else -1.0 for i in range(num_layers - 1)]
        if self.training:
            return [-1.0] * (num_layers - 1)
        threshold = self.config.exit_threshold if value is None else value
        return config_rule(self.config).cutoffs(threshold, num_layers)

    def _wants_every_layer(self, kwargs: dict) -> bool:
        """Hidden states and attentions are those of whole batches; flex attention's masks cannot be cut."""
        return self.config._attn_implementation == "flex_attention" or any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )

    def _wants_every_token(self, kwargs: dict) -> bool:
        """Whether the last layer must be the backbone's own: for states that no classifier reads, or by other means."""
        asked = any(value is not None and value is not False for value in kwargs.values())
        trained = self.base_model.encoder.layer[-1].training  # and with dropout
        masks_itself = self.config.is_decoder or self.config._attn_implementation not in ("eager", "sdpa")
        return asked or trained or masks_itself or self._wants_every_layer(kwargs)

    def token_weights(self, attention_mask: Tensor | None) -> Tensor | None:
        """(b, T) -> the weights of the off-ramps' pooling (b, T), None where they read the first token."""
        if attention_mask is None or self.config.highway_pooling == "first":
            return None
        if attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (B, T): the off-ramps' pooling reads the padding from it")
        return pooling_weights_of(attention_mask, self.dtype)


def token_lengths(attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) -> (B,) on the CPU: the position of each sample's last token + 1. A batch of one never shrinks."""
    if attention_mask is None or attention_mask.dim() != 2 or len(attention_mask) == 1:
        return None
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return ((attention_mask != 0) * positions).amax(dim=1).cpu()
