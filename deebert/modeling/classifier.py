"""The classifier that all backbones share: embed, run the layers with exits, score, loss.

Shapes: B batch, T tokens, H hidden, N layers, E exits (see config.exit_layers), C labels; b samples are still active.
"""

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

from deebert.modeling.config import config_cutoffs, config_rule, has_several_labels, replacing_a_part, set_rule
from deebert.modeling.early_exit import ActiveBatch, ExitRequest, exits_of
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, prediction_entropy
from deebert.modeling.first_token import needs_full_last_layer
from deebert.modeling.off_ramps import classifier_dropout, is_off_ramp, mean_weights
from deebert.utils.arrays import token_lengths

CLASSES = "single_label_classification"
STAGES = ("backbone", "off_ramps", "all")


@dataclass
class HighwayClassifierOutput(SequenceClassifierOutput):
    """HF's classifier output (loss, logits, hidden_states, attentions), and what early exit adds.

    logits: (B, C) of each sample's exit.
    exit_layer: (B,) the layer, from 1, at which each sample exited; 0: before the first layer.
    entropy: (B,) of `logits`, in nats; where a sample may have several labels, the largest binary entropy of a label.
    all_logits: (B, E, C) of every exit, the final classifier last; only if requested.
    """

    exit_layer: Tensor | None = None
    entropy: Tensor | None = None
    all_logits: Tensor | None = None


@dataclass
class AllExitsRequest(ExitRequest):
    """A pass in which every off-ramp runs for every sample, and no sample exits."""

    all_logits: list[Tensor] = field(default_factory=list)  # (B, C) of each off-ramp

    def consults(self, i: int) -> bool:
        return i < len(self.cutoffs)

    def let_exit(self, i: int, logits: Tensor) -> None:
        self.all_logits.append(logits)


