"""group_norm_silu: group normalisation, its modulation by the time embedding, and SiLU, as U-Nets chain them;
add_group_norm_silu: the sum that ends a residual branch, and that of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._activations import ACTIVATIONS
from genengine.ops._cost import Cost, per_element, traffic


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Group normalisation, optionally modulated per sample and channel, then SiLU.

        v = ((x - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift
        y = v * sigmoid(v)          silu=False: y = v

    mean and var (biased) over the C / num_groups channels of a group and all positions of a sample, accumulated in
    float32 (float64 for float64).

    x: (B, C, ...), any number of further dimensions. One whose channels are innermost in memory (channels_last) is
    read and written so; one that is dense in neither order is copied once.
    weight, bias: (C,), or both None. scale, shift: (B, C), may be views into one table, or both None.
    num_groups: divides C. eps: added to the variance, >= 0. backend: see `genengine.backend`.
    dtypes: float32, float16, bfloat16 or float64 (reference only); weight and bias, and scale and shift, in x's dtype
    or float32. Nothing is cast, under autocast neither. Differentiable once, in reverse mode.
    Returns y, like x in shape, dtype and memory format.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Cost: reads x, weight, bias, scale, shift, writes y, mean, rstd; 9 flops, 1 exponential per element of x, 2 flops
    for weight and bias, 3 for scale and shift; silu=False: 5, no exponential. Backward: reads grad, x, weight, bias,
    scale, shift, mean, rstd, writes dx, dweight, dbias, dscale, dshift; 17 flops, 1 exponential, 6 flops for weight and
    bias, 7 for scale and shift; silu=False: 9, no exponential, 4 (6 beside a scale) and 5.
    Wu & He 2018, "Group normalization"; Dhariwal & Nichol 2021, "Diffusion models beat GANs" (scale and shift: AdaGN).
    """
    _check_all(x, weight, bias, num_groups, scale, shift, eps, silu)
    run = _registry.resolve(_registry.OPS["group_norm_silu"], x.device, x.dtype, backend)
    channels_last = _channels_last(x)
    folded = _fold(x, channels_last)
    y, _, _ = run(folded, weight, bias, scale, shift, num_groups, float(eps), silu, channels_last)
    return _unfold(y, x.shape, channels_last)


def add_group_norm_silu(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the norm that opens the next, in one pass fewer over the sum.

        x' = x + branch
        y  = group_norm_silu(x', weight, bias, num_groups, scale, shift, eps, silu=silu)

    x, branch: (B, C, ...), of one dtype; a branch in another memory format than x is copied once. The rest, and what is
    raised: as for `group_norm_silu`. Differentiable once, in all tensors, in reverse mode.
    Returns x' and y, like x in shape, dtype and memory format. y is the norm of x' as it was rounded.
    Cost: reads x, branch, weight, bias, scale, shift, writes x', y, mean, rstd; flops and exponentials as
    `group_norm_silu`, and 1 flop. Backward: reads grad_x, grad, x', weight, bias, scale, shift, mean, rstd, writes dx
    (dbranch is the same), dweight, dbias, dscale, dshift; as `group_norm_silu`, and 1 flop.
    He et al. 2016, "Identity mappings in deep residual networks" (the norm opens the branch).
    """
    op = "add_group_norm_silu"
    _check_all(x, weight, bias, num_groups, scale, shift, eps, silu, op)
    _check.shape(op, "branch", branch, "x's shape", x.shape)
    _check.same_dtype(op, "branch", branch, "x", x)
    _check.same_device(op, "branch", branch, "x", x)
    run = _registry.resolve(_registry.OPS[op], x.device, x.dtype, backend)
    channels_last = _channels_last(x)
    folded = _fold(x, channels_last), _fold(branch, channels_last)
    x_out, y, _, _ = run(*folded, weight, bias, scale, shift, num_groups, float(eps), silu, channels_last)
    return _unfold(x_out, x.shape, channels_last), _unfold(y, x.shape, channels_last)


def _channels_last(x):
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1 and x.shape[2:].numel() > 1


def _fold(x, channels_last):
    """x as (B, C, S), or (B, S, C) in channels_last; a copy only if its samples are not dense so."""
    batch, channels, size = x.shape[0], x.shape[1], x.shape[2:].numel()
    if channels_last:
        return x.movedim(1, -1).reshape(batch, size, channels)
    return x.reshape(batch, channels, size)


def _unfold(y, shape, channels_last):
    if channels_last:
        return y.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return y.view(shape)


def _check_all(x, weight, bias, num_groups, scale, shift, eps, silu, op="group_norm_silu"):
    _check.dtype(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be (B, C, ...), got {tuple(x.shape)}; add a batch dimension with x[None]")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"{op}: num_groups must be an int, got {type(num_groups).__name__}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{op}: num_groups must be at least 1 and divide C = {x.shape[1]}, got {num_groups}")
    _check_pair(op, x, {"weight": weight, "bias": bias}, "(C,)", (x.shape[1],))
    _check_pair(op, x, {"scale": scale, "shift": shift}, "(B, C)", (x.shape[0], x.shape[1]))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    if not isinstance(silu, bool):
        raise TypeError(f"{op}: silu must be True or False, got {type(silu).__name__}")


def _check_pair(op, x, pair, symbols, shape):
    """Both given or neither, alike, in x's dtype or float32."""
    (first_name, first), (second_name, second) = pair.items()
    if (first is None) != (second is None):
        missing = first_name if first is None else second_name
        raise ValueError(f"{op}: {first_name} and {second_name} must both be given or both be None, got no {missing}")
    if first is None:
        return
    for name, tensor in pair.items():
        _check.dtype(op, name, tensor)
        _check.shape(op, name, tensor, symbols, shape)
        _check.same_device(op, name, tensor, "x", x)
    if first.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and first.dtype != x.dtype):
        mix = " or torch.float32" if x.element_size() == 2 else ""
        raise TypeError(
            f"{op}: {first_name} must have dtype {x.dtype}{mix} with an x of {x.dtype}, got {first.dtype}; "
            "convert it with .to(x.dtype)"
        )
    _check.same_dtype(op, second_name, second, first_name, first)


# ---- reference: x (B, C, S), or (B, S, C) in channels_last; mean, rstd (B, G) --------------------------------------


def reference_group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu, channels_last):
    x = _channels_first(x, channels_last)
    grouped = _grouped(_wide(x), num_groups)
    size = max(grouped.shape[-1], 1)  # nothing has mean 0
    mean = grouped.sum(-1) / size
    rstd = 1 / torch.sqrt((grouped - mean[:, :, None]).square().sum(-1) / size + eps)
    x_hat = _normalise(x, mean, rstd)
    v = _modulate(x_hat, weight, bias, scale, shift)
    y = F.silu(v) if silu else v
    return _out(_channels_first(y, channels_last), x.dtype), mean, rstd


