"""The evaluation of one saved model on one dev set, one method for each result."""

import time
from dataclasses import asdict
from pathlib import Path

from deebert.evaluation import all_exits, metrics, results, tables, threshold_selection, timing
from deebert.evaluation.all_exits import AllExits
from deebert.evaluation.results import SweepRow
from deebert.evaluation.threshold_selection import SelectionTarget
from deebert.experiment.experiment import Experiment
from deebert.modeling.checkpoints import load_config
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.files import replacing, write_json

MOST_REPEATS, SECONDS_OF_REPEATS = 5, 30.0  # a timed sweep is repeated until it has taken so long; medians count
MORE_TRAINING = "train again with more epochs (EPOCHS, --num_train_epochs) or a higher --learning_rate"


class Evaluation:
    """checkpoint: the model's folder. exits: the logits of all its exits on the split."""

    def __init__(self, experiment: Experiment, checkpoint: Path, model, split: str, exits: AllExits):
        self.task, self.say, self.collate = experiment.scored_task, experiment.say, experiment.collate
        self.features = experiment.dev_sets[split]
        self.checkpoint, self.model, self.split, self.exits = checkpoint, model, split, exits
        self.wanted, self.seed = experiment.args.evaluation, experiment.args.training.seed
        self.suffix = self.task.dev_splits[split]
        self.folder = experiment.result_folder(checkpoint, self.suffix)
        self.scores: dict[str, float] = {}  # the lines of eval_results.txt

    def write_config(self) -> None:
        with replacing(self.checkpoint / "config.json") as file:
            file.write(self.model.config.to_json_string(use_diff=False))

    def score(self) -> None:
        """All metrics of the final classifier; with --eval_each_highway the score of each exit in each_layer.npy."""
        each_layer = all_exits.layer_scores(self.task, self.exits)
        self.scores = dict(each_layer[self.exits.num_layers])
        self.say(f"Result of {self.checkpoint} on {self.split}: {show(self.scores)}")
        if self.wanted.eval_each_highway:
            results.write_each_layer(self.folder, each_layer)
            self.exits.save(self.folder / results.ALL_EXITS)
            percents = tables.percents(each_layer)
            self.say(f"Score ({self.task.primary_metric}) by layer, in %: {percents}; written to {self.folder}")
        if self.task.labels:
            self.warn_of_chance()
        self.warn_of_weak_end(each_layer)

    def warn_of_chance(self) -> None:
        """One line where exits have learned nothing that a constant prediction does not have."""
        layers = [self.exits.layers[i] for i in metrics.exits_at_chance(self.exits.logits, self.exits.labels)]
        if layers:
            label, score = metrics.majority(self.exits.labels)
            other_recipe = self.exits.num_layers not in layers and self.model.config.highway_head != "linear"
            advice = MORE_TRAINING + ", or --recipe fast" * other_recipe
            self.say(
                f"warning: {'exit' if len(layers) == 1 else 'exits'} {', '.join(map(str, layers))} of "
                f"{self.exits.num_layers}: no better than always {self.model.config.id2label[label]!r} "
                f"({100 * score:.1f} %); {advice}"
            )

    def warn_of_weak_end(self, each_layer: dict[int, dict[str, float]]) -> None:
        """One line where an off-ramp scores more than the final classifier, which savings are measured against."""
        best = threshold_selection.better_exit(self.task, self.exits, self.seed)
        if best is not None:
            primary = results.primary_scores(each_layer)
            self.say(
                f"warning: the final classifier scores {100 * primary[self.exits.num_layers]:.1f} %, the off-ramp "
                f"after layer {best} {100 * primary[best]:.1f} %, which is more than chance: the full model is not "
                f"trained enough, and what exits save and lose beside it says little; {MORE_TRAINING}"
            )

    def score_classes(self) -> None:
        """Precision, recall and F1 of each class, of the full model and at the model's threshold -> classes.csv.

        With --eval_each_highway, as each_layer.csv, and where a threshold is chosen.
        """
        if not self.task.labels or not (self.wanted.eval_each_highway or self.wanted.chooses_threshold):
            return
        config = self.model.config
        names, threshold = [config.id2label[i] for i in range(config.num_labels)], config.exit_threshold
        classes = all_exits.classes(self.exits, names, threshold)
        results.write_classes(self.folder, classes)
        early = " -> at the model's threshold" if self.exits.exits_early(threshold) else ""
        self.say(f"Each class of {self.split}, in %, full model{early}:")
        self.say(tables.class_table(classes, self.folder))

    def choose_threshold(self) -> None:
        """Chooses the threshold for a risk or a drop of the score, and stores it in the model's config.

        Where there is none, one that was stored before for the same rule is removed: it may not keep this target.
        """
        target, config = SelectionTarget(self.wanted.target_drop, self.wanted.risk), self.model.config
        choice = threshold_selection.choose(self.task, self.exits, target, self.seed)
        self.say(threshold_selection.report(choice, target, len(self.exits.labels)))
        facts = {"target": asdict(target), **asdict(choice)}
        file, before = self.checkpoint / "config.json", load_config(str(self.checkpoint))
        config.exit_threshold = NO_EXIT if choice.threshold is None else choice.threshold
        if config.exit_threshold != before.exit_threshold:
            config.min_confidence = 0.0  # it was chosen for other predictions
        if choice.threshold is not None:
            self.write_config()
            self.say(f"stored in {file}: from_pretrained gives a model that exits at it")
        elif before.exit_rule != config.exit_rule:
            self.say(f"{file} keeps its rule {before.exit_rule} and its threshold {before.exit_threshold}")
        elif before.exit_threshold != NO_EXIT:
            self.write_config()
            self.say(f"removed from {file}: the threshold {before.exit_threshold}; the model does not exit early")
        write_json(self.folder / results.THRESHOLD, facts)  # also a choice without a result

    def choose_confidence(self) -> None:
        """Chooses which texts are handed over at the model's threshold, and stores it in the model's config."""
        accuracy, config = self.wanted.answered_accuracy, self.model.config
        chosen = threshold_selection.choose_confidence(self.exits, config.exit_threshold, accuracy)
        self.say(threshold_selection.report_confidence(chosen, accuracy, len(self.exits.labels)))
        config.min_confidence, file = chosen or 0.0, self.checkpoint / "config.json"
        if load_config(str(self.checkpoint)).exit_rule == config.exit_rule:
            self.write_config()
            self.say(f"stored in {file}: {'texts below it get no label' if chosen else 'every text gets a label'}")
        else:
            self.say(f"not stored: {file} keeps its rule and its threshold")

    def score_answered(self) -> None:
        """Where the model hands texts over: how many it answers, and how many of these rightly."""
        config, samples = self.model.config, len(self.exits.labels)
        if not config.min_confidence or not self.task.labels:
            return
        texts, right = threshold_selection.answered(self.exits, config.exit_threshold, config.min_confidence)
        share, accuracy = texts / samples, right / max(texts, 1)
        shown = f"{texts:,} of {samples:,} texts ({100 * share:.1f} %) are answered, {100 * accuracy:.1f} % rightly"
        self.say(f"{self.split} at min_confidence {config.min_confidence:g}: {shown}; the others are handed over")
        self.scores |= {"answered": share, "acc_of_the_answered": accuracy}

    def score_threshold(self) -> None:
        """The score at the model's threshold, what it saves, and beside it the best single exit: the verdict."""
        threshold = self.model.config.exit_threshold
        if not self.exits.exits_early(threshold):
            return
        (row,) = all_exits.sweep(self.task, self.exits, [threshold])
        self.say(f"{self.split} at the model's threshold: {threshold_selection.describe(self.task, self.exits, row)}")
        self.scores[f"{self.task.primary_metric}_at_the_threshold"] = row.score
        self.scores["cost_at_the_threshold"] = row.cost
        text, time_saved = timing.compare_latency(self.model, threshold, self.features, self.collate)
        self.say(text)
        self.say(threshold_selection.verdict(self.task, self.exits, row, time_saved))

    def sweep(self, dev: AllExits) -> None:
        """Score, layers run and cost at each --exit_threshold from 0; with --eval_highway also the measured times.

        dev: of the dev set, whose thresholds are taken where none is given.
        """
        thresholds = [threshold for threshold in self.wanted.exit_threshold if threshold >= 0]
        if self.wanted.eval_highway and not thresholds:
            thresholds = all_exits.spread_thresholds(dev)
            if dev is self.exits:
                self.say(
                    f"thresholds that save 10, 20 ... % of this set's cost: {' '.join(f'{x:g}' for x in thresholds)}"
                )
        if not thresholds:
            return
        rows = all_exits.sweep(self.task, self.exits, thresholds)
        if self.wanted.eval_highway:
            rows = self.measure_times(rows)
        self.say(tables.sweep_table(rows))
        for row in rows:
            self.scores[f"{self.task.primary_metric}_at_{row.rule}_{row.threshold}"] = row.score
            self.scores[f"layers_run_at_{row.rule}_{row.threshold}"] = row.layers_run
            self.scores[f"cost_at_{row.rule}_{row.threshold}"] = row.cost

    def measure_times(self, rows: list[SweepRow]) -> list[SweepRow]:
        """The rows with their times. The thresholds take turns; the files are written after each repeat."""
        dense = all_exits.dense_thresholds(self.exits)
        results.write_sweep(self.folder, all_exits.sweep(self.task, self.exits, dense), results.CURVE)
        size, timed, started = self.wanted.per_gpu_eval_batch_size, rows, time.perf_counter()
        for timed in timing.timed_sweep(rows, self.exits, self.model, self.features, self.collate, size, MOST_REPEATS):
            results.write_sweep(self.folder, timed)
            for row in timed:
                results.write_entropy(self.folder, row)
            if time.perf_counter() - started > SECONDS_OF_REPEATS:
                break
        for row in timed:
            if row.other_exits:
                self.say(
                    f"threshold {row.threshold}: {row.other_exits} samples exited after another layer than predicted "
                    "(rounding)"
                )
        seconds = timed[0].full_seconds
        self.say(f"Full model without off-ramps: {seconds:.2f} s at batch size {size}; written to {self.folder}")
        return timed

    def write_scores(self) -> None:
        """eval_results.txt in the model's folder; MNLI-mm's in a folder beside it, a test file's among its results."""
        beside = self.checkpoint.with_name(self.checkpoint.name + self.suffix)
        results.write_eval_results(self.folder if self.split == "test" else beside, self.scores)


def show(scores: dict[str, float]) -> str:
    """Scores as text, in per cent: 'f1 88.12, acc 84.00'."""
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())
