"""Sampling many times with one denoiser: buffers and CUDA graphs are kept, and replayed when only values change."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genengine import _capture, _denoiser, _loop, _request, _static
from genengine._loop import CAPTURE_MODES, StepInfo
from genengine.extensions._protocol import Extension
from genengine.ops import _registry
from genengine.ops.sampler_step import SAMPLER_STEP
from genengine.table import CoefficientTable

DEVICE_SHARE = 4  # max_bytes=None: a quarter of the device's memory


@dataclass
class Stats:
    """What an engine has done: runs of `sample`, graphs captured, runs replayed from a graph, entries evicted; graphs
    and bytes that it holds now."""

    runs: int = 0
    captures: int = 0
    replays: int = 0
    evictions: int = 0
    graphs: int = 0
    bytes: int = 0


@dataclass
class _Entry:
    """Buffers of one form of run, and what was captured of it: rows of a run in `mode`, with weights where they lay."""

    loop: _loop.Loop
    graph: _capture.Graph | None = None
    mode: str = "never"
    rows: int = 0
    weights: tuple = ()
    nbytes: int = 0
    stream: object = None

    def serves(self, request, weights):
        rows = request.table.num_rows
        return self.weights == weights and (rows == self.rows if self.mode == "loop" else rows <= self.rows)

    def measure(self):
        self.nbytes = _static.nbytes(self.loop.tensors()) + (0 if self.graph is None else self.graph.nbytes)

    def use_on_current_stream(self):
        """Tell the allocator where a stream other than the first one's uses the buffers, should they be freed."""
        if self.loop.x.device.type != "cuda":
            return
        stream = torch.cuda.current_stream()
        self.stream = self.stream or stream
        if stream != self.stream:
            for tensor in self.loop.tensors():
                tensor.record_stream(stream)


