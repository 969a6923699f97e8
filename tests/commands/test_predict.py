"""The command for texts: streaming, in batches, one prediction a line."""

import csv
import io
import json
import subprocess
import sys

import pytest
import torch
from support.helpers import ROOT
from support.tiny import sentences, tiny_model

from deebert import Classifier
from deebert.commands import predict
from deebert.data.tables import read_texts
from deebert.modeling.checkpoints import load_tokenizer, save_model, set_labels
from deebert.modeling.exit_rules import entropy
from deebert.utils import cli
from deebert.utils.errors import InputError

TEXTS = [text for text, _ in sentences(11, seed=3)]


@pytest.fixture
def folder(backbone, tmp_path, tiny_checkpoints):
    model = tiny_model(backbone, highway_pooling="mean", exit_before_first_layer=backbone == "roberta")
    set_labels(model.config, ("bad", "good"))
    tokenizer = load_tokenizer(str(tiny_checkpoints[backbone]))
    with torch.no_grad():
        all_logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True), output_all_exits=True).all_logits
    model.set_exit_threshold((entropy(all_logits[:, :-1]).median(dim=0).values + 1e-4).tolist())
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def run(monkeypatch, capsys, lines: list[str], *arguments: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["predict", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    cli.run(predict.main)
    return capsys.readouterr().out.splitlines()


def model_of(classifier):
    """What takes tensors: the PyTorch model, or the exported one."""
    return getattr(classifier.runtime, "model", classifier.runtime)


def test_batches_predict_what_single_texts_do(folder, monkeypatch, capsys, tmp_path):
    alone = run(monkeypatch, capsys, TEXTS, "--model", folder, "--batch_size", 1)
    together = run(monkeypatch, capsys, TEXTS, "--model", folder, "--batch_size", 4)
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    assert run(monkeypatch, capsys, [], "--model", folder, "--file", tmp_path / "texts") == together == alone
    assert len(alone) == 11
    model = model_of(Classifier(str(folder)))
    tokenizer = load_tokenizer(str(folder))
    for text, line in zip(TEXTS, alone, strict=True):
        output = model(**tokenizer(text, return_tensors="pt").to(model.device))
        label, probability, exit_layer = line.split("\t")
        p = output.logits.softmax(-1)[0]
        assert label == ("bad", "good")[int(p.argmax())]
        assert float(probability) == pytest.approx(p.max().item(), abs=1e-4)
        assert int(exit_layer) == output.exit_layer.item()
    assert len({line.split("\t")[2] for line in alone}) > 1


def test_threshold_and_json(folder, backbone, monkeypatch, capsys):
    lines = run(monkeypatch, capsys, TEXTS, "--model", folder, "--exit_threshold", 5, "--format", "jsonl")
    rows = [json.loads(line) for line in lines]
    assert {row["exit_layer"] for row in rows} == {0 if backbone == "roberta" else 1}
    assert all(row["label"] in ("bad", "good") and 0.5 <= row["probability"] <= 1 for row in rows)


def test_a_text_that_is_handed_over_has_an_empty_label(folder, monkeypatch, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"min_confidence": 1.0}))
    lines = run(monkeypatch, capsys, TEXTS, "--model", folder)
    assert {(line.split("\t")[0], line.split("\t")[3]) for line in lines} == {("", "1")}
    for form, value in (("csv", "1"), ("jsonl", True)):
        table = ["text", *(f'"{text}"' for text in TEXTS)]
        *_, row = run(monkeypatch, capsys, table, "--model", folder, "--text_column", "text", "--format", form)
        assert (json.loads(row)["handed_over"] if form == "jsonl" else row.split(",")[-1]) == value
    (row,) = run(monkeypatch, capsys, TEXTS[:1], "--model", folder, "--format", "jsonl")
    assert (json.loads(row)["label"], json.loads(row)["handed_over"]) == (None, True)


def test_another_exit_rule(folder, monkeypatch, capsys):
    model = model_of(Classifier(str(folder)))
    model.set_exit_rule("patience", 2)
    inputs = load_tokenizer(str(folder))(TEXTS, return_tensors="pt", padding=True)
    expected = model(**inputs.to(model.device)).exit_layer.tolist()
    arguments = ("--model", folder, "--exit_rule", "patience", "--exit_threshold", 2)
    lines = run(monkeypatch, capsys, TEXTS, *arguments)
    assert [int(line.split("\t")[2]) for line in lines] == expected
    assert 1 not in expected


