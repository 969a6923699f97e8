"""One stage of training: data, optimizer and the loop over its steps. strategies.py defines the stages."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.data.batching import MicroBatch, TrainBatches
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.losses import training_loss
from deebert.training.settings import TrainSettings
from deebert.training.strategies import STRATEGIES
from deebert.training.train_data import TrainData
from deebert.utils.errors import InputError
from deebert.utils.memory import peak_memory, reset_peak_memory


def parameter_groups(model, settings: TrainSettings) -> list[dict]:
    """The trained parameters: off-ramps at their own rate; biases and LayerNorm weights without weight decay."""
    rates = (settings.learning_rate, settings.highway_learning_rate or settings.learning_rate)
    groups = [{"params": [], "lr": lr, "weight_decay": decay} for lr in rates for decay in (settings.weight_decay, 0.0)]
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}  # names differ
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith("bias") or id(parameter) in norms
            groups[2 * is_off_ramp(name) + exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class StageTraining:
    """One stage (from 1) of the strategy: `total` optimizer steps, of which `steps` are done.

    Every stage has its own optimizer and linear schedule. `run` trains the model in place. With the model's weights and
    the random states, `state_dict` is all that is needed to continue bit for bit.

    best, best_step: the best dev score so far and its step; None without evaluation. The caller sets them.
    """

    # attribute -> its key in training_state.pt; the keys are those of 0.5, so that its checkpoints can be resumed
    PROGRESS = {  # noqa: RUF012
        "steps": "updates",
        "seconds": "seconds",
        "samples": "samples",
        "peak_memory": "peak_memory",
        "loss_sum": "loss_sum",
        "best": "best",
        "best_step": "best_update",
    }

    def __init__(self, stage: int, model, data: TrainData, settings: TrainSettings, accelerator: Accelerator):
        self.stage, self.model, self.data, self.settings, self.accelerator = stage, model, data, settings, accelerator
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

        self.steps, self.seconds, self.samples, self.peak_memory, self.loss_sum = 0, 0.0, 0, 0, 0.0
        self.best: float | None = None
        self.best_step: int | None = None
        # since the last log entry: sums of the loss and of each exit's own loss (1 + E,), and how many were added
        self.sums = np.zeros(1 + len(model.config.exit_layers))
        self.counts = np.zeros_like(self.sums)

    def state_dict(self) -> dict:
        return {
            **{key: getattr(self, name) for name, key in self.PROGRESS.items()},
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name, key in self.PROGRESS.items():
            setattr(self, name, state[key])
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(self.steps, 1)

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    def run(
        self,
        log: Callable[["StageTraining", dict[str, float]], None] = lambda training, scalars: None,
        save: Callable[["StageTraining"], None] = lambda training: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Makes the remaining optimizer steps. Returns False if `stopped` was True in any process before the end.

        `log` gets loss, each exit's loss, learning_rate and grad_norm every logging_steps and at the end. `save` is
        called every save_steps, at the end and when stopped. Raises InputError if the loss is not finite.
        """
        reset_peak_memory(self.accelerator.device)
        with self.progress_bar() as bar:
            self.make_steps(bar, log, save, stopped)
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)  # the next stage wraps other parameters
        self.accelerator.free_memory()
        return self.steps == self.total

    def make_steps(self, bar: tqdm, log, save, stopped) -> None:
        """The loop of `run`."""
        started = time.perf_counter()  # `seconds` excludes the callbacks
        loader = self.data.load(part.rows for part in self.batches.micro_batches(self.steps, self.total))
        losses = None
        for part, batch in zip(self.batches.micro_batches(self.steps, self.total), loader, strict=True):
            added = self.backward(part, batch)
            losses = added if losses is None else losses + added
            if not part.last:
                continue
            stop = self.reduce_losses(part, losses, stopped())
            norm = self.step()
            losses = None
            self.samples += len(part.step_rows)
            self.seconds += time.perf_counter() - started
            self.peak_memory = max(self.peak_memory, peak_memory(self.accelerator.device))
            bar.update(len(part.step_rows))
            self.report(log, bar, norm)
            if stop or self.steps == self.total or self.due(self.settings.save_steps):
                save(self)
            if stop:
                break
            started = time.perf_counter()

    def backward(self, part: MicroBatch, batch: dict[str, Tensor]) -> Tensor:
        """Adds a micro-batch's gradients. Returns its contribution (1 + E,) to the losses of the step."""
        self.module.train()  # an evaluation between two steps sets eval mode
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch.pop("index", None)
        labels, weights = batch.pop("labels"), self.weights()
        synchronise = nullcontext() if part.last else self.accelerator.no_sync(self.module)
        with synchronise:
            output = self.module(**batch, output_all_exits=any(weights[:-1]), train_highway=not self.plan.backbone)
            loss, exit_losses = training_loss(output, labels, weights, self.settings.distill)
            self.accelerator.backward(part.weight * loss)
        return torch.cat([loss.detach().reshape(1), exit_losses]) * (part.weight / self.accelerator.num_processes)

    def weights(self) -> list[float]:
        """The weight of each exit's loss in the next step."""
        return self.plan.weights(len(self.model.config.exit_layers), self.steps + 1)

    def reduce_losses(self, part: MicroBatch, losses: Tensor, stopped: bool) -> bool:
        """Adds up a step's losses over the processes. Returns whether one of them has to stop."""
        packed = torch.cat([losses.float(), losses.new_tensor([float(stopped)])])
        if self.accelerator.num_processes > 1:
            packed = self.accelerator.reduce(packed, "sum")
        *values, stop = packed.tolist()
        if not math.isfinite(values[0]):
            samples = " ".join(str(row + 1) for row in np.sort(part.step_rows)[:16])
            raise InputError(
                f"stage {self.stage}, step {self.steps + 1}: the loss is {values[0]}, on the training samples "
                f"{samples}{' ...' if len(part.step_rows) > 16 else ''}; lower --learning_rate"
                + (" or --highway_learning_rate" if self.plan.highways else "")
            )
        self.loss_sum += values[0]
        self.sums += values
        self.counts += [1, *(weight > 0 for weight in self.weights())]
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

    def report(self, log, bar: tqdm, norm: Tensor | None) -> None:
        """Updates the progress bar and, every logging_steps, calls `log` with the mean losses since its last call."""
        bar.set_postfix(loss=f"{self.sums[0] / self.counts[0]:.4f}", step=self.steps, refresh=False)
        if not self.due(self.settings.logging_steps):
            return
        loss, *exits = np.divide(self.sums, self.counts, out=np.full_like(self.sums, np.nan), where=self.counts > 0)
        scalars = {"loss": loss, "learning_rate": self.schedule.get_last_lr()[0]}
        by_layer = zip(self.model.config.exit_layers, exits, strict=True)
        scalars |= {f"loss_layer{layer}": value for layer, value in by_layer if not math.isnan(value)}
        self.sums, self.counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        log(self, scalars | ({} if norm is None else {"grad_norm": float(norm)}))

    def progress_bar(self) -> tqdm:
        epochs, rest = divmod(self.total, len(self.batches))
        samples = epochs * len(self.data.lengths) + min(rest * self.batches.samples_per_step, len(self.data.lengths))
        return tqdm(
            total=samples,
            initial=self.samples,
            desc=f"stage {self.stage}",
            unit=" samples",
            disable=not self.accelerator.is_main_process or None,  # None: unless it is written to a terminal
        )
