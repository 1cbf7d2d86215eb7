"""adaln and gated_adaln at DiT-XL/2's shape against copy_, eager as written and in place, and torch.compile.

adaln moves one read and one write per element, gated_adaln two and two; the backwards are timed beside them.
"""

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster, within
from genengine.ops import _registry

SHAPE = (16, 256, 1152)
EPS = 1e-6


def eager_adaln(x, scale, shift, eps=EPS):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_adaln(x, branch, gate, scale, shift, eps=EPS):
    x = x + gate[:, None] * branch
    return x, eager_adaln(x, scale, shift, eps)


class Work:
    """Inputs and preallocated outputs of one dtype; the modulations are views into one table."""

    def __init__(self, dtype, device):
        batch, _, dim = SHAPE
        draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
        self.x, self.branch, self.grad_x, self.grad_h = (draw(*SHAPE) for _ in range(4))
        self.gate, self.scale, self.shift = draw(batch, 6 * dim).chunk(6, dim=1)[:3]
        self.out = torch.empty_like(self.x)
        self.args = {
            "adaln": (self.x, self.scale, self.shift),
            "gated_adaln": (self.x, self.branch, self.gate, self.scale, self.shift),
            "adaln_backward": (self.grad_h, self.x, self.scale),
            "gated_adaln_backward": (self.grad_x, self.grad_h, self.x, self.branch, self.gate, self.scale),
        }

    def fused(self, name):
        kernel = _registry.resolve(_registry.OPS[name], self.x.device, self.x.dtype)
        return lambda: kernel(*self.args[name], EPS)

    def copy(self):
        self.out.copy_(self.x)

    def in_place(self, name):
        """x' preallocated, the modulation in place: the fewest passes that eager takes."""
        x = self.x
        if name == "gated_adaln":
            x = torch.addcmul(self.x, self.gate[:, None], self.branch, out=self.out)
        return F.layer_norm(x, SHAPE[-1:], eps=EPS).mul_(1 + self.scale[:, None]).add_(self.shift[:, None])

    def eager_backward(self, name):
        """autograd through eager as written, its forward outside the timing."""
        function = eager_gated_adaln if name.startswith("gated") else eager_adaln
        leaves = [t.detach().requires_grad_() for t in self.args[name.removesuffix("_backward")]]
        with torch.enable_grad():
            out = function(*leaves)
        grads = (self.grad_x, self.grad_h) if name.startswith("gated") else (self.grad_h,)
        return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)

    def check(self, name):
        """Against the reference in float64, within twice eager's error and a rounding."""
        run = _registry.OPS[name].overloads["reference"]
        args = self.args[name]
        found = self.fused(name)(), run(*args, EPS), run(*(t.double() for t in args), EPS)
        found = [f if isinstance(f, (tuple, list)) else (f,) for f in found]
        for got, plain, oracle in zip(*found, strict=True):
            testing.assert_as_good_as_eager(got, plain, oracle, name)


GOALS = {
    ("adaln", torch.float32): (within(1.5, "copy_"),),
    ("adaln", torch.bfloat16): (within(2.5, "copy_"),),
    ("gated_adaln", torch.float32): (faster("eager, as written", 2.7), faster("torch.compile", 1.5)),
    ("gated_adaln", torch.bfloat16): (faster("eager, as written", 2.3), faster("torch.compile", 1.5)),
}


def benchmarks(device):
    for dtype in (torch.float32, torch.bfloat16):
        work = Work(dtype, device)
        n, size, label = work.x.numel(), work.x.element_size(), str(dtype).removeprefix("torch.")
        for name, eager, moved in (("adaln", eager_adaln, 2), ("gated_adaln", eager_gated_adaln, 4)):
            compiled = torch.compile(eager)
            variants = {
                "fused": work.fused(name),
                "copy_": work.copy,
                "eager, as written": lambda w=work, f=eager, key=name: f(*w.args[key]),
                "eager, in place": lambda w=work, key=name: w.in_place(key),
                "torch.compile": lambda w=work, f=compiled, key=name: f(*w.args[key]),
            }
            check = lambda w=work, key=name: w.check(key)  # noqa: E731
            yield Benchmark(
                name, str(SHAPE), label, variants, check, n, moved * size * n, GOALS[name, dtype], device=device
            )
        for name, moved in (("adaln_backward", 3), ("gated_adaln_backward", 6)):
            variants = {"fused": work.fused(name), "copy_": work.copy, "eager, autograd": work.eager_backward(name)}
            check = lambda w=work, key=name: w.check(key)  # noqa: E731
            goals = (faster("eager, autograd", 1.0),)
            yield Benchmark(
                name, str(SHAPE), label, variants, check, n, moved * size * n, goals, quick=False, device=device
            )
