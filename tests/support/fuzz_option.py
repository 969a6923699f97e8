"""The option --fuzz of pytest: how many cases are tried, and the table at the end. Without it a slice runs."""

from collections import Counter
from collections.abc import Mapping
from math import ceil
from pathlib import Path

HERE = Path(__file__).parents[1] / "fuzz"
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert", "mpnet")
RUNTIMES = 4  # of an example, so that it counts as as many cases
SLICE, SLICE_OF_GRAPH = 6, 8  # examples for each encoder, and for each of the suite's graphs
ON_GRAPHS = 0.3  # the share of cases in ONNX Runtime
OF_PART, OF_GRAPH = 40, 108  # examples at most


def pytest_addoption(parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="run at least N cases of tests/fuzz, alone")


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    related = collection_path in HERE.parents or collection_path == HERE or HERE in collection_path.parents
    return True if config.getoption("fuzz") and not related else None


def pytest_generate_tests(metafunc) -> None:
    cases = metafunc.config.getoption("fuzz")
    for name, jobs in (("fuzz_part", parts(cases)), ("fuzz_graph", graphs(cases))):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, jobs, ids=[f"{encoder}-{number}" for encoder, number, _ in jobs])


def parts(cases: int) -> list[tuple[str, int, int]]:
    """Of each test in PyTorch an encoder, a number and how many examples."""
    examples = ceil((1 - ON_GRAPHS) * cases / RUNTIMES / len(ENCODERS)) or SLICE
    starts = range(0, examples, OF_PART)
    return [(name, i, min(OF_PART, examples - start)) for i, start in enumerate(starts) for name in ENCODERS]


def graphs(cases: int) -> list[tuple[str, int, int]]:
    """The same for each graph, as many of each encoder. Number -1: the one of the suite's other tests."""
    examples = ceil(ON_GRAPHS * cases / RUNTIMES)
    number = len(ENCODERS) * ceil(examples / OF_GRAPH / len(ENCODERS))
    if not cases:
        return [("bert", -1, SLICE_OF_GRAPH), ("roberta", -1, SLICE_OF_GRAPH)]
    return [(ENCODERS[i % len(ENCODERS)], i, ceil(examples / number)) for i in range(number)]


def pytest_terminal_summary(terminalreporter, config) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    tallies = [value for report in reports for name, value in report.user_properties if name == "fuzz"]
    if not config.getoption("fuzz") or not tallies:
        return
    from support.judge import LOGITS, TIE, Tally  # which needs torch

    tally = Tally()
    for one in tallies:
        tally.add(one)
    terminalreporter.section("fuzz")
    for line in [*table(tally.cases), *facts(tally, TIE, LOGITS)]:
        terminalreporter.write_line(line)


def table(cases: Counter) -> list[str]:
    """The cases by runtime and encoder."""
    runtimes = list(dict.fromkeys(runtime for runtime, _ in sorted(cases)))
    width = max(map(len, runtimes))
    lines = [" " * width + "".join(f"{name:>12}" for name in (*ENCODERS, "all"))]
    for runtime in (*runtimes, "all"):
        counts = [
            sum(n for (one, encoder), n in cases.items() if runtime in (one, "all") and name in (encoder, "all"))
            for name in (*ENCODERS, "all")
        ]
        lines.append(f"{runtime:<{width}}" + "".join(f"{count:12,}" for count in counts))
    return lines


def facts(tally, tie_bounds: Mapping[str, float], logit_bounds: Mapping[str, float]) -> list[str]:
    lines = ["exits by layer: " + ", ".join(f"{layer}: {n:,}" for layer, n in sorted(tally.exits.items()))]
    lines.append(f"samples: {tally.exits.total():,}, of which {tally.unreadable:,} have nothing but padding to read")
    for dtype, bound in tie_bounds.items():
        ties = tally.ties.get(dtype, [])
        lines.append(
            f"{dtype}: {len(ties):,} ties, at most {max(ties, default=0):.1e} from the threshold (bound {bound:.0e}); "
            f"logits differ by up to {tally.errors.get(dtype, 0):.1e} (bound {logit_bounds[dtype]:.0e})"
        )
    return lines
