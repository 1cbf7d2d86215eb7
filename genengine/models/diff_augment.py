"""DiffAugment: differentiable augmentation of what a discriminator sees, real and generated alike.

Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training, 2020. As both kinds of images pass through
it, and gradients too, the discriminator cannot learn the few real images by heart, yet the generator does not learn to
draw augmented ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genengine import ops

# name -> uniforms that an image needs.
POLICIES = {"brightness": 1, "saturation": 1, "contrast": 1, "translation": 2, "cutout": 2}


def augment(x, policies, *, seed, sample_ids=None, step=0, part=0):
    """Apply the named policies in the order of `POLICIES`, with draws of its own for every image.

    With u, v in (0, 1): brightness x + u - 1/2; saturation: distance from the pixel's mean over channels times 2 u;
    contrast: distance from the image's mean times u + 1/2; translation by round((2 u - 1) s) rows and round((2 v - 1)
    s) columns, s = max(1, H / 8), what comes in being 0; cutout: a square of H / 2 pixels at a uniform place, partly
    outside it may be, becomes 0.

    Args:
        x: (B, C, H, W) in [-1, 1].  policies: names.
        seed, sample_ids, step: of the draws, stream "uniform".
        part: 0, 1, ...: different draws for different images of one (sample, step), real and generated ones, say.
    Returns:
        like x, differentiable in x any number of times.
    Raises:
        ValueError: an unknown policy.
    """
    check(policies)
    if not policies:
        return x
    total = sum(POLICIES.values())
    u = ops.uniform(
        (len(x), (part + 1) * total), seed=seed, sample_ids=sample_ids, step=step, stream="uniform", device=x.device
    )
    place = part * total
    for name, count in POLICIES.items():
        if name in policies:
            x = _APPLY[name](x, u[:, place : place + count])
        place += count  # a policy's draws do not depend on which others there are
    return x


def check(policies):
    """Refuse unknown policies, naming them."""
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"models/diff_augment: policies must be among {', '.join(POLICIES)}, got {unknown[0]!r}")


def _brightness(x, u):
    return x + (u[:, :, None, None] - 0.5)


def _saturation(x, u):
    mean = x.mean(1, keepdim=True)
    return mean + (x - mean) * (2 * u[:, :, None, None])


def _contrast(x, u):
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (u[:, :, None, None] + 0.5)


def _translation(x, u):
    b, _, height, width = x.shape
    far = max(1, height // 8)
    shift = torch.round((2 * u - 1) * far).long() + far  # (B, 2) in 0 .. 2 far
    padded = F.pad(x, (far,) * 4)
    rows = shift[:, :1] + torch.arange(height, device=x.device)  # (B, H)
    columns = shift[:, 1:] + torch.arange(width, device=x.device)
    batch = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x, u):
    height, width = x.shape[2:]
    side = max(1, height // 2)

    def hit(size, v):  # (B, size): within the square, whose middle is anywhere in the image
        low = (v * (size + 1 - side % 2)).floor() - side // 2
        at = torch.arange(size, device=x.device)
        return (at >= low) & (at < low + side)

    inside = hit(height, u[:, :1])[:, None, :, None] & hit(width, u[:, 1:])[:, None, None, :]
    return x * (~inside).to(x.dtype)


_APPLY = {
    "brightness": _brightness,
    "saturation": _saturation,
    "contrast": _contrast,
    "translation": _translation,
    "cutout": _cutout,
}
