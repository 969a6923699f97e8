"""The command line of the driver as data: the original's flags with its defaults, and ours.

Each dataclass is a group of --help and checks itself. Nothing slow is imported, so that a wrong flag is named at once.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from deebert.data.label_values import PROBLEM_TYPES
from deebert.data.tasks import TASKS
from deebert.modeling.backbones import NAMES
from deebert.modeling.config import DEFAULT_MAX_SEQ_LENGTH
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.training.strategies import RATES_WIDTH, RECIPES, STRATEGIES, TrainSettings
from deebert.utils.cli import ArgumentParser, check_numbers, flag
from deebert.utils.errors import InputError

DESCRIPTION = (
    "Fine-tunes and evaluates DeeBERT on your own data or on a GLUE task. The defaults below are those of --recipe "
    "paper; with --train_file the fast recipe's take their place, see --recipe."
)
VALIDATION_SPLIT = 0.1


class Group:
    """A group of flags, a dataclass. Its docstring is the group's title in --help."""

    def __init_subclass__(cls):
        cls._argument_group_name = " ".join(cls.__doc__.split())


@dataclass(frozen=True, kw_only=True)
class RunArguments(Group):
    """Run: what is done, where the results are written, on which device"""

    do_train: bool = flag("train all stages of --train_strategy", default=False)
    do_eval: bool = flag("evaluate the model in output_dir", default=False)
    output_dir: str = flag("folder where the model is saved, and whose model --do_eval evaluates", default=MISSING)
    overwrite_output_dir: bool = flag("train over an earlier model and its results", default=False)
    resume: bool = flag(
        "continue from the newest checkpoint in output_dir; without one, start from the beginning", default=False
    )
    plot_data_dir: str | None = flag(
        "folder for the npy and CSV files (default: with --task_name ./plotting/, else results in output_dir)"
    )
    no_cuda: bool = flag("use the CPU even if there is a GPU", default=False)
    fp16: bool = flag("mixed precision on a GPU", default=False)

    def __post_init__(self):
        if not (self.do_train or self.do_eval):
            raise InputError("nothing to do: give --do_train or --do_eval")
        if Path(self.output_dir).name in ("", ".."):
            raise InputError(f"--output_dir {self.output_dir}: give a folder's name, results are named after it")


@dataclass(frozen=True, kw_only=True)
class ModelArguments(Group):
    """Model: the checkpoint, its off-ramps and its exit rule"""

    model_type: str | None = flag("the backbone (default: the checkpoint's)", choices=NAMES)
    model_name_or_path: str | None = flag(
        "the model to start from, a folder or a name on the hub; an evaluation's results get this name (default: "
        "output_dir's)"
    )
    config_name: str | None = flag("config to use in training (default: the model's)")
    tokenizer_name: str | None = flag("tokenizer to use (default: the model's)")
    cache_dir: str | None = flag("folder for models from the hub (default: the hub's own cache)")
    do_lower_case: bool = flag("lower-case the input of a BERT, whatever its tokenizer's settings say", default=False)
    recipe: str | None = flag(
        "how off-ramps are made, and all is trained. paper: as in the paper, or as the checkpoint's config says. "
        "fast: linear classifiers of the mean of all tokens, one of them before the first layer; 6 epochs of stage 2 "
        "on cached features; bfloat16 where the device has it; and as defaults "
        + ", ".join(f"--{x} {value:g}" for x, value in (RECIPES["fast"].defaults | RECIPES["fast"].checkpoints).items())
        + f", and for a model of {RATES_WIDTH} units, in proportion less for a wider one, "
        + ", ".join(f"--{name} {value:g}" for name, value in RECIPES["fast"].rates.items())
        + " (default: fast with --train_file, else paper)",
        choices=RECIPES,
    )
    highway_pooling: Literal["first", "mean"] | None = flag(
        "how an off-ramp pools the hidden states (default: the recipe's)"
    )
    exit_rule: str | None = flag(
        "the uncertainty that is compared with the threshold (default: the checkpoint's, else entropy)",
        choices=EXIT_RULES,
    )

    def off_ramps(self) -> dict[str, str | bool]:
        """The fields of a model's config that recipe and pooling decide."""
        wanted = dict(RECIPES[self.recipe].off_ramps) if self.recipe else {}
        if self.highway_pooling:
            wanted["highway_pooling"] = self.highway_pooling
        if self.highway_pooling == "first":  # the first token's embedding is the same in every text
            wanted["exit_before_first_layer"] = False
        return wanted


