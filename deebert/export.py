"""Writes a trained model as an ONNX graph: `python -m deebert.export --model DIR --output DIR [--int8]`.

One file of all layers, each with the exit behind it, the first with the embeddings too, for batches of any size and
length; a run of it is the run of one layer. They compute logits and, where there is such a head, its certainty; who
leaves is decided between the layers, so that rule and threshold can be changed at run time. onnx_runtime.py runs them.
"""

import argparse
import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

import deebert
from deebert import errors
from deebert.arguments import positive
from deebert.checkpoints import load_config, load_model, load_tokenizer, max_tokens, quiet_transformers
from deebert.errors import InputError
from deebert.evaluation import run_all_exits, sweep
from deebert.exit_rules import NO_EXIT
from deebert.features import collator, load_features
from deebert.files import make_folder
from deebert.glue import eval_splits, get_task, label_order
from deebert.onnx_runtime import FORMAT, GRAPH, MANIFEST, OnnxDeeBert

MISSING = "exporting needs more packages: pip install 'deebert[onnx]', or pip install onnx onnxruntime onnxscript"


class LayerGraph(nn.Module):
    """What is exported: one layer of a model, see `HighwayClassifier.step`."""

    def __init__(self, model, i: int):
        super().__init__()
        self.model, self.i = model, i

    def forward(self, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None):
        hidden, logits, certainty = self.model.step(self.i, inputs, attention_mask, token_type_ids)
        last = self.i == self.model.config.num_hidden_layers - 1
        return tuple(x for x in (None if last else hidden, logits, certainty) if x is not None)


class FullGraph(nn.Module):
    """The full model without off-ramps as one graph: what early exit is measured against."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor):
        return self.model(inputs, attention_mask, token_type_ids, early_exit_entropy=NO_EXIT).logits


def export_layer(model, i: int, path: Path, int8: bool = False) -> None:
    """Writes the graph of layer i of a model that `exportable` returned."""
    last, head = i == model.config.num_hidden_layers - 1, model.base_model.encoder.learn_to_exit is not None
    outputs = ["logits"] if last else ["hidden", "logits", "certainty"][: 2 + head]
    hidden = None if i == 0 else torch.randn(2, 7, model.config.hidden_size)
    save_graph(LayerGraph(model, i), hidden, outputs, path, int8)


def export_full(model, path: Path, int8: bool = False) -> None:
    """Writes the graph of the full model, without off-ramps, of a model that `exportable` returned."""
    save_graph(FullGraph(model), None, ["logits"], path, int8)


def exportable(model):
    """A copy of the model on the CPU, with eager attention: plain matrix products. Raises InputError."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  what torch.onnx.export is made with
    except ImportError:
        raise InputError(MISSING) from None
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")
    return model


def save_graph(module: nn.Module, hidden: Tensor | None, outputs: list[str], path: Path, int8: bool) -> None:
    """Writes one graph that takes hidden states, or token ids where `hidden` is None, of any batch size and length."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    mask = torch.ones(2, 7, dtype=torch.long)
    arguments = (mask + 4, mask, torch.zeros_like(mask)) if hidden is None else (hidden, mask)
    names = ["inputs", "attention_mask", "token_type_ids"][: len(arguments)]
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.disable(logging.WARNING)  # both libraries have advice on every graph
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=dict.fromkeys(names, any_size),
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

    Raises InputError where packages are missing.
    """
    model = exportable(model)
    make_folder(folder)
    partial = Path(mkdtemp(prefix=".exporting-", dir=folder))
    try:
        from deebert.onnx_merge import merge_layers  # needs the package onnx, which `exportable` asked for

        layers = [partial / f"layer_{i}.onnx" for i in range(model.config.num_hidden_layers)]
        for i, layer in enumerate(layers):
            export_layer(model, i, layer, int8)
        merge_layers(layers, partial / GRAPH)
        for layer in layers:
            layer.unlink()
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {
            "format": FORMAT,
            "deebert": deebert.__version__,
            "precision": "int8" if int8 else "fp32",
            "layers": model.config.num_hidden_layers,
        }
        (partial / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")
        # the manifest last: where it is, the graph is whole
        (folder / MANIFEST).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deebert.export",
        description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="folder for the graphs")
    parser.add_argument(
        "--int8", action="store_true", help="8-bit weights of matrix products: faster, and a little off"
    )
    parser.add_argument("--task_name", help="with --data_dir: score model and graphs on the task's dev set")
    parser.add_argument("--data_dir", help="folder with the task's TSV files")
    parser.add_argument("--max_seq_length", type=positive, default=128, help="of the dev set")
    args = parser.parse_args()
    if (args.task_name is None) != (args.data_dir is None):
        raise InputError("give --task_name and --data_dir together, or neither")
    if args.output.resolve() == Path(args.model).resolve():
        raise InputError(f"--output {args.output}: give another folder than --model")
    if (args.output / "model.safetensors").exists():
        raise InputError(f"--output {args.output}: there is a PyTorch model in it; give another folder")
    quiet_transformers()
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    model = load_model(args.model, config)
    features = dev_features(args, config, tokenizer) if args.task_name else None
    export(model, tokenizer, args.output, args.int8)
    print(f"{config.num_hidden_layers} layers{', int8' if args.int8 else ''}: {args.output / GRAPH}")
    if features is None:
        print("their score was not measured: give --task_name and --data_dir to do so")
        return
    task, metric = get_task(args.task_name), get_task(args.task_name).primary_metric
    torch_exits = run_all_exits(model, features, collator(config))
    onnx_exits = run_all_exits(OnnxDeeBert(args.output), features, collator(config))
    agree = (torch_exits.logits.argmax(-1) == onnx_exits.logits.argmax(-1)).mean(axis=0)
    (before,), (after,) = (sweep(task, exits, [NO_EXIT]) for exits in (torch_exits, onnx_exits))
    print(
        f"{metric} of the full model on {len(features)} dev samples: {100 * before.score:.2f} in PyTorch, "
        f"{100 * after.score:.2f} as exported ({100 * (after.score - before.score):+.2f} points)"
    )
    if config.num_labels > 1:
        print(f"same label at each exit: {' '.join(f'{100 * share:.1f}' for share in agree)} % of the samples")


def dev_features(args, config, tokenizer):
    task = get_task(args.task_name)
    split, labels = next(iter(eval_splits(task))), label_order(task, config.model_type, config.id2label)
    return load_features(task, args.data_dir, split, labels, tokenizer, min(args.max_seq_length, max_tokens(config)))


if __name__ == "__main__":
    errors.run(main)
