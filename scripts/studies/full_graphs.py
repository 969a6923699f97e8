"""A model without exits in ONNX Runtime, exported in each way that a practitioner would; the fastest one counts.

The ways: PyTorch's two exporters, with and without ONNX Runtime's own optimizer for transformers, which fuses what its
patterns match (attention, layer normalization, GELU).
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.onnx_export import quiet_exporters, save_graph


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
    for attention in ("eager", "sdpa"):
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
