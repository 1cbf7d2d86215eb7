"""attention against torch's scaled dot-product attention, each of its backends, forward and backward.

On a CPU "fused" is torch's own kernel behind our schema, so the goal is to add nothing. `elements` is the number of
multiply-adds of the forward's two products (2 B H N M D), so ns per element is time per multiply-add; a backward does
five products where the forward does two. GB/s is the floor of q, k, v and o (gradients, too, of a backward).
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster, within
from genengine.ops import _registry, attention
from genengine.testing.attention import roundings

# name -> (B, N, H, D)
SHAPES = {
    "cpu": {"DiT-XL/2": (2, 256, 16, 72), "hd 64": (1, 1024, 4, 64)},
    "cuda": {
        "DiT-XL/2": (32, 256, 16, 72), "hd 64, 1k": (8, 1024, 16, 64), "hd 64, 4k": (2, 4096, 16, 64),
        "hd 128, 1k": (8, 1024, 16, 128), "hd 128, 4k": (2, 4096, 16, 128),
    },
}  # fmt: skip
TORCHS = {"cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)} | {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
}


def sdpa(q, k, v):
    """torch's op, tokens first."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class Work:
    """q, k, v as views into one projection."""

    def __init__(self, shape, dtype, device):
        batch, tokens, heads, dim = shape
        packed = torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype)
        self.leaves = [t.detach().requires_grad_() for t in packed.unbind(2)]
        self.inputs = [t.detach() for t in self.leaves]
        self.grad_o = torch.randn(shape, device=device).to(dtype)
        self.scale = dim**-0.5

    def forward(self, function, kind=None):
        """Timed under no_grad; `kind` pins one of torch's backends, None if that cannot run here."""

        def run():
            with torch.no_grad():
                return function(*self.inputs)

        return self._pinned(run, kind)

    def backward(self, function, kind=None):
        """autograd's backward, the forward outside the timing."""

        def make():
            with torch.enable_grad():
                o = function(*self.leaves)
            return lambda: torch.autograd.grad(o, self.leaves, self.grad_o, retain_graph=True)

        if kind is None:
            return make()
        try:
            with sdpa_kernel(kind):
                run = make()
                run()
        except RuntimeError:
            return None
        return run

    def _pinned(self, run, kind):
        if kind is None:
            return run

        def pinned():
            with sdpa_kernel(kind):
                return run()

        try:
            pinned()
        except RuntimeError:
            return None
        return pinned

    def check(self, backward):
        """The first sample against the reference in float64, as the op's tests do."""
        first = [t[:1] for t in (*self.inputs, self.grad_o)]
        allowed = roundings(*first, False, self.scale)
        with torch.no_grad():
            got = attention(*self.inputs, return_lse=True)
        self._compare("attention", ("o",), first[:3], got, allowed)
        if backward:
            args = (self.grad_o, *self.inputs, *got)
            op = _registry.resolve(_registry.OPS["attention_backward"], self.grad_o.device, self.grad_o.dtype)
            found = op(*args, False, self.scale)
            self._compare("attention_backward", ("dq", "dk", "dv"), [t[:1] for t in args], found, allowed)

    def _compare(self, op, names, args, found, allowed):
        run = _registry.OPS[op].overloads["reference"]
        eager, oracle = run(*args, False, self.scale), run(*(t.double() for t in args), False, self.scale)
        for name, value, plain, exact in zip(names, found, eager, oracle, strict=False):
            limit, error = testing.tolerance(plain, exact) + allowed[name], testing.error(value[:1], exact)
            assert error <= limit, f"{name}: error {error:.3g} against float64, allowed {limit:.3g}"


def benchmarks(device):
    for label, shape in SHAPES[device].items():
        for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
            work = Work(shape, dtype, device)
            batch, tokens, heads, dim = shape
            products = 2 * batch * heads * tokens * tokens * dim
            size = work.grad_o.numel() * dtype.itemsize
            for backward in (False, True):
                run = work.backward if backward else work.forward
                variants = {"fused": run(attention), "torch": run(sdpa)}
                found = {f"torch, {kind.name.lower()}": run(sdpa, kind) for kind in TORCHS[device]}
                variants |= {name: variant for name, variant in found.items() if variant is not None}
                goals = (within(1.1, "torch"),) if device == "cpu" else (faster("torch", 1.0),)
                yield Benchmark(
                    f"attention{'_backward' if backward else ''}, {label}", str(shape),
                    str(dtype).removeprefix("torch."), variants, lambda w=work, b=backward: w.check(b),
                    products * (5 if backward else 2) // 2, (8 if backward else 4) * size, goals,
                    quick=label == "DiT-XL/2", device=device,
                )  # fmt: skip
