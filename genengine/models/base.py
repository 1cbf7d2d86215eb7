"""What all model families share: files, labels, sample indices, and how the training loop sees a model.

A family is a class derived from `Model` and one entry in `models.FAMILIES`; training, sampling, evaluation and the
command line work from what the class says of itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from genengine import ops
from genengine.models import checkpoint

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
# What shows that samples are no copies, of every family: see `evaluate.nearer_train_share`.
INNOCENCE = {"nn_distance_ratio": (">=", 0.7), "nearer_train_share": ("<=", 0.61)}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword argument of a family's `sample` that the command line offers as --name.

    choices: what is allowed, () for anything of the type. A family without the option refuses it by name.
    """

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = float
    choices: tuple = ()


class Turn(NamedTuple):
    """One optimiser step of a training iteration: the network whose weights move, and the terms of its loss.

    terms(x0, labels, *, seed, sample_ids, step) -> dict of () tensors: "loss", differentiable, and whatever else is
    worth a place in the log.
    """

    network: str
    terms: Callable[..., dict[str, Tensor]]


class Model:
    """Networks, `loss`, `sample` and, where it exists, `log_prob`.

    Class attributes, the family's registry entry:
        family: its name, as in `genengine sample FAMILY`.
        presets: name -> fields of a `train.TrainConfig` that differ from its defaults; "model" is a config.
        options: the keyword arguments of `sample` beyond (num, labels, seed, first_id, progress, check_finite).
        likelihood: "exact", "bound" (a lower bound of it) or None: what `log_prob` returns.
        bars: metric -> (sense, value), the family's goals on the digits, see `evaluate.Report`.

    Args:
        networks: name -> nn.Module; each has its own optimiser.
        image_shape: (C, H, W) of one image.  num_classes: 0 for a model without classes.
        num_levels: values of a pixel; level i stands for 2 i / (num_levels - 1) - 1 in [-1, 1].
    """

    family: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping]] = {}
    options: ClassVar[tuple[Option, ...]] = ()
    likelihood: ClassVar[str | None] = None
    bars: ClassVar[Mapping[str, tuple]] = {}

    def __init__(self, networks, image_shape, num_classes, num_levels):
        if not isinstance(num_levels, int) or not 2 <= num_levels <= 65536:
            raise ValueError(f"{self._name()}: num_levels must be an int in 2 .. 65536, got {num_levels!r}")
        self.networks: dict[str, nn.Module] = dict(networks)
        self.image_shape, self.num_classes, self.num_levels = tuple(image_shape), num_classes, num_levels

    # ---- what a family writes ----------------------------------------------------------------------------------

    def config(self) -> dict:
        """JSON-serialisable description from which `from_config` rebuilds the model, weights apart."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping, *, seed: int = 0) -> Model:
        """Rebuild an untrained model from `config()`; `seed` sets the initial weights. Raises ValueError."""
        raise NotImplementedError

    def terms(self, x0: Tensor, labels: Tensor | None = None, *, seed, sample_ids=None, step=0) -> dict[str, Tensor]:
        """The training loss under "loss", and its parts by name, all () tensors. See `loss`."""
        raise NotImplementedError

    def sample(self, num, labels=None, *, seed=0, first_id=0, progress=False, check_finite=False) -> Tensor:
        """num images (num, C, H, W) float32, nominally in [-1, 1]; sample i is a function of (seed, first_id + i)."""
        raise NotImplementedError

    def log_prob(self, x0: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """log p(x0) of the discrete image in nats, (B,) float32, or a lower bound of it (`likelihood`)."""
        raise RuntimeError(f"{self._name()}: this family has no likelihood; measure its samples instead")

    # ---- what a family may change ------------------------------------------------------------------------------

    def turns(self, step: int) -> list[Turn]:
        """The optimiser steps of training iteration `step`, in order; each gets a batch of its own."""
        (name,) = self.networks
        return [Turn(name, self.terms)]

    @property
    def averaged(self) -> tuple[str, ...]:
        """The networks whose moving average is what is saved and sampled."""
        return tuple(self.networks)

    def measure(self, x0: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """What `evaluate` reports about given images: name -> (B,); bits_per_dim first, where there is a likelihood."""
        return {} if self.likelihood is None else {"bits_per_dim": self.bits_per_dim(x0, labels, seed=seed)}

    def panels(self, x0: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Pictures that show what the family can do, beside its samples: title -> (rows, columns, C, H, W).

        x0, labels: a few real images to start from, one per row.
        """
        return {}

    def diagnose(self, x0: Tensor, labels: Tensor, *, seed: int, step: int) -> tuple[dict[str, float], list[str]]:
        """Looked at when training logs: numbers for the log, and warnings for the user's eye."""
        return {}, []

    def finish(self, x0: Tensor, labels: Tensor | None, *, seed: int) -> None:
        """Called once when training ends, on the averaged model, with all training images: fit what is left."""

    @classmethod
    def fit_config(cls, config: Mapping, image_shape, num_classes: int, num_levels: int) -> dict:
        """The config with the sizes of a data set in place: image_shape (C, H, W), classes and levels.

        Raises:
            ValueError: images that are not square, a "net" that is no dict; the network's own refusal comes when it is
                built.
        """
        channels, height, width = image_shape
        if height != width:
            raise ValueError(
                f"{cls._name()}: images must be square, got {height} x {width}; crop or resize them beforehand"
            )
        sizes = {"image_size": height, "in_channels": channels, "num_classes": num_classes}
        net = config.get("net", {})
        if not isinstance(net, Mapping):
            raise ValueError(f"{cls._name()}: entry 'net' must be a dict with a name, got {net!r:.60}")
        return {**config, "net": {**net, **sizes}, "num_levels": num_levels}

    # ---- what a family inherits --------------------------------------------------------------------------------

    def loss(self, x0: Tensor, labels: Tensor | None = None, *, seed, sample_ids=None, step=0) -> Tensor:
        """The training loss of one batch.

        Args:
            x0: (B, C, H, W) data in [-1, 1], on the model's device.
            labels: (B,) int64 or None.
            seed: int in [0, 2^64).
            sample_ids: (B,) int64 on the CPU, indices in the data set; default 0 .. B-1.
            step: training iteration in [0, 2^32).
        Returns:
            () float32 tensor, differentiable. The same arguments give the same loss.
        """
        return self.terms(x0, labels, seed=seed, sample_ids=sample_ids, step=step)["loss"]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The keyword arguments of `sample` that the family's options stand for, at their defaults."""
        return {option.name: option.default for option in cls.options}

    def bits_per_dim(self, x0: Tensor, labels: Tensor | None = None, **options) -> Tensor:
        """-log_prob / (C H W log 2), (B,): bits per pixel and channel, or an upper bound of them."""
        return self.log_prob(x0, labels, **options) / (-math.log(2.0) * math.prod(self.image_shape))

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.networks.values())).parameters()).device

    def to(self, device) -> Model:
        """Move all networks, in place; returns the model."""
        for network in self.networks.values():
            network.to(device)
        return self

    def train(self, mode: bool = True) -> Model:
        for network in self.networks.values():
            network.train(mode)
        return self

    def eval(self) -> Model:
        return self.train(False)

    def save(self, path, *, dtype=None, extra=None) -> None:
        """Write weights and configuration to one safetensors file, atomically.

        Args:
            path: file name.  dtype: storage of floating-point weights, default as they are.
            extra: JSON-serialisable dict kept under "extra" in the metadata (how it was trained, say).
        """
        tensors = self.state_dict()
        if dtype is not None:
            tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        checkpoint.write(path, tensors, self.config() | ({"extra": extra} if extra else {}))

    @classmethod
    def load(cls, path, *, device="cpu") -> Model:
        """Read a file written by `save`; weights become float32.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle, a truncated file, another family, missing or unexpected keys, wrong shapes.
        """
        tensors, config = checkpoint.read(path)
        try:
            model = cls.from_config(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{cls._name()}.load: {path} must hold a {cls.family} model; {error}") from error
        model.load_state_dict(tensors, path)
        return model.to(device).eval()

    def save_pretrained(self, folder, *, dtype=None, extra=None) -> None:
        """Write folder/config.json and folder/model.safetensors; the weights file alone can be loaded, too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / WEIGHTS_FILE, dtype=dtype, extra=extra)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config(), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_folder, *, device="cpu") -> Model:
        """A folder written by `save_pretrained`, or the name of a shipped model ("digits").

        Raises:
            FileNotFoundError: a folder without weights.
            ValueError: neither; or a config.json that differs from the configuration inside the weights file.
        """
        folder = Path(name_or_folder)
        if folder.is_dir() and not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{cls._name()}.from_pretrained: {folder} must hold {WEIGHTS_FILE}, which training writes at its end; "
                "go on with --resume, or name another folder"
            )
        if not (folder / WEIGHTS_FILE).is_file():
            return cls.pretrained(str(name_or_folder), device=device)
        model = cls.load(folder / WEIGHTS_FILE, device=device)
        described = folder / CONFIG_FILE
        if described.is_file() and json.loads(described.read_text(encoding="utf-8")) != _plain(model.config()):
            raise ValueError(
                f"{cls._name()}.from_pretrained: {described} must describe the weights beside it; write both with "
                "save_pretrained"
            )
        return model

    @classmethod
    def pretrained(cls, name="digits", *, device="cpu") -> Model:
        """The model shipped as pretrained/<family>_<name>.safetensors; the README there says how it was made.

        Raises:
            ValueError: no such model.
        """
        prefix = f"{cls.family}_"
        shipped = sorted(path.stem.removeprefix(prefix) for path in PRETRAINED.glob(f"{prefix}*.safetensors"))
        if name not in shipped:
            raise ValueError(
                f"{cls._name()}.pretrained: name must be one of {', '.join(shipped) or '(none)'}, got "
                f"{name!r}; train one with `genengine train {cls.family}`"
            )
        return cls.load(PRETRAINED / f"{prefix}{name}.safetensors", device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers by name; with several networks each name begins with its network's."""
        if len(self.networks) == 1:
            return next(iter(self.networks.values())).state_dict()
        return {f"{n}.{k}": v for n, network in self.networks.items() for k, v in network.state_dict().items()}

    def load_state_dict(self, tensors, path) -> None:
        """Copy what `state_dict` gave into the networks, strictly; path is only named in errors."""
        parts = split_by_network(tensors, self.networks, path)
        for name, network in self.networks.items():
            checkpoint.load_into(network, parts[name], path)

    # ---- for the families' own use -----------------------------------------------------------------------------

    @classmethod
    def _name(cls):
        return f"models/{cls.__name__}"

    @classmethod
    def _entries(cls, config, known, nets) -> dict:
        """A copy of the config's entries but "family" and "extra", checked: none but "net" and `known`, and those that
        `nets` (entry -> the names of networks that may stand there) lists are dicts with such a name.

        Raises:
            ValueError: naming the entry.
        """
        where, entries = f"{cls._name()}.from_config", dict(config)
        if entries.pop("family", cls.family) != cls.family:  # may be left out: the class says it
            raise ValueError(f"{where}: entry 'family' must be {cls.family!r}, got {config['family']!r}")
        entries.pop("extra", None)
        unknown = sorted(set(entries) - {"net", *known})
        if unknown:
            raise ValueError(f"{where}: entries must be among family, net, {', '.join(known)}, got {unknown[0]!r}")
        for entry, names in nets.items():
            value = entries.get(entry)
            if not isinstance(value, Mapping) or value.get("name") not in names:
                wanted = " or ".join(map(repr, names))
                raise ValueError(f"{where}: entry {entry!r} must be a dict with the name {wanted}, got {value!r:.60}")
            entries[entry] = dict(value)
        return entries

    def _sample_ids(self, num, first_id) -> Tensor:
        """first_id .. first_id + num - 1 on the model's device, if they are within [0, 2^32)."""
        for name, value in (("num", num), ("first_id", first_id)):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{self._name()}.sample: {name} must be an int, got {type(value).__name__}")
        if not 0 <= num <= 1 << 32:
            raise ValueError(f"{self._name()}.sample: num must be in [0, 2**32], got {num}")
        if not 0 <= first_id <= (1 << 32) - num:
            raise ValueError(
                f"{self._name()}.sample: first_id must be in [0, 2**32 - num] = [0, {(1 << 32) - num}], got "
                f"{first_id}; use another seed for more samples"
            )
        return torch.arange(int(first_id), int(first_id) + num, device=self.device)

    def _labels(self, num, labels, method="sample") -> Tensor | None:
        """Labels as (num,) int64 on the model's device: an int is repeated, None takes the classes in turn."""
        where, classes = f"{self._name()}.{method}", self.num_classes
        if classes == 0:
            if labels is not None:
                raise ValueError(f"{where}: labels must be None for a network without classes")
            return None
        if labels is None:
            labels = torch.arange(num) % classes
        labels = torch.as_tensor(labels)
        if labels.numel() and labels.dtype not in INTEGERS:  # an empty list has no integers, nor anything else
            raise TypeError(f"{where}: labels must be ints, got {labels.dtype}; convert them with .long()")
        labels = labels.to(self.device, torch.int64)
        labels = labels.expand(num) if labels.ndim == 0 else labels
        if labels.shape != (num,):
            raise ValueError(
                f"{where}: labels must be one int or {num} ints in 0 .. {classes - 1}, got shape {tuple(labels.shape)}"
            )
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"{where}: labels must be in 0 .. {classes - 1}, got {int(wrong[0])}")
        return labels.contiguous()

    def _check_images(self, x0, method) -> None:
        """Refuse images that the model was not made for, or that are not finite."""
        if not isinstance(x0, Tensor) or not x0.is_floating_point() or tuple(x0.shape[1:]) != self.image_shape:
            got = f"{x0.dtype} {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(
                f"{self._name()}.{method}: x0 must be floating point (B, C, H, W) = (B, "
                f"{', '.join(map(str, self.image_shape))}) in [-1, 1], got {got}; resize or convert the images, or "
                "build the model for them"
            )
        bad = int((~torch.isfinite(x0)).flatten(1).any(1).sum())
        if bad:
            raise ValueError(f"{self._name()}.{method}: x0 must be finite, got {bad} of {len(x0)} images that are not")


def drop_labels(labels, share, null_class, *, seed, sample_ids=None, step=0) -> Tensor:
    """Labels (N,) int64 on the CPU with a share of them replaced by the null class: those whose uniform of (seed,
    sample, step, stream "class_drop") is below it."""
    u = ops.uniform((len(labels), 1), seed=seed, sample_ids=sample_ids, step=step, stream="class_drop")
    return torch.where(u[:, 0] < share, null_class, labels)


def split_by_network(tensors, networks, path) -> dict[str, dict[str, Tensor]]:
    """Tensors named as `Model.state_dict` names them, apart by network."""
    if len(networks) == 1:
        return {next(iter(networks)): dict(tensors)}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in networks}
    for key, value in tensors.items():
        head, _, tail = key.partition(".")
        if head not in parts:
            raise ValueError(f"models: {path} has the unexpected key {key}; expected names that begin with "
                             f"{' or '.join(f'{name}.' for name in parts)}")  # fmt: skip
        parts[head][tail] = value
    return parts


def _plain(config):
    """The dict as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(config))
