"""sampler_step: one row of a coefficient table applied to the state; advance: on to the next row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genengine import random
from genengine.ops import _check, _layout, _registry, _row_checks
from genengine.ops._cost import Cost, per_element, traffic
from genengine.ops.normal import NORMAL_EXPS, NORMAL_FLOPS, exp_ieee, reference_normal
from genengine.table import COLUMNS

_STEP_STREAM = random.STREAMS["step"]
_INDEX = {name: index for index, name in enumerate(COLUMNS)}
MAX_BRANCHES = 3


def sampler_step(
    x: Tensor,
    outputs: Tensor | Sequence[Tensor],
    table: Tensor,
    step: Tensor,
    history: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    variance: Tensor | None = None,
    out: Tensor | None = None,
    x_in: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply row step[b] of the table to sample b, in one pass over memory.

        m  = out_0 + g1 (out_1 - out_0) + g2 (out_2 - out_1)
        y  = phi(p x + q m)                        phi: identity | clamp to [-r, r] | clamp to [-r, r], then / r
        x' = a x + b m + c y + h1 H1 + h2 H2 + h3 H3 + s (exp(l v) z)    left to right, no fused multiply-add
        H_j <- keep | y | x                        as the row's flags say, after all registers were read
        x_in = c_in x'                             cast to its dtype, repeated for each branch

    A term with a zero coefficient is skipped, not multiplied: uninitialised history and NaN do not leak through it.
    A sample whose step has reached R (or is negative) is copied to `out` unchanged, its history and x_in left alone.

    x: (B, ...) float32, float16 or bfloat16, contiguous or channels_last. outputs: the model's one to three branches,
    unconditional first: tensors like x, or one tensor (k B, ...) that stacks them along the batch; of x's dtype or,
    with a float32 x, 16-bit; views whose samples are dense, as the first C of 2C channels, are read in place.
    table: float32 (R, B or 1, 16), columns as in `genengine.table`. step: int32 (B,). history: float32 (K, B, ...),
    K <= 3, written in place.
    seed: draws z = normal(seed, sample_ids[b], step[b], stream "step") in the kernel; noise: z given, float32 or x's
    dtype, like x. With neither, a row's s must be 0 (it is skipped). sample_ids: int64 (B,), default 0..B-1.
    variance: v, of the outputs' dtype and like them perhaps a view; needed where a row has s and l, else not read; l v
    is bounded to [-87, 88].
    out: written instead of a new tensor; may be x itself. x_in: (k B, ...) in the outputs' dtype, k copies of the input
    of the next model evaluation.

    Inference only. Returns x' (B, ...) with x's dtype. float64 runs on the reference.
    Raises TypeError, ValueError on bad arguments, RuntimeError where autograd would need a backward.
    Cost: reads x, outputs, a table row per sample, step, history, a given noise, with noise of either kind variance,
    writes x', x_in; 8 flops per element of x, 3 for each further branch, 2 for a register, 2 for noise, 3 with 1
    exponential for variance, 1 for x_in, and 6 with 1.5 exponentials for a normal that is drawn. Which coefficients are
    zero and which registers are written is known to the table alone: every term counts, and history as read once.
    Learned variance: Nichol & Dhariwal 2021, eq. 15.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    _check_arguments(x, outputs, table, step, history, seed, noise, variance, out, x_in)
    _check.no_grad_needed("sampler_step", (x, *outputs, noise, variance))
    batch = x.shape[0]
    if seed is not None:
        seed = _check.seed_tensor("sampler_step", seed, x.device, batch)
    sample_ids = _check.sample_ids("sampler_step", sample_ids, x.device, batch)
    if out is None:
        out = torch.empty_like(x, memory_format=_layout.memory_format(x))
    _row_checks.check_written_layout("sampler_step", out, history, x_in)
    if not torch.compiler.is_compiling():
        read = [(f"outputs[{i}]", output) for i, output in enumerate(outputs)]
        read += [("noise", noise), ("variance", variance)]
        _row_checks.check_overlaps("sampler_step", out, history, x_in, x, read)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if noise is not None:
        noise = noise.to(wide)
    kernel = _registry.resolve(SAMPLER_STEP, x.device, x.dtype, backend)
    outputs = [_layout.like(output, out) for output in outputs]
    noise, variance = (None if tensor is None else _layout.like(tensor, out) for tensor in (noise, variance))
    table, step = table.to(wide).contiguous(), step.contiguous()
    kernel(_layout.like(x, out), outputs, table, step, history, seed, sample_ids, noise, variance, out, x_in)
    return out


def advance(step: Tensor, table: Tensor, t: Tensor, *, backend: str | None = None) -> None:
    """Move every sample on to its next row and write that row's model time; no host sync.

        step[b] += 1 where 0 <= step[b] < R;    t[i] = table[step[i % B], i % B, t_model] where step[i % B] < R

    step: int32 (B,), in place. table: float32 (R, B' , 16) with B' = 1, or a B' that divides B (sample b reads column
    b % B'). t: float32 (k B,), in place: the time of each of k branches. A finished sample's t is left as it is.
    Cost: reads step, an entry of the table per sample, writes step, t; no flops, no exponential.
    """
    _check.dtype("advance", "step", step, (torch.int32,))
    _row_checks.check_table("advance", table, step, shared=True)
    for name, tensor in (("step", step), ("table", table), ("t", t)):
        if not tensor.is_contiguous():
            raise ValueError(f"advance: {name} must be contiguous, got strides {tensor.stride()}; use .contiguous()")
    if t.dim() != 1 or t.dtype != torch.float32 or (step.shape[0] and t.shape[0] % step.shape[0]):
        raise ValueError(f"advance: t must be float32 (k B,) with B = {step.shape[0]}, got {t.dtype} {tuple(t.shape)}")
    _registry.resolve(ADVANCE, step.device, torch.float32, backend)(step, table.to(torch.float32), t)


# ---- reference ---------------------------------------------------------------------------------------------------


def reference(x, outputs, table, step, history, seed, sample_ids, noise, variance, out, x_in):
    if x.numel() == 0:
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = _rows(table, step, x.shape[0]).to(wide)
    column = lambda name: row[:, _INDEX[name]].reshape(-1, *[1] * (x.dim() - 1))  # noqa: E731
    term = lambda name, value: torch.where(column(name) != 0, column(name) * value, 0.0)  # noqa: E731
    state, branches = x.to(wide), [output.to(wide) for output in _unstack(outputs, x.shape[0])]
    m = branches[0]
    for k in range(1, len(branches)):
        m = m + term(f"g{k}", branches[k] - branches[k - 1])
    y = _phi(term("p", state) + term("q", m), column("flags").long() & 3, column("r"))
    value = term("a", state) + term("b", m) + term("c", y)
    for k in range(0 if history is None else history.shape[0]):
        value = value + term(f"h{k + 1}", history[k].to(wide))
    if noise is None and seed is not None:
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        reference_normal(noise, seed, sample_ids, step, _STEP_STREAM)
    if noise is not None:
        z = noise.to(wide)
        if variance is not None:
            z = torch.where(column("l") != 0, _exp(column("l") * variance.to(wide)) * z, z)
        value = value + term("s", z)
    active = ((step >= 0) & (step < table.shape[0])).reshape(-1, *[1] * (x.dim() - 1))
    if history is not None:
        _write_history(history, state, y, column("flags").long(), active)
    out.copy_(torch.where(active, value, state))
    if x_in is not None:
        branches_in = x_in.view(-1, *x.shape)
        branches_in.copy_(torch.where(active, column("c_in") * value, branches_in.to(wide)))


def _exp(exponent):
    """In float32 the exponential whose bits all backends share, in float64 the exact one, within the same bounds."""
    return exp_ieee(exponent) if exponent.dtype == torch.float32 else exponent.clamp(-87, 88).exp()


def _unstack(outputs, batch):
    """The branches one by one, also where a single tensor stacks them."""
    return outputs[0].split(batch) if len(outputs) == 1 else outputs


def _rows(table, step, batch):
    """The row of each sample: (B, 16); samples outside the table read one inside, and their result is discarded."""
    index = step.clamp(min=0, max=table.shape[0] - 1).long()
    sample = torch.arange(batch, device=table.device) % max(table.shape[1], 1)
    return table[index, sample]


def _phi(u, kind, r):
    clamped = torch.minimum(torch.maximum(u, -r), r)
    return torch.where(kind == 0, u, torch.where(kind == 1, clamped, clamped / torch.where(kind == 2, r, 1.0)))


def _write_history(history, state, y, flags, active):
    for k in range(history.shape[0]):
        write = (flags >> (2 + 2 * k)) & 3
        value = torch.where(write == 1, y, torch.where(write == 2, state, history[k].to(y.dtype)))
        history[k].copy_(torch.where(active, value, history[k].to(y.dtype)))


def reference_advance(step, table, t):
    if step.numel() == 0:
        return
    rows = table.shape[0]
    inside = (step >= 0) & (step < rows)
    step += inside.to(torch.int32)
    time = _rows(table, step, step.shape[0])[:, _INDEX["t_model"]]
    branches = t.view(-1, step.shape[0])
    branches.copy_(torch.where(inside & (step < rows), time.to(t.dtype), branches))


def _cost(arguments, results):
    x, outputs, table, step, history, seed, sample_ids, noise, variance, out, x_in = arguments
    variance = variance if seed is not None or noise is not None else None  # nothing to scale
    branches = sum(output.shape[0] for output in outputs) // max(x.shape[0], 1)
    moved = row_bytes(x, table) + traffic(x, outputs, step, history, seed, sample_ids, noise, variance, out, x_in)
    flops, exps = row_work(branches, history, seed, noise, variance is not None, x_in)
    return per_element(moved, x.numel(), flops, exps)


def row_bytes(x, table):
    """Bytes of a row for each sample."""
    return x.shape[0] * len(COLUMNS) * table.element_size()


def row_work(branches, history, seed, noise, learned, x_in):
    """(flops, exps) per element of x of a row, as `sampler_step` states them; learned: with a variance to scale by."""
    drawn = noise is None and seed is not None
    flops = 8 + 3 * (branches - 1) + 2 * (0 if history is None else history.shape[0]) + (x_in is not None)
    flops += 2 * (drawn or noise is not None) + 3 * learned + drawn * NORMAL_FLOPS
    return flops, learned + drawn * NORMAL_EXPS


def _cost_advance(arguments, results):
    step, table, t = arguments
    return Cost(traffic(step, step, t) + step.numel() * table.element_size())


SAMPLER_STEP = _registry.define(
    "sampler_step_out(Tensor x, Tensor[] outputs, Tensor table, Tensor step, Tensor(a!)? history, Tensor? seed, "
    "Tensor? sample_ids, Tensor? noise, Tensor? variance, Tensor(b!) out, Tensor(c!)? x_in) -> ()",
    reference,
    fake=lambda *args: None,
    module="sampler_step",
    cost=_cost,
)
ADVANCE = _registry.define(
    "advance(Tensor(a!) step, Tensor table, Tensor(b!) t) -> ()",
    reference_advance,
    fake=lambda *args: None,
    module="sampler_step",
    cost=_cost_advance,
)


# ---- argument checks ---------------------------------------------------------------------------------------------


def _check_arguments(x, outputs, table, step, history, seed, noise, variance, out, x_in):
    op = "sampler_step"
    _check.dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (B, ...), got a tensor without dimensions; add a batch with x[None]")
    if not 1 <= len(outputs) <= MAX_BRANCHES:
        raise ValueError(f"{op}: outputs must hold 1 to {MAX_BRANCHES} tensors, got {len(outputs)}")
    stacked = len(outputs) == 1 and _stacks(outputs[0], x)
    for i, output in enumerate(outputs):
        _check.dtype(op, f"outputs[{i}]", output)
        if not stacked:
            _check.shape(op, f"outputs[{i}]", output, "x's shape", x.shape)
        _check.same_device(op, f"outputs[{i}]", output, "x", x)
        if output.dtype != outputs[0].dtype:
            raise TypeError(f"{op}: outputs must share one dtype, got {outputs[0].dtype} and {output.dtype}")
    if outputs[0].dtype != x.dtype and (x.dtype != torch.float32 or outputs[0].dtype == torch.float64):
        raise TypeError(
            f"{op}: outputs must have x's dtype {x.dtype}, or be 16-bit beside a float32 x, got {outputs[0].dtype}; "
            "convert x with .float()"
        )
    _row_checks.check_step(op, step, x)
    _row_checks.check_table(op, table, step)
    _row_checks.check_draws(op, x, seed, noise)
    if variance is not None:
        _check.same_dtype(op, "variance", variance, "outputs", outputs[0])
        _check.shape(op, "variance", variance, "x's shape", x.shape)
        _check.same_device(op, "variance", variance, "x", x)
    if history is not None:
        _row_checks.check_history(op, history, x)
    if x_in is not None:
        _row_checks.check_x_in(op, x_in, x, outputs[0], "outputs")
    if out is not None:
        _check.same_dtype(op, "out", out, "x", x)
        _check.shape(op, "out", out, "x's shape", x.shape)
        _check.same_device(op, "out", out, "x", x)


def _stacks(output, x):
    """True for the branches of x in one tensor (k B, ...), k <= 3."""
    batch = x.shape[0]
    if output.shape[1:] != x.shape[1:] or output.dim() == 0 or batch == 0:
        return False
    return output.shape[0] % batch == 0 and output.shape[0] // batch <= MAX_BRANCHES
