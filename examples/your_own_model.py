"""Sample any PyTorch model with the fused loop: a denoiser is any callable (x, t, **cond) -> output.

    python examples/your_own_model.py

The model here is the exact noise predictor of two Gaussian blobs, so the result can be checked: no training, no files.
"""

import math

import torch

import genengine
from genengine import paths, schedules, solvers

CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
WIDTH = 0.3
PATH = paths.VPLinear()


def denoiser(x, t, y):
    """E[eps | x_t, class y], y = 2 meaning "no class": x_t is Gaussian given the blob, in closed form."""
    alpha = torch.tensor([PATH.alpha(float(s)) for s in t], dtype=x.dtype)[:, None]
    sigma = torch.tensor([PATH.sigma(float(s)) for s in t], dtype=x.dtype)[:, None]
    variance = alpha**2 * WIDTH**2 + sigma**2
    distance = x[:, None] - alpha[:, None] * CENTRES  # (B, blob, 2)
    log_weight = -(distance**2).sum(-1) / (2 * variance)
    chosen = torch.nn.functional.one_hot(y, 3)[:, :2].bool()
    log_weight = torch.where(chosen | (y == 2)[:, None], log_weight, -math.inf)
    weight = log_weight.softmax(-1)[..., None]
    return (weight * sigma[:, None] * distance / variance[..., None]).sum(1)


def main(num=2000):
    """Draw `num` points, half of each class; returns them and their classes."""
    y = torch.arange(num) % 2
    grid = schedules.karras(20, sigma_min=0.01, sigma_max=80.0, path=PATH)
    table = solvers.dpmpp_2m(PATH, grid, prediction="eps")
    x = genengine.sample(
        denoiser, table, (num, 2), cond={"y": y}, uncond={"y": torch.full_like(y, 2)}, guidance=1.0, seed=0
    )
    return x, y


if __name__ == "__main__":
    x, y = main()
    for label, centre in enumerate(CENTRES):
        cloud = x[y == label]
        print(f"class {label}: mean {cloud.mean(0).tolist()}, should be {centre.tolist()}; std {cloud.std(0).tolist()}")
