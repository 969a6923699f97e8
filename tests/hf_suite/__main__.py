"""Hugging Face's own model tests on our encoders: fetched, run, and counted beside those of the stock classes.

`bash scripts/run_tests.sh --hf-suite` runs all of `suite.py`; `--hf-suite bert_stock bert_exits` runs these test cases.
The tests come from the source distribution of the installed transformers, by pip, and stay in the user's cache folder.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deebert"
VARIANTS = ("stock", "never", "exits")
OUTCOMES = ("failed", "skipped", "passed")  # of a test with several reports the first of these


def fetch() -> Path:
    """The folder with their tests, a package. Raises CalledProcessError where pip does not get them."""
    folder = CACHE / f"transformers_tests_{version('transformers').replace('.', '_')}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        wanted = ["--no-deps", "--no-binary", "transformers", f"transformers=={version('transformers')}"]
        subprocess.run([*pip, "--dest", temporary, *wanted], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpacked = Path(temporary) / "tests"
        unpacked.mkdir()
        with tarfile.open(archive) as members:
            for member in members:
                path = PurePosixPath(member.name)
                if path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                    (unpacked / path.name).write_bytes(members.extractfile(member).read())
        (unpacked / "__init__.py").touch()
        shutil.move(unpacked, folder)
    return folder


class Results:
    """A plugin of pytest: the outcome of each test of each case, and why it was skipped."""

    def __init__(self):
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)  # case -> test -> outcome
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped and hasattr(report, "context"):
            return  # a part of a test: pytest calls it a subtest
        _, case, test = report.nodeid.split("::")
        outcomes = self.outcomes[case]
        outcomes[test] = min(report.outcome, outcomes.get(test, "passed"), key=OUTCOMES.index)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[case, test] = report.longrepr[2].removeprefix("Skipped: ")

    def table(self) -> list[str]:
        """Counts of the outcomes, a line for each encoder."""
        encoders = dict.fromkeys(case.rpartition("_")[0] for case in self.outcomes)
        lines = ["| encoder | " + " | ".join(f"{x}: passed, failed, skipped" for x in VARIANTS) + " |"]
        lines.append("| --- |" + " ---: |" * len(VARIANTS))
        for encoder in encoders:
            counts = [Counter(self.outcomes.get(f"{encoder}_{x}", {}).values()) for x in VARIANTS]
            cells = [f"{count['passed']}, {count['failed']}, {count['skipped']}" if count else "" for count in counts]
            lines.append(f"| {encoder} | " + " | ".join(cells) + " |")
        return lines

    def only_ours(self, outcome: str) -> dict[str, list[str]]:
        """Tests with this outcome for ours and another for the stock classes, with the cases."""
        tests = defaultdict(list)
        for case, outcomes in self.outcomes.items():
            stock = self.outcomes.get(f"{case.rpartition('_')[0]}_stock", {} if outcome == "failed" else outcomes)
            for test in outcomes:
                if outcomes[test] == outcome != stock.get(test):
                    tests[f"{test}: {self.reasons.get((case, test), '')}"].append(case)
        return tests


def main(cases: list[str]) -> int:
    begun = time.monotonic()
    try:
        os.environ["HF_TESTS"] = str(fetch())
    except subprocess.CalledProcessError:
        print(f"Hugging Face's tests are not run: no source of transformers {version('transformers')}, see above")
        return 0 if os.environ.get("CI") else 1
    os.environ["RUN_TRAINING_TESTS"] = "1"
    results, suite = Results(), str(Path(__file__).with_name("suite.py"))
    chosen = [f"{suite}::{case}" for case in cases] or [suite]
    pytest.main(
        ["-q", "-n", "auto", "--tb=short", "-W", "ignore", "-o", "verbosity_subtests=0", *chosen], plugins=[results]
    )
    print("\n".join(results.table()))
    for outcome in ("failed", "skipped"):
        for test, where in results.only_ours(outcome).items():
            print(f"{outcome}, and not with the stock classes: {test} ({', '.join(where)})")
    print(f"{time.monotonic() - begun:.0f} seconds")
    return 1 if results.only_ours("failed") or not results.outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
