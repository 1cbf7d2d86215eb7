"""logistic_mixture against eager, as PixelCNN++ is written (where() over four cases, log_softmax), and torch.compile.

Shapes are (B, C, components, H, W). Forward: every parameter read once; with the backward, read twice and written once.
Eager makes some thirty passes over tensors of all means; 16-bit parameters it widens first, as its differences need.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import logistic_mixture_log_prob, logistic_mixture_sample
from genengine.ops.logistic_mixture import params_per_component, reference_log_prob
from genengine.testing.logistic_mixture import gradient_slack, log_prob_slack

BINS = 256
SHAPES = {"CIFAR-10": (16, 3, 10, 32, 32), "MNIST": (64, 1, 10, 28, 28), "ImageNet 64": (8, 3, 10, 64, 64)}
FORMATS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}


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
    def __init__(self, memory_format, case):
        batch, self.channels, k, *pixels = case.shape
        params = torch.randn(batch, k * params_per_component(self.channels), *pixels, device=case.device)
        params[:, k * (1 + self.channels) : k * (1 + 2 * self.channels)] -= 2  # log-scales
        self.params = params.to(case.dtype).contiguous(memory_format=memory_format)
        self.x = torch.randint(0, BINS, (batch, self.channels, *pixels), device=case.device) * (2 / (BINS - 1)) - 1
        self.pixels, self.seed = batch * math.prod(pixels), torch.tensor(1, device=case.device)
        self.inputs, self.forward = (self.x, self.params), (self.x, self.params, BINS)
        self.grad = torch.ones_like(logistic_mixture_log_prob(*self.inputs))
        self.backward = (self.grad, *self.forward)
        self.sample = (self.params, self.channels, BINS, 1.0, self.seed, None, 0)

    def check(self):
        """Forward and backward against the reference in float64; the eager formulation agrees, but less exactly."""
        slack = log_prob_slack(self.channels, self.params)
        log_prob = partial(reference_log_prob, bins=BINS)
        calls.check_function(logistic_mixture_log_prob, log_prob, self.inputs, "logistic_mixture_log_prob", (slack,))
        slack = gradient_slack(self.grad, self.channels, self.params)
        calls.check("logistic_mixture_log_prob_backward", *self.backward, slack=(slack,))
        ours = logistic_mixture_log_prob(self.x, self.params.float())
        torch.testing.assert_close(written(*self.inputs), ours, rtol=1e-2, atol=1e-2)

    def check_sample(self):
        reference = self.draw(backend="reference")
        assert torch.equal(self.draw(), reference), "samples differ"

    def draw(self, **options):
        return logistic_mixture_sample(self.params, channels=self.channels, seed=self.seed, **options)


def written(x, params):
    return eager(x, params.float())


def log_prob(memory_format, stated, case):
    work = Work(memory_format, case)
    variants = {"fused": lambda: logistic_mixture_log_prob(*work.inputs), "eager": lambda: written(*work.inputs)}
    return Benchmark(
        variants, work.check, inputs=work.inputs, oracle=partial(reference_log_prob, bins=BINS),
        compiles=(written, work.inputs), cost=calls.cost("logistic_mixture_log_prob", *work.forward),
        elements=work.pixels, goals=_goals(stated, case),
    )  # fmt: skip


def forward_and_backward(memory_format, stated, case):
    work = Work(memory_format, case)
    leaf = calls.leaves(work.params)
    ours = calls.both(lambda params: logistic_mixture_log_prob(work.x, params), work.grad)
    plain = calls.both(lambda params: written(work.x, params), work.grad.float())
    names = ("logistic_mixture_log_prob", "logistic_mixture_log_prob_backward")
    return Benchmark(
        {"fused": lambda: ours(*leaf), "eager": lambda: plain(*leaf)}, work.check, compiles=(plain, leaf),
        cost=calls.cost(names[0], *work.forward) + calls.cost(names[1], *work.backward), elements=work.pixels,
        goals=_goals(stated, case),
    )  # fmt: skip


def sample(memory_format, stated, case):
    work = Work(memory_format, case)

    def plain(params):
        return eager_sample(params.float(), work.channels)

    variants = {
        "fused": work.draw,
        "eager": lambda: plain(work.params),
    }
    return Benchmark(
        variants, work.check_sample, inputs=(work.params,), compiles=(plain, (work.params,)),
        cost=calls.cost("logistic_mixture_sample", *work.sample), elements=work.pixels, goals=_goals(stated, case),
    )  # fmt: skip


def _goals(stated, case):
    return (faster("eager", 5.0),) * (case.label in stated and case.dtype == torch.float32)


_ROWS = {
    "logistic_mixture_log_prob": log_prob,
    "logistic_mixture_log_prob, forward and backward": forward_and_backward,
    "logistic_mixture_sample": sample,
}
for _layout, _format in FORMATS.items():
    _stated = ("CIFAR-10",) if _layout else ("CIFAR-10", "MNIST")
    for _name, _make in _ROWS.items():
        _quick = () if _layout or _make is forward_and_backward else None
        register(
            _name + _layout, shapes=SHAPES, dtypes=("float32", "bfloat16"), group="logistic_mixture", quick=_quick,
            axes={"batch": 0, "components": 2}, gate=_name == "logistic_mixture_log_prob" and not _layout,
        )(partial(_make, _format, _stated))  # fmt: skip
