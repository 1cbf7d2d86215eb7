"""Variational autoencoders: an encoder, a decoder, a bound of the likelihood, and what sampling needs.

Kingma & Welling 2014, Rezende et al. 2014; beta: Higgins et al. 2017; importance-weighted bound: Burda et al. 2016;
class-conditional: Sohn, Lee & Yan 2015.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from genengine import ops
from genengine.models import latent_paths, likelihoods
from genengine.models.base import INNOCENCE, Model, Option
from genengine.models.evaluating import evaluating
from genengine.models.latent_prior import COVARIANCES, MixturePrior
from genengine.nets.configs import is_int, is_number
from genengine.nets.vae import VAENet

PRIORS = ("auto", "gmm", "normal")
PIXELS = ("sample", "mean")
FITTING_DRAWS = 4  # of q(z | x) per image, to fit a mixture
FITTING_BATCH = 1024  # images that go through the encoder at a time


@dataclasses.dataclass(frozen=True)
class VAEOptions:
    """How a VAE is trained, and what its prior and pixels are.

    Attributes:
        likelihood: see `likelihoods`.  components: of the likelihood "mixture".
        beta: weight of KL(q || p) in the loss.  warmup: steps over which it rises linearly from 0.
        kl: "analytic", or "monte_carlo" for the one-sample estimate.  free_bits: nats per latent element that cost
            nothing, "analytic" only.
        prior_components: of the mixture fitted to the latents after training (per class, if conditional); 0 for none.
            It keeps dim x dim numbers per component: choose 0 for spatial latents that another model is to draw.
        prior_covariance: "full" or "diag".
    """

    likelihood: str = "logistic"
    components: int = 5
    beta: float = 1.0
    warmup: int = 0
    kl: str = "analytic"
    free_bits: float = 0.0
    prior_components: int = 10
    prior_covariance: str = "full"

    def __post_init__(self):
        rules = {
            "likelihood": (self.likelihood in likelihoods.NAMES, f"one of {', '.join(likelihoods.NAMES)}"),
            "components": (is_int(self.components, 1), "an int >= 1"),
            "beta": (is_number(self.beta), "a finite number >= 0"),
            "warmup": (is_int(self.warmup, 0), "an int >= 0"),
            "kl": (self.kl in ("analytic", "monte_carlo"), "'analytic' or 'monte_carlo'"),
            "free_bits": (is_number(self.free_bits), "a finite number >= 0"),
            "prior_components": (is_int(self.prior_components, 0), "an int >= 0"),
            "prior_covariance": (self.prior_covariance in COVARIANCES, f"one of {', '.join(COVARIANCES)}"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ValueError(f"models/VAE: {name} must be {expected}, got {getattr(self, name)!r}")
        if self.free_bits and self.kl != "analytic":
            raise ValueError(f"models/VAE: free_bits must be 0 with kl='monte_carlo', got {self.free_bits}")


class VAE(Model):
    """q(z | x), p(x | z), and a prior of z: N(0, 1), or a mixture of Gaussians fitted to the latents.

    Args:
        net: `VAENet`, whose out_channels are what the likelihood needs.
        num_levels: values of a pixel, see `Model`.
        options: fields of `VAEOptions`.
    Raises:
        ValueError: options out of range, or a network whose decoder does not fit the likelihood.
    """

    family = "vae"
    presets = {
        "digits": {
            "model": {"net": {"name": "vae", "config": "tiny", "widths": [512, 512], "dropout": 0.2}},
            "steps": 3000, "weight_decay": 0.3, "storage": "float16",
        },
        "digits_conditional": {
            "model": {
                "net": {"name": "vae", "config": "tiny", "widths": [512, 512], "dropout": 0.2, "conditional": True},
                "prior_components": 1,
            },
            "steps": 3000, "weight_decay": 0.3, "storage": "float16",
        },
        "images": {
            "model": {"net": {"name": "vae", "config": "conv_32"}, "likelihood": "mixture", "warmup": 5000},
            "steps": 50_000, "lr": 1e-3, "warmup": 1000,
        },
        "smoke": {
            "model": {"net": {"name": "vae", "config": "tiny"}}, "steps": 60, "batch_size": 64, "warmup": 10,
            "ema_decay": 0.9,
        },
    }  # fmt: skip
    options = (
        Option("prior", "auto", "distribution of z; auto is gmm where one was fitted", str, PRIORS),
        Option("temperature", 1.0, "scale of the prior's standard deviations"),
        Option("pixels", "sample", "draw the pixels, or take their mean", str, PIXELS),
    )
    likelihood = "bound"
    bars = {
        "bits_per_dim": ("<=", 1.88),
        "iwae_500_bits_per_dim": ("<=", 1.84),
        "frechet_distance": ("<=", 0.05),
        "coverage": (">=", 0.82),
        **INNOCENCE,
    }

    def __init__(self, net, *, num_levels=256, **options):
        known = [field.name for field in dataclasses.fields(VAEOptions)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"models/VAE: options must be among {', '.join(known)}, got {', '.join(unknown)}")
        config, self.settings = net.config, VAEOptions(**options)
        shape = (config.in_channels, config.image_size, config.image_size)
        super().__init__({"net": net}, shape, config.num_classes if config.conditional else 0, num_levels)
        settings = self.settings
        self.pixels = likelihoods.build(settings.likelihood, config.in_channels, num_levels, settings.components)
        if config.out_channels != self.pixels.num_maps():
            raise ValueError(
                f"models/VAE: net must have out_channels = {self.pixels.num_maps()} for the likelihood "
                f"{settings.likelihood!r}, got {config.out_channels}"
            )
        self.net, self.latent_shape = net, config.latent_shape
        if settings.prior_components and not hasattr(net, "prior"):
            net.prior = MixturePrior(max(self.num_classes, 1), settings.prior_components, math.prod(self.latent_shape))
            net.prior.to(next(net.parameters()).device)

    # ---- training --------------------------------------------------------------------------------------------------

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """loss = nll + beta w KL(q(z | x) || N(0, 1)), w = min(1, (step + 1) / warmup); batch means, in nats.

        z is drawn once (stream "reparameterize"); dropout masks are of stream "dropout". Labels are seen by a
        conditional network only. Also: "nll", "kl" (without free bits only if they are 0) and "bits_per_dim", the
        bound's estimate.
        """
        settings, labels = self.settings, self._seen(labels)
        draw = {"seed": seed, "step": step, "sample_ids": None if sample_ids is None else sample_ids.to(x0.device)}
        masks = self.net.dropout_masks(len(x0), device=x0.device, **draw) if self.net.training else None
        mean, logvar = self.net.encode(x0, labels, masks)
        z, kl = ops.reparameterize(mean, logvar, kl=settings.kl, free_bits=float(settings.free_bits), **draw)
        nll = -self.pixels.log_prob(self.net.decode(z, labels, masks), x0).mean()
        kl = kl.mean()
        weight = settings.beta * (min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0)
        bits = (nll + kl).detach() / (math.log(2) * math.prod(self.image_shape))
        return {"loss": nll + weight * kl, "nll": nll.detach(), "kl": kl.detach(), "bits_per_dim": bits}

    def finish(self, x0, labels=None, *, seed):
        """After training: fit the mixture prior to the latents of all images, if there is one."""
        if self.settings.prior_components:
            self.fit_prior(x0, labels, seed=seed)

    @torch.no_grad()  # not inference_mode, whose tensors could not be loaded into later
    def fit_prior(self, x0, labels=None, components=None, *, seed=0):
        """Fit the mixture to the aggregated posterior: draws of q(z | x) of every image, then `em_fit`.

        Args:
            x0: (N, C, H, W) in [-1, 1].  labels: (N,) int64, needed by a conditional model.
            components: another number of them than the configuration's, or None.  seed: of draws and first means.
        Raises:
            ValueError: no images, a class without images, or no components.
        """
        components = self.settings.prior_components if components is None else components
        if not is_int(components, 1):
            raise ValueError(f"models/VAE.fit_prior: components must be an int >= 1, got {components!r}")
        self._check_images(x0, "fit_prior")
        labels = self._given(x0, labels, "fit_prior")
        with evaluating(self.net):
            parts = [self._fitting_draws(x0, labels, part, seed) for part in _parts(len(x0), FITTING_BATCH)]
        draws = [torch.cat(draw) for draw in zip(*parts, strict=True)]
        if components != self.settings.prior_components or not hasattr(self.net, "prior"):
            self.settings = dataclasses.replace(self.settings, prior_components=components)
            self.net.prior = MixturePrior(max(self.num_classes, 1), components, draws[0].shape[1]).to(self.device)
        labels = None if labels is None else labels.repeat(FITTING_DRAWS)
        self.net.prior.fit(torch.cat(draws), labels, covariance=self.settings.prior_covariance, seed=seed)

    def _fitting_draws(self, x0, labels, part, seed):
        """`FITTING_DRAWS` draws of q(z | x), each (n, D), of the n images numbered by `part`."""
        own = x0[part.start : part.stop].to(self.device)
        mean, logvar = self.net.encode(own, None if labels is None else labels[part.start : part.stop])
        return [self._draw(mean, logvar, part, seed=seed, step=i)[0].flatten(1) for i in range(FITTING_DRAWS)]

    # ---- likelihood ------------------------------------------------------------------------------------------------

    def log_prob(self, x0, labels=None, *, seed=0, draws=8, prior="auto"):
        """The evidence lower bound, E_q[log p(x | z)] - KL(q || p), (B,) float32 in nats, by `draws` draws of z.

        The KL divergence is analytic for the prior "normal" and estimated by the same draws for "gmm"; "auto" is
        "gmm" where one was fitted. A bound of the model that `sample` draws from with this prior. Without labels a
        conditional model gives the bound of log mean_y p(x | y), at the cost of a pass per class.

        Raises:
            RuntimeError: a likelihood that is not of the levels (Bernoulli of more than two); "gmm" without a fit.
        """

        def bound(labels):
            weights = self._log_weights(x0, labels, seed, draws, prior, "log_prob", 4096, analytic=True)
            return weights.mean(0)

        return self._over_classes(bound, labels, len(x0))

    def iwae(self, x0, labels=None, *, k=500, batch=4096, seed=0, prior="auto"):
        """log (1/k) sum_j p(x, z_j) / q(z_j | x), z_j ~ q(z | x): (B,) float32 in nats, a tighter bound.

        Args:
            k: draws per image; draw j is of (seed, image's place, step j), stream "reparameterize".
            batch: pairs of an image and a draw that go through the decoder at a time; changes nothing but rounding.
        Burda, Grosse & Salakhutdinov 2016, eq. 8.
        """

        def bound(labels):
            weights = self._log_weights(x0, labels, seed, k, prior, "iwae", batch, analytic=False)
            return torch.logsumexp(weights, dim=0) - math.log(k)

        return self._over_classes(bound, labels, len(x0))

    def _over_classes(self, bound, labels, num):
        """bound(labels) (B,), as float32; of log mean_y p(x | y) for a conditional model without labels."""
        if labels is not None or not self.num_classes:
            return bound(labels).float()
        each = [bound(torch.full((num,), y, dtype=torch.int64)) for y in range(self.num_classes)]
        return (torch.logsumexp(torch.stack(each), 0) - math.log(self.num_classes)).float()

    def measure(self, x0, labels=None, *, seed=0):
        """The two bounds, for the prior that `sample` takes and for N(0, 1), and the error of reconstructions: (B,)."""
        labels, unit = self._seen(labels), -math.log(2) * math.prod(self.image_shape)
        found = {}
        for prior, suffix in (("auto", ""), ("normal", "_normal_prior")) if self.pixels.exact else ():
            found[f"bits_per_dim{suffix}"] = self.bits_per_dim(x0, labels, seed=seed, prior=prior)
            found[f"iwae_500_bits_per_dim{suffix}"] = self.iwae(x0, labels, seed=seed, prior=prior) / unit
        if self.num_classes and labels is None:
            return found
        rebuilt = self.reconstruct(x0, labels)
        return found | {"reconstruction_mse": (rebuilt - x0.to(self.device)).square().flatten(1).mean(1)}

    def _log_weights(self, x0, labels, seed, draws, prior, method, batch, *, analytic):
        """log p(x | z) + log p(z) - log q(z | x) of each draw, (draws, B) float64; analytic: -KL for the last two."""
        if not self.pixels.exact:
            raise RuntimeError(
                f"models/VAE.{method}: {self.settings.likelihood!r} is no likelihood of {self.num_levels} levels; "
                "use 'binomial' or another one"
            )
        if not is_int(draws, 1) or not is_int(batch, 1):
            raise ValueError(f"models/VAE.{method}: draws and batch must be ints >= 1, got {draws!r} and {batch!r}")
        self._check_images(x0, method)
        labels = self._labels(len(x0), labels, method) if self.num_classes else None
        prior, found = self._which(prior, method), []
        with torch.inference_mode(), evaluating(self.net):
            for part in _parts(len(x0), batch):
                own = x0[part.start : part.stop].to(self.device)
                y = None if labels is None else labels[part.start : part.stop]
                posterior = self.net.encode(own, y)
                rows = [
                    self._some_weights(own, y, posterior, part, steps, seed, prior, analytic)
                    for steps in _parts(draws, max(1, batch // max(len(own), 1)))
                ]
                found.append(torch.cat(rows))
        return torch.cat(found, 1) if found else x0.new_zeros(draws, 0, dtype=torch.float64)

    def _some_weights(self, x0, labels, posterior, part, steps, seed, prior, analytic):
        """The rows `steps` of `_log_weights` for the images numbered by `part`, in one pass of the decoder."""
        drawn = [self._draw(*posterior, part, seed=seed, step=step) for step in steps]
        z, difference = torch.cat([z for z, _ in drawn]), torch.cat([kl for _, kl in drawn]).double()
        y = None if labels is None else labels.repeat(len(steps))
        log_p = self.pixels.log_prob(self.net.decode(z, y), x0.repeat(len(steps), 1, 1, 1)).double()
        if prior == "gmm":
            log_q = difference + _standard_log_prob(z)
            log_p = log_p + self.net.prior.log_prob(z.flatten(1), y).double() - log_q
        else:
            log_p = log_p - (self._kl(*posterior).double().repeat(len(steps)) if analytic else difference)
        return log_p.view(len(steps), len(x0))

    @staticmethod
    def _kl(mean, logvar):
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    @staticmethod
    def _draw(mean, logvar, part, *, seed, step):
        """z ~ q and log q(z) - log N(z; 0, 1), for the images numbered by `part`, a range."""
        ids = torch.arange(part.start, part.stop, device=mean.device)
        return ops.reparameterize(mean, logvar, seed=seed, sample_ids=ids, step=step, kl="monte_carlo")

    # ---- latents ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x0, labels=None):
        """Mean and log-variance of q(z | x), each (B, *latent_shape) float32."""
        with evaluating(self.net):
            self._check_images(x0, "encode")
            labels = self._given(x0, labels, "encode")
            return self.net.encode(x0.to(self.device), labels)

    @torch.no_grad()
    def decode(self, z, labels=None):
        """E[x | z], (B, C, H, W) float32 in [-1, 1]; labels for a conditional model, None takes the classes in turn."""
        labels = self._labels(len(z), labels, "decode")
        with evaluating(self.net):
            return self.pixels.mean(self.net.decode(z.to(self.device), labels))

    def reconstruct(self, x0, labels=None):
        """E[x | z] at the posterior's mean, (B, C, H, W) float32."""
        return self.decode(self.encode(x0, labels)[0], labels)

    def interpolate(self, x_a, x_b, steps=8, *, labels=None, kind="slerp"):
        """Images (B, steps, C, H, W) along the path between the posterior means of x_a and x_b, (B, C, H, W) each.

        Args:
            steps: points, ends included.  labels: (B,), the class of both ends.  kind: "lerp" or "slerp".
        """
        points = latent_paths.path(kind, self.encode(x_a, labels)[0], self.encode(x_b, labels)[0], steps)
        return self._decode_grid(points, labels)

    def traverse(self, x0, dim, values, labels=None):
        """Images (B, len(values), C, H, W) with element `dim` of the flattened latent of x0 set to each of `values`.

        Args:
            x0: (B, C, H, W), or None for the latent 0.  dim: 0 .. latent elements - 1.  values: floats.
        """
        size = math.prod(self.latent_shape)
        if not isinstance(dim, int) or not 0 <= dim < size:
            raise ValueError(f"models/VAE.traverse: dim must be in 0 .. {size - 1}, got {dim!r}")
        z = torch.zeros(1, *self.latent_shape, device=self.device) if x0 is None else self.encode(x0, labels)[0]
        values = torch.as_tensor(values, dtype=torch.float32, device=self.device)
        points = z.flatten(1)[:, None].repeat(1, len(values), 1)
        points[:, :, dim] = values
        return self._decode_grid(points.unflatten(2, self.latent_shape), labels)

    def panels(self, x0, labels=None, *, seed=0):
        """Reconstructions; paths between neighbouring images; and the latents of most use, each moved alone."""
        mean, logvar = self.encode(x0, labels)
        kl = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(0)
        useful = kl.argsort(descending=True)[: len(x0)].tolist()
        one = None if labels is None else labels[:1]
        moved = [self.traverse(x0[:1], dim, torch.linspace(-2.5, 2.5, 7).tolist(), one) for dim in useful]
        return {
            "real, reconstructed": torch.stack([x0, self.reconstruct(x0, labels)], dim=1),
            "interpolations": self.interpolate(x0, x0.roll(-1, 0), 7, labels=labels),
            "one latent moved, a row each": torch.cat(moved),
        }

    def _decode_grid(self, points, labels):
        """Decode (B, T, *latent_shape) to (B, T, C, H, W); labels (B,)."""
        labels = self._labels(len(points), labels, "decode")
        labels = None if labels is None else labels.repeat_interleave(points.shape[1])
        return self.decode(points.flatten(0, 1), labels).unflatten(0, points.shape[:2])

    # ---- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self, num, labels=None, *, prior="auto", temperature=1.0, pixels="sample", seed=0, first_id=0, progress=False,
        check_finite=False,
    ):  # fmt: skip
        """Draw z from the prior and x from p(x | z); image i is a function of (seed, first_id + i) and its label.

        Args:
            num: number of images, 0 too.  labels: int, or num ints, of a conditional model; None takes the classes
                in turn.
            prior: "normal", N(0, 1); "gmm", the mixture fitted to the latents; "auto", "gmm" where one was fitted.
            temperature: scale of the prior's standard deviations, >= 0.
            pixels: "sample" draws them from p(x | z), "mean" takes E[x | z].
            seed: int in [0, 2^64).  first_id: global index of the first sample.
            progress: no effect, it is one pass.  check_finite: look at the decoder's output.
        Returns:
            (num, C, H, W) float32 in [-1, 1] on the network's device.
        Raises:
            ValueError: options out of range, labels as in `Model`.  RuntimeError: "gmm" without a fit.
            FloatingPointError: with check_finite, an output that is not finite.
        """
        if pixels not in PIXELS:
            raise ValueError(f"models/VAE.sample: pixels must be one of {', '.join(PIXELS)}, got {pixels!r}")
        if not is_number(temperature):
            raise ValueError(f"models/VAE.sample: temperature must be a finite number >= 0, got {temperature!r}")
        prior = self._which(prior, "sample")
        sample_ids, labels = self._sample_ids(num, first_id), self._labels(num, labels)
        draw = {"seed": seed, "sample_ids": sample_ids}
        with torch.no_grad(), evaluating(self.net):
            if prior == "gmm":
                z = self.net.prior.sample(num, labels, temperature=temperature, **draw).view(num, *self.latent_shape)
            else:
                z = temperature * ops.normal((num, *self.latent_shape), stream="init", device=self.device, **draw)
            maps = self.net.decode(z, labels)
            if check_finite and not torch.isfinite(maps).all():
                raise FloatingPointError(
                    "models/VAE.sample: the decoder's output is not finite; has training diverged?"
                )
            return self.pixels.sample(maps, **draw) if pixels == "sample" else self.pixels.mean(maps)

    def _which(self, prior, method):
        """The prior asked for, with "auto" resolved."""
        if prior not in PRIORS:
            raise ValueError(f"models/VAE.{method}: prior must be one of {', '.join(PRIORS)}, got {prior!r}")
        fitted = hasattr(self.net, "prior") and self.net.prior.fitted
        if prior == "gmm" and not fitted:
            raise RuntimeError(f"models/VAE.{method}: prior 'gmm' has not been fitted; call fit_prior or use 'normal'")
        return ("gmm" if fitted else "normal") if prior == "auto" else prior

    def _given(self, x0, labels, method):
        """The labels of real images, checked: a conditional network's latents are those of a class."""
        if not self.num_classes:
            return None
        if labels is None:
            raise ValueError(f"models/VAE.{method}: labels must be given for a conditional model, got None")
        return self._labels(len(x0), labels, method)

    def _seen(self, labels):
        """The labels on the network's device if it looks at them."""
        return labels.to(self.device) if labels is not None and self.num_classes else None

    # ---- configuration ---------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        net = {"name": "vae", **dataclasses.asdict(self.net.config)}
        return {"family": "vae", "net": net, "num_levels": self.num_levels, **dataclasses.asdict(self.settings)}

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        out_channels may be left out of "net": the likelihood says what it is. Raises ValueError.
        """
        options = [field.name for field in dataclasses.fields(VAEOptions)]
        rest = cls._entries(config, ("num_levels", *options), {"net": ("vae",)})
        net, rest["num_levels"] = rest.pop("net"), rest.get("num_levels", 256)
        del net["name"]
        named = net.pop("config", {})
        if "out_channels" not in net:
            channels = VAENet.describe(named, **net).in_channels
            settings = VAEOptions(**{key: rest[key] for key in ("likelihood", "components") if key in rest})
            pixels = likelihoods.build(settings.likelihood, channels, rest["num_levels"], settings.components)
            net["out_channels"] = pixels.num_maps()
        return cls(VAENet.from_config(named, seed=seed, **net), **rest)


def _parts(num, size):
    """0 .. num - 1 as ranges of at most `size`."""
    return [range(first, min(first + size, num)) for first in range(0, num, size)]


def _standard_log_prob(z):
    """log N(z; 0, 1), (B,) float64."""
    flat = z.flatten(1).double()
    return -0.5 * flat.square().sum(1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)
