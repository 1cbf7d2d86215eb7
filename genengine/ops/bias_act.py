"""bias_act, bias_gelu: bias, activation, gain and clamp in one pass, with first and second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._activations import ACTIVATIONS, gelu_name
from genengine.ops._cost import per_element, traffic


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
    dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Bias, activation, gain and clamp.

        y = clamp(gain * act(x + bias[channel]), -clamp, clamp)

    x: any shape. Dense memory in any order of its dimensions (contiguous, channels_last) is taken as it lies, and y
    keeps the order; anything else is copied once.
    bias: (C,), C = x.shape[dim], in x's dtype or float32 beside a 16-bit x; or None.
    dim: the channels' dimension, may be negative; unused without bias.
    activation: linear, relu, lrelu (alpha u below 0), silu, gelu (erf), gelu_tanh, tanh or sigmoid.
    gain: any number. clamp: at least 0, or None for no clamp.
    dtypes: float32, float16, bfloat16, float64 (reference only); arithmetic and sums in float32 (float64 for float64).
    Nothing is cast, under autocast neither.

    Returns y, like x in shape and dtype. Differentiable twice, in x and bias, in reverse mode (R1 and path-length
    penalties). Derivatives at a kink are those from below: relu'(0) = 0; the clamp passes none at and outside +-clamp.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Cost: reads x, bias, writes y; act's flops and exponentials per element of x (silu 4 and 1, gelu 5 and 1, gelu_tanh
    9 and 1), 1 flop for a bias, 1 for a gain. Backward: reads grad, x, bias, writes dx, dbias; those of act', with a
    clamp those of act too, and 1 flop, 2 for a bias, 1 for a gain. Its backward: reads grad_dx, grad_dbias, grad, x,
    bias, writes d_grad, d_x, d_bias; those of act' and act''. x and bias are not read for a linear act' unless a clamp
    needs them, grad not where act'' = 0.
    Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN"; Hendrycks & Gimpel 2016 (GELU).
    """
    op = "bias_act"
    _check.dtype(op, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    alpha, gain = _number(op, "alpha", alpha), _number(op, "gain", gain)
    if clamp is not None:
        clamp = _number(op, "clamp", clamp)
        if not clamp >= 0:
            raise ValueError(f"{op}: clamp must be at least 0 or None, got {clamp}")
    if bias is not None:
        dim = _dimension(op, x, dim)
        check_bias(op, bias, x, x.shape[dim])
    return _run(x, bias, dim, activation, alpha, gain, clamp, backend)


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """Bias along the last dimension, and the Gaussian error linear unit: the middle of an MLP.

        y = u Phi(u),  u = x + bias            Phi: the normal distribution function ("none") or its tanh form ("tanh")

    x: (..., D). bias: (D,) or None. approximate: as in torch.nn.functional.gelu. Otherwise as `bias_act`.
    Cost: reads x, bias, writes y; 6 flops ("tanh": 10), 1 exponential per element of x. Backward: as `bias_act`.
    Hendrycks & Gimpel 2016, "Gaussian error linear units".
    """
    op = "bias_gelu"
    _check.dtype(op, "x", x)
    activation = gelu_name(op, approximate)
    if bias is not None:
        check_bias(op, bias, x, x.shape[_dimension(op, x, -1)])
    return _run(x, bias, -1, activation, 0.0, 1.0, None, backend)


def _number(op, name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def _dimension(op, x, dim):
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be a dimension of x, which is {tuple(x.shape)}, got {dim}")
    return dim % x.dim()


def check_bias(op: str, bias: Tensor, x: Tensor, channels: int) -> None:
    """A vector along the channels of x, in its dtype or float32 beside 16 bits."""
    _check.dtype(op, "bias", bias)
    _check.shape(op, "bias", bias, "(C,)", (channels,))
    _check.same_device(op, "bias", bias, "x", x)
    if bias.dtype != torch.float32 or x.dtype == torch.float64:
        _check.same_dtype(op, "bias", bias, "x", x)


def _run(x, bias, dim, activation, alpha, gain, clamp, backend):
    """The op on x as it lies in memory, its channels in the middle."""
    run = _registry.resolve(BIAS_ACT, x.device, x.dtype, backend)
    if x.is_contiguous():  # nothing to permute
        return run(x.view(_flat(x.shape, bias, dim)), bias, activation, alpha, gain, clamp).view(x.shape)
    order = _memory_order(x)
    if order is None:
        x, order = x.contiguous(), range(x.dim())
    places = list(order)
    memory = x.permute(places)
    at = places.index(dim % x.dim()) if bias is not None else 0
    flat = _flat(memory.shape, bias, at)
    y = run(memory.reshape(flat), bias, activation, alpha, gain, clamp).view(memory.shape)
    return y.permute([places.index(d) for d in range(x.dim())])


def _flat(shape, bias, dim):
    """(outer, C, inner) around dimension `dim`, or all elements in a row where there is no bias to lie along one."""
    if bias is None:
        return 1, 1, shape.numel()
    dim %= len(shape)
    return shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()


def _memory_order(x):
    """The dimensions of dense x from the outermost in memory to the innermost; None if x is not dense."""
    order = sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)
    return order if x.permute(order).is_contiguous() else None


# ---- reference: x (outer, C, inner), bias (C,) or None -------------------------------------------------------------


def reference_bias_act(x, bias, activation, alpha, gain, clamp):
    z = gain * ACTIVATIONS[activation].value(_biased(x, bias), alpha)
    return _out(z if clamp is None else z.clamp(-clamp, clamp), x)


def reference_bias_act_backward(grad, x, bias, activation, alpha, gain, clamp):
    """With z = gain act(u), u = x + bias:    dx = grad gain act'(u) where |z| < clamp, else 0;    dbias = sum(dx)."""
    u = _biased(x, bias)
    dx = _wide(grad) * _passed(gain * ACTIVATIONS[activation].slope(u, alpha), u, activation, alpha, gain, clamp)
    return _out(dx, x), _channel_sums(dx, x, bias)


def reference_bias_act_backward_backward(grad_dx, grad_dbias, grad, x, bias, activation, alpha, gain, clamp):
    """With s(u) = gain act'(u) where |z| < clamp, else 0, and v = grad_dx + grad_dbias:

    d_grad = v s(u),    d_x = v grad s'(u),    d_bias = sum(d_x);    d_x and d_bias are empty (0,) where act'' = 0
    """
    act, u, v = ACTIVATIONS[activation], _biased(x, bias), _biased(grad_dx, grad_dbias)
    d_grad = v * _passed(gain * act.slope(u, alpha), u, activation, alpha, gain, clamp)
    if act.curvature is None:
        return _out(d_grad, x), x.new_empty(0), x.new_empty(0)
    d_x = v * _wide(grad) * _passed(gain * act.curvature(u, alpha), u, activation, alpha, gain, clamp)
    return _out(d_grad, x), _out(d_x, x), _channel_sums(d_x, x, bias)


def _biased(x, bias):
    return _wide(x) if bias is None else _wide(x) + _wide(bias)[:, None]


def _passed(factor, u, activation, alpha, gain, clamp):
    """factor where the clamp passes, 0 where it does not."""
    if clamp is None:
        return factor
    z = gain * ACTIVATIONS[activation].value(u, alpha)
    return torch.where(z.abs() >= clamp, 0.0, factor)


def _channel_sums(dx, x, bias):
    return x.new_empty(0) if bias is None else dx.sum((0, 2)).to(bias.dtype)


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _out(value, x):
    return value.to(x.dtype).contiguous()


# ---- shapes, gradients, schemas ------------------------------------------------------------------------------------


def _fake(x, bias, activation, alpha, gain, clamp):
    return x.new_empty(x.shape)


def _fake_backward(grad, x, bias, activation, alpha, gain, clamp):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _fake_backward_backward(grad_dx, grad_dbias, grad, x, bias, activation, alpha, gain, clamp):
    d_grad = x.new_empty(x.shape)
    if ACTIVATIONS[activation].curvature is None:
        return d_grad, x.new_empty(0), x.new_empty(0)
    return d_grad, *_fake_backward(grad, x, bias, activation, alpha, gain, clamp)


def _save(ctx, inputs, output):
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _grads(ops, ctx, grad):
    x, bias = ctx.saved_tensors
    dx, dbias = ops.bias_act_backward(grad, x, bias, *ctx.options)
    return dx, None if bias is None else dbias, None, None, None, None


def _save_backward(ctx, inputs, output):
    grad, x, bias, *ctx.options = inputs
    ctx.save_for_backward(grad, x, bias)


def _backward_grads(ops, ctx, grad_dx, grad_dbias):
    grad, x, bias = ctx.saved_tensors
    grad_dx = x.new_zeros(x.shape) if grad_dx is None else grad_dx
    grad_dbias = None if bias is None else grad_dbias
    _check.no_grad_needed(
        "bias_act_backward_backward",
        (grad_dx, grad_dbias, grad, x, bias),
        "it is differentiable twice: drop create_graph=True from the second derivative",
    )
    d_grad, d_x, d_bias = ops.bias_act_backward_backward(grad_dx, grad_dbias, grad, x, bias, *ctx.options)
    if ACTIVATIONS[ctx.options[0]].curvature is None:
        d_x = d_bias = None
    return d_grad, d_x, None if bias is None else d_bias, None, None, None, None


def _cost(arguments, results):
    x, bias, activation, _, gain, _ = arguments
    flops, exps = ACTIVATIONS[activation].work(0)
    return per_element(traffic(x, bias, results), x.numel(), flops + (bias is not None) + (gain != 1), exps)


def _cost_backward(arguments, results):
    grad, x, bias, *options = arguments
    read, flops, exps = _cost_of_slope(x, bias, *options)
    flops += 1 + (bias is not None)  # grad times it; dbias's sum
    return per_element(traffic(grad, read, results), grad.numel(), flops, exps)


def _cost_backward_backward(arguments, results):
    grad_dx, grad_dbias, grad, x, bias, *options = arguments
    activation, _, gain, _ = options
    curved = ACTIVATIONS[activation].curvature is not None
    read, flops, exps = _cost_of_slope(x, bias, *options, also=(2,) if curved else ())
    flops += 1 + (grad_dbias is not None)  # v times it; v
    if curved:
        read += (grad,)
        flops += 2 + (gain != 1) + (bias is not None)  # v grad s'(u); d_bias's sum
    return per_element(traffic(grad_dx, grad_dbias, read, results), x.numel(), flops, exps)


def _cost_of_slope(x, bias, activation, alpha, gain, clamp, also=()):
    """The tensors that s(u) needs, its flops and exps per element, and those of act's derivatives of orders `also`."""
    orders = (1, *also) if clamp is None else (0, 1, *also)
    flops, exps = ACTIVATIONS[activation].work(*orders)
    flops += (gain != 1) * (1 if clamp is None else 2)
    if activation == "linear" and clamp is None:
        return (), flops, exps  # s is the gain everywhere
    return (x, bias), flops + (bias is not None), exps


_OPTIONS = "str activation, float alpha, float gain, float? clamp"
_registry.define(
    "bias_act_backward_backward(Tensor grad_dx, Tensor? grad_dbias, Tensor grad, Tensor x, Tensor? bias, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference_bias_act_backward_backward,
    fake=_fake_backward_backward,
    module="bias_act",
    cost=_cost_backward_backward,
)
_registry.define(
    f"bias_act_backward(Tensor grad, Tensor x, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor)",
    reference_bias_act_backward,
    fake=_fake_backward,
    backward=_backward_grads,
    setup_context=_save_backward,
    module="bias_act",
    cost=_cost_backward,
)
BIAS_ACT = _registry.define(
    f"bias_act(Tensor x, Tensor? bias, {_OPTIONS}) -> Tensor",
    reference_bias_act,
    fake=_fake,
    backward=_grads,
    setup_context=_save,
    module="bias_act",
    cost=_cost,
)
