"""Solvers write tables: (path, grid) -> CoefficientTable. They never see a tensor.

Without clipping, x0, eps and velocity are affine in (x, m) and the coefficient c is 0. With `clip`,
y = clamp(x0, -clip, clip), and eps and velocity are derived again from x and the clipped x0:
eps = (x - alpha y)/sigma.

All solvers share these arguments:
    path: a `paths.Path`.
    grid: (num_steps + 1,) strictly falling times in [0, 1], see `schedules`.
    prediction: what the network predicts, one of `prediction.PREDICTIONS`.
    guidance_scale: the weight g1 in m = out_0 + g1 (out_1 - out_0), a number or (B,); without a second branch
        unused.
    clip: the radius that x0 is clamped to, or None.
    model_time: maps t to what the network expects as its time; by default t itself.
    input_scale: maps t to the factor on the network's input, for example
        `lambda t: 1/np.hypot(sigma_data, path.sigma(t))` for EDM networks; by default 1.
They raise ValueError on an invalid grid, clip or prediction, and where the prediction is singular at a time
of the grid, as eps is at alpha = 0.
"""

from genengine.solvers.ancestral import ddim, ddpm, euler_ancestral
from genengine.solvers.churn import edm
from genengine.solvers.multistep import dpmpp_2m, dpmpp_2m_sde, lms
from genengine.solvers.ode import dpm_2, euler, heun
from genengine.solvers.stochastic import (
    dpm_2_ancestral,
    dpm_fast,
    dpmpp_2m_sde_heun,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)

SOLVERS = {
    solver.__name__: solver
    for solver in (
        euler,
        heun,
        dpm_2,
        ddpm,
        ddim,
        euler_ancestral,
        dpmpp_2m,
        dpmpp_2m_sde,
        lms,
        edm,
        dpm_2_ancestral,
        dpmpp_2s_ancestral,
        dpmpp_sde,
        dpmpp_2m_sde_heun,
        dpmpp_3m_sde,
        dpm_fast,
    )
}
