"""GAN: a generator against a discriminator.

Goodfellow et al. 2014 (minimax and non-saturating losses); Lim & Ye 2017, Miyato et al. 2018 (hinge); Gulrajani et al.
2017 (WGAN-GP); Mescheder et al. 2018 (R1); Karras et al. 2020 (lazy regularisation; signs of overfitting); Zhao et al.
2020 (DiffAugment).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

from genengine import ops
from genengine._progress import progress_bar
from genengine.evaluate import class_entropy, squared_distances
from genengine.models import diff_augment, latent_paths
from genengine.models.base import INNOCENCE, Model, Option, Turn
from genengine.nets import gan as nets
from genengine.nets.configs import is_int, is_number

LOSSES = ("minimax", "non_saturating", "hinge", "wgan_gp")
REAL, FAKE = 0, 1  # parts of the augmentation's draws
# What `diagnose` warns of.
LEAST_DISTANCE_RATIO, LEAST_ENTROPY, MOST_OVERFIT = 0.5, 0.7, 0.9


def discriminator_loss(kind, real, fake):
    """Mean over the batch, of logits real = D(x), fake = D(G(z)):

    minimax, non_saturating: softplus(-real) + softplus(fake) = -log sigmoid(real) - log(1 - sigmoid(fake))
    hinge: max(0, 1 - real) + max(0, 1 + fake);    wgan_gp: fake - real
    """
    if kind == "hinge":
        return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
    if kind == "wgan_gp":
        return fake.mean() - real.mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(kind, fake):
    """minimax: log(1 - sigmoid(fake));    non_saturating: -log sigmoid(fake);    hinge, wgan_gp: -fake; the mean."""
    if kind == "minimax":
        return -F.softplus(fake).mean()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def input_gradient(logits, x):
    """dlogits_b / dx_b, (B, C, H, W), itself differentiable."""
    return torch.autograd.grad(logits.sum(), x, create_graph=True)[0]


class GAN(Model):
    """A generator and a discriminator, the losses of both, `sample` and `interpolate`.

    Args:
        generator: module generator(z, y) -> images, with `config` (latent_dim, num_classes, ...).
        discriminator: module discriminator(x, y) -> logits (B,), twice differentiable in x.
        loss: one of LOSSES. "minimax" is the saturating loss of the game itself, whose gradient fades while the
            discriminator is ahead.
        discriminator_steps: turns of the discriminator before each of the generator.
        r1_gamma, r1_every: gamma / 2 |dD/dx|^2 on real images, every r1_every turns and then r1_every-fold; gamma 0
            for none. Not with "wgan_gp", which has a penalty of its own.
        gp_weight: of (|dD/dx| - 1)^2 between real and fake images; "wgan_gp" only.
        augment: names from `diff_augment.POLICIES`.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: networks that do not fit each other, or parameters out of range.
    """

    family = "gan"
    presets = {
        "digits": {
            "model": {
                "net": {"name": "dcgan", "config": "tiny"}, "loss": "non_saturating", "r1_gamma": 0.3, "r1_every": 8,
                "augment": ["translation"],
            },
            "steps": 7000, "batch_size": 64, "betas": (0.0, 0.99), "weight_decay": 0.0, "ema_decay": 0.995,
            "clip_norm": 10.0,
        },
        "images": {
            "model": {
                "net": {"name": "dcgan", "config": "small"}, "loss": "non_saturating", "r1_gamma": 1.0, "r1_every": 16,
                "augment": ["brightness", "saturation", "contrast", "translation", "cutout"],
            },
            "steps": 100_000, "batch_size": 64, "lr": 1e-3, "betas": (0.0, 0.99), "weight_decay": 0.0,
            "schedule": "constant", "clip_norm": 10.0,
        },
        "smoke": {
            "model": {
                "net": {"name": "dcgan", "config": "tiny", "generator_dim": 16, "discriminator_dim": 16},
                "r1_gamma": 0.3,
            },
            "steps": 100, "batch_size": 64, "betas": (0.0, 0.99), "weight_decay": 0.0, "ema_decay": 0.9, "warmup": 20,
        },
    }  # fmt: skip
    options = (Option("truncation", 1.0, "scale of the latents in [0, 1]: below 1 images are alike"),)
    bars = {
        "frechet_distance": ("<=", 0.035),
        "coverage": (">=", 0.95),
        "recall": (">=", 0.85),
        **INNOCENCE,
    }

    def __init__(
        self, generator, discriminator, *, loss="non_saturating", discriminator_steps=1, r1_gamma=1.0, r1_every=16,
        gp_weight=10.0, augment=(), num_levels=256,
    ):  # fmt: skip
        if generator.config != discriminator.config:
            raise ValueError("models/GAN: generator and discriminator must be built from one config, got two")
        if loss not in LOSSES:
            raise ValueError(f"models/GAN: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        for name, value in (("discriminator_steps", discriminator_steps), ("r1_every", r1_every)):
            if not is_int(value, 1):
                raise ValueError(f"models/GAN: {name} must be an int >= 1, got {value!r}")
        for name, value in (("r1_gamma", r1_gamma), ("gp_weight", gp_weight)):
            if not is_number(value):
                raise ValueError(f"models/GAN: {name} must be a finite number >= 0, got {value!r}")
        if isinstance(augment, str) or not all(isinstance(name, str) for name in augment):
            raise ValueError(f"models/GAN: augment must be a list of names, got {augment!r}")
        diff_augment.check(augment)
        config = generator.config
        super().__init__(
            {"generator": generator, "discriminator": discriminator},
            (config.in_channels, config.image_size, config.image_size),
            config.num_classes,
            num_levels,
        )
        self.generator, self.discriminator = generator, discriminator
        self.kind, self.discriminator_steps, self.augment = loss, discriminator_steps, tuple(augment)
        self.r1_gamma, self.r1_every, self.gp_weight = r1_gamma, r1_every, gp_weight

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def averaged(self):
        return ("generator",)

    def turns(self, step):
        """`discriminator_steps` turns of the discriminator, every r1_every-th of them with R1, then the generator's."""
        k = self.discriminator_steps
        penalised = [(step * k + i) % self.r1_every == 0 for i in range(k)]
        turns = [Turn("discriminator", functools.partial(self.discriminator_terms, penalise=p)) for p in penalised]
        return [*turns, Turn("generator", self.terms)]

    def latents(self, num, *, seed, sample_ids=None, step=0):
        """z ~ N(0, 1), (num, latent_dim): a function of (seed, sample, step), stream "init"."""
        shape = (num, self.generator.config.latent_dim)
        return ops.normal(shape, seed=seed, sample_ids=sample_ids, step=step, stream="init", device=self.device)

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """The generator's loss, see `generator_loss`. Arguments as of `loss`; of x0 only the number of images counts.

        The latents and the augmentation of the fakes are draws; the gradients that reach the discriminator are not to
        be used.
        """
        draw, labels = self._draw(seed, sample_ids, step), self._given(labels)
        fake = self.generator(self.latents(len(x0), **draw), labels)
        logits = self.discriminator(diff_augment.augment(fake, self.augment, part=FAKE, **draw), labels)
        return {"loss": generator_loss(self.kind, logits)}

    def discriminator_terms(self, x0, labels=None, *, seed, sample_ids=None, step=0, penalise=True):
        """The discriminator's loss, see `discriminator_loss`, and its penalties.

        R1 (if `penalise`): r1_every gamma / 2 mean |dD(augment(x))/dx|^2 at the real images. wgan_gp: gp_weight
        mean (|dD/dx| - 1)^2 at x = t real + (1 - t) fake, t uniform of the stream "time". Arguments as of `loss`.

        Returns:
            {"loss", "real", "fake"}: the mean logits too, and "penalty", what was added to the loss (0 where none was
            due: over many turns its mean is what R1 or the gradient penalty comes to).
        """
        draw, labels = self._draw(seed, sample_ids, step), self._given(labels)
        r1 = penalise and self.r1_gamma > 0 and self.kind != "wgan_gp"
        with torch.no_grad():
            fake = self.generator(self.latents(len(x0), **draw), labels)
            fake = diff_augment.augment(fake, self.augment, part=FAKE, **draw)
        x0 = x0.detach().requires_grad_(r1)
        real = diff_augment.augment(x0, self.augment, part=REAL, **draw)
        logits = self.discriminator(real, labels), self.discriminator(fake, labels)
        loss = discriminator_loss(self.kind, *logits)
        penalty = torch.zeros((), device=x0.device)
        if r1:
            norm = input_gradient(logits[0], x0).square().sum((1, 2, 3))
            penalty = (0.5 * self.r1_gamma * self.r1_every) * norm.mean()
        if self.kind == "wgan_gp":
            t = ops.uniform((len(x0), 1, 1, 1), stream="time", device=x0.device, **draw)
            between = (t * real + (1 - t) * fake).detach().requires_grad_()
            slope = input_gradient(self.discriminator(between, labels), between)
            penalty = self.gp_weight * (slope.square().sum((1, 2, 3)).add(1e-12).sqrt() - 1).square().mean()
        means = {name: value.mean().detach() for name, value in zip(("real", "fake"), logits, strict=True)}
        return {"loss": loss + penalty, **means, "penalty": penalty.detach()}

    def _draw(self, seed, sample_ids, step):
        sample_ids = None if sample_ids is None else sample_ids.to(self.device)
        return {"seed": seed, "sample_ids": sample_ids, "step": step}

    def _given(self, labels):
        """The labels of a batch, where the networks take them: on their device."""
        return None if labels is None or not self.num_classes else labels.to(self.device)

    @torch.no_grad()
    def diagnose(self, x0, labels, *, seed, step):
        """How the game stands, on one batch of real images.

        Numbers:
            distance_ratio: mean distance between two fakes over that between two real images of the batch, if it has
                two.
            class_entropy: of the classes of the fakes' nearest real images, over that of the real ones; with labels.
            overfit: E[sign D(x)] over the real images, r_t of Karras et al. 2020; not for "wgan_gp", whose logits have
                no zero.
            logit_gap: E[D(x)] - E[D(G(z))].
        Returns:
            (numbers, warnings), each warning with value, threshold and remedy.
        """
        draw = self._draw(seed, None, step)
        given = self._given(labels)
        fake = self.generator(self.latents(len(x0), **draw), given)
        real_logits = self.discriminator(diff_augment.augment(x0, self.augment, part=REAL, **draw), given)
        fake_logits = self.discriminator(diff_augment.augment(fake, self.augment, part=FAKE, **draw), given)
        values = {"fakes": fake, "logits": torch.cat([real_logits, fake_logits])}
        bad = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
        if bad:
            return {}, [f"{' and '.join(bad)} are not finite: training has diverged; lower lr or raise r1_gamma"]
        a, b = (images.double().cpu().flatten(1).numpy() for images in (x0, fake))
        numbers = {} if len(x0) < 2 else {"distance_ratio": _mean_distance(b) / max(_mean_distance(a), 1e-12)}
        if labels is not None:
            classes = labels.cpu().numpy()
            count = max(int(classes.max()) + 1, 2)
            reference = class_entropy(classes, count)
            if reference > 0:
                nearest = classes[squared_distances(b, a).argmin(1)]
                numbers["class_entropy"] = class_entropy(nearest, count) / reference
        if self.kind != "wgan_gp":
            numbers["overfit"] = float(torch.sign(real_logits).mean())
        numbers["logit_gap"] = float(real_logits.mean() - fake_logits.mean())
        return numbers, _warnings(numbers)

    # ---- sampling ------------------------------------------------------------------------------------------------

    def sample(self, num, labels=None, *, truncation=1.0, seed=0, first_id=0, progress=False, check_finite=False):
        """Draw images G(truncation z, y), z ~ N(0, 1).

        Sample i is a function of (seed, first_id + i) and its label alone, up to rounding in products.

        Args:
            num: number of images, 0 too.
            labels: int, or num ints (sequence or tensor) in 0 .. num_classes - 1; None takes the classes in turn.
            truncation: in [0, 1]; below 1 the images gather around the most typical one of their class.
            seed: int in [0, 2^64).  first_id: global index of the first sample, in [0, 2^32 - num].
            progress: show a progress bar.
            check_finite: look at every image.
        Returns:
            (num, C, H, W) float32 on the network's device, in [-1, 1], not rounded to the levels.
        Raises:
            ValueError: labels, first_id or truncation out of range or of the wrong number.
            TypeError: labels that are not integers, a num or first_id that is no int.
            FloatingPointError: with check_finite, an image that is not finite.
        """
        truncation = self._truncation("sample", truncation)
        ids = self._sample_ids(num, first_id)
        labels = self._labels(num, labels)
        z = truncation * self.latents(num, seed=seed, sample_ids=ids)
        return self._generate(z, labels, progress, check_finite)

    def interpolate(self, num, labels=None, *, steps=8, kind="slerp", truncation=1.0, seed=0, first_id=0):
        """num rows of images on paths between two latents, those of the samples first_id + 2 i and first_id + 2 i + 1.

        Args:
            num: number of rows.
            labels: of the rows, as for `sample`.
            steps: images of a row, at least 2, the ends included.
            kind: "slerp", along the sphere, or "lerp", straight; see `latent_paths`.
            truncation, seed, first_id: as for `sample`.
        Returns:
            (num, steps, C, H, W) float32.
        Raises:
            ValueError, TypeError: as `sample`; steps < 2 or an unknown kind.
        """
        truncation = self._truncation("interpolate", truncation)
        labels = self._labels(num, labels, "interpolate")
        ends = self.latents(2 * num, seed=seed, sample_ids=self._sample_ids(2 * num, first_id))
        z = truncation * latent_paths.path(kind, ends[0::2], ends[1::2], steps)  # (num, steps, latent_dim)
        labels = None if labels is None else labels.repeat_interleave(steps)
        return self._generate(z.flatten(0, 1), labels, False, False).view(num, steps, *self.image_shape)

    def panels(self, x0, labels=None, *, seed=0):
        """Interpolations along the sphere, a row per class."""
        return {"interpolations": self.interpolate(len(x0), labels, seed=seed)}

    def _generate(self, z, labels, progress, check_finite, chunk=256):
        out = torch.empty((len(z), *self.image_shape), device=self.device)
        with torch.inference_mode(), progress_bar(progress, len(z), self.family, "image") as bar:
            for i in range(0, len(z), chunk):
                part = slice(i, i + chunk)
                out[part] = self.generator(z[part], None if labels is None else labels[part])
                if bar is not None:
                    bar.update(len(out[part]))
        if check_finite and not torch.isfinite(out).all():
            wrong = int((~torch.isfinite(out)).flatten(1).any(1).sum())
            raise FloatingPointError(f"models/GAN.sample: {wrong} of {len(out)} images are not finite")
        return out

    def _truncation(self, method, truncation):
        if not is_number(truncation) or truncation > 1:
            raise ValueError(f"models/GAN.{method}: truncation must be in [0, 1], got {truncation!r}")
        return float(truncation)

    # ---- files ---------------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        return {
            "family": "gan",
            "net": {"name": "dcgan", **dataclasses.asdict(self.generator.config)},
            "loss": self.kind,
            "discriminator_steps": self.discriminator_steps,
            "r1_gamma": self.r1_gamma,
            "r1_every": self.r1_every,
            "gp_weight": self.gp_weight,
            "augment": list(self.augment),
            "num_levels": self.num_levels,
        }

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        "net" may also hold "config", the name of a size, beside fields that replace its own.

        Raises:
            ValueError: another family, an unknown network or entry, a missing one.
        """
        options = ("loss", "discriminator_steps", "r1_gamma", "r1_every", "gp_weight", "augment", "num_levels")
        options = cls._entries(config, options, {"net": ("dcgan",)})
        net = options.pop("net")
        del net["name"]
        shape = nets.resolve_config(net.pop("config", {}), **net)
        return cls(
            nets.Generator(shape, seed=seed),
            nets.Discriminator(shape, seed=seed),
            **options,
        )


def _mean_distance(points):
    """Mean distance between two different ones of (N, D)."""
    n = len(points)
    return float((squared_distances(points, points) ** 0.5).sum() / max(n * (n - 1), 1))


def _warnings(numbers):
    found = []
    ratio, entropy, overfit = (numbers.get(name) for name in ("distance_ratio", "class_entropy", "overfit"))
    if ratio is not None and ratio < LEAST_DISTANCE_RATIO:
        found.append(
            f"the samples are collapsing: their mean distance is {ratio:.2f} of that between real images (below "
            f"{LEAST_DISTANCE_RATIO}); raise r1_gamma, set net.stddev_group or lower the generator's lr"
        )
    if entropy is not None and entropy < LEAST_ENTROPY:
        found.append(
            f"the samples fall into few classes: class entropy {entropy:.2f} of the real one (below {LEAST_ENTROPY}); "
            "raise r1_gamma or set net.stddev_group"
        )
    if overfit is not None and overfit > MOST_OVERFIT:
        found.append(
            f"the discriminator knows the real images by heart: mean sign of its logits {overfit:.2f} (above "
            f"{MOST_OVERFIT}); add to augment, raise r1_gamma or stop earlier"
        )
    return found
