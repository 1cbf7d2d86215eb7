"""What can be timed: benchmarks, further baselines and shape sets, each registered by name, ours and anyone's.

    @register("rms_norm", shapes={"Llama 8B": (4096, 4096)}, dtypes=("bfloat16",))
    def rms_norm(case):
        x = case.randn()
        return Benchmark({"fused": lambda: mine(x), "eager": lambda: plain(x)}, check=...)

A third party's file that registers is loaded by `genengine bench NAME --load FILE.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from genengine.ops._cost import Cost

SUITES = ("quick", "ops", "samplers", "models", "peers", "gate", "all", "ceilings")  # ceilings: no rows
KINDS = ("ops", "samplers", "models", "peers")  # the suite that a registered benchmark belongs to
SWEEP = (0.125, 0.25, 0.5, 1, 2, 4)  # factors of the shape's own size


@dataclass(frozen=True)
class Goal:
    """A figure to reach: quantity "ratio" is time(over) / time(under), "wall" the same of time on the wall, "ns" is
    nanoseconds per element of `over`."""

    quantity: str
    over: str
    under: str
    bound: float
    at_least: bool

    def describe(self) -> str:
        sign = ">=" if self.at_least else "<="
        what = f"{self.over} / {self.under}" if self.under else f"ns per element, {self.over}"
        what += " on the wall" if self.quantity == "wall" else ""
        return f"{what} {sign} {self.bound:g}"


def faster(than: str, by: float, ours: str = "fused") -> Goal:
    """`ours` is at least `by` times faster than `than`."""
    return Goal("ratio", than, ours, by, True)


def faster_on_the_wall(than: str, by: float, ours: str = "fused") -> Goal:
    """`ours` is at least `by` times faster than `than` by the clock on the wall, as threads are to make it."""
    return Goal("wall", than, ours, by, True)


def within(factor: float, of: str, ours: str = "fused") -> Goal:
    """`ours` takes at most `factor` times as long as `of`."""
    return Goal("ratio", ours, of, factor, False)


@dataclass(frozen=True)
class Published:
    """Speed-ups that a paper reports of its own work, shown beside those of a sweep over the same axis.

    label: whose, where and on which hardware. axis: of the sweep. over: the variant that stands for what the paper
    compares with. speedups: size on the axis -> time of its baseline over its own.
    """

    label: str
    axis: str
    over: str
    speedups: Mapping[int, float]


@dataclass(frozen=True)
class Case:
    """One point to time a benchmark at: a shape, a dtype, a device, and the name of the model that has the shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"
    label: str = ""

    def batch_of(self, image_shape: tuple[int, ...]) -> int:
        """The batch size, of a shape that must end in what a network takes. Raises ValueError."""
        if self.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"shape must be (B, {', '.join(map(str, image_shape))}) for this network, got {self.shape}"
            )
        return self.shape[0]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normals of the case's dtype on its device, of its shape unless another is given."""
        drawn = torch.randn(shape or self.shape, device=self.device)
        return drawn.to(dtype or self.dtype)


@dataclass(frozen=True)
class Benchmark:
    """One piece of work at one case, and the ways to do it.

    variants: name -> a function of no arguments. "fused" is the one under test, names that begin with "fused" are other
    ways to use it, "eager ..." is what people write, "torch..." an op of its own, others are peers or yardsticks
    ("copy_").
    check: raises AssertionError unless "fused" is right; called before anything is timed.
    inputs: what a registered baseline is called with. oracle: oracle(*inputs as float64) -> the exact result, which a
    registered baseline must meet; without it, baselines are timed unchecked, and the row says so.
    compiles: (function, arguments) to be timed under torch.compile, too.
    cost: bytes, operations and exponentials of one run of "fused", for throughput and the ceiling. elements: for
    nanoseconds per element. goals: figures to reach, reported as reached or not, never enforced.
    repeats: variants of which one run is a part of the work, such as one pass of a loop over equal passes -> how many
    runs make the whole. Their times are multiplied by it, and the row says so.
    published: what papers report of such work. own_graphs: on a GPU, call the variants plainly, for they replay graphs
    of their own, or are meant to be launched by Python.
    """

    variants: Mapping[str, Callable[[], object]]
    check: Callable[[], object]
    inputs: tuple = ()
    oracle: Callable | None = None
    compiles: tuple[Callable, tuple] | None = None
    cost: Cost | None = None
    elements: int | None = None
    goals: tuple[Goal, ...] = ()
    repeats: Mapping[str, int] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    own_graphs: bool = False


