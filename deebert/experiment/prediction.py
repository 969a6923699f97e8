"""--do_predict: what a trained model predicts for GLUE's test sets, as files for GLUE's server.

One pass gives the logits of all exits, and with them the predictions of the full model and those at every threshold.
"""

from collections.abc import Sequence
from pathlib import Path

from deebert.data.submission import SIZES, as_words, test_sets, write_predictions, write_zip
from deebert.data.tasks import get_task, label_order
from deebert.evaluation.all_exits import AllExits
from deebert.experiment.arguments import Arguments
from deebert.experiment.experiment import Experiment
from deebert.experiment.record import read_record
from deebert.modeling.config import config_cutoffs
from deebert.modeling.exit_rules import NO_EXIT
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder

FULL, STORED = "full", "stored"  # submissions beside {rule}_{threshold}

Threshold = float | list[float]


def predict(experiment: Experiment) -> None:
    """Writes the predictions of the model in output_dir to --submission_dir, and packs a zip for each threshold."""
    args, task = experiment.args, experiment.task
    check_task(experiment)
    model = experiment.load_trained(experiment.output_dir)
    if not args.do_train and not experiment.record.facts:
        experiment.record.begin(previous=None)
    exits = dict(experiment.test_sets.all_exits(model))
    if not experiment.accelerator.is_main_process:
        return
    labels = label_order(task, model.config.model_type, model.config.id2label)
    report_gaps(experiment)
    wanted = thresholds(args, model.config)
    folders = [Path(args.submission_dir, submission) for submission in wanted]
    for folder in folders:
        make_folder(folder)
    for folder, threshold in zip(folders, wanted.values(), strict=True):
        for split, part in exits.items():
            name, (words, facts) = test_sets(task)[split], predictions(part, threshold, labels)
            write_predictions(folder / f"{name}.tsv", experiment.test_indices[split], words)
            experiment.say(f"{folder.name}: {len(words):,} predictions for {name}{facts}")
    pack(experiment, folders)


def check_task(experiment: Experiment) -> None:
    """Raises InputError where the model was trained on another task: a loop over tasks may name one model for all."""
    record = read_record(experiment.output_dir)
    trained = record and record["arguments"].get("task_name")
    if trained and get_task(trained) != experiment.task:
        raise InputError(
            f"{experiment.output_dir}: trained on {trained}, so it does not predict {experiment.task.name}; "
            f"give the model of {experiment.task.name} as --output_dir, in the scripts OUTPUT_DIR"
        )


def thresholds(args: Arguments, config) -> dict[str, Threshold]:
    """By name of the submission: no early exit, the threshold that the model stores, and those of --exit_threshold."""
    chosen: dict[str, Threshold] = {FULL: NO_EXIT}
    _, cutoffs = config_cutoffs(config)
    if max(cutoffs) > 0:
        chosen[STORED] = config.exit_threshold
    return chosen | {f"{config.exit_rule}_{value}": value for value in args.exit_threshold if value > 0}


def report_gaps(experiment: Experiment) -> None:
    """A line for each test set that is not there, or not complete."""
    samples = {split: len(indices) for split, indices in experiment.test_indices.items()}
    for split, name in test_sets(experiment.task).items():
        if split not in samples:
            place = f"{experiment.args.data_dir}, nor in a folder {split} beside it"
            experiment.say(f"note: no predictions for {name}: there is no {split}.tsv in {place}")
        elif samples[split] != SIZES[name]:
            experiment.say(
                f"note: {name} has {samples[split]:,} samples here; GLUE's server wants predictions for {SIZES[name]:,}"
            )


def predictions(exits: AllExits, threshold: Threshold, labels: Sequence[str]) -> tuple[list[str], str]:
    """The predictions at a threshold as GLUE writes them, and in words what they change and save."""
    full = as_words(exits.logits[:, -1], labels)
    if threshold == NO_EXIT:
        return full, ""
    exit_layers = exits.exit_layers(threshold)
    words = as_words(exits.logits_at(exit_layers), labels)
    changed = sum(word != other for word, other in zip(words, full, strict=True))
    layers, cost = exit_layers.mean() / exits.num_layers, exits.cost(exit_layers, threshold).mean()
    saved = f"{100 * (1 - layers):.1f} % of the layers and {100 * (1 - cost):.1f} % of the cost saved"
    return words, f"; {changed:,} changed, {saved}"


def pack(experiment: Experiment, folders: list[Path]) -> None:
    """A zip of each folder, with what was predicted in this run and in earlier ones."""
    zips: dict[tuple, list[str]] = {}
    for folder in folders:
        zips.setdefault(tuple(write_zip(folder).items()), []).append(f"{folder}.zip")
    for sizes, names in zips.items():
        packed = dict(sizes)
        missing = [name for name in SIZES if name not in packed]
        partly = [name for name in packed if packed[name] != SIZES[name]]
        wanted = f"; GLUE's server also wants {', '.join(missing)}" if missing else ""
        wanted += f"; not all samples are in {', '.join(partly)}" if partly else ""
        experiment.say(f"{', '.join(packed)} in {', '.join(names)}{wanted or ': all that GLUE wants'}")
