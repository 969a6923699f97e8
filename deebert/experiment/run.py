"""A run of the driver: training, the score of every exit, sweeps of thresholds, a chosen threshold."""

import os
import re
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from shlex import quote
from signal import SIGTERM

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    set_seed,
)

from deebert.data.label_values import listing
from deebert.data.tasks import SUFFIXES, names_other_labels
from deebert.evaluation.all_exits import layer_scores
from deebert.evaluation.results import EVAL_RESULTS, remove_results
from deebert.experiment.arguments import Arguments
from deebert.experiment.earlier_run import EVALUATION, FIELDS, not_resumed, precision, read_record
from deebert.experiment.evaluation import Evaluation, show
from deebert.experiment.experiment import Experiment
from deebert.experiment.model_card import write_card
from deebert.experiment.monitor import Monitor
from deebert.modeling import checkpoints
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.checkpointing import newest_checkpoint, read_state, remove_checkpoints, set_random_state
from deebert.training.probes import FEW, fit_classifier, probe_poolings
from deebert.training.stage import StageTraining
from deebert.training.strategies import RECIPES, STRATEGIES
from deebert.utils.cli import StopSignal
from deebert.utils.errors import InputError, Interrupted, one_line
from deebert.utils.files import remove_leftovers, reserved

POOLING_WORDS = {"cls": "the first token", "mean": "the mean of the tokens"}
TRAINED = {
    "backbone": "the backbone and its classifier",
    "off_ramps": "the off-ramps",
    "all": "the backbone, its classifier and the off-ramps",
}


def run(args: Arguments) -> dict[str, float]:
    """Trains and evaluates as the flags say. Returns the scores of each evaluated model. Raises InputError."""
    accelerator = make_accelerator(args)
    with reserved(Path(args.run.output_dir)) if accelerator.is_main_process else nullcontext():
        experiment, scores = Experiment.from_args(args, accelerator), {}
        if args.run.do_train and experiment.finished:
            tidy_up(experiment)
            experiment.say(f"the training in {experiment.output_dir} is finished; nothing to resume")
        elif args.run.do_train:
            train(experiment)
        if args.run.do_eval:
            for folder in experiment.models_to_evaluate():
                step = "" if folder == experiment.output_dir else folder.name.removeprefix("checkpoint-")
                scores |= {f"{name}_{step}": score for name, score in evaluate(experiment, folder).items()}
        accelerator.end_training()  # without it, threads of the process group make the process abort at exit
    return scores


def make_accelerator(args: Arguments) -> Accelerator:
    """Devices and processes as torchrun or accelerate launch set them up. Raises InputError if they are unsupported."""
    run = args.run
    if run.fp16 and (run.no_cuda or not torch.cuda.is_available()):
        raise InputError("--fp16 needs a GPU; leave it out")
    checkpoints.disable_cudnn_attention()
    stages = STRATEGIES[args.training.train_strategy]
    with one_line("the processes cannot be connected", "start them by torchrun or accelerate launch"):
        accelerator = Accelerator(
            cpu=run.no_cuda or not torch.accelerator.is_available(),  # else accelerate connects no processes on a CPU
            mixed_precision="fp16" if run.fp16 else None,  # None: as accelerate launch says
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # TrainBatches divides the steps
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=any(stage.skips_off_ramps for stage in stages)),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # the others wait while the first one times exits
            ],
        )
    kind, processes = accelerator.distributed_type, os.environ.get("WORLD_SIZE", "1")
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise InputError(f"accelerate's {kind.value} is not supported; use its MULTI_GPU, MULTI_CPU or NO")
    if processes != str(accelerator.num_processes):
        raise InputError(f"{processes} processes were started, and {accelerator.num_processes} is connected; start one")
    return accelerator


