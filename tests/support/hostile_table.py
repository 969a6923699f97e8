"""A table of the hostile inputs that were tried and what came back: `python -m pytest -m hostile -v`.

A test marked hostile(kind, came_back) asserts what came back. `record_property("came_back", ...)` says it where it
differs between a test's inputs.
"""

from collections import Counter


def pytest_configure(config):
    config.addinivalue_line("markers", "hostile(kind, came_back): one hostile input, which gets what came_back says")


def pytest_collection_modifyitems(items):
    for item in items:
        if (mark := item.get_closest_marker("hostile")) is not None:
            item.user_properties += [("hostile", mark.args[0]), ("came_back", mark.args[1])]


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr != "hostile":
        return
    counts = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            facts = dict(report.user_properties)  # the last of each name
            counts[facts["hostile"], facts["came_back"] if outcome == "passed" else "something else"] += 1
    terminalreporter.write_line("\n| input | tried | came back |\n| --- | ---: | --- |")
    for (kind, came_back), count in sorted(counts.items()):
        terminalreporter.write_line(f"| {kind} | {count} | {came_back} |")
