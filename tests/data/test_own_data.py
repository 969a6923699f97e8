"""Own data: what files may look like, which columns and labels they give, and one clear line for what is wrong."""

import datetime
import json

import numpy as np
import pytest

from deebert.data.label_values import MULTI_LABEL, REGRESSION, SINGLE_LABEL, sorted_labels
from deebert.data.own_data import OwnFiles, own_task, shared_texts, validation_rows
from deebert.data.tables import read_table
from deebert.data.tasks import Example
from deebert.utils.errors import InputError

DEV = "text,label\nx,a\ny,b\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "train.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def task(write):
    """The task of a training file; unless a dev file is given, a CSV with the labels a and b."""

    def make(text: str | bytes, name: str = "train.csv", dev: str | None = DEV, **flags):
        validation = None if dev is None else write(dev, "dev.csv" if name != "train.tsv" else "dev.tsv")
        return own_task(OwnFiles(train=write(text, name), validation=validation, **flags))

    return make


def pairs(examples: list[Example]) -> list[tuple]:
    return [(x.texts[0], x.label) for x in examples]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", 'text,label\n"one, ""two""\nthree",b\nNA,a\n'),
        ("train.csv", '\ufefftext,label\r\n"one, ""two""\nthree",b\r\n\r\nNA,a\r\n'),
        ("train.csv", 'text;label\n"one, ""two""\nthree";b\nNA;a\n'),
        ("train.csv", 'id,label,text\n1, b ,"one, ""two""\nthree"\n2,a,NA'),
        (
            "train.jsonl",
            '{"text": "one, \\"two\\"\\nthree", "label": "b"}\r\n\r\n{"label": "a", "text": "NA", "x": 1}\n',
        ),
    ],
    ids=["quoted", "BOM, CRLF and blank lines", "semicolons", "other columns", "JSONL"],
)
def test_texts_and_labels_of_any_format(task, name, text):
    made = task(text, name)
    assert pairs(made.read(None, "train")) == [('one, "two"\nthree', 1), ("NA", 0)]
    assert (made.labels, made.problem_type, made.metrics) == (("a", "b"), SINGLE_LABEL, ("acc", "f1_macro"))
    assert "text from 'text', label from 'label'" in made.notes[0]


def test_a_tsv_is_never_quoted(task):
    made = task('text\tlabel\n"said\ta\nhe "said"\tb\n', "train.tsv", dev="text\tlabel\n\ta\n")
    assert pairs(made.read(None, "train")) == [('"said', 0), ('he "said"', 1)]


def test_parquet(tmp_path, task):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"text": ["NA", "y"], "label": [["a", "b"], []]})
    frame.to_parquet(tmp_path / "train.parquet")
    made = own_task(OwnFiles(train=tmp_path / "train.parquet", validation=tmp_path / "train.parquet"))
    assert pairs(made.read(None, "dev")) == [("NA", (1, 1)), ("y", (0, 0))]


@pytest.mark.parametrize(
    ("header", "flags", "columns"),
    [
        ("text,team", {}, (("text",), "team")),
        ("ticket,label", {}, (("ticket",), "label")),
        ("Sentence1,Sentence2,id,Label", {}, (("Sentence1", "Sentence2"), "Label")),
        ("id,title,text,team", {"label_column": "team", "text_column": "title"}, (("title",), "team")),
        ("a,b,c", {"label_column": "a", "text_column": "b,c"}, (("b", "c"), "a")),
        ("text,label,score", {"label_column": "label"}, (("text",), "label")),
    ],
)
def test_columns_are_guessed_where_their_names_are_plain(task, header, flags, columns):
    fields = len(header.split(","))
    text = f"{header}\n{','.join(['x'] * fields)}\n{','.join(['y'] * fields)}\n"
    made = task(text, dev=text, **flags)
    assert (made.text_columns, made.label_column) == columns
    assert (made.read(None, "dev")[1].texts[1:] == ("y",)) == (len(columns[0]) == 2)


