"""How many processes are killed: a slice in the normal suite, all of them with --faults N."""

SLICE = 2


def pytest_generate_tests(metafunc):
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(metafunc.config.getoption("--faults") or SLICE))
