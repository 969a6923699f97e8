"""The rooms of the code (design, section 3): their doors open one way, and nothing stands outside."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from support.helpers import ROOT

ROOMS = [  # by floors, from the ground up: a module imports from its own room and from lower floors
    ("deebert.utils",),
    ("deebert.modeling", "deebert.data"),
    ("deebert.training", "deebert.evaluation", "deebert.runtime"),
    ("deebert.experiment",),
    ("deebert.commands",),
    ("deebert",),  # the public names, the console command and the names of older versions
    ("run_glue_deebert",),
    ("scripts",),
    ("scripts.studies", "scripts.paper"),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
SCRIPTS = {  # they import each other by their file's name
    path.stem: ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "scripts").rglob("*.py")
}
TOP = [
    "deebert",
    "scripts",
    "tests",
    "docs",
    "run_glue_deebert.py",
    "requirements.txt",
    "setup.py",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
]


def room_of(name: str) -> str | None:
    """The room of a module, or of a name that is imported from one; None for what is not this project's."""
    first, *rest = name.split(".")
    if first in SCRIPTS:
        return SCRIPTS[first]
    if name == "deebert.__version__" or first not in FLOOR:
        return None
    return f"{first}.{rest[0]}" if rest and (ROOT / first / rest[0]).is_dir() else first


def imports(source: str) -> list[str]:
    """The dotted names that a module imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name != "deebert"]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "deebert":
            names.append(f"deebert.{node.attr}")  # after `import deebert`
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names += [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    return names


def wrong_imports(room: str, source: str) -> list[str]:
    """The imports of a module in `room` that run upward, into another room of the same floor, or are relative."""
    return [
        name
        for name in imports(source)
        if name.startswith(".") or (room_of(name) not in (None, room) and FLOOR[room_of(name)] >= FLOOR[room])
    ]


def test_imports_run_downward():
    paths = [*(ROOT / "deebert").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "run_glue_deebert.py"]
    wrong = {}
    for path in (path.relative_to(ROOT) for path in paths):
        room = room_of(path.stem if path.parts[0] == "scripts" else ".".join(path.with_suffix("").parts))
        wrong[str(path)] = wrong_imports(room, (ROOT / path).read_text(encoding="utf-8"))
    assert len(wrong) > 20
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("deebert.utils", "import deebert.data.tasks", ["deebert.data.tasks"]),
        ("deebert.data", "from deebert.modeling import bert", ["deebert.modeling.bert"]),
        ("deebert.training", "def f():\n    from deebert.runtime.x import y", ["deebert.runtime.x.y"]),
        ("deebert.training", "from deebert import OnnxDeeBert, __version__", ["deebert.OnnxDeeBert"]),
        ("deebert.runtime", "import deebert\ndeebert.OnnxDeeBert, deebert.__version__", ["deebert.OnnxDeeBert"]),
        ("deebert.commands", "importlib.import_module('run_glue_deebert')", ["run_glue_deebert"]),
        ("deebert.experiment", "import torch, compare", ["compare"]),
        ("deebert.data", "from .tasks import TASKS", [".tasks.TASKS"]),
        ("deebert.training", "from deebert.data import tasks\nfrom deebert.training import stage", []),
        ("scripts", "import sample_data, run_glue_deebert\nfrom deebert import runtime", []),
        ("scripts.studies", "import compare, run_glue_deebert, reproduce_paper", ["reproduce_paper"]),
    ],
)
def test_a_wrong_import_is_noticed(room, source, wrong):
    assert wrong_imports(room, source) == wrong


def test_the_top_level_is_that_of_the_design():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in files}
    assert "deebert" in top
    assert [name for name in sorted(top) if name not in [*TOP, "LICENSE"] and not name.startswith(".")] == []


def test_the_tree_of_the_design_is_that_of_the_package():
    """docs/design.md names every file of the package, room by room; remarks stand in parentheses."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    tree = re.sub(
        r"\([^()]*\)", "", re.search(r"^deebert/\n(.*?)^run_glue_deebert\.py", page, re.DOTALL | re.MULTILINE)[1]
    )
    named = set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE))
    for room, names in re.findall(r"^  (\w+)/(.*?)(?=^  \w|\Z)", tree, re.DOTALL | re.MULTILINE):
        named |= {f"{room}/{name}" for name in re.findall(r"[^,\s]+", names)}
    there = {path.name for path in (ROOT / "deebert").glob("*.py")}
    for path in (ROOT / "deebert").glob("*/*"):
        if path.suffix == ".py" and path.stem != "__init__":
            there.add(f"{path.parent.name}/{path.stem}")
        elif (path / "__init__.py").is_file():
            there.add(f"{path.parent.name}/{path.name}/")
    assert named == there


@pytest.mark.parametrize("command", ["-m deebert plot x", "run_glue_deebert.py --help"])
def test_a_python_without_packages_gets_one_line(command):
    """-S: Python's own library only, as where an environment is not activated."""
    done = subprocess.run([sys.executable, "-S", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \w+ is missing: activate your environment, or .*\n", done.stderr)


def test_figures_need_neither_torch_nor_a_model():
    code = "import sys, deebert, deebert.commands.plot; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "deebert.evaluation.plotting" in modules
    assert not modules & {"torch", "transformers", "deebert.modeling.classifier", "deebert.data", "deebert.runtime"}
