"""One stage of training. Which stages there are, and what they train, is the strategy's business (objectives.py)."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.data.batching import Collator, Share, TrainBatches, data_loader
from deebert.data.features import Features
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.strategies import STRATEGIES, training_loss
from deebert.utils.cli import InputError
from deebert.utils.memory import peak_memory, reset_peak_memory


@dataclass(frozen=True)
class TrainSettings:
    """The hyper-parameters of one stage; the defaults are the original's command-line defaults.

    batch_size is per process; an update sees batch_size x accumulation x processes samples.
    highway_learning_rate is that of the off-ramps, None: learning_rate. max_steps > 0 takes the place of epochs.
    logging_steps and save_steps count updates; 0: never.
    """

    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 5e-5
    highway_learning_rate: float | None = None
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int = -1
    warmup_steps: int = 0
    seed: int = 42
    train_strategy: str = "two_stage"
    distill: float = 0.0
    distill_temperature: float = 2.0
    logging_steps: int = 50
    save_steps: int = 50

    def updates(self, per_epoch: int) -> int:
        """How many optimizer updates the stage makes, with this many in an epoch."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * per_epoch)


class TrainData(Protocol):
    """What a stage is trained on. lengths: (samples,) by which batches are made."""

    lengths: np.ndarray

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        """Batches of tensors of these sample indices: what the trainee is called with, and labels (B,)."""

    def trainee(self, model) -> nn.Module:
        """The module that is called."""


@dataclass(frozen=True)
class TokenData:
    """Texts, for the whole model."""

    features: Features
    collate: Collator
    workers: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return self.features.lengths

    def load(self, batches: Iterable[list[int]]) -> Iterable[dict[str, Tensor]]:
        return data_loader(self.features, batches, self.collate, self.workers, pin_memory=torch.cuda.is_available())

    def trainee(self, model) -> nn.Module:
        return model


