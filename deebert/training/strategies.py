"""The training strategies (what each stage trains, and the weight of every exit's loss), hyper-parameters and recipes.

This module imports no torch: the command line names the strategies before anything slow is imported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deebert.utils.cli import check_numbers, flag
from deebert.utils.errors import InputError


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    trains: what is trained, as `train_stage` of a model takes it: "backbone" (with the final classifier), "off_ramps"
        (alone, all else is frozen) or "all".
    weights: (number of exits, step from 1) -> weight of each exit's loss.
    """

    trains: str
    weights: Callable[[int, int], list[float]]

    @property
    def skips_off_ramps(self) -> bool:
        """Whether one of the first 99 steps trains no off-ramp, so that the off-ramps' weights get no gradient."""
        return self.trains == "all" and not all(any(self.weights(3, step)[:-1]) for step in range(1, 100))


BACKBONE = Stage("backbone", lambda exits, step: [0.0] * (exits - 1) + [1.0])
OFF_RAMPS = Stage("off_ramps", lambda exits, step: [1.0] * (exits - 1) + [0.0])
ALL = Stage("all", lambda exits, step: [1.0] * exits)
BY_DEPTH = Stage("all", lambda exits, step: [i / (exits * (exits + 1) / 2) for i in range(1, exits + 1)])
IN_TURN = Stage("all", lambda exits, step: (BACKBONE if step % 2 else ALL).weights(exits, step))

STRATEGIES: dict[str, tuple[Stage, ...]] = {
    # DeeBERT, section 3.2: first the backbone and its classifier, then the off-ramps alone
    "two_stage": (BACKBONE, OFF_RAMPS),
    # Kubaty et al. (2025): first the backbone and its classifier, then all at once
    "mixed": (BACKBONE, ALL),
    # all at once, on the sum of all losses
    "joint": (ALL,),
    # PABEE (Zhou et al., 2020), section 3.3: the mean, weighted by the number of layers that an exit costs
    "weighted": (BY_DEPTH,),
    # BERxiT (Xin et al., 2021), section 3.2: the final loss and the sum of all losses in turn
    "alternating": (IN_TURN,),
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The hyper-parameters of one stage. The defaults are the original's. Raises InputError for values without meaning.

    An optimizer step takes per_gpu_train_batch_size x gradient_accumulation_steps x processes samples.
    """

    _argument_group_name = "Training: strategy, loss and optimizer"

    train_strategy: str = flag(
        "which exits' losses are trained in which stage", default="two_stage", choices=STRATEGIES
    )
    distill: float = flag(
        "share of an off-ramp's loss that is its distance from the final classifier's logits; 0.5 if bare",
        default=0.0,
        nargs="?",
        const=0.5,
    )
    per_gpu_train_batch_size: int = flag("samples of a micro-batch in each process", default=8)
    gradient_accumulation_steps: int = flag("micro-batches of an optimizer step", default=1)
    learning_rate: float = flag("peak of the linear schedule", default=5e-5)
    head_learning_rate: float | None = flag(
        "learning rate of the final classifier and its pooler (default: that of the recipe, else learning_rate)"
    )
    highway_learning_rate: float | None = flag(
        "learning rate of the off-ramps (default: that of the recipe, else learning_rate)"
    )
    weight_decay: float = flag("biases and LayerNorm weights have none", default=0.0)
    adam_epsilon: float = flag("AdamW's epsilon", default=1e-8)
    max_grad_norm: float = flag("gradients are clipped to this norm; 0: not clipped", default=1.0)
    num_train_epochs: float = flag("epochs of each stage", default=3.0)
    max_steps: int = flag("optimizer steps of each stage, in place of epochs; 0 or below: epochs count", default=-1)
    warmup_steps: int = flag("optimizer steps of linear warm-up", default=0)
    seed: int = flag("seed of initialisation, dropout and the order of batches", default=42)
    logging_steps: int = flag("optimizer steps between two log entries; 0: no log", default=50)
    save_steps: int = flag("optimizer steps between two checkpoints; 0: none within a stage", default=50)

    def __post_init__(self):
        if self.train_strategy not in STRATEGIES:
            raise InputError(f"train_strategy {self.train_strategy}: choose one of {', '.join(STRATEGIES)}")
        check_numbers(self, "per_gpu_train_batch_size", "gradient_accumulation_steps", at_least=1)
        check_numbers(self, "learning_rate", "head_learning_rate", "highway_learning_rate", "num_train_epochs", above=0)
        check_numbers(self, "weight_decay", "adam_epsilon", "max_grad_norm", at_least=0)
        check_numbers(self, "warmup_steps", "seed", "logging_steps", "save_steps", at_least=0)
        check_numbers(self, "distill", at_least=0, at_most=1)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the stage."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)


@dataclass(frozen=True)
class Recipe:
    """What a recipe decides; docs/off_ramps.md has the measurements.

    off_ramps: fields of the model's config; without them the checkpoint's count, else the paper's.
    defaults, checkpoints: of flags, where they are not given. rates: likewise, of a model up to RATES_WIDTH wide; a
        wider one takes less in proportion. highway_epochs: of a stage that trains the off-ramps alone.
    cache_features: such a stage runs the frozen backbone once, without dropout, not in every epoch.
    probes: whether a new final classifier reads the first token or the mean of all, whichever a probe of the frozen
        backbone prefers, and starts from a probe where there are few texts a label; without it the first token, or
        what the checkpoint's config says.
    bf16: whether the passes of a training compute in bfloat16, where the device can.
    """

    off_ramps: Mapping[str, str | bool] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    highway_epochs: float | None = None
    cache_features: bool = False
    probes: bool = False
    bf16: bool = False


RATES_WIDTH = 384
RECIPES = {
    "paper": Recipe(),
    "fast": Recipe(
        off_ramps={"highway_pooling": "mean", "highway_head": "linear", "exit_before_first_layer": True},
        defaults={
            "highway_learning_rate": 5e-3,
            "per_gpu_train_batch_size": 16,
            "num_train_epochs": 4.0,
        },
        checkpoints={"save_steps": 500, "save_total_limit": 1},
        rates={"learning_rate": 1e-4, "head_learning_rate": 1e-3},
        highway_epochs=6.0,
        cache_features=True,
        probes=True,
        bf16=True,
    ),
}
