"""Without a GPU, Triton kernels run under the interpreter: chosen before anything imports triton."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The property tests (marked fuzz): a few hundred cases each in `make test`, the same ones every time; more, and fresh
# ones, in `make fuzz`.
hypothesis.settings.register_profile("test", max_examples=300, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=2500, deadline=None, print_blob=True)
hypothesis.settings.load_profile("test")
torch.set_num_threads(1)  # two test workers on two cores


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False; `make gpu` runs it")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def graphs():
    """Runs on a CPU are captured by a stand-in for CUDA graphs: the list of those made."""
    import replayed_graph

    with replayed_graph.using() as made:
        yield made


@pytest.fixture(autouse=True)
def fresh_generator():
    """Fresh but reproducible random inputs in every test."""
    torch.manual_seed(0)
