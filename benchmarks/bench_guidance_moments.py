"""guidance_moments against eager sums, as CFG rescale needs them (two standard deviations), and torch.compile.

One pass reads both branches; eager reads them for every standard deviation, and writes the guided output in between.
The shape is that of one branch.
"""

import torch

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import guidance_moments
from genengine.ops.guidance_moments import reference

STATED = {"SD": (16, *calls.SD), "SD, 2048 px": (64, 4, 256, 256)}  # where the goal was stated
SHAPES = STATED | {"SDXL": (16, *calls.SDXL), "SD3, Flux": (16, *calls.SD3), "CogVideoX-5B": (2, *calls.VIDEO)}
GUIDANCE = 4.0


def eager(output):
    """The standard deviations of the conditional and of the guided output."""
    u, c = output.chunk(2)
    dims = list(range(1, u.dim()))
    return c.std(dims), (u + GUIDANCE * (c - u)).std(dims)


def oracle(output):
    return reference(*output.chunk(2))


@register(
    "moments of two branches", group="guidance_moments", shapes=SHAPES, dtypes=("float32", "bfloat16"),
    axes={"batch": 0, "channels": 1},
)  # fmt: skip
def make(case):
    output = case.randn(2 * case.shape[0], *case.shape[1:])
    u, c = output.chunk(2)

    def check():
        """With a rounding in float32 of the sums, whatever the dtype of the branches."""
        exact = oracle(output.double())
        rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
        allowed = testing.tolerance(oracle(output), exact) + rounding
        testing.assert_within(testing.error(guidance_moments(output), exact), allowed, "guidance_moments")

    return Benchmark(
        {"fused": lambda: guidance_moments(output), "eager": lambda: eager(output)}, check, inputs=(output,),
        oracle=oracle, compiles=(eager, (output,)), cost=calls.cost("guidance_moments", u, c), elements=u.numel(),
        goals=(faster("eager", 2.0),) * (case.label in STATED),
    )  # fmt: skip
