"""What a network predicts, as linear pairs.

On a path x = alpha x0 + sigma eps, a network's output is one of

    eps        the noise
    x0         the clean data
    v          alpha eps - sigma x0                      (Salimans & Ho 2022)
    velocity   d_alpha x0 + d_sigma eps = dx/dt          (flow matching)
    score      -eps / sigma                              (Song 2021)

Each is linear in (x, output), so x0, eps and velocity are p*x + q*output with a pair (p, q) that depends on t
alone; likewise each training target is c_x0*x0 + c_eps*eps. Arguments may be numbers, arrays or tensors: only
arithmetic operators touch them. For numbers and NumPy arrays a singular end is refused; on tensors, where the
check would wait for the device, it shows as inf or nan.
"""

import numpy as np

PREDICTIONS = ("eps", "x0", "v", "velocity", "score")


def to_x0(prediction: str, alpha, sigma, d_alpha, d_sigma, *, t=None):
    """The pair (p, q) with x0 = p*x + q*output.

    eps: (x - sigma eps)/alpha; v: (alpha x - sigma v)/(alpha^2 + sigma^2);
    velocity: (d_sigma x - sigma velocity)/(alpha d_sigma - sigma d_alpha); score: (x + sigma^2 score)/alpha.

    Args:
        prediction: one of `PREDICTIONS`.
        alpha, sigma, d_alpha, d_sigma: the path at time t, see `paths.Path.coefficients`.
        t: the time, only to name it in an error.

    Returns:
        (p, q), each of the shape of alpha.

    Raises:
        ValueError: on an unknown prediction, or where x0 is not determined: eps and score at alpha = 0,
            velocity where d_sigma is infinite.
    """
    _known("to_x0", prediction)
    if prediction == "x0":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    if prediction == "v":
        return alpha / (alpha * alpha + sigma * sigma), -sigma / (alpha * alpha + sigma * sigma)
    if prediction == "velocity":
        _finite(prediction, d_alpha, d_sigma, t)
        det = alpha * d_sigma - sigma * d_alpha
        return d_sigma / det, -sigma / det
    _nonzero(prediction, "alpha", alpha, t)
    return 1.0 / alpha, (-sigma if prediction == "eps" else sigma * sigma) / alpha


def to_eps(prediction: str, alpha, sigma, d_alpha, d_sigma, *, t=None):
    """The pair (p, q) with eps = p*x + q*output.

    x0: (x - alpha x0)/sigma; v: (sigma x + alpha v)/(alpha^2 + sigma^2);
    velocity: (alpha velocity - d_alpha x)/(alpha d_sigma - sigma d_alpha); score: -sigma score.

    Args, returns: as `to_x0`.

    Raises:
        ValueError: on an unknown prediction, or where eps is not determined: x0 at sigma = 0, velocity where
            d_sigma is infinite.
    """
    _known("to_eps", prediction)
    if prediction == "eps":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    if prediction == "score":
        return 0.0 * alpha, -sigma
    if prediction == "v":
        return sigma / (alpha * alpha + sigma * sigma), alpha / (alpha * alpha + sigma * sigma)
    if prediction == "velocity":
        _finite(prediction, d_alpha, d_sigma, t)
        det = alpha * d_sigma - sigma * d_alpha
        return -d_alpha / det, alpha / det
    _nonzero(prediction, "sigma", sigma, t)
    return 1.0 / sigma, -alpha / sigma


def to_velocity(prediction: str, alpha, sigma, d_alpha, d_sigma, *, t=None):
    """The pair (p, q) with velocity = dx/dt = d_alpha x0 + d_sigma eps = p*x + q*output.

    Args, returns: as `to_x0`.

    Raises:
        ValueError: on an unknown prediction, or where the velocity is not determined: where d_sigma is
            infinite, eps and score at alpha = 0, x0 at sigma = 0.
    """
    _known("to_velocity", prediction)
    if prediction == "velocity":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    _finite(prediction, d_alpha, d_sigma, t)
    p0, q0 = to_x0(prediction, alpha, sigma, d_alpha, d_sigma, t=t)
    p1, q1 = to_eps(prediction, alpha, sigma, d_alpha, d_sigma, t=t)
    return d_alpha * p0 + d_sigma * p1, d_alpha * q0 + d_sigma * q1


def target(prediction: str, alpha, sigma, d_alpha, d_sigma, *, t=None):
    """The pair (c_x0, c_eps) with training target = c_x0*x0 + c_eps*eps.

    Args: as `to_x0`.

    Returns:
        (c_x0, c_eps), each of the shape of alpha.

    Raises:
        ValueError: on an unknown prediction, the score at sigma = 0, or a velocity with an infinite
            derivative.
    """
    _known("target", prediction)
    if prediction == "eps":
        return 0.0 * alpha, 1.0 + 0.0 * alpha
    if prediction == "x0":
        return 1.0 + 0.0 * alpha, 0.0 * alpha
    if prediction == "v":
        return -sigma, alpha
    if prediction == "velocity":
        _finite(prediction, d_alpha, d_sigma, t)
        return d_alpha, d_sigma
    _nonzero(prediction, "sigma", sigma, t)
    return 0.0 * alpha, -1.0 / sigma


def _known(function: str, prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"{function}: prediction must be one of {PREDICTIONS}, got {prediction!r}")


def _on_host(value) -> bool:
    return isinstance(value, int | float | np.ndarray | np.generic)


def _at(t) -> str:
    return "" if t is None else f" at t = {t}"


def _nonzero(prediction: str, name: str, value, t) -> None:
    if _on_host(value) and np.any(value == 0):
        inward = "start the grid below" if name == "alpha" else "keep t above"
        raise ValueError(
            f"prediction '{prediction}': needs {name} > 0, got {name} = 0{_at(t)}; {inward} "
            "that end of the path, or use a model that predicts v or velocity"
        )


def _finite(prediction: str, d_alpha, d_sigma, t) -> None:
    if _on_host(d_sigma) and not (np.all(np.isfinite(d_sigma)) and np.all(np.isfinite(d_alpha))):
        raise ValueError(
            f"prediction '{prediction}': needs finite derivatives of the path, got "
            f"d_alpha = {d_alpha}, d_sigma = {d_sigma}{_at(t)}; keep t off that end of the path"
        )
