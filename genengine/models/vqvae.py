"""VQ-VAE: an autoencoder through a codebook, and an autoregressive prior over its codes.

van den Oord, Vinyals & Kavukcuoglu 2017; the codebook's averages: Razavi et al. 2019; restarts: Dhariwal et al. 2020.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from genengine import ops
from genengine.models import latent_paths, likelihoods
from genengine.models.base import Model, Option, Turn
from genengine.models.evaluating import evaluating
from genengine.nets.vq import VQNet


class VQVAE(Model):
    """Encoder, codebook and decoder ("net"), and a network over the grid of codes ("prior") that sampling needs.

    Args:
        net: `VQNet`.
        prior: module prior(x, y) -> logits (B, K, 1, h, w) of grids x (B, 1, h, w) whose levels are the K codes, each
            pixel's logits depending on the pixels before it in raster order alone (`PixelCNN`); or None.
        commitment: weight of |z - sg[e]|^2, the encoder's share of the quantisation error; >= 0.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: parameters out of range, or a prior of another grid.
    """

    family = "vqvae"
    presets = {}
    options = (Option("temperature", 1.0, "of the prior's logits: below 1 likelier codes"),)

    def __init__(self, net, prior=None, *, commitment=0.25, num_levels=256):
        config = net.config
        if not isinstance(commitment, (int, float)) or not 0 <= commitment < math.inf:
            raise ValueError(f"models/VQVAE: commitment must be a finite number >= 0, got {commitment!r}")
        shape = (config.in_channels, config.image_size, config.image_size)
        classes = 0 if prior is None else prior.config.num_classes
        super().__init__({"net": net} | ({} if prior is None else {"prior": prior}), shape, classes, num_levels)
        if prior is not None and (prior.config.image_size, prior.config.in_channels) != (config.grid, 1):
            raise ValueError(
                f"models/VQVAE: prior must be of {config.grid} x {config.grid} codes in 1 channel, got image_size "
                f"{prior.config.image_size} and in_channels {prior.config.in_channels}"
            )
        self.net, self.prior, self.commitment = net, prior, float(commitment)

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
        with torch.no_grad():
            index = self.net.quantise(self.net.encode(x0))[2]
        logits = self._logits(index, self._seen(labels))
        loss = F.cross_entropy(logits.float(), index)
        return {"loss": loss, "bits_per_code": (loss / math.log(2)).detach()}

    def _logits(self, index, labels):
        """(B, K, h, w) logits of the codes from those before them: index (B, h, w)."""
        x = likelihoods.level_value(index, self.net.config.codes)[:, None]
        return self.prior(x, labels)[:, :, 0]

    def _seen(self, labels):
        """The labels on the networks' device if the prior looks at them."""
        return labels.to(self.device) if labels is not None and self.num_classes else None

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
        self._check_images(x_a, "interpolate")
        ends = (self.net.encode(x.to(self.device)) for x in (x_a, x_b))
        points = latent_paths.path(kind, *ends, steps)
        images = self.net.decode(self.net.quantise(points.flatten(0, 1))[0])
        return images.float().clamp(-1, 1).unflatten(0, points.shape[:2])

    def measure(self, x0, labels=None):
        """What a VQ-VAE has instead of a likelihood of the pixels, a dict of floats.

        reconstruction_mse: in [-1, 1] units.  perplexity: of the codes used.  bits_per_code: of the prior, if any.
        """
        index = self.encode(x0)
        mse = (self.decode(index) - x0.to(self.device)).square().mean()
        found = {"reconstruction_mse": float(mse), "perplexity": float(perplexity(index, self.net.config.codes))}
        if self.prior is not None:
            with torch.no_grad(), evaluating(self.prior):
                labels = self._labels(len(x0), labels, "measure") if self.num_classes else None
                loss = F.cross_entropy(self._logits(index, labels).float(), index)
            found["bits_per_code"] = float(loss) / math.log(2)
        return found

    def diagnose(self, x0, labels, *, seed, step):
        """Warn of a codebook that has collapsed."""
        used = float(perplexity(self.encode(x0), self.net.config.codes))
        few = used < 0.05 * self.net.config.codes
        return {}, [f"codebook: only {used:.1f} of {self.net.config.codes} codes are used"] if few else []

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample(self, num, labels=None, *, temperature=1.0, seed=0, first_id=0, progress=False, check_finite=False):
        """Draw codes from the prior, code by code in raster order, and decode them.

        Code (y, x) is the inverse distribution function at u[y w + x], u = uniform(seed, first_id + i, "uniform").

        Args:
            num: number of images, 0 too.  labels: int, or num ints, if the prior sees classes; None: in turn.
            temperature: divides the logits, > 0.
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
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"models/VQVAE.sample: temperature must be a finite number > 0, got {temperature!r}")
        sample_ids, labels = self._sample_ids(num, first_id), self._labels(num, labels)
        with torch.no_grad(), evaluating(self.prior, self.net):
            codes = self.sample_codes(num, labels, temperature, seed, sample_ids, progress, check_finite)
            return self.decode(codes)

    def sample_codes(self, num, labels, temperature, seed, sample_ids, progress=False, check_finite=False):
        """Codes (num, h, w) int64 from the prior; arguments as of `sample`, sample_ids (num,) on the device."""
        grid = self.net.config.grid
        u = ops.uniform((num, grid * grid), seed=seed, sample_ids=sample_ids, stream="uniform", device=self.device)
        codes = torch.zeros(num, grid, grid, dtype=torch.int64, device=self.device)
        places = range(grid * grid)
        if progress:
            from tqdm import tqdm

            places = tqdm(places, desc="codes", unit="code")
        for place in places:
            row, column = divmod(place, grid)
            logits = self._logits(codes, labels)[:, :, row, column].float()
            if check_finite and not torch.isfinite(logits).all():
                raise FloatingPointError(f"models/VQVAE.sample: the prior's logits of code {place} are not finite")
            cumulative = torch.softmax(logits / temperature, dim=1).cumsum(1)
            target = u[:, place, None] * cumulative[:, -1:]
            codes[:, row, column] = (cumulative <= target).sum(1).clamp_max(self.net.config.codes - 1)
        return codes

    # ---- configuration ---------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        net = {"name": "vq", **dataclasses.asdict(self.net.config)}
        prior = None if self.prior is None else {"name": "pixelcnn", **dataclasses.asdict(self.prior.config)}
        rest = {"commitment": self.commitment, "num_levels": self.num_levels}
        return {"family": "vqvae", "net": net, "prior": prior, **rest}

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        "prior" is None or a dict with the name "pixelcnn" and its fields; what follows from the codes (image_size,
        in_channels, num_levels, num_classes) is filled in. Raises ValueError.
        """
        where, rest = "models/VQVAE.from_config", dict(config)
        rest.pop("extra", None)
        if rest.pop("family", None) != "vqvae":
            raise ValueError(f"{where}: entry 'family' must be 'vqvae', got {config.get('family')!r}")
        net, prior = rest.pop("net", None), rest.pop("prior", None)
        for entry, value, name in (("net", net, "vq"), ("prior", prior, "pixelcnn")):
            if (entry == "net" or value is not None) and (not isinstance(value, dict) or value.get("name") != name):
                raise ValueError(f"{where}: entry {entry!r} must be a dict with the name {name!r}, got {value!r:.60}")
        unknown = sorted(set(rest) - {"commitment", "num_levels"})
        if unknown:
            raise ValueError(f"{where}: entries must be among net, prior, commitment, num_levels, got {unknown[0]}")
        net = {key: value for key, value in net.items() if key != "name"}
        net = VQNet.from_config(net.pop("config", {}), seed=seed, **net)
        return cls(net, None if prior is None else _build_prior(prior, net.config, seed), **rest)


def perplexity(index, codes):
    """exp of the entropy of the codes' shares, () float32: the number of codes in even use."""
    share = torch.bincount(index.flatten(), minlength=codes).float() / max(index.numel(), 1)
    return torch.exp(torch.special.entr(share).sum())


def _build_prior(fields, config, seed):
    """The prior that `VQVAE.from_config` describes, for the codes of a `VQConfig`."""
    from genengine.nets.pixelcnn import PixelCNN

    fields = {key: value for key, value in fields.items() if key != "name"}
    fields |= {"image_size": config.grid, "in_channels": 1, "num_levels": config.codes}
    fields.setdefault("num_classes", config.num_classes)
    return PixelCNN.from_config(fields.pop("config", {}), seed=seed + 1 & (1 << 64) - 1, **fields)
