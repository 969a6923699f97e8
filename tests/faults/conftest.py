"""A slice of the faults in the normal suite, all of them with --faults N, which also kills N processes."""

from functools import cache

import pytest
from support.faulty_runs import SETTINGS, TRAIN, Uninterrupted

KILLS = 2


def pytest_configure(config):
    config.addinivalue_line("markers", "slice(name, values, count): parametrized; the normal suite has the first count")
    config.addinivalue_line("markers", "full: not in the normal suite")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--faults"):
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_generate_tests(metafunc):
    kills = metafunc.config.getoption("--faults")
    for name, values, count in (mark.args for mark in metafunc.definition.iter_markers("slice")):
        metafunc.parametrize(name, values if kills else values[:count], ids=str)
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(kills or KILLS))


@pytest.fixture(scope="session")
def training(tiny_data, tiny_checkpoints):
    """The arguments of a training with one of SETTINGS, and more; what is given later wins."""
    source = f"--model_name_or_path {tiny_checkpoints['bert']} --data_dir {tiny_data / 'SST-2'}"
    return lambda settings="one process", more="": f"{source} {TRAIN} {SETTINGS[settings][1]} {more}".split()


@pytest.fixture(scope="session")
def uninterrupted(training, tmp_path_factory):
    """A training with one of SETTINGS that nothing disturbs, once for all tests that compare with it."""

    @cache
    def train(settings: str = "one process") -> Uninterrupted:
        folder = tmp_path_factory.mktemp("uninterrupted")
        return Uninterrupted.train(folder, training(settings), SETTINGS[settings][0])

    return train
