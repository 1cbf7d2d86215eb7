"""The only sampling loop: a denoiser, a coefficient table, and one fused row per model evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genengine import _capture, _last_layer
from genengine._progress import progress_bar
from genengine.extensions._protocol import Extension, Extensions, Run
from genengine.ops import _check, _layout, _ranges, _registry, normal
from genengine.ops.sampler_step import ADVANCE, SAMPLER_STEP
from genengine.table import CoefficientTable

CAPTURE_MODES = ("auto", "loop", "step", "never")
MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after each row.

    row: index of the row just applied, of num_rows. t: its model time (of sample 0), a float. x: the state after it,
    (B, ...), live: clone it to keep it; returning a tensor from the callback replaces it.
    """

    row: int
    num_rows: int
    t: float
    x: Tensor


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
    depends on t alone is done before the loop. If step has last_layer, (weight, bias, patch_size), and tokens(x, row)
    -> h (k B, N, D) with output = unpatchify(h W^T + bias), a GPU does that layer and the row in one pass
    (`ops.patch_step`), which rounds the output less; not with check_finite or extensions that see outputs or x.
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
    where the host takes part in every row (noise, check_finite) or the caller is capturing a graph. Ignored on a CPU. A
    captured denoiser's Python code runs a few times only, not once per row.
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
    if not isinstance(table, CoefficientTable):
        raise TypeError(
            f"sample: table must be a CoefficientTable, got {type(table).__name__}; genengine.solvers make them"
        )
    branches = _branches(cond, uncond)
    device = _device(device, x, branches, denoiser)
    extensions = Extensions(extensions)
    table = extensions.extend(_with_guidance(table, guidance, len(branches)))
    table.validate()
    run = _Run(denoiser, table, branches, extensions, noise, check_finite, model_dtype or _model_dtype(denoiser))
    run.start(x, shape, seed, sample_ids, device)
    mode = _mode(capture, run, callback, progress)
    with torch.inference_mode(), _on(device), progress_bar(progress, table.num_rows, table.name, "row") as bar:
        run.prepare()
        _drive(run, mode, callback, bar)
    return run.x


def _drive(run: _Run, mode: str, callback, bar) -> None:
    """Apply all rows: by a graph of all of them, by a graph of one replayed, or one by one."""
    if mode == "loop":
        _capture.replay_loop(run)
        return
    advance = _capture.one_step(run) if mode == "step" else run.row
    if _ranges.rows is not None:
        advance = _ranges.around_rows(_ranges.rows, advance)
    for row in range(run.num_rows):
        advance(row)
        if callback is not None:
            replacement = callback(StepInfo(row, run.num_rows, run.times[row], run.x))
            if replacement is not None:
                run.replace(replacement, row)
        if bar is not None:
            bar.update()


