"""The files for GLUE's server, line by line, against samples that run through the model one at a time."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import predict_glue
import pytest
import torch
from predict_glue import SIZES, STORED, as_words, write_zip
from support.data_of_glue import LABELS, TEST_FILES, texts_of, write_test_files
from support.helpers import snapshot_files
from support.tiny import tiny_model, tiny_tokenizer

from deebert.modeling.checkpoints import save_model, set_labels
from deebert.utils import cli

OTHER_ORDER = ("neutral", "contradiction", "entailment")  # of the MNLI model's outputs
STORED_THRESHOLD = [-1.0, 0.6, 0.6]
SEEDS = {
    1: 4,
    2: 16,
    3: 30,
}  # by the number of labels: random models that predict every label, and numbers from -1 to 7


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    return write_test_files(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, tuple]:
    """By the number of labels: a folder with a random model, and the model."""
    made = {}
    for labels in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"labels{labels}")
        model = tiny_model("bert", SEEDS[labels], num_labels=labels, initializer_range=0.4)
        if labels == 1:
            model.config.exit_rule = "patience"
        if labels == 2:
            model.set_exit_threshold(STORED_THRESHOLD)
        if labels == 3:
            set_labels(model.config, OTHER_ORDER)
        save_model(model, tiny_tokenizer("bert"), folder)
        made[labels] = folder, model
    return made


def drive(model: Path, data: Path, task: str, submissions: Path, *flags: str) -> None:
    given = ["--model", str(model), "--task_name", task, "--data_dir", str(data), "--submission_dir", str(submissions)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["predict_glue.py", *given, "--max_seq_length", "32", "--no_cuda", *flags])
        predict_glue.main()


def one_at_a_time(model, name: str, threshold: float | list[float]) -> np.ndarray:
    """The logits (S, C) of a test set's texts, each alone."""
    tokenizer, logits = tiny_tokenizer("bert"), []
    for texts in texts_of(name):
        batch = tokenizer(*texts, truncation="longest_first", max_length=32, return_tensors="pt")
        with torch.inference_mode():
            logits.append(model(**batch, exit_threshold=threshold).logits[0].numpy())
    return np.stack(logits)


def check_lines(lines: list[str], logits: np.ndarray, labels: tuple[str, ...]) -> None:
    """A file's lines against logits (S, C): the header, and for each index a label, or a number from 0 to 5."""
    header, *rows, end = lines
    assert (header, end) == ("index\tprediction", "")
    indices, words = zip(*(row.split("\t") for row in rows), strict=True)
    assert list(indices) == [str(index) for index in range(len(logits))]
    if labels:
        assert list(words) == [labels[i] for i in logits.argmax(-1)]
        return
    assert all(re.fullmatch(r"[0-5]\.\d{3}", word) for word in words)
    np.testing.assert_allclose([float(word) for word in words], np.clip(logits[:, 0], 0, 5), atol=6e-4)


