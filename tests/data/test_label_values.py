"""What the values of label columns are: 0/1 vectors, a column for each label, and names that may be one label."""

import json

import pytest

from deebert.data.label_values import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from deebert.data.own_data import OwnFiles, OwnTask, own_task
from deebert.utils.errors import InputError


@pytest.fixture
def task(tmp_path):
    """The task of a training file, which is the dev file, too."""

    def make(text: str, name: str = "t.csv", **fields) -> OwnTask:
        path = tmp_path / name
        path.write_text(text)
        return own_task(OwnFiles(train=path, validation=path, **fields))

    return make


def json_lines(values: list) -> str:
    return "".join(json.dumps({"text": f"text {i}", "label": value}) + "\n" for i, value in enumerate(values))


def labels_of(task: OwnTask) -> list:
    return [example.label for example in task.read(None, "train")]


VECTORS = [(1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], {}),
        ([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], []], {}),
        ([[True, False, False, True], [False, True, False, False], None], {}),
        ([["1", "0", "0", "1"], ["0", "1", "0", "0"], ["0", "0", "0", "0"]], {}),
        (["[1, 0, 0, 1]", "[0, 1, 0, 0]", "[]"], {}),
        (["1,0,0,1", "0,1,0,0", "0,0,0,0"], {"label_separator": ","}),
        (["1 0 0 1", "0 1 0 0", "0 0 0 0"], {"label_separator": " "}),
    ],
)
def test_lists_of_0_and_1_of_one_length_are_vectors(task, tmp_path, values, fields):
    made = task(json_lines(values), "t.jsonl", **fields)
    assert labels_of(made) == VECTORS
    assert made.labels == ("0", "1", "2", "3")
    assert "any number of 4 labels each, by 0 and 1: 0, 1, 2, 3" in made.notes[0]
    (tmp_path / "names").write_text("late\nrude\nlost\nrefund\n")
    named = task(json_lines(values), "t.jsonl", label_names=tmp_path / "names", **fields)
    assert (named.labels, labels_of(named)) == (("late", "rude", "lost", "refund"), VECTORS)


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([[0], [1], [0]], ("0", "1"), [(1, 0), (0, 1), (1, 0)]),
        ([[0, 1], [1], []], ("0", "1"), [(1, 1), (0, 1), (0, 0)]),
        ([[0, 2], [1, 3], [0, 1]], ("0", "1", "2", "3"), [(1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0)]),
        ([["a", "a"], ["b", "a"]], ("a", "b"), [(1, 0), (1, 1)]),
    ],
)
def test_other_lists_are_sets_of_labels(task, values, labels, expected):
    made = task(json_lines(values), "t.jsonl")
    assert (made.labels, labels_of(made)) == (labels, expected)


def test_vectors_at_an_evaluation_have_a_place_for_each_label_of_the_model(tmp_path):
    (tmp_path / "t.jsonl").write_text(json_lines([[1, 0, 1]]))
    known = {"validation": tmp_path / "t.jsonl", "problem_type": MULTI_LABEL}
    assert own_task(OwnFiles(labels=("c", "b", "a"), **known)).read(None, "dev")[0].label == (1, 0, 1)
    (tmp_path / "t.jsonl").write_text(json_lines([[0, 1]]))  # numbers of labels, not a vector
    made = own_task(OwnFiles(labels=("0", "1", "2"), **known))
    assert made.read(None, "dev")[0].label == (1, 1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [[1, 0, 0], [0, 1, 0], [1, 0]],
            r"line 3, column 'label': 2 numbers, where there are 3 labels, each with 0 or 1",
        ),
        ([[1, 1, 0], [1, 0, 0, 1], [0, 1, 1]], "line 2, column 'label': 4 numbers, where there are 3 labels"),
        ([["a"], ["b", None]], "line 2, column 'label': there is no label"),
        (["[1, 2]", "[1, NaN]"], "line 2, column 'label': there is no label"),
    ],
)
def test_vectors_that_do_not_fit_are_named(task, values, message):
    with pytest.raises(InputError, match=message):
        task(json_lines(values), "t.jsonl")


def test_vectors_of_another_length_than_the_names_are_no_sets(task, tmp_path):
    (tmp_path / "names").write_text("late\nrude\nlost\n")
    with pytest.raises(InputError, match="line 1, column 'label': 4 numbers, where there are 3 labels"):
        task(json_lines([[1, 0, 0, 1], [0, 1, 0, 0]]), "t.jsonl", label_names=tmp_path / "names")


COLUMNS = "id,comment_text,late,rude,refund\n0,a,0,1,0\n1,b,1,0,0\n2,c,0,0,0\n3,d,true,1.0,0\n"


def test_one_column_for_each_label(task):
    made = task(COLUMNS, text_column="comment_text", label_column="late, rude,refund")
    assert (made.labels, made.problem_type) == (("late", "rude", "refund"), MULTI_LABEL)
    assert labels_of(made) == [(0, 1, 0), (1, 0, 0), (0, 0, 0), (1, 1, 0)]
    assert "label from 'late' and 'rude' and 'refund', any number of 3 labels each" in made.notes[0]


