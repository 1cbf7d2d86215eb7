"""The network's last layer joined to the solver's row: in the sampling loop one kernel does both, where it gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genengine.ops import _registry
from genengine.ops.patch_step import PATCH_STEP


@dataclass(frozen=True)  # not a tuple, whose weights an engine would take for tensors of a run
class Joined:
    """What a row is made of: tokens(x, row) of the network, its last layer (weight, bias, patch_size), the kernel."""

    tokens: Callable[[Tensor, Tensor], Tensor]
    layer: tuple
    kernel: Callable

    def tokens_of(self, x_in: Tensor, step: Tensor) -> Tensor:
        """The tokens h (k B, N, D), checked: the kernel takes them as they are."""
        weight, _, patch_size = self.layer
        h = self.tokens(x_in, step)
        batch, _, height, width = x_in.shape
        shape = (batch, (height // patch_size) * (width // patch_size), weight.shape[1])
        if not isinstance(h, Tensor) or h.shape != shape or h.dtype != weight.dtype:
            got = f"{h.dtype} {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"sample: tokens of a step with a last_layer must be (k B, N, D) = {shape} of its dtype "
                f"{weight.dtype}, got {got}; or let last_layer be None"
            )
        return h if h.stride(2) == 1 else h.contiguous()


def join(run, scheduled) -> Joined | None:
    """The last layer of a scheduled denoiser for the loop to join to its rows, or None where it must not.

        h = scheduled.tokens(x_in, step);    x = row(x, unpatchify(h W^T + bias)) in one pass

    scheduled: what the denoiser's for_schedule returned. It joins if it has `tokens` and a `last_layer` that is not
    None, if nothing else needs the output (an extension, check_finite), and where patch_step's own kernel is the one to
    run: on a CPU it would be the same two calls.
    """
    layer = getattr(scheduled, "last_layer", None)
    if layer is None or run.check_finite or run.extensions.write_rows or run.extensions.change_x:
        return None
    if not _fits(run, layer) or _registry.choose(PATCH_STEP, run.x.device, run.x.dtype) != "triton":
        return None
    return Joined(scheduled.tokens, tuple(layer), _registry.direct(PATCH_STEP, run.x.device, run.x.dtype))


def _fits(run, layer) -> bool:
    """Whether the layer's output is what the loop takes as it is: else it says what is wrong, or converts."""
    weight, bias, patch_size = layer
    if run.x.dim() != 4 or not run.x.is_contiguous() or torch.is_autocast_enabled(run.x.device.type):
        return False
    outputs, (height, width) = run.x.shape[1] * (2 if run.learned_variance else 1), run.x.shape[2:]
    if height % patch_size or width % patch_size:
        return False
    same = weight.dtype == run.model_dtype and weight.is_contiguous() and (bias is None or bias.dtype == weight.dtype)
    return same and weight.shape[0] == patch_size**2 * outputs