class _Run:
    """The buffers of one sampling run, and its row: nothing is allocated per row but by the model."""

    def __init__(self, denoiser, table, branches, extensions, noise, check_finite, model_dtype):
        self.denoiser, self.table_source, self.branches, self.extensions = denoiser, table, branches, extensions
        self.noise, self.check_finite, self.model_dtype = noise, check_finite, model_dtype
        self.num_rows, self.learned_variance = table.num_rows, table.learned_variance
        self.times = [float(t) for t in table.t_model[:, 0]]

    def start(self, x, shape, seed, sample_ids, device):
        """Allocate everything, outside inference mode, so that the user gets an ordinary tensor."""
        batch = _batch(x, shape)
        if self.table_source.batch not in (1, batch):
            raise ValueError(f"sample: table has rows for {self.table_source.batch} samples, the batch is {batch}")
        seed = _check.seed_tensor("sample", seed, device, batch)
        self.x = _initial_state(x, shape, seed, sample_ids, device, self.table_source.init_scale)
        _check_dtypes(self.x, self.model_dtype)
        if isinstance(self.noise, Tensor):
            _check_noise(self.noise, (self.num_rows, *self.x.shape), "(R, B, ...)", self.x)
        copies = len(self.branches)
        self.cond = _concatenate(self.branches, batch, device)
        self.table = torch.from_numpy(self.table_source.astype_float32()).to(device)
        if self.extensions.write_rows:
            self.table = self.table.expand(-1, batch, -1).contiguous()
        self.first_time = self.table[0, :, 0].expand(batch).repeat(copies)
        self.step = torch.zeros(copies * batch, dtype=torch.int32, device=device)
        self.sample_step = self.step[:batch]
        self.t = torch.empty(copies * batch, dtype=torch.float32, device=device)
        self.x_in = torch.empty((copies * batch, *self.x.shape[1:]), dtype=self.model_dtype, device=device)
        if _layout.channels_last(self.x):
            self.x_in = self.x_in.contiguous(memory_format=torch.channels_last)
        self.history = _layout.registers(self.table_source.num_history, self.x)
        draws = self.table_source.needs_noise and self.noise is None
        self.seed = seed if draws else None
        self.sample_ids = _check.sample_ids("sample", sample_ids, device, batch)
        self.kernel = _registry.direct(SAMPLER_STEP, self.x.device, self.x.dtype)
        self.advance = _registry.direct(ADVANCE, self.x.device, torch.float32)
        shown = (self.x, self.table, self.sample_step, self.table_source, copies, self.model_dtype, seed)
        self.extensions.start(lambda: Run(*shown, self.sample_ids))
        self.pristine = self.table.clone() if self.extensions.write_rows else None

    def prepare(self):
        """Rewind to row 0: the first model input, and the model itself prepared for the whole schedule."""
        self.rewind()
        batch, copies = self.x.shape[0], len(self.branches)
        if hasattr(self.denoiser, "for_schedule") and not _compiled(self.denoiser):
            t_rows = self.table[:, :, 0].expand(self.num_rows, batch).repeat(1, copies)
            self._scheduled = self.denoiser.for_schedule(t_rows, **self.cond)
        else:
            self._scheduled = None
        self._joined_row = _last_layer.joined_row(self, self._scheduled)

    def rewind(self):
        self.step.zero_()
        if self.pristine is not None:
            self.table.copy_(self.pristine)
        self.t.copy_(self.first_time)
        self._write_x_in(self.table_source.first_c_in)

    def _write_x_in(self, c_in):
        self.x_in.view(len(self.branches), *self.x.shape).copy_(self.x * _per_sample(c_in, self.x))

    def replace(self, x, row):
        """Put the callback's state in place of ours."""
        if not isinstance(x, Tensor):
            raise TypeError(f"sample: callback must return a tensor or None, got {type(x).__name__}")
        _check.shape("sample", "callback's return value", x, "x's shape", self.x.shape)
        self.x.copy_(x)
        if row + 1 < self.num_rows:
            self._write_x_in(self.table_source.column("c_in")[row])

    def row(self, row):
        """Model, fused row, on to the next; `row` chooses only the noise given, all else is read on the device."""
        if self._joined_row is not None:
            return self._joined_row(row)
        if self._scheduled is not None:
            output = self._scheduled(self.x_in, self.step)
        else:
            output = self.denoiser(self.x_in, self.t, **self.cond)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"sample: denoiser must return a tensor, got {type(output).__name__}; "
                "unpack it in a wrapper (lambda x, t: model(x, t).sample, say)"
            )
        variance = None
        if self.learned_variance:
            output, variance = self._split(output)
        if output.shape != self.x_in.shape or output.dtype != self.model_dtype or output.stride() != self.x_in.stride():
            output = self._conform(output)
        if self.check_finite:
            self._check_finite((output, variance), row)
        noise = None if self.noise is None else self.given_noise(row)
        outputs = self.extensions.before_row(output, noise)
        x_in = None if row + 1 == self.num_rows or self.extensions.change_x else self.x_in
        self.kernel(
            self.x,
            outputs,
            self.table,
            self.sample_step,
            self.history,
            self.seed,
            self.sample_ids,
            noise,
            variance,
            self.x,
            x_in,
        )
        self.extensions.after_row(self.x_in)
        self.advance(self.step, self.table, self.t)

    def _split(self, output):
        """The model's output and the v of its last branch: the halves of its channels, views where these are dense."""
        shape = self.x_in.shape
        if len(shape) < 2 or output.shape != (shape[0], 2 * shape[1], *shape[2:]):
            raise ValueError(
                f"sample: the table has a learned variance (l), so denoiser must return twice the channels of its "
                f"input {tuple(shape)}, got {tuple(output.shape)}; or make the table with a fixed variance"
            )
        variance = output[-self.x.shape[0] :, shape[1] :]
        return output[:, : shape[1]], _layout.like(variance.to(self.model_dtype), self.x)

    def _conform(self, output):
        """The model's output in the input's dtype and layout, if it has the shape and no more precision."""
        if output.shape != self.x_in.shape:
            raise ValueError(
                f"sample: denoiser must return {tuple(self.x_in.shape)} like its input, got {tuple(output.shape)}; "
                "drop extra channels (a learned variance, say) in a wrapper"
            )
        if output.dtype not in MODEL_DTYPES or output.dtype.itemsize > self.model_dtype.itemsize:
            remedy = f"pass model_dtype={output.dtype}" if output.dtype in MODEL_DTYPES else "convert it in a wrapper"
            raise TypeError(f"sample: denoiser returned {output.dtype} for a {self.model_dtype} input; {remedy}")
        output = _layout.like(output.to(self.model_dtype), self.x)
        if output.untyped_storage().data_ptr() == self.x_in.untyped_storage().data_ptr():
            output = output.clone()  # a view of the input laid out otherwise: the row would overwrite it as it reads
        return output

    def _check_finite(self, outputs, row):
        if not all(torch.isfinite(output).all() for output in outputs if output is not None):
            raise FloatingPointError(
                f"sample: the model output of row {row} of {self.num_rows} (t = {self.times[row]:g}) is not finite"
            )

    def given_noise(self, row):
        if callable(self.noise):
            noise = self.noise(row)
            _check_noise(noise, self.x.shape, "(B, ...)", self.x)
        else:
            noise = self.noise[row]
        return _layout.like(noise.to(torch.float32), self.x)