@pytest.mark.parametrize("task", LABELS)
def test_every_tasks_submission_line_by_line(glue, models, tmp_path, capsys, task):
    folder, model = models[len(LABELS[task]) or 1]
    labels = OTHER_ORDER if task == "MNLI" else LABELS[task]
    given = [2.0, 1.0] if task == "STS-B" else [0.3, 0.6]
    rule = "patience" if task == "STS-B" else "entropy"
    drive(folder, glue / task, task, tmp_path, "--exit_threshold", "0", *map(str, given))
    names = [name for name, (file, *_) in TEST_FILES.items() if file.startswith(f"{task}/")]
    names += ["AX"] if task == "MNLI" else []
    wanted = {"full": -1.0, **{f"{rule}_{threshold}": threshold for threshold in given}}
    wanted = wanted if task in ("MNLI", "STS-B") else {"full": -1.0, STORED: STORED_THRESHOLD} | wanted
    contents, printed = {}, capsys.readouterr().out
    for submission, threshold in wanted.items():
        for name in names:
            lines = (tmp_path / submission / f"{name}.tsv").read_bytes().decode().split("\n")
            contents[submission, name] = lines
            check_lines(lines, one_at_a_time(model, name, threshold), labels)
        with zipfile.ZipFile(tmp_path / f"{submission}.zip") as packed:
            assert packed.namelist() == [f"{name}.tsv" for name in sorted(names, key=list(SIZES).index)]
            assert all(packed.read(f"{n}.tsv").decode().split("\n") == contents[submission, n] for n in names)
    assert len(snapshot_files(tmp_path)) == len(wanted) * (len(names) + 1)
    assert len({tuple(lines) for lines in contents.values()}) >= 3 * len(names)  # early exit changes predictions
    zips, missing = (f"{tmp_path / name}.zip" for name in wanted), (name for name in SIZES if name not in names)
    assert f"{', '.join(names)} in {', '.join(zips)}; GLUE's server also wants {', '.join(missing)}; not all" in printed
    assert f"; not all samples are in {', '.join(names)}\n" in printed
    for name in names:
        assert f"note: {name} has 12 samples here; GLUE's server wants predictions for {SIZES[name]:,}\n" in printed


def test_what_is_changed_and_saved_is_printed(glue, models, tmp_path, capsys):
    folder, model = models[2]
    drive(folder, glue / "RTE", "RTE", tmp_path, "--exit_threshold", "0.6")
    full, early = ((tmp_path / name / "RTE.tsv").read_text().split("\n") for name in ("full", "entropy_0.6"))
    changed = sum(line != other for line, other in zip(full, early, strict=True))
    tokenizer = tiny_tokenizer("bert")
    batches = [tokenizer(*texts, return_tensors="pt") for texts in texts_of("RTE")]
    layers = np.mean([model(**batch, exit_threshold=0.6).exit_layer.item() / 4 for batch in batches])
    printed = capsys.readouterr().out
    assert "full: 12 predictions for RTE\n" in printed
    assert (
        f"entropy_0.6: 12 predictions for RTE; {changed} changed, {100 * (1 - layers):.1f} % of the layers saved\n"
        in printed
    )


def test_tasks_share_a_folder_and_a_task_replaces_its_own_file(glue, models, tmp_path, capsys):
    folder, _ = models[2]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "full/SST-2.tsv").write_text("index\tprediction\n0\told\n")
    for task in ("WNLI", "SST-2", "CoLA"):
        drive(folder, glue / task, task, tmp_path)
    with zipfile.ZipFile(tmp_path / "full.zip") as packed:
        assert packed.namelist() == ["CoLA.tsv", "SST-2.tsv", "WNLI.tsv"]
        assert "old" not in packed.read("SST-2.tsv").decode()
    printed = capsys.readouterr().out
    assert f"CoLA, SST-2, WNLI in {tmp_path / 'full.zip'}, " in printed


def test_a_zip_of_all_is_the_same_whenever_it_is_packed(tmp_path):
    (tmp_path / "full").mkdir()
    for name in SIZES:
        (tmp_path / f"full/{name}.tsv").write_text(f"index\tprediction\n0\t{name}\n")
    packed = []
    for seconds in (1e9, 1.5e9):
        os.utime(tmp_path / "full/RTE.tsv", (seconds, seconds))
        assert list(write_zip(tmp_path / "full")) == list(SIZES) == list({**dict.fromkeys(SIZES), **TEST_FILES})
        packed.append((tmp_path / "full.zip").read_bytes())
    assert packed[0] == packed[1]
    assert {path.name for path in tmp_path.iterdir()} == {"full", "full.zip"}


def test_numbers_are_between_0_and_5_with_three_decimals():
    logits = np.array([[-0.2], [-0.0], [-1e-9], [2.34567], [5.0004], [np.float32(7)]])
    assert as_words(logits, ()) == ["0.000", "0.000", "0.000", "2.346", "5.000", "5.000"]


