"""One stage of training, from its data to its last step. strategies.py says what it trains, losses.py on what loss."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.data.batching import MicroBatch, TrainBatches
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.losses import training_loss
from deebert.training.strategies import STRATEGIES, TrainSettings
from deebert.training.train_data import TrainData
from deebert.utils.errors import InputError


def parameter_groups(model, settings: TrainSettings) -> list[dict]:
    """The trained parameters: head and off-ramps at their own rates; biases and LayerNorm weights without decay."""
    own = (settings.learning_rate, settings.head_learning_rate, settings.highway_learning_rate)
    rates, decays = [rate or settings.learning_rate for rate in own], (settings.weight_decay, 0.0)
    groups = [{"params": [], "lr": rate, "weight_decay": decay} for rate in rates for decay in decays]
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}  # names differ
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith("bias") or id(parameter) in norms
            part = 2 if is_off_ramp(name) else int(is_head(model, name))
            groups[2 * part + exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def is_head(model, name: str) -> bool:
    """Whether a parameter is the final classifier's, or the pooler's that it reads, rather than the backbone's."""
    return not name.startswith(f"{model.base_model_prefix}.") or name.startswith(f"{model.base_model_prefix}.pooler.")


class ProgressLines(tqdm):
    """A progress bar where there is no terminal: a line every half minute ten times, then every 5 % of the samples."""

    LINE = (
        "{desc}: {n:,} of {total:,} samples ({percentage:.0f} %){postfix}, {rate_noinv:,.1f}{unit}/s, {remaining} left"
    )

    def __init__(self, **options):
        self.lines = 0
        options |= {"miniters": 1, "mininterval": 30, "maxinterval": math.inf, "smoothing": 0, "bar_format": self.LINE}
        super().__init__(**options, file=io.StringIO())  # not to the terminal, nor the empty bar

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and self.n > self.initial:
            print(self, flush=True)
            self.lines += 1
            self.miniters = 1 if self.lines < 10 else self.total / 20


