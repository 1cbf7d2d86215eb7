"""PixelCNN: pixel by pixel, with the exact likelihood of every image.

    p(x | y) = prod_i p(x_i | x_1 .. x_{i-1}, y)        i in raster order, within a pixel by channel

van den Oord et al. 2016 (PixelRNN; Conditional PixelCNN Decoders); Salimans et al. 2017 (PixelCNN++); sampling as a
fixed-point iteration: Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, 2021.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F

from genengine import ops
from genengine._progress import progress_bar
from genengine.models.base import INNOCENCE, Model, Option, drop_labels
from genengine.models.likelihoods import level_index, level_value
from genengine.nets import pixelcnn as nets
from genengine.nets.configs import is_number
from genengine.ops._categorical import inverse_cdf
from genengine.ops._registry import automatic
from genengine.ops.pixelcnn_sample import ORDERS as CACHED_ORDERS
from genengine.ops.pixelcnn_sample import SAMPLE

MARGINALS = ("mixture", "null_class")
ORDERS = (*CACHED_ORDERS, "fixed_point")
CHUNK = 256  # images of a whole-image pass on a CPU: their features stay in its cache
CACHED = 64  # images whose caches a CPU keeps at a time, some hundred kilobytes each


def _slices(count, most):
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


class PixelCNN(Model):
    """A network for p(x_i | x_1 .. x_{i-1}, y), its exact `log_prob`, and `sample`.

    Args:
        net: module net(x, y, dropout=None) as `nets.pixelcnn.PixelCNN`; its config's num_levels are the model's.
        class_drop: probability in [0, 1) of hiding the label in training, which teaches the null class.
    Raises:
        ValueError: parameters out of range.
    """

    family = "pixelcnn"
    likelihood = "exact"
    presets = {
        "digits": {
            "model": {"net": {"name": "pixelcnn", "config": "tiny", "dropout": 0.3}, "class_drop": 0.1},
            "steps": 1500,
        },
        "images": {
            "model": {
                "net": {"name": "pixelcnn", "config": "small", "head": "logistic_mixture", "dropout": 0.3},
                "class_drop": 0.1,
            },
            "steps": 100_000, "batch_size": 64, "lr": 1e-3, "warmup": 1000, "ema_decay": 0.9995,
        },
        "smoke": {
            "model": {"net": {"name": "pixelcnn", "config": "tiny", "dim": 16, "depth": 4}, "class_drop": 0.1},
            "steps": 100, "batch_size": 64, "warmup": 10, "ema_decay": 0.9,
        },
    }  # fmt: skip
    options = (Option("temperature", 1.0, "below 1 likelier images, above 1 more varied ones; 1 is the model itself"),)
    bars = {"bits_per_dim": ("<=", 1.69), "unconditional_bits_per_dim": ("<=", 1.79), **INNOCENCE}

    def __init__(self, net, *, class_drop=0.1):
        if not is_number(class_drop, below=1):
            raise ValueError(f"models/PixelCNN: class_drop must be in [0, 1), got {class_drop!r}")
        config = net.config
        super().__init__(
            {"net": net},
            (config.in_channels, config.image_size, config.image_size),
            config.num_classes,
            config.num_levels,
        )
        self.net, self.class_drop = net, class_drop

    # ---- likelihood ----------------------------------------------------------------------------------------------

    def levels(self, x0):
        """The nearest level of each pixel of x0 in [-1, 1], int64 in 0 .. L - 1."""
        return level_index(x0.float(), self.num_levels)

    def pixels(self, levels):
        """2 level / (L - 1) - 1, float32: the inverse of `levels`."""
        return level_value(levels, self.num_levels)

    def drop_labels(self, labels, *, seed, sample_ids=None, step=0):
        """Labels (N,) int64 on the CPU with a share `class_drop` replaced by the null class."""
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        return drop_labels(labels, self.class_drop, self.net.null_class, **draw)

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """-log p(x0 | y) / (C H W), in nats: the mean over the batch. Arguments as of `loss`.

        A share `class_drop` of the labels is hidden; dropout draws from the stream "dropout".
        """
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        if labels is not None:
            labels = self.drop_labels(labels.cpu(), **draw).to(x0.device)
        if sample_ids is not None:
            draw["sample_ids"] = sample_ids.to(x0.device)
        nats = -self._log_prob(x0, labels, dropout=draw).mean() / math.prod(self.image_shape)
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2.0)}

    @torch.no_grad()
    def log_prob(self, x0, labels=None, *, seed=0, marginal="mixture"):
        """log p(x0 | y) of the discrete image, exact, in nats.

        Args:
            x0: (B, C, H, W) floating point in [-1, 1], taken at the nearest levels.
            labels: int or (B,) ints in 0 .. num_classes - 1; None for log p(x0) without a label.
            seed: unused, there is nothing to draw.
            marginal: what p(x0) is where the network has classes. "mixture": mean_y p(x0 | y), every class as
                likely as the others, of which `sample(num)` draws its classes in turn; costs num_classes passes.
                "null_class": the network's own p(x0 | no class), for which it must have been trained with class_drop;
                one pass.
        Returns:
            (B,) float32.
        Raises:
            ValueError: images of another shape, labels or marginal out of range.
        """
        self._check_images(x0, "log_prob")
        if marginal not in MARGINALS:
            raise ValueError(f"models/PixelCNN.log_prob: marginal must be one of {MARGINALS}, got {marginal!r}")
        x0 = x0.to(self.device)
        if labels is not None or self.num_classes == 0:
            return self._log_prob(x0, self._labels(len(x0), labels, "log_prob"))
        if marginal == "null_class":
            return self._log_prob(x0, None)
        each = [self._log_prob(x0, x0.new_full((len(x0),), y, dtype=torch.int64)) for y in range(self.num_classes)]
        return torch.logsumexp(torch.stack(each), 0) - math.log(self.num_classes)

    def measure(self, x0, labels=None, *, seed=0):
        """bits_per_dim, exact; where labels are given also unconditional_bits_per_dim, of log mean_y p(x0 | y)."""
        found = {"bits_per_dim": self.bits_per_dim(x0, labels)}
        return found if labels is None else found | {"unconditional_bits_per_dim": self.bits_per_dim(x0)}

    def _log_prob(self, x0, labels, dropout=None):
        levels = self.levels(x0)
        x0 = self.pixels(levels)
        output = self.net(x0, labels, dropout=dropout).float()
        if self.net.config.head == "logistic_mixture":
            return ops.logistic_mixture_log_prob(x0, output, bins=self.num_levels).sum((1, 2))
        return -F.cross_entropy(output, levels, reduction="none").sum((1, 2, 3))

    # ---- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self, num, labels=None, *, temperature=1.0, seed=0, first_id=0, given=None, known=None, order=None,
        progress=False, check_finite=False,
    ):  # fmt: skip
        """Draw images, each pixel from the network's distribution given those before it, by its inverse CDF.

        Pixel (row y, column x, channel c) takes the uniform of index (y W + x) C + c of the stream "uniform", step 0; a
        mixture of logistics takes (y W + x) (1 + C) + j, j = 0 .. C, as `ops.logistic_mixture_sample` says. So sample i
        is a function of (seed, first_id + i) and its label alone, up to rounding in products, which may move a pixel
        whose uniform lies at the edge of two levels.

        `ops.pixelcnn_sample` computes every activation once. For networks that it cannot read, and where it has no
        kernel, there is the fixed point: as the uniforms are known beforehand, the image is the only solution of
        x = F(x), where F draws every pixel from the distribution that the network gives at x. Repeated whole-image
        passes x <- F(x) settle at least one more pixel each, usually many, and end when nothing changes. Images that
        are done, and settled rows further above than the network reaches, are not computed again.

        Args:
            num: number of images, 0 too.
            labels: int, or num ints (sequence or tensor) in 0 .. num_classes - 1; None takes the classes in turn.
            temperature: logits are divided by it, in [1e-6, 1e6]; for a mixture of logistics see the op.
            seed: int in [0, 2^64).  first_id: global index of the first sample, in [0, 2^32 - num].
            given, known: images (num or 1, C, H, W) to complete, and where they are known: bool, broadcastable to
                them. Known pixels stay, taken at their nearest levels. Every other pixel sees the known and drawn ones
                *before* it: the exact conditional distribution if all known pixels come first in raster order. Under a
                mixture of logistics a pixel is known in all its channels or in none, but for the fixed point, which
                draws all channels and then puts the known ones back.
            order: "raster", "wavefront" or "naive" of `ops.pixelcnn_sample`, or "fixed_point"; None: "raster" where the
                op has a kernel for the device, else "fixed_point". The images are the same.
            progress: show a progress bar.  check_finite: look at every output of the network.
        Returns:
            (num, C, H, W) float32 on the network's device, on the levels 2 i / (L - 1) - 1. After Ctrl-C between rows
            what was drawn so far, with a warning; the rest is 0, but for known pixels. The fixed point passes
            KeyboardInterrupt on.
        Raises:
            ValueError: labels, first_id, temperature or order out of range or of the wrong number; given without known.
            TypeError: labels that are not integers, a num or first_id that is no int.
            FloatingPointError: with check_finite, an output of the network that is not finite.
        """
        if not is_number(temperature, 1e-6) or temperature > 1e6:
            raise ValueError(f"models/PixelCNN.sample: temperature must be in [1e-6, 1e6], got {temperature!r}")
        if order is not None and order not in ORDERS:
            raise ValueError(f"models/PixelCNN.sample: order must be one of {', '.join(ORDERS)} or None, got {order!r}")
        ids = self._sample_ids(num, first_id)
        labels = self._labels(num, labels)
        given, known = self._given(num, given, known)
        if order is None:
            order = "raster" if self._has_kernel() else "fixed_point"
        out = torch.zeros((num, *self.image_shape), device=self.device)
        if num == 0:
            return out
        if known is not None:
            out.copy_(torch.where(known, given, out))
        settle = self._settle_all if order == "fixed_point" else partial(self._draw_all, order)
        with torch.inference_mode():
            settle(out, ids, labels, temperature, seed, (given, known), progress, check_finite)
        return out

    def _has_kernel(self):
        if not hasattr(self.net, "packed"):
            return False
        parameter = next(self.net.parameters())
        return automatic(SAMPLE, parameter.device, parameter.dtype) != "reference"

    def _draw_all(self, order, out, ids, labels, temperature, seed, fixed, progress, check_finite):
        """`ops.pixelcnn_sample` for as many images at a time as its caches are kept small by."""
        num, size = len(out), self.image_shape[1]
        weights = self.net.packed()
        with progress_bar(progress, num * size, self.family, "row") as bar:
            for part in _slices(num, CACHED if out.device.type == "cpu" else num):
                count = len(ids[part])
                callback = None if bar is None else lambda done, rows, count=count: bar.update(count)
                given, known = (None if tensor is None else tensor[part] for tensor in fixed)
                drawn = ops.pixelcnn_sample(
                    weights, count, labels=None if labels is None else labels[part], temperature=float(temperature),
                    seed=seed, sample_ids=ids[part], given=given, known=known, order=order, callback=callback,
                )  # fmt: skip
                if check_finite and not torch.isfinite(drawn.log_prob).all():
                    raise FloatingPointError("models/PixelCNN.sample: the network's output is not finite")
                out[part] = drawn.x
                if drawn.rows < size:
                    warnings.warn(
                        f"models/PixelCNN.sample: interrupted after {part.start} images and {drawn.rows} of {size} "
                        f"rows of {count} more; the rest of the {num} images is 0",
                        stacklevel=4,
                    )
                    return

    def _settle_all(self, out, ids, labels, temperature, seed, fixed, progress, check_finite):
        given, known = fixed
        with progress_bar(progress, len(out), self.family, "image") as bar:
            for part in _slices(len(out), CHUNK if out.device.type == "cpu" else len(out)):
                draw = self._drawer(ids[part], temperature, seed)
                some = None if known is None else (given[part], known[part])
                self._settle(out[part], None if labels is None else labels[part], draw, some, bar, check_finite)

    def panels(self, x0, labels=None, *, seed=0, columns=6):
        """Completions: the upper half as given, draws of the rest, and the image it was cut from."""
        known = torch.zeros(self.image_shape, dtype=torch.bool, device=self.device)
        known[:, : self.image_shape[1] // 2] = True
        given = x0.repeat_interleave(columns, 0)
        labels = None if labels is None else labels.repeat_interleave(columns)
        drawn = self.sample(len(given), labels, seed=seed, given=given, known=known).unflatten(0, (len(x0), columns))
        cut = torch.where(known, x0, -1.0)
        return {"completions: given, drawn, real": torch.cat([cut[:, None], drawn, x0[:, None]], dim=1)}

    def _settle(self, x, labels, draw, fixed, bar, check_finite):
        """x <- F(x) in place until nothing changes; images that are done leave the batch. fixed: (given, known)."""
        size = self.image_shape[1]
        first = 0  # the first row with a pixel that may still change
        place, part = torch.arange(len(x), device=x.device), x.clone()  # part: the images x[place]
        while len(place):
            top = max(0, first - self.net.reach)
            y = None if labels is None else labels[place]
            output = self.net(part[:, :, top:], y, first_row=top).float()
            if check_finite and not torch.isfinite(output).all():
                raise FloatingPointError(
                    f"models/PixelCNN.sample: the network's output is not finite, at rows {top} .. {size - 1}"
                )
            new = draw(output[..., first - top :, :], first, place)
            if fixed is not None:
                given, known = (tensor[place][:, :, first:] for tensor in fixed)
                new = torch.where(known, given, new)
            changed = (new != part[:, :, first:]).any(3).any(1)  # (B, rows left)
            part[:, :, first:] = new
            going = changed.any(1)
            # Up to its first change F's argument was final, so what it gave is final: rows before that are settled.
            left = int(going.sum())
            first += int(changed.any(0).int().argmax())
            if left <= 0.75 * len(place):
                if bar is not None:
                    bar.update(len(place) - left)
                x[place[~going]] = part[~going]
                place, part = place[going], part[going]

    def _drawer(self, ids, temperature, seed):
        """draw(output of rows first .. of the images `place`, first, place) -> their pixels: F without the network."""
        c, size, _ = self.image_shape
        if self.net.config.head == "categorical":
            u = ops.uniform((len(ids), size, size, c), seed=seed, sample_ids=ids, stream="uniform", device=ids.device)
            u = u.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
            return lambda output, first, place: self.pixels(inverse_cdf(output, u[place][:, :, first:], temperature))

        def draw(output, first, place):
            # The op counts pixels from the first of what it is given: rows above are filled up.
            whole = F.pad(output, (0, 0, first, 0))
            options = {"channels": c, "bins": self.num_levels, "temperature": float(temperature)}
            return ops.logistic_mixture_sample(whole, seed=seed, sample_ids=ids[place], **options)[:, :, first:]

        return draw

    def _given(self, num, given, known):
        """given and known as (num, C, H, W) tensors on the levels and on the model's device, or None twice."""
        if given is None and known is None:
            return None, None
        if given is None or known is None:
            raise ValueError("models/PixelCNN.sample: given and known must come together, got one of them")
        if not isinstance(known, torch.Tensor) or known.dtype != torch.bool:
            raise ValueError("models/PixelCNN.sample: known must be a bool tensor, True where the pixel stays")
        self._check_images(given, "sample")
        shape = (num, *self.image_shape)
        try:
            given, known = given.to(self.device).expand(shape), known.to(self.device).expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"models/PixelCNN.sample: given and known must broadcast to (num, C, H, W) = {shape}, got "
                f"{tuple(given.shape)} and {tuple(known.shape)}"
            ) from error
        return self.pixels(self.levels(given)), known

    # ---- files ---------------------------------------------------------------------------------------------------

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        return {
            "family": "pixelcnn",
            "net": {"name": "pixelcnn", **dataclasses.asdict(self.net.config)},
            "class_drop": self.class_drop,
            "num_levels": self.num_levels,
        }

    @classmethod
    def fit_config(cls, config, image_shape, num_classes, num_levels):
        """As `Model.fit_config`: here the levels are the network's, too."""
        fitted = super().fit_config(config, image_shape, num_classes, num_levels)
        return {**fitted, "net": {**fitted["net"], "num_levels": num_levels}}

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        "net" may also hold "config", the name of a size, beside fields that replace its own.

        Raises:
            ValueError: another family, an unknown network or entry, a missing one.
        """
        where = "models/PixelCNN.from_config"
        options = cls._entries(config, ("class_drop", "num_levels"), {"net": ("pixelcnn",)})
        net = options.pop("net")
        del net["name"]
        if "num_levels" in config and net.setdefault("num_levels", config["num_levels"]) != config["num_levels"]:
            raise ValueError(
                f"{where}: entry 'num_levels' must be the network's = {net['num_levels']}, got {config['num_levels']!r}"
            )
        options.pop("num_levels", None)  # the network's, which has them
        return cls(nets.PixelCNN.from_config(net.pop("config", {}), seed=seed, **net), **options)
