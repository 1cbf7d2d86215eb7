"""What a profile says: rows by kernel, gaps, syncs and fusions, as dataclasses, JSON and aligned text."""

from __future__ import annotations

import dataclasses
import linecache
import os
import sys
from dataclasses import dataclass, field

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Kernel:
    """All calls of one op on tensors of the same shapes and dtype.

    seconds: of all calls of one pass, on the device. bytes, flops: of all calls, None where no formula is known.
    floor: seconds that the ceilings allow at least, bound: the one that binds; None where none was measured.
    elements: written, of all calls. lines: "file:line" of the user -> calls.
    """

    name: str
    shapes: str
    dtype: str
    calls: int
    seconds: float
    bytes: int | None = None
    flops: int | None = None
    floor: float | None = None
    bound: str | None = None
    elements: int = 0
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """flops, or, where these are not known, one for every element written."""
        return self.flops or self.elements

    @property
    def bandwidth(self) -> float | None:
        """Achieved bytes per second."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None

    @property
    def rate(self) -> float | None:
        """Achieved floating-point operations per second."""
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def of_ceiling(self) -> float | None:
        """floor / seconds: 1 is as fast as the ceiling that binds. None of what is so short that a launch binds."""
        known = self.floor is not None and self.bound != "launch" and self.seconds
        return self.floor / self.seconds if known else None


@dataclass(frozen=True)
class Gap:
    """Time in which no kernel ran, of all gaps that ended with an op called from the same line."""

    line: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Sync:
    """Calls of one kind from one line that make the host wait for the device; seconds: waited, None on a CPU."""

    line: str
    call: str
    count: int
    seconds: float | None = None


@dataclass(frozen=True)
class Fusion:
    """Kernels that one fused op replaces, of all matches of the same kind at the same line.

    places: how often the form was found. kernels: the ops that ran, by name -> how many. launches: of the fused op in
    their place. bytes: what they moved. saved: what the fused op would not move. seconds: what they took.
    """

    op: str
    line: str
    places: int
    kernels: dict[str, int]
    launches: int
    bytes: int
    saved: int
    seconds: float


@dataclass
class Profile:
    """What `profile` found out.

    seconds: of a pass without the profiler, the median. profiled: of one with it. busy: seconds in kernels, of the
    latter. bytes, flops: of the recorded ops that were seen running. missing: recorded ops that were not.
    ceilings: what they were measured as. flame: a `flame.Box`, the tree of calls.
    """

    name: str
    device: str
    seconds: float
    profiled: float
    busy: float
    bytes: int
    flops: int
    repeats: int
    kernels: list[Kernel]
    gaps: list[Gap]
    syncs: list[Sync]
    fusions: list[Fusion]
    missing: int = 0
    notes: list[str] = field(default_factory=list)
    ceilings: object = None
    flame: object = field(default=None, repr=False)

    @property
    def known(self) -> float:
        """Seconds in kernels whose bytes are known."""
        return sum(kernel.seconds for kernel in self.kernels if kernel.bytes is not None)

    @property
    def idle(self) -> float:
        """Seconds of a profiled pass in which no kernel ran."""
        return max(self.profiled - self.busy, 0.0)

    def to_json(self) -> dict:
        """All but flame and ceilings as plain dicts, lists, strings and numbers."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("flame", "ceilings")}
        for name in ("kernels", "gaps", "syncs", "fusions"):
            plain[name] = [dataclasses.asdict(row) for row in plain[name]]
        for row, kernel in zip(plain["kernels"], self.kernels, strict=True):
            row |= {"bytes_per_s": kernel.bandwidth, "flops_per_s": kernel.rate, "of_ceiling": kernel.of_ceiling}
        return {"schema_version": SCHEMA_VERSION} | plain

    def table(self, top: int = 12) -> str:
        """Aligned text: totals, then the `top` kernels by time, gaps, syncs, and what a fused op would remove."""
        parts = [_totals(self), _kernel_table(self, top), _gap_table(self, top), _sync_table(self, top)]
        parts.append(_fusion_table(self, top))
        return "\n\n".join(part for part in parts if part)


# ---- text ------------------------------------------------------------------------------------------------------------


