"""What the benchmarks of ops share: shapes of known models, an op's kernel with its check and cost, backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genengine import testing
from genengine.ops import _registry
from genengine.ops._cost import Cost, _tensors

# Latents (C, ...) by model: at 512 pixels, at 1024, and the six seconds of CogVideoX-5B.
SD, SDXL, SD3, VIDEO = (4, 64, 64), (4, 128, 128), (16, 128, 128), (16, 13, 60, 90)
MANY = {"SDXL, 1,024 images": (1024, *SDXL)}  # on a GPU: beyond 64 MB in 16 bits, too, where memory alone counts


def kernel(name: str, like: Tensor) -> Callable:
    """The dispatcher op that a call on such a tensor runs."""
    return _registry.resolve(_registry.OPS[name], like.device, like.dtype)


def cost(name: str, *arguments) -> Cost:
    """What one call costs, with arguments as the schema orders them; the call is made, for its results."""
    return _registry.OPS[name].cost(arguments, _kernel_of(name, arguments)(*arguments))


def check(name: str, *arguments, slack: Sequence[float] = ()) -> None:
    """The kernel's results against the reference in float64: twice eager's error and a rounding, plus `slack` of each.

    Raises AssertionError.
    """
    reference = _registry.OPS[name].overloads["reference"]
    found = _kernel_of(name, arguments)(*arguments), reference(*arguments), reference(*map(widened, arguments))
    _compare([several(results) for results in found], name, slack)


def check_function(fused: Callable, eager: Callable, inputs: Sequence, label: str, slack: Sequence[float] = ()) -> None:
    """fused(*inputs) against eager(*inputs) in float64: twice eager's error and a rounding, plus `slack` of each.

    Raises AssertionError.
    """
    found = fused(*inputs), eager(*inputs), eager(*map(widened, inputs))
    _compare([several(results) for results in found], label, slack)


def _compare(found, label, slack):
    for i, (got, plain, oracle) in enumerate(zip(*found, strict=True)):
        assert got.shape == plain.shape, f"{label}: shape {tuple(got.shape)}, eager gives {tuple(plain.shape)}"
        assert got.dtype == plain.dtype, f"{label}: dtype {got.dtype}, eager gives {plain.dtype}"
        allowed = testing.tolerance(plain, oracle.double()) + (slack[i] if slack else 0.0)
        testing.assert_within(testing.error(got, oracle.double()), allowed, label)


def widened(value):
    """A floating-point tensor as float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def several(results) -> tuple:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _kernel_of(name, arguments):
    first = next(iter(_tensors(arguments)))
    return kernel(name, first)


# ---- backward passes ---------------------------------------------------------------------------------------------


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, without history and requiring a gradient."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def backward(function: Callable, inputs: Sequence[Tensor], *grads: Tensor) -> Callable:
    """autograd's backward through function(*inputs), again and again; its forward is outside the timing."""
    with torch.enable_grad():
        results = several(function(*inputs))
    return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)


def both(function: Callable, *grads: Tensor) -> Callable:
    """A function of leaves: function(*leaves) and its gradients, in one call. torch.compile takes it as it is."""

    def run(*inputs):
        with torch.enable_grad():
            results = several(function(*inputs))
            return *(result.detach() for result in results), *torch.autograd.grad(results, inputs, grads)

    return run


def check_both(fused: Callable, eager: Callable, inputs: Sequence[Tensor], *grads: Tensor, label: str) -> None:
    """Results and gradients of `fused` against those of `eager` in float64. Raises AssertionError."""
    oracle = both(eager, *map(widened, grads))(*leaves(*map(widened, inputs)))
    found = both(fused, *grads)(*inputs), both(eager, *grads)(*inputs), oracle
    for got, plain, exact in zip(*found, strict=True):
        testing.assert_as_good_as_eager(got, plain, exact, label)