def train(experiment: Experiment) -> None:
    """The stages of the strategy, from the beginning or from a checkpoint, and the saved model."""
    args, accelerator = experiment.args, experiment.accelerator
    checkpoint = newest_checkpoint(experiment.output_dir) if experiment.previous_record is not None else None
    with StopSignal() as stop:
        model, first, state = load_start(experiment, checkpoint)
        model.to(accelerator.device)
        if args.run.resume and checkpoint is None and (note := not_resumed(args.run, experiment.settings)):
            experiment.say(note)
        clean_output_dir(experiment, keep_checkpoints=checkpoint is not None)
        experiment.record.begin(experiment.task, experiment.previous_record)
        monitor = Monitor(experiment)
        for stage in range(first, len(STRATEGIES[args.training.train_strategy]) + 1):
            if stage > first and any(gather_object([stop()])):
                message = f"stopped after stage {stage - 1}; {how_to_resume(experiment.output_dir)}"
                raise Interrupted(message, stop.number or SIGTERM)
            train_stage(experiment, model, monitor, stage, state, stop)
            if stage == 1 and args.evaluation.eval_after_first_stage:
                for split, exits in experiment.all_exits(model, test=False):
                    scores = layer_scores(experiment.scored_task, exits)[exits.num_layers]
                    experiment.say(f"After the first stage, {split}: {show(scores)}")
            state = None
        if accelerator.is_main_process:
            checkpoints.save_model(model, experiment.tokenizer, experiment.output_dir)
            write_card(experiment.output_dir, model.config, experiment.task, experiment.record.facts)
            experiment.record.finish()
            tidy_up(experiment)
        accelerator.wait_for_everyone()
        experiment.say(f"the trained model is in {experiment.output_dir}{how_to_evaluate(args)}")
        if stop():
            raise Interrupted(f"stopped; the training in {experiment.output_dir} is finished", stop.number)


def clean_output_dir(experiment: Experiment, keep_checkpoints: bool) -> None:
    """Removes what a killed process left, and of a training that is overwritten model, checkpoints and results."""
    if experiment.accelerator.is_main_process:
        remove_leftovers(experiment.output_dir)
        if not keep_checkpoints:
            for name in ("config.json", EVALUATION, EVAL_RESULTS):  # the model of before is none any more
                (experiment.output_dir / name).unlink(missing_ok=True)
            remove_checkpoints(experiment.output_dir)
            for suffix in SUFFIXES.values() if experiment.args.run.overwrite_output_dir else ():
                remove_results(experiment.result_folder(experiment.output_dir, suffix))
    experiment.accelerator.wait_for_everyone()


def tidy_up(experiment: Experiment) -> None:
    """Removes what a finished training no longer needs. If this is interrupted, the next run does it."""
    if experiment.accelerator.is_main_process:
        remove_leftovers(experiment.output_dir)
        remove_checkpoints(experiment.output_dir, experiment.args.keeps_checkpoints)


def load_start(experiment: Experiment, checkpoint: Path | None) -> tuple:
    """The model to start from, the first stage that is left to train, and that stage's state (None: from its start)."""
    if checkpoint:
        experiment.say(f"resuming from {checkpoint}")
        state = read_state(checkpoint)
        experiment.config.classifier_pooling = checkpoints.load_config(str(checkpoint)).classifier_pooling
        return checkpoints.load_model(str(checkpoint), experiment.config), state["stage"], state
    start, cache_dir = experiment.args.model.model_name_or_path, experiment.args.model.cache_dir
    names = checkpoints.load_config(start, None, cache_dir).id2label
    others = names_other_labels(experiment.task, names)
    model, new = checkpoints.load_pretrained(start, experiment.config, cache_dir, other_labels=others)
    if others:
        labels = listing([str(name) for name in names.values()])
        experiment.say(f"{start}: its classifier is of other labels, {labels}; a new one is trained")
    probes = RECIPES[experiment.args.model.recipe].probes and any(name.startswith("classifier.") for name in new)
    if probes:
        before = experiment.config.classifier_pooling
        choose_pooling(experiment, model.to(experiment.accelerator.device))
        if experiment.config.classifier_pooling != before:
            model, new = checkpoints.load_pretrained(start, experiment.config, cache_dir, other_labels=others)
    experiment.say(f"new, not in the checkpoint: {', '.join(new_parts(new)) or 'nothing'}")
    texts_a_label = len(experiment.train_features) / experiment.task.num_labels
    if probes and experiment.config.linear_classifier and texts_a_label < FEW:
        experiment.say(
            f"the final classifier is first fitted to the frozen encoder ({texts_a_label:.0f} texts a label)"
        )
        model.to(experiment.accelerator.device)
        fit_classifier(model, experiment.train_features, experiment.collate, experiment.accelerator)
    return model, 1, None


def choose_pooling(experiment: Experiment, model) -> None:
    """Stores what a new final classifier is to read, and says so; a model of another pooling has to be made again."""
    explained = probe_poolings(model, experiment.train_features, experiment.collate, experiment.accelerator)
    experiment.config.classifier_pooling = max(explained, key=explained.get)
    shares = ", ".join(f"{100 * share:.1f} % by {POOLING_WORDS[name]}" for name, share in explained.items())
    experiment.say(
        f"the final classifier reads {POOLING_WORDS[experiment.config.classifier_pooling]}: of the labels' variance "
        f"the last layer explains, before the training, {shares}"
    )


