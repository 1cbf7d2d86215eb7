"""Which backend was measured fastest on a GPU: one table, filled from benchmark results and read by the choice.

`fastest.json`, shipped with the package and written by `tools/fill_fastest.py`, holds what was measured, no decisions:

    {DEVICE NAME: {OP: [{"dtype": "bfloat16", "shape": [16, 256, 1152], "seconds": {BACKEND: SECONDS, ...}}, ...]}}

the median seconds of a call on each backend, "reference" being torch's own op where the op has one. A device that is
not in it takes the order of `DEFAULT`. Only kernels that were seen right (`_verify`) are ever chosen.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("fastest.json")
DEFAULT = ("cuda", "triton")  # CUDA C++ first: no compilation at run time


@torch._dynamo.assume_constant_result  # while torch.compile traces, it is looked up, not traced
def order(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> tuple[str, ...]:
    """The backends of an op, fastest first: as measured at the nearest shape, else as `DEFAULT` says.

    shape: of the call's first tensor; None for a choice that must do for all, the fastest on the whole. Those measured
    slower than "reference" stand behind it, which ends the search.
    """
    return _order(op, device, dtype, shape and tuple(shape))


@lru_cache(4096)
def _order(op, device, dtype, shape):
    if not _table():
        return DEFAULT
    rows = _table().get(torch.cuda.get_device_name(device), {}).get(op, ())
    rows = [row for row in rows if row["dtype"] == str(dtype).removeprefix("torch.")]
    if shape is not None:
        alike = [row for row in rows if len(row["shape"]) == len(shape)]
        rows = sorted(alike, key=lambda row: _distance(row["shape"], shape))[:1]
    cost = _relative_costs(rows)
    return (*sorted(cost, key=cost.get), *(name for name in DEFAULT if name not in cost))


def _distance(a, b):
    """First by the innermost size, which chooses a kernel's form, then by how much work there is."""
    elements = [math.log(max(1, math.prod(shape))) for shape in (a, b)]
    return abs(math.log(max(1, a[-1]) / max(1, b[-1]))), abs(elements[0] - elements[1])


def _relative_costs(rows):
    """Backend -> mean logarithm of its time over the fastest's, of the backends that every row has."""
    common = set.intersection(*(set(row["seconds"]) for row in rows)) if rows else set()
    log = lambda row, name: math.log(row["seconds"][name] / min(row["seconds"].values()))  # noqa: E731
    return {name: sum(log(row, name) for row in rows) / len(rows) for name in sorted(common)}


@lru_cache
def _table():
    return json.loads(TABLE.read_text())
