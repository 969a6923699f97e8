"""Early exit beside what one would run instead.

Times the full model (Hugging Face's, as it is and compiled; ONNX Runtime fp32 and int8), smaller models in the same
ways, and early exit in PyTorch and ONNX Runtime at several thresholds, on a dev set, in one run in which the systems
take turns: latency at batch size 1, throughput at others. On a GPU: full and smaller models in fp32 and bf16, and early
exit in PyTorch and as CUDA graphs.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import matplotlib as mpl
import numpy as np
import torch
from benchmarking import CPU, System, measure, plot, table, write_csv
from full_graphs import FullGraph, export_full
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert.data.batching import collator
from deebert.data.features import Features
from deebert.data.tasks import get_task
from deebert.evaluation import plotting
from deebert.evaluation.all_exits import dev_features
from deebert.evaluation.series import labels
from deebert.evaluation.timing import first_passes
from deebert.modeling.checkpoints import (
    check_threshold,
    disable_cudnn_attention,
    load_config,
    load_final_classifier,
    load_model,
    load_tokenizer,
    max_tokens,
    quiet_transformers,
)
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.cuda_graphs import GraphedDeeBert
from deebert.runtime.onnx_export import exportable, quantize, traced_parts, write_export
from deebert.runtime.onnx_runtime import OnnxDeeBert, open_session
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, DefaultsHelp, positive
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder, replacing


def pytorch_systems(folder: str, model, compiled: bool, name: str = "full") -> list[System]:
    """A model without exits in PyTorch, in its precision and on its device: what users run today."""
    if model.config.model_type == "bert":
        stock = BertForSequenceClassification.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    else:  # RoBERTa's head is not that of Hugging Face's class; the others take the same way
        full = FullGraph(model)

        def stock(**batch) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=full(**batch))

    systems = [System(f"PyTorch, {name}", None, lambda batch: stock(**batch))]
    if compiled:
        fast = torch.compile(stock, dynamic=True)
        systems.append(System(f"torch.compile, {name}", None, lambda batch: fast(**batch)))
    if compiled and model.device.type == "cuda":
        # As CUDA graphs, one for each shape of a batch. They are captured in the first repeat, which medians leave out.
        graphed = torch.compile(stock, mode="reduce-overhead", dynamic=True)
        systems.append(System(f"torch.compile reduce-overhead, {name}", None, lambda batch: graphed(**batch)))
    return systems


@dataclass(frozen=True)
class Smaller:
    """A smaller model of the same task, without early exit. name: what its folder is called in the table."""

    name: str
    folder: str
    model: PreTrainedModel

    @classmethod
    def load(cls, name: str, folder: str, config, longest: int, device: torch.device) -> "Smaller":
        """config, longest: of the benchmarked model and its texts, which this one has to fit. Raises InputError."""
        own = load_config(folder)
        if own.id2label != config.id2label:
            raise InputError(f"--smaller {folder}: its labels differ from those of --model")
        if own.vocab_size != config.vocab_size:
            raise InputError(f"--smaller {folder}: its vocabulary differs from that of --model")
        if max_tokens(own) < longest:
            raise InputError(f"--smaller {folder}: it takes {max_tokens(own)} tokens; a text has {longest}")
        return cls(name, folder, load_final_classifier(folder, own).to(device).eval())

    def systems(self, systems: Sequence[System]) -> list[System]:
        """These systems as those of this model."""
        return [replace(system, threshold=None, smaller=self.model.config) for system in systems]


def in_precision(model: PreTrainedModel, precision: torch.dtype) -> PreTrainedModel:
    """The model in float32, or a copy of it in another precision."""
    return model if precision == torch.float32 else copy.deepcopy(model).to(precision)


def gpu_systems(
    folder: str, model, smaller: Sequence[Smaller], thresholds: Sequence[float], compiled: bool
) -> list[System]:
    """All systems that run on a GPU, in fp32 and bf16."""
    systems = []
    for precision in (torch.float32, torch.bfloat16):
        name = "bf16" if precision == torch.bfloat16 else "fp32"
        chosen = in_precision(model, precision)
        runners = {"DeeBERT, PyTorch": chosen, "DeeBERT, CUDA graphs": GraphedDeeBert(chosen)}
        if precision == torch.float32:
            runners["DeeBERT, CUDA graphs, in step"] = GraphedDeeBert(chosen, speculate=False)
        early = [early_exit(runner, threshold, title) for title, runner in runners.items() for threshold in thresholds]
        full = pytorch_systems(folder, chosen, compiled)
        for other in smaller:
            its_model = in_precision(other.model, precision)
            full += other.systems(pytorch_systems(other.folder, its_model, compiled, other.name))
        systems += [replace(system, name=f"{system.name}, {name}") for system in full + early]
    return systems


def cpu_systems(
    folder: str,
    model,
    smaller: Sequence[Smaller],
    thresholds: Sequence[float],
    compiled: bool,
    features: Features,
    work: Path,
) -> list[System]:
    """All systems that run on a CPU, in fp32 and int8. work: a folder for the exports."""
    print("exporting the full model and its layers, in fp32 and int8", flush=True)
    systems = pytorch_systems(folder, model, compiled)
    systems += onnx_systems(model, features, work / "full")
    for number, other in enumerate(smaller):
        place = work / f"smaller_{number}"
        systems += other.systems(pytorch_systems(other.folder, other.model, compiled, other.name))
        systems += other.systems(onnx_systems(other.model, features, place, other.name))
    runners = early_runners(folder, model, work)
    return systems + [early_exit(runner, x, title) for title, runner in runners.items() for x in thresholds]


def early_exit(runner, threshold: float | None, name: str) -> System:
    """Early exit at one threshold, batch by batch. threshold: None is what the model stores."""
    return System(name, threshold, lambda batch: runner(**batch, exit_threshold=threshold))


def onnx_systems(model, features: Features, work: Path, name: str = "full") -> list[System]:
    """A model without exits in ONNX Runtime, in fp32 and int8: of several graphs the one that is fastest here."""
    make_folder(work)
    paths = {"fp32": export_full(exportable(model), work), "int8": {}}
    for way, path in paths["fp32"].items():
        paths["int8"][way] = path.with_name(f"int8_{path.name}")
        quantize(path, paths["int8"][way])
    systems = []
    for precision, candidates in paths.items():
        graphs = [System(way, None, onnx_forward(path)) for way, path in candidates.items()]
        passes = first_passes([graph.forward for graph in graphs], features, collator(model.config), CPU)
        milliseconds = [1e3 * float(np.median(seconds)) for seconds in passes]
        listed = "; ".join(f"{graph.name} {ms:.2f}" for graph, ms in zip(graphs, milliseconds, strict=True))
        print(f"{name} model, ONNX Runtime {precision}, ms a text: {listed}", flush=True)
        fastest = graphs[int(np.argmin(milliseconds))]
        systems.append(replace(fastest, name=f"ONNX Runtime {precision}, {name}"))
    return systems


def onnx_forward(path: Path) -> Callable[[dict], SequenceClassifierOutput]:
    """A full graph in ONNX Runtime."""
    session = open_session(path, torch.get_num_threads())
    names = {each.name for each in session.get_inputs()}  # a model without token types may have no input for them

    def forward(batch: dict) -> SequenceClassifierOutput:
        feed = {name: tensor.numpy() for name, tensor in batch.items() if name in names}
        return SequenceClassifierOutput(logits=torch.from_numpy(session.run(None, feed)[0]))

    return forward


def early_runners(folder: str, model, work: Path) -> dict[str, Callable]:
    """Early exit in PyTorch and in ONNX Runtime, by name."""
    runners = {"DeeBERT, PyTorch": model}
    tokenizer = load_tokenizer(folder)
    with traced_parts(model) as parts:
        for precision in ("fp32", "int8"):
            write_export(parts, model.config, tokenizer, work / precision, int8=precision == "int8")
            runners[f"DeeBERT, ONNX Runtime {precision}"] = OnnxDeeBert(work / precision, torch.get_num_threads())
    return runners


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[1],
        formatter_class=DefaultsHelp,
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--smaller", nargs="+", default=[], help="folders of smaller models to time, too")
    parser.add_argument("--task_name", required=True, help="the task that it was trained for")
    parser.add_argument("--data_dir", required=True, help="folder with the task's TSV files; its dev set is used")
    parser.add_argument("--output_dir", required=True, type=Path, help="for benchmark.md, .csv, .png and .pdf")
    parser.add_argument(
        "--exit_threshold", "--early_exit_entropy", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5]
    )
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 8, 32, 128], help="1 is always there")
    parser.add_argument("--samples", type=positive, help="how many samples of the dev set (default: all)")
    parser.add_argument("--repeats", type=positive, default=3, help="passes of each system; medians are reported")
    parser.add_argument("--max_seq_length", type=positive, help="longer texts are cut (default: as in the training)")
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
    features = dev_features(task, args.data_dir, config, tokenizer, args.max_seq_length)
    features = features.first(args.samples or len(features))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    device = torch.device(args.device)
    model = load_model(args.model, config).to(device).eval()
    longest, names = int(features.lengths.max()), labels(args.smaller)
    smaller = [Smaller.load(*each, config, longest, device) for each in zip(names, args.smaller, strict=True)]
    sizes = [1, *(size for size in args.batch_sizes if 1 < size <= len(features))]
    if left_out := [str(size) for size in args.batch_sizes if size > len(features)]:
        print(f"note: no batches of {', '.join(left_out)}: there are {len(features)} samples", file=sys.stderr)
    make_folder(args.output_dir)
    with TemporaryDirectory() as work, torch.inference_mode():
        thresholds = [NO_EXIT, *args.exit_threshold]
        given = args.model, model, smaller, thresholds, not args.no_compile
        systems = gpu_systems(*given) if device.type == "cuda" else cpu_systems(*given, features, Path(work))
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


if __name__ == "__main__":
    cli.run(main)
