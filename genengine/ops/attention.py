"""attention: softmax(q k^T * scale) v over tokens, heads beside the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine.ops import _check, _registry

MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention, self or cross.

        o = softmax(q k^T * scale) v

    per sample and head, the softmax over the keys.

    q: (B, N, H, D). k, v: (B, M, H, D); all three may be views into one packed projection. D at most 256.
    causal: query i sees keys 0..i (M = N needed). scale: default 1 / sqrt(D). backend: see `genengine.backend`.
    dtypes: all float32, float16, bfloat16 or float64, alike. Differentiable.
    Returns o (B, N, H, D).
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Vaswani et al. 2017, "Attention is all you need".
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.dtype("attention", name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must be (B, N, H, D), got {tuple(tensor.shape)}")
    batch, tokens, heads, dim = q.shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention: q must have a head dim D in 1..{MAX_HEAD_DIM}, got {dim}; use more heads")
    _check.shape("attention", "k", k, "(B, M, H, D)", (batch, k.shape[1], heads, dim))
    _check.shape("attention", "v", v, "(B, M, H, D)", k.shape)
    for name, tensor in (("k", k), ("v", v)):
        _check.same_device("attention", name, tensor, "q", q)
        _check.same_dtype("attention", name, tensor, "q", q)
    if not isinstance(causal, bool):
        raise TypeError(f"attention: causal must be a bool, got {type(causal).__name__}")
    if causal and k.shape[1] != tokens:
        raise ValueError(f"attention: causal needs as many keys as queries, N = {tokens}, got M = {k.shape[1]}")
    if k.shape[1] == 0 and tokens > 0:
        raise ValueError("attention: k must hold at least one key, got M = 0")
    if scale is None:
        scale = dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"attention: scale must be a float or None, got {type(scale).__name__}")
    _registry.resolve(_OP, q.device, q.dtype, backend)  # a named backend is refused
    # Until kernels exist: torch's own op, which torch also differentiates (it keeps the log-sum-exp) and compiles.
    return reference_attention(q, k, v, causal, float(scale))


# ---- reference -----------------------------------------------------------------------------------------------------


def reference_attention(q, k, v, causal, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, N, D)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)  # softmax(q k^T * scale) v
    return o.transpose(1, 2).contiguous()  # (B, N, H, D)


def reference_attention_backward(grad_o, q, k, v, causal, scale):
    """The gradients of the reference, by recomputing it under autograd."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o = reference_attention(*leaves, causal, scale)
    return tuple(g.contiguous() for g in torch.autograd.grad(o, leaves, grad_o))


def _fake_attention(q, k, v, causal, scale):
    return q.new_empty(q.shape)


def _fake_attention_backward(grad_o, q, k, v, causal, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _grads(ops, ctx, grad_o):
    q, k, v = ctx.saved_tensors
    _check.no_grad_needed("attention_backward", (grad_o, q, k, v), "it is differentiable once: drop create_graph=True")
    return (*ops.attention_backward(grad_o, q, k, v, ctx.causal, ctx.scale), None, None)


_registry.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    reference_attention_backward,
    fake=_fake_attention_backward,
    module="attention",
    kernels=(),
)
_OP = _registry.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> Tensor",
    reference_attention,
    fake=_fake_attention,
    backward=_grads,
    setup_context=_save,
    module="attention",
    kernels=(),
)
