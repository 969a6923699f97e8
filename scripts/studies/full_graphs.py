"""The full model in ONNX Runtime, made in each way that a practitioner would: early exit is compared with the fastest.

The ways: PyTorch's two exporters, with and without ONNX Runtime's own optimizer for transformers, which fuses what its
patterns find (attention, layer normalization, GELU).
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.onnx_export import quiet_exporters, save_graph


class FullGraph(nn.Module):
    """Hugging Face's model without off-ramps as one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask, token_type_ids, exit_threshold=NO_EXIT).logits


def export_full(model, folder: Path) -> dict[str, Path]:
    """Writes the full model's graphs in each way, of a model that `exportable` returned. Returns them by name."""
    ids = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": ids + 4, "attention_mask": ids, "token_type_ids": ids - 1}
    paths = {"torch.export": folder / "torch_export.onnx"}
    save_graph(FullGraph(model), inputs, ["logits"], paths["torch.export"])
    for attention in ("eager", "sdpa"):
        name = f"TorchScript, {attention}"
        paths[name] = folder / f"torchscript_{attention}.onnx"
        other = copy.deepcopy(model)
        other.set_attn_implementation(attention)
        _trace(FullGraph(other), inputs, paths[name])
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
