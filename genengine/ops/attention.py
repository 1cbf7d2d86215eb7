"""attention: softmax(q k^T * scale) v over tokens, heads beside the features, of any head dim to 256.

The files it lacks, and why (an exception to "an op is one name", kept here and in tests/test_architecture.py):
csrc/cpu/attention.cpp and csrc/cpu/isa/attention.cpp, for the CPU kernel is torch's own, which is vectorised, tiled and
returns the log-sum-exp; csrc/cuda/attention.cu, for on a GPU the portable kernel is Triton's, and CUDA C++ pays only
where it is written for one architecture: Hopper's is csrc/cuda/hopper/attention.cu, for 16-bit inputs and the head dims
that image models have. Where it cannot run Triton's does, and where neither was seen right torch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine.ops import _check, _ranges, _registry
from genengine.ops._cost import per_element, traffic

MAX_HEAD_DIM = 256
HOPPER_HEAD_DIMS = (64, 72, 80, 96, 128)
_SCALES = (1e-30, 1e30)  # positive in float32: a masked score, -inf, must stay -inf


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, self or cross.

        s = scale q k^T,    lse = log(sum(exp(s))),    o = exp(s - lse) v

    per sample and head, the sum over the keys: o = softmax(s) v.

    q: (B, N, H, D). k, v: (B, M, H, D); all three may be views into one packed projection, read through their strides
    (only an innermost stride other than 1 costs a copy). D in 1..256.
    causal: query i sees keys 0..i (M = N needed). scale: in 1e-30 .. 1e30, default 1 / sqrt(D).
    return_lse: also return the log-sum-exp, which is not differentiable. backend: see `genengine.backend`; "cpu" is
    torch's own kernel (which takes a NaN in q for an o of zeros), "cuda" is written for Hopper GPUs (compute capability
    9.0), 16-bit inputs and D of 64, 72, 80, 96 or 128; there rows that do not begin on 16 bytes cost a copy, too.
    dtypes: all float32, float16, bfloat16 or float64, alike. Sums are float32; 16-bit kernels round the weights to the
    inputs' dtype before the product with v. Differentiable once in q, k and v; the gradients are deterministic, but for
    the last bits of "cuda"'s dq, which are so under torch.use_deterministic_algorithms(True).

    Returns o (B, N, H, D) in q's dtype, contiguous; with return_lse, (o, lse): lse (B, H, N) float32 (float64 of
    float64), in nats. Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Cost: reads q, k, v, writes o, lse; the products' 4 D flops and 1 exponential per head and pair of query and key,
    B H N M of them, causal B H N (N + 1) / 2. Backward: reads grad_o, q, k, v, o, lse, writes dq, dk, dv; 10 D flops
    (the scores are formed again), 1 exponential.
    Vaswani et al. 2017, "Attention is all you need"; computed in blocks as in Dao et al. 2022, "FlashAttention".
    """
    op = "attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check.dtype(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, N, H, D), got {tuple(tensor.shape)}")
    batch, tokens, heads, dim = q.shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q must have a head dim D in 1..{MAX_HEAD_DIM}, got {dim}; use more heads")
    _check.shape(op, "k", k, "(B, M, H, D)", (batch, k.shape[1], heads, dim))
    _check.shape(op, "v", v, "(B, M, H, D)", k.shape)
    for name, tensor in (("k", k), ("v", v)):
        _check.same_device(op, name, tensor, "q", q)
        _check.same_dtype(op, name, tensor, "q", q)
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    if causal and k.shape[1] != tokens:
        raise ValueError(f"{op}: causal needs as many keys as queries, N = {tokens}, got M = {k.shape[1]}")
    if k.shape[1] == 0 and tokens > 0:
        raise ValueError(f"{op}: k must hold at least one key, got M = 0")
    scale, name = _scale(scale, dim), _registry.choose(_OP, q.device, q.dtype, backend, (q, k, v))
    if not return_lse and (name == "cpu" or (name == "reference" and not (backend or _registry.named(_OP)))):
        run = _registry.guarded(_OP, _torch_attention)
        if _ranges.kernels is not None:
            run = _registry.ranged(_OP, "torch", run)
        return run(q, k, v, causal, scale)
    o, lse = _registry.overload(_OP, name)(q, k, v, causal, scale)
    return (o, lse) if return_lse else o


def _torch_attention(q, k, v, causal, scale):
    """torch's best kernel, called as torch differentiates and compiles it: also where no kernel of ours is verified."""
    if torch.is_autocast_enabled(q.device.type):  # as our kernels, it casts nothing
        with torch.autocast(q.device.type, enabled=False):
            return _torch_attention(q, k, v, causal, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2).contiguous()


def _scale(scale, dim):
    low, high = _SCALES
    if scale is None:
        return dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"attention: scale must be a float or None, got {type(scale).__name__}")
    if not low <= scale <= high:
        raise ValueError(f"attention: scale must be in {low:g} .. {high:g}, got {scale}; put a sign into q")
    return float(scale)


# ---- reference: the whole N x M matrix, its entries rounded to the inputs' dtype where the kernels round ------------


def reference_attention(q, k, v, causal, scale):
    with torch.autocast(q.device.type, enabled=False):
        s = _scores(q, k, causal, scale)
        lse = s.logsumexp(-1)  # (B, H, N)
        o = _rounded(torch.exp(s - lse[..., None]), q) @ _heads_first(v)
    return _tokens_first(o, q), lse


