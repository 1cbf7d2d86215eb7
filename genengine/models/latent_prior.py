"""Mixtures of Gaussians over latents: fitted by expectation-maximisation, kept with the model as buffers.

A fit to the aggregated posterior, sum_i q(z | x_i) / n, closes most of the gap between it and N(0, 1): better samples,
and a better bound of the likelihood, without touching the network. Ghosh et al. 2020, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genengine import ops

COVARIANCES = ("full", "diag")


def em_fit(z, components, *, covariance="full", seed=0, step=0, iterations=200, floor=1e-3, tolerance=1e-6):
    """Maximum likelihood of sum_k w_k N(z; mean_k, C_k) by expectation-maximisation, in float64.

    The means start at points drawn as by k-means++ (Arthur & Vassilvitskii 2007) with uniforms of (seed, step, stream
    "model"), the covariances at that of all points; the E-step's responsibilities are
    r_ik = w_k N(z_i; mean_k, C_k) / sum_j w_j N(z_i; mean_j, C_j), the M-step's moments are weighted by them.

    Args:
        z: (N, D), N >= components.  components: K >= 1.  covariance: "full" or "diag".
        iterations: at most.  floor: added to every variance.  tolerance: of the mean log-likelihood; stops below.
    Returns:
        weights (K,), means (K, D), factors (K, D, D): lower-triangular F with C = F F^T; all float64.
    Raises:
        ValueError: fewer points than components, or parameters out of range.
    """
    where = "models/latent_prior.em_fit"
    if covariance not in COVARIANCES:
        raise ValueError(f"{where}: covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}")
    if not isinstance(components, int) or components < 1 or len(z) < components:
        raise ValueError(f"{where}: components must be 1 .. {len(z)}, the number of points, got {components!r}")
    z = z.double()
    means = _spread_points(z, components, seed, step)
    centred = z - z.mean(0)
    covariances = _shaped(centred.T @ centred / len(z), covariance, floor).expand(components, -1, -1)
    weights, last = z.new_full((components,), 1 / components), -math.inf
    for _ in range(iterations):
        factors = torch.linalg.cholesky(covariances)
        joint = weights.log() + component_log_prob(z, means, factors)  # (N, K)
        total = torch.logsumexp(joint, dim=1)
        mean_log_prob = float(total.mean())
        if mean_log_prob - last < tolerance:
            break
        last = mean_log_prob
        r = torch.exp(joint - total[:, None])
        count = r.sum(0).clamp_min(1e-10)
        weights, means = count / count.sum(), (r.T @ z) / count[:, None]
        centred = (z - mean for mean in means)  # one component at a time: (N, D)
        second = [(r[:, k, None] * d).T @ d / count[k] for k, d in enumerate(centred)]
        covariances = _shaped(torch.stack(second), covariance, floor)
    return weights, means, torch.linalg.cholesky(covariances)


def component_log_prob(z, means, factors) -> Tensor:
    """log N(z_i; mean_k, F_k F_k^T), (N, K); z (N, D), means (K, D), factors (K, D, D) lower-triangular."""
    found = []
    for mean, factor in zip(means, factors, strict=True):
        white = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)  # (D, N)
        found.append(-0.5 * white.square().sum(0) - torch.diagonal(factor).log().sum())
    return torch.stack(found, dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _spread_points(z, count, seed, step):
    """k-means++: each next point with a probability proportional to its squared distance from those chosen."""
    u = ops.uniform((1, count), seed=seed, step=step, stream="model")[0].double()
    chosen = [int(u[0] * len(z))]
    distance = (z - z[chosen[0]]).square().sum(1)
    for i in range(1, count):
        reach = distance.cumsum(0)
        chosen.append(min(int(torch.searchsorted(reach, u[i].to(z.device) * reach[-1])), len(z) - 1))
        distance = torch.minimum(distance, (z - z[chosen[-1]]).square().sum(1))
    return z[chosen].clone()


def _shaped(covariances, kind, floor):
    """With `floor` on the diagonal, and nothing beside it for "diag"."""
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    return (covariances * eye if kind == "diag" else covariances) + floor * eye


class MixturePrior(nn.Module):
    """p(z | y) = sum_k w_yk N(z; mean_yk, F_yk F_yk^T), one mixture per class or one for all; buffers only.

    Args:
        classes: mixtures, 1 for an unconditional model.  components: K.  dim: D, latents flattened.
    """

    def __init__(self, classes, components, dim):
        super().__init__()
        self.register_buffer("weights", torch.zeros(classes, components))  # all zero: not fitted
        self.register_buffer("means", torch.zeros(classes, components, dim))
        self.register_buffer("factors", torch.zeros(classes, components, dim, dim))

    @property
    def fitted(self) -> bool:
        return bool((self.weights.sum(1) > 0).all())

    @torch.no_grad()
    def fit(self, z, labels, *, covariance, seed):
        """`em_fit` to each class's points: z (N, D), labels (N,) int64 or None for one mixture."""
        for group in range(len(self.weights)):
            own = z if labels is None else z[labels == group]
            if len(own) == 0:
                raise ValueError(f"models/latent_prior: every class needs latents, got none of class {group}")
            k = min(self.weights.shape[1], len(own))
            weights, means, factors = em_fit(own, k, covariance=covariance, seed=seed, step=group)
            self.weights[group].zero_()[:k] = weights
            self.means[group, :k], self.factors[group, :k] = means.float(), factors.float()
            self.means[group, k:], self.factors[group, k:] = means[0].float(), factors[0].float()  # of weight 0

    def log_prob(self, z, labels=None) -> Tensor:
        """log p(z | y) in nats, (N,) float32; z (N, D), labels (N,) int64 if there is a mixture per class."""
        if len(self.weights) == 1:
            return self._log_prob(z, 0)
        found = z.new_empty(len(z))
        for group in labels.unique().tolist():
            mine = labels == group
            found[mine] = self._log_prob(z[mine], group)
        return found

    def _log_prob(self, z, group):
        joint = self.weights[group].double().log() + component_log_prob(
            z.double(), self.means[group].double(), self.factors[group].double()
        )
        return torch.logsumexp(joint, dim=1).to(z.dtype)

    def sample(self, num, labels=None, *, seed, sample_ids=None, temperature=1.0) -> Tensor:
        """z = mean_k + temperature F_k eps, (num, D): k by a uniform of stream "model", eps of stream "init"."""
        draw = {"seed": seed, "sample_ids": sample_ids, "device": self.means.device}
        u = ops.uniform((num, 1), stream="model", **draw)
        eps = ops.normal((num, self.means.shape[-1]), stream="init", **draw)
        group = torch.zeros(num, dtype=torch.int64, device=u.device) if len(self.weights) == 1 else labels
        cumulative = self.weights[group].cumsum(1)
        k = (cumulative <= u * cumulative[:, -1:]).sum(1).clamp_max(self.weights.shape[1] - 1)
        return self.means[group, k] + temperature * torch.einsum("nde,ne->nd", self.factors[group, k], eps)
