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
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
SIZES += ("local_attention",)  # of ModernBERT
REMOVED = "which version 0.9 no longer has; train the model again, or run it with version 0.8.0"
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(kw_only=True)
class ExitFields:
    """What early exit adds to a config. The defaults are the paper's.

    exit_threshold: a sample exits at the first off-ramp whose uncertainty (entropy in nats, unless exit_rule says
        otherwise) is below it. One number, or one for each off-ramp (one more is allowed and has no meaning).
        <= 0: nothing exits early. Its name in the original and in 0.5, early_exit_entropy, is an alias.
    exit_rule: which uncertainty, a key of exit_rules.EXIT_RULES.
    patience_tolerance: the difference up to which values of a regression model agree, for the rule patience.
    highway_pooling: what an off-ramp reads, a key of off_ramps.POOLINGS.
    highway_head: what its classifier is, one of off_ramps.HEADS: after BERT's pooler (the paper), or linear alone.
    exit_before_first_layer: whether there is an off-ramp on the embeddings, exit layer 0. It reads all tokens, so it
        needs the highway_pooling mean.
    exit_histogram: the rule and threshold that were chosen, and how many samples of the dev set then exit after each
        layer (`counts`, by layer). Runtimes compare what they see with it. None: no threshold was chosen.
    max_seq_length: the number of tokens that texts were cut to in training, so that a threshold holds for such texts.
        None: not known, as in models of 0.8 and before, whose default was 128.
    """

    ALIASES: ClassVar[dict[str, str]] = {"early_exit_entropy": "exit_threshold"}

    exit_threshold: float | list[float] = NO_EXIT
    exit_rule: str = "entropy"
    patience_tolerance: float = 0.5
    highway_pooling: str = "first"
    highway_head: str = "pooler"
    exit_before_first_layer: bool = False
    exit_histogram: dict | None = None
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

    OF_0_5: ClassVar[tuple[str, ...]] = ("train_strategy", "distill", "distill_temperature")  # no longer stored here

    def __post_init__(self, **kwargs):
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in self.OF_0_5})
        forget_unused(self)

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
    forget_unused(config)
    config.__class__ = config_class


def forget_unused(config) -> None:
    """Drops the field of temperatures where it is null, as in every config up to 0.8; `check_fields` refuses others."""
    if getattr(config, "exit_temperatures", 1) is None:
        del config.exit_temperatures


def check_architecture(model_type: str, config_class: type) -> None:
    """Raises ValueError where a checkpoint of this model_type is none for `config_class`."""
    if model_type != config_class.model_type:
        ours = config_class.__name__.removesuffix("Config")
        raise ValueError(
            f"a {model_type} checkpoint; {ours}ForSequenceClassification reads {config_class.model_type} checkpoints"
        )


def check_stored(facts: Mapping) -> None:
    """Raises ValueError where a stored config has two thresholds under two names, or what left the code in 0.9.

    A model that ignores one of these would give other predictions than the one that was saved.
    """
    for alias, name in ExitFields.ALIASES.items():
        if alias in facts and name in facts and facts[alias] != facts[name]:
            raise ValueError(f"{alias} is {facts[alias]!r}, and {name}, the same, is {facts[name]!r}; remove one")
    temperatures = facts.get("exit_temperatures")
    if temperatures is not None:
        raise ValueError(f"exit_temperatures is {str(temperatures)[:100]}, {REMOVED}")
    if facts.get("highway_pooling") == "attention":
        raise ValueError(f"highway_pooling is 'attention', {REMOVED}")


def check_fields(config) -> None:
    """Raises ValueError where the number of layers, the labels or a field of early exit have no meaning.

    Whether the threshold is one of the rule's is for `config_cutoffs`: commands change both before they load weights.
    """
    check_stored(vars(config))
    layers = config.num_hidden_layers
    if not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}; give a number from 1 to {MOST_LAYERS}")
    for name in SIZES:
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; give a number from 1")
    if config.problem_type not in (None, *PROBLEMS):
        raise ValueError(f"problem_type is {config.problem_type!r}; choose one of {', '.join(PROBLEMS)}")
    check_labels(config.id2label)
    padding = config.pad_token_id
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"pad_token_id is {padding!r}; give the id of the padding token")
    for name in ("exit_rule", "highway_pooling", "highway_head"):
        if not isinstance(getattr(config, name), str):
            raise ValueError(f"{name} is {getattr(config, name)!r}; give a name")
    config_rule(config)
    if not isinstance(config.exit_before_first_layer, bool):
        raise ValueError(f"exit_before_first_layer is {config.exit_before_first_layer!r}; give true or false")
    length = config.max_seq_length
    if length is not None and not (isinstance(length, int) and not isinstance(length, bool) and length > 0):
        raise ValueError(f"max_seq_length is {length!r}; give null, or a number of tokens")
    histogram = config.exit_histogram
    if histogram is not None and not is_histogram(histogram):
        raise ValueError(f"exit_histogram is {str(histogram)[:100]}; give null, or choose a threshold again")
    threshold = config.exit_threshold
    if not is_number(threshold) and not (isinstance(threshold, list | tuple) and all(map(is_number, threshold))):
        raise ValueError(f"exit_threshold is {threshold!r}; give a number, or a list with one for each off-ramp")
    if not is_number(config.patience_tolerance) or not config.patience_tolerance >= 0:
        raise ValueError(f"patience_tolerance is {config.patience_tolerance!r}; give a number from 0")


def is_histogram(value) -> bool:
    """Whether this can be an exit_histogram."""
    if not isinstance(value, dict) or {*value} != {"rule", "threshold", "counts"}:
        return False
    counts = value["counts"]
    return isinstance(counts, dict) and all(str(k).isdigit() and isinstance(n, int) for k, n in counts.items())


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


def is_number(value) -> bool:
    """Whether this is a number that a float can hold. NaN and infinity are."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return isinstance(float(value), float)
    except OverflowError:
        return False


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


def known_exit_counts(config) -> dict[int, int] | None:
    """The dev set's samples by exit layer; None where it was counted at another threshold or rule, or not."""
    histogram = config.exit_histogram
    if histogram is None or (histogram["rule"], histogram["threshold"]) != (config.exit_rule, config.exit_threshold):
        return None
    return {int(layer): int(count) for layer, count in histogram["counts"].items()}
