"""The network's last layer joined to the solver's row: in the sampling loop one kernel does both, where it gains."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genengine.ops import _registry
from genengine.ops.patch_step import PATCH_STEP


def joined_row(run, scheduled) -> Callable[[int], None] | None:
    """A function of the row index that does a row of the loop by `patch_step`, or None where the loop must not.

        h = scheduled.tokens(x_in, step);    x = row(x, unpatchify(h W^T + bias)) in one pass;    then `advance`

    scheduled: what the denoiser's for_schedule returned. It joins if it has `tokens` and a `last_layer` (weight, bias,
    patch_size) that is not None, if nothing else needs the output (an extension, check_finite), and where patch_step's
    own kernel is the one to run: on a CPU it would be the same two calls.
    """
    layer = getattr(scheduled, "last_layer", None)
    if layer is None or run.check_finite or run.extensions.write_rows or run.extensions.change_x:
        return None
    if not _fits(run, layer) or _registry.choose(PATCH_STEP, run.x.device, run.x.dtype) != "triton":
        return None
    kernel = _registry.direct(PATCH_STEP, run.x.device, run.x.dtype)
    tokens, (weight, bias, patch_size) = scheduled.tokens, layer

    def row(index):
        h = tokens(run.x_in, run.step)
        noise = None if run.noise is None else run.given_noise(index)
        x_in = None if index + 1 == run.num_rows else run.x_in
        kernel(
            run.x, h, weight, bias, patch_size, run.table, run.sample_step, run.history, run.seed, run.sample_ids,
            noise, run.x, x_in,
        )  # fmt: skip
        run.advance(run.step, run.table, run.t)

    return row


def _fits(run, layer) -> bool:
    """Whether the layer's output is what the loop takes as it is: else it says what is wrong, or converts."""
    weight, bias, patch_size = layer
    if run.x.dim() != 4 or not run.x.is_contiguous() or torch.is_autocast_enabled(run.x.device.type):
        return False
    outputs = run.x.shape[1] * (2 if run.learned_variance else 1)
    same = weight.dtype == run.model_dtype and weight.is_contiguous() and (bias is None or bias.dtype == weight.dtype)
    return same and weight.shape[0] == patch_size**2 * outputs
