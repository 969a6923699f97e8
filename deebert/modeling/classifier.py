"""The classifier that all backbones share: embed, run the layers with exits, score, loss.

Shapes: B batch, T tokens, H hidden, N layers, E exits (see config.exit_layers), C labels; b samples are still active.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from deebert.modeling.config import ThresholdSetters, building_with, config_cutoffs, config_rule, has_several_labels
from deebert.modeling.early_exit import ActiveBatch, ExitRequest, exits_of
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, prediction_entropy
from deebert.modeling.off_ramps import CLASSIFIER_POOLINGS, classifier_dropout, is_off_ramp, mean_weights
from deebert.utils.arrays import token_lengths

LOGGER = logging.getLogger(__name__)
STAGES = ("backbone", "off_ramps", "all")
TRACED = "a trace keeps the exits of its own batch; give exit_threshold=-1, or write a graph by onnx_export"
# of a pass: logits (B, C), exit layers (B,), all logits (B, E, C), the backbone's output
Results = tuple[Tensor, Tensor, Tensor | None, BaseModelOutput]


@dataclass
class HighwayClassifierOutput(SequenceClassifierOutput):
    """HF's output (loss, logits (B, C) of each sample's exit, ...) with exit_layer, entropy and all_logits."""

    exit_layer: Tensor | None = None  # (B,) the layer, from 1, at which each sample exited; 0: before the first layer
    entropy: Tensor | None = None  # (B,) of the logits, in nats; of several labels the largest binary entropy
    all_logits: Tensor | None = None  # (B, E, C) of every exit, the final classifier last; only if requested


@dataclass
class AllExitsRequest(ExitRequest):
    """A pass in which every off-ramp runs for every sample, and no sample exits."""

    all_logits: list[Tensor] = field(default_factory=list)  # (B, C) of each off-ramp

    def consults(self, i: int) -> bool:
        return i < len(self.cutoffs)

    def let_exit(self, i: int, logits: Tensor) -> None:
        self.all_logits.append(logits)


class HighwayClassifier(ThresholdSetters):
    """Mixin in front of an HF sequence classification class."""

    # The original's off-ramp after the last layer, which is never trained; an exit 0 that is switched off; 0.10's head
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.(highway\.\d+|highway_embeddings|learn_to_exit)\."]

    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the number of accumulated micro-batches
    stage = "backbone"  # of the training, see `train_stage`
    off_ramps_seen = False  # whether `_name_untrained` has looked at them

    def init_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def train_stage(self, stage: str) -> None:
        """Freezes what a stage does not train; in training mode `forward(labels=...)` returns the loss of the stage.

        "backbone": with its classifier, on the loss of this one (the paper's stage 1). "off_ramps": these alone, on the
        sum of their losses (stage 2). "all": everything, on the sum of the losses of all exits. Raises ValueError.
        """
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; choose one of {', '.join(STAGES)}")
        self.stage = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(stage in ("all", "off_ramps" if is_off_ramp(name) else "backbone"))

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> HighwayClassifierOutput:
        """Classifies a batch. Each sample exits at its own layer; results come in input order. Raises ValueError.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T), as for HF's models.
            inputs_embeds: (B, T, H) in place of input_ids.
            labels: (B,) long, or float where there is one label; (B, C) of 0 and 1 for several labels a sample. Adds
                the loss of the returned logits; in training mode that of the stage (see `train_stage`).
            train_highway: the original's switch for stage 2, which needs no frozen backbone. All exits are returned.
            output_layer: the exit for every sample, from 0 as in the original: 0 after layer 1, -1 before it.
            output_all_exits: also return `all_logits` (B, E, C). Runs every layer.
            exit_threshold, exit_rule: in place of the config's, for this call. In training mode no sample exits.
            early_exit_entropy: the original's name for exit_threshold.
            kwargs: `output_hidden_states`, `output_attentions` (both run every layer for every sample), `return_dict`.
        """
        types = {"token_type_ids": token_type_ids} if self.config.type_vocab_size else {}  # others do not take them
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | types | kwargs
        inputs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "return_dict": True}
        self._set_problem_type(labels)
        stage = self.stage if self.training and labels is not None else "backbone"
        stage = "off_ramps" if train_highway else stage
        threshold = early_exit_entropy if exit_threshold is None else exit_threshold
        rule, cutoffs = self._cutoffs(threshold, output_layer, exit_rule)
        can_exit, all_exits = any(cutoff > 0 for cutoff in cutoffs), output_all_exits or stage != "backbone"
        if (can_exit or all_exits) and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            raise ValueError(TRACED)
        full_batches = self._needs_full_batches(kwargs)
        full_last_layer = full_batches or any(map(_given, kwargs.values()))
        first_token_only = not full_last_layer and self.base_model.encoder.can_shorten_last_layer()
        if all_exits or (can_exit and full_batches):
            results = self._all_exits(inputs, rule, cutoffs, first_token_only, stage)
        elif can_exit or first_token_only:
            results = self._with_exits(inputs, rule, cutoffs, first_token_only)
        else:
            results = self._plain(inputs)
        logits, exit_layer, all_logits, outputs = results
        return HighwayClassifierOutput(
            loss=None if labels is None else self._loss(logits, all_logits, labels, stage),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            exit_layer=exit_layer,
            entropy=prediction_entropy(logits.detach(), has_several_labels(self.config)),
            all_logits=all_logits if all_exits else None,
        )

    def _plain(self, inputs: dict) -> Results:
        """Path 1: Hugging Face's own pass, as in training the backbone."""
        outputs = self.base_model(**inputs)
        logits = self._logits_of(outputs, self.pooling_weights(inputs["attention_mask"], off_ramps=False))
        return logits, torch.full_like(logits[:, 0], self.config.num_hidden_layers, dtype=torch.long), None, outputs

    @torch.compiler.disable  # which samples exit is decided on the host
    def _with_exits(self, inputs: dict, rule: ExitRule, cutoffs: Sequence[float], first_token_only: bool) -> Results:
        """Path 2: samples exit on their way through the layers."""
        can_exit = any(cutoff > 0 for cutoff in cutoffs)
        if can_exit and not self.off_ramps_seen:
            self._name_untrained()
        batch = self._batch(inputs, off_ramps=can_exit)
        request = ExitRequest(batch, rule, cutoffs, self.config.exit_layers, first_token_only)
        outputs = self.base_model(**inputs, exits=request)
        if len(batch):
            logits = self._logits_of(outputs, batch.pooling_weights)
            request.exited.add(batch.index, logits, self.config.num_hidden_layers)
        return *request.exited.in_input_order(), None, outputs

    @torch.compiler.disable
    def _all_exits(
        self, inputs: dict, rule: ExitRule, cutoffs: Sequence[float], first_token_only: bool, stage: str
    ) -> Results:
        """Path 3: every layer and every off-ramp run for every sample; where each would exit follows from that."""
        batch, layers, gradients = self._batch(inputs), self.config.exit_layers, torch.is_grad_enabled()
        request = AllExitsRequest(batch, rule, cutoffs, layers, first_token_only, train_off_ramps=gradients)
        with torch.set_grad_enabled(gradients and stage != "off_ramps"):
            outputs = self.base_model(**inputs, exits=request)
            final_logits = self._logits_of(outputs, batch.pooling_weights)
        all_logits = torch.stack([*request.all_logits, final_logits], dim=1)
        return *exits_of(all_logits, rule, cutoffs, layers), all_logits, outputs

    def _name_untrained(self) -> None:
        """Says once which off-ramps were never trained: new classifiers have a bias of 0, and trained ones do not."""
        self.off_ramps_seen = True
        biases = [off_ramp.classifier.bias for off_ramp in self.base_model.encoder.off_ramps]
        new = [isinstance(bias, Tensor) and not bias.any() for bias in biases]  # a quantized one is no tensor
        if any(new):
            layers = [layer for layer, is_new in zip(self.config.exit_layers, new, strict=False) if is_new]
            LOGGER.warning("the off-ramps after the layers %s were never trained; samples exit at random there", layers)

    def _batch(self, inputs: dict, off_ramps: bool = True) -> ActiveBatch:
        """All samples, before the first layer. off_ramps: whether any runs, and not the final classifier alone."""
        mask, given = inputs["attention_mask"], inputs["input_ids"]
        size = len(inputs["inputs_embeds"] if given is None else given)
        lengths = token_lengths(mask) if off_ramps and size > 1 else None  # a batch of one never shrinks
        return ActiveBatch(np.arange(size), lengths, pooling_weights=self.pooling_weights(mask, off_ramps))

    def _logits_of(self, outputs: BaseModelOutput, pooling_weights: Tensor | None) -> Tensor:
        pooler_output = None if self.config.linear_classifier else getattr(outputs, "pooler_output", None)
        if pooler_output is not None:
            return self.classifier(self.dropout(pooler_output))
        return self.classify(self.final_state(outputs.last_hidden_state, pooling_weights))

    def final_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """What the final classifier reads of the last layer, as the config says: (b, T, H) -> (b, H)."""
        return CLASSIFIER_POOLINGS[self.config.classifier_pooling](hidden_states, pooling_weights)

    def classify(self, state: Tensor) -> Tensor:
        """The final classifier: (b, H) -> (b, C)."""
        return self.classifier(self.dropout(state)) if self.config.linear_classifier else self.stock_head(state)

    def stock_head(self, state: Tensor) -> Tensor:
        """HF's head of BERT, after its pooler: (b, H) -> (b, C)."""
        return self.classifier(self.dropout(self.base_model.pooler(state.unsqueeze(1))))

    def pooling_weights(self, attention_mask: Tensor | None, off_ramps: bool = True) -> Tensor | None:
        """(b, T) -> weights of the poolings (b, T); None where all read the first token. off_ramps: whether any run."""
        mean = (off_ramps and self.config.highway_pooling == "mean") or self.config.classifier_pooling == "mean"
        if attention_mask is None or not mean:
            return None
        if attention_mask.dim() != 2:
            raise ValueError("attention_mask must be (B, T): the exits' poolings read the padding from it")
        return mean_weights(attention_mask, self.dtype)

    def _loss(self, logits: Tensor, all_logits: Tensor | None, labels: Tensor, stage: str) -> Tensor:
        """HF's own choice of a loss, of the exits that the stage trains: the sum of their losses."""
        classes = "single_label_classification" if self.num_labels > 1 else "regression"
        if (self.config.problem_type or classes) != "single_label_classification":
            labels = labels.to(logits.dtype)
        trained = [logits] if stage == "backbone" else all_logits.unbind(dim=1)[: -1 if stage == "off_ramps" else None]
        return sum(self.loss_function(labels=labels, pooled_logits=z, config=self.config) for z in trained)

    def _set_problem_type(self, labels: Tensor | None) -> None:
        """As HF's loss does where the config has none, but before samples exit: exit rules depend on it."""
        if labels is not None and labels.is_floating_point() and self.num_labels > 1 and not self.config.problem_type:
            self.config.problem_type = "multi_label_classification"

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
            _given(kwargs.get(name, getattr(self.config, name, False)))
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
        with building_with(config, self.config_class):
            super().__init__(config)  # HF's class with its head, and with a backbone without off-ramps
            setattr(self, self.base_model_prefix, self.model_class(config, **self.model_options))
            if config.linear_classifier:
                self.init_head(config)
        self.post_init()

    def stock_head(self, state: Tensor) -> Tensor:
        """HF's head, which takes hidden states and reads the first token's: (b, H) -> (b, C)."""
        return self.classifier(state.unsqueeze(1))
