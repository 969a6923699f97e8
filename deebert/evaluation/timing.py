"""Timed passes: several systems on the same batches, and the measured times of a threshold sweep.

Shapes: S samples of a data set, C labels. A system is a function from a batch of tensors to a model's output.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import ModelOutput

from deebert.data.batching import Collator, data_loader, eval_batches
from deebert.data.features import Features
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.results import SweepRow
from deebert.modeling.exit_rules import NO_EXIT, ExitRule, binary_logits
from deebert.utils.arrays import softmax

CHUNK_BATCHES = 16  # timed batches of one turn: few, so that the machine's drift affects every system alike
WARM_UP_BATCHES = 3  # untimed batches of each system before the first turn
TURN_WARM_UP_SECONDS = 0.1  # before each turn: idle threads of ONNX Runtime and OpenMP spin for tens of milliseconds
TIE = 1e-4  # the largest distance from a cut-off (in nats, for the entropy) at which rounding may change a decision

LATENCY_TEXTS = 100  # of a median latency

ForwardFn = Callable[[dict[str, Tensor]], ModelOutput]


@dataclass(frozen=True)
class Timing:
    """The times and results of one system.

    batch_seconds: (repeats, batches) of the forward passes.
    exit_layers: (S,), None for a system without exits.
    logits: (S, C) float32.
    """

    batch_seconds: np.ndarray
    exit_layers: np.ndarray | None
    logits: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """(repeats,) the time of the data set."""
        return self.batch_seconds.sum(axis=1)


@dataclass(frozen=True)
class _Batch:
    """number: its position in the pass. index: (B,) its samples. inputs: the tensors, on the device."""

    number: int
    index: np.ndarray
    inputs: dict[str, Tensor]


class _Recorder:
    """Collects the times and results of one system."""

    def __init__(self, repeats: int, batches: int, samples: int):
        self.batch_seconds, self.samples = np.zeros((repeats, batches)), samples
        self.exit_layers: np.ndarray | None = None  # made at the first batch, which shows whether there are exits
        self.logits: np.ndarray | None = None  # and how many labels

    def add(self, repeat: int, batch: _Batch, seconds: float, output: ModelOutput) -> None:
        self.batch_seconds[repeat, batch.number] = seconds
        if self.logits is None:
            self.logits = np.empty((self.samples, output.logits.shape[1]), np.float32)
            self.exit_layers = np.empty(self.samples, np.int64) if "exit_layer" in output else None
        if self.exit_layers is not None:
            self.exit_layers[batch.index] = output.exit_layer.cpu()
        self.logits[batch.index] = output.logits.float().cpu()

    def timing(self, repeats: int) -> Timing:
        """The results after this number of repeats."""
        return Timing(self.batch_seconds[:repeats], self.exit_layers, self.logits)


def _chunks(loader: DataLoader, size: int, device: torch.device) -> Iterator[list[_Batch]]:
    """The loader's batches, on the device, in lists of `size`."""
    batches = enumerate(loader)
    while chunk := [
        _Batch(number, batch.pop("index").numpy(), {k: v.to(device) for k, v in batch.items() if k != "labels"})
        for number, batch in islice(batches, size)
    ]:
        yield chunk


def _warm_up(forward_fn: ForwardFn, chunk: list[_Batch]) -> None:
    """Runs batches that are not timed, for TURN_WARM_UP_SECONDS or until the chunk ends."""
    started = time.perf_counter()
    for batch in chunk:
        forward_fn(batch.inputs)
        if time.perf_counter() - started > TURN_WARM_UP_SECONDS:
            break


def _time_chunk(
    forward_fn: ForwardFn, chunk: list[_Batch], device: torch.device
) -> Iterator[tuple[_Batch, float, ModelOutput]]:
    """Runs the batches and yields for each the seconds of its forward pass and its output."""
    for batch in chunk:
        _synchronize(device)
        started = time.perf_counter()
        output = forward_fn(batch.inputs)
        _synchronize(device)
        yield batch, time.perf_counter() - started, output


