"""Exports a trained model as one ONNX graph of all layers with the exits after them, for any batch size and length.

The parts of the model (masks, layers, exits) are traced one by one; onnx_graph.py makes one graph of them, in which
samples exit by the model's own exit rule. The threshold is an input. For another rule onnx_runtime.py has the graph
stop after each layer.

Step i, from 0, ends at exit i: it runs one layer, the first one the embeddings too. Where there is an exit before the
first layer, step 0 is the embeddings alone. Shapes: b samples, T tokens, H hidden, C labels.
"""

import copy
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import deebert
from deebert.modeling.checkpoints import encoding_facts
from deebert.modeling.config import MANIFEST, config_rule
from deebert.modeling.exit_rules import ExitRule
from deebert.runtime.exported import FORMAT, GRAPH, graph_facts
from deebert.utils.errors import InputError, one_line
from deebert.utils.files import adding_files, make_folder, remove_leftovers

if TYPE_CHECKING:
    from onnx import ModelProto

MOST_BYTES = 2**31 - 1  # of a file of ONNX with its weights inside
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # torch.onnx.export needs the last


def additive_mask(model, attention_mask: Tensor) -> Tensor:
    """(b, T) -> what layers add to their attention scores (b, 1, 1, T); MPNet's (b, heads, T, T)."""
    mask = (attention_mask == 0).to(model.dtype)[:, None, None] * torch.finfo(model.dtype).min
    return model.base_model.encoder.layer_mask(mask, attention_mask)


