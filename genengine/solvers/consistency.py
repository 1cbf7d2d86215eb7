"""Solvers for networks that jump to the data in one evaluation: consistency models and their latent kin."""

import numpy as np

from genengine.solvers._model import Model, Row, X, solver


@solver
def consistency(model: Model) -> list[Row]:
    """Multistep consistency sampling: to the data, then back up to the next noise level with fresh noise.

    x' = alpha' x0 + sqrt(sigma'^2 - (alpha' sigma_end/alpha_end)^2) z, where "end" is the last time of the grid, the
    small noise level at which a consistency function is the identity; the last step adds no noise. On
    `paths.RectifiedFlow` with a grid to t = 0 this is the flow-match LCM sampler, x' = (1 - t') x0 + t' z.
    The network's x0 is the value of the consistency function f, so its boundary scalings belong into the network.

    Arguments, returns and errors: see the module. Song 2023 (consistency models), Alg. 1.
    """
    last = model.points[-1]
    rows = []
    for now, end in model.steps:
        floor = end.alpha / last.alpha * last.sigma
        rows.append(model.row(now, end.alpha * model.x0(now), noise=np.sqrt(end.sigma**2 - floor**2)))
    return rows


@solver
def lcm(
    model: Model, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5, num_timesteps: int = 1000
) -> list[Row]:
    """Latent consistency sampling: boundary scalings on x0, then fresh noise of the next level.

    With n = num_timesteps t - 1 the training step and s = timestep_scaling n,
    denoised = sigma_data^2/(s^2 + sigma_data^2) x + s/sqrt(s^2 + sigma_data^2) x0,
    x' = alpha' denoised + sigma' z; a step to sigma' = 0 adds no noise.

    Arguments and returns: see the module.
        timestep_scaling, sigma_data: of the boundary condition, as the network was distilled; finite, above 0.
        num_timesteps: the number of training steps of the teacher.
    Luo 2023 (latent consistency models); Song 2023 (consistency models) for the boundary condition.

    Raises:
        ValueError: as the module says, and where an option is not a finite number above 0.
    """
    options = {"timestep_scaling": timestep_scaling, "sigma_data": sigma_data, "num_timesteps": num_timesteps}
    for name, value in options.items():
        if not 0 < value < np.inf:
            raise ValueError(f"lcm: {name} must be a finite number above 0, got {value!r}")
    rows = []
    for now, end in model.steps:
        s = timestep_scaling * max(num_timesteps * now.t - 1, 0.0)
        scale = np.hypot(s, sigma_data)
        denoised = (sigma_data / scale) ** 2 * X + s / scale * model.x0(now)
        rows.append(model.row(now, end.alpha * denoised, noise=end.sigma))
    return rows
