"""The results of the mutants: a line of JSON each, a table, and the survivors to read."""

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from making import Mutant  # needs mutmut

EQUIVALENT = Path(__file__).with_name("equivalent.txt")


class Results:
    """What is known of mutants, in a file that grows. A result counts as long as the mutated file stays the same."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file, self.known = folder, folder / "results.jsonl", {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            record = json.loads(line)
            self.known[record["name"], record.get("code")] = record

    def outcome(self, mutant: "Mutant") -> str | None:
        """killed, survived, timeout, or None."""
        return self.known.get(key_of(mutant), {}).get("outcome")

    def seconds_of(self, test: str) -> float | None:
        """How long a file of tests takes without a fault."""
        return self.known.get((test, None), {}).get("seconds")

    def add_test(self, test: str, seconds: float) -> None:
        self.write({"name": test, "seconds": seconds})
        print(f"no fault {seconds:6.1f} s  {test}", flush=True)

    def add(self, mutant: "Mutant", outcome: str, seconds: float, found_by: str) -> None:
        name, code = key_of(mutant)
        self.write({"name": name, "code": code, "outcome": outcome, "seconds": seconds, "found_by": found_by})
        path, *changes = mutant.diff.splitlines()
        print(f"{outcome:8} {seconds:6.1f} s  {path}:{mutant.line}  {'  '.join(changes)[:160]}", flush=True)

    def write(self, record: dict) -> None:
        self.known[record["name"], record.get("code")] = record
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def key_of(mutant: "Mutant") -> tuple[str, int]:
    return mutant.name, zlib.crc32(mutant.module.code.encode())


def equivalent() -> set[str]:
    """The differences that are no fault: blocks of EQUIVALENT without their reasons."""
    blocks = EQUIVALENT.read_text(encoding="utf-8").strip().split("\n\n")
    diffs = ("\n".join(line for line in block.splitlines() if not line.startswith("#")) for block in blocks)
    return {diff for diff in diffs if diff}


def report(drawn: list["Mutant"], results: Results) -> None:
    """Prints the table and writes the survivors that are not named as equivalent."""
    from scipy.stats import binomtest  # torch is imported before it

    named, counts, survivors, faults = equivalent(), {}, [], 0
    for mutant in drawn:
        outcome = results.outcome(mutant)
        if outcome == "survived" and mutant.diff in named:
            outcome = "equivalent"
        if outcome == "survived":
            survivors.append(f"# line {mutant.line}\n{mutant.diff}\n")
        for name in (mutant.path, "all"):
            counts.setdefault(name, Counter())[outcome] += 1
    print("\n| file | mutants | killed | hang | survived | equivalent | score |\n|" + " --- |" + " ---: |" * 6)
    for name, of in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        found, faults = of["killed"] + of["timeout"], of.total() - of["equivalent"]
        score = f"{100 * found / faults:.1f} %" if faults else ""
        columns = (name, of.total(), of["killed"], of["timeout"], of["survived"], of["equivalent"], score)
        print("| " + " | ".join(map(str, columns)) + " |")
    if faults:
        low, high = binomtest(found, faults).proportion_ci(method="wilson")
        print(f"\nfound: {found} of {faults}; of all mutants {100 * low:.1f} to {100 * high:.1f} % (95 %, Wilson)")
    file = results.folder / "survivors.txt"
    file.write_text("\n".join(survivors), encoding="utf-8")
    print(f"{len(survivors)} survivors, to read in {file}")
