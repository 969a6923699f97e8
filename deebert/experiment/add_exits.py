"""Off-ramps for a classifier that is fine-tuned already. They learn its own predictions, so that no labels are needed.

Backbone and classifier stay as they are. A held-out part of the texts chooses the threshold: by the exact test of a
risk (evaluation/risk_control.py), in which each prediction that early exit changes counts as wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from deebert.data.batching import Features, collator, tokenize
from deebert.data.encoding import as_tuples, check_vocabulary
from deebert.data.label_values import MULTI_LABEL, SINGLE_LABEL, choose_columns
from deebert.data.own_data import METRICS, OwnFiles, OwnTask, own_task
from deebert.data.tables import ENDINGS, read_table, read_texts
from deebert.evaluation.all_exits import AllExits, run_all_exits, sweep
from deebert.evaluation.metrics import correct, predictions
from deebert.evaluation.risk_control import fewest_samples, risk_p_value
from deebert.evaluation.threshold_selection import SelectionTarget, changed_texts, choose, describe, describe_confidence
from deebert.evaluation.timing import compare_latency
from deebert.experiment.experiment import check_depth, has_off_ramps, set_text_length
from deebert.experiment.model_card import write_card
from deebert.modeling import checkpoints
from deebert.modeling.config import has_several_labels
from deebert.modeling.exit_rules import NO_EXIT
from deebert.training.stage import StageTraining
from deebert.training.strategies import RECIPES, TrainSettings
from deebert.training.train_data import cached_features
from deebert.utils.errors import InputError, one_line
from deebert.utils.files import complete_folder

RECIPE = RECIPES["fast"]
HELD_OUT = 0.2  # share of the texts that choose the threshold; more where the test needs more


@dataclass(frozen=True)
class AddedExits:
    """What `add_exits` made, as the held-out texts show it.

    threshold: stored with the model; None: the exits are switched off, since none keeps the labels and saves anything.
    agreement: for each off-ramp, by its layer, the share of texts to which it gives the classifier's own label.
    kept: the share of texts that keep their label at the threshold.
    cost: of these texts there, as a share of the classifier's.
    """

    threshold: float | None
    agreement: dict[int, float]
    kept: float = 1.0
    cost: float = 1.0


def add_exits(
    model: str | Path,
    texts: str | Path | Sequence[str | tuple[str, str]],
    output: str | Path,
    agreement: float = 0.98,
    text_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    max_seq_length: int | None = None,
    seed: int = 42,
    say: Callable[[str], None] = print,
) -> AddedExits:
    """Gives a fine-tuned classifier off-ramps that learn its predictions, and a threshold. Raises InputError.

    Args:
        model: the classifier, of one of the eight encoders: a folder, or a name on the hub. It is only read.
        texts: texts or pairs, or a file of them, one in each line or a table. Labels in a table are only scored.
        output: folder of the new model, with the classifier's own weights, labels and tokenizer.
        agreement: the share of unseen texts that keep the classifier's label, with 95 % confidence.
        text_column, label_column, label_separator: of a table (docs/own_data.md).
        max_seq_length: longer texts are cut. None: the tokenizer's limit.
        seed: of the held-out texts, the new weights and the batches.
        say: prints a line.
    """
    source, output = str(model), Path(output).resolve()
    if not 0 < agreement < 1:
        raise InputError(f"agreement {agreement}: give a share of the texts below 1, such as 0.98")
    target = SelectionTarget(risk=round(1 - agreement, 9))
    if Path(source).resolve() in (output, *output.parents):
        raise InputError(f"{output}: this is in the folder of the classifier; choose another folder for the new model")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: there is something in it; choose another folder for the new model")
    config, tokenizer = load_source(source, max_seq_length)
    task = task_of(texts, config, text_column, label_column, label_separator)
    training, held_out = split(task, tokenizer, config, target, seed)
    for note in task.notes:
        say(note)
    if note := training.cut_note():
        say(f"note: {note} (max_seq_length)")
    say(f"{len(training):,} different texts train the off-ramps, {len(held_out):,} are held out")

    with complete_folder(output) as folder:
        set_seed(seed)
        checkpoints.disable_cudnn_attention()
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        network = checkpoints.load_final_classifier(source, config).to(accelerator.device)
        train_off_ramps(network, training, accelerator, folder, seed)
        exits = run_all_exits(network, held_out, collator(config), accelerator=accelerator)
        added = measure(task, exits, target, seed)
        network.set_exit_threshold(NO_EXIT if added.threshold is None else added.threshold)
        for line in report(task, network, exits, held_out, added, target):
            say(line)
        with one_line(f"{output}: the model cannot be written", "make room on the disk"):
            checkpoints.write_model(network, tokenizer, folder)
    summary = in_words(added, target, source)
    record = {"arguments": {"model_name_or_path": source}, "from_hub": not Path(source).exists()}
    write_card(output, network.config, task, record, "held out", None if exits.labels is None else exits, summary)
    say(f"{output}: {summary}")
    return added


def load_source(source: str, max_seq_length: int | None) -> tuple:
    """The classifier's config, with the fields of the off-ramps, and its tokenizer. Raises InputError."""
    config = checkpoints.load_config(source)
    if has_off_ramps(config):
        raise InputError(f"{source}: it has off-ramps already; python -m deebert eval chooses a threshold for them")
    if config.num_labels == 1:
        raise InputError(f"{source}: it predicts a number (regression), so that there is no label to keep")
    check_depth(config, source)
    tokenizer = checkpoints.load_tokenizer(source)
    check_vocabulary(tokenizer.backend_tokenizer, config.vocab_size, source)
    set_text_length(config, max_seq_length or min(tokenizer.model_max_length, checkpoints.max_tokens(config)))
    for name, value in RECIPE.off_ramps.items():
        setattr(config, name, value)
    return config, tokenizer


