"""Solvers write tables: (path, grid) -> CoefficientTable. They never see a tensor.

Without clipping, x0, eps and velocity are affine in (x, m) and the coefficient c is 0. With `clip`,
y = clamp(x0, -clip, clip), and eps and velocity are derived again from x and the clipped x0:
eps = (x - alpha y)/sigma.

All solvers share these arguments:
    path: a `paths.Path`.
    grid: (num_steps + 1,) strictly falling times in [0, 1], see `schedules`; rising for `INVERSE_SOLVERS`, which
        go from data to noise.
    prediction: what the network predicts, one of `prediction.PREDICTIONS`.
    guidance_scale: the weight g1 in m = out_0 + g1 (out_1 - out_0), a number or (B,); without a second branch
        unused.
    clip: the radius that x0 is clamped to, or None.
    model_time: maps t to what the network expects as its time; by default t itself.
    input_scale: maps t to the factor on the network's input, for example
        `lambda t: 1/np.hypot(sigma_data, path.sigma(t))` for EDM networks; by default 1.
They raise ValueError on an invalid grid, clip or prediction, and where the prediction is singular at a time
of the grid, as eps is at alpha = 0. `solver.clips` and `solver.needs_signal` say whether it takes `clip`, and whether
its grid must start where alpha > 0.

Under other names: flow-match Euler and Heun are `euler` and `heun` on `paths.RectifiedFlow`, flow-match LCM is
`consistency` there; the probability-flow ODE of a path is what `euler`, `heun`, `midpoint` and `rk4` integrate, and
its reverse SDE what `euler_maruyama(..., diffusion="sde")` does; DPM-Solver++ SDE is `dpmpp_2m_sde`, or singlestep
`dpmpp_sde`; PNDM without its Runge-Kutta warm-up is `plms`.
"""

from genengine.solvers.adams import deis, ipndm, lms, plms
from genengine.solvers.ancestral import ddim, ddpm, euler_ancestral
from genengine.solvers.churn import edm
from genengine.solvers.consistency import consistency, lcm
from genengine.solvers.inverse import ddim_inverse, dpmpp_2m_inverse
from genengine.solvers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from genengine.solvers.ode import dpm_2, euler, heun, midpoint, rk4
from genengine.solvers.sde import euler_maruyama
from genengine.solvers.singlestep import dpmpp_singlestep
from genengine.solvers.stochastic import (
    dpm_2_ancestral,
    dpm_fast,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from genengine.solvers.unipc import unipc

SOLVERS = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "dpm_2": dpm_2,
    "ddpm": ddpm,
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_singlestep": dpmpp_singlestep,
    "unipc": unipc,
    "lms": lms,
    "deis": deis,
    "plms": plms,
    "ipndm": ipndm,
    "euler_maruyama": euler_maruyama,
    "consistency": consistency,
    "lcm": lcm,
    "edm": edm,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_fast": dpm_fast,
}
INVERSE_SOLVERS = {
    "ddim_inverse": ddim_inverse,
    "dpmpp_2m_inverse": dpmpp_2m_inverse,
}
