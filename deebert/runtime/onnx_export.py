"""Writes a trained model as an ONNX graph: `deebert export --model DIR --output DIR [--int8]`.

One file of all layers with the exits behind them, for batches of any size and length. A run of it ends where a sample
may leave: for a single text that is all; of a batch, onnx_runtime.py answers who leaves and goes on with the others.
The threshold is an input. Another exit rule than the model's is possible, too, and has the graph stop at each layer.
"""

import argparse
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
from deebert.data.features import collator
from deebert.data.tasks import get_task
from deebert.evaluation.all_exits import dev_features, run_all_exits, sweep
from deebert.experiment.arguments import positive
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, quiet_transformers
from deebert.modeling.early_exit import config_rule
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.onnx_runtime import FORMAT, GRAPH, MANIFEST, OnnxDeeBert
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, InputError
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
        uncertainty, _ = self.rule.measure(logits, certainty, None)
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


def main() -> None:
    parser = ArgumentParser(
        prog="deebert export",
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
    features = None
    if args.task_name:
        features = dev_features(get_task(args.task_name), args.data_dir, config, tokenizer, args.max_seq_length)
    export(model, tokenizer, args.output, args.int8)
    print(f"{config.num_hidden_layers} layers{', int8' if args.int8 else ''}: {args.output / GRAPH}")
    if config_rule(config).remembers:
        print(f"by itself the graph never exits early: the rule {config.exit_rule} needs onnx_runtime.OnnxDeeBert")
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


if __name__ == "__main__":
    cli.run(main)
