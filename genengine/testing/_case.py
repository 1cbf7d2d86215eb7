"""What a case is, and the dtypes and sample shapes that the elementwise ops share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One call of a dispatcher op: `args`, and which of them the op writes; exact: bits must equal the reference's.

    large: slow where kernels are interpreted. dtypes: of the state and of the rest. slack: what an output may err
    beyond the rule, by its position: a float32 rounding of the sum of its |terms|, for sums that may cancel. oracle:
    arguments of the float64 oracle, where not `args` widened one by one; outputs of integers must equal the oracle's.
    """

    label: str
    args: tuple
    mutated: tuple[int, ...] = ()
    exact: bool = False
    large: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    slack: dict[int, float] = field(default_factory=dict)
    oracle: tuple | None = None


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements per sample: fewer than a vector, and not a multiple of one; whole 16-byte vectors (the vectorised kernels);
# more than one Triton block of 1024, whole and not. Here 70 and 4205, odd; 1024 and 1728, whole vectors.
SMALL, LARGE = ((3, 2, 5, 7), (2, 4, 16, 16)), ((2, 5, 29, 29), (2, 3, 24, 24))
