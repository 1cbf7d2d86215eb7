"""qk_norm_rope: RMSNorm of q and k per head, then rotary position embedding, on a packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._cost import per_element, traffic

MAX_DIM = 256  # the longest head that the kernels keep in registers


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: bool = True,
    interleaved: bool = True,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise the queries and keys of every head, then rotate them to their positions; values pass through.

        y    = x / sqrt(mean(x^2) + eps) * weight                      of q and k, over D; norm=False: y = x
        a, b = y[2i], y[2i + 1]                                        interleaved;  else y[i], y[i + R/2]
        a, b <- a cos_i - b sin_i, a sin_i + b cos_i                   0 <= i < R/2; y[R:] is not rotated

    Accumulated in float32 (float64 for float64): one read and one write, in place two thirds of that.

    qkv: (B, N, 3, H, D), read through its strides: a view of the projection's (B, N, 3 H D). float32, float16, bfloat16
    or float64 (reference only); D > 256 runs on the reference.
    q_weight, k_weight: (D,), both or neither, in qkv's dtype or float32 beside a 16-bit qkv.
    cos, sin: (N, R/2) or (B, N, R/2) with 2 <= R <= D, float32 (or float64 beside a float64 qkv), as
    `rotary.rope_table` makes them; neither: no rotation. Not differentiable.
    eps: added to the mean square, >= 0. interleaved: which elements form a pair (RoFormer's, or GPT-NeoX's halves).
    inplace: write q and k into qkv and return it; no backward. backend: see `genengine.backend`.

    Returns (B, N, 3, H, D) in qkv's dtype, contiguous; or qkv. Differentiable once, in qkv and the weights.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run or a gradient would
    be lost.
    Cost: reads qkv, weights, cos, sin, writes out (in place: of qkv and out q and k alone); 3 flops per element of q
    and k for the norm, 1 for a weight, 3 for the rotation if it is rotated, no exponential. Backward: reads grad,
    weights, cos, sin, with the norm q and k, writes dqkv, dweights; 8 flops, 3 and 3.
    Zhang & Sennrich 2019, "Root mean square layer normalization"; Su et al. 2021, "RoFormer"; norms of q and k:
    Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters"; Esser et al. 2024.
    """
    op = "qk_norm_rope"
    _check_qkv(op, qkv)
    _check_weights(op, qkv, q_weight, k_weight, norm)
    cos, sin = _check_tables(op, qkv, cos, sin, norm)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    options = (q_weight, k_weight, cos, sin, float(eps), norm, interleaved)
    if not inplace:
        return _overload("qk_norm_rope", qkv, backend)(qkv, *options)
    _check.no_grad_needed(f"{op} with inplace=True", (qkv, q_weight, k_weight), "pass inplace=False")
    if any(stride == 0 and size > 1 for size, stride in zip(qkv.shape, qkv.stride(), strict=True)):
        raise ValueError(f"{op}: qkv must not be expanded with inplace=True, got strides {qkv.stride()}; clone it")
    rows = qkv if qkv.stride(-1) == 1 or qkv.shape[-1] <= 1 else qkv.contiguous()
    _overload("qk_norm_rope_", rows, backend)(rows, *options)
    return qkv if rows is qkv else qkv.copy_(rows)


def _overload(name, qkv, backend):
    op = _registry.OPS[name]
    if qkv.shape[-1] <= MAX_DIM:
        return _registry.resolve(op, qkv.device, qkv.dtype, backend)
    wanted = backend or _registry.named(op)
    if wanted not in (None, "reference"):
        reason = f"D must be at most {MAX_DIM}, got {qkv.shape[-1]}"
        raise RuntimeError(f"qk_norm_rope: backend {wanted!r} cannot run here: {reason}")
    return _registry.overload(op, "reference")


def _check_qkv(op, qkv):
    _check.dtype(op, "qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"{op}: qkv must be (B, N, 3, H, D), got {tuple(qkv.shape)}; "
            "view the projection's (B, N, 3 H D) with .view(B, N, 3, H, D)"
        )


def _check_weights(op, qkv, q_weight, k_weight, norm):
    if (q_weight is None) != (k_weight is None):
        given = "q_weight" if k_weight is None else "k_weight"
        raise ValueError(f"{op}: q_weight and k_weight must be given both or neither, got {given} alone")
    if q_weight is None:
        return
    if not norm:
        raise ValueError(f"{op}: q_weight must be None with norm=False, got a tensor; pass norm=True")
    allowed = {torch.float32: (torch.float32,), torch.float64: (torch.float64,)}.get(
        qkv.dtype, (qkv.dtype, torch.float32)
    )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check.dtype(op, name, weight, allowed)
        _check.shape(op, name, weight, "(D,)", qkv.shape[-1:])
        _check.same_device(op, name, weight, "qkv", qkv)
    _check.same_dtype(op, "k_weight", k_weight, "q_weight", q_weight)


def _check_tables(op, qkv, cos, sin, norm):
    """cos and sin as the dispatcher ops take them: (1 or B, N, R/2)."""
    if (cos is None) != (sin is None):
        raise ValueError(
            f"{op}: cos and sin must be given both or neither, got {'cos' if sin is None else 'sin'} alone"
        )
    if cos is None:
        if not norm:
            raise ValueError(f"{op}: norm must be True without cos and sin, got False: nothing would be done")
        return None, None
    allowed = (torch.float32, torch.float64) if qkv.dtype == torch.float64 else (torch.float32,)
    batch, tokens, _, _, dim = qkv.shape
    for name, table in (("cos", cos), ("sin", sin)):
        _check.dtype(op, name, table, allowed)
        _check.same_device(op, name, table, "qkv", qkv)
    half = cos.shape[-1] if cos.dim() else 0
    if not 2 <= 2 * half <= dim:
        raise ValueError(f"{op}: cos must be (N, R/2) or (B, N, R/2) with 2 <= R <= D = {dim}, got {tuple(cos.shape)}")
    per_sample = cos.dim() == 3
    symbols, expected = ("(B, N, R/2)", (batch, tokens, half)) if per_sample else ("(N, R/2)", (tokens, half))
    _check.shape(op, "cos", cos, symbols, expected)
    _check.shape(op, "sin", sin, "cos's shape", cos.shape)
    _check.no_grad_needed(op, (cos, sin), "only qkv and the weights are differentiable: detach cos and sin")
    return (cos, sin) if per_sample else (cos[None], sin[None])


