"""adaln, gated_adaln: adaptive layer normalisation, and the residual-gate-norm-modulate chain between two branches."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._cost import each

MAX_DIM = 8192  # the longest row that the kernels keep in registers or in the first-level cache
_HALVES = (torch.float16, torch.bfloat16)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Layer normalisation without own weights, modulated per sample.

        h = (x - mean) / sqrt(var + eps) * (1 + scale) + shift

    mean and var (biased) over the last dimension, accumulated in float32 (float64 for float64).

    x: (B, ..., D), any number of middle dimensions. scale, shift: (B, D), may be views into one modulation table.
    eps: added to the variance, >= 0. backend: see `genengine.backend`; D > 8192 runs on the reference.
    dtypes: all float32, float16, bfloat16 or float64 (reference only); or x float32 and scale, shift both 16-bit.
    Nothing is cast, under autocast neither. Differentiable once, in x, scale and shift, in reverse mode.
    Returns h, like x in shape and like scale in dtype, contiguous.
    Cost: reads x, scale, shift, writes h; 8 flops, no exponential per element of x. Backward: reads grad_h, x, scale,
    writes dx, dscale, dshift; 17 flops.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Ba et al. 2016, "Layer normalization"; Peebles & Xie 2023, "Scalable diffusion models with transformers" (adaLN).
    """
    _check_all("adaln", x, {}, {"scale": scale, "shift": shift}, eps)
    h = _overload("adaln", x, backend)(_tokens(x), scale, shift, float(eps))
    return h.view(x.shape)


