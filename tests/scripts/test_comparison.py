"""Comparing settings: the numbers of the table, and resuming an interrupted comparison."""

import csv
import json
import re
from dataclasses import replace

import compare
import comparison
import numpy as np
import pytest
import static_models
from compare import OURS, for_each_depth, read_settings
from comparison import DROPS, GRID, Outcome, table
from support.helpers import ROOT, simulated, started_by, with_costs

import run_glue_deebert
from deebert.data.tasks import TASKS
from deebert.evaluation.all_exits import AllExits
from deebert.experiment.arguments import parse_args
from deebert.utils import cli

SST2 = TASKS["SST-2"]


def test_savings_are_the_largest_at_each_drop():
    exits = with_costs(simulated(300, 0))
    result = Outcome.of(SST2, exits)
    full = (exits.logits[:, -1].argmax(-1) == exits.labels).mean()
    assert result.exits[5] == full
    tried = []
    for threshold in np.linspace(0, 0.7, 2000):
        layers = exits.exit_layers(threshold)
        tried.append((1 - exits.cost(layers, threshold), (exits.logits_at(layers).argmax(-1) == exits.labels).mean()))
    for drop, saved in zip(DROPS, result.saved, strict=True):
        assert saved == pytest.approx(max(s for s, score in tried if score >= full - drop - 1e-9), abs=0.02)
    for share, best in zip(GRID, result.curve, strict=True):
        scores = [score for s, score in tried if s >= share]
        assert np.isnan(best) if not scores else best == pytest.approx(max(scores), abs=0.01)


def test_table_has_means_and_deviations():
    outcomes = [Outcome.of(SST2, simulated(300, seed)) for seed in (0, 1)]
    line = table({"mine": outcomes}).splitlines()[2]
    final = [100 * o.exits[5] for o in outcomes]
    assert line.startswith(f"| mine | {np.mean(final):.1f} ± {abs(final[0] - final[1]) / np.sqrt(2):.1f} | ")
    assert "±" not in table({"mine": outcomes[:1]})


def test_an_exit_before_the_first_layer_has_a_column_of_its_own(tmp_path):
    plain, exits = Outcome.of(SST2, with_costs(simulated(100, 0))), with_costs(simulated(100, 0, layers=6))
    operations = {"layer_operations": exits.layer_operations[:, 1:], "off_ramp_operations": exits.off_ramp_operations}
    more = Outcome.of(SST2, replace(exits, first_layer=0, **operations))
    outcomes = {"without": [plain], "with": [more]}
    first, second = (line.split("|")[3].strip() for line in table(outcomes).splitlines()[2:4])
    assert (len(first.split()), second.split()[0], len(second.split())) == (4, "0:", 6)
    comparison.write_csv(tmp_path / "comparison.csv", outcomes, [1])
    without, with_it = csv.DictReader((tmp_path / "comparison.csv").open())
    assert (without["exit_0"], float(with_it["exit_0"])) == ("", more.exits[0])
    assert float(without["exit_5"]) == plain.exits[5]


def test_table_and_csv_show_the_savings(tmp_path):
    result = Outcome.of(SST2, with_costs(simulated(300, 0)))
    header, _, line = table({"mine": [result]}).splitlines()
    assert [name.strip() for name in header.split("|")][4:8] == [f"cost saved at {x}" for x in ("0", "0.5", "1", "2")]
    assert [cell.strip() for cell in line.split("|")][6] == f"{100 * result.saved[2]:.1f}"
    comparison.write_csv(tmp_path / "comparison.csv", {"mine": [result]}, [1])
    row = next(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert float(row["cost_saved_at_drop_0.01"]) == result.saved[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no settings in it"),
        ("# a\nmean --x\n", "line 2: no 'name: flags'"),
        ("a: --x\na:\n", "line 2: 'a' is there already"),
    ],
)
def test_bad_settings_files_are_refused(tmp_path, text, message):
    (tmp_path / "settings.txt").write_text(text)
    with pytest.raises(cli.InputError, match=message):
        read_settings(tmp_path / "settings.txt")


@pytest.mark.parametrize("name", ["compare_settings", "frontier_settings"])
def test_bundled_settings_are_valid(name):
    settings = for_each_depth(read_settings(ROOT / f"scripts/studies/{name}.txt"), 6)
    assert len(settings) >= 5
    required = [
        "--data_dir",
        "x",
        "--model_type",
        "bert",
        "--model_name_or_path",
        "x",
        "--task_name",
        "SST-2",
        "--output_dir",
        "x",
        "--do_train",
    ]
    for setting, flags in settings.items():
        ours, flags = OURS.parse_known_args(flags)
        args = parse_args([*required, *flags])
        own = parse_args(
            ["--train_file", "x.csv", "--do_train", "--model_name_or_path", "x", "--output_dir", "x", *flags]
        )
        if ours.layers:
            assert setting == f"{ours.pooling} {ours.layers}"
            continue
        assert args.model.off_ramps() == own.model.off_ramps(), setting  # with own data --recipe fast is the default
        assert args.stage_settings(1, 384) == own.stage_settings(1, 384), setting


def test_a_setting_for_each_depth():
    settings = {"mean": ["--a"], "static {k}": ["--layers", "{k}"]}
    expected = {"mean": ["--a"], "static 1": ["--layers", "1"], "static 2": ["--layers", "2"]}
    assert for_each_depth(settings, 2) == expected


