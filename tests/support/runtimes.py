"""Every way to run a model, each a function from a trial to its outcome. Those of ONNX are in onnx_runtimes.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from cuda_graphs import GraphedDeeBert
from support.brute_force import AllExits

NEVER, ALWAYS = -1.0, float("inf")


@dataclass
class Trial:
    """A batch, and how it may exit.

    threshold: by a rule's name, in the units that users set. draw: 0 to 1, for choices of a runtime's own. reference:
    what the brute force knows about the batch.
    """

    model: object
    batch: dict[str, torch.Tensor]
    reference: AllExits
    rule: str
    threshold: Callable[[str], float | list[float]]
    draw: float
    exits: int = field(init=False)
    generator: np.random.Generator = field(init=False)

    def __post_init__(self):
        self.generator = np.random.default_rng(int(self.draw * 2**32))
        self.exits = len(self.model.config.exit_layers)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    @property
    def options(self) -> dict:
        return {"exit_threshold": self.threshold(self.rule), "exit_rule": self.rule}

    @property
    def masked(self) -> dict[str, torch.Tensor]:
        """The batch with a mask, which some runtimes cannot do without."""
        return {"attention_mask": torch.ones_like(self.batch["input_ids"])} | self.batch

    def rows(self, *wanted: int) -> dict[str, torch.Tensor]:
        """Some rows, without the columns at the end that are padding in all of them."""
        part = {name: tensor[list(wanted)] for name, tensor in self.batch.items()}
        used = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool().any(dim=0).nonzero()
        tokens = int(used.max()) + 1 if len(used) else 1
        return {name: tensor[:, :tokens] for name, tensor in part.items()}

    def masked_rows(self, *wanted: int) -> dict[str, torch.Tensor]:
        part = self.rows(*wanted)
        return {"attention_mask": torch.ones_like(part["input_ids"])} | part


@dataclass
class Outcome:
    """layers: (B,). logits: (B, C). entropy: (B,) of these logits, where the runtime says it.

    all_logits: of every exit, where the runtime says them. rule, thresholds: by which the samples
    exited, where these are not the trial's; thresholds has those of each sample (B, E-1). exits: an AllExits, where
    the outcome has to follow from other logits than those of the brute force.
    """

    layers: torch.Tensor
    logits: torch.Tensor
    entropy: torch.Tensor | None = None
    all_logits: torch.Tensor | None = None
    rule: str | None = None
    thresholds: list[list[float]] | None = None
    exits: AllExits | None = None

    @classmethod
    def of(cls, output, **others) -> "Outcome":
        return cls(output.exit_layer, output.logits, output.entropy, output.all_logits, **others)


def joined(parts: list) -> Outcome:
    """The outputs of several calls as one outcome."""
    return Outcome(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("exit_layer", "logits", "entropy"))
    )


def batch(trial: Trial) -> Outcome:
    return Outcome.of(trial.model(**trial.batch, **trial.options))


def one_at_a_time(trial: Trial) -> Outcome:
    return joined([trial.model(**trial.rows(row), **trial.options) for row in range(len(trial))])


def stored_threshold(trial: Trial) -> Outcome:
    trial.model.set_exit_rule(trial.rule, trial.threshold(trial.rule))
    return Outcome.of(trial.model(**trial.batch))


def every_exit(trial: Trial) -> Outcome:
    return Outcome.of(trial.model(**trial.batch, **trial.options, output_all_exits=True))


def hidden_states(trial: Trial) -> Outcome:
    return Outcome.of(trial.model(**trial.batch, **trial.options, output_hidden_states=True))


def one_exit(trial: Trial) -> Outcome:
    """`output_layer`: all samples at one exit, whatever the rule."""
    wanted = int(trial.draw * trial.exits * 0.999)
    layer = trial.model.config.exit_layers[wanted]
    output = trial.model(**trial.batch, output_layer=layer - 1)
    thresholds = [ALWAYS if i == wanted else NEVER for i in range(trial.exits - 1)]
    return Outcome.of(output, rule="entropy", thresholds=[thresholds] * len(trial))


def layer_graphs(trial: Trial) -> Outcome:
    """The CUDA graphs' loop, on the GPU where there is one. It runs twice, since its buffers stay."""
    model = trial.model
    model.set_exit_rule(trial.rule, trial.threshold(trial.rule))
    runtime = GraphedDeeBert(model.to("cuda" if torch.cuda.is_available() else "cpu"), speculate=trial.draw < 0.5)
    runtime(**trial.rows(*reversed(range(len(trial)))))
    return Outcome.of(runtime(**trial.batch))


PYTORCH = {
    "PyTorch, batch": batch,
    "PyTorch, one at a time": one_at_a_time,
    "PyTorch, stored threshold": stored_threshold,
    "PyTorch, every exit": every_exit,
    "PyTorch, hidden states": hidden_states,
    "PyTorch, one exit": one_exit,
    "layer graphs, speculating or not": layer_graphs,
}
