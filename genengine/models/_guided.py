"""What diffusion and flow models share: network and path from a config, hidden labels, guided sampling."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from genengine import _capture, ops, paths, sampler
from genengine.engine import Engine
from genengine.models import ode_likelihood
from genengine.models.base import INNOCENCE, Model, drop_labels
from genengine.models.evaluating import evaluating
from genengine.nets.configs import is_int, is_number
from genengine.nets.dit import DiT
from genengine.nets.unet import UNet

NETS = {"dit": DiT, "unet": UNet}
MAX_GRAPHS = 4  # kept by a model: batch sizes, solvers, with guidance and without


class Guided(Model):
    """A network net(x, t, y), a path, labels that are hidden at the rate `class_drop`, and guidance.

    On a GPU `sample` captures a row of the loop in a CUDA graph, which is kept for further calls (by an `Engine`, for
    at most four batch sizes or kinds of solver, and a quarter of the memory) until `train()` or `to(...)`.

    Args:
        net: module net(x, t, y) -> output; has `config` with image_size, in_channels and num_classes, and `null_class`.
        path: path from data (t = 0) to noise (t = 1).
        class_drop: probability in [0, 1) of hiding the label in training.  num_levels: see `Model`.
    """

    bars = {
        "frechet_distance": ("<=", 0.05),
        "knn_accuracy": (">=", 0.98),
        "coverage": (">=", 0.88),
        **INNOCENCE,
    }

    def __init__(self, net, path, class_drop, num_levels):
        if not 0 <= class_drop < 1:
            raise ValueError(f"{self._name()}: class_drop must be in [0, 1), got {class_drop}")
        config = net.config
        shape = (config.in_channels, config.image_size, config.image_size)
        super().__init__({"net": net}, shape, config.num_classes, num_levels)
        self.net, self.path, self.class_drop = net, path, class_drop
        self._engines: dict[Callable, Engine] = {}

    def drop_labels(self, labels, *, seed, sample_ids=None, step=0):
        """Labels (N,) int64 on the CPU with a share `class_drop` replaced by the null class."""
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        return drop_labels(labels, self.class_drop, self.net.null_class, **draw)

    def _noised(self, x0, labels, coefficients, *, seed, sample_ids, step):
        """(x_t, target, labels) of a training batch: noise of stream "diffuse", labels hidden; on x0's device.

        coefficients: alpha, sigma, c_x0, c_eps, float64 arrays (B,), see `ops.diffuse`.
        """
        rows = (torch.from_numpy(np.asarray(c, dtype=np.float32)).to(x0.device) for c in coefficients)
        on_device = None if sample_ids is None else sample_ids.to(x0.device)
        x_t, target = ops.diffuse(x0, *rows, seed=seed, sample_ids=on_device, step=step)
        if labels is not None:
            hidden = self.drop_labels(labels.cpu(), seed=seed, sample_ids=sample_ids, step=step)
            labels = hidden.to(x0.device)
        return x_t, target, labels

    def _guidance(self, num, guidance):
        """The guidance as a float, or as a float64 array (num,) with one weight per sample."""
        if isinstance(guidance, torch.Tensor):
            guidance = guidance.detach().cpu().numpy()
        weights = np.asarray(guidance, dtype=np.float64)
        if weights.shape not in ((), (num,)) or not np.isfinite(weights).all():
            got = f"shape {weights.shape}" if weights.ndim else f"{weights}"
            raise ValueError(
                f"{self._name()}.sample: guidance must be a finite number or (num,) = ({num},) of them, got {got}"
            )
        if self.num_classes == 0 and np.any(weights != 1.0):
            raise ValueError(f"{self._name()}.sample: guidance must be 1 for a network without classes, got {guidance}")
        if weights.ndim == 0:
            return float(weights)
        return weights if num else 1.0  # no sample, no weight

    def _run_table(
        self, table, denoiser, num, labels, guidance, *, seed, sample_ids, callback, progress, check_finite, extensions
    ):  # fmt: skip
        """Run a table on num samples; guidance as the table has it. See `sampler.sample`."""
        guided = bool(np.any(guidance != 1.0))
        with evaluating(self.net):
            return self._sampler(denoiser)(
                table,
                (num, *self.image_shape),
                cond=None if labels is None else {"y": labels},
                uncond={"y": torch.full_like(labels, self.net.null_class)} if guided else None,
                seed=seed,
                sample_ids=sample_ids,
                callback=callback,
                progress=progress,
                check_finite=check_finite,
                extensions=extensions,
            )

    def _sampler(self, denoiser):
        """`sample` of this denoiser: where there are graphs, an engine's, which captures once and not in every call.

        It captures one row and not the loop, which a single call would wait for, and which serves one number of steps.
        """
        if self.device.type not in _capture.GRAPHS:
            return functools.partial(sampler.sample, denoiser)
        if denoiser not in self._engines:
            self._engines[denoiser] = Engine(denoiser, max_graphs=MAX_GRAPHS, max_loop_rows=0)
        return self._engines[denoiser].sample

    def train(self, mode=True):
        """Put the networks into training mode or out of it; training frees what sampling has kept on a GPU."""
        if mode:
            self._engines.clear()
        return super().train(mode)

    def to(self, device):
        """Move the network, in place, and free what sampling has kept on a GPU; returns the model."""
        self._engines.clear()
        return super().to(device)

    def panels(self, x0, labels=None, *, seed=0, frames=8):
        """The way from noise to image, a row each: the first state, the last, and states evenly between them."""
        states = []
        options = {"callback": lambda info: states.append(info.x.clone()), **self.defaults()}
        final = self.sample(len(x0), labels, seed=seed, **options)
        states = [ops.normal(final.shape, seed=seed, device=self.device), *states[:-1], final]
        pick = np.linspace(0, len(states) - 1, frames).round().astype(int)
        return {"from noise to image": torch.stack([states[i] for i in pick], dim=1).clamp(-1, 1)}

    def _class_or_none(self, num, labels, method):
        """Labels for a likelihood: as `_labels`, but None means that of no class."""
        if labels is None:
            return None if self.num_classes == 0 else torch.full((num,), self.net.null_class, device=self.device)
        return self._labels(num, labels, method)

    def velocity(self, x, t, labels=None):
        """dx/dt of the probability-flow ODE at (x, t): x (B, C, H, W), t a float, labels (B,) int64 or None."""
        raise NotImplementedError

    def ode_log_prob(
        self, x0, labels=None, *, steps=10, method="rk4", divergence="hutchinson", probes=1, dequantisation="path",
        seed=0, sample_ids=None,
    ):  # fmt: skip
        """A lower bound of log p(x0 | labels) of the discrete image, by the probability-flow ODE.

        The density along the ODE is exact up to its steps (with "hutchinson": unbiased); what makes it a bound is that
        discrete pixels must be spread before they have a density, with noise of (seed, sample):
            "path": the path's own noise at the time where sigma/alpha is a sixth of a level's width, and the levels
                are read back from there (Kingma et al. 2021). Tight for models trained on discrete pixels.
            "uniform": noise over the whole width of a level (Theis et al. 2016). Loose unless trained with it.

        Args:
            x0: (B, C, H, W) in [-1, 1].
            labels: int or (B,) ints, for log p(x0 | label); None for that of no class.
            steps: of equal length in sqrt(t).  method: "rk4" or "heun".
            divergence: "hutchinson", with `probes` random directions, or "exact": C H W backward passes.
            dequantisation: "path" or "uniform".
            seed: int in [0, 2^64).  sample_ids: (B,) int64, default 0 .. B - 1.
        Returns:
            (B,) float32, nats.
        Raises:
            ValueError: an unknown choice, images the model was not made for, or "uniform" on a path whose derivatives
                are infinite at t = 0.
        """
        self._check_images(x0, "ode_log_prob")
        for name, value, allowed in (
            ("divergence", divergence, ode_likelihood.DIVERGENCES),
            ("dequantisation", dequantisation, ode_likelihood.DEQUANTISATIONS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{self._name()}.ode_log_prob: {name} must be one of {', '.join(allowed)}, got {value!r}"
                )
        for name, value in (("steps", steps), ("probes", probes)):
            if not is_int(value, 1):
                raise ValueError(f"{self._name()}.ode_log_prob: {name} must be an int >= 1, got {value!r}")
        labels = self._class_or_none(len(x0), labels, "ode_log_prob")
        x0 = x0.to(self.device, next(self.net.parameters()).dtype)
        draw = {"seed": seed, "sample_ids": None if sample_ids is None else sample_ids.to(x0.device)}
        x, weight, start = self._dequantise(x0, dequantisation, draw)
        grid = np.linspace(math.sqrt(start), 1.0, steps + 1) ** 2
        directions = None
        if divergence == "hutchinson":
            directions = ode_likelihood.rademacher(x.shape, probes, device=x.device, dtype=x.dtype, **draw)
        with self._frozen():
            density = ode_likelihood.log_density(
                lambda x, t: self.velocity(x, t, labels), x, grid, method=method, probes=directions,
                scale=self.path.prior_scale(1.0),
            )  # fmt: skip
        return (density + weight).float()

    def _dequantise(self, x0, dequantisation, draw):
        """(x, log-weight, time of x); see `ode_log_prob`."""
        if dequantisation == "uniform":
            if not np.isfinite(self.path.d_sigma(0.0)):
                raise ValueError(
                    f"{self._name()}.ode_log_prob: dequantisation must be 'path' on {type(self.path).__name__}, whose "
                    "noise has an infinite rate at t = 0"
                )
            return *ode_likelihood.dequantise_uniform(x0, self.num_levels, **draw), 0.0
        ratio = 1.0 / (3.0 * (self.num_levels - 1))
        start = float(self.path.t_of_log_snr(-2.0 * math.log(ratio)))
        alpha, sigma = float(self.path.alpha(start)), float(self.path.sigma(start))
        return *ode_likelihood.dequantise_path(x0, alpha, sigma, self.num_levels, **draw), start

    @contextlib.contextmanager
    def _frozen(self):
        """The network in evaluation mode, its weights without gradients; as they were afterwards."""
        flags = [p.requires_grad for p in self.net.parameters()]
        self.net.requires_grad_(False)
        try:
            with evaluating(self.net):
                yield
        finally:
            for parameter, flag in zip(self.net.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)

    def _describe(self):
        """The entries "net" and "path" of `config`."""
        (name,) = [name for name, net_class in NETS.items() if type(self.net) is net_class]
        net = {"name": name, **dataclasses.asdict(self.net.config)}
        return {"family": self.family, "net": net, "path": describe_path(self.path)}

    @classmethod
    def _rebuild(cls, config, defaults, seed):
        """(net, path, rest) from a config: rest are the entries that `defaults` names, of the types it shows.

        defaults: entry -> the tuple of allowed values, or a default whose type counts (a float takes an int too, None
        anything).
        """
        where = f"{cls._name()}.from_config"
        fields = cls._entries(config, ("path", *defaults), {"net": NETS})["net"]
        name = fields.pop("name")
        net = NETS[name].from_config(fields.pop("config", {}), seed=seed, **fields)
        path = rebuild_path(where, _named(where, config, "path")) if "path" in config else None
        rest = {key: config[key] for key in defaults if key in config}
        for key, value in rest.items():
            _check_entry(where, key, value, defaults[key])
        return net, path, rest


def _check_entry(where, key, value, default):
    if isinstance(default, tuple):
        if value not in default:
            raise ValueError(f"{where}: entry {key!r} must be one of {', '.join(map(repr, default))}, got {value!r}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{where}: entry {key!r} must be true or false, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(default, float) else int):
        kind = "a number" if isinstance(default, float) else "an int"
        raise ValueError(f"{where}: entry {key!r} must be {kind}, got {value!r}")


def _named(where, config, entry):
    """A copy of the dict config[entry], which has a name."""
    value = config.get(entry)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{where}: entry {entry!r} must be a dict with a name, got {value!r:.60}")
    return dict(value)


def describe_path(path):
    """A path as a JSON-serialisable dict: its class under "name", and its fields, a path within it likewise."""
    fields = {field.name: getattr(path, field.name) for field in dataclasses.fields(path)}
    return {"name": type(path).__name__} | {
        name: describe_path(value) if isinstance(value, paths.Path) else value for name, value in fields.items()
    }


def rebuild_path(where, fields):
    """The path that `describe_path` described; `where` begins the message of a ValueError."""
    fields = {name: rebuild_path(where, value) if isinstance(value, dict) else value for name, value in fields.items()}
    name = fields.pop("name", None)
    path_class = getattr(paths, name, None) if isinstance(name, str) else None
    if not (dataclasses.is_dataclass(path_class) and issubclass(path_class, paths.Path)):  # not an abstract one
        raise ValueError(f"{where}: entry 'path': unknown path {name!r}")
    for field, value in fields.items():
        if not isinstance(value, (paths.Path, list, tuple)) and not is_number(value, -math.inf):
            raise ValueError(f"{where}: entry 'path': {field} must be a number, a list or a path, got {value!r}")
    try:
        return path_class(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: entry 'path': {error}") from error
