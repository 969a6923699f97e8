"""The fields that early exit adds to a backbone's config, and how the threshold in it becomes cut-offs."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from deebert.modeling.exit_rules import NO_EXIT, ExitRule, make_rule, plain_threshold

MANIFEST = "deebert_onnx.json"  # beside the config.json of an export; written last, so that the export is complete
DEFAULT_MAX_SEQ_LENGTH = 128  # tokens; the paper's
MOST_LAYERS = 1000  # no BERT comes near it; building more takes hours
REMOVED = "which version 0.9 no longer has; train the model again, or run it with version 0.8.0"
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


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
    exit_before_first_layer: whether there is an off-ramp on the embeddings, exit layer 0. It reads all tokens, so it
        needs the highway_pooling mean.
    max_seq_length: the number of tokens that texts were cut to in training, so that a threshold holds for such texts.
        None: not known; then 128.
    """

    ALIASES: ClassVar[dict[str, str]] = {"early_exit_entropy": "exit_threshold"}

    exit_threshold: float | list[float] = NO_EXIT
    exit_rule: str = "entropy"
    patience_tolerance: float = 0.5
    highway_pooling: str = "first"
    highway_head: str = "pooler"
    exit_before_first_layer: bool = False
    max_seq_length: int | None = None

    @property
    def exit_layers(self) -> range:
        """The layer of each exit, (E,): 1 to N, or 0 to N with exit_before_first_layer; N is the final classifier.

        `exit_layers[i]` is the layer of exit i, `exit_layers.index(layer)` the exit of a layer.
        """
        return range(0 if self.exit_before_first_layer else 1, self.num_hidden_layers + 1)


class HighwayConfig(ExitFields):
    """Mixin in front of an HF config. Checkpoints without the fields of early exit get their defaults."""

    # What is particular to a backbone; its config class says where it differs from BERT.
    pre_norm: ClassVar[bool] = False  # a layer's output is not normalised, so that off-ramps have to do it
    gated_mlp: ClassVar[bool] = False  # three matrices of hidden_size x intermediate_size in a layer, rather than two
    positions_after_padding: ClassVar[bool] = False  # position numbers begin with pad_token_id + 1
    first_token_only: ClassVar[bool] = True  # in evaluation the last layer is computed for the first token only

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As for any HF config. Raises ValueError for the config of another architecture."""
        check_architecture(config_dict.get("model_type", cls.model_type), cls)
        check_stored(config_dict)
        if config_dict.get("id2label") is not None:
            check_labels(config_dict["id2label"])
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do, see `auto_classes.AutoLoading`."""


def add_highway_fields(config, config_class: type) -> None:
    """Turns a plain HF config, in place, into a `config_class`: with the fields of HighwayConfig and their aliases.

    Raises ValueError for the config of another architecture, and for fields without meaning (see `check_fields`).
    """
    check_architecture(config.model_type, config_class)
    if not isinstance(config, HighwayConfig):
        make_highway_config(config, config_class)
    check_fields(config)


def make_highway_config(config, config_class: type) -> None:
    """The fields with their defaults, where the config does not have them, and its new class."""
    check_stored(vars(config))
    for alias, name in HighwayConfig.ALIASES.items():
        if alias in vars(config):
            setattr(config, name, vars(config).pop(alias))
    for field in dataclasses.fields(ExitFields):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)
    config.__class__ = config_class


def check_architecture(model_type: str, config_class: type) -> None:
    """Raises ValueError where a checkpoint of this model_type is none for `config_class`."""
    if model_type != config_class.model_type:
        ours = config_class.__name__.removesuffix("Config")
        raise ValueError(
            f"a {model_type} checkpoint; {ours}ForSequenceClassification reads {config_class.model_type} checkpoints"
        )


def check_stored(facts: Mapping) -> None:
    """Raises ValueError where a stored config has two different thresholds, or needs what left the code in 0.9."""
    if facts.get("exit_temperatures") is not None:
        raise ValueError(f"exit_temperatures is {str(facts['exit_temperatures'])[:100]}, {REMOVED}")
    if facts.get("highway_pooling") == "attention":
        raise ValueError(f"highway_pooling is 'attention', {REMOVED}")
    for alias, name in ExitFields.ALIASES.items():
        if alias in facts and name in facts and facts[alias] != facts[name]:
            raise ValueError(f"{alias} is {facts[alias]!r}, and {name}, the same, is {facts[name]!r}; remove one")


