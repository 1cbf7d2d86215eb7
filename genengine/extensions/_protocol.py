"""What an extension is, what it sees of a run, and how the sampling loop calls several of them."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from genengine import _static
from genengine.ops import _layout, sampler_step
from genengine.table import COLUMNS, CoefficientTable

_INDEX = {name: index for index, name in enumerate(COLUMNS)}


class Extension:
    """A small piece added to a sampling run; `genengine.sample(..., extensions=(...))` calls its hooks in order.

    A subclass overrides what it needs:

        extend(table) -> table        on the host, before anything is allocated: arithmetic on the coefficients
        start(run)                    once: checks, buffers; what it writes into run.rows belongs to the table
        before_row(run, outputs)      after the model, before the fused row: may write the current row (`run.write`), or
                                      return other outputs, a tuple of one to three branches (B, ...)
        after_row(run)                after the fused row, before the step moves on: may change run.x

    before_row and after_row run on the device without waiting for it: they may not read a value back to the host, so
    that whole runs stay capturable. The loop works on a shallow copy of the extension: attributes set in its hooks
    belong to one run. `Engine` calls extend and start for every run, but replays the rows: it copies the tensors among
    the attributes (in lists, tuples and dicts, too) into those it captured, and captures anew where anything else among
    them has changed. It does not see tensors inside other objects.
    """

    guides = False  # whether it decides how the branches combine; of these a run has at most one

    def extend(self, table: CoefficientTable) -> CoefficientTable:
        return table

    def start(self, run: Run) -> None:
        pass

    def before_row(self, run: Run, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        pass

    def after_row(self, run: Run) -> None:
        pass


class Run:
    """What an extension sees of a sampling run.

    x: the state (B, ...), live. rows: the table on the device, float32 (R, B or 1, 16); its rows are per sample, hence
    writable, if an extension has before_row. step: int32 (B,), each sample's current row. table: its source on the
    host. num_rows: R. num_branches: of the model. model_dtype: of the outputs. seed: int64 () or (B,). sample_ids:
    int64 (B,) or None for 0..B-1.
    """

    def __init__(
        self, x: Tensor, rows: Tensor, step: Tensor, table: CoefficientTable, num_branches: int,
        model_dtype: torch.dtype, seed: Tensor, sample_ids: Tensor | None,
    ):  # fmt: skip
        self.x, self.rows, self.step, self._table, self.num_branches = x, rows, step, table, num_branches
        self.model_dtype, self.seed, self.sample_ids = model_dtype, seed, sample_ids
        self.num_rows, self.within_row, self.reads_table = table.num_rows, False, False
        self._unit = self.affine_rows(s=np.ones((table.num_rows, 1)))
        self._affine, self._first = torch.zeros(1, x.shape[0], len(COLUMNS), device=x.device), torch.zeros_like(step)
        self._open()

    @property
    def table(self) -> CoefficientTable:
        self.reads_table |= self.within_row  # then a captured row depends on it, not only on `rows`
        return self._table

    def begin(self, table: CoefficientTable) -> None:
        """Before row 0 of another run, whose table has as many rows."""
        self._table, self.within_row = table, False
        self._open()

    def storages(self) -> set[int]:
        """Of the tensors that the run lends to its extensions."""
        lent = (self.x, self.rows, self.step, self.seed, self.sample_ids)
        return {_static.storage(tensor) for tensor in lent if tensor is not None and tensor.numel()}

    # ---- the current row ---------------------------------------------------------------------------------------

    def read(self, *columns: str) -> tuple[Tensor, ...]:
        """Columns of every sample's current row, each (B,) float32: views, to be changed by `write` alone."""
        row = self._current()
        return tuple(row[:, _INDEX[name]] for name in columns)

    def write(self, **columns: Tensor) -> None:
        """Set columns of every sample's current row, each (B,), until the run is rewound."""
        row = self._current()
        for name, value in columns.items():
            row[:, _INDEX[name]] = value
        self._written = True

    def of_row(self, values: Tensor) -> Tensor:
        """(B,): the current row's entry of values (R, B or 1) for every sample."""
        self._current()
        return values.expand(-1, self.x.shape[0]).gather(0, self._index[..., 0])[0]

    def _open(self, given: Tensor | None = None) -> None:
        """The loop's, before the hooks of a row; given: the noise of the row, if it is not drawn."""
        self._given, self._row, self._written = given, None, False

    def _close(self) -> None:
        """The loop's, before the fused row: puts what the extensions wrote into the table."""
        if self._written:
            self.rows.scatter_(0, self._index, self._row[None])

    def _current(self) -> Tensor:
        """A copy of every sample's current row, (B, 16), made when it is first asked for."""
        if self._row is None:
            self._index = self.step.long().view(1, -1, 1).expand(1, -1, len(COLUMNS))
            self._row = self.rows.expand(-1, self.x.shape[0], -1).gather(0, self._index)[0]
        return self._row

    # ---- tensors like the state ----------------------------------------------------------------------------------

    def buffer(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor of x's shape and memory layout."""
        return torch.empty_like(self.x, dtype=dtype, memory_format=_layout.memory_format(self.x))

    def expand(self, value: Tensor) -> Tensor:
        """(B,) as something that broadcasts against x."""
        return value.reshape(-1, *[1] * (self.x.dim() - 1))

    def affine_rows(self, **columns: np.ndarray) -> Tensor:
        """A table on the device, float32 (R, B or 1, 16), with columns from float64 (R, B or 1), all others 0."""
        shape = np.broadcast_shapes(*(np.shape(value) for value in columns.values()))
        rows = np.zeros((*shape, len(COLUMNS)), dtype=np.float32)
        for name, value in columns.items():
            rows[..., _INDEX[name]] = value
        return torch.from_numpy(rows).to(self.x.device)

    def affine(self, a: Tensor, b: Tensor, outputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """out = a x + b m, m the outputs guided as in the current row; a, b: (B,), out: a float32 `buffer()`."""
        g1, g2 = self.read("g1", "g2")
        for name, value in {"a": a, "b": b, "g1": g1, "g2": g2}.items():
            self._affine[0, :, _INDEX[name]] = value
        return sampler_step(self.x.to(out.dtype), outputs, self._affine, self._first, out=out)

    def noise(self, out: Tensor) -> Tensor:
        """out = z as the current row adds it, drawn or given; out: a float32 `buffer()`."""
        if self._given is not None:
            return out.copy_(self._given)
        draw = {"seed": self.seed, "sample_ids": self.sample_ids}
        return sampler_step(out, self.x, self._unit, self.step, out=out, **draw)  # s = 1, all else 0: nothing is read


class Extensions:
    """The extensions of one run, as the sampling loop calls them."""

    def __init__(self, extensions: Sequence[Extension]):
        for index, extension in enumerate(extensions):
            if not isinstance(extension, Extension):
                got = extension.__name__ if isinstance(extension, type) else type(extension).__name__
                raise TypeError(
                    f"sample: extensions[{index}] must be a genengine.extensions.Extension, got {got}; pass instances, "
                    "Rescale() and not Rescale"
                )
        guides = [type(extension).__name__ for extension in extensions if extension.guides]
        if len(guides) > 1:
            raise ValueError(f"sample: extensions may hold one that combines the branches, got {', '.join(guides)}")
        self._all = [copy.copy(extension) for extension in extensions]
        self._running, self._before, self._after = [], [], []
        self.run: Run | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def write_rows(self) -> bool:
        """Whether a row may be written during the run: then every sample needs rows of its own."""
        return any(_overrides(extension, "before_row") for extension in self._all)

    @property
    def change_x(self) -> bool:
        """Whether x may change after a row: then the next input is made of it after that."""
        return bool(self._after)

    @property
    def form(self) -> Hashable:
        """Equal for extensions that may be able to take each other's place in a captured run."""
        return tuple((type(extension), _static.form(_state(extension))) for extension in self._all)

    def extend(self, table: CoefficientTable) -> CoefficientTable:
        for extension in self._all:
            table = extension.extend(table)
        return table

    def start(self, run: Run | None, static: bool = False) -> None:
        """static: what they hold in tensors will be replaced by `restart`."""
        self.run = run
        self._adopt(self._started(run), static)

    def restart(self, fresh: Extensions) -> bool:
        """Start others in place of those that run, in the tensors of these; False where they had to be replaced.

        Both were given to `extend`, and `fresh` has not been started.
        """
        started = fresh._started(self.run)
        held = [tree_unflatten(leaves, spec) for leaves, spec in self._held]
        same = [type(extension) for extension in self._all] == [type(extension) for extension in fresh._all]
        fits = same and _static.refill(held, [_state(extension) for extension in started], self._lent())
        self._all = fresh._all
        if not fits:
            self._adopt(started, static=True)
            return False
        for extension, state in zip(self._running, held, strict=True):  # hooks may have bound other tensors
            _set_state(extension, state)
        return True

    def states(self) -> list[dict]:
        """The attributes of those that run."""
        return [_state(extension) for extension in self._running]

    def _started(self, run):
        started = [copy.copy(extension) for extension in self._all]
        for extension in started:
            extension.start(run)
        return started

    def _adopt(self, started, static):
        self._running = started
        self._before = [extension for extension in started if _overrides(extension, "before_row")]
        self._after = [extension for extension in started if _overrides(extension, "after_row")]
        if static:
            states = _static.own([_state(extension) for extension in started], self._lent())
            for extension, state in zip(started, states, strict=True):
                _set_state(extension, state)
            self._held = [tree_flatten(_state(extension)) for extension in started]

    def _lent(self):
        return self.run.storages() if self.run is not None else set()

    def before_row(self, output: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
        """The branches that the row combines, of the model's output (k B, ...)."""
        if not self._before or self.run.x.numel() == 0:
            return (output,)
        self.run._open(given)
        outputs = output.split(self.run.x.shape[0])
        self.run.within_row = True
        for extension in self._before:
            outputs = extension.before_row(self.run, outputs) or outputs
        self.run.within_row = False
        self.run._close()
        return outputs

    def after_row(self, x_in: Tensor) -> None:
        """Let the extensions change x, and write the next row's input c_in x, repeated per branch."""
        run = self.run
        if not self._after or run.x.numel() == 0:
            return
        if not self._before:
            run._open()
        run.within_row = True
        for extension in self._after:
            extension.after_row(run)
        run.within_row = False
        (c_in,) = run.read("c_in")
        x_in.view(run.num_branches, *run.x.shape).copy_(run.x * run.expand(c_in))


def _state(extension):
    """The attributes of an extension, by name."""
    slots = copyreg._slotnames(type(extension))
    return vars(extension) | {name: getattr(extension, name) for name in slots if hasattr(extension, name)}


def _set_state(extension, state):
    for name in vars(extension).keys() - state:
        del vars(extension)[name]
    for name, value in state.items():
        object.__setattr__(extension, name, value)  # a frozen one's too


def _overrides(extension, hook):
    return getattr(type(extension), hook) is not getattr(Extension, hook)


def row_times(name: str, table: CoefficientTable, times) -> np.ndarray:
    """(R, B or 1) float64 path times at which the rows' models are evaluated: t_model, or `times` given as (R,)."""
    if times is None:
        found = table.t_model
        if not ((found >= 0) & (found <= 1)).all():
            raise ValueError(
                f"{name}: the table's t_model is not a path time in [0, 1] (it reaches from {found.min():g} to "
                f"{found.max():g}); pass times=, the path times of its rows"
            )
        return found
    found = np.asarray(times, dtype=np.float64)
    if found.shape != (table.num_rows,) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"{name}: times must be ({table.num_rows},) path times in [0, 1], got {times!r}")
    return found[:, None]
