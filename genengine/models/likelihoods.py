"""p(x | decoder output): what the maps that a decoder puts out say about the discrete pixels.

A pixel has one of L levels, level i standing for v_i = 2 i / (L - 1) - 1. All likelihoods but `Bernoulli` with L > 2
are of these levels, so that their bits per dimension can be compared:

    logistic      P(i) = F(v_i + h) - F(v_i - h), F of a logistic, h = 1 / (L - 1)       2 C maps: means, log-scales
    mixture       the same of a mixture over whole pixels, as PixelCNN++ has it         K (1 + 2 C + C (C - 1) / 2) maps
    gaussian      the same with F of a normal                                            2 C maps: means, log-scales
    categorical   softmax over the levels                                                L C maps, level by level
    binomial      the level is how many of L - 1 coins of probability p fell on one      C maps: logits of p
    bernoulli     cross-entropy of p and (x + 1) / 2: for L = 2 exact, and equal to     C maps: logits of p
                  "binomial"; else no likelihood of the levels

The lowest bin of the first three reaches down to -infinity, the highest up to infinity. Each likelihood has
`num_maps(C)`, `log_prob(maps, x) -> (B,)` in nats, `sample(maps, seed=...)` and `mean(maps)`, (B, C, H, W) float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine import ops
from genengine.ops.logistic_mixture import LOWEST_LOG_SCALE, params_per_component

NAMES = ("logistic", "mixture", "gaussian", "categorical", "binomial", "bernoulli")


def build(name, channels, num_levels, components=5):
    """The likelihood called `name` of images with `channels` channels of `num_levels` levels.

    Args:
        components: of "mixture".
    Raises:
        ValueError: unknown name, or values that it does not take.
    """
    where = "models/likelihoods.build"
    if name not in NAMES:
        raise ValueError(f"{where}: name must be one of {', '.join(NAMES)}, got {name!r}")
    if not isinstance(components, int) or components < 1:
        raise ValueError(f"{where}: components must be an int >= 1, got {components!r}")
    if name in ("logistic", "mixture") and channels > 4:
        raise ValueError(f"{where}: {name} takes 1 to 4 channels, got {channels}; use 'gaussian' or 'categorical'")
    if name == "mixture":
        return LogisticMixture(channels, num_levels, components)
    kinds = {"logistic": Logistic, "gaussian": Gaussian, "categorical": Categorical, "binomial": Binomial,
             "bernoulli": Bernoulli}  # fmt: skip
    return kinds[name](channels, num_levels)


def level_index(x, num_levels) -> Tensor:
    """The level of each pixel, round((x + 1) (L - 1) / 2) in 0 .. L - 1, int64."""
    return torch.round((x + 1) * (0.5 * (num_levels - 1))).clamp(0, num_levels - 1).long()


def level_value(index, num_levels) -> Tensor:
    """2 i / (L - 1) - 1, float32."""
    return (2 * index.float() - (num_levels - 1)) / (num_levels - 1)


class Likelihood:
    """What all share. exact: log_prob is of the discrete levels."""

    exact = True

    def __init__(self, channels, num_levels):
        self.channels, self.num_levels = channels, num_levels

    def num_maps(self) -> int:
        """Maps of the decoder's output."""
        raise NotImplementedError

    def log_prob(self, maps, x) -> Tensor:
        """log p(x | maps) in nats, (B,) float32; maps (B, num_maps, H, W), x (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    def sample(self, maps, *, seed, sample_ids=None, step=0) -> Tensor:
        """One draw per pixel, (B, C, H, W) float32 on the levels; stream "uniform" of (seed, sample, step)."""
        raise NotImplementedError

    def mean(self, maps) -> Tensor:
        """E[x | maps], (B, C, H, W) float32."""
        raise NotImplementedError

    def _uniform(self, maps, seed, sample_ids, step):
        shape = (len(maps), self.channels, *maps.shape[2:])
        return ops.uniform(shape, seed=seed, sample_ids=sample_ids, step=step, stream="uniform", device=maps.device)

    def _mean_of_levels(self, survival):
        """E[v] = -1 + 2 / (L - 1) sum_{i < L - 1} P(level > i), with survival(edge) = P(pixel's density > edge)."""
        edges = torch.arange(self.num_levels - 1, dtype=torch.float64) * (2 / (self.num_levels - 1)) - 1
        total = sum(survival(edge) for edge in (edges + 1 / (self.num_levels - 1)).tolist())
        return total * (2 / (self.num_levels - 1)) - 1


class LogisticMixture(Likelihood):
    """A discretised mixture of `components` logistics per pixel, its channels coupled: Salimans et al. 2017."""

    def __init__(self, channels, num_levels, components):
        super().__init__(channels, num_levels)
        self.components = components

    def num_maps(self):
        return self.components * params_per_component(self.channels)

    def log_prob(self, maps, x):
        return _per_image(ops.logistic_mixture_log_prob(x, maps, bins=self.num_levels))

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        return ops.logistic_mixture_sample(
            maps, channels=self.channels, bins=self.num_levels, seed=seed, sample_ids=sample_ids, step=step
        )

    def mean(self, maps):
        """Exact for one channel; a channel's mean is that given the means of those before it in the pixel."""
        k, c = self.components, self.channels
        logits, means, log_scales, couplings = maps.float().split([k, k * c, k * c, k * c * (c - 1) // 2], dim=1)
        weights = torch.softmax(logits, dim=1)
        scale = torch.exp(-log_scales.clamp_min(LOWEST_LOG_SCALE)).unflatten(1, (c, k))
        means, couplings = means.unflatten(1, (c, k)), iter(couplings.split(k, dim=1))
        found = []
        for channel in range(c):
            m = means[:, channel]
            for j in range(channel):
                m = m + torch.tanh(next(couplings)) * found[j][:, None]
            s = scale[:, channel]
            found.append(self._mean_of_levels(lambda edge, m=m, s=s: (weights * torch.sigmoid((m - edge) * s)).sum(1)))
        return torch.stack(found, dim=1)


class Logistic(Likelihood):
    """One discretised logistic per pixel and channel; `ops.logistic_mixture_*` with one component, uncoupled."""

    def num_maps(self):
        return 2 * self.channels

    def log_prob(self, maps, x):
        return _per_image(ops.logistic_mixture_log_prob(x, self._padded(maps), bins=self.num_levels))

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        return ops.logistic_mixture_sample(
            self._padded(maps), channels=self.channels, bins=self.num_levels, seed=seed, sample_ids=sample_ids,
            step=step,
        )  # fmt: skip

    def mean(self, maps):
        m, log_scale = maps.float().chunk(2, dim=1)
        s = torch.exp(-log_scale.clamp_min(LOWEST_LOG_SCALE))
        return self._mean_of_levels(lambda edge: torch.sigmoid((m - edge) * s))

    def _padded(self, maps):
        """With the logit of the one component and the couplings, all zero."""
        size = maps.shape[2:]
        pairs = self.channels * (self.channels - 1) // 2
        return torch.cat([maps.new_zeros(len(maps), 1, *size), maps, maps.new_zeros(len(maps), pairs, *size)], dim=1)


class Gaussian(Likelihood):
    """A discretised normal per pixel and channel; log-scales below -7 count as -7."""

    def num_maps(self):
        return 2 * self.channels

    def log_prob(self, maps, x):
        """log(Phi(a) - Phi(b)) with a, b = (v +- h - mean) / scale, on the side where Phi is small:
        log Phi(upper) + log(1 - Phi(lower) / Phi(upper)); the density times the width where that is below 0.02."""
        m, log_scale = maps.float().chunk(2, dim=1)
        log_scale = log_scale.clamp_min(LOWEST_LOG_SCALE)
        index, h = level_index(x, self.num_levels), 1 / (self.num_levels - 1)
        inverse, centred = torch.exp(-log_scale), level_value(index, self.num_levels) - m
        a, b = (centred + h) * inverse, (centred - h) * inverse
        large = _log_ndtr(torch.where(centred > 0, -b, a))
        gap = (_log_ndtr(torch.where(centred > 0, -a, b)) - large).clamp_max(-1e-6)
        inside = large + torch.log(-torch.expm1(gap))
        density = -0.5 * (centred * inverse).square() + math.log(2 * h / math.sqrt(2 * math.pi)) - log_scale
        inside = torch.where(2 * h * inverse < 0.02, density, inside)
        ends = _log_ndtr(torch.where(index == 0, a, -b))
        at_end = (index == 0) | (index == self.num_levels - 1)
        return _per_image(torch.where(at_end, ends, inside))

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        m, log_scale = maps.float().chunk(2, dim=1)
        scale = torch.exp(log_scale.clamp_min(LOWEST_LOG_SCALE))
        z = torch.special.ndtri(self._uniform(maps, seed, sample_ids, step).double()).float()
        return level_value(level_index(m + scale * z, self.num_levels), self.num_levels)

    def mean(self, maps):
        m, log_scale = maps.float().chunk(2, dim=1)
        s = torch.exp(-log_scale.clamp_min(LOWEST_LOG_SCALE))
        return self._mean_of_levels(lambda edge: torch.special.ndtr((m - edge) * s))


class Categorical(Likelihood):
    """A free distribution over the levels of each pixel and channel; map i C + c is level i of channel c."""

    def num_maps(self):
        return self.num_levels * self.channels

    def log_prob(self, maps, x):
        log_p = torch.log_softmax(self._levels(maps), dim=1)
        return _per_image(log_p.gather(1, level_index(x, self.num_levels)[:, None]))

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        cumulative = torch.softmax(self._levels(maps), dim=1).cumsum(1)
        target = self._uniform(maps, seed, sample_ids, step)[:, None] * cumulative[:, -1:]
        index = (cumulative <= target).sum(1).clamp_max(self.num_levels - 1)
        return level_value(index, self.num_levels)

    def mean(self, maps):
        values = level_value(torch.arange(self.num_levels, device=maps.device), self.num_levels)
        return torch.einsum("bl...,l->b...", torch.softmax(self._levels(maps), dim=1), values)

    def _levels(self, maps):
        return maps.float().unflatten(1, (self.num_levels, self.channels))  # (B, L, C, H, W)


class Binomial(Likelihood):
    """The level is binomial, of L - 1 trials with probability p = sigmoid(map)."""

    def num_maps(self):
        return self.channels

    def log_prob(self, maps, x):
        n = self.num_levels - 1
        index = level_index(x, self.num_levels).float()
        choose = math.lgamma(n + 1) - torch.lgamma(index + 1) - torch.lgamma(n - index + 1)
        return _per_image(index * F.logsigmoid(maps.float()) + (n - index) * F.logsigmoid(-maps.float()) + choose)

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        """By the inverse of the distribution function, level by level."""
        n = self.num_levels - 1
        u = self._uniform(maps, seed, sample_ids, step).double()
        log_p, log_q = F.logsigmoid(maps.double()), F.logsigmoid(-maps.double())
        cumulative, index = torch.zeros_like(u), torch.zeros_like(u)
        for i in range(n):
            choose = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            cumulative = cumulative + torch.exp(choose + i * log_p + (n - i) * log_q)
            index = index + (cumulative <= u)
        return level_value(index, self.num_levels)

    def mean(self, maps):
        return 2 * torch.sigmoid(maps.float()) - 1


class Bernoulli(Likelihood):
    """Binary pixels; levels between are read as probabilities, and then log_prob is a mere cross-entropy."""

    def __init__(self, channels, num_levels):
        super().__init__(channels, num_levels)
        self.exact = num_levels == 2

    def num_maps(self):
        return self.channels

    def log_prob(self, maps, x):
        return -_per_image(F.binary_cross_entropy_with_logits(maps.float(), 0.5 * (x.float() + 1), reduction="none"))

    def sample(self, maps, *, seed, sample_ids=None, step=0):
        """Draws of the binary pixel; `mean` is the grey image."""
        return 2.0 * (self._uniform(maps, seed, sample_ids, step) < torch.sigmoid(maps.float())) - 1.0

    def mean(self, maps):
        return 2 * torch.sigmoid(maps.float()) - 1


def _log_ndtr(x):
    """log Phi(x) with a finite gradient however far out, -x^2 / 2 + log(erfcx(-x / sqrt(2)) / 2) below -5."""
    far = -0.5 * x.square() + torch.log(0.5 * torch.special.erfcx(x.clamp_max(-4.0) * -math.sqrt(0.5)))
    return torch.where(x < -5.0, far, torch.special.log_ndtr(x.clamp_min(-6.0)))


def _per_image(values):
    """Sum over everything but the batch, (B,)."""
    return values.reshape(len(values), values.shape[1:].numel()).sum(1)
