"""Benchmarks of the fused kernels and models, and the tools to time anyone's: see docs/measuring.md."""

from genengine.benchmarks.registry import (
    Benchmark,
    Case,
    Goal,
    Published,
    faster,
    faster_on_the_wall,
    register,
    register_baseline,
    register_shapes,
    within,
)  # fmt: skip
from genengine.ops._cost import Cost, traffic

__all__ = [
    "Benchmark", "Case", "Cost", "Goal", "Published", "faster", "faster_on_the_wall", "register", "register_baseline",
    "register_shapes", "traffic", "within",
]  # fmt: skip
