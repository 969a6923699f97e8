"""The command line of run_glue_deebert.py: the original's flags with its defaults, and ours."""

import argparse
import hashlib
import os
from collections.abc import Sequence

from deebert.data.tasks import TASKS, data_file, eval_splits, get_task
from deebert.evaluation.threshold_selection import SelectionTarget
from deebert.modeling.checkpoints import MODELS
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.modeling.off_ramps import POOLINGS
from deebert.training.stage import TrainSettings
from deebert.training.strategies import STRATEGIES
from deebert.utils.cli import ArgumentParser, above_zero, not_negative, positive, share, whole

DESCRIPTION = "Fine-tunes and evaluates DeeBERT on a GLUE task."


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """argv: the process's own arguments where it is not given."""
    parser = ArgumentParser(
        prog="run_glue_deebert.py",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, switch = parser.add_argument, lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("--data_dir", required=True, help="folder with the task's TSV files")
    add("--model_type", required=True, choices=MODELS)
    add("--model_name_or_path", required=True, help="a folder or a name on the hub; result files are filed by it")
    add("--task_name", required=True, help=f"one of {', '.join(TASKS)}")
    add("--output_dir", required=True, help="where the model is saved; what --do_eval evaluates")
    add("--plot_data_dir", default="./plotting/", help="where the npy and CSV files go")
    add("--config_name", help="config to take, if not that of the model")
    add("--tokenizer_name", help="tokenizer to take, if not that of the model")
    add("--cache_dir", help="where models from the hub are kept")
    add("--max_seq_length", type=int, default=128, help="longer inputs are cut")
    switch("--pad_to_max_length", "pad every batch to max_seq_length, as the original does")
    switch("--do_train", "train all stages of the strategy")
    switch("--do_eval", "evaluate the model in output_dir")
    switch("--evaluate_during_training", "score the dev set every logging_steps")
    switch("--do_lower_case", "lower-case what a BERT reads, whatever its tokenizer says")
    switch("--eval_each_highway", "write the score of every exit: each_layer.npy")
    switch("--eval_after_first_stage", "score the final classifier after stage 1")
    switch("--eval_highway", "time early exit at each --exit_threshold: entropy_{x}.npy")
    add(
        *("--exit_threshold", "--early_exit_entropy"),
        type=float,
        nargs="+",
        default=[-1.0],
        help="thresholds, in nats unless --exit_rule says otherwise; 0 or below: no exits",
    )
    add(
        "--exit_rule",
        choices=EXIT_RULES,
        help="what is held against the threshold; default: the checkpoint's, or entropy",
    )
    add("--patience_tolerance", type=above_zero, help="patience, regression: how far apart answers agree; 0.5")
    switch("--calibrate", "fit a temperature for each exit on half of the dev set, and store them with the model")
    add("--target_drop", type=float, help="choose the threshold: the largest saving at this drop of the score (0.01)")
    add("--target_saving", type=float, help="choose the threshold: the best score at this share of layers saved (0.4)")
    add("--risk", type=float, help="choose the threshold: at most this share of samples lost by exiting early (0.02)")
    add("--confidence", type=float, default=0.95, help="with which --risk is guaranteed")
    add("--timing_repeats", type=positive, default=1, help="timed passes per threshold; the median is reported")
    add("--highway_pooling", choices=POOLINGS, help="what an off-ramp reads; default: the checkpoint's, else first")
    add("--train_strategy", choices=STRATEGIES, default="two_stage", help="which exits' losses are trained when")
    add(
        "--distill",
        type=share,
        nargs="?",
        const=0.5,
        default=0.0,
        help="this share of an off-ramp's loss is the distance from the final classifier's answer",
    )
    add("--distill_temperature", type=above_zero, default=2.0, help="that softens both answers")
    add("--first_stage", help="folder for the model after stage 1 of two_stage: taken from there, or else put there")
    add("--per_gpu_train_batch_size", type=positive, default=8, help="per device")
    add("--per_gpu_eval_batch_size", type=positive, default=8, help="of the timed passes; others take 32")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches per update")
    add("--learning_rate", type=above_zero, default=5e-5, help="peak of the linear schedule")
    add("--highway_learning_rate", type=above_zero, help="of the off-ramps; default: learning_rate")
    add("--weight_decay", type=not_negative, default=0.0, help="none on biases and LayerNorm weights")
    add("--adam_epsilon", type=not_negative, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=not_negative, default=1.0, help="gradient clipping; 0: none")
    add("--num_train_epochs", type=above_zero, default=3.0, help="of each stage")
    add("--highway_epochs", type=above_zero, help="of stage 2 of two_stage; default: num_train_epochs")
    add("--max_steps", type=int, default=-1, help="updates of each stage, in place of epochs")
    add("--warmup_steps", type=whole, default=0, help="linear warm-up")
    add("--logging_steps", type=whole, default=50, help="updates between scalars; 0: none")
    add("--save_steps", type=whole, default=50, help="updates between checkpoints, complete ones; 0: none")
    add("--save_total_limit", type=positive, help="keep this many of the latest checkpoints; default: all")
    switch("--resume", "go on from the newest checkpoint in output_dir; begin where there is none")
    switch("--load_best_model_at_end", "of each stage: the weights of the best of --evaluate_during_training's scores")
    switch("--cache_features", "run the frozen backbone of stage 2 once, without dropout, not in every epoch")
    add("--dataloader_num_workers", type=whole, default=0, help="processes that make training batches; 0: this one")
    switch("--eval_all_checkpoints", "evaluate the checkpoints of save_steps, too")
    switch("--no_cuda", "use the CPU even where there is a GPU")
    switch("--overwrite_output_dir", "train into a folder that is not empty")
    switch("--overwrite_cache", "tokenize anew")
    switch("--fp16", "mixed precision on a GPU")
    switch("--bf16", "mixed precision with bfloat16")
    add("--seed", type=whole, default=42, help="of initialisation, dropout and the order of batches")
    return parser.parse_args(argv)


def target(args: argparse.Namespace) -> SelectionTarget | None:
    """What a threshold is to be chosen for, if one is. Raises InputError."""
    wanted = {"drop": args.target_drop, "saving": args.target_saving, "risk": args.risk}
    return None if set(wanted.values()) == {None} else SelectionTarget(**wanted, confidence=args.confidence)


def first_stage_settings(args: argparse.Namespace) -> dict:
    """What decides how the model after stage 1 of two_stage turns out."""
    names = "model_name_or_path task_name max_seq_length pad_to_max_length do_lower_case per_gpu_train_batch_size"
    names += " gradient_accumulation_steps learning_rate weight_decay adam_epsilon max_grad_norm num_train_epochs"
    names += " max_steps warmup_steps fp16 bf16 seed config_name tokenizer_name load_best_model_at_end"
    names += " logging_steps" if args.load_best_model_at_end else ""
    launch = {
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "ACCELERATE_MIXED_PRECISION": os.environ.get("ACCELERATE_MIXED_PRECISION"),
    }
    splits = ["train", *(eval_splits(get_task(args.task_name)) if args.load_best_model_at_end else [])]
    data = {f"{x}.tsv": hashlib.sha256(data_file(args.data_dir, x).read_bytes()).hexdigest() for x in splits}
    return {name: getattr(args, name) for name in names.split()} | data | launch


def training_settings(args: argparse.Namespace) -> dict:
    """What decides how the model after all stages turns out."""
    names = "train_strategy highway_pooling highway_learning_rate highway_epochs distill distill_temperature exit_rule"
    names += " cache_features"
    return first_stage_settings(args) | {name: getattr(args, name) for name in names.split()}


def train_settings(args: argparse.Namespace, stage: int) -> TrainSettings:
    """The same hyper-parameters in both stages, but for how long."""
    return TrainSettings(
        batch_size=args.per_gpu_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        highway_learning_rate=args.highway_learning_rate,
        weight_decay=args.weight_decay,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        epochs=args.highway_epochs if stage == 2 and args.highway_epochs else args.num_train_epochs,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
    )