def _totals(profile):
    of = profile.profiled or 1.0
    rows = [
        (f"{profile.name} on {profile.device}", f"{seconds(profile.seconds)} per pass (median of {profile.repeats})"),
        ("under the profiler", f"{seconds(profile.profiled)}, {profile.profiled / max(profile.seconds, 1e-9):.2f} x as "
                               "long; all below is of this"),
        ("in kernels", f"{seconds(profile.busy)} ({min(profile.busy / of, 1.0):.0%})"),
        ("outside", f"{seconds(profile.idle)} ({profile.idle / of:.0%})"),
        ("moved at least", _moved(profile)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join(lines + [f"note: {note}" for note in profile.notes])


def _moved(profile):
    text = quantity(profile.bytes, "B")
    if profile.known:
        text += f" ({quantity(profile.bytes / profile.known, 'B')}/s)"
    if profile.flops and profile.known:
        text += f"; {quantity(profile.flops, 'FLOP')} in products ({quantity(profile.flops / profile.known, 'FLOP')}/s)"
    if profile.known < 0.99 * profile.busy:
        text += f", in the {seconds(profile.known)} of kernels of recorded ops"
    return text


def _kernel_table(profile, top):
    head = ["kernel", "operands", "calls", "time", "", "each", "GB/s", "GFLOP/s"]
    if profile.ceilings is not None:
        head += ["of ceiling", ""]
    rows = []
    for kernel in profile.kernels[:top]:
        row = [short(kernel.name), clip(f"{kernel.dtype} {kernel.shapes}", 44), f"{kernel.calls}"]
        row += [seconds(kernel.seconds), f"{kernel.seconds / (profile.profiled or 1.0):.1%}"]
        row += [seconds(kernel.seconds / kernel.calls), _number(kernel.bandwidth, 1e-9), _number(kernel.rate, 1e-9)]
        if profile.ceilings is not None:
            row += ["" if kernel.of_ceiling is None else f"{kernel.of_ceiling:.0%}", kernel.bound or ""]
        rows.append(row)
    left = profile.kernels[top:]
    text = columns(head, rows, left={0, 1, 9})
    if left:
        spent = sum(kernel.seconds for kernel in left)
        text += f"\nand {len(left)} more, {seconds(spent)} ({spent / (profile.profiled or 1.0):.1%})"
    return text


def _gap_table(profile, top):
    if not profile.gaps:
        return ""
    what = "launch gaps: the GPU was idle before a kernel called at" if profile.device.startswith("cuda") else (
        "gaps: time outside kernels (Python, dispatch, views) before an op called at"
    )  # fmt: skip
    rows = [
        [seconds(gap.seconds), f"{gap.seconds / (profile.profiled or 1.0):.1%}", f"{gap.count} x", place(gap.line)]
        for gap in profile.gaps[: max(top // 2, 1)]
    ]
    return f"{what}\n" + columns(None, rows, left={3})


def _sync_table(profile, top):
    if not profile.syncs:
        return "host syncs: none" if profile.device.startswith("cuda") else (
            "host syncs: none seen (.cpu(), .numpy() and .tolist() of a CPU tensor are not)"
        )  # fmt: skip
    on_gpu = profile.device.startswith("cuda")
    head = "host syncs: the host waited for the device" if on_gpu else (
        "host syncs: these would wait for the device, were their tensors on a GPU (.cpu(), .numpy() and .tolist() "
        "would, too, and are not seen here)"
    )  # fmt: skip
    rows = [
        [f"{sync.count} x", sync.call, "" if sync.seconds is None else seconds(sync.seconds), place(sync.line)]
        for sync in profile.syncs[:top]
    ]
    return f"{head}\n" + columns(None, rows, left={1, 3})


def _fusion_table(profile, top):
    if not profile.fusions:
        return "fused ops: nothing found that one would replace"
    lines = ["fused ops that would replace what ran (bytes of the forward pass)"]
    for fusion in profile.fusions[:top]:
        count, taken = sum(fusion.kernels.values()), fusion.seconds / (profile.profiled or 1.0)
        where = f"{fusion.places} places" if fusion.places > 1 else "1 place"
        lines.append(
            f"  {fusion.op}: {count} kernels in {where} become {fusion.launches}: "
            f"-{fusion.saved / max(fusion.bytes, 1):.0%} of their bytes, "
            f"-{fusion.saved / max(profile.bytes, 1):.1%} of the whole; they take {taken:.1%} of the time"
        )
        lines.append(f"    {', '.join(f'{n} {short(name)}' for name, n in fusion.kernels.items())}")
        lines.append(f"    {place(fusion.line)}")
    return "\n".join(lines)


def columns(head, rows, left=frozenset()) -> str:
    """Rows of strings as aligned text, numbers to the right; `left`: the columns that are words."""
    lines = ([head] if head else []) + rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    aligned = [
        "  ".join(f"{cell:<{width}}" if i in left else f"{cell:>{width}}" for i, (cell, width) in
                  enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join("  " + line.rstrip() for line in aligned)


def seconds(value: float) -> str:
    """1.234e-3 -> "1.23 ms"."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
    return _short(value, units)


def quantity(value: float, unit: str) -> str:
    """12345678, "B" -> "12.3 MB"."""
    prefixes = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
    return _short(value, [(prefix + unit, factor) for prefix, factor in prefixes])


def _short(value, units):
    """Three digits in the largest unit that is not below one."""
    unit, factor = next((pair for pair in units if value >= 0.9995 * pair[1]), units[-1])
    scaled = value / factor
    return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"


def _number(value, factor):
    return "" if value is None else f"{value * factor:.3g}" if value * factor < 1000 else f"{value * factor:.0f}"


def short(name: str) -> str:
    """The name without ATen's namespace, which most kernels have."""
    return clip(name.removeprefix("aten::"), 48)


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def place(line: str) -> str:
    """ "file:line  the line itself", the file relative to the current directory where it is below."""
    if not line:
        return "(autograd's own thread)"
    if line.startswith("("):  # no line, but what stands for one
        return line
    path, _, number = line.rpartition(":")
    text = linecache.getline(path, int(number)).strip()
    return f"{_known_as(path)}:{number}  {clip(text, 60)}".rstrip()


def _known_as(path):
    """The file relative to the current directory, or to where Python found it."""
    relative = os.path.relpath(path)
    if not relative.startswith(".."):
        return relative
    roots = [entry for entry in sys.path if entry and path.startswith(entry + os.sep)]
    return os.path.relpath(path, max(roots, key=len)) if roots else os.path.join(*path.split(os.sep)[-2:])