def test_pairs_and_empty_lines(folder, monkeypatch, capsys):
    assert len(run(monkeypatch, capsys, ["a film\tvery good", "bad\tdull"], "--model", folder)) == 2
    assert len(run(monkeypatch, capsys, ["a film", "", "dull"], "--model", folder)) == 3
    assert run(monkeypatch, capsys, [], "--model", folder) == []


def test_it_streams(folder, monkeypatch):
    """With batch size 1 the prediction of a line is there before the next line is read."""
    written = io.StringIO()

    class Lines:
        def reconfigure(self, **_):
            pass

        def __iter__(self):
            for i, text in enumerate(TEXTS[:3]):
                assert len(written.getvalue().splitlines()) == i
                yield text + "\n"

    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--batch_size", "1"])
    monkeypatch.setattr(sys, "stdin", Lines())
    monkeypatch.setattr(sys, "stdout", written)
    predict.main()
    assert len(written.getvalue().splitlines()) == 3


def test_output_is_utf_8_whatever_the_terminal_has(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    cli.run(lambda: print("größer", flush=True))
    assert terminal.buffer.getvalue() == "größer\n".encode()


@pytest.mark.parametrize("size", [1, 2, 3, 32])
def test_texts_before_a_wrong_line_are_classified(folder, monkeypatch, capsys, size):
    good = ["a good film", "a bad film", "a film"]
    expected = run(monkeypatch, capsys, good, "--model", folder)
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, [*good, "one\ttoo many", "a film"], "--model", folder, "--batch_size", size)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected
    assert printed.err.startswith("error: line 4: 2 tab-separated fields")


def test_an_input_without_texts_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--text_column", "text"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text\n")))
    cli.run(predict.main)
    assert capsys.readouterr() == ("", "note: there are no texts in the input\n")


AT_ONCE = "every text exits at the first off-ramp: the uncertainty of the rule entropy is at most 0.693 here"


@pytest.mark.parametrize(
    ("threshold", "note"), [(None, ""), (-1, ""), (0.69, ""), (40, f"note: at threshold 40 {AT_ONCE}\n")]
)
def test_a_threshold_that_decides_nothing_is_named(folder, monkeypatch, capsys, threshold, note):
    given = [] if threshold is None else [f"--exit_threshold={threshold}"]
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), *given])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a good film\n")))
    cli.run(predict.main)
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("backbone", ["bert"])  # the pipe is the same for all
def test_a_reader_that_has_seen_enough_is_no_error(folder):
    predict = f"{sys.executable} -m deebert predict --model {folder} --batch_size 1"
    command = f"yes 'a good film' | head -500 | {predict} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_regression_gives_a_value(tmp_path, tiny_checkpoints, monkeypatch, capsys):
    model = tiny_model("bert", num_labels=1)
    with torch.no_grad():
        model.classifier.weight *= 1e-5  # of small numbers all digits count
        model.classifier.bias.zero_()
    save_model(model, load_tokenizer(str(tiny_checkpoints["bert"])), tmp_path)
    value, probability, layer = run(monkeypatch, capsys, ["a good film"], "--model", tmp_path)[0].split("\t")
    inputs = load_tokenizer(str(tmp_path))("a good film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.item()
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert (probability, layer) == ("", "4")
    (line,) = run(monkeypatch, capsys, ["a good film"], "--model", tmp_path, "--format", "jsonl")
    assert json.loads(line)["label"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (["a\tb\tc"], [], "line 1: 3 tab-separated fields"),
        (["a", "b\tc"], [], "line 2: 2 tab-separated fields"),
        ([], ["--file", "nowhere"], "--file nowhere: no such file"),
        ([], ["--model", "nowhere"], "nowhere: no such folder here, and the hub gives no such model"),
        ([], ["--model", "./nowhere"], "./nowhere: no such folder"),
        ([], ["--model", "runs/bert/nowhere"], "runs/bert/nowhere: no such folder"),
        ([], ["--exit_threshold", "nan"], "exit_threshold nan"),
        (
            [],
            ["--batch_size", "0"],
            "argument --batch_size: 0 is not a whole number above 0 (predict --help",
        ),
        ([], ["--exit_rule", "confidence"], "exit_rule confidence: give exit_threshold, too"),
        ([], ["--exit_rule", "learned", "--exit_threshold", "0.1"], "--exit_rule: invalid choice: 'learned'"),
        ([], ["--exit_rule", "patience", "--exit_threshold", "1.5"], "exit_threshold 1.5: patience counts"),
    ],
)
def test_bad_input_gets_one_clear_line(folder, monkeypatch, capsys, lines, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, lines, "--model", folder, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_folder_without_a_tokenizer(folder, monkeypatch, capsys):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, TEXTS, "--model", folder)
    assert "tokenizer.json is missing" in capsys.readouterr().err


