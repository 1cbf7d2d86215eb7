"""VQ-VAE: an autoencoder through a codebook, and an autoregressive prior over its codes.

van den Oord, Vinyals & Kavukcuoglu 2017; the codebook's averages: Razavi et al. 2019; restarts: Dhariwal et al. 2020.
"""

from __future__ import annotations

import dataclasses

import torch

from genengine.models import latent_paths
from genengine.models.base import INNOCENCE, Model, Option, Turn
from genengine.models.pixelcnn import PixelCNN
from genengine.nets import pixelcnn
from genengine.nets.configs import is_number
from genengine.nets.vq import VQNet


class VQVAE(Model):
    """Encoder, codebook and decoder ("net"), and a network over the grid of codes ("prior") that sampling needs.

    Args:
        net: `VQNet`.
        prior: `nets.pixelcnn.PixelCNN` of the grid, its levels the K codes; or None, and then there is no `sample`.
        commitment: weight of |z - sg[e]|^2, the encoder's share of the quantisation error; >= 0.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: parameters out of range, or a prior of another grid.
    """

    family = "vqvae"
    presets = {
        "digits": {
            "model": {
                "net": {"name": "vq", "config": "tiny"},
                "prior": {"name": "pixelcnn", "config": "codes", "dim": 48, "depth": 4, "head_dim": 96, "embedding": 32,
                          "first_size": 5, "dropout": 0.3},
            },
            "steps": 800,
        },
        "images": {
            "model": {
                "net": {"name": "vq", "config": "vq_32"},
                "prior": {"name": "pixelcnn", "config": "codes", "dropout": 0.1},
            },
            "steps": 50_000, "batch_size": 64, "lr": 1e-3, "warmup": 1000,
        },
        "smoke": {
            "model": {
                "net": {"name": "vq", "config": "tiny", "widths": (16, 16), "codes": 32},
                "prior": {"name": "pixelcnn", "config": "codes", "dim": 16, "depth": 2, "head_dim": 16, "embedding": 8},
            },
            "steps": 60, "batch_size": 64, "warmup": 10, "ema_decay": 0.9,
        },
    }  # fmt: skip
    bars = {
        "reconstruction_mse": ("<=", 0.02),
        "perplexity": (">=", 64),
        "frechet_distance": ("<=", 0.12),
        "coverage": (">=", 0.8),
        **INNOCENCE,
    }
    options = (Option("temperature", 1.0, "of the prior's logits: below 1 likelier codes"),)

    def __init__(self, net, prior=None, *, commitment=0.25, num_levels=256):
        config = net.config
        if not is_number(commitment):
            raise ValueError(f"models/VQVAE: commitment must be a finite number >= 0, got {commitment!r}")
        shape = (config.in_channels, config.image_size, config.image_size)
        classes = 0 if prior is None else prior.config.num_classes
        super().__init__({"net": net} | ({} if prior is None else {"prior": prior}), shape, classes, num_levels)
        if prior is not None:
            found = prior.config.image_size, prior.config.in_channels, prior.config.num_levels
            if found != (config.grid, 1, config.codes):
                raise ValueError(
                    f"models/VQVAE: prior must have image_size, in_channels, num_levels = {config.grid}, 1, "
                    f"{config.codes}, which the codes have, got {found}"
                )
        self.net, self.commitment = net, float(commitment)
        self.prior = None if prior is None else PixelCNN(prior, class_drop=0.0)  # codes as the levels of its pixels

    # ---- training --------------------------------------------------------------------------------------------------

    def turns(self, step):
        """The autoencoder, then the prior on the codes of the autoencoder as it is then."""
        return [Turn("net", self.terms)] + ([] if self.prior is None else [Turn("prior", self.prior_terms)])

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """loss = mean (x0 - decode(z + sg[e - z]))^2 + commitment mean (z - sg[e])^2, means over elements.

        With the codebook's update "loss" also mean (sg[z] - e)^2; with "ema" it is moved here, under no_grad, if the
        network is in training mode. Also: "reconstruction", "commitment", the quantisation error, and "perplexity",
        exp of the entropy of the batch's codes.
        """
        z = self.net.encode(x0)
        straight, e, index = self.net.quantise(z)
        reconstruction = (self.net.decode(straight).float() - x0).square().mean()
        commitment = (z - e.detach()).square().mean()
        loss = reconstruction + self.commitment * commitment
        if self.net.codebook.learned:
            loss = loss + (z.detach() - e).square().mean()
        if self.net.training:
            rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            self.net.codebook.update(rows, index.flatten(), seed=seed, step=step)
        return {
            "loss": loss,
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
            "perplexity": perplexity(index, self.net.config.codes),
        }

    def prior_terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """loss = -log p(codes | label) / (h w), nats per code, of the codes that the autoencoder gives x0."""
        terms = self.prior.terms(self._as_pixels(x0), self._seen(labels), seed=seed, sample_ids=sample_ids, step=step)
        return {"loss": terms["loss"], "bits_per_code": terms["bits_per_dim"]}

    def _seen(self, labels):
        """The labels if the prior looks at them."""
        return labels if self.num_classes else None

    @torch.no_grad()
    def _as_pixels(self, x0):
        """The codes of x0 as the prior's images, (B, 1, h, w)."""
        return self.prior.pixels(self.net.quantise(self.net.encode(x0))[2])[:, None]

    # ---- codes -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x0):
        """The codes of images: (B, C, H, W) -> (B, h, w) int64."""
        self._check_images(x0, "encode")
        return self.net.quantise(self.net.encode(x0.to(self.device)))[2]

    @torch.no_grad()
    def decode(self, index):
        """The images of codes: (B, h, w) int64 -> (B, C, H, W) float32 in [-1, 1].

        Raises:
            ValueError: another grid, or codes that do not exist.
        """
        grid, codes = self.net.config.grid, self.net.config.codes
        if index.is_floating_point() or tuple(index.shape[1:]) != (grid, grid):
            raise ValueError(
                f"models/VQVAE.decode: index must be (B, {grid}, {grid}) int64, got {index.dtype} {tuple(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < codes:
            raise ValueError(f"models/VQVAE.decode: index must be in 0 .. {codes - 1}, got {int(index.max())}")
        return self.net.decode(self.net.look_up(index.to(self.device))).float().clamp(-1, 1)

    def reconstruct(self, x0):
        """Images through the codebook and back."""
        return self.decode(self.encode(x0))

    @torch.no_grad()
    def interpolate(self, x_a, x_b, steps=8, *, kind="lerp"):
        """Images (B, steps, C, H, W) along the path between the encoders' outputs, each point quantised."""
        for x in (x_a, x_b):
            self._check_images(x, "interpolate")
        ends = (self.net.encode(x.to(self.device)) for x in (x_a, x_b))
        points = latent_paths.path(kind, *ends, steps)
        images = self.net.decode(self.net.quantise(points.flatten(0, 1))[0])
        return images.float().clamp(-1, 1).unflatten(0, points.shape[:2])

    def panels(self, x0, labels=None, *, seed=0):
        """Reconstructions, and paths between neighbouring images through the codebook."""
        return {
            "real, reconstructed": torch.stack([x0, self.reconstruct(x0)], dim=1),
            "interpolations": self.interpolate(x0, x0.roll(-1, 0), 7),
        }

    def measure(self, x0, labels=None, *, seed=0):
        """What a VQ-VAE has instead of a likelihood of the pixels: name -> (B,).

        reconstruction_mse: in [-1, 1] units.  perplexity: of the codes of all these images, the same for each.
        bits_per_code: of the prior, if there is one.
        """
        x0, index = x0.to(self.device), self.encode(x0)
        found = {
            "reconstruction_mse": (self.decode(index) - x0).square().flatten(1).mean(1),
            "perplexity": perplexity(index, self.net.config.codes).expand(len(x0)),
        }
        if self.prior is not None:
            found["bits_per_code"] = self.prior.bits_per_dim(self._as_pixels(x0), self._seen(labels))
        return found

    def diagnose(self, x0, labels, *, seed, step):
        """Warn of a codebook that has collapsed."""
        used = float(perplexity(self.encode(x0), self.net.config.codes))
        few = used < 0.05 * self.net.config.codes
        return {}, [f"codebook: only {used:.1f} of {self.net.config.codes} codes are used"] if few else []

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample(self, num, labels=None, *, temperature=1.0, seed=0, first_id=0, progress=False, check_finite=False):
        """Draw codes from the prior and decode them.

        Code (y, x) is the inverse distribution function at u[y w + x], u = uniform(seed, first_id + i, "uniform"); see
        `PixelCNN.sample`.

        Args:
            num: number of images, 0 too.  labels: int, or num ints, if the prior sees classes; None: in turn.
            temperature: divides the logits, in [1e-6, 1e6].
            seed: int in [0, 2^64).  first_id: global index of the first sample.
            progress: show a progress bar.  check_finite: look at the logits.
        Returns:
            (num, C, H, W) float32 in [-1, 1].
        Raises:
            RuntimeError: a model without a prior.  ValueError: options or labels out of range.
            FloatingPointError: with check_finite, logits that are not finite.
        """
        if self.prior is None:
            raise RuntimeError("models/VQVAE.sample: the model has no prior; train one, with an entry 'prior'")
        pixels = self.prior.sample(
            num, labels, temperature=temperature, seed=seed, first_id=first_id, progress=progress,
            check_finite=check_finite,
        )  # fmt: skip
        return self.decode(self.prior.levels(pixels)[:, 0])

    # ---- configuration ---------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        net = {"name": "vq", **dataclasses.asdict(self.net.config)}
        prior = None if self.prior is None else {"name": "pixelcnn", **dataclasses.asdict(self.prior.net.config)}
        rest = {"commitment": self.commitment, "num_levels": self.num_levels}
        return {"family": "vqvae", "net": net, "prior": prior, **rest}

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        "prior" is None or a dict with the name "pixelcnn" and its fields; what follows from the codes (image_size,
        in_channels, num_levels, num_classes) is filled in. Raises ValueError.
        """
        nets = {"net": ("vq",)} | ({} if config.get("prior") is None else {"prior": ("pixelcnn",)})
        rest = cls._entries(config, ("prior", "commitment", "num_levels"), nets)
        net, prior = rest.pop("net"), rest.pop("prior", None)
        del net["name"]
        net = VQNet.from_config(net.pop("config", {}), seed=seed, **net)
        return cls(net, None if prior is None else _build_prior(prior, net.config, seed), **rest)


def perplexity(index, codes):
    """exp of the entropy of the codes' shares, () float32: the number of codes in even use."""
    share = torch.bincount(index.flatten(), minlength=codes).float() / max(index.numel(), 1)
    return torch.exp(torch.special.entr(share).sum())


def _build_prior(fields, config, seed):
    """The prior that `VQVAE.from_config` describes, for the codes of a `VQConfig`."""
    fields = {key: value for key, value in fields.items() if key != "name"}
    fields |= {"image_size": config.grid, "in_channels": 1, "num_levels": config.codes}
    fields.setdefault("num_classes", config.num_classes)
    return pixelcnn.PixelCNN.from_config(fields.pop("config", {}), seed=(seed + 1) % (1 << 64), **fields)
