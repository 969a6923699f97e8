"""Early exit beside what one would run instead, timed on a dev set. benchmark.sh runs it.

In one run, in which all systems take random turns: Hugging Face's full model and static models (static_models.py) as
they are and compiled, and early exit at several thresholds, all in PyTorch. On a GPU: in fp32 and bf16, and early exit
as CUDA graphs, too. frontier.py has ONNX Runtime, on a CPU.

Further flags are those of an evaluation by run_glue_deebert.py: the model is --output_dir.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import matplotlib as mpl
import numpy as np
import static_models
import torch
from benchmarking import EARLY, System, measure, plot, table, verdicts, write_csv
from cuda_graphs import GraphedDeeBert
from full_graphs import stock_model
from torch import nn
from transformers import PreTrainedModel

from deebert.evaluation import plotting
from deebert.evaluation.cost import costs_of
from deebert.experiment.arguments import parse_args
from deebert.experiment.experiment import Experiment
from deebert.experiment.run import make_accelerator
from deebert.modeling.checkpoints import (
    check_threshold,
    load_config,
    load_model,
    max_tokens,
    quiet_transformers,
)
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder, replacing


def load_static(folder: str, config, longest: int) -> PreTrainedModel:
    """A static model of the same labels and vocabulary, for texts of up to `longest` tokens. Raises InputError."""
    model = static_models.load(folder)
    if model.config.id2label != config.id2label:
        raise InputError(f"--static {folder}: its labels differ from the model's")
    if model.config.vocab_size != config.vocab_size:
        raise InputError(f"--static {folder}: its vocabulary differs from the model's")
    longest_text = max_tokens(load_config(folder))
    if longest_text < longest:
        raise InputError(f"--static {folder}: it takes {longest_text} tokens; a text has {longest}")
    return model


def pytorch_systems(stock: nn.Module, compiled: bool, model: str, precision: str = "") -> list[System]:
    """A model without exits in PyTorch. precision: ", bf16" and the like, after the runtime's name."""
    names = ["input_ids", "attention_mask"]
    if getattr(stock.config, "type_vocab_size", 0):  # other encoders take no token types
        names.append("token_type_ids")

    def system(runtime: str, run: Callable) -> System:
        return System(f"{runtime}{precision}", model, lambda batch: run(**{name: batch[name] for name in names}))

    systems = [system("PyTorch", stock)]
    if compiled:
        systems.append(system("torch.compile", torch.compile(stock, dynamic=True)))
    if compiled and next(stock.parameters()).device.type == "cuda":
        # As CUDA graphs, one for each shape of a batch. They are captured in the first repeat, which medians leave out.
        graphed = torch.compile(stock, mode="reduce-overhead", dynamic=True)
        systems.append(system("torch.compile reduce-overhead", graphed))
    return systems


def all_systems(
    folder: str, model, static: dict[str, PreTrainedModel], compiled: bool
) -> tuple[list[System], dict[str, Callable]]:
    """The systems without exits, and what runs early exit, by name."""
    systems, runners, on_gpu = [], {}, model.device.type == "cuda"
    precisions = {", fp32": torch.float32, ", bf16": torch.bfloat16} if on_gpu else {"": torch.float32}
    for precision, dtype in precisions.items():
        chosen = copy.deepcopy(model).to(dtype)
        runners[f"PyTorch{precision}"] = chosen
        if on_gpu:
            runners[f"CUDA graphs{precision}"] = GraphedDeeBert(chosen)
        systems += pytorch_systems(stock_model(folder, chosen), compiled, "full", precision)
        for name, other in static.items():
            systems += pytorch_systems(copy.deepcopy(other).to(model.device, dtype), compiled, name, precision)
    return systems, runners


def early_exit(runtime: str, runner: Callable, threshold: float) -> System:
    return System(runtime, EARLY, lambda batch: runner(**batch, exit_threshold=threshold), threshold)


def static_costs(static: dict[str, PreTrainedModel], config, lengths: np.ndarray) -> dict[str, float]:
    """The cost of each static model: a ratio of sums, as everywhere."""

    def of(model: PreTrainedModel) -> float:
        layers, pooling = model.config.num_hidden_layers, static_models.pooling_of(model)
        return static_models.operations(config, layers, pooling, lengths.astype(float)).sum()

    full = costs_of(config, lengths).full.sum()
    return {name: float(of(each) / full) for name, each in static.items()}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our flags and the driver's. Raises InputError."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--static", nargs="+", default=[], metavar="DIR", help="folders of static models to time, too")
    add("--benchmark_dir", required=True, type=Path, help="for benchmark.md, .csv, .png and .pdf")
    add("--exit_threshold", "--early_exit_entropy", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    add("--batch_sizes", type=positive, nargs="+", default=[1, 32], help="1 is always there")
    add("--samples", type=positive, help="the first samples of the dev set only")
    add("--repeats", type=positive, default=5, help="passes of each system; medians are reported")
    add("--no_compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    return parser.parse_known_args()


def main() -> None:
    args, flags = parse()
    quiet_transformers()
    evaluation = parse_args(["--do_eval", *flags])
    experiment = Experiment(evaluation, make_accelerator(evaluation))
    folder, config, task = experiment.source, experiment.config, experiment.task
    if config.num_labels == 1:
        raise InputError(f"{folder}: a regression model has no labels to compare")
    for threshold in args.exit_threshold:
        check_threshold(threshold, config)
    features = experiment.features(next(iter(task.dev_splits)))
    features, device = features.take(range(len(features))[: args.samples]), experiment.accelerator.device
    model = load_model(folder, config).to(device).eval()
    longest, names = int(features.lengths.max()), plotting.labels(args.static)
    static = {name: load_static(each, config, longest) for name, each in zip(names, args.static, strict=True)}
    sizes = [1, *(size for size in args.batch_sizes if 1 < size <= len(features))]
    if left_out := [str(size) for size in args.batch_sizes if size > len(features)]:
        print(f"note: no batches of {', '.join(left_out)}: there are {len(features)} samples", file=sys.stderr)
    make_folder(args.benchmark_dir)
    with torch.inference_mode():
        systems, runners = all_systems(folder, model, static, not args.no_compile)
        costs = static_costs(static, config, features.lengths)
        systems = [replace(system, cost=costs.get(system.model, 1.0)) for system in systems]
        thresholds = [NO_EXIT, *args.exit_threshold]
        systems += [early_exit(runtime, run, x) for runtime, run in runners.items() for x in thresholds]
        rows = measure(systems, features, task, config, sizes, args.repeats, device)
    about = (
        f"{task.name}, {len(features)} samples of {features.lengths.mean():.0f} tokens on average, "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'}, "
        f"{args.repeats} repeats; times in ms per sample, p50 and p99 at batch size 1"
    )
    text = f"{about}\n\n{table(rows)}\n\n{verdicts(rows)}\n"
    print(f"\n{text}")
    with replacing(args.benchmark_dir / "benchmark.md") as file:
        file.write(text)
    write_csv(args.benchmark_dir / "benchmark.csv", rows)
    print(args.benchmark_dir / "benchmark.md", args.benchmark_dir / "benchmark.csv", sep="\n")
    with mpl.rc_context(plotting.STYLE):
        print(*plotting.save(plot(rows, task.primary_metric), args.benchmark_dir / "benchmark"), sep="\n")


if __name__ == "__main__":
    cli.run(main)