@dataclass(frozen=True)
class Baseline:
    """A further variant of registered benchmarks: a function of their inputs."""

    name: str
    function: Callable
    requires: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        if self.requires is None or importlib.util.find_spec(self.requires) is not None:
            return None
        return f"{self.requires} is not installed"


@dataclass(frozen=True)
class Entry:
    """A registered benchmark."""

    name: str
    group: str
    kind: str
    make: Callable[[Case], Benchmark]
    shapes: dict[str, tuple[int, ...]]
    cuda_shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    quick: tuple[str, ...]
    gate: bool
    axes: dict[str, int]
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    baselines: list[Baseline] = field(default_factory=list)

    @property
    def baseline_names(self) -> list[str]:
        return [baseline.name for baseline in self.baselines]

    @property
    def ranks(self) -> set[int]:
        """The numbers of dimensions that its shapes have: pictures and videos may share a row."""
        return {len(shape) for shape in (self.shapes | self.cuda_shapes).values()}

    def cases(
        self, device: str, *, quick: bool = False, first: bool = False, shape=None, dtypes=None, sweep=None
    ) -> Iterator[Case]:
        """Every shape in every dtype; the first alone; or, of the quick set, its labels in the first dtype alone."""
        shapes = self.shapes | (self.cuda_shapes if device == "cuda" else {})
        if shape is not None:
            shapes = {"": tuple(shape)}
        elif quick:
            shapes = {label: shapes[label] for label in self.quick}
        elif first:
            shapes = dict([next(iter(shapes.items()))])
        if sweep is not None:
            shapes = self._swept(next(iter(shapes.values())), sweep)
        for label, size in shapes.items():
            for name in self._dtypes(quick, dtypes):
                yield Case(size, getattr(torch, name), device, label)

    def _dtypes(self, quick, wanted):
        if wanted:
            return [name for name in self.dtypes if name in wanted]
        return self.dtypes[:1] if quick else self.dtypes

    def _swept(self, shape, axis):
        if axis not in self.axes:
            return {}
        at = self.axes[axis]
        sizes = self.sizes.get(axis) or dict.fromkeys(max(1, round(shape[at] * factor)) for factor in SWEEP)
        return {f"{axis} {size}": (*shape[:at], size, *shape[at + 1 :]) for size in sizes}


ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: tuple[str, ...] = ("float32",),
    group: str | None = None,
    kind: str = "ops",
    cuda_shapes: Mapping[str, tuple[int, ...]] | None = None,
    quick: tuple[str, ...] | None = None,
    gate: bool = False,
    axes: Mapping[str, int] | None = None,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> Callable:
    """Register the decorated function make(case) -> Benchmark, which draws its inputs anew at every call.

    name: of the row. group: the op or model it belongs to, by which `genengine bench GROUP` finds it (default: name).
    shapes: the name of a model -> the shape it has. cuda_shapes: shapes for GPUs alone. dtypes: names, such as
    "bfloat16". kind: the suite it belongs to, one of ops, samplers, models, peers. quick: labels that the quick suite
    takes, in the first dtype (default: the first label; none: ()). gate: among the rows that CI compares. axes: axis
    name -> dimension, for `--sweep`. sizes: axis name -> the sizes that a sweep takes (default: from an eighth to four
    times that of the first shape). Raises ValueError if the name is taken or an argument makes no sense.
    """
    shapes = {label: tuple(shape) for label, shape in shapes.items()}
    if kind not in KINDS:
        raise ValueError(f"register: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not shapes:
        raise ValueError(f"register: {name!r} needs at least one shape, such as shapes={{'DiT-XL/2': (16, 256, 1152)}}")
    for dtype in dtypes:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"register: {name!r} has no dtype {dtype!r}; names are torch's, such as 'bfloat16'")
    if unknown := set(sizes or {}) - set(axes or {}):
        raise ValueError(f"register: {name!r} has sizes of {sorted(unknown)}, which are none of its axes")
    quick = tuple(shapes)[:1] if quick is None else quick
    if unknown := [label for label in quick if label not in shapes]:
        raise ValueError(f"register: quick labels of {name!r} must be among {list(shapes)}, got {unknown}")

    def decorate(make: Callable[[Case], Benchmark]) -> Callable[[Case], Benchmark]:
        if name in ENTRIES:
            raise ValueError(f"register: {name!r} is registered already; choose another name")
        ENTRIES[name] = Entry(
            name, group or name, kind, make, shapes, dict(cuda_shapes or {}), tuple(dtypes), tuple(quick), gate,
            dict(axes or {}), dict(sizes or {}),
        )  # fmt: skip
        return make

    return decorate


