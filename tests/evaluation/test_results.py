"""The original's npy files, their CSV twins, and the figures drawn from them."""

import numpy as np
import pytest

from deebert.evaluation import plotting, results
from deebert.evaluation.results import SweepRow, read_each_layer, read_sweep, result_dir, sweep_table
from deebert.utils.cli import InputError

ROWS = [
    SweepRow(0.0, 0.875, 0.0, 1.0, (0, 0, 8), 2.0, 2.1, 0.05, 0.01, 0),
    SweepRow(0.1, 0.75, -0.125, 2 / 3, (2, 4, 2), 1.5, 2.1, 0.29, 0.02, 1),
    SweepRow(1e-05, 0.75, -0.125, 0.5, (5, 2, 1)),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./saved_models/bert-base/MRPC/two_stage", "plots/saved_models/bert-base/MRPC/two_stage"),
        ("bert-base-uncased", "plots/bert-base-uncased"),
        ("/home/me/model/", "plots/home/me/model"),
        ("../elsewhere/../model", "plots/elsewhere/model"),
    ],
)
def test_results_never_leave_their_folder(name, expected):
    assert result_dir("plots", name).as_posix() == expected
    assert result_dir("plots", name, "-MM").as_posix() == expected + "-MM"


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_model_path_without_a_name_is_refused(name):
    with pytest.raises(InputError, match="give the folder's name"):
        result_dir("plots", name)


def test_each_layer_files(tmp_path):
    scores = [{"f1": 0.5, "acc": 0.25}, {"f1": 0.75, "acc": 1.0}]
    results.write_each_layer(tmp_path, scores)
    array = np.load(tmp_path / "each_layer.npy")  # a float array: no pickle needed
    assert array.dtype == np.float64
    assert array.tolist() == [0.5, 0.75]
    assert (tmp_path / "each_layer.csv").read_text() == "layer,f1,acc\n1,0.5,0.25\n2,0.75,1.0\n"
    assert read_each_layer(tmp_path) == ("f1", [0.5, 0.75])


def test_entropy_files_are_the_originals(tmp_path):
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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    results.write_sweep(tmp_path, ROWS)
    before = (tmp_path / "entropy_sweep.csv").read_bytes()
    with pytest.raises(AttributeError):
        results.write_sweep(tmp_path, [*ROWS, None])
    assert (tmp_path / "entropy_sweep.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_results_are_told(tmp_path):
    with pytest.raises(InputError, match=r"entropy_sweep.csv: no such file"):
        read_sweep(tmp_path)
    (tmp_path / "entropy_sweep.csv").write_text("threshold,score\n0.1,0.2\n")
    with pytest.raises(InputError, match="not a sweep of this version"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="no results there"):
        plotting.read_series([tmp_path / "none"])


def test_the_table_shows_per_cent_and_leaves_out_what_is_not_measured():
    lines = sweep_table(ROWS).splitlines()
    assert lines[3] == "| 0.1 | 75.00 | -12.50 | 66.7 | 1.50 | 29.0 |"
    assert lines[4].endswith("| 50.0 | - | - |")


def test_the_summary_names_the_largest_saving_within_the_drop():
    assert "threshold 0 saves 0.0 % of the layers and 5.0 % of the time; the score changes by +0.00" in results.summary(
        ROWS
    )
    assert "threshold 1e-05 saves 50.0 % of the layers; the score changes by -12.50" in results.summary(ROWS, 0.125)
    assert results.summary(ROWS[1:]) == "No threshold keeps the score within 0.5 points of the full model's."


def write_results(folder, rows=ROWS[:2], curve=True, layers=True):
    if layers:
        results.write_each_layer(folder, [{"acc": 0.5}, {"acc": 0.7}, {"acc": 0.875}])
    if rows:
        results.write_sweep(folder, rows)
    if curve:
        results.write_sweep(folder, ROWS, results.CURVE)
    return folder


def test_figures_of_one_and_of_two_folders(tmp_path):
    folders = [
        write_results(tmp_path / "bert-base/MRPC/two_stage"),
        write_results(tmp_path / "bert-base/RTE/two_stage"),
    ]
    names = {"score_by_saving", "score_by_layer", "exits_by_threshold", "expected_and_measured_saving"}
    for i, chosen in enumerate((folders[:1], folders)):
        series = plotting.read_series(chosen)
        written = plotting.draw(series, tmp_path / f"figures{i}")
        assert {path.stem for path in written} == names
        assert {path.suffix for path in written} == {".png", ".pdf"}
        assert all(path.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for path in written)
    assert [s.label for s in series] == ["MRPC", "RTE"]


def test_the_figures_show_the_numbers(tmp_path):
    (series,) = plotting.read_series([write_results(tmp_path / "model")])
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


def test_only_what_there_is_data_for_is_drawn(tmp_path):
    untimed = write_results(tmp_path / "a", rows=ROWS[2:], curve=False, layers=False)
    layers = write_results(tmp_path / "b", rows=(), curve=False)
    assert {p.stem for p in plotting.draw(plotting.read_series([untimed]), tmp_path)} == {
        "score_by_saving",
        "exits_by_threshold",
    }
    assert {p.stem for p in plotting.draw(plotting.read_series([layers]), tmp_path)} == {"score_by_layer"}
