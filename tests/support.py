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


def luck(exact: torch.Tensor) -> float:
    """Two float32 roundings, beyond the rule, on few elements: there eager may by chance be nearly exact."""
    finite = exact[torch.isfinite(exact)]
    if not 0 < finite.numel() < 1024:
        return 0.0
    return 2 * torch.finfo(torch.float32).eps * finite.abs().max().item()


LAYOUTS = ("plain", "sliced", "permuted", "expanded", "unaligned", "channels_last")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values under another memory layout (of "expanded": the first sample's, for all)."""
    if layout == "sliced" and tensor.dim() > 0:
        # holes in every dimension but the last, which starts off the alignment; NaN in the holes
        room = tensor.new_full([2 * size for size in tensor.shape[:-1]] + [tensor.shape[-1] + 3], float("nan"))
        view = room[tuple(slice(None, None, 2) for _ in tensor.shape[:-1])][..., 1 : tensor.shape[-1] + 1]
        return view.copy_(tensor)
    if layout == "permuted" and tensor.dim() > 1:  # the innermost stride is not 1
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and tensor.dim() > 0:  # a batch stride of 0
        return tensor[:1].expand_as(tensor)
    if layout == "unaligned":  # contiguous, from an address that no wide access may use
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def as_tuple(found):
    """What an op returned, one tensor or several, as a tuple."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def filled(net: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """The network with noise on every parameter, so that layers that begin at zero matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net
