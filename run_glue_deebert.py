"""Fine-tunes and evaluates DeeBERT on own data or a GLUE task.

Training, the score of every exit, and sweeps of thresholds.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from signal import SIGTERM

from accelerate.utils import gather_object, set_seed

from deebert.data.tasks import eval_splits
from deebert.evaluation import results
from deebert.evaluation.all_exits import AllExits, layer_scores
from deebert.experiment import checks
from deebert.experiment.arguments import parse_args
from deebert.experiment.compatibility import first_stage_settings
from deebert.experiment.evaluation import Evaluation, show
from deebert.experiment.experiment import Experiment
from deebert.experiment.model_card import CARD, write_card
from deebert.experiment.monitor import Monitor
from deebert.experiment.record import FIELDS, read_record
from deebert.modeling.checkpoints import load_config, load_model, load_pretrained, save_model
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.checkpointing import (
    newest_checkpoint,
    read_state,
    remove_checkpoints,
    set_random_state,
)
from deebert.training.stage import StageTraining
from deebert.training.strategies import STRATEGIES
from deebert.utils import cli
from deebert.utils.errors import InputError, Interrupted
from deebert.utils.files import remove_leftovers, reserved
from deebert.utils.stop_signal import StopSignal


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    writes_model = args.do_train or args.target is not None
    with reserved(Path(args.output_dir), exclusive=writes_model) if is_first_process() else nullcontext():
        run(Experiment.from_args(args))


def is_first_process() -> bool:
    """As torchrun, accelerate launch and MPI say it, before anything is connected."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # those that accelerate reads
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def run(experiment: Experiment) -> None:
    """What the flags ask for, with a folder that no other run uses."""
    if experiment.accelerator.is_main_process:
        checks.check_outputs_writable(experiment.args)
    if experiment.args.do_train and experiment.finished:
        tidy_up(experiment, keep_models=True)
        experiment.say(f"the training in {experiment.output_dir} is finished; nothing to resume")
    elif experiment.args.do_train:
        train(experiment)
    if experiment.args.do_eval:
        for checkpoint in experiment.models_to_evaluate():
            evaluate(experiment, checkpoint)
    experiment.accelerator.end_training()  # without it, threads of the process group make the process abort at exit


def train(experiment: Experiment) -> None:
    """The stages of the strategy, from the beginning or from a checkpoint, and the saved model."""
    args, accelerator = experiment.args, experiment.accelerator
    checkpoint = experiment.checkpoint_to_resume()
    with StopSignal() as stop:
        model, first, state = load_start(experiment, checkpoint)
        model.to(accelerator.device)
        samples = len(experiment.train_features)
        checks.check_space_for_checkpoints(args, model, samples, accelerator.num_processes, first)
        clean_output_dir(experiment, keep_checkpoints=checkpoint is not None)
        experiment.record.begin(experiment.previous_record)
        monitor = Monitor(args, model, experiment.tokenizer, experiment.dev_sets, accelerator)
        for stage in range(first, experiment.num_stages + 1):
            if stage > first and any(gather_object([stop()])):
                message = f"stopped after stage {stage - 1}; {how_to_resume(experiment)}"
                raise Interrupted(message, stop.number or SIGTERM)
            train_stage(experiment, model, monitor, stage, state, stop)
            finish_stage(experiment, model, stage)
            state = None
        monitor.close()
        if accelerator.is_main_process:
            save_model(model, experiment.tokenizer, experiment.output_dir)
            on_hub = experiment.record.facts["from_hub"]
            write_card(experiment.output_dir, model.config, experiment.task, args.model_name_or_path, on_hub)
            experiment.record.finish()
            tidy_up(experiment, keep_models=args.save_steps > 0)
        accelerator.wait_for_everyone()
        if stop():
            raise Interrupted(f"stopped; the training in {experiment.output_dir} is finished", stop.number)


def clean_output_dir(experiment: Experiment, keep_checkpoints: bool) -> None:
    """Removes what a killed process left, and model and checkpoints of a training that is overwritten."""
    if experiment.accelerator.is_main_process:
        remove_leftovers(experiment.output_dir)
        if not keep_checkpoints:
            (experiment.output_dir / "config.json").unlink(missing_ok=True)  # the model of before is none any more
            remove_checkpoints(experiment.output_dir)
    experiment.accelerator.wait_for_everyone()


def tidy_up(experiment: Experiment, keep_models: bool) -> None:
    """Removes what a finished training no longer needs. If this is interrupted, the next run does it."""
    if experiment.accelerator.is_main_process:
        remove_leftovers(experiment.output_dir)
        remove_checkpoints(experiment.output_dir, keep_models)


def load_start(experiment: Experiment, checkpoint: Path | None) -> tuple:
    """The model to start from, the first stage that is left to train, and that stage's state (None: from its start)."""
    args = experiment.args
    if checkpoint:
        experiment.say(f"resuming from {checkpoint}")
        state = read_state(checkpoint)
        return load_model(str(checkpoint), experiment.config), state["stage"], state
    source, first = args.model_name_or_path, 1
    if checks.has_first_stage(args):
        source, first = args.first_stage, 2
    model, new = load_pretrained(source, experiment.config, args.cache_dir)
    experiment.say(f"new, not in the checkpoint: {', '.join(new_parts(new)) or 'nothing'}")
    return model, first, None