def gated_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the norm that opens the next, in one pass.

        x' = x + gate * branch
        h  = adaln(x', scale, shift)

    x, branch: (B, ..., D). gate, scale, shift: (B, D), may be views into one modulation table.
    dtypes: as in `adaln`; in the mix x is float32 and branch, gate, scale, shift are 16-bit, all alike.
    eps, backend: as in `adaln`. Differentiable once, in all five tensors, in reverse mode.
    Returns x' in x's dtype and h in scale's, both like x in shape, contiguous. h is the norm of x' as it was rounded.
    Cost: reads x, branch, gate, scale, shift, writes x', h; 10 flops, no exponential per element of x. Backward: reads
    grad_x, grad_h, x', branch, gate, scale, writes dx, dbranch, dgate, dscale, dshift; 21 flops.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Peebles & Xie 2023, "Scalable diffusion models with transformers" (adaLN-Zero).
    """
    _check_all("gated_adaln", x, {"branch": branch}, {"gate": gate, "scale": scale, "shift": shift}, eps)
    op = _overload("gated_adaln", x, backend)
    x_out, h = op(_tokens(x), _tokens(branch), gate, scale, shift, float(eps))
    return x_out.view(x.shape), h.view(x.shape)


def _tokens(x):
    if x.dim() == 3:
        return x
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])  # (B, N, D)


def _overload(name, x, backend):
    op = _registry.OPS[name]
    if x.shape[-1] <= MAX_DIM:
        return _registry.resolve(op, x.device, x.dtype, backend)
    wanted = _registry._forced if backend is None else backend
    if wanted not in (None, "reference"):
        reason = f"D must be at most {MAX_DIM}, got {x.shape[-1]}"
        raise RuntimeError(f"{name}: backend {wanted!r} cannot run here: {reason}")
    return _registry.overload(op, "reference")


def _check_all(op, x, tokens, rows, eps):
    """tokens: tensors shaped like x; rows: the (B, D) modulations."""
    _check.dtype(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be (B, ..., D), got {tuple(x.shape)}; add a batch dimension with x[None]")
    for name, tensor in (tokens | rows).items():
        _check.dtype(op, name, tensor)
        if name in tokens:
            _check.shape(op, name, tensor, "(B, ..., D), x's shape", x.shape)
        else:
            _check.shape(op, name, tensor, "(B, D)", (x.shape[0], x.shape[-1]))
        _check.same_device(op, name, tensor, "x", x)
        if name != "scale":
            _check.same_dtype(op, name, tensor, "scale", rows["scale"])
    scale = rows["scale"]
    if scale.dtype != x.dtype and not (x.dtype == torch.float32 and scale.dtype in _HALVES):
        mix = ", float16 or bfloat16" if x.dtype == torch.float32 else ""
        raise TypeError(
            f"{op}: scale must have dtype {x.dtype}{mix} with an x of {x.dtype}, got {scale.dtype}; "
            "convert it with .to(x.dtype)"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


# ---- reference: x (B, N, D), scale, shift, gate (B, D) -----------------------------------------------------------


def reference_adaln(x, scale, shift, eps):
    x_hat, _ = _normalise(x, eps)
    h = x_hat * (1 + _row(scale)) + _row(shift)
    return _out(h, scale.dtype)


def reference_gated_adaln(x, branch, gate, scale, shift, eps):
    x_out = _out(_wide(x) + _row(gate) * _wide(branch), x.dtype)
    return x_out, reference_adaln(x_out, scale, shift, eps)


def reference_adaln_backward(grad_h, x, scale, eps):
    """With x^ = (x - mean) rstd and g = grad_h (1 + scale), means over D and sums over N:

    dx = rstd (g - mean(g) - x^ mean(g x^)),    dscale = sum(grad_h x^),    dshift = sum(grad_h)
    """
    dx, dscale, dshift = _backward(grad_h, x, scale, eps)
    return _out(dx, x.dtype), _out(dscale, scale.dtype), _out(dshift, scale.dtype)


def reference_gated_adaln_backward(grad_x, grad_h, x_out, branch, gate, scale, eps):
    """With d = grad_x + adaln_backward's dx at x':    dx = d,    dbranch = gate d,    dgate = sum(branch d)."""
    dx, dscale, dshift = _backward(grad_h, x_out, scale, eps)
    dx = _wide(grad_x) + dx
    dbranch = _row(gate) * dx
    dgate = (_wide(branch) * dx).sum(1)
    narrow = scale.dtype
    return (_out(dx, x_out.dtype), *(_out(g, narrow) for g in (dbranch, dgate, dscale, dshift)))


def _backward(grad_h, x, scale, eps):
    x_hat, rstd = _normalise(x, eps)
    grad_h = _wide(grad_h)
    g = grad_h * (1 + _row(scale))
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return dx, (grad_h * x_hat).sum(1), grad_h.sum(1)


def _normalise(x, eps):
    x = _wide(x)
    centred = x - x.mean(-1, keepdim=True)
    rstd = 1 / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _row(tensor):
    return _wide(tensor)[:, None]  # (B, 1, D)


def _out(tensor, dtype):
    return tensor.to(dtype).contiguous()


# ---- shapes, gradients, schemas ------------------------------------------------------------------------------------


def _like(shape_of, dtype_of):
    return shape_of.new_empty(shape_of.shape, dtype=dtype_of.dtype)


def _fake_adaln(x, scale, shift, eps):
    return _like(x, scale)


def _fake_gated_adaln(x, branch, gate, scale, shift, eps):
    return _like(x, x), _like(x, scale)


def _fake_adaln_backward(grad_h, x, scale, eps):
    return _like(x, x), _like(scale, scale), _like(scale, scale)


def _fake_gated_adaln_backward(grad_x, grad_h, x_out, branch, gate, scale, eps):
    return _like(x_out, x_out), _like(x_out, scale), *(_like(scale, scale) for _ in range(3))


def _save_adaln(ctx, inputs, output):
    x, scale, _, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _save_gated_adaln(ctx, inputs, output):
    _, branch, gate, scale, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)


def _adaln_grads(ops, ctx, grad_h):
    x, scale = ctx.saved_tensors
    grad_h = _or_zeros(grad_h, x, scale)
    _check.no_grad_needed("adaln_backward", (grad_h, x, scale), _ONCE)
    return (*ops.adaln_backward(grad_h, x, scale, ctx.eps), None)


def _gated_adaln_grads(ops, ctx, grad_x, grad_h):
    x_out, branch, gate, scale = ctx.saved_tensors
    grad_x, grad_h = _or_zeros(grad_x, x_out, x_out), _or_zeros(grad_h, x_out, scale)
    _check.no_grad_needed("gated_adaln_backward", (grad_x, grad_h, x_out, branch, gate, scale), _ONCE)
    return (*ops.gated_adaln_backward(grad_x, grad_h, x_out, branch, gate, scale, ctx.eps), None)


_ONCE = "it is differentiable once: drop create_graph=True"


def _or_zeros(grad, shape_of, dtype_of):
    """The gradient of an unused output may come as None."""
    return _like(shape_of, dtype_of).zero_() if grad is None else grad


_registry.define(
    "adaln_backward(Tensor grad_h, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference_adaln_backward,
    fake=_fake_adaln_backward,
    module="adaln",
    cost=each(flops=17),
)
_registry.define(
    "adaln(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    reference_adaln,
    fake=_fake_adaln,
    backward=_adaln_grads,
    setup_context=_save_adaln,
    module="adaln",
    cost=each(flops=8),
)
_registry.define(
    "gated_adaln_backward(Tensor grad_x, Tensor grad_h, Tensor x_out, Tensor branch, Tensor gate, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_gated_adaln_backward,
    fake=_fake_gated_adaln_backward,
    module="adaln",
    cost=each(flops=21),
)
_registry.define(
    "gated_adaln(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)",
    reference_gated_adaln,
    fake=_fake_gated_adaln,
    backward=_gated_adaln_grads,
    setup_context=_save_gated_adaln,
    module="adaln",
    cost=each(flops=10),
)
