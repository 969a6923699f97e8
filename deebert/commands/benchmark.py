"""`deebert benchmark`: early exit beside what one would run instead.

Times the full model (Hugging Face's, as it is and compiled; ONNX Runtime fp32 and int8) and early exit, in PyTorch and
ONNX Runtime at several thresholds, on a dev set, in one run in which the systems take turns: latency at batch size 1,
throughput at others. On a GPU: the full model in fp32 and bf16, and early exit in PyTorch and as CUDA graphs.
"""

import argparse
import copy
import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert.data.batching import collator
from deebert.data.features import Features
from deebert.data.tasks import get_task
from deebert.evaluation import plotting
from deebert.evaluation.all_exits import dev_features
from deebert.evaluation.cost import operations
from deebert.evaluation.metrics import predictions, scores
from deebert.evaluation.timing import Timing, timed_passes
from deebert.modeling.checkpoints import (
    check_threshold,
    disable_cudnn_attention,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.cuda_graphs import GraphedDeeBert
from deebert.runtime.onnx_export import (
    FullGraph,
    export_full,
    exportable,
    quantize,
    traced_parts,
    write_export,
)
from deebert.runtime.onnx_runtime import OnnxDeeBert, open_session
from deebert.utils.cli import ArgumentParser, InputError, positive
from deebert.utils.files import make_folder, replacing

CPU = torch.device("cpu")
GEMM_SECONDS = 0.3  # of measuring the rate of matrix products


@dataclass(frozen=True)
class System:
    """A way to classify a batch. threshold: None for a full model without off-ramps."""

    name: str
    threshold: float | None
    forward: Callable[[dict], object]


@dataclass
class Row:
    """What one system gives. Shares from 0 to 1, times in milliseconds.

    agreement: share of the samples with the label that PyTorch gives at batch size 1 (at the same threshold).
    p50, p90, p99: latency at batch size 1, over the samples, of each one's median over the repeats.
    per_sample: by batch size, median over the repeats.
    floor: the matrix products of the layers that ran, mean over the samples, at the rate that PyTorch reaches for such
        products in fp32 at batch size 1.
    """

    system: str
    threshold: float | None
    score: float
    layers_run: float
    p50: float
    p90: float
    p99: float
    floor: float
    agreement: float = 1.0
    per_sample: dict[int, float] = field(default_factory=dict)


def pytorch_systems(folder: str, model, compiled: bool) -> list[System]:
    """The full model in PyTorch, in the model's precision and on its device: what users run today."""
    if model.config.model_type == "bert":
        stock = BertForSequenceClassification.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    else:  # the head is not that of Hugging Face's class
        full = FullGraph(model)

        def stock(**batch) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=full(**batch))

    systems = [System("PyTorch, full", None, lambda batch: stock(**batch))]
    if compiled:
        fast = torch.compile(stock, dynamic=True)
        systems.append(System("torch.compile, full", None, lambda batch: fast(**batch)))
    return systems


def gpu_systems(folder: str, model, thresholds: Sequence[float], compiled: bool) -> list[System]:
    """All systems that run on a GPU, in fp32 and bf16."""
    systems = []
    for precision in (torch.float32, torch.bfloat16):
        name = "bf16" if precision == torch.bfloat16 else "fp32"
        chosen = model if precision == torch.float32 else copy.deepcopy(model).to(precision)
        runners = {"DeeBERT, PyTorch": chosen, "DeeBERT, CUDA graphs": GraphedDeeBert(chosen)}
        if precision == torch.float32:
            runners["DeeBERT, CUDA graphs, in step"] = GraphedDeeBert(chosen, speculate=False)
        early = [early_exit(runner, threshold, title) for title, runner in runners.items() for threshold in thresholds]
        full = pytorch_systems(folder, chosen, compiled)
        systems += [replace(system, name=f"{system.name}, {name}") for system in full + early]
    return systems


def early_exit(runner, threshold: float, name: str) -> System:
    return System(name, threshold, lambda batch: runner(**batch, exit_threshold=threshold))


def onnx_systems(model, work: Path) -> list[System]:
    """The full model in ONNX Runtime."""
    fp32, int8 = work / "full_fp32.onnx", work / "full_int8.onnx"
    export_full(exportable(model), fp32)
    quantize(fp32, int8)
    return [
        System(f"ONNX Runtime {name}, full", None, onnx_forward(path))
        for name, path in (("fp32", fp32), ("int8", int8))
    ]