class StageTraining:
    """One stage (from 1) of the strategy: `total` optimizer steps, of which `steps` are done; fewer if it ends early.

    Every stage has its own optimizer and linear schedule. `run` trains the model in place. With the model's weights and
    the random states, `state_dict` is all that is needed to continue bit for bit.

    bf16: whether the passes compute in bfloat16; weights, optimizer and loss are in float32.
    best, best_step: the best dev score so far, and the step whose weights are kept; None without evaluation. The caller
        sets them.
    """

    PROGRESS = ("steps", "total", "seconds", "samples", "loss_sum", "sums", "counts", "best", "best_step")

    def __init__(
        self, stage: int, model, data: TrainData, settings: TrainSettings, accelerator: Accelerator, bf16: bool = False
    ):
        self.stage, self.model, self.data, self.settings, self.accelerator = stage, model, data, settings, accelerator
        self.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
        self.plan = STRATEGIES[settings.train_strategy][stage - 1]
        model.train_stage(self.plan.trains)
        self.batches = TrainBatches(
            data.lengths,
            settings.per_gpu_train_batch_size,
            settings.seed,
            settings.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.total = settings.total_steps(len(self.batches))
        fused = accelerator.device.type in ("cpu", "cuda")  # one pass over the weights: a CPU takes a ninth of its time
        optimizer = torch.optim.AdamW(parameter_groups(model, settings), eps=settings.adam_epsilon, fused=fused)
        self.module, self.optimizer = accelerator.prepare(data.trainee(model), optimizer)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, settings.warmup_steps, self.total)

        self.steps, self.seconds, self.samples, self.loss_sum = 0, 0.0, 0, 0.0
        self.best: float | None = None
        self.best_step: int | None = None
        # since the last log entry: sums of the loss and of each exit's own loss (1 + E,), and how many were added
        self.sums = torch.zeros(1 + len(model.config.exit_layers), dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    @property
    def stateful(self) -> dict:
        """What has a state of its own, by its name in `state_dict`."""
        scaler = {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler}
        return {"optimizer": self.optimizer, "schedule": self.schedule, **scaler}

    def state_dict(self) -> dict:
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        return progress | {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError or ValueError for the state of another training."""
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(self.steps, 1)

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    def run(
        self,
        log: Callable[["StageTraining", dict[str, float]], None] = lambda training, scalars: None,
        epoch: Callable[["StageTraining"], bool] = lambda training: False,
        save: Callable[["StageTraining"], None] = lambda training: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Makes the remaining optimizer steps. Returns False if `stopped` was True in any process before the end.

        `log` gets loss, each exit's loss, learning_rate and grad_norm every logging_steps and at the end. `epoch` is
        called after each epoch, in all processes; the stage ends where it returns True. `save` is called every
        save_steps, at the end and when stopped. Raises InputError if the loss is not finite.
        """
        loader = self.data.load(part.rows for part in self.remaining())
        losses, started = 0.0, time.perf_counter()  # `seconds` excludes the callbacks
        with self.progress_bar() as bar:
            for part, batch in zip(self.remaining(), loader, strict=True):
                # forward and backward: the share of this micro-batch in the gradient of the step
                weights = self.plan.weights(len(self.model.config.exit_layers), self.steps + 1)
                with nullcontext() if part.last else self.accelerator.no_sync(self.module):
                    loss, exit_losses = self.losses(batch, weights)
                    self.accelerator.backward(part.weight * loss)
                share = part.weight / self.accelerator.num_processes
                losses = losses + share * torch.cat([loss.detach().reshape(1), exit_losses])  # (1 + E,)
                if not part.last:
                    continue

                # the step, with the losses of all processes
                stop = self.add_up(losses, weights, part, stopped())
                norm = self.step()
                losses = 0.0
                self.samples += len(part.step_rows)
                self.seconds += time.perf_counter() - started
                bar.set_postfix(loss=f"{self.sums[0] / self.counts[0]:.4f}", step=self.steps, refresh=False)
                bar.update(len(part.step_rows))

                # what the caller does between two steps: scores, checkpoints
                if self.steps % len(self.batches) == 0 and epoch(self):
                    self.total = self.steps
                if self.due(self.settings.logging_steps):
                    log(self, self.scalars(norm))
                if stop or self.steps == self.total or self.due(self.settings.save_steps):
                    save(self)
                if stop or self.steps == self.total:
                    break
                started = time.perf_counter()
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)  # the next stage wraps other parameters
        self.accelerator.free_memory()
        return self.steps == self.total

    def remaining(self) -> Iterator[MicroBatch]:
        """This process's micro-batches of the steps that are left."""
        return self.batches.micro_batches(self.steps, self.total)

    def losses(self, batch: dict[str, Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and that of each exit (E,), without gradient."""
        self.module.train()  # an evaluation between two steps sets eval mode
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        labels, _ = batch.pop("labels"), batch.pop("index", None)
        options = {"output_all_exits": any(weights[:-1]), "train_highway": self.plan.trains == "off_ramps"}
        with self.autocast():
            output = convert_to_fp32(self.module(**batch, **options))
        return training_loss(output, labels, weights, self.settings.distill)

    def add_up(self, losses: Tensor, weights: list[float], part: MicroBatch, stopped: bool) -> bool:
        """Adds a step's losses (1 + E,) of all processes to the sums. Returns whether any process has to stop."""
        packed = torch.cat([losses.float(), losses.new_tensor([stopped])])
        *values, stop = self.accelerator.reduce(packed, "sum").tolist()
        if not math.isfinite(values[0]):
            samples = " ".join(str(row + 1) for row in sorted(part.step_rows.tolist())[:16])
            raise InputError(
                f"stage {self.stage}, step {self.steps + 1}: the loss is {values[0]}, on the training samples "
                f"{samples}{' ...' if len(part.step_rows) > 16 else ''}; lower the learning rate"
                + (" of the off-ramps" if self.plan.trains == "off_ramps" else "")
            )
        self.loss_sum += values[0]
        self.sums += torch.tensor(values, dtype=torch.float64)
        self.counts += torch.tensor([1, *(weight > 0 for weight in weights)])
        return stop > 0

    def step(self) -> Tensor | None:
        """Clips and applies the gradients. Returns their norm, None if they are not clipped."""
        norm = None
        if self.settings.max_grad_norm > 0:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16: the loss scale was too large
            self.schedule.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return norm

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps and at the end is due now; 0: never."""
        return every > 0 and (self.steps % every == 0 or self.steps == self.total)

    def scalars(self, norm: Tensor | None) -> dict[str, float]:
        """A log entry: the mean losses since the last one, learning rate and norm of the gradients."""
        loss, *exits = (self.sums / self.counts).tolist()  # not finite for an exit without a loss
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        by_layer = zip(self.model.config.exit_layers, exits, strict=True)
        return {
            "loss": loss,
            "learning_rate": self.schedule.get_last_lr()[0],
            **{f"loss_layer{layer}": value for layer, value in by_layer if math.isfinite(value)},
            **({} if norm is None else {"grad_norm": float(norm)}),
        }

    def progress_bar(self) -> tqdm:
        epochs, rest = divmod(self.total, len(self.batches))
        samples = epochs * len(self.data.lengths) + min(rest * self.batches.samples_per_step, len(self.data.lengths))
        return (tqdm if sys.stderr.isatty() else ProgressLines)(
            total=samples,
            initial=self.samples,
            desc=f"stage {self.stage}",
            unit=" samples",
            leave=sys.stderr.isatty(),
            disable=not self.accelerator.is_main_process,
        )
