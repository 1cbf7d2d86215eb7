"""geglu, swiglu: gated linear units over one packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._activations import ACTIVATIONS, gelu_name
from genengine.ops._cost import per_element, traffic
from genengine.ops.bias_act import check_bias


def geglu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    gate_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The gated linear unit of the Gaussian error linear unit.

        y = gelu(gate) * value,    [gate | value] = x + bias along the last dimension

    x: (..., 2 D), rows may be views with gaps. bias: (2 D,), packed as x, in x's dtype or float32 beside a 16-bit x; or
    None. approximate: "none" (erf) or "tanh". gate_first: False for [value | gate], the packing of diffusers' GEGLU.
    dtypes: float32, float16, bfloat16, float64 (reference only); arithmetic in float32 (float64 for float64). Nothing
    is cast, under autocast neither. Differentiable once, in x and bias, in reverse mode; dx is one packed tensor.

    Returns y (..., D) in x's dtype, contiguous.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Cost: reads x, bias, writes y; 6 flops ("tanh": 10), 1 exponential per element of y, 2 flops for a bias. Backward:
    reads grad, x, bias, writes dx, dbias; 17 flops, 2 exponentials ("tanh": 28 and 1), 4 flops for a bias.
    Shazeer 2020, "GLU variants improve Transformer".
    """
    _check.dtype("geglu", "x", x)
    return _run("geglu", x, bias, gelu_name("geglu", approximate), gate_first, backend)


def swiglu(x: Tensor, bias: Tensor | None = None, *, gate_first: bool = True, backend: str | None = None) -> Tensor:
    """The gated linear unit of the sigmoid linear unit.

        y = silu(gate) * value,    [gate | value] = x + bias along the last dimension

    Arguments, dtypes and errors as in `geglu`.
    Cost: reads x, bias, writes y; 5 flops, 1 exponential per element of y, 2 flops for a bias. Backward: reads grad, x,
    bias, writes dx, dbias; 13 flops, 1 exponential, 4 flops for a bias.
    Shazeer 2020, "GLU variants improve Transformer".
    """
    _check.dtype("swiglu", "x", x)
    return _run("swiglu", x, bias, "silu", gate_first, backend)


def _run(op, x, bias, activation, gate_first, backend):
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(
            f"{op}: x must be (..., 2 D), got {tuple(x.shape)}; gate and value are packed along the last dim"
        )
    if not isinstance(gate_first, bool):
        raise TypeError(f"{op}: gate_first must be a bool, got {type(gate_first).__name__}")
    if bias is not None:
        check_bias(op, bias, x, x.shape[-1])
    run = _registry.resolve(GLU, x.device, x.dtype, backend)
    return run(_rows(x), bias, activation, gate_first).view(*x.shape[:-1], x.shape[-1] // 2)


def _rows(x):
    """(B, N, 2 D)"""
    if x.dim() == 3:
        return x
    if x.dim() < 3:
        return x.expand(*[1] * (3 - x.dim()), *x.shape)
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


# ---- reference: x (B, N, 2 D), bias (2 D) or None ------------------------------------------------------------------


def reference_glu(x, bias, activation, gate_first):
    gate, value = _parts(x, bias, gate_first)
    return _out(ACTIVATIONS[activation].value(gate, 0.0) * value, x)


def reference_glu_backward(grad, x, bias, activation, gate_first):
    """d_gate = grad value act'(gate),    d_value = grad act(gate),    dx packed as x,    dbias = sum(dx)."""
    gate, value = _parts(x, bias, gate_first)
    act, grad = ACTIVATIONS[activation], _wide(grad)
    d_gate, d_value = grad * value * act.slope(gate, 0.0), grad * act.value(gate, 0.0)
    dx = torch.cat((d_gate, d_value) if gate_first else (d_value, d_gate), -1)
    return _out(dx, x), x.new_empty(0) if bias is None else dx.sum((0, 1)).to(bias.dtype)


def _parts(x, bias, gate_first):
    packed = _wide(x) if bias is None else _wide(x) + _wide(bias)
    first, second = packed.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _out(value, x):
    return value.to(x.dtype).contiguous()


# ---- shapes, gradients, schemas ------------------------------------------------------------------------------------


def _fake(x, bias, activation, gate_first):
    return x.new_empty(*x.shape[:2], x.shape[2] // 2)


def _fake_backward(grad, x, bias, activation, gate_first):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _grads(ops, ctx, grad):
    x, bias = ctx.saved_tensors
    _check.no_grad_needed("glu_backward", (grad, x, bias), "it is differentiable once: drop create_graph=True")
    dx, dbias = ops.glu_backward(grad, x, bias, *ctx.options)
    return dx, None if bias is None else dbias, None, None


def _cost(arguments, results):
    x, bias, activation, _ = arguments
    flops, exps = ACTIVATIONS[activation].work(0)
    return per_element(traffic(x, bias, results), x.numel() // 2, flops + 1 + 2 * (bias is not None), exps)


def _cost_backward(arguments, results):
    grad, x, bias, activation, _ = arguments
    flops, exps = ACTIVATIONS[activation].work(0, 1)
    flops += 3 + 4 * (bias is not None)  # d_gate, d_value; the bias added and its gradient's sum, for either half
    return per_element(traffic(grad, x, bias, results), grad.numel(), flops, exps)


_registry.define(
    "glu_backward(Tensor grad, Tensor x, Tensor? bias, str activation, bool gate_first) -> (Tensor, Tensor)",
    reference_glu_backward,
    fake=_fake_backward,
    module="glu",
    cost=_cost_backward,
)
GLU = _registry.define(
    "glu(Tensor x, Tensor? bias, str activation, bool gate_first) -> Tensor",
    reference_glu,
    fake=_fake,
    backward=_grads,
    setup_context=_save,
    module="glu",
    cost=_cost,
)