@dataclass(frozen=True, kw_only=True)
class DataArguments(Group):
    """Data: the task and how its texts become batches"""

    task_name: str | None = flag(f"one of {', '.join(TASKS)} (default: none, own data)")
    data_dir: str | None = flag("folder with the TSV files of --task_name")
    max_seq_length: int | None = flag(
        f"longer inputs are cut (default: {DEFAULT_MAX_SEQ_LENGTH}, or what the model has positions for; of an "
        "evaluation: that of the training)"
    )
    overwrite_cache: bool = flag("the original's: here nothing is cached", default=False)


@dataclass(frozen=True, kw_only=True)
class OwnDataArguments(Group):
    """Own data: CSV, TSV, JSONL or Parquet files in place of --task_name (docs/own_data.md). An evaluation takes what
    is not given here from the training of the model in output_dir
    """

    train_file: str | None = flag("texts with labels to train on")
    validation_file: str | None = flag("texts with labels to choose a threshold on (default: a part of --train_file)")
    test_file: str | None = flag("texts with labels that are only scored")
    validation_split: float | None = flag(
        f"share of --train_file that is held out where there is no --validation_file (default: {VALIDATION_SPLIT})"
    )
    text_column: str | None = flag("the column of the text, of pairs both with a comma (default: guessed by the names)")
    label_column: str | None = flag(
        "the column of the label, or with commas one column of 0 and 1 for each label (default: guessed by its name)",
        aliases="--label_columns",
    )
    column_names: str | None = flag("names of the columns, with commas, of files without a header line")
    label_separator: str | None = flag("what stands between the labels of a line that may have several")
    label_names: str | None = flag("file with a name in each line, for labels that are numbers from 0")
    problem_type: str | None = flag(
        "what the labels are (default: guessed by the labels; numbers are classes)", choices=PROBLEM_TYPES
    )

    def __post_init__(self):
        check_numbers(self, "validation_split", above=0, at_most=0.5)

    @property
    def files(self) -> dict[str, str]:
        """The files that are given."""
        return {name: value for name, value in asdict(self).items() if name.endswith("_file") and value}


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments(Group):
    """Checkpoints: what is written and scored during a training"""

    evaluate_during_training: bool = flag("score the dev set every logging_steps", default=False)
    load_best_model_at_end: bool = flag(
        "keep the weights of each stage with the best score of --evaluate_during_training; without it, score the dev "
        "set after each epoch that trains the backbone, keep the last weights that do not score less than the "
        "best by more than chance, and end the stage after two epochs in a row that are not kept (default: so with "
        "--train_file and the fast recipe)",
        default=False,
    )
    save_total_limit: int | None = flag(
        "how many of the latest checkpoints are kept, none at the end if 1 (default: that of the recipe, else all)"
    )

    def __post_init__(self):
        check_numbers(self, "save_total_limit", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments(Group):
    """Evaluation: what --do_eval scores and times, how it chooses a threshold"""

    eval_after_first_stage: bool = flag("score the final classifier after stage 1", default=False)
    eval_all_checkpoints: bool = flag("evaluate the checkpoints of --save_steps, too", default=False)
    eval_each_highway: bool = flag("write the score of every exit: each_layer.npy", default=False)
    eval_highway: bool = flag(
        "time early exit at each --exit_threshold, in several passes: entropy_{x}.npy", default=False
    )
    exit_threshold: list[float] = field(
        default_factory=lambda: [-1.0],
        metadata={
            "help": "thresholds in the exit rule's unit (nats for entropy); 0 or below: no early exit",
            "aliases": "--early_exit_entropy",
        },
    )
    per_gpu_eval_batch_size: int = flag("batch size of the timed passes; the others use 32", default=8)
    metric: str | None = flag(
        "the score: acc, f1:CLASS, recall:CLASS, f1_macro, f1_micro, mcc, spearmanr (default: as in the training, else "
        "the task's)"
    )
    risk: float | None = flag(
        "choose the fastest threshold that makes at most this share of unseen samples wrong, such as 0.02"
    )
    target_drop: float | None = flag(
        "choose the fastest threshold that lowers the score of unseen samples by at most this, such as 0.01"
    )
    answered_accuracy: float | None = flag(
        "choose which texts are handed over, without a label, so that of the others at least this share is right, such "
        "as 0.98"
    )

    def __post_init__(self):
        check_numbers(self, "per_gpu_eval_batch_size", at_least=1)
        check_numbers(self, "risk", "target_drop", "answered_accuracy", above=0, at_most=0.999)
        if None not in (self.risk, self.target_drop):
            raise InputError("--risk and --target_drop: a threshold is chosen for one of them; leave the other out")

    @property
    def chooses_threshold(self) -> bool:
        """Whether a threshold is chosen, and stored with the model."""
        return self.risk is not None or self.target_drop is not None


@dataclass(frozen=True)
class Arguments:
    """All flags, one group each. A function takes the group that it needs. Raises InputError where groups disagree."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    own: OwnDataArguments
    training: TrainSettings
    checkpoints: CheckpointArguments
    evaluation: EvaluationArguments

    def __post_init__(self):
        if self.own.files and (self.data.task_name or self.data.data_dir):
            raise InputError("--task_name and --data_dir are for GLUE's files; leave them out with your own")
        if self.run.do_train and not self.model.model_name_or_path:
            raise InputError("--do_train needs --model_name_or_path, the model to start from")
        if self.run.do_train and self.own.files and not self.own.train_file:
            raise InputError("--do_train needs --train_file")
        if not self.own.files:
            check_effect(self.own, "--train_file or --validation_file or --test_file")
        if not self.run.do_train:
            check_effect(self.run, "--do_train", "resume")
            check_effect(self.evaluation, "--do_train", "eval_after_first_stage")
        if not self.run.do_eval:
            check_effect(self.evaluation, "--do_eval", *EVALUATED)
        if self.run.do_train and self.checkpoints.save_total_limit == 1:
            check_effect(self.evaluation, "--save_total_limit 2 or more", "eval_all_checkpoints")
        if self.checkpoints.evaluate_during_training and not self.training.logging_steps:
            raise InputError("--evaluate_during_training: it scores every --logging_steps, and that is 0")

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether the checkpoints of a finished training are kept, as models: one alone is there to be resumed from."""
        return self.training.save_steps > 0 and self.checkpoints.save_total_limit != 1

    def stage_settings(self, stage: int, hidden_size: int) -> TrainSettings:
        """The hyper-parameters of a stage, from 1: all have the same, but for what the recipe changes.

        hidden_size: the width of the model.
        """
        recipe, scale = RECIPES[self.model.recipe], min(1.0, RATES_WIDTH / hidden_size)
        open_rates = {name: rate * scale for name, rate in recipe.rates.items() if getattr(self.training, name) is None}
        settings = replace(self.training, **open_rates)
        if recipe.highway_epochs and STRATEGIES[settings.train_strategy][stage - 1].trains == "off_ramps":
            return replace(settings, num_train_epochs=recipe.highway_epochs)
        return settings

    def as_dict(self) -> dict:
        """The values of all flags, by name."""
        return {name: value for group in vars(self).values() for name, value in asdict(group).items()}


EVALUATED = ("eval_all_checkpoints", "eval_each_highway", "eval_highway", "risk", "target_drop", "answered_accuracy")


def check_effect(group, needed: str, *names: str) -> None:
    """A flag that can have no effect beside the others is a mistake. names: of the group's flags; none: all of them."""
    for name in names or [each.name for each in fields(group)]:
        if getattr(group, name) not in (None, False):
            raise InputError(f"--{name} has no effect without {needed}: add it, or leave --{name} out")


class FlagParser(ArgumentParser, HfArgumentParser):
    """Makes the groups of `Arguments` of a command line. Its errors are InputErrors."""


def make_parser(program: str = "run_glue_deebert.py") -> FlagParser:
    """The parser of the driver's flags, with one group of --help for each group of `Arguments`."""
    groups = [each.type for each in fields(Arguments)]
    usage = f"{program} --output_dir DIR [flags]"
    return FlagParser(groups, prog=program, usage=usage, description=DESCRIPTION)


def parse_args(argv: Sequence[str] | None = None, program: str = "run_glue_deebert.py") -> Arguments:
    """argv: sys.argv[1:] if it is None. Raises InputError."""
    parser = make_parser(program)
    given = parser.parse_args(argv)  # reports unknown flags before values without meaning
    recipe = given.recipe or ("fast" if given.train_file and given.do_train else "paper")
    best = recipe == "fast" and given.train_file is not None  # GLUE's dev sets are there to be reported
    rates = dict.fromkeys(RECIPES[recipe].rates)  # None: they depend on the model
    results = "./plotting/" if given.task_name else None
    parser.set_defaults(
        plot_data_dir=results,
        recipe=recipe,
        load_best_model_at_end=best,
        **RECIPES[recipe].defaults,
        **RECIPES[recipe].checkpoints,
        **rates,
    )
    try:
        groups = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except InputError as error:  # a group's own check, which names a field
        raise InputError(str(error) if "--" in str(error) else f"--{error}") from None
    args = Arguments(*groups)
    name = args.model.model_name_or_path or args.run.output_dir
    return replace(args, model=replace(args.model, model_name_or_path=name))