@pytest.mark.parametrize(
    ("values", "flags", "labels", "expected"),
    [
        (["10", "9", "10"], {}, ("9", "10"), [1, 0, 1]),
        (["1", "0", "1"], {"label_names": "no\nyes\nother\n"}, ("no", "yes", "other"), [1, 0, 1]),
        (["1.5", "-2", "3"], {"problem_type": REGRESSION}, (), [1.5, -2.0, 3.0]),
        (["a|b", "", " b |"], {"label_separator": "|"}, ("a", "b"), [(1, 1), (0, 0), (0, 1)]),
        (['["b", "a"]', "[]", '["a"]'], {}, ("a", "b"), [(1, 1), (0, 0), (1, 0)]),
        ([["b", 1], [], [1]], {}, ("1", "b"), [(1, 1), (0, 0), (1, 0)]),
        (
            ["0,2", "2", ""],
            {"label_separator": ",", "label_names": "x\ny\nz\n"},
            ("x", "y", "z"),
            [(1, 0, 1), (0, 0, 1), (0, 0, 0)],
        ),
        ([True, False, None], {"problem_type": MULTI_LABEL}, ("false", "true"), [(0, 1), (1, 0), (0, 0)]),
    ],
)
def test_labels(write, values, flags, labels, expected):
    lines = [json.dumps({"text": str(i), "label": value}) for i, value in enumerate(values)]
    flags = {name: write(flag, "names") if name == "label_names" else flag for name, flag in flags.items()}
    path = write("\n".join(lines), "train.jsonl")
    made = own_task(OwnFiles(train=path, validation=path, **flags))
    assert made.labels == labels
    assert [x.label for x in made.read(None, "train")] == expected
    assert made.several_labels == isinstance(expected[0], tuple)


def test_a_file_without_a_header_line(task):
    made = task("1\tfine\t7\n0\tbad\t8\n", "train.tsv", dev="1\tx\t7\n", column_names=("label", "text", "id"))
    assert pairs(made.read(None, "train")) == [("fine", 1), ("bad", 0)]
    with pytest.raises(InputError, match="line 1: this is a header line; leave the names of columns out"):
        task("label\ttext\n0\tx\n", "train.tsv", dev="", column_names=("label", "text"))