def test_a_column_whose_name_has_a_comma_is_one_column(task):
    assert task('text,"a,b"\nx,1\ny,2\n', label_column="a,b").labels == ("1", "2")


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        (COLUMNS, {}, "which column holds the text.*; label_column late,rude,refund makes a label of each column of 0"),
        (
            COLUMNS,
            {"text_column": "comment_text"},
            "which column holds the label. Name it .label_column.; .*; label_column late,rude,refund makes a label of",
        ),
        (COLUMNS, {"text_column": "comment_text", "label_column": "late,tude"}, "label_column tude: no such column"),
        (COLUMNS, {"text_column": "late", "label_column": "late,rude"}, "late: this column is given twice"),
        (
            COLUMNS,
            {"text_column": "comment_text", "label_column": "late,late"},
            "late: this column is given twice",
        ),
        (
            COLUMNS.replace("0,1,0", "0,yes,0"),
            {"text_column": "comment_text", "label_column": "late,rude,refund"},
            "line 2, column 'late' or 'rude' or 'refund': 'yes' is neither 0 nor 1",
        ),
        (
            COLUMNS,
            {"text_column": "comment_text", "label_column": "late,rude", "problem_type": SINGLE_LABEL},
            "2 label columns need problem_type multi_label_classification",
        ),
        ("text,topic,score\nx,a,1\ny,b,2\n", {}, "topic and score could be the label; name one .label_column."),
        ("text,review,x\na,b,c\n", {}, "text and review could be the text; name one .text_column."),
    ],
)
def test_columns_that_are_unclear_are_listed(task, text, fields, message):
    with pytest.raises(InputError, match=message):
        task(text, **fields)


def test_the_columns_of_json_lines_are_those_of_all_lines(task):
    rows = [{"text": f"text {i}", "channel": "mail", **({"label": "ab"[i % 2]} if i else {})} for i in range(4)]
    with pytest.raises(InputError, match=r"t\.jsonl, line 1: no 'label'; it has text, channel"):
        task("".join(json.dumps(row) + "\n" for row in rows), "t.jsonl")
    rows[0]["label"] = "a"
    made = task("".join(json.dumps(row | {f"only {i}": 0}) + "\n" for i, row in enumerate(rows)), "t.jsonl")
    assert made.label_column == "label"


def test_scores_of_labels_are_no_names_of_labels(task):
    with pytest.raises(InputError, match=r"t\.jsonl, line 1, column 'label': 0\.2 is a score, not a label"):
        task(json_lines([[0.2, 0.8], [0.9, 0.1]]), "t.jsonl")


@pytest.mark.parametrize("value", ["NaN", "null", '""', '" "', "1e400", "-Infinity"])
def test_no_label_is_no_class(task, value):
    lines = f'{{"text": "x", "label": "a"}}\n{{"text": "y", "label": {value}}}\n{{"text": "z", "label": "b"}}\n'
    with pytest.raises(InputError, match="line 2, column 'label': there is no label"):
        task(lines, "t.jsonl")
    with pytest.raises(InputError, match=r"line 2, column .label.: .* is not a number"):
        task(lines.replace('"a"', "1"), "t.jsonl", problem_type=REGRESSION)


@pytest.mark.parametrize(
    ("labels", "doubt"),
    [
        (("Yes", "yes", "no"), "the labels 'Yes' and 'yes' differ only in how they are written: are they one label?"),
        (("no", "no\u200b", "yes"), r"'no' and 'no\u200b'"),
        (("no", "n\u00ado", "yes"), r"'no' and 'n\xado'"),
        (("a b", "a\u00a0b", "c"), r"'a b' and 'a\xa0b'"),
        (("a  b", "a b", "c"), "'a  b' and 'a b'"),
        (("caf\u00e9", "cafe\u0301", "tea"), r"'cafe\u0301' and 'caf\xe9'"),
        (("ok", "\uff4f\uff4b", "no"), r"'ok' and '\uff4f\uff4b'"),
        (("strasse", "straße", "weg"), "'strasse' and 'straße'"),
        (("1", "1.0", "x"), "'1' and '1.0'"),
        (("1", "01", "2"), "'01' and '1'"),
        (("👍", "👍\ufe0f", "no"), "'👍' and "),
        (("good", "bad", "NaN"), "'NaN' is a label here; if it stands for no label, remove its lines"),
        (("good", "bad", "n/a"), "'n/a' is a label here"),
        (("1 0", "0 1", "0 0"), "labels with ' ' seem to be several labels: give it as label_separator"),
        (("1,0", "0,1", "0,0"), "labels with ',' seem to be several labels"),
        (("(0, 1, 0)", "(1, 0, 0)"), "labels such as '(0, 1, 0)' seem to be several labels: write them as JSON lists"),
        (("{'a', 'b'}", "{'b'}"), "seem to be several labels: write them as JSON lists"),
        (("(a)", "b", "c (d, e)"), None),
        (("a", "b", "a b"), None),
        (("no", "none", "NA"), None),
        (("résumé", "resume", "1e", "2e"), None),
        (("1", "10", "-1"), None),
        (("c", "c++", "c#"), None),
    ],
)
def test_labels_that_may_be_one_or_none_are_a_doubt(task, labels, doubt):
    made = task(json_lines(list(labels)), "t.jsonl")
    warnings = [note for note in made.notes if note.startswith("warning") and "too high" not in note]
    assert len(warnings) == (doubt is not None), warnings
    assert doubt is None or doubt in warnings[0]
    assert len(made.labels) == len(labels)  # a doubt, no change


def test_many_doubts_are_few_lines(task):
    made = task(json_lines([f"{case}{i}" for i in range(100) for case in "xX"]), "t.jsonl")
    assert 5 < len(made.notes) < 16


def test_control_characters_of_labels_are_shown_as_escapes(task):
    made = task(json_lines(["\x1b[31mred", "a\nb"]), "t.jsonl")
    assert r"one of 2 labels each: \x1b[31mred, a\nb" in made.notes[0]
    assert made.labels == ("\x1b[31mred", "a\nb")
