"""Fine-tunes and evaluates DeeBERT on a GLUE task: training in stages, the score of every exit, threshold sweeps."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM

from accelerate.utils import gather_object, set_seed

from deebert.data.tasks import eval_splits
from deebert.evaluation import all_exits, calibration, results, threshold_selection, timing
from deebert.experiment.arguments import parse_args
from deebert.experiment.compatibility import first_stage_settings
from deebert.experiment.experiment import Run
from deebert.experiment.monitor import Monitor
from deebert.experiment.stop_signal import StopSignal
from deebert.modeling.checkpoints import load_model, load_pretrained, save_model
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.checkpointing import (
    newest_checkpoint,
    read_state,
    remove_checkpoints,
    remove_leftovers,
    saved_steps,
    set_random_state,
)
from deebert.training.stage import StageTraining
from deebert.training.strategies import STRATEGIES
from deebert.utils import cli
from deebert.utils.cli import Interrupted
from deebert.utils.files import replacing


def main(argv: Sequence[str] | None = None) -> None:
    run = Run(parse_args(argv))
    run.check_places()
    if run.args.do_train and run.finished:
        run.say(f"the training in {run.output_dir} is finished; nothing to resume")
    elif run.args.do_train:
        train(run)
    if run.args.do_eval:
        for checkpoint in checkpoints(run):
            evaluate(run, checkpoint)
    run.accelerator.end_training()  # a process that leaves its group's threads behind ends in an abort


def train(run: Run) -> None:
    """The stages of the strategy, an evaluation after the first if asked for, and the saved model."""
    checkpoint = run.checkpoint()
    if run.accelerator.is_main_process:
        remove_leftovers(run.output_dir)
        if checkpoint is None:  # those of a training that is now overwritten
            remove_checkpoints(run.output_dir)
    run.accelerator.wait_for_everyone()
    run.record()
    with StopSignal() as stop:
        if checkpoint:
            run.say(f"going on from {checkpoint}")
            model, state = load_model(str(checkpoint), run.config), read_state(checkpoint)
            first = state["stage"]
        else:
            source, first, state = run.args.model_name_or_path, 1, None
            if run.first_stage_is_there():
                source, first = run.args.first_stage, 2
            model, new = load_pretrained(source, run.config, run.args.cache_dir)
            run.say(f"new, not in the checkpoint: {', '.join(new_parts(new)) or 'nothing'}")
        model.to(run.accelerator.device)
        monitor = Monitor(run, model)
        monitor.check_room(first)
        for stage in range(first, len(STRATEGIES[run.args.train_strategy]) + 1):
            if stage > first and any(gather_object([stop()])):
                raise Interrupted(f"stopped after stage {stage - 1}; {how_to_go_on(run)}", stop.number or SIGTERM)
            train_stage(run, model, monitor, stage, state, stop)
            state = None
        monitor.close()
        if run.accelerator.is_main_process:
            save_model(model, run.tokenizer, run.output_dir)
            run.facts["finished"] = True
            run.write_facts()
            remove_checkpoints(run.output_dir, keep_models=run.args.save_steps > 0)
        run.accelerator.wait_for_everyone()
        if stop():
            raise Interrupted(f"stopped; the training in {run.output_dir} is finished", stop.number)


def how_to_go_on(run: Run) -> str:
    newest = newest_checkpoint(run.output_dir)
    return f"the same command with --resume goes on from {newest}" if newest else "nothing has been saved yet"


def train_stage(run: Run, model, monitor: Monitor, stage: int, state: dict | None, stop: StopSignal) -> None:
    """One stage, from its beginning or from a checkpoint's state. Raises Interrupted after Ctrl-C or SIGTERM."""
    args, process = run.args, run.accelerator.process_index
    if stage > 1 or process > 0:  # every stage has random numbers of its own, in every process
        set_seed(args.seed + stage + 1000 * process)
    plan = STRATEGIES[args.train_strategy][stage - 1]
    trained = {"the backbone and its classifier": plan.backbone, "the off-ramps": plan.highways}
    run.say(f"stage {stage}: training {' and '.join(name for name, is_trained in trained.items() if is_trained)}")
    started = time.perf_counter()
    with run.train_data(model, stage) as data:
        preparation = time.perf_counter() - started
        training = StageTraining(stage, model, data, args.stage_settings(stage), run.accelerator)
        if state:
            training.load_state_dict(state["training"])
            set_random_state(state["random"][process])
            monitor.resume(training)
        if not training.run(monitor.log, monitor.save, stop):
            raise Interrupted(
                f"stopped in stage {stage} after step {training.updates} of {training.total}; {how_to_go_on(run)}",
                stop.number or SIGTERM,
            )
    monitor.end(training, preparation)
    if stage == 1 and args.eval_after_first_stage:
        for split, features in run.eval_features.items():
            exits = all_exits.run_all_exits(model, features, run.collate, accelerator=run.accelerator)
            run.say(f"After the first stage, {split}: {show(all_exits.layer_scores(run.task, exits)[-1])}")
    if stage == 1 and args.first_stage and run.accelerator.is_main_process:
        save_model(model, run.tokenizer, Path(args.first_stage))
        results.write_json(run.first_stage_record, first_stage_settings(args))
    run.accelerator.wait_for_everyone()