# ---- reference: qkv (B, N, 3, H, D), weights (D,), cos, sin (1 or B, N, R/2) -----------------------------------------


def reference(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    out = qkv.clone(memory_format=torch.contiguous_format)
    for part, weight in enumerate((q_weight, k_weight)):
        y = _wide(qkv[:, :, part])
        if norm:
            y, _ = _normalise(y, eps)
        if weight is not None:
            y = y * _wide(weight)
        out[:, :, part] = _rotate(y, cos, sin, interleaved).to(qkv.dtype)
    return out


def reference_(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    out = reference(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved)
    qkv[:, :, :2].copy_(out[:, :, :2])


def reference_backward(grad, qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    """With x^ = x / sqrt(mean(x^2) + eps), r = 1 / sqrt(mean(x^2) + eps), g = grad rotated back, means over D:

    dx = r (g weight - x^ mean(g weight x^)),    dweight = sum(g x^) over B, N and H;    norm=False: dx = g
    """
    dqkv = grad.clone(memory_format=torch.contiguous_format)
    found = []
    for part, weight in enumerate((q_weight, k_weight)):
        g = _rotate(_wide(grad[:, :, part]), cos, None if sin is None else -sin, interleaved)
        dx, dweight = g, None
        if norm:
            x_hat, rstd = _normalise(_wide(qkv[:, :, part]), eps)
            dweight = (g * x_hat).sum((0, 1, 2))
            g = g if weight is None else g * _wide(weight)
            dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
        dqkv[:, :, part] = dx.to(qkv.dtype)
        found.append(qkv.new_empty(0) if weight is None else dweight.to(weight.dtype))
    return dqkv, *found


def _normalise(x, eps):
    rstd = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _rotate(y, cos, sin, interleaved):
    if cos is None:
        return y
    half = cos.shape[-1]
    c, s = (table[:, :, None].to(y.dtype) for table in (cos, sin))  # (1 or B, N, 1, R/2)
    a, b = (y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2]) if interleaved else y[..., : 2 * half].chunk(2, -1)
    pair = a * c - b * s, a * s + b * c
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated, y[..., 2 * half :]], -1)


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- shapes, gradients, schemas --------------------------------------------------------------------------------------


def _fake(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    return qkv.new_empty(qkv.shape)


def _fake_(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    return None


def _fake_backward(grad, qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    like = [qkv.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight)]
    return qkv.new_empty(qkv.shape), *like


def _setup_context(ctx, inputs, output):
    qkv, q_weight, k_weight, cos, sin, ctx.eps, ctx.norm, ctx.interleaved = inputs
    ctx.save_for_backward(qkv if ctx.norm else None, q_weight, k_weight, cos, sin)  # a rotation needs no input


def _grads(ops, ctx, grad):
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    once = "it is differentiable once: drop create_graph=True"
    _check.no_grad_needed("qk_norm_rope_backward", (grad, qkv, q_weight, k_weight), once)
    qkv = grad if qkv is None else qkv
    options = (q_weight, k_weight, cos, sin, ctx.eps, ctx.norm, ctx.interleaved)
    dqkv, *dweights = ops.qk_norm_rope_backward(grad, qkv, *options)
    dweights = (None, None) if q_weight is None else dweights
    return (dqkv, *dweights, None, None, None, None, None)


def _cost(arguments, results):
    return _cost_per_head(traffic(arguments, results), arguments, norm_flops=3, weight_flops=1)


def _cost_(arguments, results):
    qkv, *options = arguments
    q_and_k = qkv[:, :, :2]
    return _cost_per_head(traffic(q_and_k, options, q_and_k), arguments, norm_flops=3, weight_flops=1)


def _cost_backward(arguments, results):
    grad, qkv, *options = arguments
    norm = options[5]
    moved = traffic(grad, qkv[:, :, :2] if norm else None, options, results)
    return _cost_per_head(moved, arguments[1:], norm_flops=8, weight_flops=3)


def _cost_per_head(moved, arguments, norm_flops, weight_flops):
    qkv, q_weight, _, cos, _, _, norm, _ = arguments
    batch, tokens, _, heads, dim = qkv.shape
    rotated = 0 if cos is None else 2 * cos.shape[-1]
    flops = dim * (norm_flops * norm + weight_flops * (q_weight is not None)) + 3 * rotated
    return per_element(moved, 2 * batch * tokens * heads, flops)


_OPTIONS = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, bool norm, bool interleaved"
_registry.define(
    f"qk_norm_rope_backward(Tensor grad, Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference_backward,
    fake=_fake_backward,
    module="qk_norm_rope",
    cost=_cost_backward,
)
_registry.define(
    f"qk_norm_rope(Tensor qkv, {_OPTIONS}) -> Tensor",
    reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_grads,
    module="qk_norm_rope",
    cost=_cost,
)
_registry.define(
    f"qk_norm_rope_(Tensor(a!) qkv, {_OPTIONS}) -> ()", reference_, fake=_fake_, module="qk_norm_rope", cost=_cost_
)
