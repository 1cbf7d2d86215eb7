"""Bench a kernel of your own with genengine's protocol, and add a baseline and a shape to a benchmark of ours.

    genengine bench rms_norm --load examples/bench_your_kernel.py --html rms_norm.html
    genengine bench adaln --load examples/bench_your_kernel.py --dtype float32
    python examples/bench_your_kernel.py

Accuracy is asserted before anything is timed, variants take turns in one process, torch.compile is added from
`compiles`, and every row says what share of the measured ceiling it reaches.
"""

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks import Benchmark, Cost, register, register_baseline, register_shapes, traffic

EPS = 1e-6


def plain_rms_norm(x, weight):
    """What people write: y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def my_rms_norm(x, weight, out):
    """Here goes your kernel; this one saves a pass over x, and allocates rows alone."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_(), out=out).mul_(weight)


@register("rms_norm", shapes={"Llama 8B": (512, 4096), "Llama 1B": (512, 2048)}, axes={"tokens": 0})
def rms_norm(case):
    x, weight = case.randn(), case.randn(case.shape[-1])
    out = torch.empty_like(x)
    kernel = lambda: my_rms_norm(x, weight, out)  # noqa: E731
    oracle = plain_rms_norm(x.double(), weight.double())
    return Benchmark(
        {"fused": kernel, "eager": lambda: plain_rms_norm(x, weight)},
        check=lambda: testing.assert_as_good_as_eager(kernel(), plain_rms_norm(x, weight), oracle, "rms_norm"),
        compiles=(plain_rms_norm, (x, weight)),
        cost=Cost(traffic(x, weight, x), flops=4 * x.numel()),
        elements=x.numel(),
    )


@register_baseline("adaln", "affine layer_norm, per sample")
def layer_norm_per_sample(x, scale, shift):
    """A rival of our adaln: the modulation as layer_norm's own weight and bias, one sample at a time."""
    return torch.stack(
        [F.layer_norm(*args, EPS) for args in zip(x, [x.shape[-1:]] * len(x), 1 + scale, shift, strict=True)]
    )


register_shapes("adaln", {"PixArt": (4, 1024, 1152)})


def main(budget=0.3):
    from genengine.benchmarks import suite, table

    report = suite.run("rms_norm", options=suite.Options(budget=budget, compile_modes=()))
    print("\n".join(table.lines(row) for row in report["rows"]))
    return report


if __name__ == "__main__":
    main()