def new_parts(names: list[str]) -> list[str]:
    """The modules of these weights, the off-ramps counted: ['classifier', '5 off-ramps']."""
    highways = {name.split(".highway.")[1].split(".")[0] for name in names if ".highway." in name}
    others = {name.rsplit(".", 1)[0] for name in names if ".highway." not in name}
    return sorted(others) + ([f"{len(highways)} off-ramps"] if highways else [])


def checkpoints(run: Run) -> list[Path]:
    """The model in output_dir, after those saved on the way to it with --eval_all_checkpoints."""
    return [*(saved_steps(run.output_dir) if run.args.eval_all_checkpoints else []), run.output_dir]


def evaluate(run: Run, checkpoint: Path) -> None:
    """Scores one saved model on the task's dev sets and writes the result files."""
    args, task = run.args, run.task
    config = run.load_config(str(checkpoint))
    run.check_config(config, str(checkpoint))
    if args.calibrate:
        config.exit_temperatures = None
    model = load_model(str(checkpoint), config).to(run.accelerator.device)
    if not args.do_train and not run.facts:  # the first of several
        run.record()
    name = args.model_name_or_path if checkpoint == run.output_dir else str(checkpoint)
    thresholds = [threshold for threshold in args.exit_threshold if threshold >= 0]
    exits_of = {
        split: all_exits.run_all_exits(model, features, run.collate, accelerator=run.accelerator)
        for split, features in run.eval_features.items()
    }
    if not run.accelerator.is_main_process:  # the others have done their share; times are taken by one process
        return
    for split, suffix in eval_splits(task).items():
        folder, exits = results.result_dir(args.plot_data_dir, name, suffix), exits_of[split]
        if args.calibrate and not suffix:
            exits = calibrate(run, model, exits, checkpoint)
        each_layer = all_exits.layer_scores(task, exits)
        scores = dict(each_layer[-1])
        run.say(f"Result of {checkpoint} on {split}: {show(scores)}")
        if args.eval_each_highway:
            results.write_each_layer(folder, each_layer)
            exits.save(folder / "all_exits.npz")
            run.say(f"Score ({task.primary_metric}) of each layer: {results.percents(each_layer)}; written to {folder}")
        if run.target and checkpoint == run.output_dir and not suffix:
            choose_threshold(run, model, exits, folder)
        if args.eval_highway and not thresholds:
            run.say("--eval_highway: nothing to time, give --exit_threshold 0 or more")
        if thresholds:
            rows = all_exits.sweep(task, exits, thresholds)
            if args.eval_highway:
                rows = measure(run, model, split, exits, rows, folder)
            run.say(results.sweep_table(rows))
            for row in rows:
                scores[f"{task.primary_metric}_at_{row.rule}_{row.threshold}"] = row.score
                scores[f"layers_run_at_{row.rule}_{row.threshold}"] = row.layers_run
        results.write_eval_results(checkpoint.with_name(checkpoint.name + suffix), scores)


def calibrate(run: Run, model, exits: all_exits.AllExits, checkpoint: Path) -> all_exits.AllExits:
    """Fits the exits' temperatures to half of the samples, and stores them in the saved model's config."""
    fit, held_out = exits.halves(run.args.seed)
    model.config.exit_temperatures = calibration.fit_temperatures(fit)
    model.config.exit_threshold = NO_EXIT  # one chosen before means nothing now
    run.say(f"temperatures of the exits: {' '.join(f'{t:.3f}' for t in model.config.exit_temperatures)}")
    run.say(calibration.report(held_out, calibration.calibrated(held_out, model.config.exit_temperatures)))
    write_config(model, checkpoint)
    run.say(f"stored in {checkpoint / 'config.json'} (exit_temperatures), without a threshold")
    return calibration.calibrated(exits, model.config.exit_temperatures)


def write_config(model, folder: Path) -> None:
    with replacing(folder / "config.json") as file:
        file.write(model.config.to_json_string(use_diff=False))


def choose_threshold(run: Run, model, exits: all_exits.AllExits, folder: Path) -> None:
    """Chooses the threshold asked for, reports it, and stores it in the saved model's config."""
    choice = threshold_selection.choose(run.task, exits, run.target, run.args.seed)
    run.say(threshold_selection.report(choice, run.target))
    results.write_json(folder / "threshold.json", {"target": asdict(run.target), **asdict(choice)})
    model.config.exit_threshold = choice.threshold
    write_config(model, run.output_dir)
    run.say(f"stored in {run.output_dir / 'config.json'}: from_pretrained gives a model that exits at it")


def measure(run: Run, model, split: str, exits, rows: list, folder: Path) -> list:
    """Fills in the rows' times. All thresholds take turns, so that the files hold all of them after each repeat."""
    args, task = run.args, run.task
    results.write_sweep(folder, all_exits.sweep(task, exits, all_exits.dense_thresholds(exits)), results.CURVE)
    for rows in timing.timed_sweep(  # noqa: B020  the rows become the timed rows
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
    cli.run(main)
