"""attention against torch's scaled dot-product attention, each of its backends, and peers, forward and backward.

On a CPU "fused" is torch's own kernel behind our schema, so the goal is to add nothing; torch.compile calls the same
kernel. Shapes are (B, N, H, D). `elements` is the number of multiply-adds of the forward's two products (2 B H N N D),
so ns per element is time per multiply-add; a backward does five products where the forward does two.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, register_baseline, within
from genengine.ops import _registry, attention
from genengine.testing.attention import roundings

STATED = {  # where the goals were stated
    "cpu": {"DiT-XL/2": (2, 256, 16, 72), "hd 64": (1, 1024, 4, 64)},
    "cuda": {  # 16,384 tokens in all, as the papers count, and heads of 2,048 features
        "DiT-XL/2": (64, 256, 16, 72), "DiT-XL/2, 512 px": (16, 1024, 16, 72), "hd 64, 512": (32, 512, 32, 64),
        "hd 64, 4k": (4, 4096, 32, 64), "hd 64, 16k": (1, 16_384, 32, 64), "hd 128, 1k": (16, 1024, 16, 128),
        "hd 128, 4k": (4, 4096, 16, 128), "hd 128, 8k": (2, 8192, 16, 128), "hd 128, 16k": (1, 16_384, 16, 128),
    },
}  # fmt: skip
SHAPES = STATED["cpu"] | {
    "DiT-S/2": (2, 256, 6, 64), "DiT-B/2": (2, 256, 12, 64), "DiT-L/2": (2, 256, 16, 64),
    "SD3, 512 px": (1, 1024, 24, 64),
}  # fmt: skip
CUDA_SHAPES = STATED["cuda"] | {
    "SD3": (2, 4096, 24, 64), "Flux": (1, 4608, 24, 128), "CogVideoX-5B": (2, 17_776, 48, 64),
}  # fmt: skip
TORCHS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
}
CHECKED = 2**26  # scores of as many heads of the first sample as come near to it are checked, in float64


def sdpa(q, k, v, causal=False):
    """torch's op, tokens first."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def plain(q, k, v, causal=False):
    """softmax(q k^T / sqrt(D)) v, one head of one sample at a time: a video's scores would not fit a GPU."""
    out = torch.empty_like(q)
    for sample, head in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[2])).tolist():
        scores = q[sample, :, head] @ k[sample, :, head].mT * q.shape[-1] ** -0.5
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -float("inf"))
        out[sample, :, head] = scores.softmax(-1) @ v[sample, :, head]
    return out


