"""What the device can do, measured in the same run: copy, triad, matrix products, exponentials, and a launch.

Every figure of a report is also given as the share of the ceiling that binds it, so that "12 GB/s" says how far there
is to go. Data sheets do not serve: a shared core, a power limit or one thread of many has its own ceilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from genengine.benchmarks.timers import sampler
from genengine.ops._cost import Cost

# Bytes moved: from the first-level cache to main memory; a GPU's smallest sizes measure its launches alone.
WORKING_SETS = {"cpu": [2**k for k in range(15, 29, 2)], "cuda": [2**k for k in range(20, 33, 2)]}
MATRIX = {"cpu": 1024, "cuda": 8192}
EXPONENTIALS = {"cpu": 2**13, "cuda": 2**22}  # elements: what fits the first-level cache; what fills a GPU
# On a GPU the exponentials of one element follow one another in a register: memory would be the ceiling otherwise.
CHAIN = 256
CHAIN_SOURCE = """
template <typename T> T exponentials(T x) {
  for (int i = 0; i < %d; ++i) x = __expf(-x);
  return x;
}
"""
ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of one device.

    copy, triad: working set in bytes -> bytes moved per second, of b = a and of c = a + s b. matmul: dtype name ->
    FLOP/s of a large square product. exps: exponentials per second, float32, in the cache or, on a GPU, in registers;
    None if not measured. launch: seconds that the smallest op takes. missing: name of a ceiling not measured -> why.
    """

    device: str
    copy: dict[int, float]
    triad: dict[int, float]
    matmul: dict[str, float]
    exps: float | None
    launch: float
    missing: dict[str, str] = field(default_factory=dict)

    def bandwidth(self, nbytes: int) -> float:
        """Bytes per second that the faster of copy and triad moves when it moves that many, between measured sizes."""
        sizes = sorted(self.copy)
        rates = [max(self.copy[size], self.triad[size]) for size in sizes]
        return float(np.interp(np.log(max(nbytes, 1)), np.log(sizes), rates))

    def floor(self, cost: Cost, dtype: torch.dtype, *, footprint: int | None = None) -> tuple[float, str]:
        """The least seconds that work of this cost can take here, and the ceiling that says so.

        footprint: bytes over which the inputs of successive calls rotate, if more than one call moves: the bandwidth is
        then that of so large a working set, which the cache does not hold.
        """
        product = self._products(dtype)
        floors = {
            "bandwidth": cost.bytes / self.bandwidth(max(cost.bytes, footprint or 0)),
            "matrix products": cost.flops / product,
            "launch": self.launch,
        }
        if self.exps is not None:
            floors["exponentials"] = cost.exps / self.exps
        name = max(floors, key=floors.get)
        return floors[name], name

    def _products(self, dtype):
        """The fastest product that such a kernel may take: of its own dtype, or of float32, in which it accumulates.

        On a CPU without matrix units a product in bfloat16 is the slower one, and bounds nothing.
        """
        names = {str(dtype).removeprefix("torch."), "float32"} & self.matmul.keys()
        return max(self.matmul[name] for name in names or self.matmul)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict) -> Ceilings:
        curves = {name: {int(size): rate for size, rate in found[name].items()} for name in ("copy", "triad")}
        return cls(**{**found, **curves})


def measure(
    device: torch.device | str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), *, report=None
) -> Ceilings:
    """Measure the ceilings of one thread of the CPU, or of one GPU; a few seconds.

    dtypes: of the matrix products; one that the device cannot multiply is left out. report: called with a line per
    ceiling as it is known.
    """
    kind = torch.device(device).type
    with torch.no_grad():
        streams = {size: _streams(size, kind) for size in WORKING_SETS[kind]}
        exps, missing = _exponentials(kind)
        found = Ceilings(
            kind,
            {size: rates[0] for size, rates in streams.items()},
            {size: rates[1] for size, rates in streams.items()},
            {name: rate for dtype in dtypes for name, rate in _products(dtype, kind)},
            exps,
            _best(torch.zeros(1, device=kind).zero_, kind),
            missing,
        )
    if report is not None:
        report(describe(found))
    return found


def _best(function, kind):
    """The fastest of some samples of a few milliseconds: a ceiling is what is reached when nothing disturbs."""
    sample = sampler([function], kind)
    count = max(1, min(10_000, round(3e-3 / max(sample(1)[0] * sample.calls, 1e-7))))
    return min(sample(count)[0] for _ in range(ROUNDS))


def _streams(nbytes, kind):
    """Bytes per second of copy (two streams) and triad (three), each moving `nbytes`."""
    a, b = (torch.zeros(nbytes // 8, device=kind) for _ in range(2))
    x, y, z = (torch.zeros(nbytes // 12, device=kind) for _ in range(3))
    copy = _best(lambda: b.copy_(a), kind)
    triad = _best(lambda: torch.add(x, y, alpha=0.5, out=z), kind)
    return 8 * len(a) / copy, 12 * len(x) / triad


def _products(dtype, kind):
    n = MATRIX[kind]
    try:
        # Random: equal numbers draw less power than a model's, and go faster.
        a, b = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        yield str(dtype).removeprefix("torch."), 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), kind)
    except RuntimeError:  # no product in this dtype here
        return


def _exponentials(kind):
    """Exponentials per second, or None; and {"exps": why it is None}."""
    x = torch.full((EXPONENTIALS[kind],), 0.5, device=kind)
    if kind == "cpu":
        out = torch.empty_like(x)
        return len(x) / _best(lambda: torch.exp(x, out=out), kind), {}
    try:
        chain = torch.cuda.jiterator._create_jit_fn(CHAIN_SOURCE % CHAIN)
        return CHAIN * len(x) / _best(lambda: chain(x), kind), {}
    except (AssertionError, AttributeError, RuntimeError) as error:  # what torch raises without a run-time compiler
        return None, {"exps": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def describe(ceilings: Ceilings) -> str:
    """The ceilings in a few lines."""
    size = lambda n: f"{n / 2**20:g} MiB" if n >= 2**20 else f"{n / 2**10:g} KiB"  # noqa: E731
    streams = ", ".join(f"{size(n)} {ceilings.bandwidth(n) * 1e-9:.3g}" for n in sorted(ceilings.copy))
    products = ", ".join(f"{name} {rate * 1e-12:.3g}" for name, rate in ceilings.matmul.items())
    exps = "" if ceilings.exps is None else f"{ceilings.exps * 1e-9:.3g} G exponentials/s; "
    missing = "".join(f"\n          no {name}: {why}" for name, why in ceilings.missing.items())
    return (
        f"ceilings: copy or triad, GB/s by bytes moved: {streams}\n"
        f"          matrix products, TFLOP/s: {products}; {exps}a launch {ceilings.launch * 1e6:.2g} us{missing}"
    )
