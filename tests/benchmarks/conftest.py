import pytest
from bench_support import Clock

from genengine.benchmarks import harness, registry, timers


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timers, "time", clock)
    monkeypatch.setattr(harness, "time", clock)
    return clock


@pytest.fixture
def registered():
    """What a test registers is forgotten after it."""
    registry.load_ours()
    before = dict(registry.ENTRIES)
    yield registry
    registry.ENTRIES.clear()
    registry.ENTRIES.update(before)