class Work:
    """q, k, v as views into one projection."""

    def __init__(self, case, causal=False):
        batch, tokens, heads, dim = case.shape
        self.causal = causal
        self.inputs = case.randn(batch, tokens, 3, heads, dim).unbind(2)
        self.leaves, self.grad_o, self.scale = calls.leaves(*self.inputs), case.randn(), dim**-0.5
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        self.multiply_adds = 2 * batch * heads * pairs * dim
        self.forward = (*self.inputs, causal, self.scale)

    def cost(self):
        return _registry.OPS["attention"].cost(self.forward, self._results())

    def cost_backward(self):
        arguments = (self.grad_o, *self.inputs, *self._results(), self.causal, self.scale)
        return _registry.OPS["attention_backward"].cost(arguments, self.inputs)

    def _results(self):
        """Tensors of the shapes that the forward gives."""
        batch, tokens, heads, _ = self.grad_o.shape
        return self.grad_o, self.grad_o.new_empty((batch, heads, tokens), dtype=torch.float32)

    def backward(self):
        """autograd's backward of what `attention` runs, the forward outside."""
        return calls.backward(partial(attention, causal=self.causal), self.leaves, self.grad_o)

    def check(self, backward):
        """Some heads of the first sample against the reference in float64, as the op's tests do."""
        tokens = self.grad_o.shape[1]
        part = lambda t: t[:1, ..., : max(1, CHECKED // tokens**2), :]  # noqa: E731
        first = [part(t) for t in (*self.inputs, self.grad_o)]
        allowed = roundings(*first, self.causal, self.scale)
        o = part(attention(*self.inputs, causal=self.causal))
        lse = self._compare("attention", {"o": o}, first[:3], allowed)[1]
        if backward:
            named = dict(zip(("dq", "dk", "dv"), map(part, self.backward()()), strict=True))
            self._compare("attention_backward", named, (first[3], *first[:3], o, lse), allowed)

    def _compare(self, op, found, tensors, allowed):
        run = _registry.OPS[op].overloads["reference"]
        options = (self.causal, self.scale)
        eager, oracle = run(*tensors, *options), run(*map(calls.widened, tensors), *options)
        for (name, value), rounded, exact in zip(found.items(), eager, oracle, strict=False):
            limit = testing.tolerance(rounded, exact) + allowed[name]
            testing.assert_within(testing.error(value, exact), limit, name)
        return eager


def pinned(backend, run):
    """`run` on one of torch's backends; it raises RuntimeError where that cannot."""

    def call():
        with sdpa_kernel(backend):
            return run()

    return call


def backward_of(work, backend):
    """autograd's backward through torch's op, its forward done at the first call."""
    graph = cache(lambda: calls.backward(partial(sdpa, causal=work.causal), work.leaves, work.grad_o))
    run = lambda: graph()()  # noqa: E731
    return run if backend is None else pinned(backend, run)


def _torchs(case, run):
    """torch as it chooses, and each of its backends; `run(backend)` makes the variant."""
    named = {f"torch, {backend.name.lower()}": run(backend) for backend in TORCHS[torch.device(case.device).type]}
    return {"torch": run(None)} | named


def _goals(case):
    device = torch.device(case.device).type
    if case.label not in STATED[device] or (device == "cuda" and case.dtype != torch.bfloat16):
        return ()
    if device == "cpu":
        return (within(1.1, "torch"),)
    by = 1.4 if case.label.startswith("DiT") else 1.0
    return tuple(faster(f"torch, {backend.name.lower()}", by) for backend in TORCHS["cuda"])


COMMON = {
    "shapes": SHAPES, "cuda_shapes": CUDA_SHAPES, "dtypes": ("float32", "bfloat16"), "group": "attention",
    "axes": {"batch": 0, "tokens": 1, "heads": 2},
}  # fmt: skip


def forward(causal, case):
    work = Work(case, causal)
    run = lambda: sdpa(*work.inputs, causal)  # noqa: E731
    variants = _torchs(case, lambda backend: run if backend is None else pinned(backend, run))
    return Benchmark(
        {"fused": lambda: attention(*work.inputs, causal=causal), **variants}, lambda: work.check(False),
        inputs=work.inputs, oracle=partial(plain, causal=causal), cost=work.cost(),
        elements=work.multiply_adds, goals=_goals(case),
    )  # fmt: skip


def backward(causal, case):
    """autograd's backward, the forward outside the timing."""
    work = Work(case, causal)
    variants = {"fused": work.backward()}
    return Benchmark(
        variants | _torchs(case, lambda backend: backward_of(work, backend)), lambda: work.check(True),
        cost=work.cost_backward(), elements=work.multiply_adds * 5 // 2, goals=_goals(case),
    )  # fmt: skip


for _causal, _quick in ((False, {}), (True, {"quick": ()})):
    _suffix = ", causal" if _causal else ""
    register(f"attention{_suffix}", **COMMON, **_quick)(partial(forward, _causal))
    register(f"attention_backward{_suffix}", **COMMON, quick=())(partial(backward, _causal))


@register_baseline("attention", "flash_attn", requires="flash_attn")
def flash_attention(q, k, v):
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


@register_baseline("attention", "flash_attn 3", requires="flash_attn_interface")
def flash_attention_3(q, k, v):
    from flash_attn_interface import flash_attn_func

    return calls.several(flash_attn_func(q, k, v))[0]  # some releases return lse, too


@register_baseline("attention", "xformers", requires="xformers")
def xformers_attention(q, k, v):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)
