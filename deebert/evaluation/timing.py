"""Timed passes: several systems on the same batches, and the sweep of thresholds with its times."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import ModelOutput

from deebert.data.batching import Collator, data_loader, eval_batches
from deebert.data.features import Features
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.results import SweepRow
from deebert.modeling.exit_rules import NO_EXIT

CHUNK_BATCHES = 16  # timed batches per turn: short, so that a machine's drift hits every threshold alike
WARM_UP_BATCHES = 3  # before the first turn


TURN_WARM_UP_SECONDS = 0.1  # before each: ONNX Runtime's and OpenMP's idle threads spin for tens of milliseconds
TIE = 1e-4  # how far a decision may be from the other (in nats, for the entropy) for rounding to turn it


@dataclass(frozen=True)
class Timing:
    """What one way to answer took and gave.

    batch_seconds: (repeats, batches) of the forward passes. exit_layers: (S,), 0 where there are none. logits: (S, C).
    """

    batch_seconds: np.ndarray
    exit_layers: np.ndarray
    logits: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """(repeats,) of the whole data set."""
        return self.batch_seconds.sum(axis=1)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def timed_passes(
    forwards: Sequence[Callable[[dict[str, Tensor]], ModelOutput]],
    features: Features,
    collate: Collator,
    device: torch.device,
    batch_size: int,
    repeats: int = 1,
) -> Iterator[list[Timing]]:
    """Times ways to answer a batch, side by side; yields, after each repeat, what all repeats so far gave.

    Only the forward is inside the clock. The ways take turns on a few batches at a time, in random order, so that
    whatever else the machine does hits them alike. A turn begins with batches that are not counted: a way that answers
    alone, as in use, shares the cores with no idle threads of another, and finds its weights in the caches.
    """
    loader = data_loader(features, eval_batches(features.lengths, batch_size), collate)

    def inputs(batches) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        """Samples' indices, and what the model reads, on its device."""
        kept = [{k: v.to(device) for k, v in batch.items() if k not in ("labels", "index")} for batch in batches]
        return list(zip([batch["index"].numpy() for batch in batches], kept, strict=True))

    for _, batch in inputs(list(islice(loader, WARM_UP_BATCHES))):
        for forward in forwards:
            forward(batch)

    seconds = np.empty((len(forwards), 0, len(loader)))  # (ways, repeats, batches)
    exit_layers = np.zeros((len(forwards), len(features)), np.int64)
    logits: list[np.ndarray | None] = [None for _ in forwards]
    order = np.random.default_rng(0)
    bar = tqdm(total=repeats * len(forwards) * len(features), desc="timed passes", unit="sample", leave=False)
    for _ in range(repeats):
        seconds = np.concatenate([seconds, np.zeros((len(forwards), 1, len(loader)))], axis=1)
        done, batches = 0, iter(loader)
        while chunk := inputs(list(islice(batches, CHUNK_BATCHES))):
            for i in order.permutation(len(forwards)):
                begun = time.perf_counter()
                for _, batch in chunk:
                    forwards[i](batch)
                    if time.perf_counter() - begun > TURN_WARM_UP_SECONDS:
                        break
                for at, (index, batch) in enumerate(chunk, done):
                    _synchronize(device)
                    start = time.perf_counter()
                    output = forwards[i](batch)
                    _synchronize(device)
                    seconds[i, -1, at] = time.perf_counter() - start
                    if "exit_layer" in output:
                        exit_layers[i, index] = output.exit_layer.cpu()
                    if logits[i] is None:
                        logits[i] = np.empty((len(features), output.logits.shape[1]), np.float32)
                    logits[i][index] = output.logits.float().cpu()
                    bar.update(len(index))
            done += len(chunk)
        yield [Timing(*found) for found in zip(seconds, exit_layers, logits, strict=True)]
    bar.close()


def timed_sweep(
    rows: Sequence[SweepRow],
    exits: AllExits,
    model,
    features: Features,
    collate: Collator,
    batch_size: int,
    repeats: int = 1,
) -> Iterator[list[SweepRow]]:
    """The rows of a sweep with times filled in, once after each repeat.

    The full model without off-ramps runs in the same turns. Raises RuntimeError where a sample leaves at another layer
    than `exits` says and its uncertainty there is not within TIE of the limit.
    """
    model.eval()
    thresholds = [NO_EXIT, *(row.threshold for row in rows)]
    forwards = [lambda batch, x=threshold: model(**batch, exit_threshold=x) for threshold in thresholds]
    for full, *timings in timed_passes(forwards, features, collate, model.device, batch_size, repeats):
        timed = []
        for row, timing in zip(rows, timings, strict=True):
            saved = 1 - timing.seconds / full.seconds
            timed.append(
                replace(
                    row,
                    seconds=float(np.median(timing.seconds)),
                    full_seconds=float(np.median(full.seconds)),
                    time_saved=float(np.median(saved)),
                    time_saved_spread=float(np.ptp(saved)),
                    other_exits=_other_exits(exits, row.threshold, timing.exit_layers),
                )
            )
        yield timed


def _other_exits(exits: AllExits, threshold: float, seen: np.ndarray) -> int:
    """How many samples were seen to leave elsewhere than predicted, all of them within TIE of doing so."""
    predicted = exits.exit_layers(threshold)
    (moved,) = np.nonzero(predicted != seen)
    decided_at = np.minimum(predicted, seen)[moved] - 1  # the exit on which prediction and timed pass disagree
    logits, uncertainties = torch.from_numpy(exits.logits), torch.from_numpy(exits.uncertainties)
    gap = exits.exit_rule.decision_margin(logits, uncertainties, exits.cutoffs(threshold)).numpy()[moved, decided_at]
    if len(moved) and gap.max() > TIE:
        worst = moved[gap.argmax()]
        raise RuntimeError(
            f"at threshold {threshold} sample {worst + 1} left at layer {seen[worst]}, but the all-exits pass predicts "
            f"{predicted[worst]}; its {exits.rule} is {gap.max():.2g} off the threshold, no rounding error"
        )
    return len(moved)
