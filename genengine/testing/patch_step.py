"""Cases of patch_step: patches of 1 to 8, one to three branches, learned variances, tables of random rows."""

import torch
from torch import Tensor

from genengine.testing._case import DTYPES, Case
from genengine.testing.sampler_step import random_table

# (B, C, H, W), patch size, D: features fewer than a block, one block, several; D a multiple of a block's columns or not
SMALL = (((3, 1, 5, 7), 1, 19), ((2, 3, 6, 10), 2, 72))
LARGE = (((2, 4, 8, 16), 4, 40), ((2, 4, 18, 22), 2, 256), ((2, 4, 16, 24), 8, 144), ((1, 16, 12, 20), 2, 130))
# branches, registers, noise, bias
KINDS = (
    (1, 0, "none", True), (2, 1, "drawn", True), (3, 3, "given learned", False), (1, 2, "drawn learned", True),
    (2, 0, "none learned", True),
)  # fmt: skip


def _cases(generator, device) -> list[Case]:
    pairs = [(d, d) for d in DTYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    return [
        make_case(generator, device, state, model, *size, *kind, large=size in LARGE or state != model)
        for state, model in pairs
        for size in (*SMALL, *LARGE)
        for kind in KINDS
    ]


def make_case(generator, device, state, model, shape, patch, dim, branches, registers, noise, bias, *, large=False):
    batch, channels, height, width = shape
    tokens, outputs = (height // patch) * (width // patch), channels * (2 if "learned" in noise else 1)

    def fresh(dtype, *size):
        return torch.randn(size, generator=generator).to(device, dtype)

    wide = fresh(model, branches * batch, tokens, dim + 8)
    h = wide[..., :dim] if "given" in noise else fresh(model, branches * batch, tokens, dim)  # tokens may lie apart
    weight = (fresh(torch.float32, patch**2 * outputs, dim) * dim**-0.5).to(model)
    table = random_table(generator, 4, batch if "drawn" in noise else 1, branches, registers).to(device)
    step = torch.arange(batch, dtype=torch.int32, device=device) + 2  # the third sample is finished
    args = (
        fresh(state, *shape), h, weight, fresh(model, len(weight)) if bias else None, patch, table, step,
        fresh(torch.float32, registers, *shape) if registers else None,
        torch.tensor(12345, device=device) if "drawn" in noise else None, None,
        fresh(torch.float32, *shape) if "given" in noise else None, fresh(state, *shape),
        fresh(model, 2 * batch, *shape[1:]),
    )  # fmt: skip
    label = f"{state} state, {model} model, {shape}, patch {patch}, D {dim}, {branches} branches, noise {noise}"
    slack = _slack(h, weight, table) if model == torch.float32 else ()
    return Case(
        label, args, (7, 11, 12), large=large, dtypes=(state, model), slack=dict(enumerate(slack[not registers :]))
    )


def _slack(h: Tensor, weight: Tensor, table: Tensor) -> tuple[float, float, float]:
    """What history, out and x_in may err in float32 beyond a multiple of eager's error: one rounding of a product's
    sum of |terms|, whose order is each backend's own, through the row."""
    if h.numel() == 0:
        return 0.0, 0.0, 0.0
    rounding = torch.finfo(torch.float32).eps * (h.double().abs() @ weight.double().abs().mT).amax().item()
    g1, g2, q, r, b, c, c_in = (table.double()[..., index].abs() for index in (1, 2, 4, 5, 7, 8, 14))
    combined = rounding * (1 + 2 * g1 + 2 * g2)
    y = combined * q * torch.where(table[..., 15].long() & 3 == 2, 1 / r, 1.0).to(combined)
    out = combined * b + c * y
    return y.max().item(), out.max().item(), (c_in * out).max().item()


CASES = {"patch_step_out": _cases}
