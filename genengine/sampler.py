"""The only sampling loop: a denoiser, a coefficient table, and one fused row per model evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from genengine import _loop, _request
from genengine._loop import CAPTURE_MODES, StepInfo
from genengine.extensions._protocol import Extension
from genengine.table import CoefficientTable

__all__ = ["StepInfo", "sample"]


def sample(
    denoiser: Callable[..., Tensor],
    table: CoefficientTable,
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    cond: Mapping | Sequence[Mapping] | None = None,
    uncond: Mapping | None = None,
    guidance: float | Tensor | None = None,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    callback: Callable[[StepInfo], Tensor | None] | None = None,
    progress: bool | str = False,
    capture: str = "auto",
    device: torch.device | str | None = None,
    model_dtype: torch.dtype | None = None,
    check_finite: bool = False,
    extensions: Sequence[Extension] = (),
) -> Tensor:
    """Run a coefficient table from noise to data.

    Every row r evaluates the model once and applies one fused `sampler_step`:

        output = denoiser(c_in x, t[r], **cond);    x = row_r(x, output);    then `advance` moves on, on the device

    denoiser(x, t, **cond) -> output: any callable; x (k B, ...), t float32 (k B,), k branches in one batch, both
    buffers that the next row overwrites. If it has a method for_schedule(t_rows, **cond), that is called once with the
    model times (R, k B) of all rows and returns step(x, row) -> output, row int32 (k B,) on the device: then work that
    depends on t alone is done before the loop. (`Engine` also asks it for update(t_rows, **cond), see there.) If step
    has last_layer, (weight, bias, patch_size), and tokens(x, row) -> h (k B, N, D), of which output is the layer's
    patches, a GPU does that layer and the row in one pass (`ops.patch_step`), which rounds the output less; not with
    check_finite or extensions that see outputs or x.
    table: from `genengine.solvers`; with a learned variance, output has 2C channels, the second half of the last
    branch's being v in s exp(l v). shape: (B, ...) of the samples, whose state starts at init_scale * normal(seed); or
    x: the state to start from. cond, uncond: dicts of keyword arguments: tensors are concatenated along the batch,
    unconditional first, anything else must be equal in both; cond may be two dicts for three branches.
    guidance: replaces the table's g1, a float or one per sample (B,). seed: int in [0, 2^64), or int64 () or (B,).
    sample_ids: int64 (B,) global indices; a sample depends on its seed and index, never on the rest of the batch.
    noise: instead of drawing, (R, B, ...) tensor or noise(row) -> (B, ...).
    callback: called with a StepInfo after each row. progress: a progress bar, or its title.
    capture: on a GPU, "step" captures one row in a CUDA graph and replays it for every row, "loop" captures the whole
    loop in one graph, "never" neither. "auto" takes "step", which costs one pass of Python instead of R, or "never"
    where the host takes part in every row (noise, check_finite), the caller is capturing a graph, or torch.compile has
    given the denoiser graphs of its own (mode="reduce-overhead"). Ignored on a CPU. A captured denoiser's Python code
    runs a few times only, not once per row. Every call captures anew: `Engine` keeps buffers and graph for the next.
    device: of the samples; default that of x, of a tensor in cond, of the denoiser's parameters, else the CPU.
    model_dtype: of the model's input; default the denoiser's floating parameters' dtype, else float32.
    check_finite: raise FloatingPointError naming the first row whose model output is not finite (one sync per row).
    extensions: pieces of `genengine.extensions`, called in this order before and after every row; where one adds rows,
    `noise` and callbacks count these too.

    Returns x (B, ...), an ordinary tensor: the state is float32, or x's dtype. Raises ValueError or TypeError on bad
    arguments.
    """
    if capture not in CAPTURE_MODES:
        raise ValueError(f"sample: capture must be one of {', '.join(CAPTURE_MODES)}, got {capture!r}")
    request = _request.resolve(
        denoiser, table, shape, x=x, cond=cond, uncond=uncond, guidance=guidance, seed=seed, sample_ids=sample_ids,
        noise=noise, device=device, model_dtype=model_dtype, check_finite=check_finite, extensions=extensions,
    )  # fmt: skip
    mode = _loop.choose_mode(request, capture, watched=callback is not None or bool(progress), auto="step")
    return _loop.run(request, mode, callback, progress)
