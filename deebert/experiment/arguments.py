"""The command line of run_glue_deebert.py as data: the original's flags with its defaults, and ours."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from deebert.data.tasks import Task
from deebert.evaluation.threshold_selection import CONFIDENCE, SelectionTarget
from deebert.experiment.data_arguments import DataArguments, OwnDataArguments, find_task, trained_defaults
from deebert.experiment.flags import add_flags, flag, number, switch
from deebert.experiment.training_arguments import RECIPES, CheckpointArguments, TrainingArguments
from deebert.modeling.checkpoints import MODELS
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.modeling.off_ramps import HEADS, POOLINGS
from deebert.training.settings import TrainSettings
from deebert.utils.cli import ArgumentParser, non_negative, positive, positive_float

DESCRIPTION = "Fine-tunes and evaluates DeeBERT on your own data or on a GLUE task."
OFF_RAMP_FLAGS = ("highway_pooling", "highway_head", "exit_before_first_layer")  # None: as the checkpoint's config says


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Run: what is done, where the results are written, on which device."""

    do_train: bool = switch("train all stages of --train_strategy", decides=None)
    do_eval: bool = switch("evaluate the model in output_dir", decides=None)
    output_dir: str = flag("folder where the model is saved, and whose model --do_eval evaluates", decides=None)
    overwrite_output_dir: bool = switch("train into a folder that is not empty", decides=None)
    plot_data_dir: str = flag("folder for the npy and CSV files", decides=None, default="./plotting/")
    no_cuda: bool = switch("use the CPU even if there is a GPU", decides=None)
    fp16: bool = switch("mixed precision on a GPU", decides="first_stage")
    bf16: bool = switch("mixed precision with bfloat16", decides="first_stage")
    seed: int = number(
        non_negative, "seed of initialisation, dropout and the order of batches", decides="first_stage", default=42
    )


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Model: the checkpoint, its off-ramps and its exit rule."""

    model_type: str | None = flag(  # another than the checkpoint's is refused
        "the backbone", decides=None, default=None, default_help="the checkpoint's", choices=tuple(MODELS)
    )
    model_name_or_path: str = flag(
        "a folder or a name on the hub; result files are stored under this name", decides="first_stage"
    )
    config_name: str | None = flag(
        "config to use in training", decides="first_stage", default=None, default_help="the model's"
    )
    tokenizer_name: str | None = flag(
        "tokenizer to use", decides="first_stage", default=None, default_help="the model's"
    )
    cache_dir: str | None = flag(
        "folder for models from the hub", decides=None, default=None, default_help="the hub's own cache"
    )
    do_lower_case: bool = switch(
        "lower-case the input of a BERT, whatever its tokenizer's settings say", decides="first_stage"
    )
    highway_pooling: str | None = flag(
        "how an off-ramp pools the hidden states",
        decides="training",
        default=None,
        default_help="the checkpoint's, else first",
        choices=tuple(POOLINGS),
    )
    highway_head: str | None = flag(
        "the classifier of an off-ramp: after a pooler like BERT's, or linear alone",
        decides="training",
        default=None,
        default_help="the checkpoint's, else pooler",
        choices=HEADS,
    )
    exit_before_first_layer: bool | None = flag(
        "an off-ramp on the embeddings, too: exit layer 0",
        decides="training",
        default=None,
        default_help="as the checkpoint, else off",
        action=argparse.BooleanOptionalAction,
    )
    exit_rule: str | None = flag(
        "the uncertainty that is compared with the threshold",
        decides=None,
        default=None,
        default_help="the checkpoint's, else entropy",
        choices=tuple(EXIT_RULES),
    )
    patience_tolerance: float | None = number(
        positive_float,
        "rule patience, regression: two outputs that differ by at most this agree",
        decides=None,
        default=None,
        default_help="the checkpoint's, else 0.5",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """Evaluation: what --do_eval scores and times, how it chooses a threshold, and where samples exit."""

    eval_after_first_stage: bool = switch("score the final classifier after stage 1", decides=None, needs=("do_train",))
    eval_all_checkpoints: bool = switch(
        "evaluate the checkpoints of --save_steps, too", decides=None, needs=("do_eval",)
    )
    eval_each_highway: bool = switch("write the score of every exit: each_layer.npy", decides=None, needs=("do_eval",))
    eval_highway: bool = switch(
        "time early exit at each --exit_threshold: entropy_{x}.npy", decides=None, needs=("do_eval",)
    )
    exit_threshold: Sequence[float] = number(
        float,
        "thresholds in the exit rule's unit (nats for entropy); 0 or below: no early exit",
        decides=None,
        default=[-1.0],
        nargs="+",
        alias="early_exit_entropy",
    )
    per_gpu_eval_batch_size: int = number(
        positive, "batch size of the timed passes; the others use 32", decides=None, default=8
    )
    timing_repeats: int = number(
        positive, "timed passes per threshold; the median is reported", decides=None, default=1
    )
    risk: float | None = number(
        float,
        "choose the fastest threshold that makes at most this share of unseen samples wrong, such as 0.02",
        decides=None,
        needs=("do_eval",),
        default=None,
        default_help="none",
    )
    target_drop: float | None = number(
        float,
        "choose the fastest threshold that lowers the score of unseen samples by at most this, such as 0.01",
        decides=None,
        needs=("do_eval",),
        default=None,
        default_help="none",
    )
    confidence: float | None = number(
        float,
        "probability with which the chosen threshold keeps that",
        decides=None,
        needs=("risk", "target_drop"),
        default=None,
        default_help=f"{CONFIDENCE['risk']} for --risk, {CONFIDENCE['drop']} for --target_drop",
    )

    @property
    def target(self) -> SelectionTarget | None:
        """The target that a threshold is chosen for, None without one. Raises InputError."""
        wanted = {"drop": self.target_drop, "risk": self.risk}
        if set(wanted.values()) == {None}:
            return None
        return SelectionTarget(**wanted, confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class Arguments(
    RunArguments,
    ModelArguments,
    DataArguments,
    OwnDataArguments,
    TrainingArguments,
    CheckpointArguments,
    EvaluationArguments,
):
    """All flags of run_glue_deebert.py. A function that needs one group of them takes that base class."""

    @cached_property  # own files are read once
    def task(self) -> Task:
        """See `find_task`."""
        return find_task(self)

    def stage_settings(self, stage: int) -> TrainSettings:
        """The hyper-parameters of a stage (from 1). All stages have the same, except for the number of epochs."""
        return TrainSettings(
            per_gpu_train_batch_size=self.per_gpu_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            highway_learning_rate=self.highway_learning_rate,
            weight_decay=self.weight_decay,
            adam_epsilon=self.adam_epsilon,
            max_grad_norm=self.max_grad_norm,
            num_train_epochs=self.highway_epochs if stage == 2 and self.highway_epochs else self.num_train_epochs,
            max_steps=self.max_steps,
            warmup_steps=self.warmup_steps,
            seed=self.seed,
            train_strategy=self.train_strategy,
            distill=self.distill,
            distill_temperature=self.distill_temperature,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
        )


def make_parser() -> argparse.ArgumentParser:
    """The parser of run_glue_deebert.py's flags, with one group for each class of them."""
    parser = ArgumentParser(prog="run_glue_deebert.py", description=DESCRIPTION)
    add_flags(parser, Arguments.__bases__)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """argv: sys.argv[1:] if it is None. Raises InputError."""
    parser = make_parser()
    parser.set_defaults(**trained_defaults(parser.parse_args(argv)))
    parser.set_defaults(**recipe_defaults(parser.parse_args(argv)))
    return Arguments(**vars(parser.parse_args(argv)))


def recipe_defaults(args: argparse.Namespace) -> dict:
    """The defaults that --recipe sets, without those that make no sense beside the flags that are given."""
    recipe = args.recipe or ("fast" if args.train_file and args.do_train else "paper")
    defaults = RECIPES[recipe] | {"recipe": recipe}
    if args.train_strategy != "two_stage":  # a long stage 2 and its cache are for a frozen backbone
        defaults.pop("highway_epochs", None)
        defaults.pop("cache_features", None)
    if args.highway_pooling == "first":  # it has nothing to read
        defaults.pop("exit_before_first_layer", None)
    return defaults
