"""What a call of `sample` asks for: its arguments, checked, and joined to what the loop works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genengine import _denoiser
from genengine.extensions._protocol import Extension, Extensions
from genengine.ops import _check, _layout
from genengine.table import CoefficientTable

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of a run.

    table: with guidance in place, and what extensions do to it. shape: (B, ...) of the state, which starts from x where
    that is given. cond: of all branches, concatenated. seed: int64 () or (B,).
    """

    denoiser: Callable[..., Tensor]
    table: CoefficientTable
    extensions: Extensions
    branches: int
    cond: dict
    shape: tuple[int, ...]
    x: Tensor | None
    seed: Tensor
    sample_ids: Tensor | None
    noise: Tensor | Callable[[int], Tensor] | None
    check_finite: bool
    device: torch.device
    model_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return torch.float32 if self.x is None else self.x.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the state."""
        return torch.contiguous_format if self.x is None else _layout.memory_format(self.x)

    @property
    def draws(self) -> bool:
        """Whether rows draw noise."""
        return self.table.needs_noise and self.noise is None


def resolve(
    denoiser: Callable[..., Tensor], table: CoefficientTable, shape: Sequence[int] | None, *, x: Tensor | None,
    cond: Mapping | Sequence[Mapping] | None, uncond: Mapping | None, guidance: float | Tensor | None,
    seed: int | Tensor, sample_ids: Tensor | None, noise: Tensor | Callable[[int], Tensor] | None,
    device: torch.device | str | None, model_dtype: torch.dtype | None, check_finite: bool,
    extensions: Sequence[Extension],
) -> Request:  # fmt: skip
    """The arguments of `sample`, which describes them, as a Request. Raises ValueError or TypeError."""
    if not isinstance(table, CoefficientTable):
        raise TypeError(
            f"sample: table must be a CoefficientTable, got {type(table).__name__}; genengine.solvers make them"
        )
    branches = _branches(cond, uncond)
    device = _device(device, x, branches, denoiser)
    extensions = Extensions(extensions)
    table = extensions.extend(_with_guidance(table, guidance, len(branches)))
    table.validate()
    shape = _shape(x, shape)
    if table.batch not in (1, shape[0]):
        raise ValueError(f"sample: table has rows for {table.batch} samples, the batch is {shape[0]}")
    seed = _check.seed_tensor("sample", seed, device, shape[0])
    model_dtype = model_dtype or _denoiser.model_dtype(denoiser)
    request = Request(
        denoiser, table, extensions, len(branches), _concatenate(branches, shape[0], device), shape, x, seed,
        _check.sample_ids("sample", sample_ids, device, shape[0]), noise, check_finite, device, model_dtype,
    )  # fmt: skip
    _check_dtypes(request.dtype, model_dtype)
    if isinstance(noise, Tensor):
        check_noise(noise, (table.num_rows, *shape), "(R, B, ...)", device)
    return request


def _branches(cond, uncond):
    """The keyword arguments of each branch, unconditional first."""
    conds = [] if cond is None else [cond] if isinstance(cond, Mapping) else list(cond)
    branches = ([uncond] if uncond is not None else []) + conds
    if uncond is None and len(conds) > 1:
        raise ValueError("sample: two cond dicts need uncond, the branch that guidance starts from")
    if len(branches) > 3:
        raise ValueError(f"sample: at most three branches (uncond and two cond), got {len(branches)}")
    names = [set(branch) for branch in branches]
    if any(other != names[0] for other in names):
        raise ValueError(
            f"sample: cond and uncond must have the same keys, got {sorted(names[1])} and {sorted(names[0])}"
        )
    return branches or [{}]


def _concatenate(branches, batch, device):
    merged = {}
    for name, first in branches[0].items():
        values = [branch[name] for branch in branches]
        if isinstance(first, Tensor) and first.dim() > 0:
            for value in values:
                if not isinstance(value, Tensor) or value.shape[0] != batch:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"sample: cond[{name!r}] must be a tensor (B, ...) with B = {batch}, got {got}")
                if value.device != device:
                    raise ValueError(
                        f"sample: cond[{name!r}] must be on {device}, got {value.device}; move it with .to(...)"
                    )
            merged[name] = torch.cat(values) if len(values) > 1 else first
        elif any(value is not first and value != first for value in values[1:]):
            raise ValueError(
                f"sample: cond[{name!r}] is no tensor, so it must be equal in cond and uncond, got {values}"
            )
        else:
            merged[name] = first
    return merged


def _with_guidance(table, guidance, branches):
    if guidance is not None:
        if branches == 1:
            raise ValueError("sample: guidance needs uncond beside cond, got one branch; pass uncond={...}")
        if isinstance(guidance, Tensor):
            guidance = guidance.detach().double().cpu().numpy()
        if np.size(guidance):  # an empty batch has no guidance
            table = table.with_guidance(guidance)
    if branches == 1 and ((table.rows[..., 1] != 0) & (table.rows[..., 1] != 1)).any():
        raise ValueError("sample: the table has a guidance scale, but there is one branch; pass uncond={...}")
    if branches < 3 and (table.rows[..., 2] != 0).any():
        raise ValueError(
            f"sample: the table has g2 for a third branch, got {branches} branches; pass cond=[{{...}}, {{...}}]"
        )
    return table


def _device(device, x, branches, denoiser):
    if device is not None:
        device = torch.device(device)
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        if x is not None and x.device != device:
            raise ValueError(
                f"sample: x must be on device={device}, got {x.device}; move it with .to(...) or drop device"
            )
        return device
    if x is not None:
        return x.device
    tensors = [value for branch in branches for value in branch.values() if isinstance(value, Tensor)]
    if tensors:
        return tensors[0].device
    parameter = _denoiser.first_parameter(denoiser)
    return parameter.device if parameter is not None else torch.device("cpu")


def _shape(x, shape):
    """(B, ...) of the state, with x checked."""
    if (x is None) == (shape is None):
        raise ValueError(f"sample: exactly one of shape and x must be given, got {'neither' if x is None else 'both'}")
    if x is None:
        shape = tuple(shape)
        if not shape:
            raise ValueError("sample: shape must be (B, ...), got ()")
        return shape
    _check.dtype("sample", "x", x, MODEL_DTYPES)
    if x.dim() == 0:
        raise ValueError("sample: x must be (B, ...), got a tensor without dimensions; add a batch with x[None]")
    _check.no_grad_needed("sample", (x,))
    return tuple(x.shape)


def _check_dtypes(dtype, model_dtype):
    if model_dtype not in MODEL_DTYPES:
        names = ", ".join(map(str, MODEL_DTYPES))
        raise TypeError(
            f"sample: model_dtype must be one of {names}, got {model_dtype}; pass model_dtype=torch.float32"
        )
    if dtype not in (torch.float32, model_dtype):
        raise TypeError(f"sample: x must be float32 or of the model's dtype {model_dtype}, got {dtype}; pass x.float()")


def check_noise(noise: Tensor, shape: tuple[int, ...], symbols: str, device: torch.device) -> None:
    """Refuse noise given that is not like the state. Raises ValueError or TypeError."""
    _check.dtype("sample", "noise", noise)
    _check.shape("sample", "noise", noise, symbols, shape)
    if noise.device != device:
        raise ValueError(f"sample: noise must be on {device} like x, got {noise.device}; move it with .to(x.device)")
