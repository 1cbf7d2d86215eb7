"""A sampler is a table: one affine row per model evaluation, written on the host in float64.

With state x, model outputs out_0 (unconditional), out_1, out_2 and history registers H1..H3, one row computes

    m    = out_0 + g1*(out_1 - out_0) + g2*(out_2 - out_1)
    y    = phi(p*x + q*m)
    x'   = a*x + b*m + c*y + h1*H1 + h2*H2 + h3*H3 + s*exp(l*v)*z
    H_j  <- keep | y | x          (x before the step; everything is read before anything is written)
    x_in = c_in * x'              (the input of the model in the *next* row)

A coefficient of zero means that its operand is not read at all. `flags` packs phi and the register writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np

COLUMNS = ("t_model", "g1", "g2", "p", "q", "r", "a", "b", "c", "h1", "h2", "h3", "s", "l", "c_in", "flags")
NUM_COLUMNS = len(COLUMNS)
NUM_REGISTERS = 3

_INDEX = {column: index for index, column in enumerate(COLUMNS)}
_HISTORY = slice(_INDEX["h1"], _INDEX["h3"] + 1)


class Phi(IntEnum):
    """What happens to p*x + q*m before it becomes y."""

    IDENTITY = 0
    CLAMP = 1  # clamp to [-r, r]
    DYNAMIC_THRESHOLD = 2  # clamp to [-r, r], divide by r; r is overwritten by a pre-pass on the device


class Write(IntEnum):
    """What a history register receives at the end of a row."""

    KEEP = 0
    Y = 1
    X = 2


def pack_flags(phi: int = Phi.IDENTITY, writes: Sequence[int] = ()) -> float:
    """Pack phi and the register writes into the `flags` column: phi + 4*w1 + 16*w2 + 64*w3.

    Args:
        phi: a `Phi`.
        writes: up to three `Write` values, for H1, H2, H3; missing ones keep.

    Returns:
        An integer below 2^24 stored as a float (exact in float32).

    Raises:
        ValueError: on an unknown phi or write, or on more than three writes.
    """
    if len(writes) > NUM_REGISTERS:
        raise ValueError(f"pack_flags: writes must hold at most {NUM_REGISTERS} entries, got {len(writes)}")
    value = int(Phi(phi))
    for register, write in enumerate(writes):
        value += int(Write(write)) << (2 + 2 * register)
    return float(value)


def unpack_flags(flags: float) -> tuple[Phi, tuple[Write, Write, Write]]:
    """Undo `pack_flags`.

    Args:
        flags: one value of the `flags` column.

    Returns:
        (phi, (w1, w2, w3)).

    Raises:
        ValueError: where `flags` is not an integer that `pack_flags` can produce.
    """
    value = int(flags) if np.isfinite(flags) else -1
    if value != flags or not 0 <= value < 4 << (2 * NUM_REGISTERS):
        raise ValueError(f"unpack_flags: flags must be an integer from pack_flags, got {flags!r}")
    writes = tuple(Write((value >> (2 + 2 * register)) & 3) for register in range(NUM_REGISTERS))
    return Phi(value & 3), writes


def build_rows(rows: Iterable[Mapping[str, float]]) -> np.ndarray:
    """Build an (R, 1, 16) float64 array from one mapping of column name to value per row.

    Columns that are not named are 0, except c_in, which is 1.

    Raises:
        ValueError: on an unknown column name.
    """
    rows = list(rows)
    array = np.zeros((len(rows), 1, NUM_COLUMNS))
    array[..., _INDEX["c_in"]] = 1.0
    for index, row in enumerate(rows):
        for column, value in row.items():
            if column not in _INDEX:
                raise ValueError(f"build_rows: row {index}: unknown column {column!r}, expected one of {COLUMNS}")
            array[index, 0, _INDEX[column]] = value + 0.0  # no negative zeros
    return array


@dataclass(frozen=True, eq=False)
class CoefficientTable:
    """The coefficients of a sampling run: `rows[k, n]` is what evaluation k does to sample n.

    Attributes:
        rows: (R, B, 16) or (R, 1, 16) float64, columns in the order of `COLUMNS`; a batch of 1 serves every
            sample. They are copied, and read-only.
        init_scale: a number or (B,) float64; sampling starts from x = init_scale * noise.
        first_c_in: a number or (B,) float64; the first model input is first_c_in * x.
        name: what `describe` and error messages call the table.
    """

    rows: np.ndarray
    init_scale: float | np.ndarray = 1.0
    first_c_in: float | np.ndarray = 1.0
    name: str = "table"

    def __post_init__(self):
        """Keep the rows to ourselves: what is found out about a table, that it is valid above all, stays true."""
        if isinstance(self.rows, np.ndarray) and self.rows.flags.writeable:
            rows = self.rows.copy()
            rows.flags.writeable = False
            object.__setattr__(self, "rows", rows)

    @property
    def num_rows(self) -> int:
        """Number of rows, which is the number of model evaluations per sample."""
        return self.rows.shape[0]

    @property
    def batch(self) -> int:
        """Number of samples the rows are written for; 1 means one set of coefficients for any batch."""
        return self.rows.shape[1]

    @property
    def t_model(self) -> np.ndarray:
        """(R, B) float64: the time handed to the model."""
        return self.rows[..., _INDEX["t_model"]]

    @cached_property
    def needs_noise(self) -> bool:
        """Whether any row adds noise."""
        return bool(np.any(self.rows[..., _INDEX["s"]] != 0))

    @cached_property
    def learned_variance(self) -> bool:
        """Whether any row scales its noise by exp(l*v): then the model returns v in a second half of its channels."""
        return bool(np.any(self.rows[..., _INDEX["l"]] != 0))

    @cached_property
    def num_history(self) -> int:
        """The highest history register read or written, 0 to 3."""
        read = self.rows[..., _HISTORY] != 0
        used = (read | (self._writes() != Write.KEEP)).any(axis=(0, 1))
        return int(np.flatnonzero(used).max(initial=-1)) + 1

    def column(self, name: str) -> np.ndarray:
        """(R, B) float64 view of one column of `COLUMNS`."""
        if name not in _INDEX:
            raise ValueError(f"table '{self.name}': unknown column {name!r}, expected one of {COLUMNS}")
        return self.rows[..., _INDEX[name]]

    def validate(self) -> "CoefficientTable":
        """Check shape, dtype and the meaning of every coefficient, once.

        Returns:
            The table itself, so that the call can be chained.

        Raises:
            ValueError: naming the row, sample and column, what was expected, what was found, and the remedy.
        """
        self._checked  # noqa: B018 - computed at first use
        return self

    @cached_property
    def _checked(self) -> bool:
        self._validate_layout()
        remedy = "start or end the grid a little inside the singular end of the path"
        for column in COLUMNS:
            self._refuse(column, ~np.isfinite(self.column(column)), "a finite number", remedy)
        flags = self.column("flags")
        legal = np.isin(flags, _LEGAL_FLAGS)
        self._refuse("flags", ~legal, "an integer below 2^24 from pack_flags", "use pack_flags(phi, writes)")
        phi = flags.astype(np.int64) & 3
        self._refuse(
            "r",
            (phi != Phi.IDENTITY) & (self.column("r") <= 0),
            "r > 0 where phi clamps",
            "give the clamp a positive radius",
        )
        self._refuse("s", self.column("s") < 0, "s >= 0", "pass the standard deviation of the noise")
        self._refuse(
            "l", (self.column("l") != 0) & (self.column("s") == 0), "l = 0 where s = 0", "l scales noise: set s"
        )
        written = np.zeros((self.num_rows, self.batch), dtype=bool)
        for register in range(NUM_REGISTERS):
            writes = self._writes()[..., register] != Write.KEEP
            written[1:] = np.logical_or.accumulate(writes, axis=0)[:-1]
            name = f"h{register + 1}"
            self._refuse(
                name,
                (self.column(name) != 0) & ~written,
                f"an earlier row that writes H{register + 1}",
                "the register is read before it is written: store y or x in an earlier row",
            )
        return True

    def describe(self, sample: int = 0) -> str:
        """The table of one sample as text: a header, then one line per row with the columns that matter.

        Args:
            sample: which sample of a table with per-sample rows.
        """
        rows = self.rows[:, sample]
        noisy = int(np.count_nonzero(rows[:, _INDEX["s"]]))
        guidance = sorted({tuple(row) for row in rows[:, [_INDEX["g1"], _INDEX["g2"]]].tolist()})
        shown = ", ".join(f"{g1:g}" if g2 == 0 else f"{g1:g} and {g2:g}" for g1, g2 in guidance) or "none"
        header = (
            f"{self.name}: nfe {self.num_rows}, guidance {shown}, noise in {noisy} of {self.num_rows} rows, "
            f"history {self.num_history}, init_scale {self._of(self.init_scale, sample):g}, "
            f"first c_in {self._of(self.first_c_in, sample):g}"
        )
        if self.batch > 1:
            header += f" (sample {sample} of {self.batch})"
        default = build_rows([{}])[0, 0]
        columns = [
            c for c in COLUMNS[:-1] if c in ("t_model", "a", "b") or np.any(rows[:, _INDEX[c]] != default[_INDEX[c]])
        ]
        lines = [["row", *columns, "phi, writes"]]
        for index, row in enumerate(rows):
            lines.append([str(index), *(f"{row[_INDEX[c]]:.6g}" for c in columns), _flags_text(row[_INDEX["flags"]])])
        widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
        aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([header, *aligned])

    def with_guidance(self, g1: float | np.ndarray, g2: float | np.ndarray | None = None) -> "CoefficientTable":
        """The same table with other guidance: m = out_0 + g1*(out_1 - out_0) + g2*(out_2 - out_1).

        Args:
            g1: a number, or (B,) for one weight per sample; 0 is the unconditional model, 1 the conditional.
            g2: the weight of the third branch, a number or (B,); None leaves the table's.

        Returns:
            A new table; its rows are (R, B, 16) where a (B,) array was given.

        Raises:
            ValueError: where g1 or g2 is neither a number nor (B,), is not finite, or B contradicts the
                table's batch.
        """
        weights = []
        for name, value in (("g1", g1), ("g2", g2)):
            if value is None:
                continue
            value = np.asarray(value, dtype=np.float64)
            if value.ndim > 1 or not np.isfinite(value).all():
                raise ValueError(f"with_guidance: {name} must be a finite number or (B,), got {value!r}")
            weights.append(value)
        batches = {self.batch, *(w.size for w in weights if w.ndim == 1)} - {1}
        if len(batches) > 1:
            raise ValueError(f"with_guidance: the table and the weights must agree on one batch, got {sorted(batches)}")
        rows = np.repeat(self.rows, max(batches, default=1) // self.batch, axis=1)
        for name, weight in zip(("g1", "g2"), weights, strict=False):
            rows[..., _INDEX[name]] = weight
        guided = replace(self, rows=rows)
        if "_checked" in vars(self):  # other finite weights leave a valid table valid, and nothing else changes
            for name in ("_checked", "needs_noise", "learned_variance", "num_history"):
                vars(guided)[name] = getattr(self, name)
        return guided

    def with_guidance_interval(self, t_low: float, t_high: float) -> "CoefficientTable":
        """The same table with guidance where t_low < t_model <= t_high alone; elsewhere g1 = 1 and g2 = 0.

        There m is out_1, the conditional output as it is. `with_guidance`, as `sample`'s guidance argument, writes
        every row: apply it before.

        Args:
            t_low, t_high: model times, t_low < t_high.

        Returns:
            A new table.

        Raises:
            ValueError: unless t_low < t_high.

        Kynkaanniemi 2024, eq. 4.
        """
        if not t_low < t_high:
            raise ValueError(f"with_guidance_interval: needs t_low < t_high, got {t_low!r} and {t_high!r}")
        rows, outside = self.rows.copy(), (self.t_model <= t_low) | (self.t_model > t_high)
        rows[outside, _INDEX["g1"]], rows[outside, _INDEX["g2"]] = 1.0, 0.0
        return replace(self, rows=rows)

    def with_noise_scale(self, scale: float | np.ndarray) -> "CoefficientTable":
        """The same table with its noise, the column s, times `scale`.

        Args:
            scale: a number >= 0, or (R,) for one factor per row.

        Raises:
            ValueError: where scale is neither, negative or not finite.
        """
        scale = np.asarray(scale, dtype=np.float64)
        if scale.shape not in ((), (self.num_rows,)) or not np.isfinite(scale).all() or (scale < 0).any():
            raise ValueError(f"with_noise_scale: scale must be >= 0 and finite, or ({self.num_rows},), got {scale!r}")
        rows = self.rows.copy()
        rows[..., _INDEX["s"]] *= scale.reshape(-1, 1)
        return replace(self, rows=rows).validate()

    def astype_float32(self) -> np.ndarray:
        """The rows as a fresh contiguous float32 array, (R, B or 1, 16): what the kernels read."""
        return np.ascontiguousarray(self.rows, dtype=np.float32)

    @staticmethod
    def stack(tables: Sequence["CoefficientTable"], name: str | None = None) -> "CoefficientTable":
        """Join tables along the batch, so that every sample may have its own solver, grid and guidance.

        A table with fewer rows is padded with rows that leave x as it is (a = 1) at its last t_model.

        Args:
            tables: at least one table; one with batch 1 contributes one sample.
            name: the name of the result; by default the names joined with " | ".

        Returns:
            A table of batch sum(table.batch) and max(table.num_rows) rows.

        Raises:
            ValueError: where `tables` is empty.
        """
        if not tables:
            raise ValueError("stack: tables must hold at least one table, got none")
        num_rows = max(table.num_rows for table in tables)
        rows = np.concatenate([_pad(table.rows, num_rows) for table in tables], axis=1)
        scales = [
            np.concatenate([np.broadcast_to(getattr(table, field), table.batch) for table in tables])
            for field in ("init_scale", "first_c_in")
        ]
        return CoefficientTable(rows, *scales, name or " | ".join(table.name for table in tables))

    def _writes(self) -> np.ndarray:
        """(R, B, 3) int64: the register writes, without a check."""
        flags = self.rows[..., _INDEX["flags"], None].astype(np.int64)
        return (flags >> np.array([2, 4, 6])) & 3

    def _validate_layout(self) -> None:
        rows = self.rows
        if not isinstance(rows, np.ndarray) or rows.dtype != np.float64:
            got = getattr(rows, "dtype", type(rows).__name__)
            raise ValueError(
                f"table '{self.name}': rows must be a float64 array, got {got}; use rows.astype(np.float64)"
            )
        if rows.ndim != 3 or rows.shape[2] != NUM_COLUMNS or 0 in rows.shape:
            raise ValueError(
                f"table '{self.name}': rows must be (R, B or 1, {NUM_COLUMNS}) with R, B >= 1, "
                f"got {rows.shape}; build_rows makes that shape"
            )
        for name in ("init_scale", "first_c_in"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.shape not in ((), (1,), (self.batch,)) or not np.isfinite(value).all():
                raise ValueError(
                    f"table '{self.name}': {name} must be a finite number or ({self.batch},), got {value!r}"
                )

    def _refuse(self, column: str, wrong: np.ndarray, expected: str, remedy: str) -> None:
        """Raise for the first True in wrong (R, B), naming the place."""
        if not wrong.any():
            return
        row, sample = np.argwhere(wrong)[0]
        got = float(self.rows[row, sample, _INDEX[column]])
        raise ValueError(
            f"table '{self.name}': row {row}, sample {sample}, column {column}: expected {expected}, "
            f"got {got!r}; {remedy}"
        )

    @staticmethod
    def _of(value: float | np.ndarray, sample: int) -> float:
        value = np.asarray(value)
        return float(value[sample] if value.size > 1 else value.item())


def _pad(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Append identity rows until there are num_rows."""
    missing = num_rows - rows.shape[0]
    identity = np.broadcast_to(build_rows([{"a": 1.0}]), (missing, *rows.shape[1:])).copy()
    identity[..., _INDEX["t_model"]] = rows[-1, :, _INDEX["t_model"]]
    return np.concatenate([rows, identity])


def _flags_text(flags: float) -> str:
    """flags as a reader wants them: 'clamp, H1<-y'."""
    try:
        phi, writes = unpack_flags(flags)
    except ValueError:
        return f"illegal flags {flags!r}"
    parts = [] if phi == Phi.IDENTITY else [phi.name.lower()]
    parts += [f"H{k}<-{write.name.lower()}" for k, write in enumerate(writes, 1) if write != Write.KEEP]
    return ", ".join(parts) or "-"


_LEGAL_FLAGS = np.array([pack_flags(phi, (w1, w2, w3)) for phi in Phi for w1 in Write for w2 in Write for w3 in Write])
