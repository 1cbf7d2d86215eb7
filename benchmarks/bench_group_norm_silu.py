"""group_norm_silu at a U-Net's shape against copy_, eager as written and in place, and torch.compile.

The forward moves one read and one write per element where a group (C order) or a sample (channels_last) stays in the
cache between its two passes; the backward reads x and grad twice and writes once.
"""

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import _registry, group_norm_silu

SHAPE, GROUPS, EPS = (8, 128, 32, 32), 32, 1e-5
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def eager(x, weight, bias):
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def eager_adagn(x, weight, bias, scale, shift):
    u = F.group_norm(x, GROUPS, weight, bias, EPS)
    return F.silu(u * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


class Work:
    """Inputs of one dtype and memory format; scale and shift are views into one table."""

    def __init__(self, dtype, memory_format, device):
        batch, channels = SHAPE[:2]
        draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
        self.x = draw(*SHAPE).contiguous(memory_format=memory_format)
        self.grad = draw(*SHAPE).contiguous(memory_format=memory_format)
        self.out = torch.empty_like(self.x)
        self.weight, self.bias = 1 + 0.1 * draw(channels), draw(channels)
        self.modulation = draw(batch, 2 * channels).chunk(2, dim=1)

    def args(self, modulated):
        return (self.x, self.weight, self.bias, *(self.modulation if modulated else ()))

    def fused(self, modulated):
        rest = self.modulation if modulated else ()
        return lambda: (
            group_norm_silu(self.x, self.weight, self.bias, GROUPS, *rest, EPS)
            if rest
            else group_norm_silu(self.x, self.weight, self.bias, GROUPS, eps=EPS)
        )

    def copy(self):
        self.out.copy_(self.x)

    def in_place(self, modulated):
        u = F.group_norm(self.x, GROUPS, self.weight, self.bias, EPS)
        if modulated:
            scale, shift = (t[:, :, None, None] for t in self.modulation)
            u.mul_(1 + scale).add_(shift)
        return F.silu(u, inplace=True)

    def gradients(self, function):
        """autograd through `function`, its forward outside the timing."""
        leaves = [t.detach().requires_grad_() for t in self.args(False)]
        with torch.enable_grad():
            out = function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True)

    def check(self, modulated):
        """Against the reference in float64, within twice eager's error and a rounding."""
        scale, shift = self.modulation if modulated else (None, None)
        wide = [None if t is None else t.double() for t in (self.x, self.weight, self.bias, scale, shift)]
        oracle = group_norm_silu(*wide[:3], GROUPS, *wide[3:], EPS)
        plain = (eager_adagn if modulated else eager)(*self.args(modulated))
        testing.assert_as_good_as_eager(self.fused(modulated)(), plain, oracle, "group_norm_silu")

    def check_backward(self):
        op, (batch, channels) = _registry.OPS["group_norm_silu_backward"], SHAPE[:2]
        flat = lambda t: t.contiguous().reshape(batch, channels, -1)  # noqa: E731
        x, grad = flat(self.x), flat(self.grad)
        forward = _registry.OPS["group_norm_silu"].overloads["reference"]
        _, mean, rstd = forward(x, self.weight, self.bias, None, None, GROUPS, EPS, True, False)
        args = (grad, x, self.weight, self.bias, None, None, mean, rstd)
        wide = (t if t is None else t.double() for t in args)
        oracle, plain = (
            op.overloads["reference"](*wide, GROUPS, True, False),
            op.overloads["reference"](*args, GROUPS, True, False),
        )
        found = self.gradients(lambda x, w, b: group_norm_silu(x, w, b, GROUPS, eps=EPS))()
        for got, eager_grad, exact in zip((flat(found[0]), *found[1:]), plain, oracle, strict=False):
            testing.assert_as_good_as_eager(got, eager_grad, exact, "group_norm_silu_backward")


GOALS = {
    (torch.float32, "channels_last"): (faster("eager, as written", 3.5), faster("torch.compile", 5.0)),
    (torch.bfloat16, "channels_last"): (faster("eager, as written", 5.0), faster("torch.compile", 5.0)),
}


def benchmarks(device):
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in FORMATS.items():
            work = Work(dtype, memory_format, device)
            yield from _forward(work, dtype, layout, device)
            yield _backward(work, dtype, layout, device)


def _label(layout):
    return f"{SHAPE}, {layout}"


def _forward(work, dtype, layout, device):
    n, size = work.x.numel(), work.x.element_size()
    for name, function, modulated in (("group_norm_silu", eager, False), ("group_norm_silu, AdaGN", eager_adagn, True)):
        compiled = torch.compile(function)
        variants = {
            "fused": work.fused(modulated),
            "copy_": work.copy,
            "eager, as written": lambda f=function, m=modulated: f(*work.args(m)),
            "eager, in place": lambda m=modulated: work.in_place(m),
            "torch.compile": lambda f=compiled, m=modulated: f(*work.args(m)),
        }
        check = lambda m=modulated: work.check(m)  # noqa: E731
        goals = () if modulated else GOALS.get((dtype, layout), ())
        kind = str(dtype).removeprefix("torch.")
        quick = layout == "channels_last" and not modulated
        yield Benchmark(name, _label(layout), kind, variants, check, n, 2 * size * n, goals, quick=quick, device=device)


def _backward(work, dtype, layout, device):
    n, size = work.x.numel(), work.x.element_size()
    variants = {
        "fused": work.gradients(lambda x, w, b: group_norm_silu(x, w, b, GROUPS, eps=EPS)),
        "copy_": work.copy,
        "eager, autograd": work.gradients(eager),
    }
    return Benchmark(
        "group_norm_silu_backward", _label(layout), str(dtype).removeprefix("torch."), variants, work.check_backward, n,
        5 * size * n, (faster("eager, autograd", 1.0),), quick=False, device=device,
    )  # fmt: skip
