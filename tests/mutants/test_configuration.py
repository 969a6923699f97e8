"""mutmut's configuration names files that exist: `run_tests.sh --mutants` puts faults into the code."""

from configparser import ConfigParser
from pathlib import Path

from support.helpers import ROOT


def test_the_files_exist():
    settings = ConfigParser()
    settings.read(Path(__file__).with_name("setup.cfg"))
    for name in ("source_paths", "only_mutate", "also_copy", "pytest_add_cli_args_test_selection"):
        for pattern in settings["mutmut"][name].split():
            assert list(ROOT.glob(pattern)), pattern