def new_parts(names: list[str]) -> list[str]:
    """The modules of these weights, off-ramps only counted: ['classifier', '5 off-ramps']."""
    modules = sorted({name.rsplit(".", 1)[0] for name in names if not is_off_ramp(name)})
    off_ramps = {match[0] for name in names if (match := re.search(r"\.highway(\.\d+|_embeddings)\.", name))}
    return [*modules, *([f"{len(off_ramps)} off-ramp{'s' if len(off_ramps) > 1 else ''}"] if off_ramps else [])]


def how_to_resume(experiment: Experiment) -> str:
    newest = newest_checkpoint(experiment.output_dir)
    return f"the same command with --resume goes on from {newest}" if newest else "nothing has been saved yet"


def train_stage(
    experiment: Experiment, model, monitor: Monitor, stage: int, state: dict | None, stop: StopSignal
) -> None:
    """One stage, from its start or from a checkpoint's state. Raises Interrupted after Ctrl-C or SIGTERM."""
    args, accelerator = experiment.args, experiment.accelerator
    process = accelerator.process_index
    if stage > 1 or process > 0:  # random numbers differ between stages and between processes
        set_seed(args.seed + stage + 1000 * process)
    plan = STRATEGIES[args.train_strategy][stage - 1]
    trained = {"the backbone and its classifier": plan.backbone, "the off-ramps": plan.highways}
    experiment.say(
        f"stage {stage}: training {' and '.join(name for name, is_trained in trained.items() if is_trained)}"
    )
    started = time.perf_counter()
    with experiment.train_data(model, stage) as data:
        preparation = time.perf_counter() - started
        training = StageTraining(stage, model, data, args.stage_settings(stage), accelerator)
        if state:
            try:
                training.load_state_dict(state["training"])
            except ValueError as error:  # of a version that gave the optimizer other groups of weights
                raise InputError(
                    f"{args.output_dir}: the checkpoint does not fit ({error}); --overwrite_output_dir starts again"
                ) from None
            set_random_state(state["random"][process])
            monitor.resume(training)
        if not training.run(monitor.log, monitor.save, stop):
            raise Interrupted(
                f"stopped in stage {stage} after step {training.steps} of {training.total}; "
                f"{how_to_resume(experiment)}",
                stop.number or SIGTERM,
            )
    monitor.load_best(training)
    experiment.record.add_stage(training, preparation)
    cached = f" after {preparation:.0f} s of preparation" if preparation > 1 else ""
    experiment.say(
        f"stage {stage}: mean loss {training.mean_loss:.4f}, {training.seconds:.0f} s{cached}, "
        f"{training.samples_per_second:.1f} samples/s, peak memory {training.peak_memory / 2**30:.2f} GiB"
    )


def finish_stage(experiment: Experiment, model, stage: int) -> None:
    """After stage 1: the evaluation of --eval_after_first_stage, and the model for --first_stage."""
    args = experiment.args
    if stage == 1 and args.eval_after_first_stage:
        for split, exits in experiment.dev_sets.all_exits(model, test=False):
            final = layer_scores(experiment.task, exits)[exits.num_layers]
            experiment.say(f"After the first stage, {split}: {show(final)}")
    if stage == 1 and args.first_stage and experiment.accelerator.is_main_process:
        save_model(model, experiment.tokenizer, Path(args.first_stage))
        results.write_json(checks.first_stage_record(args), first_stage_settings(args))
    experiment.accelerator.wait_for_everyone()


def evaluate(experiment: Experiment, checkpoint: Path) -> None:
    """Scores one saved model on the task's dev sets and writes the result files."""
    args = experiment.args
    model = experiment.load_trained(checkpoint)
    if not args.do_train and not experiment.record.facts:  # the first of several models
        experiment.record.begin(previous=None)
    exits = dict(experiment.dev_sets.all_exits(model))
    if not experiment.accelerator.is_main_process:
        return  # one process scores, and times early exit
    for split in eval_splits(experiment.task):
        evaluation = Evaluation(experiment, checkpoint, model, split, exits[split])
        evaluation.score()
        if args.target and checkpoint == experiment.output_dir and evaluation.first_split:
            evaluation.choose_threshold()
        evaluation.score_classes()
        evaluation.sweep()
        evaluation.write_scores()
        if checkpoint == experiment.output_dir and evaluation.first_split:
            update_card(experiment, model.config, split, evaluation.exits)


def update_card(experiment: Experiment, config, split: str, exits: AllExits) -> None:
    """The model's card with the scores of this evaluation, unless that tried another rule than the model's."""
    if load_config(str(experiment.output_dir)).exit_rule != config.exit_rule:
        return
    record = read_record(experiment.output_dir) or FIELDS
    base_model, on_hub = record["arguments"].get("model_name_or_path"), record["from_hub"]
    if not write_card(experiment.output_dir, config, experiment.task, base_model, on_hub, split, exits):
        experiment.say(f"{experiment.output_dir / CARD}: edited, so it is left as it is")


if __name__ == "__main__":
    cli.run(main)
