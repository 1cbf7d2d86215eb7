"""qk_norm_rope on packed projections with DiT-XL/2's and Flux's heads against eager, as users write it, and compiled.

Out of place one read and one write per element of q, k and v; in place of q and k alone. The backward reads two tensors
and writes one. Eager takes F.rms_norm, then rotates pairs by stacking or by complex multiplication; eager in place, its
strongest form, multiplies and adds into preallocated tensors.
"""

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster, within
from genengine.ops import _registry, qk_norm_rope
from genengine.rotary import rope_table

SHAPES = ((8, 256, 3, 16, 72), (4, 1024, 3, 24, 128))
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


class Work:
    """Inputs and preallocated outputs of one shape and dtype."""

    def __init__(self, shape, dtype, device):
        tokens, dim = shape[1], shape[4]
        draw = lambda *size: torch.randn(*size, device=device).to(dtype)  # noqa: E731
        self.qkv, self.grad = draw(*shape), draw(*shape)
        self.weights = [draw(dim).sign(), draw(dim).sign()]  # in place, again and again: others lead to subnormals
        self.leaves = [t.detach().requires_grad_() for t in (self.qkv, *self.weights)]
        self.tables = rope_table(torch.arange(tokens, device=device), dim)
        self.turn = torch.complex(*self.tables)[:, None]
        self.out, self.rows = torch.empty_like(self.qkv), self.qkv.clone()
        self.calls = {
            "qk_norm_rope": (self.qkv,),
            "qk_norm_rope_": (self.rows,),
            "qk_norm_rope_backward": (self.grad, self.qkv),
        }
        self.options = (*self.weights, *(table[None] for table in self.tables), EPS, True, True)

    def fused(self, name):
        kernel = _registry.resolve(_registry.OPS[name], self.qkv.device, self.qkv.dtype)
        return lambda: kernel(*self.calls[name], *self.options)

    def written_out(self, function, *rest):
        return lambda: function(self.qkv, *self.weights, *rest)

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

    def backward(self):
        """autograd through eager, its forward outside the timing."""
        with torch.enable_grad():
            out = eager(*self.leaves, *self.tables)
        return lambda: torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True)

    def both(self, function):
        def run():
            with torch.enable_grad():
                return torch.autograd.grad(function(*self.leaves, *self.tables), self.leaves, self.grad)

        return run

    def check(self, name):
        """Against the reference in float64, within twice eager's error and a rounding."""
        run = _registry.OPS[name].overloads["reference"]
        widen = lambda t: t.double() if torch.is_tensor(t) else t  # noqa: E731
        args = (self.qkv,) if name == "qk_norm_rope_" else self.calls[name]  # the timed copy has been rotated before
        wide = [widen(t) for t in (*args, *self.options)]
        kernel = _registry.resolve(_registry.OPS[name], self.qkv.device, self.qkv.dtype)
        if name == "qk_norm_rope_":
            found = [(a[0].clone(), *a[1:]) for a in ((*args, *self.options), (*args, *self.options), wide)]
            for function, call in zip((kernel, run, run), found, strict=True):
                function(*call)
            found = [call[:1] for call in found]
        else:
            found = kernel(*args, *self.options), run(*args, *self.options), run(*wide)
            found = [f if isinstance(f, (tuple, list)) else (f,) for f in found]
        for got, plain, oracle in zip(*found, strict=True):
            testing.assert_as_good_as_eager(got, plain, oracle, name)


def benchmarks(device):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            work = Work(shape, dtype, device)
            n, size, label = work.qkv.numel(), work.qkv.element_size(), str(dtype).removeprefix("torch.")
            compiled = torch.compile(eager)
            written = {
                "eager, stacked": work.written_out(eager, *work.tables),
                "eager, complex": work.written_out(eager_complex, work.turn),
                "torch.compile": work.written_out(compiled, *work.tables),
            }
            goals = (faster("eager, stacked", 4.0), faster("torch.compile", 1.5))
            variants = {
                "qk_norm_rope": (written | {"copy_": work.copy}, (*goals, within(1.5, "copy_")), 2 * n),
                "qk_norm_rope_": (
                    written | {"eager, in place": work.eager_in_place, "copy_ of q and k": work.copy_q_and_k},
                    goals,
                    4 * n // 3,
                ),
                "qk_norm_rope_backward": (
                    {"eager, autograd": work.backward(), "copy_": work.copy},
                    (faster("eager, autograd", 1.0),),
                    8 * n // 3,
                ),
                "qk_norm_rope, forward and backward": (
                    {
                        "fused": work.both(qk_norm_rope),
                        "eager, stacked": work.both(eager),
                        "torch.compile": work.both(compiled),
                    },
                    (faster("eager, stacked", 1.0), faster("torch.compile", 1.0)),
                    14 * n // 3,
                ),
            }
            for name, (others, wanted, moved) in variants.items():
                op = "qk_norm_rope_backward" if name.endswith("backward") else name
                timed = {"fused": work.fused(op)} | others
                check = lambda w=work, key=op: w.check(key)  # noqa: E731
                quick = shape == SHAPES[0]
                yield Benchmark(name, str(shape), label, timed, check, n, moved * size, wanted, quick, device)
