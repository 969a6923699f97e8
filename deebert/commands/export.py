"""`deebert export`: writes a trained model as an ONNX graph."""

from pathlib import Path

from deebert.data.batching import Features, collator, tokenize
from deebert.data.encoding import check_vocabulary
from deebert.data.tasks import Task, check_num_labels, eval_splits, get_task, label_order
from deebert.evaluation.all_exits import run_all_exits, sweep
from deebert.modeling.checkpoints import load_config, load_model, load_tokenizer, max_tokens, quiet_transformers
from deebert.modeling.config import config_rule, longest_text
from deebert.modeling.exit_rules import NO_EXIT
from deebert.runtime.exported import GRAPH
from deebert.runtime.onnx_export import export
from deebert.runtime.onnx_runtime import OnnxDeeBert
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError


def main() -> None:
    about = "Writes a trained model as one ONNX graph of all layers and off-ramps."
    parser = ArgumentParser(prog="deebert export", description=about)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--output", required=True, type=Path, help="folder for the graphs")
    parser.add_argument(
        "--int8", action="store_true", help="8-bit weights of matrix products: faster, with slightly different logits"
    )
    parser.add_argument("--task_name", help="with --data_dir: score model and graphs on the task's dev set")
    parser.add_argument("--data_dir", help="folder with the task's TSV files")
    parser.add_argument(
        "--max_seq_length", type=positive, help="with --task_name: longer texts are cut (default: as in the training)"
    )
    args = parser.parse_args()
    if (args.task_name is None) != (args.data_dir is None):
        raise InputError("give --task_name and --data_dir together, or neither")
    if args.max_seq_length and args.task_name is None:
        raise InputError("--max_seq_length has no effect without --task_name; the model keeps that of the training")
    if args.output.resolve() == Path(args.model).resolve():
        raise InputError(f"--output {args.output}: give another folder than --model")
    if (args.output / "model.safetensors").exists():
        raise InputError(f"--output {args.output}: there is a PyTorch model in it; give another folder")
    quiet_transformers()
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    check_vocabulary(tokenizer.backend_tokenizer, config.vocab_size, args.model)
    model = load_model(args.model, config)
    task = get_task(args.task_name) if args.task_name else None
    if task is not None:
        features = dev_features(task, args.data_dir, config, tokenizer, args.max_seq_length)
    export(model, tokenizer, args.output, args.int8)
    print(f"{config.num_hidden_layers} layers{', int8' if args.int8 else ''}: {args.output / GRAPH}")
    if config_rule(config).stateful:
        print(f"alone the graph never exits early: the rule {config.exit_rule} needs state; use deebert.OnnxDeeBert")
    if task is None:
        own = f"deebert predict says with --model {args.model} and with --model {args.output}"
        print(
            f"the score was not measured: for GLUE, give --task_name and --data_dir; with own data, compare what {own}"
        )
        return
    models = (model, OnnxDeeBert(args.output))
    torch_exits, onnx_exits = (run_all_exits(one, features, collator(config)) for one in models)
    agree = (torch_exits.logits.argmax(-1) == onnx_exits.logits.argmax(-1)).mean(axis=0)
    (before,), (after,) = (sweep(task, exits, [NO_EXIT]) for exits in (torch_exits, onnx_exits))
    print(
        f"{task.primary_metric} of the full model on {len(features)} dev samples: {100 * before.score:.2f} in PyTorch, "
        f"{100 * after.score:.2f} as exported ({100 * (after.score - before.score):+.2f} points)"
    )
    if config.num_labels > 1:
        print(f"same label at each exit: {' '.join(f'{100 * share:.1f}' for share in agree)} % of the samples")


def dev_features(task: Task, data_dir: str | Path, config, tokenizer, max_seq_length: int | None = None) -> Features:
    """The task's first dev set for a model of this config; max_seq_length: None: of the training. Raises InputError."""
    check_num_labels(task, config.num_labels, "--model")
    split, labels = next(iter(eval_splits(task))), label_order(task, config.model_type, config.id2label)
    longest = min(longest_text(config, max_seq_length), max_tokens(config))
    return tokenize(task.read(data_dir, split, labels), tokenizer, longest)
