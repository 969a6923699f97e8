"""`deebert download` with a stand-in for the package that reads the hub: the files that it writes are read back."""

import sys
from types import SimpleNamespace

import pytest
from predict_glue import read_indices

from deebert.commands import download
from deebert.data.tasks import TASKS, Example
from deebert.utils import cli
from deebert.utils.errors import InputError
from deebert.utils.files import replacing

WORDS = ("entailment", "neutral", "contradiction")
HUB = {  # of each task on the hub: the names of its labels, a row, and the texts and the label that are read back
    "mrpc": (["not_equivalent", "equivalent"], {"sentence1": "A\tb", "sentence2": "C\n d", "label": 1}),
    "cola": (["unacceptable", "acceptable"], {"sentence": "A  b", "label": 0}),
    "sst2": (["negative", "positive"], {"sentence": "A", "label": 1}),
    "stsb": (None, {"sentence1": "A", "sentence2": "B", "label": 3.5}),
    "qqp": (["not_duplicate", "duplicate"], {"question1": "A", "question2": "B", "label": 1}),
    "qnli": (["entailment", "not_entailment"], {"question": "A", "sentence": "B", "label": 1}),
    "rte": (["entailment", "not_entailment"], {"sentence1": "A", "sentence2": "B", "label": 0}),
    "wnli": (["not_entailment", "entailment"], {"sentence1": "A", "sentence2": "B", "label": 1}),
    "mnli": (WORDS, {"premise": "A", "hypothesis": "B", "label": 2}),
    "ax": (WORDS, {"premise": "A", "hypothesis": "B", "label": -1}),
}
READ_BACK = {
    "MRPC": ("A b", "C d", 1),
    "CoLA": ("A b", 0),
    "SST-2": ("A", 1),
    "STS-B": ("A", "B", 3.5),
    "QQP": ("A", "B", 1),
    "QNLI": ("A", "B", 1),
    "RTE": ("A", "B", 0),
    "WNLI": ("A", "B", 1),
    "MNLI": ("A", "B", 0),
}


class Split(list):
    """Rows of a hub dataset with the names of its label classes. They are read late, and may be damaged."""

    damaged = False

    def __init__(self, names, rows):
        super().__init__(rows)
        self.features = {"label": SimpleNamespace(names=names)}

    def __iter__(self):
        if self.damaged:
            raise OSError("a damaged cache")
        return super().__iter__()


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Runs the command on a hub that lacks the tasks of `broken`."""

    def run(*names: str, broken: tuple[str, ...] = ()) -> None:
        def load_dataset(repository, name):
            assert repository == "nyu-mll/glue"
            if name in broken:
                raise ConnectionError("no route\nto host")
            labels, row = HUB[name]
            splits = {hub for task in TASKS.values() for _, hub in task.splits}
            rows = {s: [row | {"idx": i, "label": -1} if s.startswith("test") else row for i in (0, 1)] for s in splits}
            return {s: Split(labels, rows[s]) for s in splits}

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        monkeypatch.setattr(sys, "argv", ["deebert download", *names, "--data_dir", str(tmp_path)])
        cli.run(download.main)

    return run


def check_files(folder, task: str) -> None:
    """What was written for a task is what its reader expects, for training, scoring and predicting."""
    *texts, label = READ_BACK[task]
    files = [(split, folder / task / f"{split}.tsv") for split, _ in TASKS[task].splits]
    for split, file in [*files, *([("diagnostic", folder / "diagnostic/diagnostic.tsv")] if task == "MNLI" else [])]:
        test = split.startswith(("test", "diagnostic"))
        expected = Example(tuple(texts), None if test else label)
        assert TASKS[task].read(folder / task, split) == [expected] * 2
        if test:
            assert file.read_text().startswith("index\t")
            assert read_indices(file) == [0, 1]


def test_all_tasks_are_written_as_they_are_read(fetch, tmp_path, capsys):
    fetch("all")
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in tmp_path.rglob("*.tsv"))
    for task in READ_BACK:
        check_files(tmp_path, task)


@pytest.mark.parametrize("names", [("mrpc", "QQP", "MRPC"), ("mnli-mm",)])
def test_tasks_by_name(fetch, tmp_path, names):
    fetch(*names)
    tasks = ["MNLI"] if "mnli-mm" in names else ["MRPC", "QQP"]
    assert {path.name for path in tmp_path.iterdir()} == {*tasks, *(["diagnostic"] if "MNLI" in tasks else [])}
    for task in tasks:
        check_files(tmp_path, task)


def test_one_that_fails_does_not_stop_the_others(fetch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fetch("CoLA", "RTE", "MNLI", "SST-2", broken=("rte", "ax"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: RTE: the hub cannot be reached, or has no such task: no route to host",
        "error: MNLI: the hub cannot be reached, or has no such task: no route to host",
        f"error: not fetched: RTE, MNLI; python -m deebert download RTE MNLI --data_dir {tmp_path} tries them again",
    ]
    check_files(tmp_path, "CoLA")
    check_files(tmp_path, "SST-2")
    assert not (tmp_path / "RTE").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["RTE"], "RTE: the hub cannot be reached, or has no such task: no route to host"),
        ([], "name the tasks to download: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, or all"),
        (["CoLA", "ratings"], "Ratings is not a GLUE task; scripts/sample_data.py makes an example of it"),
        (["CoLA", "IMDB"], "IMDB: no such GLUE task; choose one of CoLA, "),
    ],
)
def test_bad_input_gets_one_clear_line(fetch, tmp_path, capsys, names, message):
    with pytest.raises(SystemExit) as stop:
        fetch(*names, broken=("rte",))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_without_the_package_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "argv", ["deebert download", "all", "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.run(download.main)
    assert capsys.readouterr().err == "error: the download needs the package datasets: pip install datasets\n"


def test_rows_that_cannot_be_read_are_not_said_to_be_unwritable(fetch, monkeypatch, capsys):
    monkeypatch.setattr(Split, "damaged", True)
    with pytest.raises(SystemExit):
        fetch("RTE")
    assert "RTE: the hub cannot be reached, or has no such task: a damaged cache" in capsys.readouterr().err


def test_reading_another_file_while_writing_is_no_error_of_writing(tmp_path):
    with pytest.raises(InputError, match=r"other: cannot be read \(No such file"), replacing(tmp_path / "x") as file:
        file.write((tmp_path / "other").read_text())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_gets_one_line(fetch, tmp_path, capsys):
    (tmp_path / "RTE").write_text("a file")
    with pytest.raises(SystemExit):
        fetch("RTE")
    assert f"error: {tmp_path}/RTE/train.tsv: cannot be written" in capsys.readouterr().err