def task_of(
    texts: str | Path | Sequence, config, text_column: str | None, label_column: str | None, separator: str | None
) -> OwnTask:
    """The texts as the dev set of a task, with labels where a table has the classifier's. Raises InputError."""
    names, several = tuple(str(config.id2label[i]) for i in sorted(config.id2label)), has_several_labels(config)
    problem, notes = MULTI_LABEL if several else SINGLE_LABEL, ()
    path = Path(texts) if isinstance(texts, str | Path) else None
    if path is None:
        lines = as_tuples(texts)
    elif path.suffix.lower() not in ENDINGS and not (text_column or label_column):
        lines = [each for each, _ in read_texts(path, "lines", ())]
    else:
        columns = {"text_column": text_column, "label_column": label_column, "label_separator": separator}
        errors = []
        for labels in (names, tuple(map(str, range(len(names))))):  # a file may have their numbers
            try:
                return own_task(OwnFiles(validation=path, labels=labels, problem_type=problem, **columns))
            except InputError as error:
                errors.append(error)
        if label_column:
            raise errors[0]
        notes = (f"no labels are used: {errors[0]}",)
        named = choose_columns(path, read_table(path), text_column, None, labelled=False).texts
        lines = [each for each, _ in read_texts(path, ENDINGS[path.suffix.lower()], named)]
    name, unlabelled = path.stem if path else "texts", {"dev": [(each, None) for each in lines]}
    return OwnTask(name, (), "", names, METRICS[problem], several_labels=several, notes=notes, lines=unlabelled)


def split(task: OwnTask, tokenizer, config, target: SelectionTarget, seed: int) -> tuple[Features, Features]:
    """The texts that train the off-ramps, and those held out. A repeated text counts once. Raises InputError."""
    examples = list({each.texts: each for each in task.read(None, "dev")}.values())
    needed = fewest_samples(lambda samples: risk_p_value(0, samples, target.risk), 1 - target.confidence)
    if len(examples) < 2 * needed:
        shown = f"to show {describe_confidence(target.confidence)} that {keeps(target)}"
        raise InputError(f"{len(examples):,} different texts are too few {shown}; at least {2 * needed:,} are needed")
    count = max(round(HELD_OUT * len(examples)), needed)
    order = np.random.default_rng(seed).permutation(len(examples))
    parts = [[examples[row] for row in rows] for rows in (order[count:], order[:count])]
    return tuple(tokenize(part, tokenizer, config.max_seq_length) for part in parts)


def train_off_ramps(network, features: Features, accelerator: Accelerator, folder: Path, seed: int) -> None:
    """Trains the off-ramps on what one pass gives: pooled states and the classifier's logits."""
    recipe = {**RECIPE.defaults, "num_train_epochs": RECIPE.highway_epochs}
    settings = TrainSettings(**recipe, distill=1.0, seed=seed, logging_steps=0, save_steps=0)  # 1: labels have no part
    with cached_features(network, features, collator(network.config), accelerator, folder) as cached:
        own = predictions(cached.final_logits, has_several_labels(network.config))
        StageTraining(2, network, replace(cached, labels=own), settings, accelerator).run()


def measure(task: OwnTask, exits: AllExits, target: SelectionTarget, seed: int) -> AddedExits:
    """Chooses the threshold on the held-out texts, with the classifier's own labels as the right ones."""
    own = replace(exits, labels=predictions(exits.logits[:, -1], exits.several_labels))
    agreement = {layer: float(correct(own.logits[:, i], own.labels).mean()) for i, layer in enumerate(own.layers[:-1])}
    choice = choose(task, own, target, seed)
    if choice.threshold is None:
        return AddedExits(None, agreement)
    changed, *_ = changed_texts(own, own.exit_layers(choice.threshold))
    return AddedExits(choice.threshold, agreement, 1 - changed / len(own.labels), choice.point.cost)


def report(
    task: OwnTask, network, exits: AllExits, held_out: Features, added: AddedExits, target: SelectionTarget
) -> Iterator[str]:
    """The agreement of each off-ramp, the threshold, the times, and where there are labels the change of the score."""
    shares = ", ".join(f"{layer}: {100 * share:.1f}" for layer, share in added.agreement.items())
    yield f"held-out texts to which an off-ramp gives the classifier's own label, by layer, in %: {shares}"
    if added.threshold is None:
        promise = f"{describe_confidence(target.confidence)}, the promise that {keeps(target)}"
        yield f"no threshold is shown to save anything and to keep, {promise}"
        yield "early exit is switched off (exit_threshold -1); more texts or a lower agreement may help"
        return
    shown = f"{100 * added.kept:.2f} % of the held-out texts keep their label"
    yield f"chosen threshold: {added.threshold:g} nats; {shown}, at {100 * added.cost:.1f} % of the cost"
    yield compare_latency(network, added.threshold, held_out, collator(network.config))[0]
    if exits.labels is not None:
        yield f"against the file's labels: {describe(task, exits, *sweep(task, exits, [added.threshold]))}"


def keeps(target: SelectionTarget) -> str:
    return f"{100 - 100 * target.risk:g} % of unseen texts keep their label"


def in_words(added: AddedExits, target: SelectionTarget, source: str) -> str:
    """The new model in one line."""
    name = Path(source).name
    if added.threshold is None:
        return f"the predictions of {name}, without early exit, which is not shown to keep them"
    promise = f"{describe_confidence(target.confidence)} {keeps(target)}"
    return f"the predictions of {name} at {100 * added.cost:.0f} % of its cost; {promise}"
