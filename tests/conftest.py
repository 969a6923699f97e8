"""Settings of all tests. It imports no library: the process that only deals out the tests reads it, too."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster so, above all beside other work; for subprocesses too

# here, since only this file is read before the command line
pytest_plugins = ["support.fuzz_option", "support.hostile_table"]


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, metavar="N", help="only tests/faults, with N kills")
    parser.addoption("--slow", action="store_true", help="the slow tests, too; on where CI is set")


def pytest_configure(config):
    if config.getoption("--faults"):
        config.args = [str(Path(__file__).parent / "faults")]
    if config.getoption("dist", "no") == "no":  # this process runs tests
        config.pluginmanager.import_plugin("support.shared_fixtures")


def pytest_collection_modifyitems(config, items):
    wanted = any(config.getoption(name) for name in ("--slow", "--fuzz", "--faults"))
    if not (wanted or os.environ.get("CI")):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="--slow runs it"))
