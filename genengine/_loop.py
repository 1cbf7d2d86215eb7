"""The rows of a sampling run on the buffers they work on, which `sample` makes for one run and `Engine` for many."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from genengine import _capture, _denoiser, _last_layer, _static
from genengine._progress import progress_bar
from genengine._request import MODEL_DTYPES, Request, check_noise
from genengine.extensions._protocol import Run
from genengine.ops import _check, _layout, _ranges, _registry, normal
from genengine.ops.sampler_step import ADVANCE, SAMPLER_STEP

CAPTURE_MODES = ("auto", "loop", "step", "never")


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


class Loop:
    """The buffers of a run, and its row: nothing is allocated per row but by the model.

    static: whether other runs of the same form will follow in the same buffers; then what the caller hands over is
    copied, and `load` tells whether rows that were captured serve the new run.
    """

    def __init__(self, request: Request, *, static: bool = False):
        batch, copies, device = request.shape[0], request.branches, request.device
        self.static, self.denoiser, self.extensions = static, request.denoiser, request.extensions
        self.branches, self.model_dtype = copies, request.model_dtype
        self.learned_variance = request.table.learned_variance
        self.table_source, self._rows, self._scheduled, self._joined = None, None, None, None
        with torch.inference_mode(False) if static else contextlib.nullcontext():  # `x` is what `sample` returns
            self.x = torch.empty(request.shape, dtype=request.dtype, device=device, memory_format=request.memory_format)
            self.step = torch.zeros(copies * batch, dtype=torch.int32, device=device)
            self.sample_step = self.step[:batch]
            self.t = torch.empty(copies * batch, dtype=torch.float32, device=device)
            self.x_in = torch.empty(
                (copies * batch, *request.shape[1:]), dtype=self.model_dtype, device=device,
                memory_format=request.memory_format,
            )  # fmt: skip
            self.history = _layout.registers(request.table.num_history, self.x)
            self._draw_seed, self._draw_ids = request.seed, request.sample_ids
            if static:
                self._draw_seed = torch.empty(batch, dtype=torch.int64, device=device)
                self._first_ids = torch.arange(batch, device=device)
                self._draw_ids = torch.empty_like(self._first_ids)
        self.cond = None

    # ---- the start of a run ------------------------------------------------------------------------------------

    def load(self, request: Request) -> bool:
        """Start at row 0 of a run; False where rows captured of an earlier one do not serve it."""
        self.noise, self.check_finite = request.noise, request.check_finite
        self.seed = self._draw_seed if request.draws else None
        self.kernel = _registry.direct(SAMPLER_STEP, self.x.device, self.x.dtype)
        self.advance = _registry.direct(ADVANCE, self.x.device, torch.float32)
        fits = self._load_cond(request.cond)
        fits &= self.begin(request)
        fits &= self._schedule()
        self._joined = _last_layer.join(self, self._scheduled)
        return fits

    def begin(self, request: Request) -> bool:
        """Put everything but the model where it is before row 0; False as `load`."""
        fits = self._load_table(request)
        self._load_draws(request)
        self._load_x(request)
        self.step.zero_()
        batch = self.x.shape[0]
        self.t.view(self.branches, batch).copy_(self.table[0, :, 0].expand(batch))
        fits &= self._start(request)
        self._write_x_in(self.table_source.first_c_in)
        return fits

    def _load_cond(self, cond):
        if not self.static:
            self.cond = cond
            return True
        if self.cond is not None and _static.refill(self.cond, cond):
            return True
        self.cond = _static.own(cond)
        return False

    def _load_table(self, request):
        """The table's rows at the head of a buffer that holds as many as any run had."""
        table, batch = request.table, self.x.shape[0]
        run = self.extensions.run
        fits = run is None or not run.reads_table or _same_table(self.table_source, table)
        self.table_source, self.num_rows = table, table.num_rows
        rows = torch.from_numpy(table.astype_float32())
        width = batch if request.extensions.write_rows else table.batch
        if self._rows is None or len(self._rows) < table.num_rows:
            with torch.inference_mode(False):
                self._rows = torch.empty((table.num_rows, width, rows.shape[2]), device=self.x.device)
            fits = False
        self.table = self._rows[: table.num_rows]
        self.table.copy_(rows, non_blocking=_staged(self.x.device))
        return fits

    def _load_draws(self, request):
        if not self.static:
            return
        self._draw_seed.copy_(request.seed)
        self._draw_ids.copy_(self._first_ids if request.sample_ids is None else request.sample_ids)

    def _load_x(self, request):
        if request.x is not None:
            self.x.copy_(request.x)
            return
        normal(self.x.shape, seed=self._draw_seed, sample_ids=self._draw_ids, stream="init", out=self.x)
        self.x.mul_(_per_sample(request.table.init_scale, self.x))

    def _start(self, request):
        if not request.extensions:
            return True
        if self.static and self.extensions.run is not None:
            self.extensions.run.begin(request.table)
            return self.extensions.restart(request.extensions)
        run = Run(
            self.x, self.table, self.sample_step, request.table, self.branches, self.model_dtype, self._draw_seed,
            self._draw_ids,
        )  # fmt: skip
        self.extensions.start(run, self.static)
        return False

    def _schedule(self):
        """Let the model do what depends on times and conditions alone; False where captured rows know nothing of it."""
        if not _denoiser.scheduled(self.denoiser):
            return True
        t_rows = self.table[:, :, 0].expand(self.num_rows, self.x.shape[0]).repeat(1, self.branches)
        update = getattr(self._scheduled, "update", None)
        if update is not None and update(t_rows, **self.cond):
            return True
        self._scheduled = self.denoiser.for_schedule(t_rows, **self.cond)
        return False

    def _write_x_in(self, c_in):
        self.x_in.view(self.branches, *self.x.shape).copy_(self.x * _per_sample(c_in, self.x))

    @property
    def reusable(self) -> bool:
        """Whether captured rows may serve another run: not where the model is prepared for one run alone."""
        return self._scheduled is None or hasattr(self._scheduled, "update")

    def tensors(self) -> list[Tensor]:
        """On the device: buffers, conditions, the extensions' tensors and those of the scheduled model's attributes."""
        scheduled = getattr(self._scheduled, "__dict__", {})
        wrapped = [
            vars(value) for value in scheduled.values() if hasattr(value, "update") and hasattr(value, "__dict__")
        ]
        own = {name: value for name, value in vars(self).items() if name != "noise"}
        held = [own, scheduled, wrapped, *self.extensions.states()]
        return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor) and leaf.device == self.x.device]

    # ---- the rows ------------------------------------------------------------------------------------------------

    def info(self, row: int) -> StepInfo:
        return StepInfo(row, self.num_rows, float(self.table_source.t_model[row, 0]), self.x)

    def replace(self, x: Tensor, row: int) -> None:
        """Put the callback's state in place of ours."""
        if not isinstance(x, Tensor):
            raise TypeError(f"sample: callback must return a tensor or None, got {type(x).__name__}")
        _check.shape("sample", "callback's return value", x, "x's shape", self.x.shape)
        self.x.copy_(x)
        if row + 1 < self.num_rows:
            self._write_x_in(self.table_source.column("c_in")[row])

    def row(self, row: int) -> None:
        """Model, fused row, on to the next; `row` chooses only the noise given, all else is read on the device."""
        if self._joined is not None:
            self._joined_row(row)
            return
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
        noise = None if self.noise is None else self._given_noise(row)
        outputs = self.extensions.before_row(output, noise)
        x_in = None if row + 1 == self.num_rows or self.extensions.change_x else self.x_in
        self.kernel(
            self.x,
            outputs,
            self.table,
            self.sample_step,
            self.history,
            self.seed,
            self._draw_ids,
            noise,
            variance,
            self.x,
            x_in,
        )
        self.extensions.after_row(self.x_in)
        self.advance(self.step, self.table, self.t)

    def _joined_row(self, row):
        """`row` where the kernel that applies it is also the model's last layer."""
        h = self._joined.tokens_of(self.x_in, self.step)
        self._joined.kernel(
            self.x, h, *self._joined.layer, self.table, self.sample_step, self.history, self.seed, self._draw_ids,
            None if self.noise is None else self._given_noise(row), self.x,
            None if row + 1 == self.num_rows else self.x_in,
        )  # fmt: skip
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
                f"sample: the model output of row {row} of {self.num_rows} (t = {self.info(row).t:g}) is not finite"
            )

    def _given_noise(self, row):
        if callable(self.noise):
            noise = self.noise(row)
            check_noise(noise, self.x.shape, "(B, ...)", self.x.device)
        else:
            noise = self.noise[row]
        return _layout.like(noise.to(torch.float32), self.x)


