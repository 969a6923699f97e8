"""A model without exits, as Hugging Face runs it, and in ONNX Runtime in each way that a practitioner would export it.

The ways: PyTorch's two exporters, with and without ONNX Runtime's own optimizer for transformers, which fuses what its
patterns match (attention, layer normalization, GELU). The fastest one counts.
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from deebert.evaluation.timing import TURN_WARM_UP_SECONDS
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.onnx_export import quantize, quiet_exporters, save_graph
from deebert.runtime.onnx_runtime import open_session
from deebert.utils.files import make_folder, read_json, write_json

CHOSEN = "chosen.json"


def stock_model(folder: str, model) -> nn.Module:
    """The full model as users of Hugging Face run it: its own class, which ignores the off-ramps."""
    if model.config.model_type == "roberta" or model.config.linear_classifier:
        return StockLayers(model)
    stock = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return stock.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()


class StockLayers(nn.Module):
    """Hugging Face's own pass, with a head that its class lacks: of the mean, or the original's for RoBERTa."""

    def __init__(self, model):
        super().__init__()
        self.config, self.model = model.config, model

    def forward(self, **batch) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.model._plain(batch)[0])


class FullGraph(nn.Module):
    """The logits of a classifier, as a module with tensors in and out. Of ours: of the full model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {"token_type_ids": token_type_ids} if getattr(self.model.config, "type_vocab_size", 0) else {}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | types
        never = {"exit_threshold": NO_EXIT} if hasattr(self.model, "set_exit_threshold") else {}
        return self.model(**inputs, **never).logits


def export_full(model, folder: Path) -> dict[str, Path]:
    """Writes the graphs of a model on the CPU into a folder, in each way. Returns them by name."""
    ids = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": ids + 4, "attention_mask": ids, "token_type_ids": ids - 1}
    paths = {}
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        traced = copy.deepcopy(model).eval()
        traced.set_attn_implementation(attention)
        if attention == "eager":
            paths["torch.export"] = folder / "torch_export.onnx"
            save_graph(FullGraph(traced), inputs, ["logits"], paths["torch.export"])
        paths[f"TorchScript, {attention}"] = folder / f"torchscript_{attention}.onnx"
        _trace(FullGraph(traced), inputs, paths[f"TorchScript, {attention}"])
    for name, path in list(paths.items()):
        paths[f"{name}, fused"] = path.with_name(f"fused_{path.name}")
        _fuse(path, paths[f"{name}, fused"], model.config)
    return paths


def _trace(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    """Writes the graph of a module by PyTorch's older exporter."""
    any_size = {name: {0: "batch", 1: "tokens"} for name in inputs}
    with quiet_exporters(), torch.no_grad():
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes=any_size,
            opset_version=17,
            dynamo=False,
        )


def _fuse(path: Path, fused: Path, config) -> None:
    """Writes the graph as ONNX Runtime's optimizer for transformers changes it."""
    from onnxruntime.transformers import optimizer

    with quiet_exporters():
        graph = optimizer.optimize_model(
            str(path), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0
        )
        graph.save_model_to_file(str(fused))


def timed_turns(functions: Sequence[Callable], inputs: Sequence, rounds: int, turn: int) -> np.ndarray:
    """(functions, inputs) seconds: the median over the rounds.

    The functions take turns on a few inputs at a time (`turn`), in random order, so that the machine's drift affects
    all alike. Each turn begins with calls that are not timed (see deebert/evaluation/timing.py).
    """
    seconds, order = np.zeros((rounds, len(functions), len(inputs))), np.random.default_rng(0)
    for of_round in seconds:
        for start in range(0, len(inputs), turn):
            numbers = range(start, min(start + turn, len(inputs)))
            for i in order.permutation(len(functions)):
                began = time.perf_counter()
                for number in numbers:
                    functions[i](inputs[number])
                    if time.perf_counter() - began > TURN_WARM_UP_SECONDS:
                        break
                for number in numbers:
                    began = time.perf_counter()
                    functions[i](inputs[number])
                    of_round[i, number] = time.perf_counter() - began
    return np.median(seconds, axis=0)


def strongest_graphs(model, batches: dict[int, list[dict]], folder: Path) -> dict[str, dict[int, Path]]:
    """Of the graphs of a model on the CPU, by "fp32" and "int8", the fastest one for batches of each size.

    batches: inputs of the model, arrays (B, T), by their size B. A graph has to give the model's logits. The chosen
    graphs are kept in the folder and used again.
    """
    if not (folder / CHOSEN).is_file():
        make_folder(folder)
        right = [path for path in export_full(model, folder).values() if same_logits(model, path, batches)]
        paths = {"fp32": right, "int8": [path.with_name(f"int8_{path.name}") for path in right]}
        for fp32, int8 in zip(*paths.values(), strict=True):
            quantize(fp32, int8)
        chosen = {precision: fastest(candidates, batches) for precision, candidates in paths.items()}
        kept = {name for by_size in chosen.values() for name in by_size.values()}
        for path in set(folder.iterdir()) - {folder / name for name in kept}:
            path.unlink()
        write_json(folder / CHOSEN, chosen)
    chosen = read_json(folder / CHOSEN)
    return {way: {int(size): folder / name for size, name in of.items()} for way, of in chosen.items()}


def runner(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A graph in ONNX Runtime: the model's inputs, arrays (B, T), to logits (B, C)."""
    session = open_session(path)
    names = [each.name for each in session.get_inputs()]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        return session.run(None, {name: batch[name] if name in batch else 0 * batch["input_ids"] for name in names})[0]

    return run


def same_logits(model, path: Path, batches: dict[int, list[dict]]) -> bool:
    """Whether a graph gives the model's logits for the first batch of each size."""
    graph, module = runner(path), FullGraph(model).eval()
    for batch, *_ in batches.values():
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
        if not np.allclose(graph(batch), expected, atol=1e-3):
            print(f"note: {path} gives other logits than the model, and is left out", flush=True)
            return False
    return True


def fastest(paths: Sequence[Path], batches: dict[int, list[dict]]) -> dict[int, str]:
    """The name of the fastest graph for batches of each size."""
    graphs, names = [runner(path) for path in paths], {}
    for size, some in batches.items():
        seconds = timed_turns(graphs, some, rounds=3, turn=len(some)).sum(axis=1)
        names[size] = paths[int(np.argmin(seconds))].name
        shown = ", ".join(
            f"{path.stem} {1e3 * s / (size * len(some)):.2f}" for path, s in zip(paths, seconds, strict=True)
        )
        print(f"{paths[0].parent.name}, batch {size}, ms a text: {shown}", flush=True)
    return names