def test_a_file_that_is_no_text(folder, monkeypatch, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--file", str(tmp_path / "binary")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(InputError, match="not UTF-8"):
        predict.main()


TABLES = {  # the same two rows; the second text has a comma, quotes and a line end where the format has them
    "csv": 'id,text,note\r\n7,a good film,x\r\n8,"dull, ""so"" bad",\r\n',
    "tsv": 'id\ttext\tnote\n7\ta good film\tx\n8\tdull, "so" bad\t\n',
    "jsonl": '{"id": "7", "text": "a good film", "note": "x"}\n\n'
    '{"id": "8", "text": "dull, \\"so\\" bad", "note": ""}\n',
}
TABLES["json"] = TABLES["jsonl"]


@pytest.mark.parametrize("backbone", ["bert"])
@pytest.mark.parametrize("kind", [*TABLES, "parquet"])
def test_a_table_keeps_its_columns(folder, monkeypatch, capsys, tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        rows = csv.DictReader(io.StringIO(TABLES["csv"], newline=""))
        pytest.importorskip("pandas").DataFrame(list(rows)).to_parquet(path)
    else:
        path.write_bytes(b"\xef\xbb\xbf" + TABLES[kind].encode())
    expected = Classifier(str(folder))(["a good film", 'dull, "so" bad'])
    lines = run(monkeypatch, capsys, [], "--model", folder, "--file", path, "--text_column", "text")
    if kind not in ("csv", "tsv"):
        rows = [json.loads(line) for line in lines]
    else:
        unquoted = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
        rows = list(csv.DictReader(lines, **unquoted))
    assert [list(row) for row in rows] == [["id", "text", "note", "prediction", "probability", "exit_layer"]] * 2
    assert [(row["id"], row["text"], row["note"]) for row in rows] == [
        ("7", "a good film", "x"),
        ("8", 'dull, "so" bad', ""),
    ]
    for row, prediction in zip(rows, expected, strict=True):
        assert (row["prediction"], int(row["exit_layer"])) == (prediction.label, prediction.exit_layer)
        assert float(row["probability"]) == pytest.approx(prediction.probability, abs=1e-4)


@pytest.mark.parametrize("backbone", ["bert"])
def test_a_table_with_semicolons_is_read_as_in_training(folder, monkeypatch, capsys):
    lines = ["id;text", '7;"a; b"', "8;dull"]
    rows = run(monkeypatch, capsys, lines, "--model", folder, "--text_column", "text")
    assert [row[:2] for row in csv.reader(rows[1:])] == [["7", "a; b"], ["8", "dull"]]


@pytest.mark.parametrize("backbone", ["bert"])
def test_pairs_of_columns_from_a_stream_in_another_format(folder, monkeypatch, capsys):
    lines = ["a,b", "good film,bad film", "good film,"]
    arguments = ("--text_column", "a", "--text_pair_column", "b", "--format", "jsonl")
    rows = [json.loads(line) for line in run(monkeypatch, capsys, lines, "--model", folder, *arguments)]
    expected = Classifier(str(folder))([("good film", "bad film"), ("good film", "")])
    assert [row["probability"] for row in rows] == pytest.approx([p.probability for p in expected], abs=1e-5)
    assert rows[1]["b"] == ""


@pytest.mark.parametrize("backbone", ["bert"])
@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a,b\n1,2,3\n", ["--text_column", "a"], "line 2: 3 columns where 2 are expected"),
        ("a,b\n1\n", ["--text_column", "a"], "line 2: 1 columns where 2 are expected"),
        ("a,a\n1,2\n", ["--text_column", "a"], "line 1: more than one column is named 'a'"),
        ("a,b\n1,2\n", ["--text_column", "text"], "line 2: no 'text'; it has a, b"),
        ('a,b\n"1,2\n', ["--text_column", "a"], "line 2: not a CSV record: a quote is opened and never closed"),
        ("a,prediction\n1,2\n", ["--text_column", "a"], "a column prediction already"),
        ('{"a": [1]}', ["--text_column", "a", "--input_format", "jsonl"], "line 1: 'a' is not a text: [1]"),
        ('{"a": "\\ud800"}', ["--text_column", "a", "--input_format", "jsonl"], "line 1: half of a surrogate pair"),
        ("[1]", ["--text_column", "a", "--input_format", "jsonl"], "row 1: not a JSON object"),
        ('{"b": ""}', ["--text_column", "a", "--input_format", "jsonl"], "line 1: no 'a'; it has b"),
        (
            '{"a": ""}\n{"a": "", "b": 1}',
            ["--text_column", "a", "--input_format", "jsonl", "--format", "csv"],
            "other columns than the first one: a, b; jsonl can hold them",
        ),
        ("a", ["--text_pair_column", "a"], "--text_pair_column: give --text_column"),
        ("a", ["--input_format", "csv"], "--input_format csv: tables need --text_column"),
        ("a", ["--text_column", "a", "--input_format", "parquet"], "--input_format parquet: give --file"),
        ("a", ["--max_seq_length", "7"], "max_seq_length 7: give at least 8 tokens"),
        ("a", ["--top_k", "2"], "--top_k: a tsv has one probability a row; give --format jsonl"),
        ("a", ["--file", "tests/x.csv"], "--file tests/x.csv: no such file"),
        ("a", ["--file", "/proc/self/mem"], "/proc/self/mem: cannot be read (Input/output error)"),
    ],
)
@pytest.mark.hostile("table or stream for predict", "one line")
def test_bad_tables_and_streams_get_one_clear_line(folder, monkeypatch, capsys, text, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, [text], "--model", folder, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "parquet"])
def test_a_table_is_not_taken_for_lines(monkeypatch, tmp_path, ending):
    (tmp_path / f"x.{ending}").write_text("text\na good film\n")
    monkeypatch.setattr("sys.argv", ["predict", "--model", "m", "--file", str(tmp_path / f"x.{ending}")])
    with pytest.raises(InputError, match="give --text_column"):
        predict.main()


