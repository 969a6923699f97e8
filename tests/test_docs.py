"""The pages say what is true: snippets run; files, scripts, commands, flags and settings that they name exist."""

import re
import runpy
import shutil
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
from support import reference
from support.helpers import ROOT
from support.tiny import tiny_model, tiny_tokenizer

from deebert import Classifier
from deebert.__main__ import COMMANDS
from deebert.modeling.exit_rules import EXIT_RULES
from deebert.training.strategies import STRATEGIES

README, CHANGELOG, RESULTS = ROOT / "README.md", ROOT / "docs" / "CHANGELOG.md", ROOT / "docs" / "results.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for folder in ("deebert", "scripts", "tests") for path in (ROOT / folder).rglob("*.*")]
CODE.append(ROOT / "run_glue_deebert.py")

OWN_FLAGS = (  # scripts with flags
    *("sample_data", "paper/predict_glue", "paper/reproduce_paper"),
    *(
        f"studies/{name}"
        for name in (
            "compare",
            "benchmark",
            "benchmark_training",
            "frontier",
            "static_models",
            "threshold_coverage",
            "frozen_encoder",
        )
    ),
)
FLAGS_OF_TESTS = {"--faults", "--fuzz", "--hf-suite", "--mutants", "--slow"}
FLAGS_OF_OTHERS = {"--help", "--logdir", "--standalone", "--nproc_per_node", *FLAGS_OF_TESTS}
FLAGS_OF_THE_ORIGINAL = {"--local_rank"}  # gone here
FILES_OF_BEFORE = {"measure_evaluation.py"}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The line numbers and the text of a page's code blocks."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, small_exports) -> Path:
    """A folder in which the snippets find the quickstart's model, a tiny one, and an export of one still smaller."""
    folder = tmp_path_factory.mktemp("docs")
    model, tokenizer = tiny_model("bert", num_hidden_layers=6), tiny_tokenizer("bert")
    model.save_pretrained(folder / "quickstart" / "saved_model")
    tokenizer.save_pretrained(folder / "quickstart" / "saved_model")
    shutil.copytree(small_exports / "onnx", folder / "quickstart" / "onnx")
    return folder


TRAINS = ROOT / "docs/train_from_python.md"  # tests/training runs it, on data that it can learn


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != TRAINS], ids=named)
def test_python_snippets_run(page, quickstart, monkeypatch):
    """A page's snippets run one after another, and share their names."""
    monkeypatch.chdir(quickstart)
    names = {"__name__": "snippet"}
    with patch.dict(EXIT_RULES), patch.dict(STRATEGIES):  # the page on design adds one to each
        for line, source in blocks(page, "python"):
            exec(compile("\n" * line + source, str(page), "exec"), names)


def test_predictions_are_what_the_readme_says(quickstart):
    prediction = Classifier(str(quickstart / "quickstart" / "onnx"), exit_threshold=0.4)(["A triumph."])[0]
    fields = ["label", "probability", "exit_layer", "probabilities", "truncated", "handed_over"]
    assert list(vars(prediction)) == fields


def test_the_readme_fits_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (heading and heading not in headings(target)):
            broken.append(link)
    assert broken == []


def headings(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_can_be_reached_from_the_map():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if page.name != "README.md" and f"({page.name}" not in text] == []


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags in the --help texts of the driver, the commands and the scripts."""
    runs = [("run_glue_deebert.py",), *(("deebert/__main__.py", command) for command in COMMANDS)]
    runs += [(f"scripts/{name}.py",) for name in OWN_FLAGS]
    flags = [set(re.findall(r"--[a-z]\w*", help_of(*command))) for command in runs]
    assert all(flags)
    return set().union(*flags)


def help_of(program: str, *arguments: str) -> str:
    """What a program prints for --help."""
    with (
        patch.object(sys, "argv", [program, *arguments, "--help"]),
        patch.object(sys, "path", [str((ROOT / program).parent), str(ROOT), *sys.path]),
        redirect_stdout(StringIO()) as written,
        suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    return written.getvalue()


def test_help_names_the_command_that_was_called():
    assert help_of("deebert/__main__.py").startswith("usage: python -m deebert COMMAND ...")
    assert help_of("deebert/__main__.py", "plot").startswith("usage: python -m deebert plot [-h]")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_flags_exist(page, known_flags):
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
    assert flags - known_flags - FLAGS_OF_OTHERS - FLAGS_OF_THE_ORIGINAL == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_settings_exist(page):
    """Scripts, modules and settings from the environment that a page names, with or without their folder."""
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"[\w/]+\.(?:sh|py)\b", text))
    missing = {name for name in files if not any(path.as_posix().endswith(f"/{name}") for path in CODE)}
    assert {name for name in missing if Path(name).name not in FILES_OF_BEFORE} == set()
    sources = "\n".join(path.read_text(encoding="utf-8") for path in CODE if path.suffix in (".sh", ".py"))
    settings = set(re.findall(r"\b([A-Z][A-Z_]+)=", text))
    assert {name for name in settings if not re.search(rf"\b{name}\b", sources)} == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:`|-m )deebert ([a-z][a-z-]*)", text))
    assert commands - set(COMMANDS) == set()
    if page != CHANGELOG:  # which names modules of before
        modules = set(re.findall(r"\bdeebert(?:\.[a-z_]+)+\b", text))
        places = {name: ROOT / name.replace(".", "/") for name in modules}
        assert {name for name, at in places.items() if not (at.is_dir() or at.with_suffix(".py").is_file())} == set()


def table_rows(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_repeats_what_was_measured():
    """Its table is a part of one in docs/results.md: threshold, score, change, cost, time saved."""
    measured = [[*row[:3], row[4], row[6]] for row in table_rows(RESULTS) if len(row) == 7]
    rows = [row for row in table_rows(README) if len(row) == 5 and re.fullmatch(r"0\.\d", row[0])]
    assert len(rows) == 6
    assert [row for row in rows if row not in measured] == []


def test_the_reference_is_that_of_the_docstrings():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python tests/support/reference.py"