def reference_group_norm_silu_backward(
    grad, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last
):
    """With x^ = (x - mean) rstd, dv = grad silu'(v) and g = dv (1 + scale) weight, means over a group:

    dx = rstd (g - mean(g) - x^ mean(g x^)),    dshift = sum(dv),    dscale = sum(dv (x^ weight + bias)),
    dbias = sum(dv (1 + scale)),    dweight = sum(dv (1 + scale) x^)          empty where there is no such input
    """
    x = _channels_first(x, channels_last)
    x_hat = _normalise(x, mean, rstd)
    dv = _wide(_channels_first(grad, channels_last))
    if silu:
        v = _modulate(x_hat, weight, bias, scale, shift)
        s = torch.sigmoid(v)
        dv = dv * s * (1 + v * (1 - s))
    du = dv if scale is None else dv * (1 + _row(scale))
    g = du if weight is None else du * _column(weight)
    grouped = lambda t: _grouped(t, num_groups)  # noqa: E731
    mean_g = grouped(g).mean(-1, keepdim=True)
    mean_gx = grouped(g * x_hat).mean(-1, keepdim=True)
    dx = (rstd[:, :, None] * (grouped(g) - mean_g - grouped(x_hat) * mean_gx)).view(x.shape)
    u = x_hat if weight is None else x_hat * _column(weight) + _column(bias)
    none = x.new_empty(0)
    return (
        _out(_channels_first(dx, channels_last), x.dtype),
        none if weight is None else (du * x_hat).sum((0, 2)).to(weight.dtype),
        none.clone() if bias is None else du.sum((0, 2)).to(bias.dtype),
        none.clone() if scale is None else (dv * u).sum(2).to(scale.dtype),
        none.clone() if shift is None else dv.sum(2).to(shift.dtype),
    )


def reference_add_group_norm_silu(x, branch, *rest):
    x_out = _out(_wide(x) + _wide(branch), x.dtype)
    return x_out, *reference_group_norm_silu(x_out, *rest)


def reference_add_group_norm_silu_backward(grad_x, grad, x_out, *rest):
    """dx = dbranch = grad_x + dx of `group_norm_silu` at x'; the rest as there."""
    wide, *rows = reference_group_norm_silu_backward(grad, _wide(x_out), *rest)
    return _out(_wide(grad_x) + wide, x_out.dtype), *rows


