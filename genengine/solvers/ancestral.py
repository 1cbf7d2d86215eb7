"""Single-step solvers that add fresh noise: DDPM, DDIM with eta and their kin."""

import numpy as np

from genengine.solvers._model import Model, Point, Row, finite_eta, kept, one_of, solver


@solver
def ddpm(model: Model, *, variance: str = "small") -> list[Row]:
    """Ancestral sampling: x' = mean of q(x_t' | x_t, x0) at the model's x0, plus noise.

    With k = alpha sigma'/(alpha' sigma) the mean is alpha' x0 + k sigma' eps, and the standard deviation is
    sigma' sqrt(1 - k^2) ("small", the posterior's) or sigma sqrt(1 - k^2) ("large", the forward step's,
    sqrt(beta) of DDPM). With "learned_range" the network has twice the channels and the second half, v from -1 to
    1, chooses between the two: with lo and hi the log variances of "small" and "large" the standard deviation is
    exp((lo + hi)/4) exp((hi - lo)/4 v). A step to sigma' = 0 adds no noise.

    Arguments and returns: see the module. Ho 2020, eqs. 6-7, Alg. 2 and section 3.2; Nichol and Dhariwal 2021,
    eq. 15.

    Raises:
        ValueError: as the module says, and where variance is not "small", "large" or "learned_range".
    """
    one_of("ddpm", "variance", variance, ("small", "large", "learned_range"))
    rows = []
    for now, end in model.steps:
        k = kept(now, end)
        mean = end.alpha * model.x0(now) + k * end.sigma * model.eps(now)
        small, large = end.sigma * np.sqrt(1 - k * k), now.sigma * np.sqrt(1 - k * k)
        learned = 0.0
        if end.sigma == 0 or variance == "small":
            noise = small
        elif variance == "large":
            noise = large
        else:
            noise, learned = np.sqrt(small * large), 0.5 * np.log(large / small)
        rows.append(model.row(now, mean, noise=noise, learned=learned))
    return rows


@solver
def ddim(model: Model, *, eta: float = 0.0, eps: str = "x0") -> list[Row]:
    """DDIM: x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z.

    s = eta sigma' sqrt(1 - k^2), k = alpha sigma'/(alpha' sigma). Deterministic and first order at eta = 0;
    `ddpm` with the small variance at eta = 1.

    Arguments and returns: see the module.
        eta: the share of fresh noise, in [0, 1].
        eps: with clip, "x0" derives eps from the clipped x0 again, so that x is alpha x0 + sigma eps still; "model"
            keeps the network's own beside it, as diffusers does by default. Without clip they are the same.
    Song 2020 (DDIM), eqs. 12 and 16.

    Raises:
        ValueError: as the module says, where eta is outside [0, 1] or eps is neither "x0" nor "model".
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta!r}")
    one_of("ddim", "eps", eps, ("x0", "model"))
    return [_ancestral_row(model, now, end, eta, own_eps=eps == "model") for now, end in model.steps]


@solver
def euler_ancestral(model: Model, *, eta: float = 1.0) -> list[Row]:
    """Euler in relative noise r = sigma/alpha down to r_down, then noise up to r'.

    r_up = min(r', eta sqrt(r'^2 (r^2 - r'^2)/r^2)), r_down = sqrt(r'^2 - r_up^2),
    x' = alpha' (x0 + r_down eps + r_up z).
    For eta <= 1 this is `ddim` with the same eta; larger eta adds more noise until all of r' is fresh.

    Arguments and returns: see the module. The ancestral Euler sampler of k-diffusion, in any path's
    coordinates.

    Raises:
        ValueError: as the module says, and where eta is negative or not finite.
    """
    finite_eta("euler_ancestral", eta)
    return [_ancestral_row(model, now, end, eta) for now, end in model.steps]


def _ancestral_row(model: Model, now: Point, end: Point, eta: float, own_eps: bool = False) -> Row:
    k = kept(now, end)
    fresh = min(1.0, eta * np.sqrt(1 - k * k))  # the share of sigma' that is new noise
    eps = model.own_eps(now) if own_eps else model.eps(now)
    mean = end.alpha * model.x0(now) + end.sigma * np.sqrt(1 - fresh * fresh) * eps
    return model.row(now, mean, noise=end.sigma * fresh)
