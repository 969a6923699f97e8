"""Writes a trained model as an ONNX graph: `deebert export --model DIR --output DIR [--int8]`.

One file of all layers with the exits behind them, for batches of any size and length. A run of it ends where a sample
may leave: for a single text that is all; of a batch, onnx_runtime.py answers who leaves and goes on with the others.
The threshold is an input. Another exit rule than the model's is possible, too, and has the graph stop at each layer.
"""

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from torch import Tensor, nn

import deebert
from deebert.modeling.early_exit import config_rule
from deebert.runtime.onnx_runtime import FORMAT, GRAPH, MANIFEST
from deebert.utils.cli import InputError
from deebert.utils.files import make_folder

MISSING = "exporting needs more packages: pip install 'deebert[onnx]', or pip install onnx onnxruntime onnxscript"


class MasksGraph(nn.Module):
    """What layers and off-ramps read of the attention mask, see `HighwayClassifier.layer_mask` and `token_weights`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor) -> tuple[Tensor, ...]:
        weights = self.model.token_weights(attention_mask)
        return self.model.layer_mask(attention_mask), *([] if weights is None else [weights])


class LayerGraph(nn.Module):
    """One layer, see `HighwayClassifier.layer`."""

    def __init__(self, model, i: int):
        super().__init__()
        self.model, self.i = model, i

    def forward(self, inputs: Tensor, mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.model.layer(self.i, inputs, mask, token_type_ids)


class ExitGraph(nn.Module):
    """The exit behind a layer, see `HighwayClassifier.exit_answer`, and the uncertainty (b,) by the model's rule."""

    def __init__(self, model, i: int):
        super().__init__()
        self.model, self.i, self.rule = model, i, config_rule(model.config)

    def forward(self, hidden: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, ...]:
        logits, certainty = self.model.exit_answer(self.i, hidden, token_weights)
        if certainty is None and self.model.base_model.encoder.learn_to_exit is not None:
            certainty = torch.ones_like(logits[:, 0])  # the last layer's: all exits give the same outputs
        uncertainty, _ = self.rule.uncertainty(logits, certainty, None)
        return logits, uncertainty, *([] if certainty is None else [certainty])


class FullGraph(nn.Module):
    """Hugging Face's model without off-ramps as one graph: what early exit is measured against."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.model.final_answer(self.model.base_model(input_ids, attention_mask, token_type_ids).pooler_output)


def export_full(model, path: Path, int8: bool = False) -> None:
    """Writes the graph of the full model, without off-ramps, of a model that `exportable` returned."""
    ids = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": ids + 4, "attention_mask": ids, "token_type_ids": ids - 1}
    save_graph(FullGraph(model), inputs, ["logits"], path, int8)


def export_parts(model, folder: Path, int8: bool = False) -> None:
    """Writes the graphs of which onnx_merge.py makes one, of a model that `exportable` returned."""
    ids = torch.ones(2, 7, dtype=torch.long)
    mask, token_weights = model.layer_mask(ids), model.token_weights(ids)
    hidden = torch.randn(2, 7, model.config.hidden_size)
    weights = {} if token_weights is None else {"token_weights": token_weights}
    answers = ["logits", "uncertainty", "certainty"][: 2 if model.base_model.encoder.learn_to_exit is None else 3]
    save_graph(MasksGraph(model), {"attention_mask": ids}, ["mask", *weights], folder / "masks.onnx", int8)
    last = model.config.num_hidden_layers - 1
    for i in range(last + 1):
        inputs = (
            {"inputs": ids + 4, "mask": mask, "token_type_ids": ids - 1} if i == 0 else {"inputs": hidden, "mask": mask}
        )
        save_graph(LayerGraph(model, i), inputs, ["hidden"], folder / f"layer_{i}.onnx", int8)
        reads = {"hidden": hidden} | (weights if i < last else {})
        save_graph(ExitGraph(model, i), reads, answers, folder / f"exit_{i}.onnx", int8)


def exportable(model):
    """A copy of the model on the CPU, with eager attention, which exports as plain products. Raises InputError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  what torch.onnx.export is made with
    except ImportError:
        raise InputError(MISSING) from None
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")
    return model


def save_graph(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: Path, int8: bool = False
) -> None:
    """Writes the graph of a module for these inputs, of any batch size and length."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    any_size = torch.export.Dim.DYNAMIC
    shapes = {name: {0: any_size, 3 if name == "mask" else 1: any_size} for name in inputs}  # a mask is (b, 1, 1, T)
    logging.disable(logging.WARNING)  # both libraries have advice on every graph
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=shapes,
            )
        program.save(path)
        if int8:
            full = path.rename(path.with_suffix(".fp32"))
            quantize_dynamic(full, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
            full.unlink()
    finally:
        logging.disable(logging.NOTSET)


def export(model, tokenizer, folder: Path, int8: bool = False) -> None:
    """Writes the graph, config, tokenizer and, last, the manifest. int8: weights of matrix products as 8-bit integers.

    Raises InputError where packages are missing, or the model has too many layers.
    """
    model = exportable(model)
    from deebert.runtime.onnx_graph import MOST_LAYERS, merge  # needs the package onnx, which `exportable` asked for

    if model.config.num_hidden_layers > MOST_LAYERS:
        raise InputError(f"the model has {model.config.num_hidden_layers} layers; a graph holds up to {MOST_LAYERS}")
    make_folder(folder)
    partial = Path(mkdtemp(prefix=".exporting-", dir=folder))
    try:
        with TemporaryDirectory(dir=partial) as parts:
            export_parts(model, Path(parts), int8)
            merge(Path(parts), model.config, partial / GRAPH)
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {
            "format": FORMAT,
            "deebert": deebert.__version__,
            "precision": "int8" if int8 else "fp32",
            "layers": model.config.num_hidden_layers,
            "exit_rule": model.config.exit_rule,
        }
        (partial / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")
        # the manifest last: where it is, the graph is whole
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)
