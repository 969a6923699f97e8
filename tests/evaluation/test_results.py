"""The original's npy files, their CSV twins, and the figures drawn from them."""

import io
import math
import os
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.helpers import script

from deebert.evaluation import plotting, results
from deebert.evaluation.plotting import read_series
from deebert.evaluation.results import SweepRow, read_each_layer, read_sweep, result_dir
from deebert.evaluation.tables import class_table, summary, sweep_table
from deebert.utils import cli
from deebert.utils.errors import InputError

ROWS = [
    SweepRow(0.0, 0.875, 0.0, 1.0, {1: 0, 2: 0, 3: 8}, 2.0, 2.1, 0.05, 0.01, 0),
    SweepRow(0.1, 0.75, -0.125, 2 / 3, {1: 2, 2: 4, 3: 2}, 1.5, 2.1, 0.29, 0.02, 1),
    SweepRow(1e-05, 0.75, -0.125, 0.5, {1: 5, 2: 2, 3: 1}),
]


COSTED = [replace(row, cost=cost) for row, cost in zip(ROWS, (1.0, 0.7, 0.75), strict=True)]


def error_of_plot(folder, monkeypatch, capsys) -> str:
    """What `deebert plot` says on stderr about a folder with a damaged file."""
    from deebert.__main__ import main

    monkeypatch.setattr("sys.argv", ["deebert", "plot", str(folder), "--output_dir", str(folder / "figures")])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./saved_models/bert-base/MRPC/two_stage", "plots/saved_models/bert-base/MRPC/two_stage"),
        ("bert-base-uncased", "plots/bert-base-uncased"),
        ("/home/me/model/", "plots/home/me/model"),
        ("../elsewhere/../model", "plots/elsewhere/model"),
    ],
)
def test_result_dir_stays_inside_plot_data_dir(name, expected):
    assert result_dir("plots", name).as_posix() == expected
    assert result_dir("plots", name, "-MM").as_posix() == expected + "-MM"


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_model_path_without_a_name_is_refused(name):
    with pytest.raises(InputError, match="give the name of the model's folder"):
        result_dir("plots", name)


def test_each_layer_files(tmp_path):
    scores = {1: {"f1": 0.5, "acc": 0.25}, 2: {"f1": 0.75, "acc": 1.0}}
    results.write_each_layer(tmp_path, scores)
    array = np.load(tmp_path / "each_layer.npy")  # a float array: no pickle needed
    assert array.dtype == np.float64
    assert array.tolist() == [0.5, 0.75]
    assert (tmp_path / "each_layer.csv").read_text() == "layer,f1,acc\n1,0.5,0.25\n2,0.75,1.0\n"
    assert read_each_layer(tmp_path) == ("f1", {1: 0.5, 2: 0.75})


def test_entropy_files_have_the_original_format(tmp_path):
    """Read as plotting code written for the original reads them."""
    for row in ROWS:
        results.write_entropy(tmp_path, row)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "entropy_0.0.npy",
        "entropy_0.1.npy",
        "entropy_1e-05.npy",
    ]
    exits, seconds, layers_run, score = np.load(tmp_path / "entropy_0.1.npy", allow_pickle=True)
    assert exits == {1: 2, 2: 4, 3: 2}
    assert (seconds, layers_run, score) == (1.5, 2 / 3, 0.75)