def _synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def timed_passes(
    forwards: Sequence[ForwardFn],
    features: Features,
    collate: Collator,
    device: torch.device,
    batch_size: int,
    repeats: int = 1,
) -> Iterator[list[Timing]]:
    """Times several systems on the same batches and yields, after each repeat, their timings of all repeats so far.

    The systems take turns on a few batches at a time, in random order, so that the machine's drift affects all alike.
    Each turn starts with untimed warm-up batches: idle OpenMP and ONNX Runtime threads of the previous system spin for
    tens of milliseconds, and the weights have to be back in the caches. Only forward passes are timed.
    """
    loader = data_loader(features, eval_batches(features.lengths, batch_size), collate)
    for batch in next(_chunks(loader, WARM_UP_BATCHES, device)):
        for forward_fn in forwards:
            forward_fn(batch.inputs)

    recorders = [_Recorder(repeats, len(loader), len(features)) for _ in forwards]
    order = np.random.default_rng(0)
    bar = tqdm(
        total=repeats * len(forwards) * len(features), desc="timed passes", unit="sample", leave=False, disable=None
    )
    for repeat in range(repeats):
        for chunk in _chunks(loader, CHUNK_BATCHES, device):
            for i in order.permutation(len(forwards)):
                _warm_up(forwards[i], chunk)
                for batch, seconds, output in _time_chunk(forwards[i], chunk, device):
                    recorders[i].add(repeat, batch, seconds, output)
                    bar.update(len(batch.index))
        yield [recorder.timing(repeat + 1) for recorder in recorders]
    bar.close()


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one text at a time, over `texts` of them: at a threshold, and of the full model.

    time_saved: the share of the full model's time for all of them.
    """

    early_ms: float
    full_ms: float
    time_saved: float
    texts: int


def first_passes(
    forwards: Sequence[ForwardFn], features: Features, collate: Collator, device: torch.device
) -> list[np.ndarray]:
    """The seconds of each of the first LATENCY_TEXTS samples, one at a time, for each system in turns."""
    *_, timings = timed_passes(forwards, features.first(LATENCY_TEXTS), collate, device, batch_size=1)
    return [timing.batch_seconds[-1] for timing in timings]


def median_latency(model, features: Features, collate: Collator, threshold: float | list[float]) -> Latency:
    """Times some of the samples at batch size 1, at a threshold and without off-ramps, in turns."""
    model.eval()
    forwards = [lambda batch, x=x: model(**batch, exit_threshold=x) for x in (threshold, NO_EXIT)]
    early, full = first_passes(forwards, features, collate, model.device)
    medians = [1e3 * float(np.median(seconds)) for seconds in (early, full)]
    return Latency(*medians, time_saved=1 - float(early.sum() / full.sum()), texts=len(early))


def timed_sweep(
    rows: Sequence[SweepRow],
    exits: AllExits,
    model,
    features: Features,
    collate: Collator,
    batch_size: int,
    repeats: int = 1,
) -> Iterator[list[SweepRow]]:
    """Yields, after each repeat, the rows of a sweep with their times of all repeats so far.

    The full model without off-ramps takes its turns too. Raises RuntimeError where a sample exits at another layer than
    `exits` predicts and its uncertainty there is further than TIE from the cut-off.
    """
    model.eval()
    thresholds = [NO_EXIT, *(row.threshold for row in rows)]
    forwards = [lambda batch, x=threshold: model(**batch, exit_threshold=x) for threshold in thresholds]
    for full, *timings in timed_passes(forwards, features, collate, model.device, batch_size, repeats):
        yield [_timed_row(row, timing, full, exits) for row, timing in zip(rows, timings, strict=True)]


def _timed_row(row: SweepRow, timing: Timing, full: Timing, exits: AllExits) -> SweepRow:
    """The row with the times of its threshold, compared with the full model's."""
    saved = 1 - timing.seconds / full.seconds
    return replace(
        row,
        seconds=float(np.median(timing.seconds)),
        full_seconds=float(np.median(full.seconds)),
        time_saved=float(np.median(saved)),
        time_saved_spread=float(np.ptp(saved)),
        other_exits=_count_ties(exits, row.threshold, timing.exit_layers),
    )


def _count_ties(exits: AllExits, threshold: float, timed_layers: np.ndarray) -> int:
    """How many samples exit at another layer in the timed pass than predicted; each must be within TIE of doing so.

    Raises RuntimeError for a sample whose difference rounding cannot explain.
    """
    predicted = exits.exit_layers(threshold)
    (moved,) = np.nonzero(predicted != timed_layers)
    decided_at = np.minimum(predicted, timed_layers)[moved] - exits.first_layer  # the off-ramp where the passes differ
    margins = decision_margins(exits.exit_rule, exits.logits, exits.uncertainties, exits.cutoffs(threshold))
    gap = margins[moved, decided_at]
    if len(moved) and gap.max() > TIE:
        worst = moved[gap.argmax()]
        raise RuntimeError(
            f"at threshold {threshold} sample {worst + 1} exited at layer {timed_layers[worst]}, but the all-exits "
            f"pass predicts {predicted[worst]}; its {exits.rule} is {gap.max():.2g} off the cut-off, no rounding error"
        )
    return len(moved)


def decision_margins(
    rule: ExitRule, all_logits: np.ndarray, uncertainties: np.ndarray, cutoffs: Sequence[float]
) -> np.ndarray:
    """(S, E-1) how far each decision is from its opposite: the rounding error that would turn it.

    That is the distance of the uncertainty (S, E-1) from the cut-off. A decision of a rule that looks at earlier
    off-ramps turns where one of the predictions so far does: by the two largest probabilities, or for one label by the
    tolerance. all_logits: (S, E, C).
    """
    if not rule.stateful:
        return abs(uncertainties - np.asarray(cutoffs))
    if rule.classes == 1:
        steps = abs(np.diff(all_logits[:, :-1, 0].astype(np.float64), axis=1))
        margins = np.pad(abs(steps - rule.tolerance), ((0, 0), (1, 0)), constant_values=np.inf)
    else:
        predictions = softmax(binary_logits(all_logits) if rule.several_labels else all_logits)[:, :-1]
        second, first = np.moveaxis(np.sort(predictions, axis=-1)[..., -2:], -1, 0)
        margins = first - second  # (S, E-1), of several labels (S, E-1, C)
        margins = margins.min(axis=-1) if rule.several_labels else margins
    return np.minimum.accumulate(margins, axis=1)
