"""Compares this project's training with a plain loop that does what the original does. Run by benchmark_training.sh.

The plain loop pads every text to --max_seq_length, computes all off-ramps in both stages, back-propagates stage 2
through the full model, clips over all of its gradients, and uses AdamW with its default implementation. Each system
runs in a process of its own, and the processes take turns. Memory is the process's on a CPU, on a GPU what it
allocated there.
"""

import argparse
import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from deebert.data.batching import collator
from deebert.data.features import Features, load_features
from deebert.data.tasks import eval_splits, get_task, label_order
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.evaluation.tables import markdown
from deebert.modeling.checkpoints import (
    MODELS,
    disable_cudnn_attention,
    load_config,
    load_pretrained,
    load_tokenizer,
    quiet_transformers,
    set_labels,
)
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.losses import exit_losses
from deebert.training.settings import TrainSettings
from deebert.training.stage import StageTraining
from deebert.training.train_data import TokenData, cached_features
from deebert.utils import cli
from deebert.utils.cli import non_negative, positive

SYSTEMS = ("plain loop", "here", "here, cached")
CACHED = SYSTEMS[2]


class Trainer:
    """A model with its data, trained by one of the systems."""

    def __init__(self, args: argparse.Namespace, system: str, seed: int):
        quiet_transformers()
        disable_cudnn_attention()
        self.args, self.system, self.task = args, system, get_task(args.task_name)
        self.accelerator = Accelerator(cpu=args.no_cuda, mixed_precision="bf16" if args.bf16 else "no")
        set_seed(seed)
        config = load_config(args.model_name_or_path, args.model_type)
        set_labels(config, label_order(self.task, args.model_type, config.id2label))
        config.highway_pooling = args.highway_pooling
        self.model = load_pretrained(args.model_name_or_path, config)[0].to(self.accelerator.device)
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        self.train_features = self.features("train").first(args.samples)
        self.settings = TrainSettings(
            per_gpu_train_batch_size=args.batch_size, learning_rate=args.learning_rate, seed=seed, logging_steps=0
        )
        if args.highway_learning_rate:
            self.settings = dataclasses.replace(self.settings, highway_learning_rate=args.highway_learning_rate)
        self.open = ExitStack()

    def features(self, split: str) -> Features:
        labels = label_order(self.task, self.args.model_type, self.model.config.id2label)
        return load_features(self.task, self.args.data_dir, split, labels, self.tokenizer, self.args.max_seq_length)

    def prepare(self, stage: int) -> None:
        """The work that is done once per stage: it fills the cache."""
        self.data = TokenData(self.train_features, collator(self.model.config))
        if self.system == CACHED and stage == 2:
            folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
            self.data = self.open.enter_context(
                cached_features(self.model, self.train_features, self.data.collate, self.accelerator, folder)
            )

    def train(self, stage: int, **settings) -> int:
        """Trains a stage. Returns the number of samples it took."""
        settings = dataclasses.replace(self.settings, **settings)
        if self.system == "plain loop":
            return self.plain_loop(stage, settings)
        training = StageTraining(stage, self.model, self.data, settings, self.accelerator)
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
            self.train_features,
            batch_size=settings.per_gpu_train_batch_size,
            shuffle=True,
            collate_fn=collator(model.config, pad_to=self.args.max_seq_length),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        total = settings.total_steps(len(loader))
        schedule = get_linear_schedule_with_warmup(optimizer, 0, total)
        samples = 0
        for done, batch in enumerate(endless(loader)):
            if done == total:
                return samples
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels, _ = batch.pop("labels"), batch.pop("index")
            samples += len(labels)
            with self.accelerator.autocast():
                output = model(**batch, output_all_exits=True)
            losses = exit_losses(output.all_logits.float(), labels).mean(dim=0)
            loss = losses[:-1].sum() if stage == 2 else losses[-1]
            loss.backward()
            loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            model.zero_grad()
        raise AssertionError("the loader is endless")

    def scores(self) -> list[float]:
        """The dev score of every exit."""
        dev = self.features(next(iter(eval_splits(self.task))))
        exits = run_all_exits(self.model, dev, collator(self.model.config), progress=False)
        return [metrics[self.task.primary_metric] for metrics in layer_scores(self.task, exits).values()]


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def worker(args: argparse.Namespace, system: str, stage: int, pipe) -> None:
    """For each seed from the pipe: trains --steps steps and sends samples, seconds and peak memory. Seed 0 ends it."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  progress bars of all of them would mix
    try:
        trainer = Trainer(args, system, seed=0)
        device = trainer.accelerator.device
        started = time.perf_counter()
        trainer.prepare(stage)
        preparation = time.perf_counter() - started
        trainer.train(stage, max_steps=3)
        pipe.send((preparation, len(trainer.train_features), str(device)))
        while seed := pipe.recv():
            started = time.perf_counter()
            samples = trainer.train(stage, max_steps=args.steps, seed=seed)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            pipe.send((samples, time.perf_counter() - started, peak_memory(device)))
        trainer.open.close()
    except Exception as error:
        pipe.send(error)


def receive(pipe, value=None):
    """Sends the value, unless it is None, and waits for the worker's reply. Raises what the worker raised."""
    if value is not None:
        pipe.send(value)
    try:
        reply = pipe.recv()
    except EOFError:
        raise cli.InputError("a process of the benchmark was killed; is there enough memory?") from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def speeds(args: argparse.Namespace) -> str:
    """The speed of all systems, which take turns. Returns a Markdown table."""
    context = multiprocessing.get_context("spawn")  # fork would copy the state of CUDA and of the thread pools
    rows = [["stage", "", "samples/s", "times the plain loop's (spread)", "peak memory (GiB)"]]
    for stage in (1, 2):
        systems = [system for system in SYSTEMS if stage == 2 or system != CACHED]
        pipes, processes = {}, []
        for system in systems:
            pipes[system], end = context.Pipe()
            processes.append(context.Process(target=worker, args=(args, system, stage, end), daemon=True))
            processes[-1].start()
            end.close()  # or a worker that is killed would not be noticed
            prepared = receive(pipes[system])  # one after the other
            if system == CACHED:
                preparation, size, device = prepared
        turns = {system: [] for system in systems}
        for seed in tqdm(range(1, args.repeats + 1), desc=f"stage {stage}", unit="turn", leave=False):
            for system in np.random.default_rng(seed).permutation(systems):
                turns[str(system)].append(receive(pipes[str(system)], seed))
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(0)
            process.join()
        rates = {system: [samples / seconds for samples, seconds, _ in own] for system, own in turns.items()}
        for system in systems:
            ratios = [a / b for a, b in zip(rates[system], rates["plain loop"], strict=True)]
            name = "here, cached: from the second epoch on" if system == CACHED else system
            peak = max(memory for *_, memory in turns[system]) / 2**30
            faster = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            rows.append([str(stage), name, f"{statistics.median(rates[system]):.1f}", faster, f"{peak:.2f}"])
        if CACHED in systems:
            rate = size / (preparation + size / statistics.median(rates[CACHED]))
            plain = statistics.median(rates["plain loop"])
            name = f"here, cached: first epoch of {size} samples"
            rows.append(["2", name, f"{rate:.1f}", f"{rate / plain:.1f}", ""])
    sizes = f"batch size {args.batch_size}, {args.repeats} turns of {args.steps} steps, on {device}"
    return f"{args.task_name}, {args.model_name_or_path}, {sizes}\n\n{markdown(rows, left=2)}"


