"""reparameterize and its KL at a latent's shape against eager, as VAEs write it, and torch.compile, with torch's noise.

Forward: 3 elements moved per element, eager's passes move about 24; forward and backward 8, against about 54.
"""

import torch

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import _registry, reparameterize

SHAPE = (64, 16, 32, 32)


def eager(mean, logvar):
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return z, kl.flatten(1).sum(1)


class Work:
    """The halves of an encoder's output, as an encoder leaves them, and gradients."""

    def __init__(self, dtype, device):
        batch, channels, *pixels = SHAPE
        encoded = torch.randn(batch, 2 * channels, *pixels, device=device).to(dtype)
        self.mean, self.logvar = encoded.chunk(2, dim=1)
        self.leaves = [t.detach().requires_grad_() for t in (self.mean, self.logvar)]
        self.grad_z = torch.randn(SHAPE, device=device).to(dtype)
        self.seed = torch.tensor(1, device=device)

    def forward(self, function):
        return lambda: function(self.mean, self.logvar)

    def both(self, function):
        def run():
            with torch.enable_grad():
                z, kl = function(*self.leaves)
                return torch.autograd.grad((z, kl), self.leaves, (self.grad_z, torch.ones_like(kl)))

        return run

    def fused(self, mean, logvar):
        return reparameterize(mean, logvar, seed=self.seed)

    def check(self):
        """Forward and backward against the reference in float64 with the same noise."""
        for name, args in self.calls().items():
            run = _registry.OPS[name].overloads
            wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args]
            kernel = _registry.resolve(_registry.OPS[name], self.mean.device, self.mean.dtype)
            for got, plain, oracle in zip(kernel(*args), run["reference"](*args), run["reference"](*wide), strict=True):
                testing.assert_as_good_as_eager(got, plain, oracle, name)

    def calls(self):
        options = (self.seed, None, 0, None, 0.0, False)
        grad_kl = torch.ones(SHAPE[0], device=self.mean.device)
        return {
            "reparameterize": (self.mean, self.logvar, *options),
            "reparameterize_backward": (self.grad_z, grad_kl, self.mean, self.logvar, *options),
        }


def benchmarks(device):
    for dtype in (torch.float32, torch.bfloat16):
        work = Work(dtype, device)
        n, size, label = work.mean.numel(), work.mean.element_size(), str(dtype).removeprefix("torch.")
        compiled = torch.compile(eager)
        for name, timed, moved, goal in (
            ("reparameterize + KL", work.forward, 3, 6.0),
            ("reparameterize + KL, forward and backward", work.both, 8, 5.0),
        ):
            variants = {"fused": timed(work.fused), "eager": timed(eager), "torch.compile": timed(compiled)}
            goals = (faster("eager", goal),) if dtype == torch.float32 else ()
            yield Benchmark(name, str(SHAPE), label, variants, work.check, n, moved * size * n, goals, device=device)