class HighwayClassifier:
    """Mixin in front of an HF sequence classification class."""

    # The original has an off-ramp after the last layer too: never trained, yet consulted. It is not carried over.
    # Exit 0 can be switched off; 0.10 had a learning-to-exit head.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"\.(highway\.\d+|highway_embeddings|learn_to_exit)\."]

    accepts_loss_kwargs = (
        False  # the loss is a mean: Trainer has to divide it by the number of accumulated micro-batches
    )
    stage = "backbone"  # of the training, see `train_stage`

    def init_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold in the exit rule's units, one or one per off-ramp; it is saved, too. Raises ValueError."""
        self.base_model.encoder.set_exit_threshold(value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule (a key of EXIT_RULES) and threshold, which are saved with the model. Raises ValueError."""
        set_rule(self.config, name, threshold)

    def train_stage(self, stage: str) -> None:
        """Chooses what is trained, and on which loss: in training mode `forward(labels=...)` returns that of the stage.

        "backbone": the backbone and the final classifier, on its loss (the paper's stage 1). "off_ramps": these alone,
        on the sum of their losses (stage 2). "all": everything, on the sum of the losses of all exits. What is not
        trained is frozen. Raises ValueError.
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
        """Classifies a batch. Each sample exits at its own layer; results come in input order.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T), as for HF's models.
            inputs_embeds: (B, T, H) in place of input_ids.
            labels: (B,) long, or float where there is one label; (B, C) of 0 and 1 for
                `problem_type="multi_label_classification"`. Adds the loss of the returned logits; in training mode that
                of the stage (see `train_stage`).
            train_highway: the original's switch for stage 2: as in training mode after `train_stage("off_ramps")`, also
                where the backbone is not frozen. All exits are returned.
            output_layer: from 0, as in the original (the exit after layer 1; exit 0: -1); every sample gets this exit's
                logits, and nothing after it runs.
            output_all_exits: also return `all_logits` (B, E, C). Runs every layer.
            exit_threshold: in place of the config's, for this call. In training mode no sample exits.
            early_exit_entropy: the original's name for exit_threshold.
            exit_rule: in place of the config's, for this call: other threads may use another one at the same time.
            kwargs: `output_hidden_states`, `output_attentions` (both run every layer for every sample), `return_dict`.

        Raises ValueError for thresholds, a rule or an output_layer that the model does not have.
        """
        inputs = kwargs | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "return_dict": True,
        }
        if self.config.type_vocab_size:  # backbones without token types do not take them
            inputs["token_type_ids"] = token_type_ids
        if labels is not None and labels.is_floating_point() and self.num_labels > 1 and not self.config.problem_type:
            self.config.problem_type = "multi_label_classification"  # as HF's loss would do, after samples have exited
        stage = "off_ramps" if train_highway else self.stage if self.training and labels is not None else "backbone"
        rule, cutoffs = self._cutoffs(
            early_exit_entropy if exit_threshold is None else exit_threshold, output_layer, exit_rule
        )
        can_exit, all_exits = any(cutoff > 0 for cutoff in cutoffs), output_all_exits or stage != "backbone"
        full_batches = self._needs_full_batches(kwargs)
        short = not needs_full_last_layer(
            self.config, self.base_model.encoder.layer[-1], full_batches or any(map(_given, kwargs.values()))
        )
        if all_exits or (can_exit and full_batches):
            output = self._all_exits(inputs, rule, cutoffs, short, stage)
        elif can_exit or short:
            output = self._with_exits(inputs, rule, cutoffs, short)
        else:
            output = self._plain(inputs)
        return self._with_loss(output, labels, stage, all_exits)

    def _plain(self, inputs: dict) -> HighwayClassifierOutput:
        """Path 1: Hugging Face's own pass, as in training the backbone."""
        outputs = self.base_model(**inputs)
        logits = self._logits_of(outputs, self.pooling_weights(inputs["attention_mask"], off_ramps=False))
        return _output(logits, torch.full_like(logits[:, 0], self.config.num_hidden_layers, dtype=torch.long), outputs)

    def _with_exits(
        self, inputs: dict, rule: ExitRule, cutoffs: Sequence[float], short: bool
    ) -> HighwayClassifierOutput:
        """Path 2: samples exit on their way through the layers. short: the last one for the first token only."""
        batch = self._batch(inputs, off_ramps=any(cutoff > 0 for cutoff in cutoffs))
        request = ExitRequest(batch, rule, cutoffs, self.config.exit_layers, short)
        outputs = self.base_model(**inputs, exits=request)
        if len(batch):
            logits = self._logits_of(outputs, batch.pooling_weights)
            request.exited.add(batch.index, logits, self.config.num_hidden_layers)
        return _output(*request.exited.in_input_order(), outputs)

    def _all_exits(
        self, inputs: dict, rule: ExitRule, cutoffs: Sequence[float], short: bool, stage: str
    ) -> HighwayClassifierOutput:
        """Path 3: every layer and every off-ramp run for every sample; where each would exit follows from that."""
        batch, gradients = self._batch(inputs), torch.is_grad_enabled()
        request = AllExitsRequest(batch, rule, cutoffs, self.config.exit_layers, short, train_off_ramps=gradients)
        with torch.set_grad_enabled(gradients and stage != "off_ramps"):
            outputs = self.base_model(**inputs, exits=request)
            final_logits = self._logits_of(outputs, batch.pooling_weights)
        all_logits = torch.stack([*request.all_logits, final_logits], dim=1)
        logits, exit_layer = exits_of(all_logits, rule, cutoffs, self.config.exit_layers)
        return _output(logits, exit_layer, outputs, all_logits)

    def _with_loss(
        self, output: HighwayClassifierOutput, labels: Tensor | None, stage: str, all_exits: bool
    ) -> HighwayClassifierOutput:
        """The output with the loss of a stage, and the entropy of its logits."""
        results, loss = dict(output), None
        all_logits = results.pop("all_logits", None)
        if labels is not None:
            exits = {"backbone": slice(0), "off_ramps": slice(-1), "all": slice(None)}[stage]
            trained = [output.logits] if stage == "backbone" else all_logits[:, exits].unbind(dim=1)
            loss = sum(self._loss(logits, labels) for logits in trained)
        entropy = prediction_entropy(output.logits.detach(), has_several_labels(self.config))
        return HighwayClassifierOutput(
            loss=loss, **results, entropy=entropy, all_logits=all_logits if all_exits else None
        )

    def _batch(self, inputs: dict, off_ramps: bool = True) -> ActiveBatch:
        """All samples, before the first layer. off_ramps: whether any runs, and not the final classifier alone."""
        mask, given = inputs["attention_mask"], inputs["input_ids"]
        size = len(inputs["inputs_embeds"] if given is None else given)
        lengths = token_lengths(mask) if off_ramps and size > 1 else None  # a batch of one never shrinks
        return ActiveBatch(np.arange(size), lengths, pooling_weights=self.pooling_weights(mask, off_ramps))

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
        classes = self.num_labels > 1 if self.config.problem_type is None else self.config.problem_type == CLASSES
        labels = labels if classes else labels.to(logits.dtype)
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
            _given(kwargs.get(name, getattr(self.config, name, False)))
            for name in ("output_hidden_states", "output_attentions")
        )


def _given(value) -> bool:
    return value is not None and value is not False


def _output(logits: Tensor, exit_layer: Tensor, outputs: BaseModelOutput, all_logits: Tensor | None = None):
    return HighwayClassifierOutput(
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        exit_layer=exit_layer,
        all_logits=all_logits,
    )


class StockHeadClassifier(HighwayClassifier):
    """Mixin in front of an HF sequence classification class: its own head, after a backbone with off-ramps.

    model_class: the backbone with off-ramps. model_options: keyword arguments for it.
    """

    model_class: type
    model_options: ClassVar[dict] = {}

    def __init__(self, config):
        with replacing_a_part(config, self.config_class):
            super().__init__(config)  # HF's class with its head, and with a backbone without off-ramps
            setattr(self, self.base_model_prefix, self.model_class(config, **self.model_options))
        self.post_init()

    def final_state(self, hidden_states: Tensor, pooling_weights: Tensor | None) -> Tensor:
        """The first token's state: (b, T, H) -> (b, H)."""
        return hidden_states[:, 0]

    def classify(self, state: Tensor) -> Tensor:
        """HF's head, which takes the hidden states of all tokens, and reads the first: (b, H) -> (b, C)."""
        return self.classifier(state.unsqueeze(1))
