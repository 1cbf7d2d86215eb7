"""UniPC: predictor and corrector in one row per evaluation."""

import numpy as np

from genengine.solvers._exponential import half_log_snr, moments, order_at, usable
from genengine.solvers._model import Model, Point, Row, X, one_of, remembered, solver


@solver
def unipc(model: Model, *, order: int = 2, form: str = "bh2", lower_order_final: bool = True) -> list[Row]:
    """UniPC in x0: a multistep predictor whose result is corrected with the evaluation made at it.

    With h the step in lambda = log(alpha/sigma) and D_k = (x0_k - x0)/r_k for the earlier x0, r_k their lambda
    relative to this step's (0 at its start, 1 at its end),
    x' = (sigma'/sigma) x + alpha' ((1 - exp(-h)) x0 + sum_k c_k D_k), sum_k c_k r_k^i = J_(i+1) for all i,
    J_i the integral over [0, 1] of h exp(-h (1 - s)) s^i ds. The corrector adds the x0 evaluated at x', at r = 1.
    With a single D, c is h/2 ("bh1") or (1 - exp(-h))/2 ("bh2"). Both steps span the same interval, so the
    corrected state is x' plus weights times x0's, and the next row applies it before its own prediction: one row
    per evaluation, and no stored state. The last `order` x0 rotate through H1..H3.

    Arguments and returns: see the module.
        order: of the predictor, 1 to 3; the corrector is one order higher. The first steps have lower order.
        form: "bh1" or "bh2", the two functions B(h) of the paper.
        lower_order_final: the last two steps have at most orders 2 and 1, as in the paper's code.
    Zhao 2023 (UniPC), Alg. 1 and 2, multistep in data prediction.

    Raises:
        ValueError: as the module says, where order is not 1 to 3 or form is neither "bh1" nor "bh2".
    """
    one_of("unipc", "order", order, (1, 2, 3))
    one_of("unipc", "form", form, ("bh1", "bh2"))
    lam = [half_log_snr(point) for point in model.points]
    rows, correction = [], {}
    for i, (now, end) in enumerate(model.steps):
        used = usable(lam, i, order_at(len(model.steps), i, order, lower_order_final))
        decay = end.sigma / now.sigma
        predictor = _weights(lam, i, used[1:], end, form)
        weights = {j: decay * correction.get(j, 0.0) + predictor.get(j, 0.0) for j in correction | predictor}
        history, writes = remembered(i, weights, order)
        rows.append(model.row(now, decay * X + weights[i] * model.x0(now), history=history, writes=writes))
        correction = {}
        if np.isfinite(lam[i + 1] - lam[i]):
            corrector = _weights(lam, i, [*used[1:], i + 1], end, form)
            correction = {j: weight - predictor.get(j, 0.0) for j, weight in corrector.items()}
    return rows


def _weights(lam: list[float], i: int, others: list[int], end: Point, form: str) -> dict[int, float]:
    """The weights in x' of x0 at step i and at the points `others`."""
    h = lam[i + 1] - lam[i]
    if not np.isfinite(h):
        return {i: end.alpha}
    r = np.array([(lam[j] - lam[i]) / h for j in others])
    integrals = moments(h, len(r) + 1)
    if len(r) == 1:
        c = np.array([h if form == "bh1" else integrals[0]]) / 2
    else:
        c = np.linalg.solve(np.vander(r, increasing=True).T, integrals[1:])
    weights = {j: end.alpha * weight for j, weight in zip(others, c / r, strict=True)}
    return {i: end.alpha * (integrals[0] - np.sum(c / r)), **weights}
