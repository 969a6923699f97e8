"""Tables as people and programs write them: what is read, what is written, and one clear line for what is wrong."""

import csv
import io
import json

import pytest

from deebert.data.tables import TableWriter, read_records, read_table, read_texts
from deebert.utils.errors import InputError

ROWS = [{"text": "one; two, three", "label": "a"}, {"text": "NA", "label": "b"}]


def rows_of(path) -> list[dict]:
    return [row for _, row in read_table(path)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("commas.csv", 'text,label\n"one; two, three",a\nNA,b\n'),
        ("semicolons.csv", 'text;label\n"one; two, three";a\nNA;b\n'),
        ("tabs.csv", 'text\tlabel\n"one; two, three"\ta\nNA\tb\n'),
        ("tabs_and_commas.csv", 'text\tlabel\tfirst,second,third\n"one; two, three"\ta\t\nNA\tb\t\n'),
        ("semicolons_and_commas.csv", 'text;label;in 1,000\n"one; two, three";a;\nNA;b;\n'),
        ("bars.csv", "text|label\none; two, three|a\nNA|b\n"),
        ("excel.csv", 'sep=;\r\ntext;label\r\n"one; two, three";a\r\nNA;b\r\n'),
        ("excel_quoted.csv", '"sep=\t"\ntext\tlabel\none; two, three\ta\nNA\tb\n'),
        ("bom.csv", '\ufeffsep=,\ntext,label\n"one; two, three",a\nNA,b\n'),
        ("quoted_header.csv", '"text";"label"\n"one; two, three";a\nNA;b\n'),
        ("blank_lines.csv", '\n\ntext,label\n\n"one; two, three",a\n\n\nNA,b'),
        ("old_mac.csv", 'text,label\r"one; two, three",a\rNA,b\r'),
        ("plain.tsv", "text\tlabel\none; two, three\ta\nNA\tb\n"),
        ("lines.jsonl", '{"text": "one; two, three", "label": "a"}\n{"text": "NA", "label": "b"}\n'),
        ("array.json", json.dumps(ROWS)),
        ("array.jsonl", f"\n {json.dumps(ROWS, indent=2)}\n\n"),
        ("array_by_lines.json", f"[\n{json.dumps(ROWS[0])},\n{json.dumps(ROWS[1])}\n]\n"),
    ],
)
def test_the_same_records_from_any_file(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert [{name: row[name] for name in ("text", "label")} for row in rows_of(tmp_path / name)] == ROWS


def test_values_stay_as_they_are(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,c\nnull,007,1e5\n#x, y ,NaN\n,'q',-\n")
    assert rows_of(tmp_path / "x.csv") == [
        {"a": "null", "b": "007", "c": "1e5"},
        {"a": "#x", "b": " y ", "c": "NaN"},
        {"a": "", "b": "'q'", "c": "-"},
    ]
    line = '{"a": 12345678901234567890123, "b": 1.10, "c": "2026-01-02", "d": [1, "x"], "e": null, "f": true}'
    (tmp_path / "x.jsonl").write_text(line)
    expected = {"a": 12345678901234567890123, "b": 1.1, "c": "2026-01-02", "d": [1, "x"], "e": None, "f": True}
    assert rows_of(tmp_path / "x.jsonl") == [expected]
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\n\n")
    assert [len(row["text"]) for row in rows_of(tmp_path / "long.csv")] == [200_000, 0]


def test_places_are_lines_also_after_texts_of_several_lines(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'sep=,\r\ntext,label\r\n"1\n2\r\n3",a\r\n\r\nx,b\r\n')
    assert [place.split(", ")[-1] for place, _ in read_table(tmp_path / "x.csv")] == ["line 3", "line 7"]
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": 2}]')
    assert [place.split(", ")[-1] for place, _ in read_table(tmp_path / "x.json")] == ["row 1", "row 2"]


def test_nan_in_json_is_no_value(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": NaN, "b": [NaN, "x"], "c": -Infinity}')
    assert rows_of(tmp_path / "x.jsonl") == [{"a": None, "b": [None, "x"], "c": None}]


def test_a_table_is_read_record_by_record():
    """A file of any size, and a stream that has not ended."""

    def endless():
        yield "text,label\n"
        for i in range(3):
            yield f"{i},a\n"
        raise AssertionError("read too far")

    records = read_records(endless(), "csv")
    assert [next(records)[1]["text"] for _ in range(3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "csv",
            "text,label\nx,a\ny\tb\n",
            "line 3: 1 columns where 2 are expected, separated by commas; is there text with a sep",
        ),
        ("csv", "text\tlabel\nx\ta\tb\n", "line 2: 3 columns where 2 are expected, separated by tabs"),
        ("csv", "sep=#\ntext#label\nx#a#b\n", "line 3: 3 columns where 2 are expected, separated by #"),
        (
            "tsv",
            "text\tlabel\nx\n",
            "line 2: 1 columns where 2 are expected, separated by tabs; is there text",
        ),
        ("csv", "OTHER,x,OTHER\n", "line 1: more than one column is named 'OTHER'; rename one, .*names of the columns"),
        ("csv", 'text,label\n"1\n2",a\n"x,b\n', "line 4: not a CSV record: a quote is opened and never closed"),
        ("csv", 'text,label\n"Great" film,a\n', "line 2: not a CSV record: ',' expected after '\"'"),
        ("csv", "text,label\nx,a\n\udce9t\udce9,b\n", "line 3: not UTF-8 text; save the file as UTF-8"),
        ("tsv", "text\tlabel\nx\t\udcff\n", "line 2: not UTF-8 text"),
        ("csv", 'sep="\ntext,label\n', "line 2: 2 columns where 1 are expected|line 1: not a CSV"),
        ("jsonl", '{"a": 1}\n{"a": "\udcff"}\n', "line 2: not UTF-8 text"),
        ("jsonl", '{"a": "\\ud83d"}', r"line 1: half of a surrogate pair, such as \\ud83d alone"),
        ("jsonl", '{"a": "x\\uDE00"}', "line 1: half of a surrogate pair"),
        ("jsonl", '{"\\ud83d": "x"}', "line 1: half of a surrogate pair"),
        ("jsonl", '[{"a": 1},\n{"a": "\\ud83d"}]', "row 2: half of a surrogate pair"),
        ("jsonl", '{"a": 1}\n{"a": 1,}', "line 2: not JSON: .*, column 9"),
        ("jsonl", '[{"a": 1},\n{"a" 2}]', "line 2: not JSON: Expecting ':' delimiter, column 6"),
        ("jsonl", '[{"a": 1}]\n{"a": 2}', "line 2: not JSON: Extra data"),
        ("jsonl", '{"a": 1}\n[{"a": 1}]', "line 2: not a JSON object"),
        ("jsonl", '[{"a": 1}, 2]', "row 2: not a JSON object"),
        ("jsonl", '"text"', "line 1: not a JSON object"),
        ("jsonl", f'{{"a": 1{"0" * 5000}}}', "line 1: not JSON: Exceeds the limit"),
    ],
)
@pytest.mark.hostile("table", "one line")
def test_a_wrong_line_is_named(kind, text, message):
    with pytest.raises(InputError, match=message) as error:
        list(read_records(io.StringIO(text, newline=""), kind))
    assert "\n" not in str(error.value)


def test_a_directory_and_a_lost_file(tmp_path):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(InputError, match=r"x\.csv: no such file"):
        read_table(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"y\.csv: cannot be read \(No such file or directory\)"):
        list(read_records(tmp_path / "y.csv", "csv"))


def test_parquet_has_the_values_of_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "text": ["NA", None],
        "number": [1, None],
        "label": [1.0, float("nan")],
        "tags": [["a", None], []],
        "time": pyarrow.array([0, None], pyarrow.timestamp("s")),
        "__index_level_0__": [5, 7],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet") == [
        (
            f"{tmp_path / 'x.parquet'}, row 1",
            {"text": "NA", "number": 1, "label": 1.0, "tags": ["a", None], "time": "1970-01-01 00:00:00"},
        ),
        (
            f"{tmp_path / 'x.parquet'}, row 2",
            {"text": None, "number": None, "label": None, "tags": [], "time": None},
        ),
    ]


def test_lines_are_texts_or_pairs():
    assert [texts for texts, _ in read_texts(io.StringIO("a\n\nb,c\n"), "lines", [])] == [("a",), ("",), ("b,c",)]
    assert [texts for texts, _ in read_texts(io.StringIO("a\tb\r\n\tc"), "lines", [])] == [("a", "b"), ("", "c")]


FORMULAS = ["=1+1", "+A1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1"]


def test_a_csv_holds_no_formulas():
    writer = TableWriter("csv")
    for formula in FORMULAS:
        text = writer.text({"text": formula, "other": "x=1"}, {"prediction": formula})
        assert text.count(f"'{formula}") == 2
    for number in ("-1", "+4.5", "-1e-05", "-1,000.5", "-"):
        (row,) = csv.reader([writer.text({"text": number, "other": ""}, {"prediction": -0.5})])
        assert row == [number, "", "-0.5"]
    assert TableWriter("csv").text({"=x": "a"}, {"prediction": 1}) == "'=x,prediction\na,1\n"
    assert json.loads(TableWriter("jsonl").text({"text": "=1+1"}, {"prediction": "@a"}))["text"] == "=1+1"


def test_a_tsv_holds_no_control_characters():
    line = TableWriter("tsv").text({}, {"prediction": "\x1b[31mred\x9b0m\tb\nc\u202e", "exit_layer": 1})
    assert line == "\\x1b[31mred\\x9b0m\\tb\\nc\\u202e\t1\n"
    assert TableWriter("tsv").text({}, {"prediction": "größer 👍🏽 \u200d"}) == "größer 👍🏽 \u200d\n"
