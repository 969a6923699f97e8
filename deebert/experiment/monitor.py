"""What happens between the steps of a training: scalars for TensorBoard, dev scores, the best weights, checkpoints."""

import math
import time
from pathlib import Path

import numpy as np
from safetensors.torch import load_model as load_weights
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from tqdm import tqdm

from deebert.evaluation.all_exits import layer_scores
from deebert.experiment.experiment import Experiment
from deebert.modeling.checkpoints import save_model
from deebert.training.checkpointing import write_checkpoint
from deebert.training.stage import StageTraining
from deebert.training.strategies import STRATEGIES
from deebert.utils.errors import one_line
from deebert.utils.files import remove_folder


class ScalarFile:
    """Scalars for TensorBoard in a folder, on the disk when `write` returns.

    TensorBoard's own writers have a thread, which on a full disk ends without a word, or with a traceback at the exit.
    """

    def __init__(self, folder: Path):
        self.problem = f"{folder}: no scalars can be written", "make room, then --resume goes on"
        with one_line(*self.problem):
            folder.mkdir(parents=True, exist_ok=True)
            self.events = EventsWriter(str(folder / "events"))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        with one_line(*self.problem):
            for name, value in scalars.items():
                self.events.write_event(Event(summary=scalar(name, value), step=step, wall_time=time.time()))
            self.events.flush()


PATIENCE = 2  # epochs in a row whose weights are not kept; they end a stage


class Monitor:
    """`log`, `epoch` and `save` are the callbacks of StageTraining.run; every process has a monitor."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.tokenizer = experiment, experiment.tokenizer
        self.wanted, self.output_dir = experiment.args.checkpoints, experiment.output_dir
        self.accelerator = experiment.accelerator
        self.best_in_last_checkpoint: Path | None = None  # the best weights so far, when it was written
        self.scalars = ScalarFile(self.output_dir / "tensorboard") if self.accelerator.is_main_process else None

    def resume(self, training: StageTraining) -> None:
        """Has to be called when a checkpoint's state has been loaded."""
        self.best_in_last_checkpoint = self.best_folder(training)

    def log(self, training: StageTraining, scalars: dict[str, float]) -> None:
        """Writes scalars, and with --evaluate_during_training the dev scores."""
        if self.wanted.evaluate_during_training:
            scalars = scalars | self.dev_scores(training)
        self.write(training, scalars)

    def write(self, training: StageTraining, scalars: dict[str, float]) -> None:
        if self.scalars is not None:
            self.scalars.write(training.steps, {f"stage{training.stage}/{name}": x for name, x in scalars.items()})

    def epoch(self, training: StageTraining) -> bool:
        """Scores the dev set after an epoch of the backbone, if the best weights are wanted. Whether the stage ends."""
        wanted = self.wanted.load_best_model_at_end and not self.wanted.evaluate_during_training
        if not wanted or training.plan.trains == "off_ramps":
            return False
        self.write(training, self.dev_scores(training))
        return training.steps - training.best_step >= PATIENCE * len(training.batches)

    def dev_scores(self, training: StageTraining) -> dict[str, float]:
        """All metrics of the exits that the stage trains. Saves the weights if they are to be kept so far."""
        task, layers = self.experiment.scored_task, training.model.config.exit_layers
        trained = {"backbone": layers[-1:], "off_ramps": layers[:-1], "all": layers}[training.plan.trains]
        scalars = {}
        for split, exits in self.experiment.all_exits(training.model, test=False, progress=False):
            each_layer = layer_scores(task, exits)
            scores = {layer: each_layer[layer] for layer in trained}
            scalars |= {f"{split}_layer{i}_{name}": x for i, metrics in scores.items() for name, x in metrics.items()}
            primary = [metrics[task.primary_metric] for metrics in scores.values()]
            name = (
                f"{split} {task.primary_metric}{'' if len(scores) == 1 else f' of exits {trained[0]} to {trained[-1]}'}"
            )
            if self.accelerator.is_main_process:
                shown = " ".join(f"{100 * score:.2f}" for score in primary)
                tqdm.write(f"stage {training.stage}, step {training.steps}: {name} {shown}")
            if self.wanted.load_best_model_at_end and not task.dev_splits[split]:
                score, texts = float(np.mean(primary)), len(exits.logits)
                noise = 0.0 if self.wanted.evaluate_during_training else standard_error(score, texts)
                self.keep_if_best(training, score, noise)
        return scalars

    def best_folder(self, training: StageTraining) -> Path:
        return self.output_dir / f"best-stage{training.stage}-{training.best_step}"

    def keep_if_best(self, training: StageTraining, score: float, noise: float = 0.0) -> None:
        """Saves the weights, unless an earlier score of the stage is higher by more than the noise."""
        if training.best is None or score >= training.best - noise:
            training.best = score if training.best is None else max(score, training.best)
            training.best_step = training.steps
            if self.accelerator.is_main_process:
                save_model(training.model, self.tokenizer, self.best_folder(training))
                self.delete_stale_best(training)

    def delete_stale_best(self, training: StageTraining) -> None:
        """Deletes weights that are no longer the best, unless the newest checkpoint needs them when it is resumed."""
        for folder in self.output_dir.glob("best-stage*"):
            if folder not in (self.best_folder(training), self.best_in_last_checkpoint):
                remove_folder(folder)

    def save(self, training: StageTraining) -> None:
        """Writes a checkpoint, and deletes what --save_total_limit no longer allows."""
        last_stage = training.stage == len(STRATEGIES[training.settings.train_strategy])
        if last_stage and training.steps == training.total and not self.experiment.args.keeps_checkpoints:
            return  # the finished model is saved next
        write_checkpoint(self.output_dir, training, self.tokenizer, self.wanted.save_total_limit)
        if self.accelerator.is_main_process:
            self.best_in_last_checkpoint = self.best_folder(training)
            self.delete_stale_best(training)

    def load_best(self, training: StageTraining) -> None:
        """Loads the best weights of a finished stage into the model, if there are any."""
        if training.best is None:
            return
        self.accelerator.wait_for_everyone()
        load_weights(training.model, self.best_folder(training) / "model.safetensors")
        which = "those of" if self.wanted.evaluate_during_training else "the last within a standard error of"
        text = f"stage {training.stage}: the weights after step {training.best_step} are used, {which}"
        self.accelerator.print(f"{text} the best dev score, {100 * training.best:.2f}", flush=True)


def standard_error(share: float, texts: int) -> float:
    """The standard error of an accuracy, from 0 to 1, on this number of texts; for other scores a rule of thumb."""
    return math.sqrt(max(share * (1 - share), 0) / texts)
