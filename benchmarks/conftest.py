"""Options of `pytest benchmarks/`, which needs pytest-benchmark: pip install 'genengine[bench]'."""

import os
import warnings

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("genengine")
    group.addoption("--suite", default="quick", help="a suite, op, model or benchmark (default quick)")
    group.addoption("--device", choices=("cpu", "cuda"), help="cpu or cuda (default: cuda if there is one)")
    group.addoption("--budget", type=float, default=0.5, help="seconds of interleaved timing per row (default 0.5)")


@pytest.fixture(scope="session")
def device(pytestconfig):
    from genengine.benchmarks import machine

    if any(os.environ.get(name) != value for name, value in machine.MALLOC_SETTINGS.items()):
        settings = " ".join(f"{name}={value}" for name, value in machine.MALLOC_SETTINGS.items())
        warnings.warn(f"timings include page faults; start pytest with {settings}", stacklevel=1)
    return chosen_device(pytestconfig)


@pytest.fixture(scope="session")
def ceilings(device):
    from genengine.benchmarks import ceilings

    torch.set_num_threads(1)
    return ceilings.measure(device)


def chosen_device(config):
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    """One test per row of the suite; no input is built before its turn."""
    if "work" not in metafunc.fixturenames:
        return
    from genengine.benchmarks import suite

    what = metafunc.config.getoption("--suite")
    work = suite.cases(what, chosen_device(metafunc.config), suite.Options())
    metafunc.parametrize("work", work, ids=[_id(entry, case) for entry, case in work])


def _id(entry, case):
    return f"{entry.name}-{'x'.join(map(str, case.shape))}-{str(case.dtype).removeprefix('torch.')}"
