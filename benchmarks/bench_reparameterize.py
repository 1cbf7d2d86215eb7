"""reparameterize and its KL at the latents of known VAEs against eager, as VAEs write it, and torch.compile.

They draw torch's noise. Forward: 3 elements moved per element, eager's passes move about 24; with the backward 8
against about 54.
"""

from functools import partial

import torch

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import reparameterize

SHAPES = {
    "SD3, 256 px": (64, 16, 32, 32), "SD": (16, *calls.SD), "SDXL": (16, *calls.SDXL), "SD3, Flux": (4, *calls.SD3),
    "CogVideoX-5B": (2, *calls.VIDEO),
}  # fmt: skip
COMMON = {"shapes": SHAPES, "dtypes": ("float32", "bfloat16"), "group": "reparameterize"}
COMMON |= {"axes": {"batch": 0, "channels": 1}, "cuda_shapes": calls.MANY}


def eager(mean, logvar):
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return z, kl.flatten(1).sum(1)


def preallocated(mean, logvar, std, z, terms):
    """exp(logvar / 2) is taken once and squared for the KL; nothing of mean's size is allocated."""
    torch.mul(logvar, 0.5, out=std).exp_()
    torch.randn(z.shape, out=z)
    torch.addcmul(mean, std, z, out=z)
    torch.sub(std.square_(), logvar, out=terms).addcmul_(mean, mean)
    return z, terms.flatten(1).sum(1).sub_(terms[0].numel()).mul_(0.5)


class Work:
    """The halves of an encoder's output, as an encoder leaves them, and gradients."""

    def __init__(self, case):
        batch, channels, *rest = case.shape
        self.inputs = case.randn(batch, 2 * channels, *rest).chunk(2, dim=1)
        self.buffers = tuple(torch.empty(case.shape, dtype=case.dtype, device=case.device) for _ in range(3))
        self.grads = (case.randn(), torch.ones(batch, device=case.device))
        self.seed = torch.tensor(1, device=case.device)
        self.forward = (*self.inputs, self.seed, None, 0, None, 0.0, False)
        self.backward = (*self.grads, *self.forward)

    def fused(self, mean, logvar):
        return reparameterize(mean, logvar, seed=self.seed)

    def check(self):
        """What is timed, and its backward op, against the reference in float64 with the same noise."""
        reference = partial(reparameterize, seed=self.seed, backend="reference")
        calls.check_function(self.fused, reference, self.inputs, "reparameterize")
        calls.check("reparameterize_backward", *self.backward)


@register("reparameterize + KL", **COMMON, gate=True)
def forward(case):
    work = Work(case)
    variants = {
        "fused": lambda: work.fused(*work.inputs),
        "eager": lambda: eager(*work.inputs),
        "eager, preallocated": lambda: preallocated(*work.inputs, *work.buffers),
    }
    return Benchmark(
        variants, work.check,
        inputs=work.inputs, compiles=(eager, work.inputs), cost=calls.cost("reparameterize", *work.forward),
        elements=work.inputs[0].numel(), goals=(faster("eager", 6.0),) * _stated(case),
    )  # fmt: skip


@register("reparameterize + KL, forward and backward", **COMMON, quick=())
def forward_and_backward(case):
    work = Work(case)
    leaves, kl_dtype = calls.leaves(*work.inputs), work.fused(*work.inputs)[1].dtype
    ours = calls.both(work.fused, work.grads[0], work.grads[1].to(kl_dtype))
    plain = calls.both(eager, work.grads[0], work.grads[1].to(case.dtype))
    return Benchmark(
        {"fused": lambda: ours(*leaves), "eager": lambda: plain(*leaves)}, work.check, compiles=(plain, leaves),
        cost=calls.cost("reparameterize", *work.forward) + calls.cost("reparameterize_backward", *work.backward),
        elements=leaves[0].numel(), goals=(faster("eager", 5.0),) * _stated(case),
    )  # fmt: skip


def _stated(case):
    """Whether the goals were stated for this case."""
    return case.label == "SD3, 256 px" and case.dtype == torch.float32
