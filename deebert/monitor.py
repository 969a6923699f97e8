"""What happens beside the updates of a training: scalars, dev scores, the best weights, checkpoints, run.json."""

from pathlib import Path

import numpy as np
from safetensors.torch import load_model as load_weights
from tensorboardX import SummaryWriter

from deebert.checkpoints import save_model
from deebert.evaluation import layer_scores, run_all_exits
from deebert.files import check_room
from deebert.glue import eval_splits
from deebert.resume import checkpoint_folder, keep_newest, write_checkpoint
from deebert.run import Run
from deebert.training import StageTraining


class Monitor:
    """`log` and `save` are what StageTraining.run calls; every process has to have one."""

    def __init__(self, run: Run, model):
        self.run, self.model = run, model
        self.writer = SummaryWriter(str(run.output_dir / "tensorboard")) if run.accelerator.is_main_process else None

    def begin(self, training: StageTraining) -> None:
        """Raises InputError where the checkpoints of a stage will not fit on the disk."""
        args, weights = self.run.args, 4 * self.model.num_parameters()
        trained = 4 * sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        count = -(-(training.total - training.updates) // args.save_steps) if args.save_steps > 0 else 0
        count = min(count, args.save_total_limit or count)
        size = count * (weights + 2 * trained) + weights * (1 + args.load_best_model_at_end)
        check_room(self.run.output_dir, size, f"--save_steps {args.save_steps}, --save_total_limit")

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
            scores = {layer: layer_scores(run.task, exits)[layer - 1] for layer in trained}
            scalars |= {f"{split}_layer{i}_{name}": x for i, found in scores.items() for name, x in found.items()}
            if run.args.load_best_model_at_end and not suffix:
                self.keep_if_best(training, float(np.mean([x[run.task.primary_metric] for x in scores.values()])))
        return scalars

    def best_folder(self, training: StageTraining) -> Path:
        return self.run.output_dir / f"best-stage{training.stage}"

    def keep_if_best(self, training: StageTraining, score: float) -> None:
        if training.best is None or score > training.best:
            training.best = score
            if self.run.accelerator.is_main_process:
                save_model(self.model, self.run.tokenizer, self.best_folder(training))

    def save(self, training: StageTraining) -> None:
        run = self.run
        folder = checkpoint_folder(run.output_dir, training.stage, training.updates)
        write_checkpoint(folder, self.model, run.tokenizer, training, run.accelerator)
        if run.accelerator.is_main_process:
            keep_newest(run.output_dir, run.args.save_total_limit)

    def end(self, training: StageTraining) -> None:
        """The best weights, if asked for, and the stage's line in run.json and on the screen."""
        run = self.run
        if training.best is not None:
            run.accelerator.wait_for_everyone()
            load_weights(self.model, self.best_folder(training) / "model.safetensors")
            run.say(
                f"stage {training.stage}: the best dev score was {100 * training.best:.2f}; going on with its weights"
            )
        rate, peak = training.samples / max(training.seconds, 1e-9), training.peak_memory / 2**30
        run.facts["stages"][str(training.stage)] = {
            "updates": training.updates,
            "mean_loss": training.mean_loss,
            "seconds": training.seconds,
            "samples_per_second": rate,
            "peak_memory_gib": peak,
            "best_dev_score": training.best,
        }
        run.write_facts()
        run.say(
            f"stage {training.stage}: mean loss {training.mean_loss:.4f}, {training.seconds:.0f} s, "
            f"{rate:.1f} samples/s, peak memory {peak:.2f} GiB"
        )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
