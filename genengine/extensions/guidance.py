"""Guidance beyond a constant weight: m = w_u u + w_c c, with weights that the outputs themselves decide.

u is the unconditional branch, c the conditional one, w the table's g1. All methods but the per-channel one follow from
six sums per sample, one pass over the outputs (`ops.guidance_moments`), and a few numbers per sample written into the
current row: w_u u + w_c c = f (u + g1 (c - u)) with f = w_u + w_c and g1 = w_c / f, so b and q are multiplied by f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from genengine.extensions._protocol import Extension, Run
from genengine.ops import guidance_moments
from genengine.table import CoefficientTable

_SMALLEST = 1e-6  # of |f|: below it g1 = w_c / f would lose u


class Moments(NamedTuple):
    """Sums over a sample, each (B,) float64, and the number n of its elements."""

    u: Tensor
    c: Tensor
    uu: Tensor
    uc: Tensor
    cc: Tensor
    dd: Tensor
    n: int


class _Weighted(Extension):
    """Guidance by two weights per sample."""

    guides = True

    def weights(self, sums: Moments, w: Tensor) -> tuple[Tensor, Tensor]:
        """(w_u, w_c), each (B,) float64, of the sums and the guidance weight w (B,)."""
        raise NotImplementedError

    def scale(self, run: Run, f: Tensor) -> Tensor:
        """What b and q are multiplied by, (B,)."""
        return f

    def start(self, run: Run) -> None:
        _two_branches(self, run)

    def before_row(self, run: Run, outputs: tuple[Tensor, ...]) -> None:
        g1, b, q = run.read("g1", "b", "q")
        sums = Moments(*guidance_moments(outputs).double().unbind(1), n=outputs[0][0].numel())
        w_u, w_c = self.weights(sums, g1.double())
        f = w_u + w_c
        f = f.abs().clamp_min_(_SMALLEST).copysign_(f)
        scale = self.scale(run, f)
        run.write(g1=w_c / f, b=b * scale, q=q * scale)


@dataclass
class Rescale(_Weighted):
    """Guidance rescaled to the conditional output's standard deviation, against over-exposure.

        m  = u + w (c - u)
        m' = phi m std(c)/std(m) + (1 - phi) m          std over all elements of a sample

    The deviations come from sums rounded to float32: they lose digits where a sample's mean is far above its spread.

    Args:
        phi: how much of it, in [0, 1].
    Raises:
        ValueError: phi out of range; at the start of the run, unless the model has two branches.
    Lin et al. 2024, Common diffusion noise schedules and sample steps are flawed, eqs. 14-16.
    """

    phi: float = 0.7

    def __post_init__(self):
        if not 0 <= self.phi <= 1:
            raise ValueError(f"Rescale: phi must be in [0, 1], got {self.phi!r}")

    def weights(self, sums, w):
        d, ud = sums.c - sums.u, sums.uc - sums.uu
        centred = lambda ab, a, b: torch.addcmul(ab, a, b, value=-1 / sums.n)  # noqa: E731
        spread_u, spread_c = centred(sums.uu, sums.u, sums.u), centred(sums.cc, sums.c, sums.c)
        slope = torch.addcmul(2 * centred(ud, sums.u, d), w, centred(sums.dd, d, d))
        spread_m = torch.addcmul(spread_u, w, slope)  # of u + w d
        ratio = torch.where(spread_m > 0, spread_c.clamp_min(0) / spread_m, 1.0).sqrt()
        scale = self.phi * ratio + (1 - self.phi)
        return scale * (1 - w), scale * w


@dataclass
class CFGZeroStar(_Weighted):
    """Guidance from an unconditional branch scaled to fit the conditional one, and no step while the model is poor.

        m = s u + w (c - s u),    s = <c, u> / <u, u>
        m = 0 in the first `zero_init_steps` rows: a flow's state then stays as it is

    Args:
        zero_init_steps: rows whose output counts as zero, at least 0.
    Raises:
        ValueError: zero_init_steps out of range; at the start of the run, unless the model has two branches.
    Fan et al. 2025, CFG-Zero*: improved classifier-free guidance for flow matching models.
    """

    zero_init_steps: int = 1

    def __post_init__(self):
        if (
            isinstance(self.zero_init_steps, bool)
            or not isinstance(self.zero_init_steps, int)
            or self.zero_init_steps < 0
        ):
            raise ValueError(f"CFGZeroStar: zero_init_steps must be an int >= 0, got {self.zero_init_steps!r}")

    def weights(self, sums, w):
        s = torch.where(sums.uu > 0, sums.uc / sums.uu, 1.0)
        return s * (1 - w), w

    def scale(self, run, f):
        return f * (run.step >= self.zero_init_steps)


@dataclass
class Projected(_Weighted):
    """Adaptive projected guidance without momentum: the part of c - u along c, which over-saturates, is turned down.

        d  = (c - u) min(1, norm_threshold / |c - u|)
        d' = d - (1 - eta) (<d, c>/<c, c>) c
        m  = c + (w - 1) d'

    The outputs are projected as they are: that is the paper's method where the model predicts x0.

    Args:
        eta: what is left of the parallel part, in [0, 1]; 1 is plain guidance.
        norm_threshold: the largest length of c - u, above 0; None for none.
    Raises:
        ValueError: arguments out of range; at the start of the run, unless the model has two branches.
    Sadat et al. 2024, Eliminating oversaturation and artifacts of high guidance scales in diffusion models, Alg. 1.
    """

    eta: float = 0.0
    norm_threshold: float | None = None

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Projected: eta must be in [0, 1], got {self.eta!r}")
        if self.norm_threshold is not None and not 0 < self.norm_threshold < math.inf:
            raise ValueError(
                f"Projected: norm_threshold must be finite and above 0, or None, got {self.norm_threshold!r}"
            )

    def weights(self, sums, w):
        k = w - 1
        if self.norm_threshold is not None:
            k = k * torch.where(sums.dd > 0, self.norm_threshold / sums.dd.sqrt(), 1.0).clamp_max(1.0)
        parallel = torch.where(sums.cc > 0, (sums.cc - sums.uc) / sums.cc, 0.0)
        return -k, 1 + k * (1 - (1 - self.eta) * parallel)


@dataclass(eq=False)
class PerChannelGuidance(Extension):
    """A guidance weight for every channel, in place of the table's: m = u + w[channel] (c - u).

    The published DiT and SiT samplers guide the first three of four latent channels alone: weights (w, w, w, 1).

    Args:
        weights: (C,) or (B, C), finite, for a state (B, C, ...).
    Raises:
        ValueError: weights of another shape or not finite; at the start of the run, unless the model has two branches.
    """

    weights: Tensor
    guides = True

    def __post_init__(self):
        weights = torch.as_tensor(self.weights, dtype=torch.float32).detach()
        if weights.dim() not in (1, 2) or not weights.isfinite().all():
            raise ValueError(f"PerChannelGuidance: weights must be finite, (C,) or (B, C), got {tuple(weights.shape)}")
        self.weights = weights

    def start(self, run: Run) -> None:
        _two_branches(self, run)
        batch, channels = run.x.shape[:2] if run.x.dim() > 1 else (len(run.x), None)
        if self.weights.shape not in ((channels,), (batch, channels)):
            raise ValueError(
                f"PerChannelGuidance: weights must be (C,) = ({channels},) or (B, C) = ({batch}, {channels}), "
                f"got {tuple(self.weights.shape)}"
            )
        inner = [1] * (run.x.dim() - 2)
        self._weight = self.weights.to(run.x.device).reshape(-1, channels, *inner)
        self._m = run.buffer(run.model_dtype)

    def before_row(self, run: Run, outputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        u, c = outputs
        if u.dtype == torch.float32:
            torch.lerp(u, c, self._weight, out=self._m)
        else:
            self._m.copy_(torch.lerp(u.float(), c.float(), self._weight))
        return (self._m,)


@dataclass
class GuidanceInterval(Extension):
    """Guidance at middle times alone: outside t_low < t <= t_high the conditional output as it is, g1 = 1.

    See `CoefficientTable.with_guidance_interval`; as an extension it comes after `sample`'s own guidance argument.

    Args:
        t_low, t_high: model times, t_low < t_high.
    Raises:
        ValueError: unless t_low < t_high.
    Kynkaanniemi et al. 2024, Applying guidance in a limited interval improves sample and distribution quality.
    """

    t_low: float
    t_high: float

    def __post_init__(self):
        if not self.t_low < self.t_high:
            raise ValueError(f"GuidanceInterval: needs t_low < t_high, got {self.t_low!r} and {self.t_high!r}")

    def extend(self, table: CoefficientTable) -> CoefficientTable:
        return table.with_guidance_interval(self.t_low, self.t_high)


def _two_branches(extension, run):
    if run.num_branches != 2:
        raise ValueError(
            f"{type(extension).__name__}: the model must have two branches, got {run.num_branches}; "
            "pass cond and uncond"
        )
