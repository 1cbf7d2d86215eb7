"""qk_norm_rope on packed projections (B, N, 3, H, D) of known transformers against eager, as users write it, and peers.

Out of place one read and one write per element of q, k and v; in place of q and k alone. The backward reads two tensors
and writes one. Eager takes F.rms_norm, then rotates pairs by stacking or by complex multiplication; eager in place, its
strongest form, multiplies and adds into preallocated tensors.
"""

from functools import partial

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, register_baseline, within
from genengine.ops import _registry, qk_norm_rope
from genengine.ops.qk_norm_rope import reference
from genengine.rotary import rope_table

STATED = {"DiT-XL/2": (8, 256, 3, 16, 72), "Flux, 512 px": (4, 1024, 3, 24, 128)}  # where the goals were stated
SHAPES = STATED | {
    "DiT-S/2": (16, 256, 3, 6, 64), "DiT-B/2": (16, 256, 3, 12, 64), "DiT-L/2": (16, 256, 3, 16, 64),
}  # fmt: skip
LARGE = {"SD3": (2, 4096, 3, 24, 64), "Flux": (1, 4608, 3, 24, 128)}
CUDA_SHAPES = {"CogVideoX-5B": (2, 17_776, 3, 48, 64)}
EPS = 1e-6


def eager(qkv, q_weight, k_weight, cos, sin):
    q, k, v = qkv.unbind(2)
    c, s = cos[:, None], sin[:, None]
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        a, b = F.rms_norm(x, x.shape[-1:], weight, EPS).float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated.append(torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype))
    return torch.stack((*rotated, v), 2)


def eager_complex(qkv, q_weight, k_weight, turn):
    q, k, v = qkv.unbind(2)
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = F.rms_norm(x, x.shape[-1:], weight, EPS).float().unflatten(-1, (-1, 2))
        rotated.append(torch.view_as_real(torch.view_as_complex(y) * turn).flatten(-2).to(x.dtype))
    return torch.stack((*rotated, v), 2)


def oracle(qkv, q_weight, k_weight, cos, sin):
    return reference(qkv, q_weight, k_weight, cos[None], sin[None], EPS, True, True)


class Work:
    """Inputs and preallocated outputs of one case."""

    def __init__(self, case):
        tokens, dim = case.shape[1], case.shape[4]
        self.qkv, self.grad = case.randn(), case.randn()
        self.weights = [
            case.randn(dim).sign() for _ in range(2)
        ]  # in place, again and again: others lead to subnormals
        self.leaves = calls.leaves(self.qkv, *self.weights)
        self.tables = rope_table(torch.arange(tokens, device=case.device), dim)
        self.inputs = (self.qkv, *self.weights, *self.tables)
        self.turn = torch.complex(*self.tables)[:, None]
        self.out, self.rows = torch.empty_like(self.qkv), self.qkv.clone()
        self.calls = {
            "qk_norm_rope": (self.qkv,),
            "qk_norm_rope_": (self.rows,),
            "qk_norm_rope_backward": (self.grad, self.qkv),
        }
        self.options = (*self.weights, *(table[None] for table in self.tables), EPS, True, True)

    def fused(self, name):
        kernel = calls.kernel(name, self.qkv)

        def run():
            found = kernel(*self.calls[name], *self.options)
            return self.rows if name == "qk_norm_rope_" else found

        return run

    def cost(self, name):
        return calls.cost(name, *self.calls[name], *self.options)

    def copy(self):
        self.out.copy_(self.qkv)

    def copy_q_and_k(self):
        self.out[:, :, :2].copy_(self.qkv[:, :, :2])

    def eager_in_place(self):
        """q and k at once, rotated by complex multiplication, written back."""
        qk = self.rows[:, :, :2]
        y = F.rms_norm(qk, qk.shape[-1:], None, EPS).mul_(torch.stack(self.weights)[:, None]).float()
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
        qk.copy_(torch.view_as_real(pairs.mul_(self.turn[:, None])).flatten(-2))
        return self.rows

    def check(self, name):
        """The dispatcher op against the reference in float64, within twice eager's error and a rounding."""
        if name != "qk_norm_rope_":
            return calls.check(name, *self.calls[name], *self.options)
        arguments = (self.qkv, *self.options)  # the timed copy has been rotated before
        reference_ = _registry.OPS[name].overloads["reference"]
        results = []
        for run, widen in ((calls.kernel(name, self.qkv), False), (reference_, False), (reference_, True)):
            rows, *rest = map(calls.widened, arguments) if widen else arguments
            rows = rows.clone()
            run(rows, *rest)
            results.append(rows)
        return testing.assert_as_good_as_eager(*results, name)