# ---- arguments ---------------------------------------------------------------------------------------------------


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
    parameter = _first_parameter(denoiser)
    return parameter.device if parameter is not None else torch.device("cpu")


def _model_dtype(denoiser):
    parameter = _first_parameter(denoiser)
    return parameter.dtype if parameter is not None else torch.float32


def _first_parameter(denoiser):
    parameters = getattr(denoiser, "parameters", None)
    if not callable(parameters):
        return None
    return next((p for p in parameters() if p.is_floating_point()), None)


def _compiled(denoiser):
    """True for torch.compile'd modules, whose attributes are those of the module that was not compiled."""
    return isinstance(denoiser, torch._dynamo.OptimizedModule) or getattr(denoiser, "_compiled_call_impl", None)


def _batch(x, shape):
    if (x is None) == (shape is None):
        raise ValueError(f"sample: exactly one of shape and x must be given, got {'neither' if x is None else 'both'}")
    if x is None:
        shape = tuple(shape)
        if not shape:
            raise ValueError("sample: shape must be (B, ...), got ()")
        return shape[0]
    _check.dtype("sample", "x", x, MODEL_DTYPES)
    if x.dim() == 0:
        raise ValueError("sample: x must be (B, ...), got a tensor without dimensions; add a batch with x[None]")
    return x.shape[0]


def _check_dtypes(x, model_dtype):
    if model_dtype not in MODEL_DTYPES:
        names = ", ".join(map(str, MODEL_DTYPES))
        raise TypeError(
            f"sample: model_dtype must be one of {names}, got {model_dtype}; pass model_dtype=torch.float32"
        )
    if x.dtype != torch.float32 and x.dtype != model_dtype:
        raise TypeError(
            f"sample: x must be float32 or of the model's dtype {model_dtype}, got {x.dtype}; pass x.float()"
        )


def _initial_state(x, shape, seed, sample_ids, device, init_scale):
    if x is not None:
        _check.no_grad_needed("sample", (x,))
        return x.detach().clone(memory_format=_layout.memory_format(x))
    state = normal(shape, seed=seed, sample_ids=sample_ids, stream="init", device=device)
    return state.mul_(_per_sample(init_scale, state))


def _per_sample(value, x):
    """A float, or one float per sample, as something that broadcasts against x (B, ...)."""
    value = np.asarray(value, dtype=np.float32)
    if value.size == 1:
        return value.item()
    return torch.from_numpy(value).to(x.device).reshape(-1, *[1] * (x.dim() - 1))


def _check_noise(noise, shape, symbols, x):
    _check.dtype("sample", "noise", noise)
    _check.shape("sample", "noise", noise, symbols, shape)
    _check.same_device("sample", "noise", noise, "x", x)


def _mode(capture, run, callback, progress):
    """How the rows are run: "loop", "step" or "never" (uncaptured)."""
    if run.x.device.type != "cuda" or run.x.numel() == 0 or capture == "never":
        return "never"
    host = run.check_finite or run.noise is not None  # the host reads or chooses in every row
    nested = torch.cuda.is_current_stream_capturing()  # captures do not nest
    if capture == "auto":
        return "never" if host or nested else "step"
    if nested:
        raise ValueError(
            f"sample: capture={capture!r} inside the capture of another CUDA graph; pass capture='auto' or 'never'"
        )
    if host or (capture == "loop" and (callback is not None or progress)):
        raise ValueError(
            f"sample: capture={capture!r} leaves the host no part in a row, but noise, check_finite, a callback or a "
            "progress bar was given; pass capture='auto'"
        )
    return capture


def _on(device):
    """The device made current, for streams, graphs and launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