@pytest.mark.parametrize("backbone", ["bert"])
def test_the_most_likely_labels_alone(folder, monkeypatch, capsys):
    flags = ["--model", folder, "--format", "jsonl", "--top_k", "1"]
    for line in run(monkeypatch, capsys, ["a good film"], *flags):
        row = json.loads(line)
        assert row["probabilities"] == {row["label"]: row["probability"]}
    table = run(monkeypatch, capsys, ["text", "a good film"], *flags, "--text_column", "text", "--input_format", "csv")
    for line in table:
        row = json.loads(line)
        assert row["probabilities"] == {row["prediction"]: row["probability"]}


def test_numbers_and_null_are_texts_as_in_training():
    (row,) = read_texts(io.StringIO('{"a": 7, "b": null}'), "jsonl", ["a", "b"])
    assert row == (("7", ""), {"a": 7, "b": None})


@pytest.mark.parametrize("backbone", ["bert"])
def test_closed_and_full_streams(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder)])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        with pytest.raises(InputError, match="standard input is closed; give --file"):
            predict.main()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with pytest.raises(InputError, match="standard output is closed"):
            predict.main()
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:  # noqa: PTH123  a device
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a film\n")))
        patch.setattr(sys, "stdout", full)
        with pytest.raises(InputError, match="standard output: No space left on device; the predictions are inc"):
            predict.main()


@pytest.mark.parametrize("backbone", ["bert"])
def test_notes_of_no_threshold_and_of_texts_that_were_cut(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a film\n" + b"good " * 20 + b"\n")))
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--max_seq_length", "10"])
    predict.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "note: 1 of 2 texts have more than 10 tokens and were cut"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"exit_threshold": -1}))
    run(monkeypatch, capsys, TEXTS, "--model", folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--batch_size", "1"])
    predict.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: this model has no exit threshold, so no text exits early; give exit_threshold")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    monkeypatch.setattr("sys.argv", ["predict", "--model", str(folder), "--exit_threshold", "-1"])
    predict.main()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("backbone", ["bert"])
def test_names_of_labels_with_tabs_and_several_labels(folder, monkeypatch, capsys):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = {"id2label": {"0": "a\tb", "1": "c\nd"}, "label2id": {"a\tb": 0, "c\nd": 1}}
    path.write_text(json.dumps(config | names))
    for line in run(monkeypatch, capsys, TEXTS, "--model", folder):
        assert line.split("\t")[0] in (r"a\tb", r"c\nd")
    for line in run(monkeypatch, capsys, TEXTS, "--model", folder, "--format", "jsonl"):
        assert json.loads(line)["label"] in ("a\tb", "c\nd")
    path.write_text(json.dumps(config | {"problem_type": "multi_label_classification", "exit_threshold": -1}))
    expected = Classifier(str(folder))(TEXTS)
    lines = run(monkeypatch, capsys, TEXTS, "--model", folder)
    assert [line.split("\t")[0] for line in lines] == [",".join(p.label) for p in expected]
