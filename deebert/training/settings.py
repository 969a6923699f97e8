"""The hyper-parameters of a training: a dataclass for Python, whose fields are flags of the command line, too."""

import math
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from deebert.training.strategies import STRATEGIES
from deebert.utils.settings import check_choice, check_numbers


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The hyper-parameters of one stage. The defaults are the original's. Raises InputError for values without meaning.

    An optimizer step takes per_gpu_train_batch_size x gradient_accumulation_steps x processes samples.
    """

    _argument_group_name = "Training: strategy, loss and optimizer"

    train_strategy: str = HfArg(
        default="two_stage",
        help="which exits' losses are trained in which stage",
        metadata={"choices": tuple(STRATEGIES)},
    )
    distill: float = HfArg(
        default=0.0,
        help="share of an off-ramp's loss that is its distance from the final classifier's logits; 0.5 if bare",
        metadata={"nargs": "?", "const": 0.5},
    )
    per_gpu_train_batch_size: int = HfArg(default=8, help="samples of a micro-batch in each process")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches of an optimizer step")
    learning_rate: float = HfArg(default=5e-5, help="peak of the linear schedule")
    highway_learning_rate: float | None = HfArg(
        default=None, help="learning rate of the off-ramps (default: that of the recipe, else learning_rate)"
    )
    weight_decay: float = HfArg(default=0.0, help="biases and LayerNorm weights have none")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: float = HfArg(default=3.0, help="epochs of each stage")
    max_steps: int = HfArg(
        default=-1, help="optimizer steps of each stage, in place of epochs; 0 or below: epochs count"
    )
    warmup_steps: int = HfArg(default=0, help="optimizer steps of linear warm-up")
    seed: int = HfArg(default=42, help="seed of initialisation, dropout and the order of batches")
    logging_steps: int = HfArg(default=50, help="optimizer steps between two log entries; 0: no log")
    save_steps: int = HfArg(default=50, help="optimizer steps between two checkpoints; 0: none within a stage")

    def __post_init__(self):
        check_choice(self, "train_strategy", STRATEGIES)
        check_numbers(self, "per_gpu_train_batch_size", "gradient_accumulation_steps", at_least=1)
        check_numbers(self, "learning_rate", "highway_learning_rate", "num_train_epochs", above=0)
        check_numbers(self, "weight_decay", "adam_epsilon", "max_grad_norm", at_least=0)
        check_numbers(self, "warmup_steps", "seed", "logging_steps", "save_steps", at_least=0)
        check_numbers(self, "distill", at_least=0, at_most=1)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the stage."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