def run_step(model, i: int, inputs: Tensor, mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """Step i without its exit: ids (b, T) where i is 0, else hidden states (b, T, H), and the mask of `additive_mask`.

    The last step's layer is computed for the first token only, where the final classifier reads no other.
    """
    encoder, layer = model.base_model.encoder, model.config.exit_layers[i]
    hidden = model.base_model.embed(inputs, token_type_ids) if i == 0 else inputs
    if layer == model.config.num_hidden_layers and model.config.first_token_only:
        return encoder.first_token_layer(hidden, mask)
    return hidden if layer == 0 else encoder.run_layer(layer - 1, hidden, mask)


def exit_logits(model, i: int, hidden: Tensor, pooling_weights: Tensor | None) -> Tensor:
    """Logits (b, C) of exit i, also of the last, after its step."""
    off_ramps = model.base_model.encoder.off_ramps
    if i == len(off_ramps):
        return model.classify(model.final_state(hidden, pooling_weights))
    return off_ramps[i](hidden, pooling_weights)


def masks(model, attention_mask: Tensor) -> tuple[Tensor, ...]:
    """(b, T) -> the mask of `additive_mask` and, where off-ramps need it, pooling weights (b, T)."""
    weights = model.pooling_weights(attention_mask)
    return additive_mask(model, attention_mask), *([] if weights is None else [weights])


def exit_outputs(
    model, i: int, rule: ExitRule, hidden: Tensor, pooling_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The logits (b, C) of exit i, and their uncertainty (b,) by the rule."""
    logits = exit_logits(model, i, hidden, pooling_weights)
    if rule.stateful:  # the graph keeps no state, so nothing exits by it
        return logits, torch.full_like(logits[:, 0], math.inf)
    return logits, rule.uncertainty(logits)[0]


class Part(nn.Module):
    """A function of a model, such as `run_step` for one i, as a module that can be exported."""

    def __init__(self, function: Callable, model, *arguments):
        super().__init__()
        self.model, self.forward = model, partial(function, model, *arguments)


def export_parts(model, folder: Path) -> None:
    """Writes the graphs of which onnx_graph.py makes one, of a model that `exportable` returned."""
    ids = torch.ones(2, 7, dtype=torch.long)
    mask, pooling_weights = additive_mask(model, ids), model.pooling_weights(ids)
    hidden = torch.randn(2, 7, model.config.hidden_size)
    weights = {} if pooling_weights is None else {"pooling_weights": pooling_weights}
    save_graph(Part(masks, model), {"attention_mask": ids}, ["mask", *weights], folder / "masks.onnx")
    last, rule = len(model.config.exit_layers) - 1, config_rule(model.config)
    for i in range(last + 1):
        inputs = {"inputs": hidden, "mask": mask}
        if i == 0:
            inputs = {"inputs": ids + 4, "mask": mask, "token_type_ids": ids - 1}
        save_graph(Part(run_step, model, i), inputs, ["hidden"], folder / f"layer_{i}.onnx")
        exit_inputs = {"hidden": hidden} | (weights if i < last or model.config.classifier_pooling == "mean" else {})
        save_graph(
            Part(exit_outputs, model, i, rule), exit_inputs, ["logits", "uncertainty"], folder / f"exit_{i}.onnx"
        )


def exportable(model):
    """A copy on the CPU, with attention as plain products. Raises InputError: packages are missing, too many exits."""
    if not all(map(find_spec, PACKAGES)):
        raise InputError(f"exporting needs more packages: pip install {' '.join(PACKAGES)}")
    from deebert.runtime.onnx_graph import MOST_EXITS

    if len(model.config.exit_layers) > MOST_EXITS:
        raise InputError(f"the model has {len(model.config.exit_layers)} exits; a graph holds up to {MOST_EXITS}")
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")
    return model


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences torch.onnx and onnxruntime, which have advice on every graph."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def save_graph(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: Path) -> None:
    """Writes the graph of a module for these inputs, of any batch size and length."""
    any_size = torch.export.Dim.DYNAMIC
    shapes = {name: {0: any_size, 1: any_size} for name in inputs}
    if "mask" in inputs:  # (b, 1, 1, T) or (b, heads, T, T)
        shapes["mask"] = {i: any_size for i in (0, 2, 3) if inputs["mask"].shape[i] > 1}
    with quiet_exporters(), torch.no_grad():
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


def quantize(fp32: "Path | ModelProto", int8: Path) -> None:
    """Writes a graph, of a file or in memory, with the weights of its matrix products as 8-bit integers."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet_exporters():
        quantize_dynamic(
            fp32,
            int8,
            op_types_to_quantize=["MatMul", "Attention"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},  # of the outputs of fused operators
        )


def scale_tokens(layer: Path) -> "ModelProto":
    """A layer's graph in which products with weights that are not square take each token divided by its largest number.

    The results are multiplied by it, so they stay the same. But with 8 bits the tokens of a batch share one scale, and
    one token with large numbers would cost all others their precision: this is quantization by token (ZeroQuant, Yao
    et al., 2022). These are the feed-forward products, and ModernBERT's of query, key and value, which are one. Square
    ones, of attention in the other encoders, lose little and stay as they are.
    """
    import onnx
    from onnx.helper import make_node, make_tensor

    model = onnx.load(layer)
    weights = model.graph.initializer
    wide = {tensor.name for tensor in weights if len(tensor.dims) == 2 and tensor.dims[0] != tensor.dims[1]}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in wide:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        nodes += [
            make_node("Abs", [x], [f"{y}/abs"]),
            make_node("ReduceMax", [f"{y}/abs", "last_axis"], [f"{y}/max"]),
            make_node("Max", [f"{y}/max", "tiny"], [f"{y}/largest"]),
            make_node("Div", [x, f"{y}/largest"], [f"{y}/scaled"]),
            make_node("MatMul", [f"{y}/scaled", node.input[1]], [f"{y}/product"], name=node.name),
            make_node("Mul", [f"{y}/product", f"{y}/largest"], [y]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    weights.append(make_tensor("last_axis", onnx.TensorProto.INT64, [1], [-1]))
    weights.append(make_tensor("tiny", onnx.TensorProto.FLOAT, [], [torch.finfo(torch.float32).tiny]))
    return model


def quantize_parts(parts: Path, folder: Path) -> None:
    """Writes the parts of a graph with 8-bit weights in the layers. Exits are small, and decide: they stay fp32."""
    for part in parts.iterdir():
        if part.name.startswith("layer"):
            quantize(scale_tokens(part), folder / part.name)
        else:
            shutil.copy(part, folder)


@contextmanager
def traced_parts(model) -> Iterator[Path]:
    """A temporary folder with the fp32 graphs of the model's parts, for `write_export`. Raises InputError."""
    with TemporaryDirectory() as folder:
        export_parts(exportable(model), Path(folder))
        yield Path(folder)


def write_export(parts: Path, config, tokenizer, folder: Path, int8: bool = False) -> None:
    """Writes graph, config, tokenizer and, last, the manifest. int8: weights as 8-bit integers. Raises InputError."""
    make_folder(folder)
    with one_line(f"{folder}: the export cannot be written", "make room on the disk, or choose another folder"):
        remove_leftovers(folder)
        with adding_files(folder, last=MANIFEST) as files:
            write_files(parts, copy.deepcopy(config), tokenizer, files, int8)


def write_files(parts: Path, config, tokenizer, folder: Path, int8: bool) -> None:
    """Writes an export into a folder that no one reads yet. It changes the config."""
    from deebert.runtime.onnx_graph import merge  # needs the package onnx, which `exportable` has checked

    with TemporaryDirectory(dir=folder) as quantized:
        if int8:
            quantize_parts(parts, Path(quantized))
            parts = Path(quantized)
        if (size := sum(file.stat().st_size for file in parts.rglob("*"))) > MOST_BYTES:
            advice = "" if int8 else "; export it with 8-bit weights"
            raise InputError(f"a graph of {size / 2**30:.1f} GiB, and ONNX holds 2 in a file{advice}")
        merge(parts, config, folder / GRAPH)
    vars(config).pop("auto_map", None)  # PyTorch cannot load this folder
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = {
        "format": FORMAT,
        "deebert": deebert.__version__,
        "precision": "int8" if int8 else "fp32",
        "exit_rule": config.exit_rule,
        "config": graph_facts(config),
        "encoding": encoding_facts(config, tokenizer),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def export(model, tokenizer, folder: Path, int8: bool = False) -> None:
    """Exports a model. Raises InputError (see `exportable`)."""
    with traced_parts(model) as parts:
        write_export(parts, model.config, tokenizer, folder, int8)
