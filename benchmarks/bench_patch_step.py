"""patch_step at the last layer of DiT, patches of 2: guidance and a row in the layer's pass, or one after the other.

Shapes are (B, N, D); h holds the tokens of two branches, for 4 channels and as many of a learned variance. The row
writes x' and the next input of both. On a CPU "fused" is the layer, then sampler_step: there is nothing to gain.
"""

from functools import partial

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import patch_step
from genengine.ops.patch_step import unpatchify
from genengine.table import build_rows

SHAPES = {"DiT-S/2": (2, 256, 384), "DiT-XL/2": (2, 256, 1152)}  # (B, N, D)
CUDA_SHAPES = {
    "DiT-XL/2, one image": (1, 256, 1152), "DiT-XL/2, B = 64": (64, 256, 1152), "DiT-XL/2, 512 px": (8, 1024, 1152),
}  # fmt: skip
PATCH, CHANNELS, GUIDANCE, DT, SIGMA, SPREAD = 2, 4, 2.0, -0.02, 0.1, 0.5
ROWS = {  # name -> columns of the table, and whether noise is drawn
    "last layer + CFG + Euler row": ({"a": 1.0, "b": DT, "g1": GUIDANCE, "c_in": 1.0}, False),
    "last layer + CFG + DDPM row with a learned variance": (
        {"a": 1.0, "b": DT, "g1": GUIDANCE, "c_in": 1.0, "s": SIGMA, "l": SPREAD}, True,
    ),
}  # fmt: skip


def eager(x, h, weight, bias, noisy):
    """As written: layer, patches to pixels, guidance, the row, and the next input."""
    side = round(h.shape[1] ** 0.5)
    out = F.linear(h, weight, bias).view(len(h), side, side, PATCH, PATCH, 2 * CHANNELS)
    out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(h), 2 * CHANNELS, side * PATCH, side * PATCH)
    (u, _), (c, v) = (half.chunk(2, dim=1) for half in out.chunk(2))
    x = x + DT * (u + GUIDANCE * (c - u))
    if noisy:
        x = x + SIGMA * torch.exp(SPREAD * v) * torch.randn_like(x)
    return x, torch.cat([x, x]).to(h.dtype)


class Work:
    def __init__(self, case, columns, noisy):
        batch, tokens, dim = case.shape
        side = PATCH * round(tokens**0.5)
        self.x = case.randn(batch, CHANNELS, side, side, dtype=torch.float32)
        self.h, self.weight = case.randn(2 * batch, tokens, dim), case.randn(2 * CHANNELS * PATCH**2, dim) / dim**0.5
        self.bias = case.randn(2 * CHANNELS * PATCH**2)
        self.table = torch.from_numpy(build_rows([columns])).float().to(case.device)
        self.step = torch.zeros(batch, dtype=torch.int32, device=case.device)
        self.seed = torch.tensor(3, device=case.device) if noisy else None
        self.out, self.x_in = torch.empty_like(self.x), self.x.repeat(2, 1, 1, 1).to(case.dtype)
        self.tokens = self.x, self.h, self.weight, self.bias
        self.written = (self.out, self.x_in)
        self.run, self.row = calls.kernel("patch_step_out", self.x), calls.kernel("sampler_step_out", self.x)

    def arguments(self):
        return *self.tokens, PATCH, self.table, self.step, None, self.seed, None, None, *self.written

    def fused(self):
        self.run(*self.arguments())
        return self.written

    def one_after_the_other(self):
        """torch's layer, patches to pixels, then sampler_step: what a denoiser and a step are without the op."""
        side = round(self.h.shape[1] ** 0.5)
        out = unpatchify(F.linear(*self.tokens[1:]), (side, side), PATCH, 2 * CHANNELS)
        mean, v = out[:, :CHANNELS], out[len(self.x) :, CHANNELS:]
        self.row(self.x, [mean], self.table, self.step, None, self.seed, None, None, v, *self.written)
        return self.written

    def check(self):
        def run(x, h, weight, bias, table):
            x_in = torch.empty(self.x_in.shape, dtype=h.dtype, device=x.device)
            options = {"patch_size": PATCH, "x_in": x_in, "seed": self.seed, "backend": "reference"}
            return patch_step(x, h, weight, bias, table, self.step, **options), x_in

        calls.check_function(lambda *inputs: self.fused(), run, (*self.tokens, self.table), "patch_step")


def row(name, case):
    columns, noisy = ROWS[name]
    work = Work(case, columns, noisy)
    variants = {
        "fused": work.fused, "layer, then sampler_step": work.one_after_the_other,
        "eager, as written": lambda: eager(*work.tokens, noisy),
    }  # fmt: skip
    goals = (faster("layer, then sampler_step", 1.0),) if torch.device(case.device).type == "cuda" else ()
    return Benchmark(
        variants, work.check, elements=work.x.numel(), goals=goals, inputs=work.tokens,
        compiles=(partial(eager, noisy=noisy), work.tokens), cost=calls.cost("patch_step_out", *work.arguments()),
    )  # fmt: skip


for _index, _name in enumerate(ROWS):
    register(
        _name, shapes=SHAPES, cuda_shapes=CUDA_SHAPES, dtypes=("float32", "bfloat16"), group="patch_step",
        axes={"batch": 0}, quick=None if _index == 0 else (),
    )(partial(row, _name))  # fmt: skip
