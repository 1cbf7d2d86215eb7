"""Starting from an image, and keeping parts of one: both take data to a noise level of the path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from genengine.extensions._protocol import Extension, Run, row_times
from genengine.ops import diffuse, normal, sampler_step
from genengine.paths import Path

NOISE = ("fixed", "row")


@dataclass(eq=False)
class Inpaint(Extension):
    """Generate where the mask is 1 and keep known data where it is 0.

        x <- mask x + (1 - mask) (alpha(t') known + sigma(t') eps)       after every row, t' the time it leads to
        x <- mask x + (1 - mask) known                                   after the last row, exactly

    eps is noise of the specification. "fixed": normal(seed, sample, 0, stream "model"), the same after every row, so
    that the known part moves along a straight path of its own. "row": fresh after row r of R, normal(seed, sample,
    R + r, stream "step"), numbers that the solver, whose rows end at R - 1, never draws.

    Args:
        mask: in [0, 1], broadcasts against x (B, ...): (H, W), (B, 1, H, W), or the like.
        known: clean data, (B, ...) or one for all (1, ...); values where the mask is 1 do not matter if finite.
        path: the solver's.
        noise: "fixed" or "row".
        times: (R,) path times at which the rows, those added by other extensions too, evaluate the model; default their
            t_model, which is right where the solver was given no model_time.
    Raises:
        ValueError: noise unknown; at the start of the run, a mask or known data that do not fit x, values of the mask
            outside [0, 1], t_model that cannot be path times.
    Song et al. 2021, Score-based generative modeling, appendix I.2; one sweep of RePaint, Lugmayr et al. 2022.
    """

    mask: Tensor
    known: Tensor
    path: Path
    noise: str = "fixed"
    times: ArrayLike | None = None

    def __post_init__(self):
        if self.noise not in NOISE:
            raise ValueError(f"Inpaint: noise must be one of {', '.join(NOISE)}, got {self.noise!r}")
        self.mask, self.known = (torch.as_tensor(t).detach().float() for t in (self.mask, self.known))
        if not ((self.mask >= 0) & (self.mask <= 1)).all():
            raise ValueError("Inpaint: mask must be within [0, 1]; 1 is generated, 0 is kept")

    def start(self, run: Run) -> None:
        at = row_times("Inpaint", run.table, self.times)
        following = np.concatenate([at[1:], np.zeros_like(at[:1])])
        alpha, sigma = np.array(self.path.alpha(following)), np.array(self.path.sigma(following))
        alpha[-1], sigma[-1] = 1.0, 0.0  # also where the path never is without noise
        mask, known = self.mask.to(run.x.device), self.known.to(run.x.device)
        for name, tensor in (("mask", mask), ("known", known)):
            try:
                fits = torch.broadcast_shapes(tensor.shape, run.x.shape) == run.x.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(f"Inpaint: {name} must broadcast to x {tuple(run.x.shape)}, got {tuple(tensor.shape)}")
        self._kept = (1.0 - mask).to(run.x.dtype)
        self._known, self._at_t = (run.buffer(run.x.dtype) for _ in range(2))
        self._known.copy_(known)
        rows = run.affine_rows(a=alpha, s=sigma)
        if self.noise == "row":
            self._rows, self._draw = torch.cat([rows, rows]), {"seed": run.seed, "sample_ids": run.sample_ids}
        else:
            eps = run.buffer()
            normal(eps.shape, seed=run.seed, sample_ids=run.sample_ids, stream="model", out=eps)
            self._rows, self._draw = rows, {"noise": eps}

    def after_row(self, run: Run) -> None:
        step = run.step + run.num_rows if self.noise == "row" else run.step
        sampler_step(self._known, self._known, self._rows, step, out=self._at_t, **self._draw)
        torch.lerp(run.x, self._at_t, self._kept, out=run.x)  # exact at both ends


def image_to_image(
    path: Path,
    grid: ArrayLike,
    x0: Tensor,
    strength: float,
    *,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Start sampling from data with noise instead of from noise alone.

        x_start = alpha(t) x0 + sigma(t) eps,    t the first time of the tail; eps = normal(seed, sample, 0, "diffuse")

        x, tail = image_to_image(path, grid, x0, 0.6)
        sample(model, solver(path, tail, ...), x=x)

    path, grid: as for the solver, grid (N + 1,) falling times. x0: (B, ...) clean data. strength: in (0, 1], the share
    of the steps that are made, rounded to whole ones but at least one; 1 makes all of them.
    seed, sample_ids: as in `genengine.sample`.

    Returns (x_start (B, ...) in x0's dtype, the tail of the grid, float64).
    Raises ValueError where strength is out of range or the grid has no step.
    Meng et al. 2022, SDEdit.
    """
    grid = np.asarray(grid, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"image_to_image: grid must be (N + 1,) times with N >= 1, got shape {grid.shape}")
    if not 0 < strength <= 1:
        raise ValueError(f"image_to_image: strength must be in (0, 1], got {strength!r}")
    num_steps = max(1, round(strength * (grid.size - 1)))
    tail = grid[grid.size - 1 - num_steps :]
    alpha, sigma = (
        torch.full((x0.shape[0],), float(value), device=x0.device)
        for value in (path.alpha(tail[0]), path.sigma(tail[0]))
    )
    return diffuse(x0, alpha, sigma, alpha, sigma, seed=seed, sample_ids=sample_ids)[0], tail
