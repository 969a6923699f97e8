"""Training here beside a plain loop as the original's and transformers.Trainer: samples per second, and dev scores.

The plain loop pads every text to --max_seq_length, computes all off-ramps in both stages, back-propagates stage 2
through the full model, and clips over all of its gradients. transformers.Trainer has no stage 2; it groups texts by
length. All systems of a stage take random turns in one process. The plain loop computes in float32, the others as the
recipe says; ACCELERATE_MIXED_PRECISION=no (or bf16) gives all of them the same.

Further flags are those of a training by run_glue_deebert.py. Takes some 10 minutes for a model of 6 layers on two
cores; with --seeds that many trainings of each system.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import static_models
import torch
from accelerate.utils import set_seed
from comparison import mean_and_deviation
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.data.batching import collator
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.evaluation.results import primary_scores
from deebert.evaluation.tables import markdown
from deebert.experiment.arguments import Arguments, parse_args
from deebert.experiment.earlier_run import precision
from deebert.experiment.experiment import Experiment
from deebert.experiment.run import make_accelerator
from deebert.modeling.checkpoints import load_pretrained, quiet_transformers
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.losses import exit_losses
from deebert.training.stage import StageTraining
from deebert.training.strategies import TrainSettings
from deebert.training.train_data import TokenData, cached_features
from deebert.utils import cli
from deebert.utils.cli import non_negative, positive

PLAIN, TRAINER, HERE, CACHED = "plain loop", "transformers.Trainer", "here", "here, cached"
WARM_UP_STEPS = 3


class Training:
    """A model with its data, trained by one of the systems."""

    def __init__(self, args: Arguments, system: str, samples: int | None = None):
        self.args, self.system = args, system
        self.experiment = Experiment(args, make_accelerator(args))
        self.accelerator, config = self.experiment.accelerator, self.experiment.config
        set_seed(args.training.seed)
        self.model = load_pretrained(args.model.model_name_or_path, config)[0].to(self.accelerator.device)
        train = self.experiment.train_features
        self.train_features = train.take(range(len(train))[:samples])
        self.trainer = None
        if system == TRAINER:
            layers = config.num_hidden_layers
            self.trainer = static_models.make_trainer(args, self.experiment.task, layers, "first", disable_tqdm=True)
        self.data, self.open = TokenData(self.train_features, self.experiment.collate), ExitStack()

    def prepare(self, stage: int) -> None:
        """The work that is done once per stage: it fills the cache."""
        if self.system == CACHED and stage == 2:
            folder = Path(self.open.enter_context(TemporaryDirectory()))
            cache = cached_features(self.model, self.train_features, self.data.collate, self.accelerator, folder)
            self.data = self.open.enter_context(cache)

    def train(self, stage: int, **settings) -> int:
        """Trains a stage. Returns the number of samples it took."""
        settings = replace(
            self.args.stage_settings(stage, self.model.config.hidden_size), logging_steps=0, save_steps=0, **settings
        )
        if self.system == PLAIN:
            return self.plain_loop(stage, settings)
        if self.trainer:
            self.trainer.args.max_steps, self.trainer.optimizer = settings.max_steps, None  # a new one, as everywhere
            self.trainer.train()
            return settings.max_steps * settings.per_gpu_train_batch_size
        bf16 = precision(self.args) == "bf16"
        training = StageTraining(stage, self.model, self.data, settings, self.accelerator, bf16)
        training.run()
        return training.samples

    def plain_loop(self, stage: int, settings: TrainSettings) -> int:
        """One stage as the original trains it."""
        model, device = self.model, self.accelerator.device
        model.requires_grad_(True).train()
        trained = [p for name, p in model.named_parameters() if is_off_ramp(name) == (stage == 2)]
        rate = settings.highway_learning_rate if stage == 2 else None
        options = {"eps": settings.adam_epsilon, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.AdamW(trained, lr=rate or settings.learning_rate, **options)
        loader = DataLoader(
            range(len(self.train_features)),
            batch_size=settings.per_gpu_train_batch_size,
            shuffle=True,
            collate_fn=partial(collator(model.config, model.config.max_seq_length), self.train_features),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        total = settings.total_steps(len(loader))
        schedule = get_linear_schedule_with_warmup(optimizer, 0, total)
        samples, bf16 = 0, os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        for _, batch in zip(range(total), endless(loader), strict=False):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels, _ = batch.pop("labels"), batch.pop("index")
            samples += len(labels)
            # not accelerator.autocast(): once a Trainer was made, it computes in the Trainer's precision
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(**batch, output_all_exits=True)
            losses = exit_losses(output.all_logits.float(), labels).mean(dim=0)
            loss = losses[:-1].sum() if stage == 2 else losses[-1]
            loss.backward()
            loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            model.zero_grad()
        return samples

    def scores(self) -> list[float]:
        """The dev score of every exit."""
        task = self.experiment.task
        dev = self.experiment.features(next(iter(task.dev_splits)))
        exits = run_all_exits(self.model, dev, self.experiment.collate, progress=False)
        return list(primary_scores(layer_scores(task, exits)).values())


def endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def speeds(args: Arguments, steps: int, repeats: int, samples: int | None) -> str:
    """The speed of all systems, which take turns. Returns a Markdown table."""
    rows = [["stage", "", "samples/s", "times the plain loop's (spread)"]]
    for stage in (1, 2):
        systems = [PLAIN, HERE, CACHED] if stage == 2 else [PLAIN, TRAINER, HERE]
        trainings = {system: Training(args, system, samples) for system in systems}
        for training in trainings.values():
            started = time.perf_counter()
            training.prepare(stage)
            preparation = time.perf_counter() - started  # that of the last one counts, the cached one
            training.train(stage, max_steps=WARM_UP_STEPS)
        rates = {system: [] for system in systems}
        for seed in tqdm(range(1, repeats + 1), desc=f"stage {stage}", unit="turn", leave=False, disable=None):
            for system in np.random.default_rng(seed).permutation(systems).tolist():
                started = time.perf_counter()
                done = trainings[system].train(stage, max_steps=steps, seed=seed)
                if trainings[system].accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                rates[system].append(done / (time.perf_counter() - started))
        for training in trainings.values():
            training.open.close()
        plain = statistics.median(rates[PLAIN])
        for system, of_turns in rates.items():
            ratios = [a / b for a, b in zip(of_turns, rates[PLAIN], strict=True)]
            name = f"{CACHED}: from the second epoch on" if system == CACHED else system
            faster = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            rows.append([str(stage), name, f"{statistics.median(of_turns):.1f}", faster])
        if CACHED in systems:
            size = len(trainings[CACHED].train_features)
            rate = size / (preparation + size / statistics.median(rates[CACHED]))
            rows.append(["2", f"{CACHED}: first epoch of {size} samples", f"{rate:.1f}", f"{rate / plain:.1f}"])
    return markdown(rows, left=2)


def quality(args: Arguments, seeds: list[int]) -> str:
    """Trains both stages to the end with each seed. Returns a Markdown table of dev scores, mean and deviation."""
    rows = [["", "final classifier (%)", "mean of the off-ramps (%)", "seconds"]]
    for system in (PLAIN, HERE, CACHED):
        finals, ramps, seconds = [], [], []
        for seed in seeds:
            training = Training(replace(args, training=replace(args.training, seed=seed)), system)
            started = time.perf_counter()
            for stage in (1, 2):
                training.prepare(stage)
                training.train(stage)
            seconds.append(time.perf_counter() - started)
            *early, final = training.scores()
            training.open.close()
            finals.append(final)
            ramps.append(statistics.mean(early))
            print(f"{system}, seed {seed}: {100 * final:.2f}, {100 * ramps[-1]:.2f}, {seconds[-1]:.0f} s", flush=True)
        rows.append([system, mean_and_deviation(finals), mean_and_deviation(ramps), f"{statistics.mean(seconds):.0f}"])
    return markdown(rows)


def main() -> None:
    parser = cli.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=positive, help="measure the speed on the first samples only")
    parser.add_argument("--steps", type=positive, default=30, help="optimizer steps per turn")
    parser.add_argument("--repeats", type=non_negative, default=5, help="turns; 0: no speeds are measured")
    parser.add_argument("--seeds", type=int, nargs="+", help="also train to the end with each seed, and compare scores")
    ours, flags = parser.parse_known_args()
    quiet_transformers()
    with TemporaryDirectory() as folder:  # Trainer makes its output_dir
        args = parse_args(["--do_train", "--output_dir", folder, *flags])
        if ours.repeats:
            print(f"\n{speeds(args, ours.steps, ours.repeats, ours.samples)}", flush=True)
        if ours.seeds:
            print(f"\n{quality(args, ours.seeds)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