def _grouped(x, num_groups):
    batch, channels, size = x.shape
    return x.reshape(batch, num_groups, channels // num_groups * size)


def _normalise(x, mean, rstd):
    grouped = _grouped(_wide(x), mean.shape[1])
    return ((grouped - mean[:, :, None]) * rstd[:, :, None]).view(x.shape)


def _modulate(x_hat, weight, bias, scale, shift):
    v = x_hat if weight is None else x_hat * _column(weight) + _column(bias)
    return v if scale is None else v * (1 + _row(scale)) + _row(shift)


def _channels_first(x, channels_last):
    """(B, S, C) to (B, C, S) and back."""
    return x.transpose(1, 2).contiguous() if channels_last else x


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _column(tensor):
    return _wide(tensor)[:, None]  # (C, 1)


def _row(tensor):
    return _wide(tensor)[:, :, None]  # (B, C, 1)


def _out(tensor, dtype):
    return tensor.to(dtype).contiguous()


# ---- shapes, gradients, schemas ------------------------------------------------------------------------------------


def _fake(x, weight, bias, scale, shift, num_groups, eps, silu, channels_last):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = (x.new_empty((x.shape[0], num_groups), dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), *statistics


def _fake_backward(grad, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last):
    given = lambda t: x.new_empty(0) if t is None else t.new_empty(t.shape)  # noqa: E731
    return x.new_empty(x.shape), given(weight), given(bias), given(scale), given(shift)


def _save(ctx, inputs, output):
    x, weight, bias, scale, shift, ctx.num_groups, _, ctx.silu, ctx.channels_last = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


def _grads(ops, ctx, grad_y, grad_mean, grad_rstd):
    saved = ctx.saved_tensors
    _check.no_grad_needed(
        "group_norm_silu_backward", (grad_y, *saved), "it is differentiable once: drop create_graph=True"
    )
    flags = (ctx.num_groups, ctx.silu, ctx.channels_last)
    dx, *rest = ops.group_norm_silu_backward(grad_y, *saved, *flags)
    given = (None if tensor is None else grad for tensor, grad in zip(saved[1:5], rest, strict=True))
    return dx, *given, None, None, None, None


def _fake_add(x, branch, *rest):
    return x.new_empty(x.shape), *_fake(x, *rest)


def _fake_add_backward(grad_x, *rest):
    return _fake_backward(*rest)


def _save_add(ctx, inputs, output):
    _save(ctx, (output[0], *inputs[2:]), output[1:])


def _add_grads(ops, ctx, grad_x, grad_y, grad_mean, grad_rstd):
    saved = ctx.saved_tensors
    grads = [grad for grad in (grad_x, grad_y) if grad is not None]
    _check.no_grad_needed(
        "add_group_norm_silu_backward", (*grads, *saved), "it is differentiable once: drop create_graph=True"
    )
    grad_y = torch.zeros_like(saved[0]) if grad_y is None else grad_y
    flags = (ctx.num_groups, ctx.silu, ctx.channels_last)
    if grad_x is None:  # x' went nowhere else
        dx, *rest = ops.group_norm_silu_backward(grad_y, *saved, *flags)
    else:
        dx, *rest = ops.add_group_norm_silu_backward(grad_x, grad_y, *saved, *flags)
    given = (None if tensor is None else grad for tensor, grad in zip(saved[1:5], rest, strict=True))
    return dx, dx, *given, None, None, None, None


def _cost(arguments, results):
    x, weight, _, scale, _, _, _, silu, _ = arguments
    flops, exps = ACTIVATIONS["silu"].work(0) if silu else (0, 0)
    flops += 5 + 2 * (weight is not None) + 3 * (scale is not None)
    return per_element(traffic(arguments, results), x.numel(), flops, exps)


def _cost_backward(arguments, results):
    grad, _, weight, _, scale, *_, silu, _ = arguments
    flops, exps = ACTIVATIONS["silu"].work(1) if silu else (0, 0)
    flops += 9 + silu  # x^, the two means, dx; grad silu'(v)
    if weight is not None:
        flops += 4 + 2 * (silu or scale is not None)  # g, dweight, dbias; x^ weight + bias, in v and in dscale
    if scale is not None:
        flops += 5 + 2 * silu  # 1 + scale, dv (1 + scale), dscale, dshift; v
    return per_element(traffic(arguments, results), grad.numel(), flops, exps)


def _cost_add(arguments, results):
    x, branch, *rest = arguments
    return _cost((x, *rest), results[1:]) + Cost(traffic(branch, results[0]), x.numel())


def _cost_add_backward(arguments, results):
    grad_x, *rest = arguments
    return _cost_backward(tuple(rest), results) + Cost(traffic(grad_x), grad_x.numel())


_ROWS = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_registry.define(
    f"group_norm_silu_backward(Tensor grad, Tensor x, {_ROWS}, Tensor mean, Tensor rstd, int num_groups, bool silu, "
    "bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_group_norm_silu_backward,
    fake=_fake_backward,
    module="group_norm_silu",
    cost=_cost_backward,
)
_registry.define(
    f"group_norm_silu(Tensor x, {_ROWS}, int num_groups, float eps, bool silu, bool channels_last) "
    "-> (Tensor, Tensor, Tensor)",
    reference_group_norm_silu,
    fake=_fake,
    backward=_grads,
    setup_context=_save,
    module="group_norm_silu",
    cost=_cost,
)
_registry.define(
    f"add_group_norm_silu_backward(Tensor grad_x, Tensor grad, Tensor x_out, {_ROWS}, Tensor mean, Tensor rstd, "
    "int num_groups, bool silu, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_add_group_norm_silu_backward,
    fake=_fake_add_backward,
    module="group_norm_silu",
    cost=_cost_add_backward,
)
_registry.define(
    f"add_group_norm_silu(Tensor x, Tensor branch, {_ROWS}, int num_groups, float eps, bool silu, bool channels_last) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference_add_group_norm_silu,
    fake=_fake_add,
    backward=_add_grads,
    setup_context=_save_add,
    module="group_norm_silu",
    cost=_cost_add,
)
