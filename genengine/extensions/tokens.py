"""Rows per token: every token of a sample at a noise level of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine.ops import _check, sampler_step
from genengine.table import COLUMNS


def token_step(
    x: Tensor,
    outputs: Tensor | tuple[Tensor, ...],
    table: Tensor,
    step: Tensor,
    history: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    out: Tensor | None = None,
    x_in: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`ops.sampler_step` with a row for every token: row (step[b], b, n) of the table applies to token n of sample b.

    For models whose time is per token (Diffusion Forcing; frames or patches at noise levels of their own): column n of
    the table is a solver's on the times of token n, and a token that waits has identity rows (a = 1). The tokens are
    the batch of one fused pass. Noise is that of the whole sample, z = normal(seed, sample_ids[b], step[b], stream
    "step") of (N, D), as with one row for all tokens.

        tables = [solver(path, grid, ...) for grid in grids]                          a grid for each token
        table = torch.from_numpy(CoefficientTable.stack(tables).astype_float32())[:, None]       (R, 1, N, 16)
        for row in range(R):
            output = model(x, t=table[row, ..., 0].expand(B, N))
            x = token_step(x, output, table, torch.full((B,), row, dtype=torch.int32), seed=seed)

    x: (B, N, D), contiguous, as all tensors like it. table: float32 (R, B or 1, N, 16). step: int32 (B,). history:
    (K, B, N, D). The others, what is returned and raised: as `ops.sampler_step`, but that with a seed all noise is
    drawn, in a pass of its own.
    Chen et al. 2024, Diffusion forcing.
    """
    op = "token_step"
    _check.dtype(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be (B, N, D), got {tuple(x.shape)}")
    batch, num_tokens, _ = x.shape
    if table.dim() != 4 or table.shape[1] not in (1, batch) or table.shape[2:] != (num_tokens, len(COLUMNS)):
        raise ValueError(
            f"{op}: table must be (R, B or 1, N, {len(COLUMNS)}) with B = {batch} and N = {num_tokens}, "
            f"got {tuple(table.shape)}"
        )
    _check.shape(op, "step", step, "(B,)", (batch,))
    if seed is not None and noise is None:
        noise, seed = _drawn(x, step, seed, sample_ids, table.shape[0], backend), None
    flat = _flattened(op, outputs=outputs, noise=noise, history=history, out=out, x_in=x_in)
    rows, steps = table.expand(-1, batch, -1, -1).flatten(1, 2), step.repeat_interleave(num_tokens)
    result = sampler_step(_tokens(op, "x", x), table=rows, step=steps, seed=seed, backend=backend, **flat)
    return result.view(x.shape)


def _drawn(x, step, seed, sample_ids, num_rows, backend):
    """z of every sample's step, (B, N, D) float32: a row with s = 1 alone."""
    unit = torch.zeros(num_rows, 1, len(COLUMNS), device=x.device)
    unit[..., COLUMNS.index("s")] = 1.0
    wide = x.float()
    return sampler_step(wide, wide, unit, step, seed=seed, sample_ids=sample_ids, backend=backend)


def _flattened(op, outputs, **tensors):
    """The arguments with their tokens along the batch."""
    several = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    flat = {"outputs": [_tokens(op, f"outputs[{i}]", output) for i, output in enumerate(several)]}
    return flat | {name: _tokens(op, name, tensor) for name, tensor in tensors.items() if tensor is not None}


def _tokens(op, name, tensor):
    """(..., B, N, D) as (..., B N, D), a view."""
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}; use .contiguous()")
    if tensor.dim() < 3:
        raise ValueError(f"{op}: {name} must be (..., B, N, D) like x, got {tuple(tensor.shape)}")
    return tensor.flatten(-3, -2)