def check_fields(config) -> None:
    """Raises ValueError where the number of layers, the labels or a field of early exit have no meaning.

    Whether the threshold is one of the rule's is for `config_cutoffs`: commands change both before they load weights.
    """
    check_stored(vars(config))
    for name, (valid, wanted) in CHECKS.items():
        if hasattr(config, name) and not valid(value := getattr(config, name)):
            raise ValueError(f"{name} is {str(value)[:100]!r}; give {wanted}")
    check_labels(config.id2label)
    config_rule(config)


def is_whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value) -> bool:
    """Whether this is a number that a float can hold. NaN and infinity are."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return isinstance(float(value), float)
    except OverflowError:
        return False


def is_threshold(value) -> bool:
    return is_number(value) or (isinstance(value, list | tuple) and all(map(is_number, value)))


SIZE = (lambda value: is_whole(value, 1), "a number from 1")
CHECKS = {  # by the name of a field, where a config has it: what is valid, and the same in words
    "num_hidden_layers": (lambda n: is_whole(n, 1) and n <= MOST_LAYERS, f"a number from 1 to {MOST_LAYERS}"),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "local_attention"), SIZE),  # the latter is ModernBERT's
    "problem_type": (lambda value: value in (None, *PROBLEMS), f"one of {', '.join(PROBLEMS)}"),
    "pad_token_id": (lambda value: is_whole(value, 0), "the id of the padding token"),
    "exit_before_first_layer": (lambda value: isinstance(value, bool), "true or false"),
    "max_seq_length": (lambda value: value is None or is_whole(value, 1), "null, or a number of tokens"),
    "exit_threshold": (is_threshold, "a number, or a list with one for each off-ramp"),
    "patience_tolerance": (lambda value: is_number(value) and value >= 0, "a number from 0"),
    **dict.fromkeys(("exit_rule", "highway_pooling", "highway_head"), (lambda value: isinstance(value, str), "a name")),
}


def check_labels(id2label: dict) -> None:
    """Raises ValueError where this is no table of labels, each once, by the numbers of the outputs."""
    if not isinstance(id2label, dict) or {*map(str, id2label)} != {*map(str, range(len(id2label) or 1))}:
        raise ValueError(f"id2label is {str(id2label)[:100]}; give a name for each output: 0, 1, 2, ...")
    name, count = Counter(map(str, id2label.values())).most_common(1)[0]
    if count > 1:
        raise ValueError(f"id2label has {name[:100]!r} more than once; give each output a name of its own")
    try:
        "".join(map(str, id2label.values())).encode()
    except UnicodeError as error:
        raise ValueError(f"id2label has {error.object[error.start]!r}, which is no Unicode text") from None


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
    """The exit rule, and a cut-off for each off-ramp, (E-1,). What is None comes from the config.

    Raises ValueError for a threshold that the rule or the model does not have.
    """
    rule = config_rule(config, exit_rule)
    threshold = config.exit_threshold if exit_threshold is None else exit_threshold
    return rule, rule.cutoffs(threshold, len(config.exit_layers))


def set_threshold(config, value: float | Sequence[float]) -> None:
    """Stores a threshold, or one per off-ramp, in a config. Raises ValueError (see `ExitRule.cutoffs`)."""
    config_cutoffs(config, value)
    config.exit_threshold = plain_threshold(value)


def set_rule(config, name: str, threshold: float | Sequence[float]) -> None:
    """Stores rule and threshold in a config. Raises ValueError."""
    config_cutoffs(config, threshold, name)
    config.exit_rule, config.exit_threshold = name, plain_threshold(threshold)


def longest_text(config, wanted: int | None = None) -> int:
    """The number of tokens that texts are cut to: `wanted`, or where it is None what the training cut them to."""
    return wanted or config.max_seq_length or DEFAULT_MAX_SEQ_LENGTH
