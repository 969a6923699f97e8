"""Early exit beside what one would run instead, timed on a dev set. benchmark.sh runs it.

In one run, in which all systems take random turns: Hugging Face's full model as it is, compiled, and in ONNX Runtime
in fp32 and int8; static models (static_models.py) in the same ways; and early exit at several thresholds in PyTorch and
ONNX Runtime. On a GPU: full and static models in fp32 and bf16, and early exit in PyTorch and as CUDA graphs.

Further flags are those of an evaluation by run_glue_deebert.py: the model is --output_dir. Takes some 10 minutes for
300 texts and a model of 6 layers on two cores, half of it for exports and torch.compile.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import matplotlib as mpl
import numpy as np
import static_models
import torch
from benchmarking import EARLY, System, measure, plot, table, verdicts, write_csv
from cuda_graphs import GraphedDeeBert
from full_graphs import export_full
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert.data.batching import Features, collator
from deebert.data.tasks import eval_splits
from deebert.evaluation import plotting
from deebert.evaluation.cost import costs_of
from deebert.evaluation.timing import first_passes
from deebert.experiment.arguments import parse_args
from deebert.experiment.experiment import Experiment
from deebert.experiment.run import make_accelerator
from deebert.modeling.checkpoints import (
    check_threshold,
    load_config,
    load_model,
    load_tokenizer,
    max_tokens,
    quiet_transformers,
)
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.onnx_export import quantize, traced_parts, write_export
from deebert.runtime.onnx_runtime import OnnxDeeBert, open_session
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder, replacing

CPU = torch.device("cpu")


def stock_model(folder: str, model) -> nn.Module:
    """The full model as users of Hugging Face run it: its own class, which ignores the off-ramps."""
    if model.config.model_type == "roberta":
        return StockRoberta(model)
    stock = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return stock.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()


class StockRoberta(nn.Module):
    """A full RoBERTa with the original's head, pooler and linear classifier, for which Hugging Face has no class."""

    def __init__(self, model):
        super().__init__()
        self.config, self.base_model, self.classifier = model.config, model.base_model, model.classifier

    def forward(self, **batch) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.classifier(self.base_model(**batch).pooler_output))


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


def onnx_systems(stock: PreTrainedModel, features: Features, config, work: Path, model: str) -> list[System]:
    """A model without exits in ONNX Runtime, in fp32 and int8: of several graphs the one that is fastest here."""
    make_folder(work)
    paths = {"fp32": export_full(stock, work), "int8": {}}
    for way, path in paths["fp32"].items():
        paths["int8"][way] = path.with_name(f"int8_{path.name}")
        quantize(path, paths["int8"][way])
    systems = []
    for precision, candidates in paths.items():
        graphs = [onnx_forward(path) for path in candidates.values()]
        passes = first_passes(graphs, features, collator(config), CPU)
        milliseconds = [1e3 * float(np.median(seconds)) for seconds in passes]
        listed = "; ".join(f"{way} {ms:.2f}" for way, ms in zip(candidates, milliseconds, strict=True))
        print(f"{model}, ONNX Runtime {precision}, ms a text: {listed}", flush=True)
        systems.append(System(f"ONNX Runtime {precision}", model, graphs[int(np.argmin(milliseconds))]))
    return systems


def onnx_forward(path: Path) -> Callable[[dict], SequenceClassifierOutput]:
    """A full graph in ONNX Runtime."""
    session = open_session(path, torch.get_num_threads())
    names = {each.name for each in session.get_inputs()}  # a model without token types may have no input for them

    def forward(batch: dict) -> SequenceClassifierOutput:
        feed = {name: tensor.numpy() for name, tensor in batch.items() if name in names}
        return SequenceClassifierOutput(logits=torch.from_numpy(session.run(None, feed)[0]))

    return forward


def cpu_systems(
    folder: str, model, static: dict[str, PreTrainedModel], compiled: bool, features: Features, work: Path
) -> tuple[list[System], dict[str, Callable]]:
    """The systems without exits on a CPU, and what runs early exit, by name. work: a folder for the exports."""
    print("exporting the models, in fp32 and int8", flush=True)
    systems = pytorch_systems(stock_model(folder, model), compiled, "full")
    systems += onnx_systems(model, features, model.config, work / "full", "full")
    for name, other in static.items():
        systems += pytorch_systems(other, compiled, name)
        systems += onnx_systems(other, features, model.config, work / name.replace("/", "_"), name)
    runners, tokenizer = {"PyTorch": model}, load_tokenizer(folder)
    with traced_parts(model) as parts:
        for precision in ("fp32", "int8"):
            write_export(parts, model.config, tokenizer, work / precision, int8=precision == "int8")
            runners[f"ONNX Runtime {precision}"] = OnnxDeeBert(work / precision, torch.get_num_threads())
    return systems, runners


def gpu_systems(
    folder: str, model, static: dict[str, PreTrainedModel], compiled: bool
) -> tuple[list[System], dict[str, Callable]]:
    """The same on a GPU, in fp32 and bf16."""
    systems, runners = [], {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        chosen = copy.deepcopy(model).to(dtype)
        runners |= {f"PyTorch, {precision}": chosen, f"CUDA graphs, {precision}": GraphedDeeBert(chosen)}
        systems += pytorch_systems(stock_model(folder, chosen), compiled, "full", f", {precision}")
        for name, other in static.items():
            systems += pytorch_systems(copy.deepcopy(other).to(model.device, dtype), compiled, name, f", {precision}")
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
    features = experiment.features(next(iter(eval_splits(task))))
    features, device = features.first(args.samples or len(features)), experiment.accelerator.device
    model = load_model(folder, config).to(device).eval()
    longest, names = int(features.lengths.max()), plotting.labels(args.static)
    static = {name: load_static(each, config, longest) for name, each in zip(names, args.static, strict=True)}
    sizes = [1, *(size for size in args.batch_sizes if 1 < size <= len(features))]
    if left_out := [str(size) for size in args.batch_sizes if size > len(features)]:
        print(f"note: no batches of {', '.join(left_out)}: there are {len(features)} samples", file=sys.stderr)
    make_folder(args.benchmark_dir)
    with TemporaryDirectory() as work, torch.inference_mode():
        given = folder, model, static, not args.no_compile
        on_gpu = device.type == "cuda"
        systems, runners = gpu_systems(*given) if on_gpu else cpu_systems(*given, features, Path(work))
        costs = static_costs(static, config, features.lengths)
        systems = [replace(system, cost=costs.get(system.model, 1.0)) for system in systems]
        thresholds = [NO_EXIT, *args.exit_threshold]
        systems += [early_exit(runtime, run, x) for runtime, run in runners.items() for x in thresholds]
        rows = measure(systems, features, task, config, sizes, args.repeats, device)
    about = (
        f"{task.name}, {len(features)} samples of {features.lengths.mean():.0f} tokens on average, "
        f"{torch.cuda.get_device_name() if on_gpu else f'{torch.get_num_threads()} threads'}, "
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
