"""Cases of sampler_step and advance, with tables of random rows."""

import torch
from torch import Tensor

from genengine.testing._case import DTYPES, LARGE, SMALL, Case


def random_table(generator, rows: int, batch: int, branches: int, registers: int) -> Tensor:
    """Coefficients of every kind: dense, zero, clamped, thresholded, with reads and writes of every register used."""
    table = torch.randn(rows, batch, 16, generator=generator) * (torch.rand(rows, 1, 16, generator=generator) > 0.3)
    table[..., 5] = table[..., 5].abs() + 0.5
    table[..., 12] = table[..., 12].abs()
    table[..., 13] *= 0.5 * (table[..., 12] != 0)
    table[..., 1] *= branches > 1
    table[..., 2] *= branches > 2
    flags = torch.randint(0, 3, (rows, 1), generator=generator)
    for j in range(3):
        if j < registers:
            flags = flags + torch.randint(0, 3, (rows, 1), generator=generator) * 4 ** (j + 1)
        else:
            table[..., 9 + j] = 0
    table[..., 15] = flags.float()
    return table


_STEP_KINDS = (
    (1, 0, "none"), (2, 1, "drawn"), (3, 3, "given"), (2, 2, "drawn channels_last"), (1, 0, "drawn learned"),
    (2, 1, "given learned"), (1, 2, "drawn learned channels_last"),
)  # fmt: skip


def _step_cases(generator, device) -> list[Case]:
    pairs = [(d, d) for d in DTYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    return [
        _step_case(generator, device, state, model, shape, *kind)
        for state, model in pairs
        for shape in (*SMALL, *LARGE)
        for kind in _STEP_KINDS
    ]


def _step_case(generator, device, state, model, shape, branches, registers, noise) -> Case:
    memory = torch.channels_last if "channels_last" in noise else torch.contiguous_format

    def fresh(dtype, batch=shape[0]):
        values = torch.randn(batch, *shape[1:], generator=generator)
        return values.to(device, dtype).contiguous(memory_format=memory)

    history = None
    if registers:
        history = fresh(torch.float32, registers * shape[0]).unflatten(0, (registers, shape[0]))
    table = random_table(generator, 4, shape[0] if "drawn" in noise else 1, branches, registers).to(device)
    step = torch.arange(shape[0], dtype=torch.int32, device=device) + 2  # the last samples are finished
    seed = torch.tensor(12345, device=device) if "drawn" in noise else None
    given = fresh(torch.float32) if "given" in noise else None
    outputs, out = [fresh(model) for _ in range(branches)], torch.zeros_like(fresh(state))
    variance = fresh(model) if "learned" in noise else None
    if variance is not None and memory == torch.contiguous_format:  # as models return them: views into 2C channels
        outputs = [torch.cat([output, variance], 1)[:, : shape[1]] for output in outputs]
        variance = torch.cat([outputs[-1], variance], 1)[:, shape[1] :]
    x_in = torch.zeros_like(fresh(model, 2 * shape[0]))
    args = (fresh(state), outputs, table, step, history, seed, None, given, variance, out, x_in)
    label = f"{state} state, {model} model, {shape}, {branches} branches, noise {noise}"
    return Case(label, args, (4, 9, 10), True, shape in LARGE, (state, model))


def _advance_cases(generator, device) -> list[Case]:
    table = torch.randn(5, 3, 16, generator=generator).to(device)
    step = torch.tensor([0, 3, 4, 5, 1, 2], dtype=torch.int32, device=device)
    return [
        Case("rows per sample", (step, table, torch.zeros(12, device=device)), (0, 2), True),
        Case("shared rows", (step, table[:, :1].contiguous(), torch.zeros(6, device=device)), (0, 2), True),
    ]


CASES = {"sampler_step_out": _step_cases, "advance": _advance_cases}
