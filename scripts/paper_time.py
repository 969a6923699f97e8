"""What the reproduction of the paper takes: the size of each task, the time that is left, and --estimate.

Work is counted in operations of the layers' matrix products. A short run, or the trainings done so far, say how long
they take.
"""

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from deebert.data.batching import collator
from deebert.data.features import Features
from deebert.data.tasks import Example, Task, eval_splits
from deebert.evaluation.cost import layer_operations
from deebert.evaluation.timing import timed_passes
from deebert.experiment.arguments import Arguments
from deebert.experiment.experiment import make_accelerator
from deebert.modeling.backbones import MODELS
from deebert.modeling.checkpoints import load_config
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.stage import StageTraining
from deebert.training.train_data import TokenData

CHARACTERS_PER_TOKEN, SPECIAL_TOKENS = 4.5, 3  # of English in the word pieces of BERT, roughly
STEPS, SAMPLES = 2, 8  # of each measurement of --estimate
SHORT = 16  # tokens of its short texts; the long ones have --max_seq_length
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
# The shapes of the paper's models, so that --estimate needs no hub; their configs' defaults are BERT-base's.
SHAPES = {
    "bert-base-uncased": ("bert", {}),
    "bert-large-uncased": ("bert", LARGE),
    "roberta-base": ("roberta", ROBERTA),
    "roberta-large": ("roberta", ROBERTA | LARGE),
}


@dataclass(frozen=True)
class Size:
    """A task's training samples, its dev samples, and the tokens of a training sample: their mean and the most."""

    train: int
    dev: int
    tokens: float
    longest: float


def read_size(task: Task, data_dir: Path, max_tokens: int) -> Size:
    """Reads all files that a run needs. The number of tokens is a guess from that of characters. Raises InputError."""
    train = task.read(data_dir, "train")
    tokens = [guess_tokens(example, max_tokens) for example in train]
    dev = sum(len(task.read(data_dir, split)) for split in eval_splits(task))
    return Size(len(train), dev, mean(tokens), max(tokens))


def guess_tokens(example: Example, max_tokens: int) -> float:
    """The number of tokens of one text or pair, roughly."""
    characters = len(example.text_a) + len(example.text_b or "")
    return min(characters / CHARACTERS_PER_TOKEN + SPECIAL_TOKENS, max_tokens)


def timed_thresholds(num_labels: int) -> list[float]:
    """The thresholds that the figures show: 0, 0.1 ... up to the first at which every sample exits, in nats."""
    return [i / 10 for i in range(int(10 * math.log(num_labels)) + 2)] if num_labels > 1 else [0.0]


@dataclass(frozen=True)
class Work:
    """What one run does, in operations: both stages of training, and the evaluation."""

    training: float
    evaluation: float


def work_of(config, size: Size, num_labels: int, args: Arguments) -> Work:
    """Training goes three times through the layers in stage 1 (a backward pass counts twice), and once in stage 2.

    Batches are small, so that the time of a step on a GPU depends little on the texts' length. There, all count alike.
    """
    longest = args.max_seq_length
    per_token = config.num_hidden_layers * layer_operations(config, longest, longest) / longest
    tokens = longest if torch.cuda.is_available() and not args.no_cuda else size.tokens
    return Work(
        training=4 * args.num_train_epochs * size.train * tokens * per_token,
        evaluation=passes(num_labels) * size.dev * longest * per_token,
    )


def passes(num_labels: int) -> int:
    """Passes over the dev set: two for all exits, the full model, and each threshold (three are chosen)."""
    return 3 + len(timed_thresholds(num_labels)) + 3


class Seconds:
    """The time that finished runs took, to estimate that of others."""

    def __init__(self):
        self.done: list[tuple[str, Work, Work]] = []  # the model, its work, and the seconds that it took

    def add(self, model: str, work: Work, seconds: Work) -> None:
        self.done.append((model, work, seconds))

    def of(self, model: str, work: Work) -> float | None:
        """The estimate for a run, from those of the same model if there are any; None where nothing is done."""
        known = [each for each in self.done if each[0] == model] or self.done
        if not known:
            return None
        rates = [
            sum(getattr(seconds, part) for *_, seconds in known) / sum(getattr(w, part) for _, w, _ in known)
            for part in ("training", "evaluation")
        ]
        return work.training * rates[0] + work.evaluation * rates[1]


