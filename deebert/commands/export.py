"""`deebert export`: writes a trained model as an ONNX graph."""

from pathlib import Path

from deebert.data.encoding import check_vocabulary
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, quiet_transformers
from deebert.modeling.config import config_rule
from deebert.runtime.exported import GRAPH, is_exported
from deebert.runtime.onnx_export import export
from deebert.utils.cli import ArgumentParser
from deebert.utils.errors import InputError


def main() -> None:
    about = "Writes a trained model as one ONNX graph of all layers and off-ramps."
    parser = ArgumentParser(description=about)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="folder for the graphs")
    parser.add_argument(
        "--int8", action="store_true", help="8-bit weights of matrix products: faster, with slightly different logits"
    )
    args = parser.parse_args()
    exported = is_exported(args.output)
    if not exported and args.output.is_dir() and any(not path.name.startswith(".") for path in args.output.iterdir()):
        raise InputError(f"--output {args.output}: it holds other files than an export's; choose another folder")
    quiet_transformers()
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    check_vocabulary(tokenizer.backend_tokenizer, config.vocab_size, args.model)
    export(load_model(args.model, config), tokenizer, args.output, args.int8)
    replaced = " (in place of the export that was there)" if exported else ""
    print(f"{config.num_hidden_layers} layers{', int8' if args.int8 else ''}: {args.output / GRAPH}{replaced}")
    if config_rule(config).stateful:
        print(f"alone the graph never exits early: the rule {config.exit_rule} needs state; use deebert.OnnxDeeBert")
    if args.int8:
        print(f"int8 changes some predictions: compare those of {args.model} and {args.output}")