def _per_sample(value, x):
    """A float, or one float per sample, as something that broadcasts against x (B, ...)."""
    value = np.asarray(value, dtype=np.float32)
    if value.size == 1:
        return value.item()
    return torch.from_numpy(value).to(x.device, non_blocking=_staged(x.device)).reshape(-1, *[1] * (x.dim() - 1))


def _staged(device):
    """Whether a copy from the host need not be waited for.

    The driver takes what is not pinned at once; in a capture it would be read at the replay, when it is gone.
    """
    return not capturing(device)


def _same_table(a, b):
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("rows", "init_scale", "first_c_in"))
    return a.name == b.name and all(np.array_equal(one, other) for one, other in pairs)


# ---- running them ------------------------------------------------------------------------------------------------


def choose_mode(request: Request, capture: str, watched: bool, auto: str) -> str:
    """How the rows are run: "loop", "step" or "never" (uncaptured). watched: by a callback or a progress bar, between
    the rows; auto: the mode of capture="auto" where nothing forbids it."""
    if request.device.type not in _capture.GRAPHS or 0 in request.shape or capture == "never":
        return "never"
    host = request.check_finite or request.noise is not None  # the host reads or chooses in every row
    nested = capturing(request.device)  # captures do not nest
    own = "the denoiser was compiled to CUDA graphs of its own (mode='reduce-overhead' or 'max-autotune')"
    if capture == "auto":
        if host or nested or _denoiser.captures_itself(request.denoiser):
            return "never"
        return "step" if watched else auto
    if nested:
        raise ValueError(
            f"sample: capture={capture!r} inside the capture of another CUDA graph; pass capture='auto' or 'never'"
        )
    if host or (capture == "loop" and watched):
        raise ValueError(
            f"sample: capture={capture!r} leaves the host no part in a row, but noise, check_finite, a callback or a "
            "progress bar was given; pass capture='auto'"
        )
    if _denoiser.captures_itself(request.denoiser):
        raise ValueError(
            f"sample: capture={capture!r} cannot hold it: {own}, which do not nest; compile it with mode='default' or "
            "'max-autotune-no-cudagraphs', or pass capture='auto'"
        )
    return capture