def test_parquet_columns_of_other_types(tmp_path):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {
        "text": [b"b\xc3\xa4r", b"y"],
        "day": [datetime.date(2026, 1, 2), datetime.date(2026, 1, 3)],
        "count": pandas.array([1, None], "Int64"),
    }
    pandas.DataFrame(columns).to_parquet(tmp_path / "train.parquet")
    assert [row for _, row in read_table(tmp_path / "train.parquet")] == [
        {"text": "bär", "day": "2026-01-02", "count": 1},
        {"text": "y", "day": "2026-01-03", "count": None},
    ]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "id": [1, None]}), tmp_path / "train.parquet")
    assert [row["id"] for _, row in read_table(tmp_path / "train.parquet")] == [1, None]
    assert all(not isinstance(row["id"], float) for _, row in read_table(tmp_path / "train.parquet"))
    pandas.DataFrame({"text": [b"\xff", b"y"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet, row 1: bytes that are not UTF-8 text"):
        read_table(tmp_path / "train.parquet")


def test_labels_have_one_order_whatever_the_order_of_a_set():
    """As each process of a training makes its own set."""
    assert sorted_labels({"10", "1", "01", "-2"}) == ("-2", "01", "1", "10")
    assert sorted_labels({"--5", "1"}) == ("--5", "1")
    assert sorted_labels({"9" * 5000, "1"}) == ("1", "9" * 5000)


LONG = "text,label\n" + "".join(f"t{i},{i}\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", {}, "train.csv: no lines of data in it"),
        ("text,label\n", {}, "train.csv: no lines of data in it"),
        (b"text,label\nx,a\n\xe9t\xe9,b\n", {}, "train.csv, line 3: not UTF-8 text; save the file as UTF-8"),
        ("text,label\nx,a\none, two,b\n", {}, "line 3: 3 columns where 2 are expected, separated by commas; is"),
        ("text,label\nx,a\ny\n", {}, "line 3: 1 columns where 2 are expected"),
        ('text,label\nx,a\n"y,b\nz,a\n', {}, "line 3: not a CSV record: a quote is opened and never closed"),
        ('text,label\n"x" y,a\n', {}, "line 2: not a CSV record: ',' expected after '\"'"),
        ("title,team\nx,a\n", {}, "which column holds the text. Name it .text_column.; the file has title, team"),
        (
            "text:label\nx:a\n",
            {},
            "the file has text:label .*; tabs separate the columns of a .tsv, commas, semicolons",
        ),
        ("text,id,team\nx,1,a\n", {}, "which column holds the label. Name it .label_column.; the file has text, id"),
        (
            "text,label\nx,a\n",
            {"label_column": "team"},
            "label_column team: no such column; the file has text, label",
        ),
        ("text,label\nx,a\n", {"text_column": "text,text,label"}, "text_column text: this column is given twice"),
        ("a,b,c,label\nx,y,z,a\n", {"text_column": "a,b,c"}, "text_column a,b,c: give one column, or the two of pairs"),
        (
            "text,label\nx,a\n",
            {"text_column": "text", "label_column": "text"},
            "label_column text: this column is given twice",
        ),
        ("text,text,label\nx,y,a\n", {}, "more than one column is named 'text'"),
        ("text,label\nx,a\ny,a\n", {}, "label from 'label' has one label only, 'a'; a classifier needs two"),
        ("text,label\nx,a\ny,\n", {}, "line 3, column 'label': there is no label"),
        ("text,label\nx,a\ny,c\n", {}, r"dev.csv, line 3: label 'b' is unknown to the training, which has a, c$"),
        (LONG, {}, "dev.csv, line 2: label 'a' is unknown .* 9 and 20 more"),
        ("text,label\nx,1\ny,two\n", {"problem_type": REGRESSION}, "line 3, column 'label': 'two' is not a number"),
        ("text,label\nx,1\ny,inf\n", {"problem_type": REGRESSION}, "'inf' is not a number"),
        ("text,label\nx,['a']\ny,[]\n", {}, r"line 2, column 'label': \['a'\] is not a JSON list"),
        ("text,label\nx,\ny,\n", {"label_separator": "|"}, "has no label in any line"),
    ],
)
@pytest.mark.hostile("CSV of texts", "one line")
def test_what_is_wrong_gets_one_clear_line(task, text, flags, message):
    with pytest.raises(InputError, match=message) as error:
        task(text, **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "flags", "message"),
    [
        ("t.jsonl", '{"text": "x", "label": "a"}\n{"text": "x"\n', {}, "t.jsonl, line 2: not JSON"),
        ("t.jsonl", "[" * 100_000, {}, "t.jsonl, line 1: not JSON"),
        (
            "t.jsonl",
            '{"text": "\\ud800", "label": "a"}\n',
            {},
            "line 1: half of a surrogate pair, .* is no Unicode text",
        ),
        ("t.jsonl", '["x", "a"]\n', {}, "t.jsonl, row 1: not a JSON object"),
        ("t.jsonl", '{"text": "x", "label": "a"}\n{"label": "a"}\n', {}, "line 2: no 'text'; it has label"),
        (
            "t.jsonl",
            '{"text": ["x"], "label": "a"}\n',
            {},
            """line 1: 'text' is not a text: .{5}; give one text there""",
        ),
        ("t.jsonl", '{"text": "x", "label": {"a": 1}}\n', {}, "line 1, column 'label': .* is not one label; several"),
        ("t.jsonl", '{"text": "x", "label": [["a"]]}\n', {}, r"column 'label': \[\"a\"\] is not one label$"),
        ("t.jsonl", '{"text": "x", "team": "a"}\n', {"text_column": "y"}, "no such column; the file has text, team$"),
        ("t.jsonl", f'{{"text": "x", "label": 1{"0" * 400}}}', {"problem_type": REGRESSION}, "is not a number"),
        ("t.jsonl", "{}", {"column_names": ("a",)}, "names of columns are for CSV and TSV files"),
        ("t.xlsx", "", {}, "t.xlsx: a file that ends in one of .csv, .tsv, .jsonl, .json, .ndjson, .parquet is needed"),
        ("t.tsv", "text\tlabel\nx\ta\tb\n", {}, "line 2: 3 columns .* is there text with a separator"),
        ("t.parquet", "", {}, "t.parquet: (Parquet needs one more package|not a Parquet file)"),
    ],
)
@pytest.mark.hostile("TSV, JSONL or Parquet of texts", "one line")
def test_other_formats_get_one_clear_line_too(write, name, text, flags, message):
    path = write(text, name)
    with pytest.raises(InputError, match=message):
        own_task(OwnFiles(train=path, validation=path, **flags))


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        ("a\nb\n", "2", "label '2' is no number from 0 to 1"),
        ("a\nb\n", "a", "label 'a' is no number from 0 to 1"),
        ("a\na\n", "0", "'a' occurs more than once"),
        ("a\n", "0", "1 names; two are needed"),
    ],
)
def test_names_of_labels_that_do_not_fit(write, names, label, message):
    path = write(f"text,label\nx,{label}\n")
    with pytest.raises(InputError, match=message):
        own_task(OwnFiles(train=path, validation=path, label_names=write(names, "names")))


def test_missing_files(tmp_path, write):
    with pytest.raises(InputError, match=r"none.csv: no such file"):
        own_task(OwnFiles(train=tmp_path / "none.csv"))
    with pytest.raises(InputError, match=r"none: cannot be read"):
        own_task(OwnFiles(train=write(DEV), label_names=tmp_path / "none"))


