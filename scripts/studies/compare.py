"""Trains settings with several seeds and compares what they score and save. compare.sh runs it, and says more.

A setting is a line `name: flags` of a file. The flags are those of run_glue_deebert.py, or with --layers those of
static_models.py; {k} in a line stands for 1 to N, the number of layers, so that the line is N settings.
COMPARISON_DIR/runs/FLAGS/seed{n}/all_exits.npz is the result of a finished training; the model is deleted once that
file is written. Settings that differ in the exit rule only share a training.
"""

import argparse
import shlex
import shutil
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_plus

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import baselines
import comparison
import static_models
from static_models import ALL_EXITS

import run_glue_deebert
from deebert.data.tasks import Task
from deebert.evaluation import results
from deebert.evaluation.all_exits import AllExits
from deebert.experiment.arguments import parse_args
from deebert.experiment.experiment import find_task
from deebert.modeling.checkpoints import load_config
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.utils import cli
from deebert.utils.cli import ArgumentParser
from deebert.utils.errors import InputError
from deebert.utils.files import read_json, replacing, write_json

OURS = ArgumentParser(parents=[static_models.FLAGS], add_help=False, allow_abbrev=False)  # not the driver's
OURS.add_argument("--exit_rule", choices=EXIT_RULES, default="entropy")  # does not change the training
OURS.add_argument("--patience_tolerance", type=float, default=0.5)


def read_settings(path: Path) -> dict[str, list[str]]:
    """Reads lines `name: flags`; blank lines and lines that begin with # are skipped. Raises InputError."""
    if not path.is_file():
        raise InputError(f"--settings {path}: no such file")
    settings = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, flags = line.partition(":")
        if not colon or not name.strip():
            raise InputError(f"{path}, line {number}: no 'name: flags'")
        if name.strip() in settings:
            raise InputError(f"{path}, line {number}: {name.strip()!r} is there already")
        settings[name.strip()] = shlex.split(flags)
    if not settings:
        raise InputError(f"--settings {path}: no settings in it")
    return settings


def for_each_depth(settings: dict[str, list[str]], layers: int) -> dict[str, list[str]]:
    """The settings; one with {k} in its name becomes several, with 1 to layers in the place of {k}."""
    depths = {name: range(1, layers + 1) if "{k}" in name else [0] for name in settings}
    return {
        name.replace("{k}", str(k)): [flag.replace("{k}", str(k)) for flag in flags]
        for name, flags in settings.items()
        for k in depths[name]
    }


class Runs:
    """The trainings in one folder. common: the flags that all of them have."""

    def __init__(self, folder: Path, common: list[str]):
        self.folder, self.common = folder, common
        self.record = folder / "common.json"
        recorded = read_json(self.record, list) if self.record.is_file() else common
        if recorded != common:
            raise InputError(
                f"{folder}: it holds runs with other settings ({' '.join(recorded)}); choose another COMPARISON_DIR"
            )
        if OURS.parse_known_args(common)[1] != common:
            raise InputError("give --exit_rule, --patience_tolerance, --layers and --pooling in a setting's line")

    @cached_property
    def task(self) -> Task:
        args = parse_args(self.argv([], 0))
        return find_task(args.data, args.own)

    @property
    def layers(self) -> int:
        """The number of layers of the model that all trainings start from. Raises InputError."""
        return load_config(parse_args(self.argv([], 0)).model.model_name_or_path).num_hidden_layers

    def check(self, flags: list[str]) -> None:
        """Raises InputError for flags that are wrong, before anything is trained."""
        if any(flag.split("=")[0] == "--seed" for flag in (*self.common, *flags)):
            raise InputError("give seeds in SEEDS, not as --seed")
        parse_args(self.argv(flags, 0))

    def run_dir(self, flags: list[str], seed: int) -> Path:
        """The folder of one training; its name is the flags that it depends on."""
        ours, training = OURS.parse_known_args(flags)
        if ours.layers:
            training = ["--layers", str(ours.layers), "--pooling", ours.pooling, *training]
        return self.folder / "runs" / (quote_plus(" ".join(training).removeprefix("--")) or "as_given") / f"seed{seed}"

    def argv(self, flags: list[str], seed: int) -> list[str]:
        """The driver's command line of one training."""
        run, training = self.run_dir(flags, seed), OURS.parse_known_args(flags)[1]
        files = ["--output_dir", str(run / "model"), "--plot_data_dir", str(run / "results"), "--overwrite_output_dir"]
        work = ["--seed", str(seed), "--do_train", "--do_eval", "--eval_each_highway", "--resume"]
        return [*self.common, *training, *work, *files]

    def result(self, flags: list[str], seed: int) -> AllExits:
        """The logits of all exits on the dev set; trains the model unless they are there."""
        ours, stored = OURS.parse_known_args(flags)[0], self.run_dir(flags, seed) / ALL_EXITS
        if not stored.is_file():
            self.train(flags, seed, stored)
        return replace(AllExits.load(stored), rule=ours.exit_rule, tolerance=ours.patience_tolerance)

    def train(self, flags: list[str], seed: int, stored: Path) -> None:
        """Trains and evaluates one model, and keeps only the logits of its exits."""
        run, argv, ours = stored.parent, self.argv(flags, seed), OURS.parse_known_args(flags)[0]
        print(f"\n{' '.join(flags) or 'as given'}, seed {seed}", flush=True)
        started = time.perf_counter()
        if ours.layers:
            static_models.train(parse_args(argv), ours.layers, ours.pooling)
            written = run / "model" / ALL_EXITS
        else:
            run_glue_deebert.main(argv)
            written = results.result_dir(run / "results", str(run / "model")) / ALL_EXITS
        write_json(run / "run.json", {"argv": argv, "seconds": time.perf_counter() - started})
        write_json(self.record, self.common)
        written.replace(stored)
        shutil.rmtree(run / "model")


