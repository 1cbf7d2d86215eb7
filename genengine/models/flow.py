"""Flow matching: a network that predicts the velocity along a path from data to noise.

Lipman et al., Flow Matching for Generative Modeling, 2023; Liu et al., Flow Straight and Fast, 2023;
logit-normal training times: Esser et al. 2024; classifier-free guidance: Ho & Salimans 2022.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from genengine import ops, paths, prediction, sampler, schedules, solvers
from genengine.models.base import Model, Option
from genengine.nets.dit import DiT

SOLVERS = ("euler", "heun")


def _guidance(num, guidance):
    """The guidance as a float, or as a float64 array (num,) with one weight per sample."""
    if isinstance(guidance, torch.Tensor):
        guidance = guidance.detach().cpu().numpy()
    weights = np.asarray(guidance, dtype=np.float64)
    if weights.shape not in ((), (num,)) or not np.isfinite(weights).all():
        got = f"shape {weights.shape}" if weights.ndim else f"{weights}"
        raise ValueError(
            f"models/FlowMatching.sample: guidance must be a finite number or (num,) = ({num},) of them, got {got}"
        )
    if weights.ndim == 0:
        return float(weights)
    return weights if num else 1.0  # no sample, no weight


def _named(config, entry, default=None):
    """A copy of the dict config[entry], which has a name; `default` where there is none."""
    value = config.get(entry, default)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(
            f"models/FlowMatching.from_config: entry {entry!r} must be a dict with a name, got {value!r:.60}"
        )
    return dict(value)


def _path(fields):
    """The path that `FlowMatching.config` described."""
    fields = dict(fields)
    name = fields.pop("name")
    path_class = getattr(paths, name, None)
    if not (dataclasses.is_dataclass(path_class) and issubclass(path_class, paths.Path)):  # not an abstract one
        raise ValueError(f"models/FlowMatching.from_config: entry 'path': unknown path {name!r}")
    try:
        return path_class(**fields)
    except TypeError as error:
        raise ValueError(f"models/FlowMatching.from_config: entry 'path': {error}") from error


class FlowMatching(Model):
    """A network, a path, `loss` and `sample`.

    Args:
        net: module net(x, t, y) -> output with x's shape; has `config` with image_size, in_channels and
            num_classes (`DiT` does).
        path: path from data (t = 0) to noise (t = 1); default RectifiedFlow().
        time_mean, time_std: t = sigmoid(time_mean + time_std z), z ~ N(0, 1), in training; time_std > 0.
        class_drop: probability in [0, 1) of hiding the label in training, needed for guidance.
        num_levels: values of a pixel, see `Model`.
    Raises:
        ValueError: a network with a learned variance, or parameters out of range.
    """

    family = "flow"
    presets = {
        "digits": {
            "model": {
                "net": {"name": "dit", "config": "tiny"}, "time_mean": 0.0, "time_std": 1.0, "class_drop": 0.1,
            },
        },
        "smoke": {
            "model": {"net": {"name": "dit", "config": "tiny"}},
            "steps": 60, "batch_size": 64, "warmup": 10, "ema_decay": 0.9,
        },
    }  # fmt: skip
    options = (
        Option("steps", 15, "solver steps; heun evaluates the network twice a step", int),
        Option("solver", "heun", "solver", str, SOLVERS),
        Option("guidance", 1.0, "classifier-free guidance scale; 1 is none"),
    )
    bars = {
        "frechet_distance": ("<=", 0.06),
        "knn_accuracy": (">=", 0.97),
        "coverage": (">=", 0.85),
        "nn_distance_ratio": (">=", 0.7),
        "nearer_train_share": ("<=", 0.61),
    }

    def __init__(self, net, path=None, *, time_mean=0.0, time_std=1.0, class_drop=0.1, num_levels=256):
        if getattr(net.config, "learn_sigma", False):
            raise ValueError("models/FlowMatching: net must have learn_sigma=False; a velocity has no variance")
        if not time_std > 0 or not 0 <= class_drop < 1:
            raise ValueError(
                "models/FlowMatching: time_std must be > 0 and class_drop in [0, 1), got "
                f"time_std={time_std}, class_drop={class_drop}"
            )
        config = net.config
        super().__init__(
            {"net": net}, (config.in_channels, config.image_size, config.image_size), config.num_classes, num_levels
        )
        self.net = net
        self.path = paths.RectifiedFlow() if path is None else path
        self.time_mean, self.time_std, self.class_drop = time_mean, time_std, class_drop

    def draw_times(self, num, *, seed, sample_ids=None, step=0):
        """Logit-normal training times, (num,) float32 on the CPU, a function of (seed, sample, step)."""
        z = ops.normal((num, 1), seed=seed, sample_ids=sample_ids, step=step, stream="time")
        return schedules.logit_normal_times(z[:, 0], self.time_mean, self.time_std)

    def drop_labels(self, labels, *, seed, sample_ids=None, step=0):
        """Labels (N,) int64 on the CPU with a share `class_drop` replaced by the null class."""
        u = ops.uniform((len(labels), 1), seed=seed, sample_ids=sample_ids, step=step, stream="class_drop")
        return torch.where(u[:, 0] < self.class_drop, self.net.null_class, labels)

    def terms(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """Mean squared error of the velocity.

        x_t = alpha(t) x0 + sigma(t) eps, target = alpha'(t) x0 + sigma'(t) eps; mean over all elements. Arguments as
        of `loss`.
        """
        draw = {"seed": seed, "sample_ids": sample_ids, "step": step}
        t = self.draw_times(len(x0), **draw)
        row = self.path.coefficients(t.double().numpy())
        pair = prediction.target("velocity", *row)
        alpha, sigma, c_x0, c_eps = (
            torch.from_numpy(np.asarray(c, dtype=np.float32)).to(x0.device) for c in (*row[:2], *pair)
        )
        if sample_ids is not None:
            draw["sample_ids"] = sample_ids.to(x0.device)
        x_t, target = ops.diffuse(x0, alpha, sigma, c_x0, c_eps, **draw)
        if labels is not None:
            labels = self.drop_labels(labels.cpu(), seed=seed, sample_ids=sample_ids, step=step).to(x0.device)
        output = self.net(x_t, t.to(x0.device), labels)
        return {"loss": (output.float() - target.float()).square().mean()}

    def sample(
        self, num, labels=None, *, steps=50, guidance=1.0, seed=0, solver="heun", first_id=0, progress=False,
        check_finite=False,
    ):  # fmt: skip
        """Draw images by integrating dx/dt = velocity from noise (t = 1) to data (t = 0) on a uniform grid.

        Sample i is a function of (seed, first_id + i) and its label alone, up to rounding in products
        whose shape depends on the batch.

        Args:
            num: number of images, 0 too.
            labels: int, or num ints (sequence or tensor) in 0 .. num_classes - 1; None takes the classes
                in turn.
            steps: solver steps; "euler" costs one network evaluation per step, "heun" two.
            guidance: w in out_0 + w (out_1 - out_0), out_0 without and out_1 with the class; 1 is plain
                conditional and costs half; a number, or (num,) for one weight per sample.
            seed: int in [0, 2^64).  solver: "euler" or "heun".
            first_id: global index of the first sample, in [0, 2^32 - num].
            progress: show a progress bar.
            check_finite: look at every output of the network; costs a synchronisation per step on a GPU.
        Returns:
            (num, C, H, W) float32 on the network's device, nominally in [-1, 1], not clipped.
        Raises:
            ValueError: unknown solver; labels, guidance or first_id out of range or of the wrong number.
            TypeError: labels that are not integers, a num or first_id that is no int.
            FloatingPointError: with check_finite, an output of the network that is not finite.
        """
        if solver not in SOLVERS:
            raise ValueError(f"models/FlowMatching.sample: solver must be one of {SOLVERS}, got {solver!r}")
        sample_ids = self._sample_ids(num, first_id)
        labels = self._labels(num, labels)
        guidance = _guidance(num, guidance)
        guided = bool(np.any(guidance != 1.0))
        if guided and labels is None:
            raise ValueError(
                f"models/FlowMatching.sample: guidance must be 1 for a network without classes, got {guidance}"
            )
        table = getattr(solvers, solver)(
            self.path, schedules.uniform(steps), prediction="velocity", guidance_scale=guidance
        )
        was_training = self.net.training
        self.net.eval()
        try:
            return sampler.sample(
                self.net,
                table,
                (num, *self.image_shape),
                cond=None if labels is None else {"y": labels},
                uncond={"y": torch.full_like(labels, self.net.null_class)} if guided else None,
                seed=seed,
                sample_ids=sample_ids,
                progress=progress,
                check_finite=check_finite,
            )
        finally:
            self.net.train(was_training)

    def config(self):
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        path = {"name": type(self.path).__name__, **dataclasses.asdict(self.path)}
        return {
            "family": "flow",
            "net": {"name": "dit", **dataclasses.asdict(self.net.config)},
            "path": path,
            "time_mean": self.time_mean,
            "time_std": self.time_std,
            "class_drop": self.class_drop,
            "num_levels": self.num_levels,
        }

    @classmethod
    def from_config(cls, config, *, seed=0):
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights.

        Raises:
            ValueError: another family, an unknown network or path, a missing entry.
        """
        if config.get("family") != "flow":
            raise ValueError(
                f"models/FlowMatching.from_config: entry 'family' must be 'flow', got {config.get('family')!r}"
            )
        net, path = _named(config, "net"), _named(config, "path", {"name": "RectifiedFlow"})
        if net.pop("name") != "dit":
            raise ValueError(
                f"models/FlowMatching.from_config: entry 'net' must have the name 'dit', got {config['net']['name']!r}"
            )
        rest = {key: config[key] for key in ("time_mean", "time_std", "class_drop", "num_levels") if key in config}
        for key, value in rest.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"models/FlowMatching.from_config: entry {key!r} must be a number, got {value!r}")
        return cls(DiT.from_config(net.pop("config", {}), seed=seed, **net), _path(path), **rest)