def quality(args: argparse.Namespace) -> str:
    """Trains both stages to the end with each seed. Returns a Markdown table of dev scores, mean and deviation."""
    rows = [["", "final classifier (%)", "mean of the off-ramps (%)", "seconds"]]
    for system in SYSTEMS:
        finals, ramps, seconds = [], [], []
        for seed in args.seeds:
            trainer, started = Trainer(args, system, seed), time.perf_counter()
            for stage in (1, 2):
                trainer.prepare(stage)
                trainer.train(stage, epochs=args.num_train_epochs)
            seconds.append(time.perf_counter() - started)
            *early, final = trainer.scores()
            trainer.open.close()
            finals.append(100 * final)
            ramps.append(100 * statistics.mean(early))
            print(f"{system}, seed {seed}: {finals[-1]:.2f}, {ramps[-1]:.2f}, {seconds[-1]:.0f} s", flush=True)
        rows.append([system, spread(finals), spread(ramps), f"{statistics.mean(seconds):.0f}"])
    return markdown(rows)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_type", choices=MODELS, required=True)
    add("--model_name_or_path", required=True)
    add("--task_name", required=True)
    add("--data_dir", required=True)
    add("--max_seq_length", type=int, default=128)
    add("--batch_size", type=positive, default=8)
    add("--learning_rate", type=float, default=2e-5)
    add("--highway_learning_rate", type=float)
    add("--highway_pooling", choices=("first", "mean"), default="first")
    add("--samples", type=positive, default=10**9, help="train on this many samples, the first ones; default: all")
    add("--steps", type=positive, default=30, help="optimizer steps per turn")
    add("--repeats", type=non_negative, default=5, help="turns; 0: no speeds are measured")
    add("--seeds", type=int, nargs="+", help="also train to the end with each seed, and compare dev scores")
    add("--num_train_epochs", type=float, default=3.0, help="of each stage, with --seeds")
    add("--bf16", action="store_true")
    add("--no_cuda", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    reports: list[Callable[[argparse.Namespace], str]] = [
        *([speeds] if args.repeats else []),
        *([quality] if args.seeds else []),
    ]
    for report in reports:
        print(f"\n{report(args)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