def record(loop: Loop, request: Request, mode: str) -> _capture.Graph:
    """The graph of all rows, or of one that serves as every row; the loop, loaded with the request, is as it was.

    The rows that run before compile what would otherwise compile inside the capture: the first, and the last, whose
    kernel writes no x_in. The last of the replays of one row writes an x_in that nobody reads.
    """
    rows = range(loop.num_rows) if mode == "loop" else (0,)

    def warm_up():
        for row in sorted({rows[0], rows[-1]}):
            loop.row(row)

    def run():
        for row in rows:
            loop.row(row)

    return _capture.GRAPHS[loop.x.device.type](run, warm_up, lambda: loop.begin(request))


def drive(loop: Loop, graph: _capture.Graph | None, mode: str, callback, progress) -> None:
    """Apply all rows: by a graph of all of them, by a graph of one replayed, or one by one."""
    if mode == "loop":
        graph.replay()
        return
    advance = loop.row if graph is None else lambda row: graph.replay()
    if _ranges.rows is not None:
        advance = _ranges.around_rows(_ranges.rows, advance)
    with progress_bar(progress, loop.num_rows, loop.table_source.name, "row") as bar:
        for row in range(loop.num_rows):
            advance(row)
            if callback is not None:
                replacement = callback(loop.info(row))
                if replacement is not None:
                    loop.replace(replacement, row)
            if bar is not None:
                bar.update()


def run(request: Request, mode: str, callback, progress) -> Tensor:
    """One run on buffers of its own, of which x is returned."""
    loop = Loop(request)
    with torch.inference_mode(), on(request.device):
        loop.load(request)
        graph = None if mode == "never" else record(loop, request, mode)
        drive(loop, graph, mode, callback, progress)
    return loop.x


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the device's current stream."""
    graphs = _capture.GRAPHS.get(device.type)
    return graphs is not None and graphs.recording()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """The device made current, for streams, graphs and launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
