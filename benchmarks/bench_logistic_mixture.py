"""logistic_mixture against eager, as PixelCNN++ is written (where() over four cases, log_softmax), and torch.compile.

At the shapes of CIFAR-10 and MNIST. Forward: every parameter read once; with the backward, read twice and written once.
Eager makes some thirty passes over tensors of all means.
"""

import math

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import _registry, logistic_mixture_log_prob, logistic_mixture_sample
from genengine.testing.logistic_mixture import gradient_slack, log_prob_slack

BINS = 256
SHAPES = ((16, 3, 10, (32, 32)), (64, 1, 10, (28, 28)))  # B, C, K, pixels


def eager(x, params, *, bins=BINS):
    channels = x.shape[1]
    k = params.shape[1] // (1 + 2 * channels + channels * (channels - 1) // 2)
    logits, means, log_scales, couplings = params.split(
        [k, channels * k, channels * k, channels * (channels - 1) // 2 * k], dim=1
    )
    means, log_scales = (t.unflatten(1, (channels, k)) for t in (means, log_scales.clamp(min=-7)))
    if channels == 3:
        c = torch.tanh(couplings.unflatten(1, (3, k)))
        x0, x1 = x[:, 0:1], x[:, 1:2]
        means = torch.stack((means[:, 0], means[:, 1] + c[:, 0] * x0, means[:, 2] + c[:, 1] * x0 + c[:, 2] * x1), dim=1)
    centred, inverse, half = x[:, :, None] - means, torch.exp(-log_scales), 1 / (bins - 1)
    plus, minus, middle = inverse * (centred + half), inverse * (centred - half), inverse * centred
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * F.softplus(middle) - math.log((bins - 1) / 2)
    inside = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density)
    highest = torch.where(x[:, :, None] > 0.999, -F.softplus(minus), inside)
    log_p = torch.where(x[:, :, None] < -0.999, plus - F.softplus(plus), highest)
    return torch.logsumexp(log_p.sum(1) + torch.log_softmax(logits, dim=1), dim=1)


def eager_sample(params, channels):
    """As users write it, of one component by the Gumbel trick, without the bins."""
    k = params.shape[1] // (1 + 2 * channels + channels * (channels - 1) // 2)
    logits, means, log_scales, couplings = params.split(
        [k, channels * k, channels * k, channels * (channels - 1) // 2 * k], dim=1
    )
    uniform = torch.rand_like(logits).clamp_(1e-5, 1 - 1e-5)
    chosen = (logits - torch.log(-torch.log(uniform))).argmax(1, keepdim=True)[:, None]
    pick = lambda t, n: t.unflatten(1, (n, k)).gather(2, chosen.expand(-1, n, *chosen.shape[2:]))[:, :, 0]  # noqa: E731
    u = torch.rand_like(pick(means, channels)).clamp_(1e-5, 1 - 1e-5)
    x = pick(means, channels) + torch.exp(pick(log_scales, channels).clamp(min=-7)) * (torch.log(u) - torch.log1p(-u))
    if channels == 1:
        return x.clamp(-1, 1)
    c = torch.tanh(pick(couplings, 3))
    x0 = x[:, 0].clamp(-1, 1)
    x1 = (x[:, 1] + c[:, 0] * x0).clamp(-1, 1)
    x2 = (x[:, 2] + c[:, 1] * x0 + c[:, 2] * x1).clamp(-1, 1)
    return torch.stack((x0, x1, x2), dim=1)


class Work:
    def __init__(self, batch, channels, k, pixels, memory, device):
        count = k * (1 + 2 * channels + channels * (channels - 1) // 2)
        params = torch.randn(batch, count, *pixels, device=device)
        params[:, k * (1 + channels) : k * (1 + 2 * channels)] -= 2
        self.params = params.contiguous(memory_format=memory)
        self.leaf = self.params.detach().requires_grad_()
        self.x = torch.randint(0, BINS, (batch, channels, *pixels), device=device) * (2 / (BINS - 1)) - 1
        self.grad = torch.ones(batch, *pixels, device=device)
        self.channels, self.seed = channels, torch.tensor(1, device=device)

    def forward(self, function):
        return lambda: function(self.x, self.params)

    def both(self, function):
        def run():
            with torch.enable_grad():
                return torch.autograd.grad(function(self.x, self.leaf), self.leaf, self.grad)

        return run

    def check(self):
        """Forward and backward against the reference in float64; the eager formulation agrees, but less exactly."""
        slack = {
            0: log_prob_slack(self.channels, self.params),
            1: gradient_slack(self.grad, self.channels, self.params),
        }
        names = ("logistic_mixture_log_prob", "logistic_mixture_log_prob_backward")
        for i, args in enumerate(((self.x, self.params, BINS), (self.grad, self.x, self.params, BINS))):
            op = _registry.OPS[names[i]]
            kernel, reference = _registry.resolve(op, self.x.device, self.x.dtype), op.overloads["reference"]
            oracle = reference(*(t.double() for t in args[:-1]), BINS)
            allowed = testing.tolerance(reference(*args), oracle) + slack[i]
            assert testing.error(kernel(*args), oracle) <= allowed, names[i]
        torch.testing.assert_close(
            eager(self.x, self.params), logistic_mixture_log_prob(self.x, self.params), rtol=1e-2, atol=1e-2
        )

    def check_sample(self):
        op = _registry.OPS["logistic_mixture_sample"]
        args = (self.params, self.channels, BINS, 1.0, self.seed, None, 0)
        kernel = _registry.resolve(op, self.x.device, self.x.dtype)
        assert torch.equal(kernel(*args), op.overloads["reference"](*args))


def benchmarks(device):
    compiled = torch.compile(eager)
    for (batch, channels, k, pixels), memory in (
        (SHAPES[0], torch.contiguous_format), (SHAPES[0], torch.channels_last), (SHAPES[1], torch.contiguous_format),
    ):  # fmt: skip
        work = Work(batch, channels, k, pixels, memory, device)
        shape = f"{(batch, channels, *pixels)}, K = {k}" + ", channels_last" * (memory == torch.channels_last)
        size, per = batch * pixels[0] * pixels[1], 4 * work.params.shape[1]

        def row(name, fused, other, check, moved, compiled=None, shape=shape, size=size):
            variants = {"fused": fused, "eager": other} | ({"torch.compile": compiled} if compiled else {})
            return Benchmark(
                name, shape, "float32", variants, check, size, moved * size, (faster("eager", 5.0),), device=device
            )

        for name, timed, moved in (
            ("logistic_mixture_log_prob", work.forward, per),
            ("logistic_mixture_log_prob, forward and backward", work.both, 3 * per),
        ):
            yield row(name, timed(logistic_mixture_log_prob), timed(eager), work.check, moved, timed(compiled))
        fused = lambda work=work: logistic_mixture_sample(work.params, channels=work.channels, seed=work.seed)  # noqa: E731
        other = lambda work=work: eager_sample(work.params, work.channels)  # noqa: E731
        yield row("logistic_mixture_sample", fused, other, work.check_sample, 4 * k)