def new_parts(names: list[str]) -> list[str]:
    """The modules of these weights, off-ramps only counted: ['classifier', '5 off-ramps']."""
    modules = sorted({name.rsplit(".", 1)[0] for name in names if not is_off_ramp(name)})
    off_ramps = {match[0] for name in names if (match := re.search(r"\.highway(\.\d+|_embeddings)\.", name))}
    return [*modules, *([f"{len(off_ramps)} off-ramp{'s' if len(off_ramps) > 1 else ''}"] if off_ramps else [])]


def how_to_resume(output_dir: Path) -> str:
    """After a stop, which has written a checkpoint."""
    return f"the same command with --resume goes on from {newest_checkpoint(output_dir)}"


def how_to_evaluate(args: Arguments) -> str:
    """The next command after a training with own data that evaluates nothing."""
    if args.run.do_eval or not args.own.files:
        return ""
    command = f"python -m deebert eval --output_dir {quote(args.run.output_dir)} --target_drop 0.01"
    return f"; {command} scores it and chooses a threshold"


def train_stage(
    experiment: Experiment, model, monitor: Monitor, stage: int, state: dict | None, stop: StopSignal
) -> None:
    """One stage, from its start or from a checkpoint's state. Raises Interrupted after Ctrl-C or SIGTERM."""
    settings, accelerator = experiment.args.stage_settings(stage, model.config.hidden_size), experiment.accelerator
    process = accelerator.process_index
    if stage > 1 or process > 0:  # random numbers differ between stages and between processes
        set_seed(settings.seed + stage + 1000 * process)
    bf16 = precision(experiment.args) == "bf16"
    what = TRAINED[STRATEGIES[settings.train_strategy][stage - 1].trains]
    experiment.say(f"stage {stage}: training {what}{' in bfloat16' * bf16}")
    started = time.perf_counter()
    with experiment.train_data(model, stage) as data:
        preparation = time.perf_counter() - started
        training = StageTraining(stage, model, data, settings, accelerator, bf16)
        if state:
            try:
                training.load_state_dict(state["training"])
            except (KeyError, ValueError) as error:  # of another version
                folder = experiment.output_dir
                message = f"{folder}: the checkpoint does not fit ({error}); --overwrite_output_dir starts again"
                raise InputError(message) from None
            set_random_state(state["random"][process])
            monitor.resume(training)
        if not training.run(monitor.log, monitor.epoch, monitor.save, stop):
            where = f"stopped in stage {stage} after step {training.steps} of {training.total}"
            raise Interrupted(f"{where}; {how_to_resume(experiment.output_dir)}", stop.number or SIGTERM)
    monitor.load_best(training)
    experiment.record.add_stage(training, preparation)
    cached = f" after {preparation:.0f} s of preparation" if preparation > 1 else ""
    experiment.say(
        f"stage {stage}: mean loss {training.mean_loss:.4f}, {training.seconds:.0f} s{cached}, "
        f"{training.samples_per_second:.1f} samples/s"
    )


def evaluate(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Scores one saved model on the task's dev sets and writes the result files. Returns the full model's scores."""
    model, scores = experiment.load_trained(folder), {}
    if not (experiment.args.run.do_train or experiment.record.facts):  # the first of several models
        experiment.record.begin(experiment.task)
    exits = dict(experiment.all_exits(model))
    if not experiment.accelerator.is_main_process:
        return scores  # one process scores, and times early exit
    for split, suffix in experiment.task.dev_splits.items():
        evaluation = Evaluation(experiment, folder, model, split, exits[split])
        evaluation.score()
        first = folder == experiment.output_dir and not suffix
        if first and experiment.args.evaluation.chooses_threshold:
            evaluation.choose_threshold()
        if first and experiment.args.evaluation.answered_accuracy is not None:
            evaluation.choose_confidence()
        evaluation.score_classes()
        evaluation.sweep(next(iter(exits.values())))
        evaluation.score_answered()
        evaluation.score_threshold()
        evaluation.write_scores()
        scores |= {f"{name}{suffix}": evaluation.scores[name] for name in experiment.scored_task.metrics}
        if first and checkpoints.load_config(str(folder)).exit_rule == model.config.exit_rule:  # else one on trial
            record = read_record(folder) or FIELDS
            write_card(folder, model.config, experiment.scored_task, record, split, evaluation.exits)
    return scores