def onnx_forward(path: Path) -> Callable[[dict], SequenceClassifierOutput]:
    """A full graph in ONNX Runtime."""
    session = open_session(path)

    def forward(batch: dict) -> SequenceClassifierOutput:
        feed = {name: tensor.numpy() for name, tensor in batch.items()}
        return SequenceClassifierOutput(logits=torch.from_numpy(session.run(None, feed)[0]))

    return forward


def early_systems(folder: str, model, work: Path, thresholds: Sequence[float]) -> list[System]:
    """Early exit in PyTorch and in ONNX Runtime."""
    runners = {"DeeBERT, PyTorch": model}
    tokenizer = load_tokenizer(folder)
    with traced_parts(model) as parts:
        for precision in ("fp32", "int8"):
            write_export(parts, model.config, tokenizer, work / precision, int8=precision == "int8")
            runners[f"DeeBERT, ONNX Runtime {precision}"] = OnnxDeeBert(work / precision)
    return [early_exit(runner, threshold, name) for name, runner in runners.items() for threshold in thresholds]


def gemm_rate(config, tokens: float, device: torch.device) -> float:
    """Floating-point operations per second of matrix products of a layer's shape, for this many tokens."""
    states = torch.randn(max(round(tokens), 1), config.hidden_size, device=device)
    weights = torch.randn(config.hidden_size, 4 * config.hidden_size, device=device)
    timer = Timer(
        "states @ weights", globals={"states": states, "weights": weights}, num_threads=torch.get_num_threads()
    )
    return 2 * states.numel() * weights.shape[1] / timer.blocked_autorange(min_run_time=GEMM_SECONDS).median


def measure(
    systems: list[System],
    features: Features,
    task,
    config,
    batch_sizes: list[int],
    repeats: int,
    device: torch.device = CPU,
) -> list[Row]:
    """Runs all systems side by side at every batch size; 1 comes first, as labels are compared with PyTorch's there."""
    rows: list[Row] = []
    reference: dict[float, np.ndarray] = {}  # PyTorch's labels (S,) at each threshold
    for size in batch_sizes:
        forwards = [system.forward for system in systems]
        *_, timings = timed_passes(forwards, features, collator(config), device, size, repeats)
        if size == 1:
            rate = gemm_rate(config, features.lengths.mean(), device)
            rows = [
                latency(system, timing, features, task, config, rate)
                for system, timing in zip(systems, timings, strict=True)
            ]
        for row, timing in zip(rows, timings, strict=True):
            labels = predictions(timing.logits)
            expected = reference.setdefault(NO_EXIT if row.threshold is None else row.threshold, labels)
            row.agreement = min(row.agreement, float((labels == expected).mean()))
            row.per_sample[size] = 1e3 * float(np.median(timing.seconds)) / len(features)
    return rows


def latency(system: System, timing: Timing, features: Features, task, config, rate: float) -> Row:
    """The row of one system, from its passes at batch size 1."""
    layers = np.where(timing.exit_layers > 0, timing.exit_layers, config.num_hidden_layers)
    last = features.lengths if system.threshold is None else 1  # early exit computes only what is classified
    p50, p90, p99 = np.percentile(1e3 * np.median(timing.batch_seconds, axis=0), [50, 90, 99])
    return Row(
        system=system.name,
        threshold=system.threshold,
        score=scores(task, timing.logits, features.labels)[task.primary_metric],
        layers_run=layers.mean() / config.num_hidden_layers,
        p50=p50,
        p90=p90,
        p99=p99,
        floor=1e3 * float(operations(config, features.lengths, layers, last).mean()) / rate,
    )


