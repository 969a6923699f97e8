"""Score over milliseconds a text: early exit beside all that one would run instead, on this machine, for one task.

    bash scripts/studies/frontier.sh --frontier_dir frontier --models small=quickstart/saved_model \\
        --static small-2=static2 small-3=static3 --encoders small=quickstart/model \\
        --task_name SST-2 --data_dir quickstart/data/SST-2

Own data: --train_file with --validation_file or --test_file in place of the last line; the test file is scored, else
the dev set. Further flags about data are those of run_glue_deebert.py. --static takes what static_models.py trained, or
another classifier of Hugging Face's with the same labels; NAME-LAYERS of one NAME share a line of the figure.

Peers are trained on the task's training set: TF-IDF with a linear classifier and fastText; of each encoder the frozen
encoder and model2vec, with logistic regression; and SetFit of the encoders of --set_fit. Exports, graphs, peers and
predictions are kept in FRONTIER_DIR/work and used again; times are always those of one run. Writes frontier.md, .csv,
.png and .pdf.
"""

import argparse
import sys
import time
from pathlib import Path
from urllib.parse import quote_plus

sys.path.insert(0, str(Path(__file__).parents[2]))

import frontier_contenders as contenders
import numpy as np
from frontier_contenders import Contender, Study, Texts, text_tuples
from frontier_tables import Measured, write
from full_graphs import timed_turns

from deebert.data.tasks import Example, Task
from deebert.experiment.arguments import parse_args
from deebert.experiment.experiment import find_task
from deebert.modeling.checkpoints import load_config, quiet_transformers
from deebert.modeling.config import longest_text
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser, positive
from deebert.utils.errors import InputError
from deebert.utils.files import make_folder, read_json, replacing, write_json

SIZES = (1, 32)
TURN_TEXTS = {1: 16, 32: 64}  # texts of one turn, by the size of a batch
BATCHES_TO_CHOOSE_BY = {1: 32, 32: 2}  # how many of them a graph is chosen by


def named_folder(text: str) -> tuple[str, str]:
    """An argparse type: NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not name or not Path(folder, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FOLDER of a saved model")
    return name, folder


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our flags and the driver's. Raises InputError."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, folders = parser.add_argument, {"type": named_folder, "nargs": "+", "metavar": "NAME=DIR", "default": []}
    add("--frontier_dir", required=True, type=Path, help="for tables and figure, and for what is kept")
    add("--models", required=True, **folders | {"default": None}, help="trained models with exits")
    add("--static", **folders, help="models without exits")
    add("--encoders", **folders, help="sentence encoders, for what is trained without fine-tuning them")
    add("--set_fit", **folders, help="sentence encoders that SetFit fine-tunes; minutes each")
    add("--texts", type=positive, default=320, help="how many are timed; all are scored")
    add("--rounds", type=positive, default=3, help="each text is timed so often; medians count")
    return parser.parse_known_args()


def read_task(models: list[tuple[str, str]], flags: list[str]) -> tuple[Task, list[Example], list[Example]]:
    """The task, its training set, and its test set or dev set. Raises InputError."""
    args, config = parse_args(["--do_eval", "--output_dir", models[0][1], *flags]), load_config(models[0][1])
    names = tuple(config.id2label[i] for i in sorted(config.id2label))
    task = find_task(args.data, args.own, labels=names, problem_type=config.problem_type)
    if task.num_labels == 1 or task.several_labels:
        raise InputError(f"{task.name}: the frontier compares labels, one for each text")
    splits = list(task.dev_splits)
    scored = "test" if "test" in splits else splits[0]
    return task, *(task.read(args.data.data_dir, split) for split in ("train", scored))


def divide(texts: Texts, number: int) -> tuple[np.ndarray, dict[int, list[np.ndarray]]]:
    """(S,) the half of each text, 0 or 1, at random; and the batches to time, by size: positions of texts of one half.

    Texts of about the same length form a batch, as where many are classified at once.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    half = np.zeros(len(texts), int)
    half[order[1::2]] = 1
    batches = {size: [] for size in SIZES}
    for part in (0, 1):
        timed = sorted((i for i in order[:number] if half[i] == part), key=lambda i: sum(map(len, texts[i])))
        for size in SIZES:
            batches[size] += [np.array(timed[start : start + size]) for start in range(0, len(timed), size)]
    return half, {
        size: [some[i] for i in np.random.default_rng(0).permutation(len(some))] for size, some in batches.items()
    }


def all_contenders(args: argparse.Namespace, study: Study) -> list[Contender]:
    """All that is compared; trains and exports what is not there yet."""
    ways = [*contenders.tf_idf(study), *contenders.fast_text(study)]
    for name, folder in args.models:
        ways += contenders.early_exit(study, name, folder)
    for name, folder in args.static:
        ways += contenders.static(study, name, folder)
    for name, folder in args.encoders:
        ways += [*contenders.frozen(study, name, folder), *contenders.model2vec(study, name, folder)]
    for name, folder in args.set_fit:
        ways += contenders.set_fit(study, name, folder)
    return ways


def predictions(contender: Contender, texts: Texts, folder: Path) -> np.ndarray:
    """(S,) the label of each text, from batches of 32; kept in a file."""
    path = folder / f"{quote_plus(contender.name)}.npy"
    if not path.is_file():
        started, order = time.perf_counter(), sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        predicted = np.empty(len(texts), int)
        for start in range(0, len(order), max(SIZES)):
            rows = order[start : start + max(SIZES)]
            predicted[rows] = contender.predict([texts[i] for i in rows])
        with replacing(path, "wb") as file:
            np.save(file, predicted)
        print(f"scored {contender.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return np.load(path)


def check_kept(folder: Path, args: argparse.Namespace, flags: list[str]) -> None:
    """Raises InputError where the folder holds what other models or other data gave."""
    given = [*args.models, *args.static, *args.encoders, *args.set_fit]
    facts = {"flags": flags} | {
        f"{name}={path}": [file.stat().st_mtime for file in Path(path).glob("*.safetensors")] for name, path in given
    }
    record = folder / "made_of.json"
    kept = read_json(record) if record.is_file() else facts
    if any(kept.get(name, fact) != fact for name, fact in facts.items()):
        raise InputError(
            f"{folder}: made of other models, or of other data; remove it, or choose another --frontier_dir"
        )
    make_folder(folder)
    write_json(record, kept | facts)


def main() -> None:
    args, flags = parse()
    quiet_transformers()
    task, train, scored = read_task(args.models, flags)
    work, texts = args.frontier_dir / "work", text_tuples(scored)
    check_kept(work, args, flags)
    half, batches = divide(texts, args.texts)
    inputs = {size: [[texts[i] for i in rows] for rows in some] for size, some in batches.items()}
    some = {size: inputs[size][:number] for size, number in BATCHES_TO_CHOOSE_BY.items()}
    longest = min(longest_text(load_config(folder)) for _, folder in args.models)
    ways = all_contenders(args, Study(task, train, scored, longest, some, work))
    labels = np.array([predictions(each, texts, work / "predictions") for each in ways])
    seconds = {}
    for size in SIZES:
        print(f"timing {len(ways)} ways, batch {size}, {args.rounds} rounds of {args.texts} texts", flush=True)
        turn = max(1, TURN_TEXTS[size] // size)
        seconds[size] = timed_turns([each.predict for each in ways], inputs[size], args.rounds, turn)
    measured = Measured(task, ways, labels, np.array([x.label for x in scored]), half, batches, seconds)
    print(*write(measured, args.frontier_dir, f"{args.rounds} rounds"), sep="\n")


if __name__ == "__main__":
    cli.run(main)
