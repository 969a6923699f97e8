"""Tiny test files of all nine GLUE tasks and the diagnostic set, with the columns of GLUE's download."""

from pathlib import Path

from support.tiny import sentences

BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
LABELS = {  # GLUE's words for a task's labels; () for a number
    **dict.fromkeys(("CoLA", "SST-2", "MRPC", "QQP", "WNLI"), BINARY),
    **dict.fromkeys(("QNLI", "RTE"), ENTAILMENT),
    "MNLI": ("contradiction", "entailment", "neutral"),
    "STS-B": (),
}
PAIR = ("sentence1", "sentence2")
MNLI = ("index", "promptID", "pairID", "sentence1_parse", *PAIR, "genre")
TEST_FILES = {  # name in a submission: file, columns, those of the texts
    "CoLA": ("CoLA/test.tsv", ("index", "sentence"), ("sentence",)),
    "SST-2": ("SST-2/test.tsv", ("index", "sentence"), ("sentence",)),
    "MRPC": ("MRPC/test.tsv", ("index", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("#1 String", "#2 String")),
    "STS-B": ("STS-B/test.tsv", ("index", "genre", "year", "old_index", *PAIR), PAIR),
    "QQP": ("QQP/test.tsv", ("id", "question1", "question2"), ("question1", "question2")),
    "MNLI-m": ("MNLI/test_matched.tsv", MNLI, PAIR),
    "MNLI-mm": ("MNLI/test_mismatched.tsv", MNLI, PAIR),
    "AX": ("diagnostic/diagnostic.tsv", ("index", *PAIR), PAIR),
    "QNLI": ("QNLI/test.tsv", ("index", "question", "sentence"), ("question", "sentence")),
    "RTE": ("RTE/test.tsv", ("index", *PAIR), PAIR),
    "WNLI": ("WNLI/test.tsv", ("index", *PAIR), PAIR),
}


def texts_of(name: str, lines: int = 12) -> list[tuple[str, ...]]:
    """The texts of a test set; a quote character is text."""
    *_, text_columns = TEST_FILES[name]
    seed = list(TEST_FILES).index(name)
    parts = [[f'"{text}' for text, _ in sentences(lines, seed + 100 * i)] for i in range(len(text_columns))]
    return list(zip(*parts, strict=True))


def write_test_files(root: Path) -> Path:
    """Writes all of them to root / the task's folder; other columns hold a letter."""
    for name, (file, columns, text_columns) in TEST_FILES.items():
        lines = ["\t".join(columns)]
        for index, texts in enumerate(texts_of(name)):
            known = {columns[0]: str(index)} | dict(zip(text_columns, texts, strict=True))
            lines.append("\t".join(known.get(column, "x") for column in columns))
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