def _row(work, name, variants, goals, case, **fields):
    """A benchmark of one dispatcher op; the goals hold where they were stated."""
    return Benchmark(
        {"fused": work.fused(name), **variants}, lambda: work.check(name), cost=work.cost(name),
        elements=work.qkv.numel(), goals=goals if case.label in STATED else (), **fields,
    )  # fmt: skip


def _written(work):
    return {
        "eager, stacked": lambda: eager(*work.inputs),
        "eager, complex": lambda: eager_complex(work.qkv, *work.weights, work.turn),
    }


FORWARD_GOALS = (faster("eager, stacked", 4.0), faster("torch.compile", 1.5))


def forward(case):
    work = Work(case)
    goals = (*FORWARD_GOALS, within(1.5, "copy_"))
    rest = {"inputs": work.inputs, "oracle": oracle, "compiles": (eager, work.inputs)}
    return _row(work, "qk_norm_rope", _written(work) | {"copy_": work.copy}, goals, case, **rest)


def forward_in_place(case):
    work = Work(case)
    others = _written(work) | {"eager, in place": work.eager_in_place, "copy_ of q and k": work.copy_q_and_k}
    return _row(work, "qk_norm_rope_", others, FORWARD_GOALS, case, compiles=(eager, work.inputs))


def backward(case):
    """The dispatcher op against autograd through eager, its forward outside the timing."""
    work = Work(case)
    plain = calls.backward(partial(_with_tables, eager, work), work.leaves, work.grad)
    others = {"eager, autograd": plain, "copy_": work.copy}
    return _row(work, "qk_norm_rope_backward", others, (faster("eager, autograd", 1.0),), case)


def forward_and_backward(case):
    work = Work(case)
    ours, plain = (calls.both(partial(_with_tables, f, work), work.grad) for f in (qk_norm_rope, eager))

    def check():
        work.check("qk_norm_rope")
        work.check("qk_norm_rope_backward")

    return Benchmark(
        {"fused": lambda: ours(*work.leaves), "eager, stacked": lambda: plain(*work.leaves)}, check,
        compiles=(plain, work.leaves), cost=work.cost("qk_norm_rope") + work.cost("qk_norm_rope_backward"),
        elements=work.qkv.numel(),
        goals=(faster("eager, stacked", 1.0), faster("torch.compile", 1.0)) if case.label in STATED else (),
    )  # fmt: skip


def _with_tables(function, work, *leaves):
    return function(*leaves, *work.tables)


_common = {"dtypes": ("float32", "bfloat16"), "group": "qk_norm_rope", "axes": {"batch": 0, "tokens": 1, "heads": 3}}
_forward = {"shapes": SHAPES | LARGE, "cuda_shapes": CUDA_SHAPES, **_common}
_backward = {"shapes": SHAPES, "cuda_shapes": LARGE | CUDA_SHAPES, **_common, "quick": ()}  # eager: half a second
register("qk_norm_rope", **_forward)(forward)
register("qk_norm_rope_", **_forward, quick=())(forward_in_place)
register("qk_norm_rope_backward", **_backward)(backward)
register("qk_norm_rope, forward and backward", **_backward)(forward_and_backward)


@register_baseline("qk_norm_rope", "rms_norm, then flash_attn rotary", requires="flash_attn")
def flash_attn_rotary(qkv, q_weight, k_weight, cos, sin):
    from flash_attn.layers.rotary import apply_rotary_emb

    q, k, v = qkv.unbind(2)
    cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)  # it takes tables of x's dtype alone
    normed = (F.rms_norm(x, x.shape[-1:], weight, EPS) for x, weight in ((q, q_weight), (k, k_weight)))
    return torch.stack((*(apply_rotary_emb(x, cos, sin, interleaved=True, inplace=True) for x in normed), v), 2)
