"""Trains settings of run_glue_deebert.py with several seeds and compares what they score and save. compare.sh runs it.

COMPARISON_DIR/runs/FLAGS/seed{n}/all_exits.npz is the result of a finished training; the model is deleted once that
file is written. Settings that differ in the exit rule only share a training.
"""

import argparse
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
from comparison_figure import draw_comparison

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
from deebert.utils.files import replacing

ALL_EXITS = "all_exits.npz"
AFTER_TRAINING = ArgumentParser(add_help=False, allow_abbrev=False)  # flags that do not change the training
AFTER_TRAINING.add_argument("--exit_rule", choices=EXIT_RULES, default="entropy")
AFTER_TRAINING.add_argument("--patience_tolerance", type=float, default=0.5)


def gives_seed(flags: list[str]) -> bool:
    return any(flag.split("=")[0] == "--seed" for flag in flags)


class Comparison:
    """The runs in one folder. common: the flags that all of them have."""

    def __init__(self, folder: Path, common: list[str]):
        self.folder, self.common = folder, common
        self.record = folder / "common.json"
        recorded = results.read_json(self.record, list) if self.record.is_file() else common
        if recorded != common:
            raise InputError(
                f"{folder}: it holds runs with other settings ({' '.join(recorded)}); choose another COMPARISON_DIR"
            )
        if AFTER_TRAINING.parse_known_args(common)[1] != common or gives_seed(common):
            raise InputError("give --exit_rule, --patience_tolerance in a setting's line, and seeds in SEEDS")

    @cached_property
    def task(self) -> Task:
        args = parse_args(self.argv([], 0))
        return find_task(args.data, args.own)

    @property
    def layers(self) -> int:
        """The number of layers of the model that all trainings start from. Raises InputError."""
        model = parse_args(self.argv([], 0)).model
        source = model.config_name or model.model_name_or_path
        return load_config(source, model.model_type, model.cache_dir).num_hidden_layers

    def check(self, flags: list[str]) -> None:
        """Raises InputError for a setting that is wrong, before anything is trained."""
        if gives_seed(flags):
            raise InputError("give seeds in SEEDS, not in a setting's line")
        parse_args(self.argv(AFTER_TRAINING.parse_known_args(flags)[1], 0))

    def result(self, flags: list[str], seed: int) -> AllExits:
        """The logits of one setting with one seed; trains the model unless they are there."""
        after, training = AFTER_TRAINING.parse_known_args(flags)
        return replace(self.exits(training, seed), rule=after.exit_rule, tolerance=after.patience_tolerance)

    def run_dir(self, training: list[str], seed: int) -> Path:
        """The folder of one training; its name is the flags."""
        name = quote_plus(" ".join(training).removeprefix("--")) or "as_given"
        return self.folder / "runs" / name / f"seed{seed}"

    def argv(self, training: list[str], seed: int) -> list[str]:
        """The command line of one training."""
        run = self.run_dir(training, seed)
        files = ["--output_dir", str(run / "model"), "--plot_data_dir", str(run / "results"), "--overwrite_output_dir"]
        work = ["--seed", str(seed), "--do_train", "--do_eval", "--eval_each_highway", "--resume"]
        return [*self.common, *training, *work, *files]

    def exits(self, training: list[str], seed: int) -> AllExits:
        """The logits of all exits on the dev set; trains the model unless they are there."""
        stored = self.run_dir(training, seed) / ALL_EXITS
        if not stored.is_file():
            self.train(training, seed, stored)
        return AllExits.load(stored)

    def train(self, training: list[str], seed: int, stored: Path) -> None:
        """Trains and evaluates one model, and keeps only the logits of its exits."""
        run, argv = self.run_dir(training, seed), self.argv(training, seed)
        print(f"\n{' '.join(training) or 'as given'}, seed {seed}", flush=True)
        started = time.perf_counter()
        run_glue_deebert.main(argv)
        results.write_json(run / "run.json", {"argv": argv, "seconds": time.perf_counter() - started})
        written = results.result_dir(run / "results", str(run / "model")) / stored.name
        results.write_json(self.record, self.common)
        written.replace(stored)
        shutil.rmtree(run / "model")


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--settings", type=Path, help="file of lines 'name: flags'; default: one setting, no flags")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--comparison_dir", type=Path, required=True)
    args, common = parser.parse_known_args()
    settings = comparison.read_settings(args.settings) if args.settings else {"as given": []}
    runs = Comparison(args.comparison_dir, common)
    if any("{k}" in name for name in settings):
        settings = comparison.for_each_depth(settings, runs.layers)
    for name, flags in settings.items():  # reports a wrong flag before hours of work
        print(f"{name}: {' '.join(flags) or 'no further flags'}", flush=True)
        runs.check(flags)

    task, outcomes, early, static = runs.task, {}, {}, {}
    for name, flags in settings.items():
        of_seeds = [runs.result(flags, seed) for seed in args.seeds]
        if of_seeds[0].num_layers == 1:
            static[name] = of_seeds
            print(
                f"\n{name}: score {' '.join(f'{100 * exits.full_score(task):.1f}' for exits in of_seeds)}", flush=True
            )
            continue
        early[name], outcomes[name] = of_seeds, [comparison.outcome(task, exits) for exits in of_seeds]
        caption = comparison.caption(len(of_seeds[0].logits), args.seeds)
        written = write(args.comparison_dir, outcomes, args.seeds, caption)  # after each, in case a later one fails
        print(f"\n{comparison.table({name: outcomes[name]})}\n", flush=True)
    if not early:
        raise InputError("--settings: all of them are static; add one with exits, such as 'two stages:'")
    print(f"\n{caption}\n\n{comparison.table(outcomes)}\n")
    comparable = task.num_labels > 1 and not task.several_labels  # baselines.py compares predicted classes
    if len(settings) > 1 and comparable:
        written += [write_frontier(args.comparison_dir, task, early, static)]
    print(*written, sep="\n")