def reference_attention_backward(grad_o, q, k, v, o, lse, causal, scale):
    """With p = exp(s - lse) and delta = sum over D of grad_o o:

    dv = p^T grad_o,    ds = p (grad_o v^T - delta),    dq = scale ds k,    dk = scale ds^T q
    """
    with torch.autocast(q.device.type, enabled=False):
        grad_o, o, value = _heads_first(grad_o), _heads_first(o), _heads_first(v)
        p = torch.exp(_scores(q, k, causal, scale) - lse[..., None])
        ds = _rounded(p * (grad_o @ value.mT - (grad_o * o).sum(-1, keepdim=True)), q)
        dq, dk = scale * (ds @ _heads_first(k)), scale * (ds.mT @ _heads_first(q))
        dv = _rounded(p, q).mT @ grad_o
    return tuple(_tokens_first(gradient, q) for gradient in (dq, dk, dv))


def _scores(q, k, causal, scale):
    s = scale * (_heads_first(q) @ _heads_first(k).mT)  # (B, H, N, M)
    if causal:
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(future, -float("inf"))
    return s


def _heads_first(tensor):
    tensor = tensor.transpose(1, 2)  # (B, H, N, D)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tokens_first(tensor, like):
    return tensor.transpose(1, 2).to(like.dtype).contiguous()  # (B, N, H, D)


def _rounded(tensor, like):
    return tensor.to(like.dtype).to(tensor.dtype)


# ---- CPU: torch's own kernels --------------------------------------------------------------------------------------


def _cpu_attention(q, k, v, causal, scale):
    if q.numel() == 0:
        return _fake_attention(q, k, v, causal, scale)
    q, k, v = (_unit_rows(t).transpose(1, 2) for t in (q, k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
    return o.transpose(1, 2).contiguous(), lse.contiguous()  # o lies in memory as (B, N, H, D): no copy


def _cpu_attention_backward(grad_o, q, k, v, o, lse, causal, scale):
    if q.numel() == 0:
        return tuple(torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    grad_o, q, k, v, o = (_unit_rows(t).transpose(1, 2) for t in (grad_o, q, k, v, o))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_o, q, k, v, o, lse, 0.0, causal, scale=scale
    )
    return tuple(t.transpose(1, 2).contiguous() for t in grads)


def _unit_rows(tensor):
    """torch's kernels take an innermost stride of 1 for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# ---- CUDA C++: Hopper's kernels --------------------------------------------------------------------------------------


def _limits(backend, dtype, arguments):
    """What the kernels of csrc/cuda/hopper do not take; arguments begin with a (B, N, H, D)."""
    if backend != "cuda":
        return None
    if reason := _registry.missing_kernel("hopper_attention_backward", "cuda"):
        return reason
    if dtype == torch.float32:
        return "it takes float16 and bfloat16, not torch.float32"
    major, minor = _capability(arguments[0].device.index if arguments else None)
    if (major, minor) != (9, 0):
        return f"it is written for Hopper GPUs (compute capability 9.0), this one has {major}.{minor}"
    if arguments is not None and arguments[0].shape[-1] not in HOPPER_HEAD_DIMS:
        dims = ", ".join(map(str, HOPPER_HEAD_DIMS))
        return f"it takes head dims of {dims}, not {arguments[0].shape[-1]}"
    return None


@torch._dynamo.assume_constant_result
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _cuda_attention_backward(*arguments):
    """In PyTorch's own words whether dq must be deterministic: its sums over tiles of keys then wait for their turn."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.genengine.hopper_attention_backward(*arguments, deterministic)


# ---- shapes, gradients, schemas ------------------------------------------------------------------------------------


def _fake_attention(q, k, v, causal, scale):
    batch, tokens, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=wide)


def _fake_attention_backward(grad_o, q, k, v, o, lse, causal, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.mark_non_differentiable(lse)


def _grads(ops, ctx, grad_o, _):
    q, k, v, o, lse = ctx.saved_tensors
    tensors = (grad_o, q, k, v, o, lse)
    _check.no_grad_needed("attention_backward", tensors, "it is differentiable once: drop create_graph=True")
    return (*ops.attention_backward(*tensors, ctx.causal, ctx.scale), None, None)


def _cost(arguments, results):
    q, k, v, causal, _ = arguments
    return _cost_of_products(2, q, k, causal, traffic(q, k, v, results))


def _cost_backward(arguments, results):
    *tensors, causal, _ = arguments
    _, q, k, *_ = tensors
    return _cost_of_products(5, q, k, causal, traffic(tensors, results))


def _cost_of_products(count, q, k, causal, moved):
    """Of what is between the products only the exponentials: their flops alone are compared, everywhere."""
    batch, queries, heads, dim = q.shape
    seen = queries * (queries + 1) // 2 if causal else queries * k.shape[1]
    return per_element(moved, batch * heads * seen, flops=2 * count * dim, exps=1)


_registry.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    reference_attention_backward,
    fake=_fake_attention_backward,
    module="attention",
    cost=_cost_backward,
    cpu=_cpu_attention_backward,
    cuda=_cuda_attention_backward,
    limits=_limits,
)
_OP = _registry.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)",
    reference_attention,
    fake=_fake_attention,
    backward=_grads,
    setup_context=_save,
    module="attention",
    cost=_cost,
    cpu=_cpu_attention,
    limits=_limits,
)