def test_sweep_csv_reads_back(tmp_path):
    results.write_sweep(tmp_path, ROWS)
    assert read_sweep(tmp_path) == ROWS
    header, first, *_ = (tmp_path / "entropy_sweep.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), first.split(","), strict=True))
    assert (cells["threshold"], cells["layers_saved"], cells["exits_3"]) == ("0.0", "0.0", "8")
    assert [path.name for path in tmp_path.iterdir()] == ["entropy_sweep.csv"]


def test_failed_write_keeps_the_old_file(tmp_path):
    results.write_sweep(tmp_path, ROWS)
    before = (tmp_path / "entropy_sweep.csv").read_bytes()
    with pytest.raises(TypeError):
        results.write_sweep(tmp_path, [*ROWS, None])
    assert (tmp_path / "entropy_sweep.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_and_foreign_files_get_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"entropy_sweep.csv: no such file"):
        read_sweep(tmp_path)
    (tmp_path / "entropy_sweep.csv").write_text("threshold,score\n0.1,0.2\n")
    with pytest.raises(InputError, match=r"entropy_sweep.csv: not a result file"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="no results there"):
        read_series([tmp_path / "none"])


SWEEP_LINES = ["threshold,score,score_change,layers_run,seconds,full_seconds,time_saved,time_saved_spread,other_exits"]
SWEEP_LINES += ["0.1,0.8,-0.01,0.6,1,2,0.5,0.01,0"]
EXITS = [",exits_1,exits_2", ",5,5"]


@pytest.mark.parametrize("name", ["each_layer.csv", "entropy_sweep.csv", "entropy_curve.csv"])
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b" ", b"\0" * 99, bytes(range(256)), b"x" * 500, b'"' + b"x" * 200_000, b"a\n1\n", b"a,b\n1\n"),
        *(b"layer,acc\n1,x\n", b"layer,acc\n1,nan\n", b"layer,acc\n1,1e400\n", b"layer,acc\n0.5,1\n"),
        *(
            "\n".join(map("".join, zip(SWEEP_LINES, EXITS, strict=True))).replace(*change).encode()
            for change in (
                (",5,5", ",0,0"),
                (",5,5", ",-5,5"),
                (",5,5", ",5"),
                (",5,5", ",5,half"),
                ("0.8", "nan"),
                ("0.8", "inf"),
                ("0.8", ""),
                ("0.1,", ","),
                (",5,5", ",5," + "9" * 5000),
            )
        ),
    ],
    ids=lambda content: repr(content[-24:]),
)
@pytest.mark.hostile("CSV of results", "one line")
def test_damaged_tables_get_one_line(tmp_path, name, content, monkeypatch, capsys):
    results.write_each_layer(tmp_path, {1: {"acc": 0.5}, 2: {"acc": 0.75}})
    results.write_sweep(tmp_path, ROWS)
    (tmp_path / name).write_bytes(content)
    message = error_of_plot(tmp_path, monkeypatch, capsys)
    assert message.startswith(f"error: {tmp_path / name}: ")
    assert message.count("\n") == 1
    assert len(message) < 500 + len(str(tmp_path))
    assert not (tmp_path / "figures").exists()


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    results.write_sweep(tmp_path, ROWS)
    expected = read_sweep(tmp_path)
    table = (tmp_path / "entropy_sweep.csv").read_bytes()
    (tmp_path / "entropy_sweep.csv").write_bytes(b"\xef\xbb\xbf" + table.replace(b"\n", b"\r\n"))
    assert read_sweep(tmp_path) == expected


def test_table_shows_per_cent_and_a_dash_for_missing_times():
    lines = sweep_table(ROWS).splitlines()
    assert lines[3] == "| 0.1 | 75.00 | -12.50 | 66.7 | - | 1.50 | 29.0 |"
    assert lines[4].endswith("| 50.0 | - | - | - |")


