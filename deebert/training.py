"""One stage of training. Which stages there are, and what they train, is the strategy's business (objectives.py)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.errors import InputError
from deebert.features import Collator, Features, TrainBatches, data_loader
from deebert.objectives import STRATEGIES, training_loss


@dataclass(frozen=True)
class TrainSettings:
    """The hyper-parameters of one stage; the defaults are the original's command-line defaults.

    batch_size is per process; an update sees batch_size x processes x the accelerator's gradient_accumulation_steps.
    highway_learning_rate is that of the off-ramps, None: learning_rate. max_steps > 0 takes the place of epochs.
    logging_steps and save_steps count updates; 0: never.
    """

    batch_size: int = 8
    learning_rate: float = 5e-5
    highway_learning_rate: float | None = None
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int = -1
    warmup_steps: int = 0
    seed: int = 42
    logging_steps: int = 50
    save_steps: int = 50

    def updates(self, per_epoch: int) -> int:
        """How many optimizer updates the stage makes, with this many in an epoch."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * per_epoch)


def parameter_groups(model, settings: TrainSettings) -> list[dict]:
    """The parameters to be trained: off-ramps at their own rate; biases and LayerNorm weights are not decayed."""
    rates = (settings.learning_rate, settings.highway_learning_rate or settings.learning_rate)
    groups = [{"params": [], "lr": lr, "weight_decay": decay} for lr in rates for decay in (settings.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            highway = ".highway." in name or ".learn_to_exit." in name
            exempt = name.endswith("bias") or "LayerNorm.weight" in name
            groups[2 * highway + exempt]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def train_stage(
    stage: int,
    model,
    features: Features,
    collate: Collator,
    settings: TrainSettings,
    accelerator: Accelerator,
    log: Callable[[int, dict[str, float]], None] = lambda step, scalars: None,
    save: Callable[[int], None] = lambda step: None,
) -> float:
    """Trains `model` in place in one stage of its config's train_strategy, from 1, and returns the mean loss.

    Every stage has its own optimizer and linear schedule. `log` gets the update's number and loss, learning_rate and
    grad_norm every logging_steps; `save` is called every save_steps. Raises InputError where the loss is not finite.
    """
    config, plan = model.config, STRATEGIES[model.config.train_strategy][stage - 1]
    model.set_trained(backbone=plan.backbone, highways=plan.highways)
    batches = TrainBatches(features.lengths, settings.batch_size, settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), eps=settings.adam_epsilon)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, data_loader(features, batches, collate))
    total = settings.updates(math.ceil(len(loader) / accelerator.gradient_accumulation_steps))
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, total)

    updates, losses, logged = 0, [], 0
    bar = tqdm(total=total, desc=f"stage {stage}", unit="step", disable=not accelerator.is_main_process)
    for batch in _endless(loader, batches):
        wrapped.train()  # an evaluation in between leaves it in eval mode
        batch.pop("index")
        labels, weights = batch.pop("labels"), plan.weights(config.num_hidden_layers, updates + 1)
        with accelerator.accumulate(wrapped):
            output = wrapped(**batch, output_all_exits=any(weights[:-1]), train_highway=not plan.backbone)
            loss = training_loss(output, labels, weights, config)
            accelerator.backward(loss)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"stage {stage}, step {updates + 1}: the loss is {losses[-1]}; lower --learning_rate"
                    + (" or --highway_learning_rate" if plan.highways else "")
                )
            norm = None
            if accelerator.sync_gradients and settings.max_grad_norm > 0:
                norm = accelerator.clip_grad_norm_(optimizer_parameters(optimizer), settings.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                schedule.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        updates += 1
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if settings.logging_steps > 0 and updates % settings.logging_steps == 0:
            recent, logged = losses[logged:], len(losses)
            scalars = {"loss": sum(recent) / len(recent), "learning_rate": schedule.get_last_lr()[0]}
            log(updates, scalars | ({} if norm is None else {"grad_norm": float(norm)}))
        if settings.save_steps > 0 and updates % settings.save_steps == 0:
            save(updates)
        if updates == total:
            break
    bar.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # the next stage, with other parameters, wraps it anew
    accelerator.free_memory()
    return sum(losses) / len(losses)


def optimizer_parameters(optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _endless(loader: DataLoader, batches: TrainBatches):
    """Epoch after epoch, each in its own seeded order."""
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        yield from loader
        epoch += 1
