"""Parametrisation over the backends that can run here; importable as `support` (see pyproject's pythonpath)."""

import pytest
import torch

from genengine.ops import _registry

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def device_of(backend: str) -> torch.device:
    """Where a backend's tensors live here: Triton takes a GPU if there is one, else its interpreter on the CPU."""
    if backend == "cuda" or (backend == "triton" and not _registry.triton_interpreted()):
        return torch.device("cuda")
    return torch.device("cpu")


def skip_unless_available(op_name: str, backend: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device to test on, or a skip that says why the backend cannot run."""
    device = device_of(backend)
    if reason := _registry.why_not(_registry.OPS[op_name], backend, device.type, dtype):
        pytest.skip(f"{op_name} on {backend}: {reason}")
    return device
