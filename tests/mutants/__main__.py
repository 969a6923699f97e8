"""Do the tests bite? Puts faults into the code, one at a time, and counts those that the tests find.

`bash scripts/run_tests.sh --mutants 400` draws 400. A number draws the same ones each time, a greater number the same
ones and more. What has a result in --out is not tried again: a run that was stopped goes on, and a sample can grow.
"""

import argparse
import gc
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")  # before torch is imported

import pytest
from hypothesis import Phase, settings
from making import Mutant, mutants_of
from report import Results, report
from scope import IMPORTS, LEFT_OUT, TESTS

ROOT = Path(__file__).parents[2]
COPIED = "deebert scripts tests docs README.md run_glue_deebert.py requirements.txt setup.py .pytest.ini .ruff.toml"
MTIMES = itertools.count(1_000_000_000)  # a new one, in seconds, for each text of a file: Python's bytecode has it


class Trial:
    """Tests in a process of their own and in a copy of the code, with one fault in it, or with none."""

    def __init__(self, copy: Path, tests: Sequence[str], mutant: Mutant | None = None, seconds: float = float("inf")):
        self.copy, self.tests, self.mutant, self.seconds = copy, tests, mutant, seconds
        self.begun, self.output = time.monotonic(), copy / "output.txt"
        if mutant:
            self.write(mutant.code)
        self.process = multiprocessing.get_context("fork").Process(target=self.run)
        self.process.start()

    def write(self, code: str) -> None:
        file = self.copy / self.mutant.path
        file.write_text(code, encoding="utf-8")
        os.utime(file, (mtime := next(MTIMES), mtime))

    def run(self) -> None:
        os.setsid()  # a group of processes, which ends with all that the tests have started
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(self.copy)
        with self.output.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        phases = (Phase.explicit, Phase.generate)  # none that looks for a simpler example, which takes minutes
        settings.register_profile("mutants", deadline=None, derandomize=True, phases=phases)
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
        options += ["--basetemp", str(self.copy / "temporary"), *(f"--deselect={test}" for test in LEFT_OUT)]
        os._exit(pytest.main([*options, *self.tests]))

    def outcome(self) -> str | None:
        """None while the tests run."""
        hangs = time.monotonic() - self.begun > self.seconds
        if not hangs and self.process.is_alive():
            return None
        self.took = round(time.monotonic() - self.begun, 1)
        self.end()
        if self.mutant:
            self.write(self.mutant.module.code)
        return "timeout" if hangs else "killed" if self.process.exitcode else "survived"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what its tests started and left
        self.process.join()

    def found_by(self) -> str:
        """The last line that names a test that failed."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.startswith(("FAILED", "ERROR"))), "")[:200]


def run_trials(trials: Iterator[Callable[[Path], Trial]], copies: list[Path]) -> Iterator[tuple[Trial, str]]:
    """As many at a time as there are copies. trials: of functions from a copy to a trial. Yields those that ended."""
    free, running = list(copies), []
    try:
        while True:
            while free and (begin := next(trials, None)):
                running.append(begin(free.pop()))
            if not running:
                return
            for trial in list(running):
                if (outcome := trial.outcome()) is not None:
                    running.remove(trial)
                    yield trial, outcome
                    free.append(trial.copy)
            time.sleep(0.05)
    finally:
        for trial in running:
            trial.end()


def try_mutants(mutants: list[Mutant], results: Results, copies: list[Path]) -> None:
    needed = dict.fromkeys(test for mutant in mutants for test in TESTS[mutant.path])
    without_fault = (test for test in needed if results.seconds_of(test) is None)
    for trial, outcome in run_trials((lambda copy, t=test: Trial(copy, [t]) for test in without_fault), copies):
        if outcome != "survived":
            sys.exit(
                f"error: without a fault fails {trial.found_by()}; see {shutil.copy(trial.output, results.folder)}"
            )
        results.add_test(trial.tests[0], trial.took)

    def begin(mutant: Mutant) -> Callable[[Path], Trial]:
        tests = TESTS[mutant.path]
        limit = 60 + 3 * sum(map(results.seconds_of, tests))
        return lambda copy: Trial(copy, tests, mutant, limit)

    for trial, outcome in run_trials(map(begin, mutants), copies):
        results.add(trial.mutant, outcome, trial.took, trial.found_by())


def count(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="run_tests.sh --mutants", description=__doc__)
    parser.add_argument("mutants", type=count, help="how many are drawn, or all")
    parser.add_argument(
        "--out", type=Path, default=Path("mutation"), help="the folder of the results (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (default: one for each core)")
    parser.add_argument("--again", action="store_true", help="try the survivors of this sample again, with new tests")
    args = parser.parse_args()
    everything = sorted((one for path in TESTS for one in mutants_of(ROOT, path)), key=lambda one: one.name)
    drawn = list(itertools.islice((one for one in everything if one.is_a_fault), args.mutants))
    results = Results(args.out)
    left = [one for one in drawn if results.outcome(one) in ((None, "survived") if args.again else (None,))]
    print(
        f"{len(everything):,} mutants, of which {len(drawn):,} are drawn and {len(left):,} have no result", flush=True
    )
    if left:
        for name in IMPORTS:
            importlib.import_module(name)
        gc.freeze()  # processes share this memory
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copies = [Path(folder, str(number)) for number in range(args.jobs)]
            for copy, name in itertools.product(copies, COPIED.split()):
                kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy.mkdir(exist_ok=True)
                kind(ROOT / name, copy / name)
            try_mutants(left, results, copies)
    report(drawn, results)


if __name__ == "__main__":
    main()
