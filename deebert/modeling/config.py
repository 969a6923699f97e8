"""The fields that early exit adds to a backbone's config, and how the threshold in it becomes cut-offs."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from deebert.modeling import config_checks as checks
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, make_rule

MANIFEST = "deebert_onnx.json"  # beside the config.json of an export; written last, so that the export is complete
DEFAULT_MAX_SEQ_LENGTH = 128  # tokens; the paper's


@dataclass(kw_only=True)
class ExitFields:
    """What early exit adds to a config. The defaults are the paper's.

    exit_threshold: a sample exits at the first off-ramp whose uncertainty (entropy in nats, unless exit_rule says
        otherwise) is below it. One number, or one for each off-ramp (one more is allowed and has no meaning).
        <= 0: nothing exits early. early_exit_entropy, its name in the original, is an alias.
    exit_rule: which uncertainty, a key of exit_rules.EXIT_RULES.
    patience_tolerance: the difference up to which values of a regression model agree, for the rule patience.
    highway_pooling: what an off-ramp reads, a key of off_ramps.POOLINGS.
    highway_head: what its classifier is, one of off_ramps.HEADS: after BERT's pooler (the paper), or linear alone.
    classifier_pooling: what the final classifier reads, a key of off_ramps.CLASSIFIER_POOLINGS; of a mean it is linear.
    exit_before_first_layer: whether there is an off-ramp on the embeddings, exit layer 0. It reads all tokens, so it
        needs the highway_pooling mean.
    min_confidence: a text is handed over, without a label, where the probability of the label is below it.
    max_seq_length: the number of tokens that texts were cut to in training, so that a threshold holds for such texts.
        None: not known; then 128.
    """

    exit_threshold: float | list[float] = NO_EXIT
    exit_rule: str = "entropy"
    patience_tolerance: float = 0.5
    highway_pooling: str = "first"
    highway_head: str = "pooler"
    classifier_pooling: str = "cls"
    exit_before_first_layer: bool = False
    min_confidence: float = 0.0
    max_seq_length: int | None = None

    @property
    def exit_layers(self) -> range:
        """The layer of each exit, (E,): 1 to N, or 0 to N with exit_before_first_layer; N is the final classifier.

        `exit_layers[i]` is the layer of exit i, `exit_layers.index(layer)` the exit of a layer.
        """
        return range(0 if self.exit_before_first_layer else 1, self.num_hidden_layers + 1)


class HighwayConfig(ExitFields):
    """Mixin in front of an HF config. Checkpoints without the fields of early exit get their defaults."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)  # HF's reads attributes by the names in this map, too
        cls.attribute_map = cls.attribute_map | checks.ALIASES

    # What is particular to a backbone; its config class says where it differs from BERT.
    pre_norm: ClassVar[bool] = False  # a layer's output is not normalised, so that off-ramps have to do it
    gated_mlp: ClassVar[bool] = False  # three matrices of hidden_size x intermediate_size in a layer, rather than two
    positions_after_padding: ClassVar[bool] = False  # position numbers begin with pad_token_id + 1
    # what Trainer leaves out of its predictions, which are then the logits alone
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "exit_layer", "entropy", "all_logits"]

    @property
    def linear_classifier(self) -> bool:
        """Whether the final classifier is a linear one in place of HF's head."""
        return self.classifier_pooling == "mean"

    @property
    def first_token_only(self) -> bool:
        """Whether the last layer is computed for the first token alone in evaluation, since nothing else is read."""
        return not self.linear_classifier

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As for any HF config. Raises ValueError for the config of another architecture."""
        checks.check_architecture(config_dict.get("model_type", cls.model_type), cls)
        checks.check_stored(config_dict)
        if config_dict.get("id2label") is not None:
            checks.check_labels(config_dict["id2label"])
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do, see `auto_classes.AutoLoading`."""


@contextmanager
def building_with(config, config_class: type) -> Iterator[None]:
    """In this block a constructor may build a model. It turns a plain HF config, in place, into a `config_class`.

    The checkpointing of activations is for the parts of ours: HF's own, which they replace, would use the field up.
    Raises ValueError for the config of another architecture, and for fields without meaning.
    """
    checks.check_architecture(config.model_type, config_class)
    if not isinstance(config, HighwayConfig):
        checks.check_stored(vars(config))
        for alias, name in checks.ALIASES.items():
            if alias in vars(config):
                setattr(config, name, vars(config).pop(alias))
        for field in dataclasses.fields(ExitFields):
            if not hasattr(config, field.name):
                setattr(config, field.name, field.default)
        config.__class__ = config_class
    checks.check_fields(config)
    config_rule(config)
    checkpointing = vars(config).pop("gradient_checkpointing", False)
    yield
    if checkpointing:
        config.gradient_checkpointing = True


def config_rule(config, name: str | None = None) -> ExitRule:
    """The exit rule of a config, or the one of this name for its labels. Raises ValueError for an unknown one."""
    name = config.exit_rule if name is None else name
    return make_rule(name, config.num_labels, config.patience_tolerance, has_several_labels(config))


def has_several_labels(config) -> bool:
    """Whether a sample may have any number of labels, each a prediction of its own."""
    return config.problem_type == "multi_label_classification"


def config_cutoffs(
    config, exit_threshold: float | Sequence[float] | None = None, exit_rule: str | None = None
) -> tuple[ExitRule, list[float]]:
    """The exit rule and a cut-off for each off-ramp, (E-1,). What is None comes from the config. Raises ValueError."""
    rule = config_rule(config, exit_rule)
    threshold = config.exit_threshold if exit_threshold is None else exit_threshold
    return rule, rule.cutoffs(threshold, len(config.exit_layers))


def set_rule(config, name: str, threshold: float | Sequence[float]) -> None:
    """Stores rule and threshold in a config. Raises ValueError."""
    config_cutoffs(config, threshold, name)
    config.exit_rule, config.exit_threshold = name, checks.plain_threshold(threshold)


class ThresholdSetters:
    """Mixin for what runs by a `config`: a model, its encoder, an exported model."""

    def set_exit_threshold(self, value: float | Sequence[float]) -> None:
        """Sets the threshold in the exit rule's units, one or one per off-ramp; a model saves it. Raises ValueError."""
        set_rule(self.config, self.config.exit_rule, value)

    set_early_exit_entropy = set_exit_threshold  # the original's name

    def set_exit_rule(self, name: str, threshold: float | Sequence[float] = NO_EXIT) -> None:
        """Sets rule (a key of EXIT_RULES) and threshold; a model saves both. Raises ValueError."""
        set_rule(self.config, name, threshold)


def longest_text(config, wanted: int | None = None) -> int:
    """The number of tokens that texts are cut to: `wanted`, or where it is None what the training cut them to."""
    return wanted or config.max_seq_length or DEFAULT_MAX_SEQ_LENGTH
