"""Fine-tunes and evaluates DeeBERT on a GLUE task: training in stages, the score of every exit, threshold sweeps."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import set_seed
from tensorboardX import SummaryWriter

from deebert import calibration, errors, evaluation, results, selection
from deebert.arguments import first_stage_settings, parse_args, train_settings
from deebert.checkpoints import load_model, load_pretrained, save_model
from deebert.exit_rules import NO_EXIT
from deebert.files import replacing
from deebert.glue import eval_splits
from deebert.objectives import STRATEGIES
from deebert.run import Run
from deebert.training import train_stage


def main(argv: Sequence[str] | None = None) -> None:
    run = Run(parse_args(argv))
    if run.args.do_train:
        train(run)
    if run.args.do_eval and run.accelerator.is_main_process:
        for checkpoint in checkpoints(run):
            evaluate(run, checkpoint)


def train(run: Run) -> None:
    """The stages of the strategy, an evaluation after the first if asked for, and the saved model."""
    args, main_process = run.args, run.accelerator.is_main_process
    source, first = (args.first_stage, 2) if run.first_stage_is_there() else (args.model_name_or_path, 1)
    model, new = load_pretrained(source, run.config, args.cache_dir)
    run.say(f"new, not in the checkpoint: {', '.join(new_parts(new)) or 'nothing'}")
    run.record()
    model.to(run.accelerator.device)
    if main_process:
        for folder in saved_steps(run.output_dir):  # of a run before, now overwritten
            shutil.rmtree(folder)
    writer = SummaryWriter(str(run.output_dir / "tensorboard")) if main_process else None
    for stage, plan in list(enumerate(STRATEGIES[args.train_strategy], 1))[first - 1 :]:
        if stage > 1:
            set_seed(args.seed + stage)  # so that it does not matter which process did the stage before
        trained = {"the backbone and its classifier": plan.backbone, "the off-ramps": plan.highways}
        run.say(f"stage {stage}: training {' and '.join(name for name, is_trained in trained.items() if is_trained)}")
        log, save = callbacks(run, model, writer, stage)
        started = time.perf_counter()
        settings = train_settings(args, stage)
        loss = train_stage(stage, model, run.train_features, run.collate, settings, run.accelerator, log, save)
        run.say(f"stage {stage}: mean loss {loss:.4f}, {time.perf_counter() - started:.0f} s")
        if stage == 1 and args.eval_after_first_stage and main_process:
            for split, features in run.eval_features.items():
                exits = evaluation.run_all_exits(model, features, run.collate)
                run.say(f"After the first stage, {split}: {show(evaluation.layer_scores(run.task, exits)[-1])}")
        if stage == 1 and args.first_stage and main_process:
            save_model(model, run.tokenizer, Path(args.first_stage))
            results.write_json(run.first_stage_record, first_stage_settings(args))
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
                    if STRATEGIES[run.args.train_strategy][stage - 1].highways or layer == exits.num_layers:
                        scalars |= {f"{split}_layer{layer}_{name}": value for name, value in scores.items()}
        for name, value in scalars.items():
            writer.add_scalar(f"stage{stage}/{name}", value, step)

    def save(step: int) -> None:
        if run.accelerator.is_main_process:
            save_model(model, run.tokenizer, run.output_dir / f"checkpoint-stage{stage}-{step}")

    return log, save


def checkpoints(run: Run) -> list[Path]:
    """The model in output_dir, after those saved on the way to it with --eval_all_checkpoints."""
    return [*(saved_steps(run.output_dir) if run.args.eval_all_checkpoints else []), run.output_dir]


def saved_steps(output_dir: Path) -> list[Path]:
    """The folders checkpoint-stage{1,2}-{step}, in the order they were written."""
    names = [re.fullmatch(r"checkpoint-stage(\d)-(\d+)", file.parent.name) for file in output_dir.glob("*/config.json")]
    return [output_dir / match[0] for match in sorted(filter(None, names), key=lambda m: (int(m[1]), int(m[2])))]


def evaluate(run: Run, checkpoint: Path) -> None:
    """Scores one saved model on the task's dev sets and writes the result files."""
    args, task = run.args, run.task
    config = run.load_config(str(checkpoint))
    run.check_config(config, str(checkpoint))
    if args.calibrate:
        config.exit_temperatures = None
    model = load_model(str(checkpoint), config).to(run.accelerator.device)
    if not args.do_train:
        run.record()
    name = args.model_name_or_path if checkpoint == run.output_dir else str(checkpoint)
    thresholds = [threshold for threshold in args.early_exit_entropy if threshold >= 0]
    for split, suffix in eval_splits(task).items():
        folder = results.result_dir(args.plot_data_dir, name, suffix)
        exits = evaluation.run_all_exits(model, run.eval_features[split], run.collate)
        if args.calibrate and not suffix:
            exits = calibrate(run, model, exits, checkpoint)
        each_layer = evaluation.layer_scores(task, exits)
        scores = dict(each_layer[-1])
        run.say(f"Result of {checkpoint} on {split}: {show(scores)}")
        if args.eval_each_highway:
            results.write_each_layer(folder, each_layer)
            exits.save(folder / "all_exits.npz")
            run.say(f"Score ({task.primary_metric}) of each layer: {results.percents(each_layer)}; written to {folder}")
        if run.target and checkpoint == run.output_dir and not suffix:
            choose_threshold(run, model, exits, folder)
        if args.eval_highway and not thresholds:
            run.say("--eval_highway: nothing to time, give --early_exit_entropy 0 or more")
        if thresholds:
            rows = evaluation.sweep(task, exits, thresholds)
            if args.eval_highway:
                rows = measure(run, model, split, exits, rows, folder)
            run.say(results.sweep_table(rows))
            for row in rows:
                scores[f"{task.primary_metric}_at_{row.rule}_{row.threshold}"] = row.score
                scores[f"layers_run_at_{row.rule}_{row.threshold}"] = row.layers_run
        results.write_eval_results(checkpoint.with_name(checkpoint.name + suffix), scores)


