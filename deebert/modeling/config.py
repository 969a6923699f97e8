"""The fields that early exit adds to a backbone's config, and how the threshold in it becomes cut-offs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from deebert.modeling.exit_rules import NO_EXIT, ExitRule, make_rule, plain_threshold


@dataclass(kw_only=True)
class HighwayConfig:
    """Mixin in front of an HF config. Checkpoints without these fields get the defaults, which are the paper's.

    exit_threshold: a sample exits at the first off-ramp whose uncertainty (entropy in nats, unless exit_rule says
        otherwise) is below it. One number, or one per layer (N-1 off-ramps; an N-th value is allowed and has no
        meaning). <= 0: nothing exits early. Its name in the original and in 0.5, early_exit_entropy, is an alias.
    exit_rule: which uncertainty, a key of exit_rules.EXIT_RULES.
    patience_tolerance: the difference up to which values of a regression model agree, for the rule patience.
    exit_temperatures: N numbers, the last is the final classifier's; an exit's logits are divided by its own. None: 1.
    highway_pooling: what an off-ramp reads, a key of off_ramps.POOLINGS.
    highway_head: what its classifier is, one of off_ramps.HEADS: after BERT's pooler (the paper), or linear alone.
    """

    ALIASES: ClassVar[dict[str, str]] = {"early_exit_entropy": "exit_threshold"}
    OF_0_5: ClassVar[tuple[str, ...]] = ("train_strategy", "distill", "distill_temperature")  # no longer stored here

    exit_threshold: float | list[float] = NO_EXIT
    exit_rule: str = "entropy"
    patience_tolerance: float = 0.5
    exit_temperatures: list[float] | None = None
    highway_pooling: str = "first"
    highway_head: str = "pooler"

    def __post_init__(self, **kwargs):
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in self.OF_0_5})


def add_highway_fields(config, config_class: type) -> None:
    """Turns a plain HF config, in place, into a `config_class`: with the fields of HighwayConfig and their aliases."""
    if isinstance(config, HighwayConfig):
        return
    for alias, name in HighwayConfig.ALIASES.items():
        if alias in vars(config):
            setattr(config, name, vars(config).pop(alias))
    for field in dataclasses.fields(HighwayConfig):
        if not hasattr(config, field.name):
            setattr(config, field.name, field.default)
    config.__class__ = config_class


def config_rule(config) -> ExitRule:
    """The exit rule of a config. Raises ValueError for an unknown one."""
    return make_rule(config.exit_rule, config.num_labels, config.patience_tolerance, has_several_labels(config))


def has_several_labels(config) -> bool:
    """Whether a sample may have any number of labels, each a prediction of its own."""
    return config.problem_type == "multi_label_classification"


def config_cutoffs(config, exit_threshold: float | Sequence[float] | None = None) -> tuple[ExitRule, list[float]]:
    """The exit rule, and a cut-off for each of the N-1 off-ramps: of this threshold, None: of the config's.

    Raises ValueError for a threshold that the rule or the model does not have.
    """
    rule = config_rule(config)
    threshold = config.exit_threshold if exit_threshold is None else exit_threshold
    return rule, rule.cutoffs(threshold, config.num_hidden_layers)


def set_threshold(config, value: float | Sequence[float]) -> None:
    """Stores a threshold, or one per layer, in a config. Raises ValueError (see `ExitRule.cutoffs`)."""
    config_cutoffs(config, value)
    config.exit_threshold = plain_threshold(value)


def set_rule(config, name: str, threshold: float | Sequence[float], has_head: bool) -> None:
    """Stores rule and threshold in a config of a model with or without a learning-to-exit head. Raises ValueError."""
    rule = make_rule(name, config.num_labels, config.patience_tolerance, has_several_labels(config))
    rule.cutoffs(threshold, config.num_hidden_layers)
    rule.check_head(has_head)
    config.exit_rule, config.exit_threshold = name, plain_threshold(threshold)