def test_no_text_is_lost_silently(task):
    made = task('text,label\n"",a\nx,b\n  ,a\nx,a\n')
    assert [x.texts[0] for x in made.read(None, "train")] == ["", "x", "  ", "x"]
    empty, shared = (note for note in made.notes if note.startswith("warning: "))
    assert "2 empty texts, the first in" in empty
    assert "train.csv, line 2; they are kept" in empty
    assert "1 of 2 texts in" in shared
    assert "train.csv, too, so that scores come out too high" in shared


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["a;b", "b", "a"], "labels with ';' seem to be several labels: give it as label_separator"),
        (["a b", "b", "a"], None),
        (["1.5", "2", "a"], None),
        (["1.5", "2", "3"], "labels such as '1.5' are classes here: to predict numbers, give problem_type regression"),
        ([str(i) for i in range(30)], "30 labels in 30 lines: is label_column the right one"),
    ],
)
def test_labels_that_may_be_something_else_are_noted(task, labels, note):
    lines = [f"t{i},{label}\n" for i, label in enumerate(labels)]
    made = task("text,label\n" + "".join(lines), dev="text,label\n" + "".join(f"dev {line}" for line in lines))
    warnings = [line for line in made.notes if line.startswith("warning")]
    assert len(warnings) == (note is not None)
    assert note is None or note in warnings[0]


def test_at_an_evaluation_the_models_labels_count(write):
    dev = write(DEV)
    made = own_task(OwnFiles(validation=dev, labels=("c", "b", "a"), problem_type=SINGLE_LABEL))
    assert pairs(made.read(None, "dev")) == [("x", 2), ("y", 1)]
    several = own_task(OwnFiles(validation=dev, labels=("b", "a"), problem_type=MULTI_LABEL))
    assert pairs(several.read(None, "dev")) == [("x", (0, 1)), ("y", (1, 0))]


def test_examples_in_another_order_of_labels(task):
    assert pairs(task("text,label\nx,a\ny,b\nz,c\n").read(None, "train", ("c", "a", "b"))) == [
        ("x", 1),
        ("y", 2),
        ("z", 0),
    ]
    several = task("text,label\nx,a|b\ny,c\n", label_separator="|").read(None, "train", ("c", "a", "b"))
    assert [x.label for x in several] == [(0, 1, 1), (1, 0, 0)]


def test_the_split_is_stratified_seeded_and_keeps_copies_together(task):
    rows = [f"{name}{i % 40},{name}" for name, count in (("a", 200), ("b", 100), ("c", 2)) for i in range(count)]
    made = task("text,label\n" + "\n".join(rows) + "\n", dev=None)
    dev, train = pairs(made.read(None, "dev")), pairs(made.read(None, "train"))
    assert len(dev) + len(train) == 302
    assert not set(dev) & set(train)  # 40 texts of a and of b, with copies
    assert {label for _, label in train} == {0, 1, 2}
    assert [len({x for x in dev if x[1] == label}) for label in (0, 1)] == [4, 4]  # a tenth of 40
    assert made.file(None, "dev") == made.file(None, "train")
    assert pairs(task("text,label\n" + "\n".join(rows) + "\n", dev=None).read(None, "dev")) == dev
    assert not any("too high" in note for note in made.notes)


def test_labels_without_a_dev_text_are_named(task):
    (note,) = (x for x in task("text,label\nx,a\ny,b\nz,c\n", dev="text,label\nv,b\n").notes if "warning" in x)
    which = "2 of 3 labels, which no score and no threshold counts: a, c"
    assert note == f"warning: the dev set has no text of {which}; hold out more, or give a validation_file"


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5])
@pytest.mark.parametrize(("classes", "each"), [(2, 100), (50, 3), (77, 5), (3, 2), (1, 30)])
def test_a_split_of_any_sizes(share, classes, each):
    """Many classes with few texts, as in real data: the part has its size, and each class stays in the training."""
    texts = [f"{i % classes} {i}" for i in range(classes * each)]
    strata = [text.split()[0] for text in texts]
    if not 1 <= round(share * len(texts)) < len(texts) - classes:
        labels = f" with {classes} labels, each of which keeps one," if classes > 1 else ""
        with pytest.raises(InputError, match=f": {len(texts)} different texts{labels} are too few to hold out a part"):
            validation_rows(texts, strata, share)
        return
    rows = validation_rows(texts, strata, share)
    assert rows.sum() == round(share * len(texts))
    assert {stratum for stratum, row in zip(strata, rows, strict=True) if not row} == set(strata)
    np.testing.assert_array_equal(rows, validation_rows(texts, strata, share))


def test_shared_texts():
    assert shared_texts(["a", "b", "a", "c"], ["a", "x"]) == 2