def test_interrupted_comparison_resumes(tmp_path, tiny_data, tiny_checkpoints, figures_not_drawn, monkeypatch, capsys):
    (tmp_path / "settings.txt").write_text(
        "paper:\nsure: --exit_rule confidence\nmixed: --train_strategy mixed\nsmall: --layers 1\n"
    )
    trained, main, train_static = [], run_glue_deebert.main, static_models.train

    def interrupted(argv):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(argv)
        main(argv)

    def compare_all(*more: str):
        argv = (
            f"compare.py --settings {tmp_path}/settings.txt --seeds 1 2 --comparison_dir {tmp_path}/compared "
            f"--model_type bert --task_name SST-2 --data_dir {tiny_data}/SST-2 --no_cuda --max_seq_length 32 "
            f"--model_name_or_path {tiny_checkpoints['bert']} --num_train_epochs 1 --save_steps 0 --learning_rate 1e-3"
        )
        monkeypatch.setattr("sys.argv", [*argv.split(), *more])
        compare.main()

    monkeypatch.setattr(run_glue_deebert, "main", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_all()
    monkeypatch.setattr(run_glue_deebert, "main", lambda argv: (trained.append(argv), main(argv)))
    monkeypatch.setattr(static_models, "train", lambda *given: (trained.append(given), train_static(*given))[1])
    compare_all()
    assert len(trained) == 6  # two seeds of three trainings, none of them twice
    folder = tmp_path / "compared"
    assert not list(folder.glob("runs/*/*/model"))
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [(row["setting"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("paper", "sure", "mixed") for seed in "12"
    ]
    for row in rows[:4]:  # "sure", of the same training as "paper"
        exits = AllExits.load(folder / "runs/as_given" / f"seed{row['seed']}" / "all_exits.npz")
        expected = Outcome.of(SST2, replace(exits, rule={"paper": "entropy", "sure": "confidence"}[row["setting"]]))
        assert float(row["cost_saved_at_drop_0.01"]) == pytest.approx(expected.saved[2])
    assert {path.name for path in folder.glob("comparison.*")} == {
        f"comparison.{s}" for s in ("md", "csv", "png", "pdf")
    }
    before = [(folder / f"{name}.md").read_text() for name in ("comparison", "frontier")]
    names = {"paper", "sure", "mixed", "static models", "small"}
    assert {f"| {name} |" for name in names} <= set(re.findall(r"\| [^|]+ \|", before[1]))
    compare_all()
    assert len(trained) == 6
    assert [(folder / f"{name}.md").read_text() for name in ("comparison", "frontier")] == before
    with pytest.raises(cli.InputError, match="runs with other settings"):
        compare_all("--warmup_steps", "3")
    for flags in (["--exit_rule", "margin"], ["--seed=3"]):
        with pytest.raises(cli.InputError, match=r"in a setting's line|runs with other settings"):
            compare_all(*flags)


def test_a_setting_with_a_wrong_flag_gets_one_line(tmp_path, tiny_data, monkeypatch, capsys):
    (tmp_path / "settings.txt").write_text("mine: --highway_pooling last\n")
    argv = f"compare.py --settings {tmp_path}/settings.txt --seeds 1 --comparison_dir {tmp_path}/compared "
    argv += f"--model_type bert --model_name_or_path x --task_name SST-2 --data_dir {tiny_data}/SST-2"
    monkeypatch.setattr("sys.argv", argv.split())
    with pytest.raises(SystemExit) as error:
        cli.run(compare.main)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "invalid choice: 'last'" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("several", [False, True])
def test_own_data_are_compared(tmp_path, tiny_checkpoints, figures_not_drawn, monkeypatch, capsys, several):
    (tmp_path / "settings.txt").write_text("fast: --recipe fast\nplain:\n")
    labels = [["red"], ["green"], ["blue"]] * 12
    lines = [
        json.dumps({"text": f"{label[0]} text {i}", "label": label if several else label[0]})
        for i, label in enumerate(labels)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    argv = (
        f"compare.py --settings {tmp_path}/settings.txt --seeds 1 --comparison_dir {tmp_path}/compared --no_cuda "
        f"--train_file {tmp_path}/own.jsonl --validation_split 0.3 --model_name_or_path {tiny_checkpoints['bert']} "
        "--max_seq_length 16 --num_train_epochs 1 --save_steps 0"
    )
    monkeypatch.setattr("sys.argv", argv.split())
    compare.main()
    assert "| fast |" in (tmp_path / "compared/comparison.md").read_text()
    # a text with several labels has no predicted class that the baselines could compare
    assert (tmp_path / "compared/frontier.md").is_file() != several


def test_one_setting_with_several_seeds(tmp_path, tiny_data, tiny_checkpoints, figures_not_drawn, monkeypatch, capsys):
    settings = {"PATH_TO_DATA": str(tiny_data), "DATASET": "SST-2", "MODEL_NAME": str(tiny_checkpoints["bert"])}
    flags = "--max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 1 --no_cuda"
    started = started_by("studies/compare.sh", tmp_path, *flags.split(), SETTINGS="", SEEDS="3 4", **settings)
    assert started[0] == str(ROOT / "scripts/studies/compare.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", started)
    cli.run(compare.main)
    *_, row = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| as given |"))
    assert row.count("±") == 5
    assert {path.name for path in (tmp_path / "comparison/SST-2/runs/as_given").iterdir()} == {"seed3", "seed4"}
