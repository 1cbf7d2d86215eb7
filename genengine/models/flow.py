"""Flow matching: a network that predicts the velocity along a path from data to noise.

Lipman et al., Flow Matching for Generative Modeling, 2023; Liu et al., Flow Straight and Fast, 2023;
logit-normal training times: Esser et al. 2024; classifier-free guidance: Ho & Salimans 2022.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from genengine import ops, paths, prediction, sampler, schedules, solvers
from genengine.models import checkpoint
from genengine.nets.dit import DiT

SOLVERS = ("euler", "heun")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _sample_range(num, first_id):
    """first_id, if num samples from it on have indices in [0, 2^32)."""
    for name, value in (("num", num), ("first_id", first_id)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"models/FlowMatching.sample: {name} must be an int, got {type(value).__name__}")
    if not 0 <= num <= 1 << 32:
        raise ValueError(f"models/FlowMatching.sample: num must be in [0, 2**32], got {num}")
    if not 0 <= first_id <= (1 << 32) - num:
        raise ValueError(
            f"models/FlowMatching.sample: first_id must be in [0, 2**32 - num] = [0, {(1 << 32) - num}], got "
            f"{first_id}; use another seed for more samples"
        )
    return int(first_id)


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


class FlowMatching:
    """A network, a path, `loss` and `sample`.

    Args:
        net: module net(x, t, y) -> output with x's shape; has `config` with image_size, in_channels and
            num_classes (`DiT` does).
        path: path from data (t = 0) to noise (t = 1); default RectifiedFlow().
        time_mean, time_std: t = sigmoid(time_mean + time_std z), z ~ N(0, 1), in training; time_std > 0.
        class_drop: probability in [0, 1) of hiding the label in training, needed for guidance.
    Raises:
        ValueError: a network with a learned variance, or parameters out of range.
    """

    def __init__(self, net, path=None, *, time_mean=0.0, time_std=1.0, class_drop=0.1):
        if getattr(net.config, "learn_sigma", False):
            raise ValueError("models/FlowMatching: net must have learn_sigma=False; a velocity has no variance")
        if not time_std > 0 or not 0 <= class_drop < 1:
            raise ValueError(
                "models/FlowMatching: time_std must be > 0 and class_drop in [0, 1), got "
                f"time_std={time_std}, class_drop={class_drop}"
            )
        self.net = net
        self.path = paths.RectifiedFlow() if path is None else path
        self.time_mean, self.time_std, self.class_drop = time_mean, time_std, class_drop

    @property
    def image_shape(self):
        """(C, H, W) of one image."""
        config = self.net.config
        return (config.in_channels, config.image_size, config.image_size)

    @property
    def device(self):
        return next(self.net.parameters()).device

    def draw_times(self, num, *, seed, sample_ids=None, step=0):
        """Logit-normal training times, (num,) float32 on the CPU, a function of (seed, sample, step)."""
        z = ops.normal((num, 1), seed=seed, sample_ids=sample_ids, step=step, stream="time")
        return schedules.logit_normal_times(z[:, 0], self.time_mean, self.time_std)

    def drop_labels(self, labels, *, seed, sample_ids=None, step=0):
        """Labels (N,) int64 on the CPU with a share `class_drop` replaced by the null class."""
        u = ops.uniform((len(labels), 1), seed=seed, sample_ids=sample_ids, step=step, stream="class_drop")
        return torch.where(u[:, 0] < self.class_drop, self.net.null_class, labels)

    def loss(self, x0, labels=None, *, seed, sample_ids=None, step=0):
        """Mean squared error of the velocity.

        x_t = alpha(t) x0 + sigma(t) eps, target = alpha'(t) x0 + sigma'(t) eps; mean over all elements.

        Args:
            x0: (B, C, H, W) data in [-1, 1], on the network's device.
            labels: (B,) int64 or None.
            seed: int in [0, 2^64).
            sample_ids: (B,) int64 on the CPU, indices in the data set; default 0 .. B-1.
            step: training iteration in [0, 2^32).
        Returns:
            () float32 tensor, differentiable. The same arguments give the same loss.
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
        return (output.float() - target.float()).square().mean()

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
        first_id = _sample_range(num, first_id)
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
                sample_ids=torch.arange(first_id, first_id + num, device=self.device),
                progress=progress,
                check_finite=check_finite,
            )
        finally:
            self.net.train(was_training)

    def _labels(self, num, labels):
        classes = self.net.config.num_classes
        if classes == 0:
            if labels is not None:
                raise ValueError("models/FlowMatching.sample: labels must be None for a network without classes")
            return None
        if labels is None:
            labels = torch.arange(num) % classes
        labels = torch.as_tensor(labels)
        if labels.numel() and labels.dtype not in INTEGERS:  # an empty list has no integers, nor anything else
            raise TypeError(
                f"models/FlowMatching.sample: labels must be ints, got {labels.dtype}; convert them with .long()"
            )
        labels = labels.to(self.device, torch.int64)
        labels = labels.expand(num) if labels.ndim == 0 else labels
        if labels.shape != (num,):
            raise ValueError(
                f"models/FlowMatching.sample: labels must be one int or {num} ints in 0 .. {classes - 1}, "
                f"got shape {tuple(labels.shape)}"
            )
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"models/FlowMatching.sample: labels must be in 0 .. {classes - 1}, got {int(wrong[0])}")
        return labels.contiguous()

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
        rest = {key: config[key] for key in ("time_mean", "time_std", "class_drop") if key in config}
        for key, value in rest.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"models/FlowMatching.from_config: entry {key!r} must be a number, got {value!r}")
        return cls(DiT.from_config(net, seed=seed), _path(path), **rest)

    def save(self, path, *, dtype=None, extra=None):
        """Write the weights and the configuration to one safetensors file, atomically.

        Args:
            path: file name.  dtype: storage of floating-point weights, default as they are.
            extra: JSON-serialisable dict kept under "extra" in the metadata (how it was trained, say).
        """
        tensors = self.net.state_dict()
        if dtype is not None:
            tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        checkpoint.write(path, tensors, self.config() | ({"extra": extra} if extra else {}))

    @classmethod
    def load(cls, path, *, device="cpu"):
        """Read a file written by `save`; weights become float32.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, a truncated file, another family, missing or unexpected keys, wrong shapes.
        """
        tensors, config = checkpoint.read(path)
        try:
            model = cls.from_config(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"models/FlowMatching.load: {path} must hold a flow model; {error}") from error
        checkpoint.load_into(model.net, tensors, path)
        model.net.to(device).eval()
        return model

    @classmethod
    def pretrained(cls, name="digits", *, device="cpu"):
        """The model shipped as pretrained/flow_<name>.safetensors; the README there says how it was made.

        Raises:
            ValueError: no such model.
        """
        folder = Path(__file__).resolve().parents[1] / "pretrained"
        shipped = sorted(path.stem.removeprefix("flow_") for path in folder.glob("flow_*.safetensors"))
        if name not in shipped:
            raise ValueError(
                f"models/FlowMatching.pretrained: name must be one of {', '.join(shipped) or '(none)'}, got "
                f"{name!r}; train one with `genengine train flow`"
            )
        return cls.load(folder / f"flow_{name}.safetensors", device=device)
