"""Which tests look for faults in a file, and what is remembered of faults: `run_tests.sh --mutants N` makes them."""

from types import SimpleNamespace

from helpers import ROOT
from report import Results, equivalent
from scope import LEFT_OUT, TESTS

FILES = (
    *("evaluation/threshold_selection.py", "evaluation/risk_control.py", "training/strategies.py"),
    *("training/losses.py", "training/checkpointing.py", "data/batching.py"),
)


def test_every_file_in_scope_has_tests_that_exist():
    package = ROOT / "deebert"
    files = [*package.glob("modeling/**/*.py"), *(package / name for name in FILES)]
    assert set(TESTS) == {str(file.relative_to(ROOT)) for file in files if file.stat().st_size}
    for path, tests in {**TESTS, "left out": LEFT_OUT}.items():
        assert tests, path
        for file, _, test in (name.partition("::") for name in tests):
            assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (path, file, test)


def test_what_is_named_as_equivalent_is_in_the_code():
    for path, *changes in (block.splitlines() for block in equivalent()):
        code = {line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()}
        assert {line[2:] for line in changes if line.startswith("-")} <= code, f"{path}: remove it from equivalent.txt"


def test_a_result_counts_until_its_file_changes(tmp_path, capsys):
    def mutant(code: str) -> SimpleNamespace:
        return SimpleNamespace(name="a", module=SimpleNamespace(code=code), diff="file.py\n- a < b\n+ a <= b", line=1)

    Results(tmp_path).add(mutant("a < b"), "survived", 1.5, "")
    Results(tmp_path).add(mutant("a < b"), "killed", 0.5, "FAILED tests/test_a.py")
    assert "file.py:1  - a < b  + a <= b" in capsys.readouterr().out
    results = Results(tmp_path)
    assert results.outcome(mutant("a < b")) == "killed"
    assert results.outcome(mutant("a < b  # why")) is None
