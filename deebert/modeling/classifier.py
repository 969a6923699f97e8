"""The classifier that all backbones share: embed, run the layers with exits, score, loss.

Shapes: B batch, T tokens, H hidden, N layers, E exits (see config.exit_layers), C labels; b samples are still active.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from deebert.modeling.config import add_highway_fields, config_cutoffs, config_rule, has_several_labels, set_rule
from deebert.modeling.early_exit import (
    ActiveBatch,
    ExitedSamples,
    ExitOutput,
    output_of_all_exits,
    run_with_exits,
    token_lengths,
)
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, prediction_entropy
from deebert.modeling.first_token import needs_full_last_layer
from deebert.modeling.off_ramps import OwnInit, classifier_dropout, is_off_ramp, mean_weights


@dataclass
class HighwayClassifierOutput(ExitOutput, SequenceClassifierOutput):
    """HF's classifier output (loss, logits, hidden_states, attentions) and what early exit adds, as tensors."""


class HighwayClassifier(OwnInit):
    """Mixin in front of an HF sequence classification class."""

    # The original has an off-ramp after the last layer too: never trained, yet consulted. It is not carried over.
    # A model that exits by another rule does not need the learning-to-exit head; exit 0 can be switched off.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.(highway\.\d+|highway_embeddings|learn_to_exit)\."]

    def init_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold in the exit rule's units, one or one per off-ramp; it is saved, too. Raises ValueError."""
        self.base_model.encoder.set_exit_threshold(value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule (a key of EXIT_RULES) and threshold, which are saved with the model. Raises ValueError.

        A model saved with another rule than learned is loaded without the learning-to-exit head.
        """
        set_rule(self.config, name, threshold, self.base_model.encoder.learn_to_exit is not None)

    def set_trained(self, *, backbone: bool, highways: bool) -> None:
        """Chooses what is trained: the backbone with its classifier, and the off-ramps with all that exits need."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(highways if is_off_ramp(name) else backbone)

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
        early_exit_entropy: float | Sequence[float] | None = None,
        exit_rule: str | None = None,
        **kwargs,
    ) -> HighwayClassifierOutput:
        """Classifies a batch. Each sample exits at its own layer; results come in input order.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T), as for HF's models.
            inputs_embeds: (B, T, H) in place of input_ids.
            labels: (B,) long, or float where there is one label; (B, C) of 0 and 1 for
                `problem_type="multi_label_classification"`. Adds the loss of the returned logits.
            train_highway: no gradient is kept for the backbone. All exits are returned, and the loss is the sum of the
                off-ramps' losses (paper, section 3.2; our trainings compute theirs in training/losses.py).
            output_layer: from 0 (exit 0: -1); every sample gets this exit's logits, and nothing after it runs.
            output_all_exits: also return `all_logits` (B, E, C). Runs every layer.
            exit_threshold: in place of the config's, for this call. In training mode no sample exits.
            early_exit_entropy: the original's name for exit_threshold.
            exit_rule: in place of the config's, for this call: other threads may use another one at the same time.
            kwargs: `output_hidden_states`, `output_attentions` (both run every layer for every sample), `return_dict`.

        Raises ValueError for thresholds, a rule or an output_layer that the model does not have.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "return_dict": True,
        }
        if labels is not None and labels.is_floating_point() and self.num_labels > 1 and not self.config.problem_type:
            self.config.problem_type = "multi_label_classification"  # as HF's loss would do, after samples have exited
        if self.config.type_vocab_size:  # backbones without token types do not take them
            inputs["token_type_ids"] = token_type_ids
        threshold = early_exit_entropy if exit_threshold is None else exit_threshold
        rule, cutoffs = self._cutoffs(threshold, output_layer, exit_rule)
        can_exit, full_batches = any(cutoff > 0 for cutoff in cutoffs), self._needs_full_batches(kwargs)
        last_layer = self._short_last_layer(full_batches or any(map(_given, kwargs.values())))
        if output_all_exits or train_highway or (can_exit and full_batches):
            output = self._run_all_exits(inputs | kwargs, last_layer, rule, cutoffs, train_highway)
        else:
            output = self._run_early_exit(inputs | kwargs, last_layer, rule, cutoffs, can_exit)
        output.entropy = prediction_entropy(output.logits.detach(), has_several_labels(self.config))
        if labels is not None:
            trained = output.all_logits[:, :-1].unbind(dim=1) if train_highway else [output.logits]
            output.loss = sum(self._loss(logits, labels) for logits in trained)
        if not (output_all_exits or train_highway):
            output.all_logits = output.all_certainties = None
        return output

    def _run_early_exit(
        self, inputs: dict, last_layer: list[Callable], rule: ExitRule, cutoffs: list[float], can_exit: bool
    ) -> HighwayClassifierOutput:
        """Path 1: samples exit on their way through the layers."""
        if not can_exit and not last_layer:  # stage 1, for one, runs the backbone as it is
            logits, outputs = self.full_model(**inputs)
            exit_layer = torch.full((len(logits),), self.config.num_hidden_layers, device=logits.device)
            return HighwayClassifierOutput(
                logits=logits, exit_layer=exit_layer, hidden_states=outputs.hidden_states, attentions=outputs.attentions
            )
        mask, exited = inputs["attention_mask"], ExitedSamples()
        batch = ActiveBatch(index=np.arange(0))

        def loop(layers: list[Callable], hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
            batch.index = np.arange(len(hidden_states))
            batch.hidden_states, batch.attention_mask = hidden_states, attention_mask
            batch.pooling_weights = self.pooling_weights(mask, can_exit)
            if can_exit:
                batch.lengths = None if len(batch) == 1 else token_lengths(mask)  # a batch of one never shrinks
            layers = layers[:-1] + (last_layer or layers[-1:])
            off_ramps = self.base_model.encoder.off_ramps() if can_exit else []
            run_with_exits(layers, off_ramps, batch, exited, rule, cutoffs, self.config.exit_layers)
            return batch.hidden_states[: len(batch)]

        outputs = self.base_model(**inputs, layer_loop=loop)
        if len(batch):
            logits = self._logits_of(outputs, batch.pooling_weights)
            exited.add(batch.index, logits, self.config.num_hidden_layers)
        logits, exit_layer = exited.in_input_order()
        return HighwayClassifierOutput(
            logits=logits, exit_layer=exit_layer, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _run_all_exits(
        self, inputs: dict, last_layer: list[Callable], rule: ExitRule, cutoffs: list[float], train_highway: bool
    ) -> HighwayClassifierOutput:
        """Path 2: every layer and every off-ramp run for every sample; where each would exit follows from that."""
        exits = []  # of each off-ramp: logits (B, C) and certainty (B,) or None
        pooling_weights, train_off_ramps = self.pooling_weights(inputs["attention_mask"]), torch.is_grad_enabled()

        def loop(layers: list[Callable], hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
            for layer, off_ramp in zip(layers[:-1], self.base_model.encoder.off_ramps(), strict=True):
                hidden_states = layer(hidden_states, attention_mask)
                with torch.set_grad_enabled(train_off_ramps):
                    exits.append(off_ramp(hidden_states, pooling_weights))
            (last,) = last_layer or layers[-1:]
            return last(hidden_states, attention_mask)

        with torch.set_grad_enabled(train_off_ramps and not train_highway):
            outputs = self.base_model(**inputs, layer_loop=loop)
            final_logits = self._logits_of(outputs, pooling_weights)
        output = output_of_all_exits([*exits, (final_logits, None)], rule, cutoffs, self.config.exit_layers)
        return HighwayClassifierOutput(
            **vars(output), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _short_last_layer(self, outputs_requested: bool) -> list[Callable]:
        """What may take the last layer's place: one callable, or none where the backbone's own has to run."""
        encoder = self.base_model.encoder
        needs_full = needs_full_last_layer(self.config, encoder.layer[-1], outputs_requested)
        return [] if needs_full else [encoder.first_token_layer]

    def full_model(self, **inputs) -> tuple[Tensor, BaseModelOutput]:
        """The logits (B, C) of the model without exits, and the backbone's output. inputs: the backbone's."""
        outputs = self.base_model(**inputs)
        return self._logits_of(outputs, self.pooling_weights(inputs["attention_mask"], off_ramps=False)), outputs

    def _logits_of(self, outputs: BaseModelOutput, pooling_weights: Tensor | None) -> Tensor:
        state = getattr(outputs, "pooler_output", None)
        if state is None:
            state = self.final_state(outputs.last_hidden_state, pooling_weights)
        return self.classify(state)

    def final_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """What the final classifier reads of the last layer: (b, T, H) -> (b, H). pooling_weights: see below."""
        return self.base_model.pooler(hidden_states)

    def classify(self, state: Tensor) -> Tensor:
        """The final classifier: (b, H) -> (b, C)."""
        return self.classifier(self.dropout(state))

    def pooling_weights(self, attention_mask: Tensor | None, off_ramps: bool = True) -> Tensor | None:
        """(b, T) -> the weights of the exits' poolings (b, T), None where all of them read the first token.

        off_ramps: whether off-ramps run, and not the final classifier alone.
        """
        mean = (off_ramps and self.config.highway_pooling == "mean") or not self.config.first_token_only
        if attention_mask is None or not mean:
            return None
        if attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (B, T): the exits' poolings read the padding from it")
        return mean_weights(attention_mask, self.dtype)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """HF's own choice: cross-entropy, mean squared error for one label, or binary cross-entropy for several."""
        labels = labels.to(logits.dtype) if self.num_labels == 1 or has_several_labels(self.config) else labels
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

    def _cutoffs(
        self, threshold: float | Sequence[float] | None, output_layer: int | None, exit_rule: str | None
    ) -> tuple[ExitRule, list[float]]:
        if output_layer is not None:
            counted = [layer - 1 for layer in self.config.exit_layers]  # from 0, as the original does
            if output_layer not in counted:
                raise ValueError(f"output_layer is {output_layer}; the model has exits {counted[0]} to {counted[-1]}")
            return config_rule(self.config), [math.inf if i == output_layer else NO_EXIT for i in counted[:-1]]
        return config_cutoffs(self.config, NO_EXIT if self.training else threshold, exit_rule)

    def _needs_full_batches(self, kwargs: dict) -> bool:
        """Whether hidden states or attentions are requested. Flex attention counts too: its masks cannot be trimmed."""
        return self.config._attn_implementation == "flex_attention" or any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )


def _given(value) -> bool:
    return value is not None and value is not False


class StockHeadClassifier(HighwayClassifier):
    """Mixin in front of an HF sequence classification class: its own head, after a backbone with off-ramps.

    model_class: the backbone with off-ramps. model_options: keyword arguments for it.
    """

    model_class: type
    model_options: ClassVar[dict] = {}

    def __init__(self, config):
        add_highway_fields(config, self.config_class)
        super().__init__(config)  # HF's class with its head, and with a backbone without off-ramps
        setattr(self, self.base_model_prefix, self.model_class(config, **self.model_options))
        self.post_init()

    def final_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """The first token's state: (b, T, H) -> (b, H)."""
        return hidden_states[:, 0]

    def classify(self, state: Tensor) -> Tensor:
        """HF's head, which takes the hidden states of all tokens, and reads the first: (b, H) -> (b, C)."""
        return self.classifier(state.unsqueeze(1))
