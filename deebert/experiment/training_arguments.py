"""The flags of run_glue_deebert.py that are about training: the loss, the optimizer, logging and checkpoints."""

import argparse
from dataclasses import dataclass

from deebert.experiment.flags import flag, number, switch
from deebert.training.strategies import STRATEGIES
from deebert.utils.cli import fraction, non_negative, non_negative_float, positive, positive_float

# What --recipe sets; a flag that is given wins. docs/off_ramps.md has the measurements.
RECIPES: dict[str, dict] = {
    "paper": {},
    "fast": {
        "highway_pooling": "mean",
        "highway_head": "linear",
        "exit_before_first_layer": True,
        "highway_learning_rate": 5e-3,
        "highway_epochs": 6.0,
        "cache_features": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Training: strategy, loss and optimizer."""

    recipe: str | None = flag(
        "defaults of other flags; paper: none but the paper's; fast: "
        + ", ".join(f"{name} {value}" for name, value in RECIPES["fast"].items()),
        decides=None,  # the flags that it sets do
        default=None,
        default_help="paper with --task_name, fast with --train_file",
        choices=tuple(RECIPES),
    )
    train_strategy: str = flag(
        "which exits' losses are trained in which stage",
        decides="training",
        default="two_stage",
        choices=tuple(STRATEGIES),
    )
    distill: float = number(
        fraction,
        "share of a loss that is the distance from the output of the final classifier, or of --teacher; 0.5 without a "
        "number",
        decides="training",
        default=0.0,
        nargs="?",
        const=0.5,
    )
    distill_temperature: float = number(
        positive_float,
        "temperature that softens both outputs of --distill",
        decides="training",
        default=2.0,
        needs=("distill",),
    )
    teacher: str | None = flag(
        "what the last stage learns from with --distill: a folder with a fine-tuned model of the same task and "
        "vocabulary, or first_stage, the model after stage 1",
        decides="training",
        default=None,
        default_help="the final classifier",
    )
    first_stage: str | None = flag(
        "folder with the model after stage 1 of two_stage or mixed: loaded if it is there, else saved there",
        decides=None,
        default=None,
        default_help="none",
    )
    cache_features: bool = flag(
        "run the frozen backbone of stage 2 once, without dropout, not in every epoch",
        decides="training",
        default=False,
        default_help="off",
        action=argparse.BooleanOptionalAction,
    )
    per_gpu_train_batch_size: int = number(
        positive, "training batch size on each device", decides="first_stage", default=8
    )
    gradient_accumulation_steps: int = number(positive, "batches per optimizer step", decides="first_stage", default=1)
    learning_rate: float = number(positive_float, "peak of the linear schedule", decides="first_stage", default=5e-5)
    highway_learning_rate: float | None = number(
        positive_float,
        "learning rate of the off-ramps",
        decides="training",
        default=None,
        default_help="that of --learning_rate",
    )
    weight_decay: float = number(
        non_negative_float, "biases and LayerNorm weights have none", decides="first_stage", default=0.0
    )
    adam_epsilon: float = number(non_negative_float, "AdamW's epsilon", decides="first_stage", default=1e-8)
    max_grad_norm: float = number(
        non_negative_float, "gradients are clipped to this norm; 0: not clipped", decides="first_stage", default=1.0
    )
    num_train_epochs: float = number(positive_float, "epochs of each stage", decides="first_stage", default=3.0)
    highway_epochs: float | None = number(
        positive_float,
        "epochs of stage 2",
        decides="training",
        default=None,
        default_help="those of --num_train_epochs",
    )
    max_steps: int = number(
        int,
        "optimizer steps of each stage, in place of epochs; 0 or below: epochs count",
        decides="first_stage",
        default=-1,
    )
    warmup_steps: int = number(non_negative, "steps of linear warm-up", decides="first_stage", default=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments:
    """Logging and checkpoints: what is written during a training, and how it is resumed."""

    logging_steps: int = number(
        non_negative,
        "optimizer steps between two log entries; 0: no log",
        decides="first_stage",
        only_with="load_best_model_at_end",  # the steps at which the dev set is scored
        default=50,
    )
    evaluate_during_training: bool = switch("score the dev set every logging_steps", decides=None)
    load_best_model_at_end: bool = switch(
        "keep the weights of each stage with the best score of --evaluate_during_training", decides="first_stage"
    )
    save_steps: int = number(
        non_negative, "optimizer steps between two checkpoints; 0: none within a stage", decides=None, default=50
    )
    save_total_limit: int | None = number(
        positive, "how many of the latest checkpoints are kept", decides=None, default=None, default_help="all"
    )
    resume: bool = switch(
        "continue from the newest checkpoint in output_dir; without one, start from the beginning", decides=None
    )