class Engine:
    """`genengine.sample` for one denoiser, again and again: the same results bit for bit, at the cost of a replay.

    A run's buffers and its CUDA graph are kept. The next run of the same form copies its values into the buffers and
    replays: another seed, guidance, x, cond, sample_ids, another table of as many rows that uses the same history and
    noise (a graph of one row serves fewer rows, too), other values of an extension's tensors. Another form is captured
    beside it: other shapes, dtypes or layouts, another kind of table, other extensions or options of theirs, values in
    cond that are no tensors, another `genengine.backend`, autocast or training mode. Weights are read where they lie:
    changed in place they count at once; where the denoiser holds other tensors, it is captured anew. An engine sees the
    modules and tensors that a function encloses or names, a partial holds, or a callable object has for attributes, in
    short lists and dicts, too; whatever else Python decides within the denoiser stays as captured, until `clear`.

    A denoiser with for_schedule prepares each run anew. Its step function may have update(t_rows, **cond) -> bool: take
    other times and conditions, of no more rows, into the tensors that step reads; False where they do not fit. The
    networks of `genengine.nets` have it. Without it, such a denoiser is captured for every run.

    Args:
        denoiser: as in `sample`.
        max_graphs: how many forms are kept, at least 1; the least recently used goes first.
        max_bytes: of all forms' buffers and of the memory pools of their graphs, by the allocator's count; by default a
            quarter of the device's memory, on a CPU no bound. The form used last stays, however large. Each graph has a
            pool of its own, so that evicting one frees its memory.
        capture: "loop" captures all rows in one graph: nothing on the host between them, but capturing takes a pass of
            Python for every row, once. "step" captures one row and replays it. "auto" takes "loop" up to max_loop_rows,
            else "step"; with a callback or a progress bar "step"; where the host takes part in every row (noise,
            check_finite), or with a denoiser that torch.compile gave graphs of its own, nothing is captured; nor is
            with "never", on a CPU, or inside the capture of another graph. Buffers are kept even then.
        max_loop_rows: see capture, at least 0.
    Raises:
        ValueError, TypeError: arguments out of range.

    Threads take turns. Runs are ordered with the caller's current stream, and with those of the engine's earlier calls
    on other streams. What `sample` returns is the caller's own. If a run raises, the engine stays usable.
    """

    def __init__(
        self, denoiser: Callable[..., Tensor], *, max_graphs: int = 8, max_bytes: int | None = None,
        capture: str = "auto", max_loop_rows: int = 256,
    ):  # fmt: skip
        if not callable(denoiser):
            raise TypeError(f"Engine: denoiser must be callable, got {type(denoiser).__name__}")
        _check_count("max_graphs", max_graphs, 1)
        _check_count("max_loop_rows", max_loop_rows, 0)
        if max_bytes is not None:
            _check_count("max_bytes", max_bytes, 0)
        if capture not in CAPTURE_MODES:
            raise ValueError(f"Engine: capture must be one of {', '.join(CAPTURE_MODES)}, got {capture!r}")
        self.denoiser, self.max_graphs, self.max_bytes = denoiser, max_graphs, max_bytes
        self.capture, self.max_loop_rows = capture, max_loop_rows
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._lock, self._running, self._done = threading.RLock(), False, None
        self._counts = Stats()

    def sample(
        self,
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
        device: torch.device | str | None = None,
        model_dtype: torch.dtype | None = None,
        check_finite: bool = False,
        extensions: Sequence[Extension] = (),
    ) -> Tensor:
        """x (B, ...) as `genengine.sample(denoiser, table, ...)` returns it, whose arguments these are.

        Raises what that raises, and RuntimeError where a callback or the denoiser calls the engine that is calling it.
        """
        request = _request.resolve(
            self.denoiser, table, shape, x=x, cond=cond, uncond=uncond, guidance=guidance, seed=seed,
            sample_ids=sample_ids, noise=noise, device=device, model_dtype=model_dtype, check_finite=check_finite,
            extensions=extensions,
        )  # fmt: skip
        watched = callback is not None or bool(progress)
        auto = "loop" if request.table.num_rows <= self.max_loop_rows else "step"
        mode = _loop.choose_mode(request, self.capture, watched, auto)
        if _loop.capturing(request.device):  # the other graph would go on using our buffers
            return _loop.run(request, mode, callback, progress)
        with self._turn(request.device):
            with torch.inference_mode():
                entry = self._ready(request, mode)
                _loop.drive(entry.loop, entry.graph, entry.mode, callback, progress)
            entry.loop.noise = None  # the caller's
            self._counts.runs += 1
            self._counts.replays += entry.graph is not None
            return entry.loop.x.clone()

    def clear(self) -> None:
        """Let go of all buffers and graphs; the next run captures anew."""
        with self._lock:
            self._refuse_reentry()
            for key in list(self._entries):
                self._drop(key)

    @property
    def stats(self) -> Stats:
        """A copy of what has been counted so far."""
        entries = list(self._entries.values())
        graphs = sum(entry.graph is not None for entry in entries)
        return replace(self._counts, graphs=graphs, bytes=sum(entry.nbytes for entry in entries))

    def __repr__(self) -> str:
        name = getattr(self.denoiser, "__name__", type(self.denoiser).__name__)
        stats, bound = self.stats, "" if self.max_bytes is None else f" of {self.max_bytes / 2**20:.1f}"
        return (
            f"Engine({name}, capture={self.capture!r}: {len(self._entries)} of {self.max_graphs} forms, {stats.graphs} "
            f"graphs, {stats.bytes / 2**20:.1f}{bound} MiB; {stats.runs} runs, {stats.captures} captures, "
            f"{stats.replays} replays, {stats.evictions} evictions)"
        )

    def __reduce__(self):
        """A copy, or what is pickled, starts with nothing captured."""
        names = ("max_graphs", "max_bytes", "capture", "max_loop_rows")
        options = {name: getattr(self, name) for name in names}
        return functools.partial(Engine, **options), (self.denoiser,)

    # ---- one run at a time -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, device):
        with self._lock, _loop.on(device):
            self._refuse_reentry()
            self._running = True
            try:
                if self._done is not None:
                    torch.cuda.current_stream().wait_event(self._done)
                yield
            finally:
                self._running = False
                if device.type == "cuda":
                    self._done = torch.cuda.current_stream().record_event()

    def _refuse_reentry(self):
        if self._running:  # by this thread: others wait for the lock
            raise RuntimeError(
                "Engine: must not be called by its own callback or denoiser, whose run it would overwrite; make "
                "another Engine for that"
            )

    # ---- what is kept --------------------------------------------------------------------------------------------

    def _ready(self, request, mode):
        """The entry for this run, loaded, and captured unless mode is "never"; where memory does not suffice for it,
        once more with nothing else kept."""
        try:
            return self._prepare(request, mode)
        except torch.OutOfMemoryError:
            if not self._entries:
                raise
        for key in list(self._entries):
            self._drop(key)
            self._counts.evictions += 1
        torch.cuda.empty_cache()
        return self._prepare(request, mode)

    def _prepare(self, request, mode):
        modes, weights = ((), ()) if mode == "never" else _denoiser.fingerprint(self.denoiser)
        key = (_form(request, mode), modes)
        known = key in self._entries
        try:
            if not known:
                self._entries[key] = _Entry(_loop.Loop(request, static=True))
            entry = self._entries[key]
            self._entries.move_to_end(key)
            fits = entry.loop.load(request)
            entry.use_on_current_stream()
            if entry.graph is not None and not (fits and entry.serves(request, weights)):
                self._release(entry)
            captures = mode != "never" and entry.graph is None
            if captures:
                entry.mode = "step" if self.capture == "auto" and not entry.loop.reusable else mode
                entry.graph = _loop.record(entry.loop, request, entry.mode)
                entry.weights, entry.rows = weights, request.table.num_rows
                self._counts.captures += 1
        except BaseException:  # half of it may be of this run, half of the last
            self._drop(key)
            raise
        if captures or not (known and fits):
            entry.measure()
            self._evict(request.device)
        return entry

    def _evict(self, device):
        bound = self.max_bytes
        if bound is None and device.type == "cuda":
            bound = torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE
        while len(self._entries) > 1 and (
            len(self._entries) > self.max_graphs
            or (bound is not None and sum(entry.nbytes for entry in self._entries.values()) > bound)
        ):
            self._drop(next(iter(self._entries)))
            self._counts.evictions += 1

    def _drop(self, key):
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._release(entry)

    def _release(self, entry):
        if entry.graph is not None:
            if self._done is not None:
                self._done.synchronize()  # its last replay
            entry.graph.release()
            entry.graph = None


def _check_count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Engine: {name} must be an int >= {least}, got {value!r}")


def _form(request, mode):
    """Equal for runs that may share buffers and a graph."""
    table, kind = request.table, request.device.type
    rows = table.num_rows if mode == "loop" or request.extensions else None
    form = (
        mode, rows, request.device, request.shape, request.dtype, request.memory_format, request.branches,
        request.model_dtype, table.batch, table.num_history, table.learned_variance, request.draws,
        _static.form(request.cond), request.extensions.form,
    )  # fmt: skip
    if mode == "never":
        return form
    return form + (
        _registry._forced, _registry.choose(SAMPLER_STEP, request.device, request.dtype),
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
    )  # fmt: skip
