"""Benchmarks of the fused kernels and models, and the tools to time anyone's: see docs/measuring.md."""

from genengine.benchmarks.registry import (
    Benchmark,
    Case,
    Goal,
    faster,
    register,
    register_baseline,
    register_shapes,
    within,
)  # fmt: skip
from genengine.ops._cost import Cost, traffic

__all__ = [
    "Benchmark", "Case", "Cost", "Goal", "faster", "register", "register_baseline", "register_shapes", "traffic",
    "within",
]  # fmt: skip