def write_savings(folder: Path, task: Task, early: dict[str, list[AllExits]], seeds: list[int]) -> list[Path]:
    """Writes and prints the table of savings; writes the CSV file and the figure."""
    outcomes = {name: [comparison.Outcome.of(task, exits) for exits in of_seeds] for name, of_seeds in early.items()}
    samples = len(next(iter(early.values()))[0].logits)
    text = f"{comparison.caption(samples, seeds)}\n\n{comparison.table(outcomes)}\n"
    with replacing(folder / "comparison.md") as file:
        file.write(text)
    print(f"\n{text}", flush=True)
    comparison.write_csv(folder / "comparison.csv", outcomes, seeds)
    curves = {name: [outcome.curve for outcome in of_seeds] for name, of_seeds in outcomes.items()}
    return [folder / "comparison.md", folder / "comparison.csv", *comparison.draw(curves, folder / "comparison")]


def write_frontier(
    folder: Path, task: Task, early: dict[str, list[AllExits]], static: dict[str, list[AllExits]]
) -> Path:
    """Writes and prints the tables of early exit beside its baselines, and draws the figure with them."""
    lines, first = baselines.frontier(task, early, static), next(iter(early.values()))
    points = baselines.static_points(task, static, first[0])
    tables = [
        "## Early exit at shares of the full model's cost: score (%), and gains (points)",
        baselines.about_intervals(len(first[0].logits), len(first)),
        baselines.frontier_table(lines),
        "## Other ways to choose a sample's exit, for the same models (%)",
        baselines.rivals_table(task, early),
        *(["## Static models: cost and score (%)", baselines.static_table(points)] if static else []),
    ]
    with replacing(folder / "frontier.md") as file:
        file.write("\n\n".join(tables) + "\n")
    print("\n\n".join(tables) + "\n")
    comparison.draw({name: [lines.curve(name)[::-1]] for name in lines.scores}, folder / "comparison", points)
    return folder / "frontier.md"


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--settings", type=Path, help="file of lines 'name: flags'; default: one setting, no flags")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--comparison_dir", type=Path, required=True)
    args, common = parser.parse_known_args()
    settings = read_settings(args.settings) if args.settings else {"as given": []}
    runs = Runs(args.comparison_dir, common)
    if any("{k}" in name for name in settings):
        settings = for_each_depth(settings, runs.layers)
    for name, flags in settings.items():  # reports a wrong flag before hours of work
        print(f"{name}: {' '.join(flags) or 'no further flags'}", flush=True)
        runs.check(flags)
    is_static = {name: OURS.parse_known_args(flags)[0].layers is not None for name, flags in settings.items()}
    if all(is_static.values()):
        raise InputError("--settings: all of them are static; add one with exits, such as 'two stages:'")

    early, static, written = {}, {}, []
    for name, flags in settings.items():
        of_seeds = [runs.result(flags, seed) for seed in args.seeds]
        if is_static[name]:
            static[name] = of_seeds
        else:
            early[name] = of_seeds
            written = write_savings(args.comparison_dir, runs.task, early, args.seeds)  # a later one may fail
    comparable = runs.task.num_labels > 1 and not runs.task.several_labels  # baselines.py compares predicted classes
    if len(settings) > 1 and comparable:
        written.append(write_frontier(args.comparison_dir, runs.task, early, static))
    print(*written, sep="\n")


if __name__ == "__main__":
    cli.run(main)
