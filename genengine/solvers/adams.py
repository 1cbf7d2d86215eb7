"""Multistep solvers of the noise form d(x/alpha) = eps d(sigma/alpha): earlier eps wait in the history.

None of them clips: the history would have to hold the eps of a clipped x0, which is not one of y's forms.
At alpha = 0, x/alpha is infinite: a step from there is `ddim`'s, alpha' x0 + sigma' eps.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from genengine.solvers._exponential import half_log_snr, moments, order_at, usable
from genengine.solvers._model import Model, Point, Row, X, one_of, remembered, solver

# Adams-Bashforth weights of the newest eps first, by the number of eps there are
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@solver(clips=False)
def lms(model: Model, *, order: int = 4) -> list[Row]:
    """Linear multistep (Adams-Bashforth) in relative noise r = sigma/alpha, where d(x/alpha)/dr = eps.

    x'/alpha' = x/alpha + sum_j w_j eps_j, w_j the integral over [r, r'] of the Lagrange polynomial of the
    last `order` noise levels. The earlier eps rotate through H1..H3; the first steps have lower order, so for
    order > 2 the error is smaller but, strictly, of order 2. A step from alpha = 0 is `ddim`'s.

    Arguments and returns: see the module; there is no clip, because eps of a clipped x0 is not one of y's
    forms. Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.1 and III.5.

    Raises:
        ValueError: as the module says, and where order is not 1 to 4.
    """
    one_of("lms", "order", order, (1, 2, 3, 4))
    ratio = [point.sigma / point.alpha if point.alpha > 0 else np.inf for point in model.points]
    rows = []
    for i, (now, end) in enumerate(model.steps):
        used = [j for j in range(max(0, i - order + 1), i + 1) if np.isfinite(ratio[j])]
        nodes = [ratio[j] for j in used]
        weights = {j: end.alpha * _lagrange_integral(nodes, k, ratio[i], ratio[i + 1]) for k, j in enumerate(used)}
        rows.append(_eps_row(model, i, now, end, weights, order - 1))
    return rows


@solver(clips=False)
def deis(model: Model, *, order: int = 3, lower_order_final: bool = False) -> list[Row]:
    """DEIS, the tAB form: eps is extrapolated as a polynomial in log(sigma/alpha) and integrated exactly.

    With r = sigma/alpha, x'/alpha' = x/alpha + sum_j w_j eps_j, w_j the integral over [r, r'] of the Lagrange
    polynomial in log r of the last `order` evaluations. A step to sigma = 0 or from alpha = 0 is `ddim`'s. The
    earlier eps rotate through H1 and H2; the first steps have lower order.

    Arguments and returns: see the module.
        order: 1 to 3; 1 is `ddim`.
        lower_order_final: the last two steps have at most orders 2 and 1, which steadies sampling in few steps.
    There is no clip, as in `lms`. Zhang and Chen 2022 (DEIS), tAB-DEIS, with log r for the polynomial's variable.

    Raises:
        ValueError: as the module says, and where order is not 1 to 3.
    """
    one_of("deis", "order", order, (1, 2, 3))
    lam = [half_log_snr(point) for point in model.points]
    rows = []
    for i, (now, end) in enumerate(model.steps):
        used = usable(lam, i, order_at(len(model.steps), i, order, lower_order_final))
        h, weights = lam[i + 1] - lam[i], {}
        if np.isfinite(h):
            nodes = [(lam[j] - lam[i]) / h for j in used]
            integrals = end.sigma * moments(-h, len(used))  # of -h exp(h (1 - s)) s^k, the weight of eps
            weights = {j: float(_lagrange(nodes, k) @ integrals) for k, j in enumerate(used)}
        rows.append(_eps_row(model, i, now, end, weights, order - 1))
    return rows


@solver(clips=False)
def plms(model: Model) -> list[Row]:
    """PNDM with linear multistep (PLMS): fourth-order Adams-Bashforth weights on eps inside a `ddim` step.

    x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e, e = (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3)/24.
    The first step is an improved Euler step of two rows, e the mean of eps at its ends; the second and third use
    two and three eps. Second order. (The paper's other warm-up, three pseudo Runge-Kutta steps, holds more than
    three tensors.) The earlier eps rotate through H1..H3.

    Arguments, returns and errors: see the module; a first step from alpha = 0 or to sigma = 0 is `ddim`'s, and there
    is no clip, as in `lms`. Liu 2022 (PNDM).
    """
    rows = _classical_rows(model, 4)
    now, end = model.steps[0]
    if end.sigma == 0 or now.alpha == 0:
        return rows
    # rows[0] has led to x' with eps at the start alone; half of the way to eps at the end is missing
    half = (end.sigma - end.alpha * now.sigma / now.alpha) / 2
    correction = model.row(end, X + half * model.eps(end), history=(-half,))
    return [rows[0], correction, *rows[1:]]


@solver(clips=False)
def ipndm(model: Model, *, order: int = 4) -> list[Row]:
    """IPNDM: Adams-Bashforth weights on eps inside a `ddim` step, started at first order.

    x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e with e = eps, (3 eps - eps_1)/2,
    (23 eps - 16 eps_1 + 5 eps_2)/12, and then as in `plms`. The weights are those of even steps, so the order is 2
    on a grid whose steps in sigma/alpha differ; `lms` has the weights of the grid's own steps. A step from alpha = 0 is
    `ddim`'s.

    Arguments and returns: see the module.
        order: 1 to 4, the number of eps that a step uses.
    There is no clip, as in `lms`. Zhang and Chen 2022 (DEIS), iPNDM; the weights are those of Liu 2022 (PNDM).

    Raises:
        ValueError: as the module says, and where order is not 1 to 4.
    """
    one_of("ipndm", "order", order, (1, 2, 3, 4))
    return _classical_rows(model, order)


def _classical_rows(model: Model, order: int) -> list[Row]:
    rows = []
    for i, (now, end) in enumerate(model.steps):
        weights = {}
        if now.alpha > 0:
            scale = end.sigma - end.alpha * now.sigma / now.alpha
            weights = {i - k: scale * w for k, w in enumerate(ADAMS_BASHFORTH[min(i + 1, order)])}
        rows.append(_eps_row(model, i, now, end, weights, order - 1))
    return rows


def _eps_row(model: Model, i: int, now: Point, end: Point, weights: Mapping[int, float], size: int) -> Row:
    """x' = (alpha'/alpha) x + sum of weights[j] eps_j, earlier eps from `size` registers; without weights as `ddim`."""
    history, writes = remembered(i, weights, size)
    if weights:
        update = end.alpha / now.alpha * X + weights[i] * model.eps(now)
    else:
        update = end.alpha * model.x0(now) + end.sigma * model.eps(now)
    return model.row(now, update, y=model.eps(now), history=history, writes=writes)


def _lagrange(nodes: Sequence[float], index: int, origin: float = 0.0) -> np.ndarray:
    """Coefficients, lowest first, in x - origin, of the polynomial that is 1 at nodes[index], 0 at other nodes."""
    basis = np.ones(1)
    for k, node in enumerate(nodes):
        if k != index:
            basis = np.convolve(basis, (origin - node, 1.0)) / (nodes[index] - node)
    return basis


def _lagrange_integral(nodes: Sequence[float], index: int, start: float, stop: float) -> float:
    """The integral over [start, stop] of the polynomial that is 1 at nodes[index], 0 at the other nodes."""
    basis = _lagrange(nodes, index, start)  # from start, so that the integral of short steps does not cancel
    powers = np.arange(1, len(basis) + 1)
    return float(np.sum(basis * (stop - start) ** powers / powers))