def write(folder: Path, outcomes: dict[str, list[comparison.Outcome]], seeds: list[int], caption: str) -> list[Path]:
    """Writes the table, the CSV and the figure of the outcomes so far, and returns their paths."""
    with replacing(folder / "comparison.md") as file:
        file.write(f"{caption}\n\n{comparison.table(outcomes)}\n")
    comparison.write_csv(folder / "comparison.csv", outcomes, seeds)
    figures = draw_comparison(comparison.GRID, comparison.curves(outcomes), folder / "comparison")
    return [folder / "comparison.md", folder / "comparison.csv", *figures]


def write_frontier(
    folder: Path, task: Task, early: dict[str, list[AllExits]], static: dict[str, list[AllExits]]
) -> Path:
    """Writes and prints the tables of early exit beside its baselines, and draws the figure with them."""
    lines, full = baselines.frontier(task, early, static), next(iter(early.values()))[0]
    tables = [
        "## Early exit at shares of the full model's cost: score (%), and gains (points) with 95 % intervals",
        f"Thresholds and models are chosen on one half of the {len(full.logits):,} samples and scored on the other.",
        baselines.frontier_table(lines),
        "## Other ways to choose a sample's exit, for the same models (%)",
        baselines.rivals_table(task, early),
    ]
    points = baselines.static_points(task, static, full)
    if static:
        tables += ["## Static models: cost and score (%)", baselines.static_table(points)]
    with replacing(folder / "frontier.md") as file:
        file.write("\n\n".join(tables) + "\n")
    print("\n\n".join(tables) + "\n")
    curves = {name: [lines.curve(name)[::-1]] for name in lines.scores}
    draw_comparison(comparison.GRID, curves, folder / "comparison", points)
    return folder / "frontier.md"


if __name__ == "__main__":
    cli.run(main)
