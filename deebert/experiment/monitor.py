"""What happens beside the updates of a training: scalars, dev scores, the best weights, checkpoints, run.json."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_model as load_weights
from tensorboardX import SummaryWriter
from tqdm import tqdm

from deebert.data.tasks import eval_splits
from deebert.evaluation.all_exits import layer_scores, run_all_exits
from deebert.experiment.experiment import Run
from deebert.modeling.checkpoints import save_model
from deebert.modeling.off_ramps import is_off_ramp
from deebert.training.checkpointing import checkpoint_folder, keep_newest, write_checkpoint
from deebert.training.stage import StageTraining
from deebert.training.strategies import STRATEGIES
from deebert.utils.files import check_room


class Monitor:
    """`log` and `save` are what StageTraining.run calls; every process has to have one."""

    def __init__(self, run: Run, model):
        self.run, self.model = run, model
        self.counted_on: Path | None = None  # the best weights, as the newest checkpoint knows them
        self.writer = SummaryWriter(str(run.output_dir / "tensorboard")) if run.accelerator.is_main_process else None

    def resume(self, training: StageTraining) -> None:
        """Called once a checkpoint's state has been loaded."""
        self.counted_on = self.best_folder(training)

    def check_room(self, first: int) -> None:
        """Raises InputError where the checkpoints of the stages from `first` on will not fit on the disk."""
        args, weights = self.run.args, 4 * self.model.num_parameters()
        highways = 4 * sum(p.numel() for name, p in self.model.named_parameters() if is_off_ramp(name))
        update_size = args.per_gpu_train_batch_size * args.gradient_accumulation_steps
        per_epoch = -(-len(self.run.train_features) // (update_size * self.run.accelerator.num_processes))
        sizes = []  # of all checkpoints
        for stage, plan in list(enumerate(STRATEGIES[args.train_strategy], 1))[first - 1 :]:
            updates = args.stage_settings(stage).updates(per_epoch)
            trained = plan.backbone * (weights - highways) + plan.highways * highways
            sizes += [weights + 2 * trained] * (-(-updates // args.save_steps) if args.save_steps > 0 else 1)
        if args.save_total_limit:  # the next is written before the oldest goes
            sizes = sorted(sizes)[-args.save_total_limit - 1 :]
        size = sum(sizes) + weights * (1 + 2 * args.load_best_model_at_end)
        check_room(self.run.output_dir, size, "checkpoints (--save_steps, --save_total_limit)")

    def log(self, training: StageTraining, scalars: dict[str, float]) -> None:
        if self.run.args.evaluate_during_training:
            scalars = scalars | self.dev_scores(training)
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"stage{training.stage}/{name}", value, training.updates)

    def dev_scores(self, training: StageTraining) -> dict[str, float]:
        """All metrics of the exits that the stage trains; keeps the weights that are the best so far."""
        run, layers = self.run, self.model.config.num_hidden_layers
        trained = range(1 if training.plan.highways else layers, layers + training.plan.backbone)
        scalars = {}
        for split, suffix in eval_splits(run.task).items():
            features = run.eval_features[split]
            exits = run_all_exits(self.model, features, run.collate, progress=False, accelerator=run.accelerator)
            of_layers = layer_scores(run.task, exits)
            scores = {layer: of_layers[layer - 1] for layer in trained}
            scalars |= {f"{split}_layer{i}_{name}": x for i, found in scores.items() for name, x in found.items()}
            shown = " ".join(f"{100 * found[run.task.primary_metric]:.2f}" for found in scores.values())
            of = f"{split} {run.task.primary_metric}{'' if len(scores) == 1 else f' of exits 1 to {len(scores)}'}"
            if run.accelerator.is_main_process:
                tqdm.write(f"stage {training.stage}, step {training.updates}: {of} {shown}")
            if run.args.load_best_model_at_end and not suffix:
                self.keep_if_best(training, float(np.mean([x[run.task.primary_metric] for x in scores.values()])))
        return scalars

    def best_folder(self, training: StageTraining) -> Path:
        return self.run.output_dir / f"best-stage{training.stage}-{training.best_update}"

    def keep_if_best(self, training: StageTraining, score: float) -> None:
        if training.best is None or score > training.best:
            training.best, training.best_update = score, training.updates
            if self.run.accelerator.is_main_process:
                save_model(self.model, self.run.tokenizer, self.best_folder(training))
                self.forget_other_best(training)

    def forget_other_best(self, training: StageTraining) -> None:
        """Removes weights that were the best before, but for those that the newest checkpoint counts on."""
        for folder in self.run.output_dir.glob("best-stage*"):
            if folder not in (self.best_folder(training), self.counted_on):
                shutil.rmtree(folder)

    def save(self, training: StageTraining) -> None:
        if self.writer is not None:
            self.writer.flush()  # a training that goes on from here does not write them again
        run, last = self.run, training.stage == len(STRATEGIES[self.run.args.train_strategy])
        if last and training.updates == training.total and run.args.save_steps <= 0:
            return  # the finished model is saved next
        folder = checkpoint_folder(run.output_dir, training.stage, training.updates)
        write_checkpoint(folder, self.model, run.tokenizer, training, run.accelerator)
        if run.accelerator.is_main_process:
            keep_newest(run.output_dir, run.args.save_total_limit)
            self.counted_on = self.best_folder(training)
            self.forget_other_best(training)

    def end(self, training: StageTraining, preparation: float) -> None:
        """The best weights, if asked for, and the stage's line in run.json and on the screen."""
        run = self.run
        if training.best is not None:
            run.accelerator.wait_for_everyone()
            load_weights(self.model, self.best_folder(training) / "model.safetensors")
            run.say(
                f"stage {training.stage}: the best dev score was {100 * training.best:.2f} after step "
                f"{training.best_update}; going on with its weights"
            )
        rate, peak = training.samples / max(training.seconds, 1e-9), training.peak_memory / 2**30
        run.facts["stages"][str(training.stage)] = {
            "updates": training.updates,
            "mean_loss": training.mean_loss,
            "preparation_seconds": preparation,
            "seconds": training.seconds,
            "samples_per_second": rate,
            "peak_memory_gib": peak,
            "best_dev_score": training.best,
            "best_update": training.best_update,
        }
        run.write_facts()
        cached = f" after {preparation:.0f} s of caching features" if preparation > 1 else ""
        run.say(
            f"stage {training.stage}: mean loss {training.mean_loss:.4f}, {training.seconds:.0f} s{cached}, "
            f"{rate:.1f} samples/s, peak memory {peak:.2f} GiB"
        )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