def register_baseline(benchmark: str, name: str, *, requires: str | None = None) -> Callable:
    """Register the decorated function of a benchmark's inputs as a further variant of it, timed in turn with the rest.

    requires: a module without which it is skipped, and the row says so. Its result is checked against the benchmark's
    oracle like ours. Raises ValueError if there is no such benchmark.
    """

    def decorate(function: Callable) -> Callable:
        find(benchmark).baselines.append(Baseline(name, function, requires))
        return function

    return decorate


def register_shapes(benchmark: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Add shapes, by the name of the model that has them, to a registered benchmark, or to all of a group.

    Raises ValueError if there is no such benchmark, or a shape has another number of dimensions than its own.
    """
    for entry in select(benchmark):
        for label, shape in shapes.items():
            if len(shape) not in entry.ranks:
                ranks = " or ".join(map(str, sorted(entry.ranks)))
                raise ValueError(f"register_shapes: {entry.name} takes {ranks} dimensions, got {label} {tuple(shape)}")
            entry.shapes[label] = tuple(shape)


# ---- finding them ------------------------------------------------------------------------------------------------


@cache
def load_ours() -> None:
    """Import every bench_<name>.py beside this file: each registers itself."""
    from genengine import benchmarks

    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("bench_"):
            importlib.import_module(f"genengine.benchmarks.{module.name}")


def load_file(path: str) -> None:
    """Run a Python file that registers benchmarks of its own. Raises ValueError, naming the line, if it fails."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"bench: --load expects a Python file, found none at {path}")
    load_ours()  # so that a name that is taken is theirs to change
    name = f"genengine_bench_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(line.filename).name}, line {line.lineno}"
        raise ValueError(f"bench: --load {path} failed at {where}: {type(error).__name__}: {error}") from error


def find(name: str) -> Entry:
    load_ours()
    if name not in ENTRIES:
        raise ValueError(f"bench: there is no benchmark {name!r}; `genengine bench --list` shows them")
    return ENTRIES[name]


def groups(entries: Iterable[Entry] | None = None) -> dict[str, list[Entry]]:
    """Op or model -> its benchmarks, of all or of these."""
    load_ours()
    found: dict[str, list[Entry]] = {}
    for entry in ENTRIES.values() if entries is None else entries:
        found.setdefault(entry.group, []).append(entry)
    return found


def select(what: str) -> list[Entry]:
    """The benchmarks of a suite, of an op or model, or the one of that name; "adaln/adaln" is the one, not the op."""
    load_ours()
    if what == "all":
        return list(ENTRIES.values())
    if what == "ceilings":
        return []
    if what == "quick":
        return [entry for entry in ENTRIES.values() if entry.quick]
    if what == "gate":
        return [entry for entry in ENTRIES.values() if entry.gate]
    if what in KINDS:
        return [entry for entry in ENTRIES.values() if entry.kind == what]
    if what in groups():
        return groups()[what]
    group, _, name = what.partition("/")
    for found in (what, name):
        if found in ENTRIES and (found == what or ENTRIES[found].group == group):
            return [ENTRIES[found]]
    raise ValueError(
        f"bench: expected a suite ({', '.join(SUITES)}), an op or model ({', '.join(groups())}), or one benchmark, "
        f"got {what!r}; `genengine bench --list` shows all"
    )