def calibrate(run: Run, model, exits: evaluation.AllExits, checkpoint: Path) -> evaluation.AllExits:
    """Fits the exits' temperatures to half of the samples, and stores them in the saved model's config."""
    fit, held_out = exits.halves(run.args.seed)
    model.config.exit_temperatures = calibration.fit_temperatures(fit)
    model.config.early_exit_entropy = NO_EXIT  # one chosen before means nothing now
    run.say(f"temperatures of the exits: {' '.join(f'{t:.3f}' for t in model.config.exit_temperatures)}")
    run.say(calibration.report(held_out, calibration.calibrated(held_out, model.config.exit_temperatures)))
    write_config(model, checkpoint)
    run.say(f"stored in {checkpoint / 'config.json'} (exit_temperatures), without a threshold")
    return calibration.calibrated(exits, model.config.exit_temperatures)


def write_config(model, folder: Path) -> None:
    with replacing(folder / "config.json") as file:
        file.write(model.config.to_json_string(use_diff=False))


def choose_threshold(run: Run, model, exits: evaluation.AllExits, folder: Path) -> None:
    """Chooses the threshold asked for, reports it, and stores it in the saved model's config."""
    choice = selection.choose(run.task, exits, run.target, run.args.seed)
    run.say(selection.report(choice, run.target))
    results.write_json(folder / "threshold.json", {"target": asdict(run.target), **asdict(choice)})
    model.config.early_exit_entropy = choice.threshold
    write_config(model, run.output_dir)
    run.say(f"stored in {run.output_dir / 'config.json'}: from_pretrained gives a model that exits at it")


def measure(run: Run, model, split: str, exits, rows: list, folder: Path) -> list:
    """Fills in the rows' times. All thresholds take turns, so that the files hold all of them after each repeat."""
    args, task = run.args, run.task
    results.write_sweep(folder, evaluation.sweep(task, exits, evaluation.dense_thresholds(exits)), results.CURVE)
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


if __name__ == "__main__":
    errors.run(main)
