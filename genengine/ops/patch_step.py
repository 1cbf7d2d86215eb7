"""patch_step: the last linear layer of a patch transformer, and a row of a coefficient table, in one pass.

On a CPU the product dominates, and the kernel is torch's linear, then sampler_step's: no csrc/cpu/patch_step.cpp and
no csrc/cpu/isa/patch_step.cpp. On a GPU it is Triton's alone, a block of products that ends in the same row:
csrc/cuda/patch_step.cu would be a matrix product by hand that reads the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine.ops import _check, _layout, _registry, _row_checks
from genengine.ops._cost import Cost, per_element, traffic
from genengine.ops.sampler_step import MAX_BRANCHES, SAMPLER_STEP, row_bytes, row_work
from genengine.ops.sampler_step import reference as reference_sampler_step


def patch_step(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    step: Tensor,
    history: Tensor | None = None,
    *,
    patch_size: int,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
    x_in: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Turn the last tokens of a patch transformer into its output, and apply row step[b] of the table to sample b.

        output = unpatchify(h W^T + bias)          p x p patches of C channels, or of 2C, the second C of which are v
        x'     = sampler_step(x, output, table, step, history, variance=v of the last branch, ...)

    Triton's kernel sums the products in float32 and hands them to the row as they are. The reference and the CPU's
    kernel write the output, rounded to h's dtype, and read it again, as the layer followed by `sampler_step` does.

    x: (B, C, H, W) float32, float16 or bfloat16, contiguous. h: (k B, N, D), N = (H / p) (W / p) tokens in row-major
    order, of one to three branches, unconditional first; of x's dtype or, with a float32 x, 16-bit.
    weight: (p p C, D) or (p p 2C, D), of h's dtype, features in the order (row, column, channel); bias: as many, or
    None. patch_size: p, divides H and W. With 2C channels the last branch's second half scales the noise of a row with
    s and l; a row without them does not read it.
    table, step, history, seed, noise, sample_ids, out, x_in: as for `sampler_step`, contiguous; x_in has h's dtype.

    Inference only. Returns x' (B, C, H, W) with x's dtype. float64 runs on the reference.
    Raises TypeError, ValueError on bad arguments, RuntimeError where autograd would need a backward.
    Cost: reads x, h, weight, bias, a table row per sample, step, history, a given noise, writes x', x_in; 2 D flops for
    every output of a branch and, with noise, for every v, and the flops and exponentials of `sampler_step`.
    """
    op = "patch_step"
    _check_arguments(x, h, weight, bias, patch_size, table, step, history, seed, noise, out, x_in)
    _check.no_grad_needed(op, (x, h, weight, bias, noise))
    batch = x.shape[0]
    if seed is not None:
        seed = _check.seed_tensor(op, seed, x.device, batch)
    sample_ids = _check.sample_ids(op, sample_ids, x.device, batch)
    x, weight = x.contiguous(), weight.contiguous()
    h = h if h.stride(2) == 1 else h.contiguous()
    if out is None:
        out = torch.empty_like(x)
    if not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous, got strides {out.stride()}; use .contiguous()")
    _row_checks.check_written_layout(op, out, history, x_in)
    if not torch.compiler.is_compiling():
        read = [("h", h), ("weight", weight), ("bias", bias), ("noise", noise)]
        _row_checks.check_overlaps(op, out, history, x_in, x, read)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if noise is not None:
        noise = _layout.like(noise.to(wide), out)
    table, step = table.to(wide).contiguous(), step.contiguous()
    kernel = _registry.resolve(PATCH_STEP, x.device, x.dtype, backend)
    kernel(x, h, weight, bias, patch_size, table, step, history, seed, sample_ids, noise, out, x_in)
    return out


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int, channels: int) -> Tensor:
    """Tokens (B, N, p*p*C), features in the order (row, column, channel), to images (B, C, H, W); grid: (H/p, W/p)."""
    b, p = tokens.shape[0], patch_size
    x = tokens.reshape(b, grid[0], grid[1], p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
    return x.reshape(b, channels, grid[0] * p, grid[1] * p)


# ---- reference, and the CPU's kernel -----------------------------------------------------------------------------


def _layer_then_row(row: Callable) -> Callable:
    """The layer and the row one after the other, by a `sampler_step_out`."""

    def run(x, h, weight, bias, patch_size, table, step, history, seed, sample_ids, noise, out, x_in):
        if x.numel() == 0:
            return
        batch, channels, height, width = x.shape
        grid, outputs = (height // patch_size, width // patch_size), weight.shape[0] // patch_size**2
        output = unpatchify(F.linear(h, weight, bias), grid, patch_size, outputs).contiguous()  # (k B, C or 2C, H, W)
        variance = output[-batch:, channels:] if outputs > channels else None
        row(x, [output[:, :channels]], table, step, history, seed, sample_ids, noise, variance, out, x_in)

    return run


reference = _layer_then_row(reference_sampler_step)


def _cost(arguments, results):
    x, h, weight, bias, patch_size, table, step, history, seed, sample_ids, noise, out, x_in = arguments
    batch, channels = x.shape[0], x.shape[1]
    branches = h.shape[0] // max(batch, 1)
    learned = weight.shape[0] > patch_size**2 * channels and (seed is not None or noise is not None)
    moved = row_bytes(x, table) + traffic(x, h, weight, bias, step, history, seed, sample_ids, noise, out, x_in)
    flops, exps = row_work(branches, history, seed, noise, learned, x_in)
    return per_element(moved, x.numel(), flops, exps) + Cost(0, 2 * h.shape[2] * (branches + learned) * x.numel())


PATCH_STEP = _registry.define(
    "patch_step_out(Tensor x, Tensor h, Tensor weight, Tensor? bias, int patch_size, Tensor table, Tensor step, "
    "Tensor(a!)? history, Tensor? seed, Tensor? sample_ids, Tensor? noise, Tensor(b!) out, Tensor(c!)? x_in) -> ()",
    reference,
    fake=lambda *args: None,
    module="patch_step",
    kernels=("cpu", "triton"),
    cpu=_layer_then_row(SAMPLER_STEP.overloads["cpu"]),
    cost=_cost,
)


# ---- argument checks ---------------------------------------------------------------------------------------------


def _check_arguments(x, h, weight, bias, patch_size, table, step, history, seed, noise, out, x_in):
    op = "patch_step"
    _check.dtype(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}; add a dimension with x[None]")
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"{op}: patch_size must be an int >= 1, got {patch_size!r}")
    batch, channels, height, width = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{op}: patch_size must divide H and W = {height, width}, got {patch_size}")
    _check_layer(op, x, h, weight, bias, patch_size)
    _row_checks.check_step(op, step, x)
    _row_checks.check_table(op, table, step)
    _row_checks.check_draws(op, x, seed, noise)
    if history is not None:
        _row_checks.check_history(op, history, x)
    if x_in is not None:
        _row_checks.check_x_in(op, x_in, x, h, "h")
    if out is not None:
        _check.same_dtype(op, "out", out, "x", x)
        _check.shape(op, "out", out, "x's shape", x.shape)
        _check.same_device(op, "out", out, "x", x)


def _check_layer(op, x, h, weight, bias, patch_size):
    batch, channels, height, width = x.shape
    tokens, features = (height // patch_size) * (width // patch_size), patch_size**2 * channels
    _check.dtype(op, "h", h)
    branches = h.shape[0] / max(batch, 1) if h.dim() == 3 else 0
    if h.dim() != 3 or h.shape[1] != tokens or (batch and branches not in range(1, MAX_BRANCHES + 1)):
        raise ValueError(
            f"{op}: h must be (k B, N, D) with B = {batch}, k <= {MAX_BRANCHES}, N = {tokens}, got {tuple(h.shape)}"
        )
    if h.dtype != x.dtype and (x.dtype != torch.float32 or h.dtype == torch.float64):
        raise TypeError(
            f"{op}: h must have x's dtype {x.dtype}, or be 16-bit beside a float32 x, got {h.dtype}; "
            "convert x with .float()"
        )
    _check.same_device(op, "h", h, "x", x)
    _check.same_dtype(op, "weight", weight, "h", h)
    if weight.dim() != 2 or weight.shape[0] not in (features, 2 * features) or weight.shape[1] != h.shape[2]:
        raise ValueError(
            f"{op}: weight must be (p p C or p p 2C, D) = ({features} or {2 * features}, {h.shape[2]}), got "
            f"{tuple(weight.shape)}"
        )
    _check.same_device(op, "weight", weight, "x", x)
    if bias is not None:
        _check.same_dtype(op, "bias", bias, "h", h)
        _check.shape(op, "bias", bias, "(weight.shape[0],)", weight.shape[:1])
        _check.same_device(op, "bias", bias, "x", x)
