"""Timed passes: several systems on the same batches, and the measured times of a threshold sweep.

Shapes: S samples of a data set, C labels. A system is a function from a batch of tensors to a model's output.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import ModelOutput

from deebert.data.batching import Collator, Features, eval_batches
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


@dataclass
class Timing:
    """The times and results of one system.

    batch_seconds: (repeats, batches) of the forward passes.
    logits: (S, C) float32. exit_layers: (S,), None for a system without exits.
    """

    batch_seconds: np.ndarray
    logits: np.ndarray | None = None
    exit_layers: np.ndarray | None = None

    @property
    def seconds(self) -> np.ndarray:
        """(repeats,) the time of the data set."""
        return self.batch_seconds.sum(axis=1)

    def keep(self, samples: int, index: Sequence[int], output: ModelOutput) -> None:
        """Stores the output of a batch of samples (B,)."""
        if self.logits is None:
            self.logits = np.empty((samples, output.logits.shape[1]), np.float32)
            self.exit_layers = np.empty(samples, np.int64) if "exit_layer" in output else None
        self.logits[index] = output.logits.float().cpu()
        if self.exit_layers is not None:
            self.exit_layers[index] = output.exit_layer.cpu()


def _warm_up(forward_fn: ForwardFn, batches: Sequence[dict[str, Tensor]]) -> None:
    """Runs batches that are not timed, for TURN_WARM_UP_SECONDS or until they end."""
    started = time.perf_counter()
    for batch in batches:
        forward_fn(batch)
        if time.perf_counter() - started > TURN_WARM_UP_SECONDS:
            break


def _timed(forward_fn: ForwardFn, batch: dict[str, Tensor], device: torch.device) -> tuple[float, ModelOutput]:
    """The seconds of one forward pass, and its output."""

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # waits until the device has finished its work
        return time.perf_counter()

    started = clock()
    output = forward_fn(batch)
    return clock() - started, output


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
    batches, indices = [], eval_batches(features.lengths, batch_size)
    for rows in indices:
        batch = collate(features, rows)
        batches.append({name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", "index")})
    for batch in batches[:WARM_UP_BATCHES]:
        for forward_fn in forwards:
            forward_fn(batch)

    timings = [Timing(np.zeros((repeats, len(batches)))) for _ in forwards]
    order, total = np.random.default_rng(0), repeats * len(forwards) * len(features)
    with tqdm(total=total, desc="timed passes", unit="sample", leave=False, disable=None) as bar:
        for repeat in range(repeats):
            for start in range(0, len(batches), CHUNK_BATCHES):
                turn = range(start, min(start + CHUNK_BATCHES, len(batches)))
                for i in order.permutation(len(forwards)):
                    _warm_up(forwards[i], batches[start : turn.stop])
                    for number in turn:
                        seconds, output = _timed(forwards[i], batches[number], device)
                        timings[i].batch_seconds[repeat, number] = seconds
                        timings[i].keep(len(features), indices[number], output)
                        bar.update(len(indices[number]))
            yield [replace(timing, batch_seconds=timing.batch_seconds[: repeat + 1]) for timing in timings]


def compare_latency(model, threshold: float | list[float], features: Features, collate: Collator) -> tuple[str, float]:
    """The time of a text at a threshold and in the full model: in words, and the share of it that is saved.

    Measured on the first LATENCY_TEXTS samples, one at a time, in turns.
    """
    some = features.take(range(len(features))[:LATENCY_TEXTS])
    *_, timings = timed_passes(at_thresholds(model, (threshold, NO_EXIT)), some, collate, model.device, batch_size=1)
    early, full = (timing.batch_seconds[-1] for timing in timings)
    shown = [f"{1e3 * times.mean():.1f} ms (median {1e3 * np.median(times):.1f})" for times in (early, full)]
    text = f"a text takes {' in place of '.join(shown)}; {len(early)} texts, one at a time, on {model.device.type}"
    return text, 1 - early.sum() / full.sum()


def at_thresholds(model, thresholds: Sequence[float | list[float]]) -> list[ForwardFn]:
    """A model at several thresholds, as systems to time."""
    model.eval()
    return [lambda batch, x=threshold: model(**batch, exit_threshold=x) for threshold in thresholds]


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
    forwards = at_thresholds(model, [NO_EXIT, *(row.threshold for row in rows)])
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