def parameter_groups(model, settings: TrainSettings) -> list[dict]:
    """The parameters to be trained: off-ramps at their own rate; biases and LayerNorm weights are not decayed."""
    rates = (settings.learning_rate, settings.highway_learning_rate or settings.learning_rate)
    groups = [{"params": [], "lr": lr, "weight_decay": decay} for lr in rates for decay in (settings.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            highway = is_off_ramp(name)
            exempt = name.endswith("bias") or "LayerNorm.weight" in name
            groups[2 * highway + exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class StageTraining:
    """One stage of a model's train_strategy, from 1: `total` updates, of which `updates` have been made.

    Every stage has its own optimizer and linear schedule. `run` trains the model in place. `state_dict` is all that an
    identical continuation needs beside the model's weights and the random states.
    """

    def __init__(self, stage: int, model, data: TrainData, settings: TrainSettings, accelerator: Accelerator):
        self.stage, self.model, self.data, self.settings, self.accelerator = stage, model, data, settings, accelerator
        self.plan = STRATEGIES[settings.train_strategy][stage - 1]
        model.set_trained(backbone=self.plan.backbone, highways=self.plan.highways)
        self.batches = TrainBatches(
            data.lengths,
            settings.batch_size,
            settings.seed,
            settings.accumulation,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.total = settings.updates(len(self.batches))
        fused = accelerator.device.type in ("cpu", "cuda")  # one pass over the weights; a ninth of the time on a CPU
        optimizer = torch.optim.AdamW(parameter_groups(model, settings), eps=settings.adam_epsilon, fused=fused)
        self.module, self.optimizer = accelerator.prepare(data.trainee(model), optimizer)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, settings.warmup_steps, self.total)

        exits = model.config.num_hidden_layers
        self.updates, self.seconds, self.samples, self.peak_memory, self.loss_sum = 0, 0.0, 0, 0, 0.0
        self.best: float | None = None  # dev score so far, where somebody asks for one, and when it was
        self.best_update: int | None = None
        # since the last line of the log: the sums of the loss and of each exit's own, and how many there were of each
        self.sums, self.counts = np.zeros(1 + exits), np.zeros(1 + exits)

    PROGRESS = ("updates", "seconds", "samples", "peak_memory", "loss_sum", "best", "best_update")

    def state_dict(self) -> dict:
        return {
            **{name: getattr(self, name) for name in self.PROGRESS},
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(self.updates, 1)

    def run(
        self,
        log: Callable[["StageTraining", dict[str, float]], None] = lambda training, scalars: None,
        save: Callable[["StageTraining"], None] = lambda training: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Makes the updates that are left; False where `stopped` ended that early, in any process.

        `log` gets loss, each exit's loss, learning_rate and grad_norm every logging_steps and at the end; `save` is
        called every save_steps, at the end and when stopped. Raises InputError where the loss is not finite.
        """
        reset_peak_memory(self.accelerator.device)
        with self.progress_bar() as bar:
            self.make_updates(bar, log, save, stopped)
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)  # the next stage wraps other parameters
        self.accelerator.free_memory()
        return self.updates == self.total

    def make_updates(self, bar: tqdm, log, save, stopped) -> None:
        """The loop of `run`."""
        started = time.perf_counter()  # `seconds` leaves out what the callbacks take
        loader = self.data.load(share.rows for share in self.batches.shares(self.updates, self.total))
        losses = None
        for share, batch in zip(self.batches.shares(self.updates, self.total), loader, strict=True):
            part = self.backward(share, batch)
            losses = part if losses is None else losses + part
            if not share.last:
                continue
            stop = self.reduce_losses(share, losses, stopped())
            norm = self.step()
            losses = None
            self.samples += len(share.update)
            self.seconds += time.perf_counter() - started
            self.peak_memory = max(self.peak_memory, peak_memory(self.accelerator.device))
            bar.update(len(share.update))
            self.report(log, bar, norm)
            if stop or self.updates == self.total or self.due(self.settings.save_steps):
                save(self)
            if stop:
                break
            started = time.perf_counter()

    def backward(self, share: Share, batch: dict[str, Tensor]) -> Tensor:
        """Adds the gradients of a part of an update. Returns its contribution (1 + N,) to the update's losses."""
        self.module.train()  # an evaluation in between leaves it in eval mode
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch.pop("index", None)
        labels, weights = batch.pop("labels"), self.weights()
        synchronise = nullcontext() if share.last else self.accelerator.no_sync(self.module)
        with synchronise:
            output = self.module(**batch, output_all_exits=any(weights[:-1]), train_highway=not self.plan.backbone)
            loss, of_exits = training_loss(
                output, labels, weights, self.settings.distill, self.settings.distill_temperature
            )
            self.accelerator.backward(share.weight * loss)
        return torch.cat([loss.detach().reshape(1), of_exits]) * (share.weight / self.accelerator.num_processes)

    def weights(self) -> list[float]:
        return self.plan.weights(self.model.config.num_hidden_layers, self.updates + 1)

    def reduce_losses(self, share: Share, losses: Tensor, stopped: bool) -> bool:
        """Adds up an update's losses over the processes, and whether one of them is to stop."""
        packed = torch.cat([losses.float(), losses.new_tensor([float(stopped)])])
        if self.accelerator.num_processes > 1:
            packed = self.accelerator.reduce(packed, "sum")
        *values, stop = packed.tolist()
        if not math.isfinite(values[0]):
            samples = " ".join(str(row + 1) for row in np.sort(share.update)[:16])
            raise InputError(
                f"stage {self.stage}, step {self.updates + 1}: the loss is {values[0]}, on the training samples "
                f"{samples}{' ...' if len(share.update) > 16 else ''}; lower --learning_rate"
                + (" or --highway_learning_rate" if self.plan.highways else "")
            )
        self.loss_sum += values[0]
        self.sums += values
        self.counts += [1, *(weight > 0 for weight in self.weights())]
        return stop > 0

    def step(self) -> Tensor | None:
        """Clips and applies the gradients. Returns their norm, None where they are not clipped."""
        norm = None
        if self.settings.max_grad_norm > 0:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16: the loss scale was too large
            self.schedule.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return norm

    def due(self, every: int) -> bool:
        return every > 0 and (self.updates % every == 0 or self.updates == self.total)

    def report(self, log, bar: tqdm, norm: Tensor | None) -> None:
        bar.set_postfix(loss=f"{self.sums[0] / self.counts[0]:.4f}", step=self.updates, refresh=False)
        if not self.due(self.settings.logging_steps):
            return
        loss, *exits = np.divide(self.sums, self.counts, out=np.full_like(self.sums, np.nan), where=self.counts > 0)
        scalars = {"loss": loss, "learning_rate": self.schedule.get_last_lr()[0]}
        scalars |= {f"loss_layer{i}": value for i, value in enumerate(exits, 1) if not math.isnan(value)}
        self.sums, self.counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        log(self, scalars | ({} if norm is None else {"grad_norm": float(norm)}))

    def progress_bar(self) -> tqdm:
        epochs, rest = divmod(self.total, len(self.batches))
        samples = epochs * len(self.data.lengths) + min(rest * self.batches.update_size, len(self.data.lengths))
        return tqdm(
            total=samples,
            initial=self.samples,
            desc=f"stage {self.stage}",
            unit=" samples",
            disable=not self.accelerator.is_main_process,
        )
