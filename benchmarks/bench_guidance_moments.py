"""guidance_moments against eager sums, as CFG rescale needs them (two standard deviations), and torch.compile.

One pass reads both branches. Eager as written reads them for every standard deviation, and writes the guided output in
between; "eager, preallocated" does so without allocating; "eager, matrix product" takes our sums from batched products
of the branches with themselves, the strongest form. The shape is that of one branch.
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


def eager_preallocated(output, scratch):
    u, c = output.chunk(2)
    dims = list(range(1, u.dim()))
    return c.std(dims), torch.lerp(u, c, GUIDANCE, out=scratch).std(dims)


def eager_product(output, scratch):
    """The sums u, c, u^2, u c, c^2, (c - u)^2 of every sample, (B, 6) in float32; scratch: (B, elements), float32."""
    both = output.float().view(2, len(scratch), -1).transpose(0, 1)  # (B, 2, elements)
    squares, sums = both @ both.mT, both.sum(2)
    apart = torch.sub(both[:, 1], both[:, 0], out=scratch)
    apart = torch.linalg.vector_norm(apart, dim=1, keepdim=True).square_()
    return torch.cat((sums, squares[:, 0], squares[:, 1, 1:], apart), dim=1)


def deviations(moments, count):
    """What eager computes, of our sums: standard deviations of the conditional and of the guided output."""
    u, c, uu, uc, cc, _ = moments.double().unbind(1)
    total, g = u + GUIDANCE * (c - u), GUIDANCE
    squares = (1 - g) ** 2 * uu + 2 * g * (1 - g) * uc + g**2 * cc
    return tuple(((second - first**2 / count) / (count - 1)).sqrt() for first, second in ((c, cc), (total, squares)))


def oracle(output):
    return reference(*output.chunk(2))


@register(
    "moments of two branches", group="guidance_moments", shapes=SHAPES, cuda_shapes=calls.MANY,
    dtypes=("float32", "bfloat16"), axes={"batch": 0, "channels": 1},
)  # fmt: skip
def make(case):
    output = case.randn(2 * case.shape[0], *case.shape[1:])
    u, c = output.chunk(2)
    scratch, wide = torch.empty_like(u), torch.empty(u.flatten(1).shape, device=case.device)

    def check():
        """With a rounding in float32 of the sums, whatever the dtype of the branches."""
        exact = oracle(output.double())
        rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
        allowed = testing.tolerance(oracle(output), exact) + rounding
        ours = guidance_moments(output)
        testing.assert_within(testing.error(ours, exact), allowed, "guidance_moments")
        found, expected = deviations(ours, u[0].numel()), eager(output.double())
        for got, want in zip(found, expected, strict=True):
            gap = (got - want).abs().max().item()
            assert gap <= 1e-4 * want.max().item(), f"standard deviations of the moments are off by {gap}"

    variants = {
        "fused": lambda: guidance_moments(output),
        "eager": lambda: eager(output),
        "eager, preallocated": lambda: eager_preallocated(output, scratch),
        "eager, matrix product": lambda: eager_product(output, wide),
    }
    return Benchmark(
        variants, check, inputs=(output,), oracle=oracle, compiles=(eager, (output,)),
        cost=calls.cost("guidance_moments", u, c), elements=u.numel(),
        goals=(faster("eager", 2.0),) * (case.label in STATED),
    )  # fmt: skip
