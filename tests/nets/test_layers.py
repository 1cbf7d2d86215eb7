"""linear_gelu: what it computes, and where it takes one kernel instead of two."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import genengine
from genengine import ops, testing
from genengine.benchmarks import eager
from genengine.nets import layers
from genengine.nets.layers import linear_gelu
from genengine.profiling.record import record

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(dtype, device="cpu", rows=(3, 7), dim=40, features=72):
    return tuple(
        t.to(device, dtype)
        for t in (torch.randn(*rows, dim), torch.randn(features, dim) / math.sqrt(dim), torch.randn(features))
    )


def exact(x, weight, bias):
    """x W^T + bias through 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), in float64 (Hendrycks & Gimpel 2016)."""
    u = torch.einsum("...d,fd->...f", x.double(), weight.double()) + bias.double()
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(3, 7), (1,), (2, 256), (0, 4)], ids=str)
def test_against_float64(device, dtype, rows):
    x, weight, bias = layer(dtype, device, rows)
    with torch.no_grad():
        found, plain = linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh")
    testing.assert_as_good_as_eager(found, plain, exact(x, weight, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_whose_rows_lie_apart(device):
    x, weight, bias = layer(torch.bfloat16, device, (4, 6), 80)
    with torch.no_grad():
        found = linear_gelu(x[:, ::2, :40], weight[:, :40], bias)
        assert torch.equal(found, linear_gelu(x[:, ::2, :40].contiguous(), weight[:, :40].contiguous(), bias))


def test_gradients_are_those_of_plain_torch():
    leaves = [t.double().requires_grad_() for t in layer(torch.float32)]
    found = torch.autograd.grad(linear_gelu(*leaves).sum(), leaves)
    expected = torch.autograd.grad(exact(*leaves).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Called(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def called(dtype, device):
    """Which GELU runs on tensors that only say where they are: "gelu" behind a product, or "_addmm_activation"."""
    with FakeTensorMode(), torch.no_grad(), Called() as called:
        tensors = (torch.empty(size, device=device, dtype=dtype) for size in ((2, 3, 8), (16, 8), (16,)))
        linear_gelu(*(tensor.requires_grad_() for tensor in tensors))
    (name,) = {name.removeprefix("aten::") for name in called.names} & {"gelu", "_addmm_activation"}
    return name


def test_inference_on_a_gpu_takes_the_epilogue(monkeypatch):
    monkeypatch.setattr(ops, "bias_gelu", eager.bias_gelu)  # without a GPU no kernel of ours can be chosen for one
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert called(dtype, "cuda") == ("_addmm_activation" if dtype in layers.GELU_EPILOGUE else "gelu")
        assert called(dtype, "cpu") == "gelu", "torch's CPU op has the other form"
    with genengine.backend("reference"):
        assert called(torch.bfloat16, "cuda") == "gelu"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type: True)
        assert called(torch.bfloat16, "cuda") == "gelu"
    monkeypatch.setattr(layers, "GELU_EPILOGUE", ())
    assert called(torch.bfloat16, "cuda") == "gelu"


def test_training_takes_none():
    """torch's op has no backward; autograd itself needs a GPU to run on one."""
    with FakeTensorMode():
        x, weight, bias = (torch.empty(size, device="cuda").half() for size in ((3, 8), (16, 8), (16,)))
        assert layers._takes_epilogue(x, weight, bias)
        for tensors in ((x, weight.requires_grad_(), bias), (x, weight.detach(), bias.requires_grad_())):
            assert not layers._takes_epilogue(*tensors)
            with torch.no_grad():
                assert layers._takes_epilogue(*tensors)


def test_the_eager_twin_takes_none():
    with eager.ops():
        assert called(torch.bfloat16, "cuda") == "gelu"
    assert called(torch.bfloat16, "cuda") == "_addmm_activation"


def test_the_profiler_counts_its_product_and_its_exponentials():
    x, weight, bias = layer(torch.float32, rows=(5,))
    steps = record(lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)).steps
    (found,) = (step for step in steps if step.name == "aten::_addmm_activation")
    assert (found.cost.flops, found.cost.exps) == (2 * 5 * 40 * 72, 5 * 72)
