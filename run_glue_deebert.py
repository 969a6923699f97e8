"""Fine-tunes and evaluates DeeBERT on a GLUE task: two-stage training, the score of every exit, entropy sweeps."""

import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from tensorboardX import SummaryWriter

import deebert
from deebert import errors, evaluation, results, selection
from deebert.arguments import parse_args, target, train_settings
from deebert.checkpoints import (
    load_config,
    load_model,
    load_pretrained,
    load_tokenizer,
    max_tokens,
    quiet_transformers,
    save_model,
    set_labels,
)
from deebert.errors import InputError
from deebert.features import Features, collator, load_features
from deebert.files import replacing
from deebert.glue import data_file, eval_splits, get_task, label_order
from deebert.highway import as_thresholds
from deebert.training import train_stage


def main() -> None:
    run = Run(parse_args())
    if run.args.do_train:
        train(run)
    if run.args.do_eval and run.accelerator.is_main_process:
        for checkpoint in checkpoints(run):
            evaluate(run, checkpoint)


class Run:
    """What the steps of a run share, checked before anything is written."""

    def __init__(self, args):
        self.args, self.task, self.output_dir = args, get_task(args.task_name), Path(args.output_dir)
        self.target = target(args)
        self.check_files()
        quiet_transformers()
        self.accelerator = make_accelerator(args)
        set_seed(args.seed)

        source = (
            args.model_name_or_path if args.do_train else args.output_dir
        )  # --do_eval is about the model saved there
        self.config = self.load_config(args.config_name or source)
        self.labels = label_order(self.task, args.model_type, self.config.id2label)
        if args.do_train:
            set_labels(self.config, self.labels)
        self.check_config()
        self.tokenizer = load_tokenizer(args.tokenizer_name or source, args.do_lower_case, args.cache_dir)
        self.collate = collator(self.config, args.max_seq_length if args.pad_to_max_length else None)
        self.eval_features = {split: self.features(split) for split in self.dev_splits()}
        self.record()

    def check_files(self) -> None:
        args = self.args
        if not (args.do_train or args.do_eval):
            raise InputError("nothing to do: give --do_train, --do_eval or both")
        for split in [*self.dev_splits(), *(["train"] if args.do_train else [])]:
            data_file(args.data_dir, split)
        if (
            args.do_train
            and not args.overwrite_output_dir
            and self.output_dir.is_dir()
            and any(self.output_dir.iterdir())
        ):
            raise InputError(
                f"--output_dir {self.output_dir}: the folder is not empty; choose another or add --overwrite_output_dir"
            )
        if not args.do_train and not (self.output_dir / "config.json").is_file():
            raise InputError(f"--output_dir {self.output_dir}: no trained model there; train one with --do_train")

    def dev_splits(self) -> list[str]:
        args = self.args
        wanted = args.do_eval or args.eval_after_first_stage or args.evaluate_during_training
        return list(eval_splits(self.task)) if wanted else []

    def load_config(self, name_or_path: str):
        config = load_config(name_or_path, self.args.model_type, self.args.cache_dir)
        if self.args.highway_pooling:
            config.highway_pooling = self.args.highway_pooling
        return config

    def check_config(self) -> None:
        args, limit = self.args, max_tokens(self.config)
        if not 3 <= args.max_seq_length <= limit:
            raise InputError(f"--max_seq_length {args.max_seq_length}: this model takes 3 to {limit} tokens")
        if self.config.num_labels != self.task.num_labels:
            raise InputError(
                f"--model_name_or_path {args.model_name_or_path}: a model of {self.config.num_labels} labels, "
                f"but {self.task.name} has {self.task.num_labels}; was it trained for another task?"
            )
        for threshold in args.early_exit_entropy:
            try:
                as_thresholds(threshold, self.config.num_hidden_layers, self.config.num_labels)
            except ValueError as error:
                raise InputError(f"--early_exit_entropy {threshold}: {error}") from None

    def features(self, split: str) -> Features:
        """Tokenized by the first process; the others find it in the cache."""
        with self.accelerator.main_process_first():
            return load_features(
                self.task,
                self.args.data_dir,
                split,
                self.labels,
                self.tokenizer,
                self.args.max_seq_length,
                overwrite_cache=self.args.overwrite_cache and self.accelerator.is_main_process,
            )

    def say(self, text: str) -> None:
        self.accelerator.print(text, flush=True)

    def record(self) -> None:
        """Arguments, versions and git revision: to stdout and beside the results."""
        if not self.accelerator.is_main_process:
            return
        versions = {
            "deebert": deebert.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        facts = {"versions": versions, "git": git_revision(), "device": str(self.accelerator.device)}
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        self.say(f"{self.task.name}, {self.args.model_name_or_path}, on {facts['device']}: {shown}, git {facts['git']}")
        name = "run_train.json" if self.args.do_train else "run_eval.json"  # evaluating keeps the training's record
        facts = {"arguments": vars(self.args), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        results.write_json(self.output_dir / name, facts)


def train(run: Run) -> None:
    """Both stages, an evaluation in between if asked for, and the saved model."""
    args, main_process = run.args, run.accelerator.is_main_process
    model, new = load_pretrained(args.model_name_or_path, run.config, args.cache_dir)
    run.say(f"new, not in the checkpoint: {', '.join(new_parts(new)) or 'nothing'}")
    model.to(run.accelerator.device)
    features = run.features("train")
    writer = SummaryWriter(str(run.output_dir / "tensorboard")) if main_process else None
    for stage in (1, 2):
        run.say(f"stage {stage}: training {'the backbone and its classifier' if stage == 1 else 'the off-ramps'}")
        log, save = callbacks(run, model, writer, stage)
        started = time.perf_counter()
        loss = train_stage(stage, model, features, run.collate, train_settings(args, stage), run.accelerator, log, save)
        run.say(f"stage {stage}: mean loss {loss:.4f}, {time.perf_counter() - started:.0f} s")
        if stage == 1 and args.eval_after_first_stage and main_process:
            for split, features_of_split in run.eval_features.items():
                exits = evaluation.run_all_exits(model, features_of_split, run.collate)
                run.say(f"After the first stage, {split}: {show(evaluation.layer_scores(run.task, exits)[-1])}")
        run.accelerator.wait_for_everyone()
    if main_process:
        writer.close()
        save_model(model, run.tokenizer, run.output_dir)
    run.accelerator.wait_for_everyone()


def new_parts(names: list[str]) -> list[str]:
    """The modules of these weights, the off-ramps counted: ['classifier', '5 off-ramps']."""
    highways = {name.split(".highway.")[1].split(".")[0] for name in names if ".highway." in name}
    others = {name.rsplit(".", 1)[0] for name in names if ".highway." not in name}
    return sorted(others) + ([f"{len(highways)} off-ramps"] if highways else [])


def callbacks(run: Run, model, writer: SummaryWriter | None, stage: int):
    """What happens every logging_steps (scalars, and dev scores if asked for) and every save_steps (a checkpoint)."""

    def log(step: int, scalars: dict[str, float]) -> None:
        if writer is None:
            return
        if run.args.evaluate_during_training:
            for split, features in run.eval_features.items():
                exits = evaluation.run_all_exits(model, features, run.collate, progress=False)
                for layer, scores in enumerate(evaluation.layer_scores(run.task, exits), 1):
                    if stage == 2 or layer == exits.num_layers:
                        scalars |= {f"{split}_layer{layer}_{name}": value for name, value in scores.items()}
        for name, value in scalars.items():
            writer.add_scalar(f"stage{stage}/{name}", value, step)

    def save(step: int) -> None:
        if run.accelerator.is_main_process:
            save_model(model, run.tokenizer, run.output_dir / f"checkpoint-stage{stage}-{step}")

    return log, save


def checkpoints(run: Run) -> list[Path]:
    """The model in output_dir, after those saved on the way to it with --eval_all_checkpoints."""
    steps = run.output_dir.glob("checkpoint-*-*/config.json") if run.args.eval_all_checkpoints else []
    by_step = sorted((file.parent for file in steps), key=lambda folder: int(folder.name.rsplit("-", 1)[1]))
    return [*sorted(by_step, key=lambda folder: folder.name.rsplit("-", 1)[0]), run.output_dir]


def evaluate(run: Run, checkpoint: Path) -> None:
    """Scores one saved model on the task's dev sets and writes the result files."""
    args, task = run.args, run.task
    config = run.load_config(str(checkpoint))
    model = load_model(str(checkpoint), config).to(run.accelerator.device)
    name = args.model_name_or_path if checkpoint == run.output_dir else str(checkpoint)
    thresholds = [threshold for threshold in args.early_exit_entropy if threshold >= 0]
    for split, suffix in eval_splits(task).items():
        folder = results.result_dir(args.plot_data_dir, name, suffix)
        exits = evaluation.run_all_exits(model, run.eval_features[split], run.collate)
        each_layer = evaluation.layer_scores(task, exits)
        scores = dict(each_layer[-1])
        run.say(f"Result of {checkpoint} on {split}: {show(scores)}")
        if args.eval_each_highway:
            results.write_each_layer(folder, each_layer)
            exits.save(folder / "all_exits.npz")
            run.say(f"Score ({task.primary_metric}) of each layer: {results.percents(each_layer)}; written to {folder}")
        if run.target and checkpoint == run.output_dir and not suffix:
            choose_threshold(run, config, exits, folder)
        if thresholds:
            rows = evaluation.sweep(task, exits, thresholds)
            if args.eval_highway:
                rows = measure(run, model, split, exits, rows, folder)
            run.say(results.sweep_table(rows))
            for row in rows:
                scores[f"{task.primary_metric}_at_entropy_{row.threshold}"] = row.score
                scores[f"layers_run_at_entropy_{row.threshold}"] = row.layers_run
        results.write_eval_results(checkpoint.with_name(checkpoint.name + suffix), scores)


def choose_threshold(run: Run, config, exits: evaluation.AllExits, folder: Path) -> None:
    """Chooses the threshold asked for, reports it, and stores it in the saved model's config."""
    choice = selection.choose(run.task, exits, run.target, run.args.seed)
    run.say(selection.report(choice, run.target))
    results.write_json(folder / "threshold.json", {"target": asdict(run.target), **asdict(choice)})
    config.early_exit_entropy = choice.threshold
    with replacing(run.output_dir / "config.json") as file:
        file.write(config.to_json_string(use_diff=False))
    run.say(f"stored in {run.output_dir / 'config.json'}: from_pretrained gives a model that exits at it")


def measure(run: Run, model, split: str, exits, rows: list, folder: Path) -> list:
    """Fills in the rows' times. The files hold what is known from the first moment on, and the times of each repeat."""
    args, task = run.args, run.task
    results.write_sweep(folder, evaluation.sweep(task, exits, evaluation.dense_thresholds(exits)), results.CURVE)
    results.write_sweep(folder, rows)
    for rows in evaluation.timed_sweep(  # noqa: B020  the rows become the timed rows
        rows, exits, model, run.eval_features[split], run.collate, args.per_gpu_eval_batch_size, args.timing_repeats
    ):
        results.write_sweep(folder, rows)
        for row in rows:
            results.write_entropy(folder, row)
    for row in rows:
        if row.other_exits:
            run.say(f"threshold {row.threshold}: {row.other_exits} samples left elsewhere than predicted (rounding)")
    size, seconds = args.per_gpu_eval_batch_size, rows[0].full_seconds
    run.say(f"Full model without off-ramps: {seconds:.2f} s at batch size {size}; written to {folder}")
    return rows


def show(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())


def make_accelerator(args) -> Accelerator:
    if args.fp16 and (args.no_cuda or not torch.cuda.is_available()):
        raise InputError("--fp16 needs a GPU; leave it out")
    return Accelerator(
        cpu=args.no_cuda,
        mixed_precision="fp16" if args.fp16 else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def git_revision() -> str | None:
    """The checkout's revision, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    errors.run(main)