def table(rows: list[Row]) -> str:
    """Markdown; the floor beside the latency it is for."""
    sizes = list(rows[0].per_sample)
    heads = " | ".join(f"batch {size}" for size in sizes)
    lines = [
        f"| system | threshold | score (%) | layers run (%) | same label (%) | p50 | p90 | p99 | floor | {heads} |",
        f"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |{' ---: |' * len(sizes)}",
    ]
    for row in rows:
        threshold = "-" if row.threshold is None else "never" if row.threshold <= 0 else f"{row.threshold:g}"
        times = " | ".join(f"{value:.2f}" for value in (row.p50, row.p90, row.p99, row.floor, *row.per_sample.values()))
        shares = " | ".join(f"{100 * value:.1f}" for value in (row.score, row.layers_run, row.agreement))
        lines.append(f"| {row.system} | {threshold} | {shares} | {times} |")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line for each system and threshold; times in milliseconds."""
    flat = [{**asdict(row), **{f"batch_{size}": ms for size, ms in row.per_sample.items()}} for row in rows]
    with replacing(path) as file:
        writer = csv.DictWriter(file, [name for name in flat[0] if name != "per_sample"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)


def plot(rows: list[Row], metric: str) -> Figure:
    """Score against time per sample, a panel for each batch size, a curve for each system, with its thresholds."""
    sizes = list(rows[0].per_sample)
    figure = Figure(figsize=(4.2 * len(sizes) + 2.6, 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for i, name in enumerate(dict.fromkeys(row.system for row in rows)):
            mine = [row for row in rows if row.system == name]
            look = plotting.line_style(i) | {"markersize": 5, "linewidth": 1}
            axes.plot([row.per_sample[size] for row in mine], [100 * row.score for row in mine], **look, label=name)
            early = [row for row in mine if (row.threshold or NO_EXIT) > 0]
            across, up = [row.per_sample[size] for row in early], [100 * row.score for row in early]
            plotting.annotate_thresholds(axes, early, across, up)
        axes.margins(x=0.08, y=0.08)  # room for the thresholds
        axes.set_title("numbers: threshold", fontsize=9, loc="left")
        axes.set(xlabel=f"ms per sample, batch size {size}", xlim=(0, None))
    panels[0].set_ylabel(f"score ({metric}, %)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="deebert benchmark",
        description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--task_name", required=True, help="the task that it was trained for")
    parser.add_argument("--data_dir", required=True, help="folder with the task's TSV files; its dev set is used")
    parser.add_argument("--output_dir", required=True, type=Path, help="for benchmark.md, .csv, .png and .pdf")
    parser.add_argument(
        "--exit_threshold", "--early_exit_entropy", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5]
    )
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 8, 32, 128], help="1 is always there")
    parser.add_argument("--samples", type=positive, default=10**9, help="how many samples of the dev set; default: all")
    parser.add_argument("--repeats", type=positive, default=3, help="passes of each system; medians are reported")
    parser.add_argument("--max_seq_length", type=positive, default=128, help="longer inputs are cut")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet_transformers()
    disable_cudnn_attention()
    config, task = load_config(args.model), get_task(args.task_name)
    for threshold in args.exit_threshold:
        check_threshold(threshold, config)
    if config.num_labels == 1:
        raise InputError(f"{args.model}: a regression model has no labels to compare")
    tokenizer = load_tokenizer(args.model)
    features = dev_features(task, args.data_dir, config, tokenizer, args.max_seq_length).first(args.samples)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    device = torch.device(args.device)
    model = load_model(args.model, config).to(device).eval()
    sizes = [1, *(size for size in args.batch_sizes if 1 < size <= len(features))]
    make_folder(args.output_dir)
    with TemporaryDirectory() as work, torch.inference_mode():
        thresholds = [NO_EXIT, *args.exit_threshold]
        if device.type == "cuda":
            systems = gpu_systems(args.model, model, thresholds, not args.no_compile)
        else:
            print("exporting the full model and its layers, in fp32 and int8", flush=True)
            systems = pytorch_systems(args.model, model, not args.no_compile)
            systems += onnx_systems(model, Path(work))
            systems += early_systems(args.model, model, Path(work), thresholds)
        rows = measure(systems, features, task, config, sizes, args.repeats, device)
    about = (
        f"{task.name}, {len(features)} samples of {features.lengths.mean():.0f} tokens on average, "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'}, "
        f"{args.repeats} repeats; times in ms per sample, p50 to p99 at batch size 1"
    )
    print(f"{about}\n\n{table(rows)}\n")
    with replacing(args.output_dir / "benchmark.md") as file:
        file.write(f"{about}\n\n{table(rows)}\n")
    write_csv(args.output_dir / "benchmark.csv", rows)
    print(args.output_dir / "benchmark.md", args.output_dir / "benchmark.csv", sep="\n")
    with mpl.rc_context(plotting.STYLE):
        print(*plotting.save(plot(rows, task.primary_metric), args.output_dir / "benchmark"), sep="\n")