def test_labels_are_no_formulas_and_no_orders_to_a_terminal(tmp_path):
    rows = classes({"=1+1": (0.5, math.nan), "\x1b[31mred": (0.25, math.nan), "-1": (0.25, math.nan)})
    results.write_classes(tmp_path, rows)
    lines = (tmp_path / "classes.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["label", "'=1+1", "\x1b[31mred", "-1"]
    assert "| \\x1b[31mred | 2 | 25.0 | 25.0 | 25.0 |\n" in class_table(rows, tmp_path)


def classes(f1: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Classes of two texts, whose precision and recall are their F1 of the full model and with early exit."""
    columns = {"label": list(f1), "texts": 2}
    for i, at in enumerate(("full", "early")):
        columns |= {f"{name}_{at}": [each[i] for each in f1.values()] for name in ("precision", "recall", "f1")}
    return pd.DataFrame(columns)


def test_the_table_of_classes_has_those_that_change_most(tmp_path):
    nan = math.nan
    rows = classes({"same": (0.9, 0.9), "worse": (0.8, 0.7), "better": (0.3, 0.5), "never": (nan, nan)})
    rows.loc[3, "texts"] = 0
    _, _, *lines, last = class_table(rows, tmp_path, most=2).splitlines()
    assert lines == [
        "| better | 2 | 30.0 -> 50.0 | 30.0 -> 50.0 | 30.0 -> 50.0 | +20.0 |",
        "| worse | 2 | 80.0 -> 70.0 | 80.0 -> 70.0 | 80.0 -> 70.0 | -10.0 |",
        "| macro average | 6 | 66.7 -> 70.0 | 66.7 -> 70.0 | 66.7 -> 70.0 | +3.3 |",
    ]
    assert last == f"left out, classes whose F1 changes less: 1; all are in {tmp_path / 'classes.csv'}"
    lines = class_table(classes({"high": (0.9, nan), "low": (0.2, nan)}), tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| low", "| high"]
    assert lines[-1] == f"these numbers are in {tmp_path / 'classes.csv'}"


def test_summary_names_the_largest_saving_within_the_drop():
    assert "threshold 0 saves 0.0 % of the layers, 5.0 % of the time; the score changes by +0.00" in summary(ROWS)
    assert "threshold 1e-05 saves 50.0 % of the layers; the score changes by -12.50" in summary(ROWS, 0.125)
    assert summary(ROWS[1:]) == "No threshold is known to keep the score within 1 point of the full model's."


def test_summary_names_a_faster_threshold_only_where_there_is_one():
    assert "+0.00 points, and no faster one of these thresholds stays within 1 point." in summary(ROWS)
    assert summary(ROWS[:1]).endswith("the score changes by +0.00 points.")


def test_summary_ranks_by_cost_where_it_is_known():
    assert sweep_table(COSTED).splitlines()[3] == "| 0.1 | 75.00 | -12.50 | 66.7 | 70.0 | 1.50 | 29.0 |"
    expected = "threshold 0.1 saves 30.0 % of the cost and 33.3 % of the layers, 29.0 % of the time; "
    assert expected in summary(COSTED, 0.125)


def test_cost_reads_back(tmp_path):
    results.write_sweep(tmp_path, COSTED)
    assert read_sweep(tmp_path) == COSTED
    lines = [line.split(",") for line in (tmp_path / "entropy_sweep.csv").read_text().splitlines()]
    cells = dict(zip(lines[0], lines[2], strict=True))
    assert (float(cells["cost"]), float(cells["cost_saved"])) == (0.7, pytest.approx(0.3))


def write_results(folder, rows=ROWS[:2], curve=ROWS, layers=True):
    if layers:
        results.write_each_layer(folder, {1: {"acc": 0.5}, 2: {"acc": 0.7}, 3: {"acc": 0.875}})
    if rows:
        results.write_sweep(folder, rows)
    if curve:
        results.write_sweep(folder, curve, results.CURVE)
    return folder


def test_figures_of_two_folders(tmp_path):
    series = read_series([write_results(tmp_path / f"bert-base/{task}/two_stage") for task in ("MRPC", "RTE")])
    assert [s.label for s in series] == ["MRPC", "RTE"]
    written = plotting.draw(series, tmp_path / "figures")
    assert {path.stem for path in written} == {
        "score_by_saving",
        "score_by_layer",
        "exits_by_threshold",
        "expected_and_measured_saving",
    }
    assert {path.suffix for path in written} == {".png", ".pdf"}
    assert all(path.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for path in written)


def test_figures_show_the_numbers(tmp_path):
    (series,) = read_series([write_results(tmp_path / "model")])
    by_layers, by_time = plotting.plot_tradeoff([series]).axes
    np.testing.assert_allclose(by_layers.lines[1].get_xydata(), [[0, 87.5], [100 / 3, 75]])
    np.testing.assert_allclose(by_time.lines[0].get_xydata(), [[5, 87.5], [29, 75]])
    (layers,) = plotting.plot_layers([series]).axes
    assert layers.lines[0].get_ydata().tolist() == [50, 70, 87.5]
    (exits,) = plotting.plot_exits([series]).axes
    assert [bar.get_height() for bar in exits.patches] == [0, 25, 0, 50, 100, 25]
    (savings,) = plotting.plot_savings([series]).axes
    for axes, expected in (
        (by_layers, [(0, 87.5), (100 / 3, 75)]),
        (by_time, [(5, 87.5), (29, 75)]),
        (savings, [(0, 5), (100 / 3, 29)]),
    ):
        np.testing.assert_allclose([text.xy for text in axes.texts], expected)
    for figure in (plotting.plot_tradeoff, plotting.plot_layers, plotting.plot_exits, plotting.plot_savings):
        for axes in figure([series]).axes:
            assert "%" in axes.get_xlabel() + axes.get_ylabel()


def test_figures_show_the_cost_where_every_file_holds_it(tmp_path):
    costed = write_results(tmp_path / "new", rows=COSTED[:2], curve=COSTED)
    older = write_results(tmp_path / "old")
    layers = [0, 100 / 3]
    for folders, unit, expected in (
        ([costed], "cost saved (%)", [0, 30]),
        ([older], "layers saved (%)", layers),
        ([costed, older], "layers saved (%)", layers),
    ):
        series = read_series(folders)
        by_cost, _ = plotting.plot_tradeoff(series).axes
        (savings,) = plotting.plot_savings(series).axes
        assert by_cost.get_xlabel() == savings.get_xlabel() == f"expected: {unit}"
        np.testing.assert_allclose(by_cost.lines[1].get_xdata(), expected)
        np.testing.assert_allclose(np.array(savings.containers[0].lines[0].get_xdata(), float), expected)
        assert savings.lines[0].get_label() == f"time saved = {unit.split()[0]} saved"
    (exact,) = plotting.plot_savings(read_series([costed])).axes
    np.testing.assert_allclose([text.xy for text in exact.texts], [(0, 5), (30, 29)])


def test_only_figures_with_data_are_drawn(tmp_path, figures_not_drawn):
    untimed = write_results(tmp_path / "a", rows=ROWS[2:], curve=(), layers=False)
    layers = write_results(tmp_path / "b", rows=(), curve=())
    assert {p.stem for p in plotting.draw(read_series([untimed]), tmp_path)} == {
        "score_by_saving",
        "exits_by_threshold",
    }
    assert {p.stem for p in plotting.draw(read_series([layers]), tmp_path)} == {"score_by_layer"}


LAYERS, SAMPLES = 12, 408
ORIGINAL_THRESHOLDS = [i / 10 for i in range(8)]


def original_row(threshold: float) -> list:
    """[{layer: samples}, seconds, layers run, score]: at threshold t a share t of the samples exits after layer 6."""
    early = round(threshold * SAMPLES)
    exits = dict.fromkeys(range(1, LAYERS + 1), 0) | {6: early, 12: SAMPLES - early}
    share = (6 * early + 12 * (SAMPLES - early)) / (12 * SAMPLES)
    return [exits, 20.0 * share, share, np.float64(0.875 - threshold / 10)]


def write_original(folder, protocol=4, layers=True, thresholds=ORIGINAL_THRESHOLDS):
    """The npy files of the original: np.save used pickle protocol 2 or 3, and numpy's old module names, at its time."""
    folder.mkdir(parents=True, exist_ok=True)
    if layers:
        np.save(folder / "each_layer.npy", np.linspace(0.6, 0.875, LAYERS))
    for threshold in thresholds:
        write_npy(folder / f"entropy_{threshold}.npy", np.array(original_row(threshold), dtype=object), protocol)
    return folder


def write_npy(path, content, protocol=4):
    """What np.save writes for an object array, with any content in place of the array."""
    with path.open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (4,)}
        np.lib.format.write_array_header_1_0(file, header)
        written = io.BytesIO()
        pickle.dump(content, written, protocol=protocol)
        file.write(written.getvalue())
    if protocol < 4:  # text lengths are not stored in such old pickles' global names
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_original_npy_files_are_read(tmp_path, protocol):
    write_original(tmp_path, protocol)
    raw = (tmp_path / "entropy_0.3.npy").read_bytes()
    assert (b"numpy.core." in raw) == (protocol < 4)
    assert results.read_each_layer(tmp_path) == (
        "",
        pytest.approx(dict(enumerate(np.linspace(0.6, 0.875, LAYERS).tolist(), 1))),
    )
    rows = read_sweep(tmp_path)
    assert [row.threshold for row in rows] == ORIGINAL_THRESHOLDS
    for row in rows:
        exits, seconds, layers_run, score = original_row(row.threshold)
        assert row.exits == exits
        assert (row.seconds, row.layers_run, row.score) == (seconds, layers_run, score)
        assert row.score_change == pytest.approx(-row.threshold / 10)
        assert row.time_saved == pytest.approx(1 - layers_run)  # against threshold 0
        assert (row.time_saved_spread, row.full_seconds) == (None, None)
    assert "saves 2" in summary(rows, drop=0.0501)


def test_numpy_integers_as_layers_and_counts_are_read(tmp_path):
    counts = {np.int64(1): np.int32(3), np.int64(2): np.uint8(5)}
    write_npy(tmp_path / "entropy_0.5.npy", np.array([counts, None, 0.8, np.float32(0.5)], dtype=object))
    np.save(tmp_path / "each_layer.npy", np.array([0.25, 0.75], np.float32))
    assert read_sweep(tmp_path) == [SweepRow(0.5, 0.5, -0.25, 0.8, {1: 3, 2: 5})]


def test_our_npy_files_read_like_their_csv(tmp_path):
    for row in ROWS:
        results.write_entropy(tmp_path, row)
    by_threshold = sorted(ROWS, key=lambda row: row.threshold)
    for row, written in zip(read_sweep(tmp_path), by_threshold, strict=True):
        assert (row.threshold, row.score, row.score_change) == (written.threshold, written.score, written.score_change)
        assert (row.exits, row.seconds, row.layers_run) == (written.exits, written.seconds, written.layers_run)
    results.write_sweep(tmp_path, ROWS)
    assert read_sweep(tmp_path) == ROWS  # the CSV holds more, and comes first


def test_npy_files_without_a_full_model_have_no_change_and_no_saved_time(tmp_path, figures_not_drawn):
    write_original(tmp_path, layers=False, thresholds=[0.1, 0.2])
    rows = read_sweep(tmp_path)
    assert {(row.score_change, row.time_saved) for row in rows} == {(None, None)}
    assert sweep_table(rows).splitlines()[2] == "| 0.1 | 86.50 | - | 95.0 | - | 19.00 | - |"
    assert summary(rows).startswith("No threshold is known")
    written = plotting.draw(read_series([tmp_path]), tmp_path / "figures")
    assert {path.stem for path in written} == {"score_by_saving", "exits_by_threshold"}


def test_figures_from_npy_files_only(tmp_path, figures_not_drawn):
    folder = write_original(tmp_path / "MRPC/two_stage")
    written = plotting.draw(read_series([folder]), tmp_path / "figures")
    assert len(written) == 8
    (series,) = read_series([folder])
    by_layers, by_time = plotting.plot_tradeoff([series]).axes
    scores = [100 * (0.875 - t / 10) for t in ORIGINAL_THRESHOLDS]
    np.testing.assert_allclose(by_layers.lines[1].get_ydata(), scores)
    np.testing.assert_allclose(by_time.lines[0].get_xdata(), by_layers.lines[1].get_xdata(), atol=1e-9)
    assert by_time.get_xlabel() == "time saved (%, measured; npy files: against threshold 0)"
    assert len(plotting.plot_exits([series]).axes[0].patches) == LAYERS * len(ORIGINAL_THRESHOLDS)


def test_plot_script_draws_folders_with_and_without_arguments(tmp_path):
    """A stand-in for Python prints its arguments; tests/scripts draws with the true one."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
    (tmp_path / "python").chmod(0o755)
    folders = [write_original(tmp_path / f"results/saved_models/{name}") for name in ("MRPC", "RTE")]
    for arguments, expected in (
        ([], [f"--output_dir {folder} {folder}" for folder in folders]),
        (folders, [f"--output_dir ./results//figures {folders[0]} {folders[1]}"]),
    ):
        done = script("plot_results.sh", tmp_path, *map(str, arguments), PYTHON=str(tmp_path / "python"))
        lines = done.stdout.replace(" ./results//saved_models", f" {tmp_path}/results/saved_models").splitlines()
        assert lines == [f"-m deebert plot {line}" for line in expected]


class CallsSystem:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def damaged(path, kind: str) -> None:
    """Makes a result file something else."""
    content = path.read_bytes()
    if kind == "system":
        write_npy(path, CallsSystem(path.with_name("executed")))
    elif kind == "system inside":
        items = [*original_row(0.1)[:3], CallsSystem(path.with_name("executed"))]
        write_npy(path, np.array(items, dtype=object))
    elif kind == "numpy function":
        write_npy(path, np.array([np.fromfile, 1, 1, 1], dtype=object))
    elif kind == "dictionary":
        write_npy(path, {"a": 1})
    elif kind == "other items":
        write_npy(path, np.array([{1: 1}, "x", 1.0, 1.0], dtype=object))
    elif kind == "a layer is missing":
        write_npy(path, np.array([{1: 1, 3: 2}, 1.0, 1.0, 1.0], dtype=object))
    elif kind == "nan":
        write_npy(path, np.array([{1: 1}, 1.0, 1.0, math.nan], dtype=object))
    else:
        path.write_bytes(
            {"truncated": content[:-40], "header only": content[:128], "garbage": b"x" * 500, "empty": b""}[kind]
        )


KINDS = ["system", "system inside", "numpy function", "dictionary", "other items", "a layer is missing", "nan"]


@pytest.mark.parametrize("kind", [*KINDS, "truncated", "header only", "garbage", "empty"])
@pytest.mark.hostile("npy of results", "one line")
def test_damaged_and_malicious_npy_files_get_one_line(tmp_path, kind, monkeypatch, capsys):
    write_original(tmp_path)
    damaged(tmp_path / "entropy_0.1.npy", kind)
    message = error_of_plot(tmp_path, monkeypatch, capsys)
    assert message.startswith(f"error: {tmp_path / 'entropy_0.1.npy'}: not a result file (")
    assert message.endswith("remove it, or run scripts/eval_deebert.sh and scripts/entropy_eval.sh again\n")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "figures").exists()
    if kind.startswith("system"):
        assert "posix.system" in message


@pytest.mark.parametrize("content", [b"", b"x" * 200, "objects", "text", "pickle"])
@pytest.mark.hostile("npy of results", "one line")
def test_damaged_each_layer_files_get_an_input_error(tmp_path, content):
    path = tmp_path / "each_layer.npy"
    if content == "objects":
        np.save(path, np.array([{}], dtype=object))
    elif content == "text":
        np.save(path, np.array(["a"]))
    elif content == "pickle":
        path.write_bytes(pickle.dumps(CallsSystem(tmp_path / "executed")))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"each_layer.npy: not a result file"):
        read_series([tmp_path])
    assert not (tmp_path / "executed").exists()


def test_models_of_different_depth_are_refused(tmp_path):
    write_original(tmp_path)
    write_npy(tmp_path / "entropy_0.5.npy", np.array([{1: 5, 2: 3}, 1.0, 0.5, 0.5], dtype=object))
    with pytest.raises(InputError, match="different depth"):
        read_sweep(tmp_path)