def test_mnli_without_the_diagnostic_set(glue, models, tmp_path, capsys):
    (tmp_path / "MNLI").symlink_to(glue / "MNLI")
    drive(models[3][0], tmp_path / "MNLI", "MNLI", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "note: no predictions for AX: there is no diagnostic.tsv in " in printed
    assert f"MNLI-m, MNLI-mm in {tmp_path / 'out/full.zip'}; GLUE's server also wants CoLA, " in printed


def test_the_indices_are_those_of_the_file(models, tmp_path):
    """Short rows of QQP and blank lines do not move them; without such a column lines count from 0."""
    rows = ["id\tquestion1\tquestion2", "7\ta film\tgood", "3\tthe plot", "", "12\tso\tbad"]
    (tmp_path / "test.tsv").write_text("\r\n".join(rows) + "\r\n")
    drive(models[2][0], tmp_path, "QQP", tmp_path / "out")
    lines = (tmp_path / "out/full/QQP.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "7", "3", "12"]
    (tmp_path / "test.tsv").write_text("question1\tquestion2\na film\tgood\nthe\tplot\n")
    drive(models[2][0], tmp_path, "QQP", tmp_path / "out")
    lines = (tmp_path / "out/full/QQP.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1"]


@pytest.mark.parametrize(
    ("task", "text", "flags", "message"),
    [
        ("RTE", None, "", "test.tsv: no such file; this folder should hold"),
        ("RTE", "index\tsentence1\n0\tx\n", "", "test.tsv, line 1: no column 'sentence2'"),
        ("RTE", "index\tsentence1\tsentence2\n0\tx\n", "", "test.tsv, line 2: 2 columns where 3 are expected"),
        ("SST-2", "index\tsentence\n0\tx\none\ty\n", "", "test.tsv, line 3: the index 'one' is not a whole number"),
        ("SST-2", "index\tsentence\n0\tx\n\n0\ty\n", "", "test.tsv, line 4: the index 0 is that of line 2, too"),
        (
            "SST-2",
            "index\tsentence\n0\tx\n",
            "--submission_dir data/test.tsv",
            "data/test.tsv/full: no folder can be made",
        ),
        (
            "Ratings",
            "index\tsentence\n0\tx\n",
            "",
            "Ratings: not one of GLUE's tasks; for its texts: python -m deebert predict",
        ),
        ("MNLI", None, "", "test_matched.tsv: no such file"),
        ("STS-B", "index\tsentence1\tsentence2\n0\tx\ty\n", "--exit_threshold 0.1", "needs at least two labels"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, task, text, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    if text is not None:
        (tmp_path / "data/test.tsv").write_text(text)
    model = tiny_model("bert", num_labels={"STS-B": 1, "Ratings": 1, "MNLI": 3}.get(task, 2))
    save_model(model, tiny_tokenizer("bert"), tmp_path / "model")
    capsys.readouterr()  # transformers' progress bar
    before = snapshot_files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: drive(Path("model"), Path("data"), task, Path("out"), *flags.split()))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert snapshot_files(tmp_path) == before


def test_a_file_in_the_place_of_a_submission_gets_one_line(glue, models, tmp_path, capsys):
    (tmp_path / "full").write_text("mine")
    with pytest.raises(SystemExit):
        cli.run(lambda: drive(models[2][0], glue / "RTE", "RTE", tmp_path))
    assert f"error: {tmp_path / 'full'}: no folder can be made there (File exists)\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_model_of_another_task_is_refused(glue, models, tmp_path, capsys):
    folder = shutil.copytree(models[2][0], tmp_path / "model")
    (folder / "run.json").write_text(json.dumps({"arguments": {"task_name": "MRPC"}}))
    with pytest.raises(SystemExit):
        cli.run(lambda: drive(folder, glue / "SST-2", "SST-2", tmp_path / "out"))
    assert "trained on MRPC, so it does not predict SST-2; give the model of SST-2" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tsv"))