def in_words(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min', or '60 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{minutes / 60:.0f} h"


@dataclass(frozen=True)
class Speed:
    """A model's speed here. lengths: (2,) tokens of a text. step, memory: seconds, GiB at these. sample: seconds.

    step: of both stages together, one step of each.
    """

    lengths: list[int]
    step: list[float]
    memory: list[float]
    sample: float


def config_of(name: str):
    """The config of a model, for --estimate: the paper's models need not be there. Raises InputError."""
    if name not in SHAPES:
        return load_config(name)
    kind, shape = SHAPES[name]
    return MODELS[kind][0](**shape)


def measure(config, args: Arguments) -> Speed:
    """Trains and evaluates random weights for a few steps, on random texts of two lengths."""
    accelerator = make_accelerator(args)
    model = MODELS[config.model_type][1](config).to(accelerator.device)
    lengths, step, memory = [SHORT, args.max_seq_length], [], []
    for length in lengths:
        texts = random_texts(config, length, args.per_gpu_train_batch_size * STEPS)
        trained = [measure_stage(stage, model, texts, args, accelerator) for stage in (1, 2)]
        step.append(sum(training.seconds for training in trained) / STEPS)
        memory.append(max(training.peak_memory for training in trained) / 2**30)
    texts, padded = random_texts(config, SHORT, SAMPLES), collator(config, args.max_seq_length)
    model.eval()
    forwards = [lambda batch: model(**batch, exit_threshold=NO_EXIT)]
    *_, (timing,) = timed_passes(forwards, texts, padded, accelerator.device, batch_size=1)
    return Speed(lengths, step, memory, float(np.median(timing.batch_seconds)))


def measure_stage(stage: int, model, texts: Features, args: Arguments, accelerator) -> StageTraining:
    """A stage of a few steps, after one that warms up."""
    for steps in (1, STEPS):
        settings = replace(args.stage_settings(stage), max_steps=steps, logging_steps=0, save_steps=0)
        training = StageTraining(stage, model, TokenData(texts, collator(model.config)), settings, accelerator)
        training.run()
    return training


def random_texts(config, length: int, count: int) -> Features:
    """Texts of random tokens, all of one length."""
    rng, tokens = np.random.default_rng(0), count * length
    return Features(
        input_ids=rng.integers(config.vocab_size // 2, config.vocab_size, tokens, dtype=np.int32),  # no special ones
        token_type_ids=np.zeros(tokens, np.int8),
        offsets=np.arange(count + 1) * length,
        labels=rng.integers(0, config.num_labels, count),
    )


def hours(speed: Speed, size: Size, epochs: float, num_labels: int, batch_size: int) -> tuple[float, float]:
    """Training and evaluation in hours; the evaluation as if nothing exited early."""
    steps = epochs * math.ceil(size.train / batch_size)
    training = steps * float(np.interp(size.tokens, speed.lengths, speed.step))
    return training / 3600, passes(num_labels) * size.dev * speed.sample / 3600


def estimate_rows(
    names: Sequence[str], sizes: dict[Task, Size], epochs: dict[str, float], args: Arguments
) -> list[list[str]]:
    """The table of --estimate. epochs: of each stage, by name of the model."""
    rows = [["model", "task", "training (h)", "evaluation (h)", "memory (GiB)"]]
    for name in names:
        print(f"measuring {name}", flush=True)
        with redirect_stderr(io.StringIO()):  # progress bars of steps that nobody waits for
            speed = measure(config_of(name), args)
        total = np.zeros(2)
        for task, size in sizes.items():
            both = hours(speed, size, epochs[name], task.num_labels, args.per_gpu_train_batch_size)
            memory = float(np.interp(size.longest, speed.lengths, speed.memory))
            rows.append([name, task.name, *(f"{h:.2f}" for h in both), f"{memory:.1f}"])
            total += both
        rows.append([name, "all", *(f"{h:.2f}" for h in total), f"{max(speed.memory):.1f}"])
    return rows
