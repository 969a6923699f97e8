"""Reading TSV files with their quirks, labels and metrics."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from deebert.data.tasks import TASKS, Example, Task, get_task, label_order, names_other_labels
from deebert.evaluation.metrics import scores
from deebert.utils.errors import InputError


def write(folder, split: str, text: str):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize(
    ("task", "lines", "expected"),
    [
        (
            "CoLA",
            ["gj04\t0\t*\tThey drank the pub.", "gj04\t1\t\tHe ran."],
            [("They drank the pub.", 0), ("He ran.", 1)],
        ),
        ("SST-2", ["sentence\tlabel", '"quoted , never closed \t1'], [('"quoted , never closed ', 1)]),
        (
            "MRPC",
            ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r", "1\t7\t8\tHe said \"no\t' yes\r"],
            [('He said "no', "' yes", 1)],
        ),
        ("STS-B", ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\tA\tB\t3.80"], [("A", "B", 3.8)]),
        (
            "QQP",
            ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ttoo short", "4\t5\t6\tA?\tB?\t1"],
            [("A?", "B?", 1)],
        ),
        ("MNLI", ["sentence1\tsentence2\tlabel1\tgold_label", "A\tB\tneutral\tentailment"], [("A", "B", 1)]),
        ("QNLI", ["index\tquestion\tsentence\tlabel", "0\tA?\tB\tnot_entailment"], [("A?", "B", 1)]),
        ("RTE", ["sentence1\tsentence2\tlabel", "A\u2028A\tB\tentailment"], [("A\u2028A", "B", 0)]),
        ("WNLI", ["index\tsentence1\tsentence2\tlabel", "0\tA\tB\t0", ""], [("A", "B", 0)]),
    ],
)
def test_every_tasks_train_file(tmp_path, task, lines, expected, capsys):
    folder = write(tmp_path / task, "train", "\n".join(lines) + "\n")
    expected = [Example(tuple(texts), label) for *texts, label in expected]
    assert get_task(task).read(folder, "train") == expected
    assert ("skipped 1 short rows" in capsys.readouterr().out) == (task == "QQP")


def test_test_files_have_no_labels_and_cola_then_has_a_header(tmp_path):
    folder = write(tmp_path, "test", "index\tsentence\n0\tSome text\n")
    assert get_task("CoLA").read(folder, "test") == [Example(("Some text",), None)]


def test_short_rows_of_a_test_file_are_kept_because_each_line_needs_a_prediction(tmp_path, capsys):
    folder = write(tmp_path, "test", "id\tquestion1\tquestion2\n0\tA?\n1\tA?\tB?\n")
    assert get_task("QQP").read(folder, "test") == [Example(("A?", ""), None), Example(("A?", "B?"), None)]
    assert "filled up 1 short rows" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["MNLI", "diagnostic"])
def test_the_diagnostic_set_is_beside_mnli_or_in_it(tmp_path, place):
    (tmp_path / "MNLI").mkdir()
    write(tmp_path / place, "diagnostic", "index\tsentence1\tsentence2\n0\tA\tB\n")
    assert get_task("MNLI").read(tmp_path / "MNLI", "diagnostic") == [Example(("A", "B"), None)]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("SST-2", "sentence\tpolarity\nx\t1\n", r"dev.tsv, line 1: no column 'label'; the file has sentence, polarity"),
        ("MRPC", "Quality\tA\tB\n", r"line 1: no column '#1 String', '#2 String'"),
        ("SST-2", "sentence\tlabel\nx\t1\n\ny\tyes\n", r"dev.tsv, line 4: unknown label 'yes'; the task has 0, 1"),
        ("RTE", "sentence1\tsentence2\tlabel\nx\ty\n", r"line 2: 2 columns where 3 are expected"),
        ("STS-B", "sentence1\tsentence2\tscore\nx\ty\tnan\n", r"line 2: 'nan' is not a number"),
        ("SST-2", "sentence\tlabel\n", r"dev.tsv: no examples"),
        ("SST-2", "", r"dev.tsv, line 1: no column 'sentence', 'label'; the file has none"),
    ],
)
@pytest.mark.hostile("GLUE file", "one line")
def test_bad_files_are_reported_with_file_and_line(tmp_path, task, text, message):
    with pytest.raises(InputError, match=message):
        get_task(task).read(write(tmp_path, "dev", text), "dev")


def test_missing_and_binary_files_are_reported(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        get_task("RTE").read(tmp_path / "none", "dev")
    with pytest.raises(InputError, match=r"dev.tsv: no such file"):
        get_task("RTE").read(tmp_path, "dev")
    (tmp_path / "dev.tsv").write_bytes(b"sentence1\tsentence2\tlabel\n\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        get_task("RTE").read(tmp_path, "dev")


def test_task_names():
    assert get_task("mrpc") is TASKS["MRPC"]
    assert get_task("MNLI-MM") is TASKS["MNLI"]
    with pytest.raises(InputError, match="IMDB: no such GLUE task; choose one of CoLA"):
        get_task("IMDB")


def test_label_order():
    mnli, rte = TASKS["MNLI"], TASKS["RTE"]
    assert label_order(mnli, "bert") == ("contradiction", "entailment", "neutral")
    assert label_order(mnli, "roberta") == ("contradiction", "neutral", "entailment")
    assert label_order(rte, "roberta", {0: "LABEL_0", 1: "LABEL_1"}) == ("entailment", "not_entailment")
    named = {0: "neutral", 1: "contradiction", 2: "entailment"}
    assert label_order(mnli, "roberta", named) == ("neutral", "contradiction", "entailment")


@pytest.mark.parametrize(
    ("labels", "names", "order"),
    [
        (("NEGATIVE", "POSITIVE"), ("positive", "negative"), ("POSITIVE", "NEGATIVE")),
        (("no", "yes"), ("Yes ", "NO"), ("yes", "no")),
        (("0", "1"), (1, 0), ("1", "0")),
        (("Yes", "yes"), ("yes", "Yes"), ("yes", "Yes")),
        (("Yes", "yes"), ("YES", "no"), None),
        (("no", "yes"), ("negative", "positive"), None),
        (("no", "yes"), ("no", "no"), None),
        (("no", "yes"), ("no", "yes", "other"), None),
        (("no", "yes", "other"), ("no", "yes"), None),
        (("no", "yes"), ("LABEL_0", "LABEL_1"), ()),
        ((), ("LABEL_0",), ()),
        ((), ("stars",), ()),
    ],
)
def test_names_of_a_classifier_match_the_labels_in_any_case(labels, names, order):
    """order: of the outputs; None: the names are those of another task; (): there are no names."""
    task, id2label = Task("own", ("text",), "label", labels), dict(enumerate(names))
    assert label_order(task, "bert", id2label) == (order or labels)
    assert names_other_labels(task, id2label) == (order is None)


def test_primary_and_secondary_metrics():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 50), rng.normal(size=(50, 2))
    predictions = logits.argmax(1)
    f1, acc = f1_score(labels, predictions), (labels == predictions).mean()
    for task, expected in {
        "MRPC": {"f1": f1, "acc": acc},
        "QQP": {"f1": f1, "acc": acc},
        "CoLA": {"mcc": matthews_corrcoef(labels, predictions)},
        **{task: {"acc": acc} for task in ("SST-2", "QNLI", "RTE", "WNLI", "MNLI")},
    }.items():
        metrics = scores(TASKS[task], logits, labels)
        assert metrics == pytest.approx(expected)
        assert list(metrics) == list(expected)  # the primary one first
    values, targets = logits[:, :1], rng.normal(size=50)
    assert scores(TASKS["STS-B"], values, targets) == pytest.approx(
        {"spearmanr": spearmanr(values[:, 0], targets)[0], "pearson": pearsonr(values[:, 0], targets)[0]}
    )


def test_undefined_scores_are_zero():
    assert scores(TASKS["STS-B"], np.ones((5, 1)), np.arange(5.0)) == {"spearmanr": 0, "pearson": 0}
    assert scores(TASKS["STS-B"], np.ones((1, 1)), np.ones(1)) == {"spearmanr": 0, "pearson": 0}
    assert scores(TASKS["MRPC"], np.array([[1.0, 0.0]]), np.array([0])) == {"f1": 0, "acc": 1}
