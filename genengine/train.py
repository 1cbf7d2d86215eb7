"""Training, of every family: AdamW, exponential moving averages, atomic checkpoints and bit-equal resumption.

Every draw is a function of (seed, image index, step), so the state of a run is the weights, their average,
the optimizers' moments and the step number; nothing else is stored, and a run killed at any moment
continues to the same bits as one that was left alone (same machine, library versions and number of threads).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from genengine import data, models, training_log
from genengine.models import checkpoint
from genengine.models.base import WEIGHTS_FILE as MODEL_FILE
from genengine.nets.configs import is_int, is_number
from genengine.ops import ema_update
from genengine.training_log import LOG_FILE, STATE_FILE

SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What determines a trained model; two equal configs on one machine give equal weights.

    Attributes:
        family: a name in `models.FAMILIES`.  model: the model's config, see its `config()`; image size, channels,
            classes and levels are the data's.
        dataset: what `data.load` takes, as text.  split: "train", or "train_fit" while making choices.
        steps: iterations.  batch_size: images per optimizer step.
        lr: peak learning rate, after `warmup` linear iterations; schedule: "cosine" to zero at `steps`, or "constant".
        lr_scales: network -> factor of lr, 1 for those not named.  betas: AdamW's.
        weight_decay: AdamW's, on matrices only.  clip_norm: largest gradient norm of a network.
        ema_decay: decay of the averaged weights, min(ema_decay, (1 + step) / (10 + step)).
        precision: "fp32" or "bf16" (autocast; weights stay float32).
        storage: dtype of the final model file, "float32", "float16" or "bfloat16".
        seed: int in [0, 2^64), of initial weights, data order and every draw of the model.
    """

    family: str = "flow"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = "digits"
    split: str = "train"
    steps: int = 5000
    batch_size: int = 128
    lr: float = 2e-3
    lr_scales: dict[str, float] = dataclasses.field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "fp32"
    storage: str = "float32"
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.betas, list):  # as JSON has it
            object.__setattr__(self, "betas", tuple(self.betas))
        clip, pair = self.clip_norm, isinstance(self.betas, tuple) and len(self.betas) == 2
        scales = self.lr_scales.values() if isinstance(self.lr_scales, dict) else [None]
        rules = {
            "family": (self.family in models.FAMILIES, f"one of {', '.join(models.FAMILIES)}"),
            "model": (isinstance(self.model, dict), "a dict"),
            "split": (self.split in data.SPLITS, f"one of {', '.join(data.SPLITS)}"),
            "steps": (is_int(self.steps, 1), "an int >= 1"),
            "batch_size": (is_int(self.batch_size, 1), "an int >= 1"),
            "lr": (is_number(self.lr) and self.lr > 0, "a finite number > 0"),
            "lr_scales": (all(map(is_number, scales)), "a dict of finite numbers >= 0"),
            "betas": (pair and all(is_number(beta, below=1) for beta in self.betas), "two numbers in [0, 1)"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "warmup": (is_int(self.warmup), "an int >= 0"),
            "weight_decay": (is_number(self.weight_decay), "a finite number >= 0"),
            "clip_norm": (clip == math.inf or (is_number(clip) and clip > 0), "> 0 (Infinity for none)"),
            "ema_decay": (is_number(self.ema_decay, below=1), "in [0, 1)"),
            "precision": (self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            "storage": (self.storage in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
            "seed": (is_int(self.seed) and self.seed < 2**64, "an int in [0, 2^64)"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ValueError(f"train/TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}")


def preset(family, name="digits", /, **overrides):
    """A TrainConfig from the family's presets, with fields replaced; "model" overrides are merged, nested ones too.

    Raises:
        ValueError: unknown family, preset or field, or a value out of range.
    """
    presets = models.family(family).presets
    if name not in presets:
        raise ValueError(f"train/preset: name must be one of {', '.join(presets)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(TrainConfig)} - {"family"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"train/preset: fields must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return TrainConfig(**{"family": family, **_merged(presets[name], overrides)})


def _merged(base, overrides):
    """The dict `base` with `overrides` in place, dicts within dicts merged alike."""
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def learning_rate(config, step):
    """lr min(1, (step + 1) / warmup), times (1 + cos(pi step / steps)) / 2 if cosine, for step = 0 .. steps - 1."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))


def build_model(config, dataset):
    """The untrained model of a TrainConfig, for the images of a data set."""
    family = models.family(config.family)
    fitted = family.fit_config(config.model, dataset.image_shape, dataset.num_classes, dataset.num_levels)
    return family.from_config({"family": config.family, **fitted}, seed=config.seed)


class Run:
    """State of one training run: model, averaged model, an optimizer per network, and the step.

    Args:
        config: TrainConfig.  device: where to train.  dataset: the images; default config.dataset's split.
    """

    def __init__(self, config, device="cpu", dataset=None):
        self.config, self.device, self.step = config, torch.device(device), 0
        self.dataset = data.load(config.dataset, config.split) if dataset is None else dataset
        data.batch_indices(len(self.dataset), config.batch_size, 0)  # refuses a batch larger than the data
        self.model = build_model(config, self.dataset).to(self.device).train()
        self.average = build_model(config, self.dataset).to(self.device).eval()
        for network in self.average.networks.values():
            network.requires_grad_(False)
        unknown = sorted(set(config.lr_scales) - set(self.model.networks))
        if unknown:
            raise ValueError(
                f"train/Run: lr_scales must name networks among {', '.join(self.model.networks)}, got {unknown[0]!r}"
            )
        self.optimizers = {name: self._optimizer(network) for name, network in self.model.networks.items()}

    def _optimizer(self, network):
        config, parameters = self.config, list(network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8)

    @property
    def learning_rate(self):
        """That of the latest iteration, of networks without a scale of their own."""
        return learning_rate(self.config, self.step - 1)

    def train_step(self):
        """One iteration, all its turns; returns the terms of the losses, () tensors on the device, by name."""
        turns, log = self.model.turns(self.step), {}
        for place, turn in enumerate(turns):
            terms = self._take(turn, self.step * len(turns) + place)
            log |= {name if len(turns) == 1 else f"{turn.network}/{name}": value for name, value in terms.items()}
        self.step += 1
        self._average()
        return log

    def _take(self, turn, draw):
        """One optimizer step, with the batch and the random numbers of number `draw`."""
        config, networks = self.config, self.model.networks
        for name, network in networks.items():
            network.requires_grad_(name == turn.network)
        pick = data.batch_indices(len(self.dataset), config.batch_size, draw, seed=config.seed)
        x0, labels, sample_ids = self.dataset.batch(pick)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = turn.terms(x0.to(self.device), labels, seed=config.seed, sample_ids=sample_ids, step=draw)
        optimizer, network = self.optimizers[turn.network], networks[turn.network]
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step) * config.lr_scales.get(turn.network, 1.0)
        optimizer.step()
        return {name: value.detach() for name, value in terms.items()} | {"grad_norm": norm}

    @torch.no_grad()
    def _average(self):
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for name in self.model.averaged:
            mine, theirs = self.average.networks[name], self.model.networks[name]
            ema_update(list(mine.parameters()), list(theirs.parameters()), decay)

    @torch.no_grad()
    def averaged_model(self):
        """The model to keep: averaged weights where the family averages, all else as trained."""
        for name, network in self.model.networks.items():
            mine = self.average.networks[name]
            if name not in self.model.averaged:
                mine.load_state_dict(network.state_dict())
            for kept, current in zip(mine.buffers(), network.buffers(), strict=True):
                kept.copy_(current)
        return self.average

    def state(self):
        """(tensors, config) of everything a resumed run needs."""
        tensors = {}
        for part, model in (("model", self.model), ("average", self.averaged_model())):
            tensors |= {f"{part}.{key}": value for key, value in model.state_dict().items()}
        for network, name, parameter in self._parameters():
            for moment, value in self.optimizers[network].state.get(parameter, {}).items():
                key = f"optimizer.{network}.{name}.{moment}"
                tensors[key] = value.reshape(1) if moment == "step" else value
        saved = {"family": "training", "step": self.step, "data": self.dataset.fingerprint}
        return tensors, saved | {"train": _plain(self.config)}

    def _parameters(self):
        for network, module in self.model.networks.items():
            for name, parameter in module.named_parameters():
                yield network, name, parameter

    def save(self, path):
        """Write the state to one safetensors file, atomically."""
        checkpoint.write(path, *self.state())

    def restore(self, path):
        """Continue from a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a bad file, or one of a run with another configuration or other data.
        """
        tensors, saved = checkpoint.read(path)
        self._check_same_run(saved, path)
        parts = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            head, _, tail = name.partition(".")
            if head not in parts:
                raise ValueError(f"train/restore: {path} has the unexpected key {name}; it was not written by save")
            parts[head][tail] = value
        self.model.load_state_dict(parts["model"], path)
        self.average.load_state_dict(parts["average"], path)
        self.step = saved["step"]
        self._restore_moments(parts["optimizer"], path)

    def _check_same_run(self, saved, path):
        mine, theirs = _plain(self.config), saved.get("train")
        if saved.get("family") != "training" or not isinstance(theirs, dict):
            raise ValueError(f"train/restore: {path} must be the state of a training run, got {saved.get('family')!r}")
        differ = [f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]
        if differ:
            raise ValueError(
                f"train/restore: {path} was trained with another configuration: {'; '.join(differ)}; "
                "resume with the same options or start in a new folder"
            )
        if saved.get("data") != self.dataset.fingerprint:
            raise ValueError(
                f"train/restore: {path} was trained on other images than {self.dataset.name} holds now; restore them "
                "or start in a new folder"
            )
        if not isinstance(saved.get("step"), int) or not 0 <= saved["step"] <= self.config.steps:
            raise ValueError(
                f"train/restore: {path} must have a step in 0 .. {self.config.steps}, got {saved.get('step')!r}; "
                "it was not written by save"
            )

    def _restore_moments(self, moments, path):
        shapes = {"exp_avg": None, "exp_avg_sq": None, "step": (1,)}
        left = dict(moments)
        for network, name, parameter in self._parameters():
            found = {moment: left.pop(f"optimizer.{network}.{name}.{moment}"[10:], None) for moment in shapes}
            if not self.step or all(value is None for value in found.values()):  # a network that no turn has moved
                continue
            for moment, shape in shapes.items():
                if found[moment] is None or tuple(found[moment].shape) != (shape or tuple(parameter.shape)):
                    raise ValueError(
                        f"train/restore: {path} has a missing or misshapen optimizer.{network}.{name}.{moment}"
                    )
            state = self.optimizers[network].state[parameter]
            state["exp_avg"], state["exp_avg_sq"] = (found[m].to(self.device) for m in ("exp_avg", "exp_avg_sq"))
            state["step"] = found["step"].reshape(())
        if left:
            raise ValueError(f"train/restore: {path} has the unexpected key optimizer.{next(iter(left))}")


def _plain(config):
    """The config as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def train(config, out_dir, *, resume=False, device="cpu", progress=True, save_every=500, log_every=50, dataset=None,
          tensorboard=False):  # fmt: skip
    """Train a model into a folder: model.safetensors and config.json (averaged weights), state.safetensors, log.jsonl.

    Args:
        config: TrainConfig, see `preset`.  out_dir: folder, made if needed.
        resume: continue from state.safetensors if the folder has one, to the same bits as without the break.
        device: torch device.  progress: show a progress bar, and warnings, on stderr.
        save_every: iterations between states.  log_every: iterations between log lines, see `training_log`.
        dataset: images in memory, a `data.Dataset`, instead of config.dataset.
        tensorboard: also write the log for TensorBoard, if that is installed.
    Returns:
        Path of the model file, for `Model.load`.
    Raises:
        ValueError: a bad configuration or checkpoint; an existing state without `resume`.
        FloatingPointError: a loss or gradient that is not finite, naming the step; the last good state is kept.
        RuntimeError: TensorBoard is missing.
    """
    for name, value in (("save_every", save_every), ("log_every", log_every)):
        if not is_int(value, 1):
            raise ValueError(f"train/train: {name} must be an int >= 1, got {value!r}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    state_file = out_dir / STATE_FILE
    if state_file.exists() and not resume:
        raise ValueError(
            f"train/train: out_dir must hold no training state, got {state_file}; pass --resume to continue "
            "it or choose another folder"
        )
    run = Run(config, device, dataset)
    if state_file.exists():
        run.restore(state_file)
    training_log.trim(out_dir / LOG_FILE, run.step)
    with training_log.Log(out_dir, run, progress, tensorboard) as log:
        while run.step < config.steps:
            log.add(run.train_step())
            last = run.step == config.steps
            if run.step % log_every == 0 or last:
                log.write()
            if run.step % save_every == 0 or last:
                log.check()
                run.save(state_file)
    model = run.averaged_model()
    everything = run.dataset.batch(torch.arange(len(run.dataset)))
    model.finish(everything[0].to(run.device), everything[1], seed=config.seed)
    model.save_pretrained(out_dir, dtype=getattr(torch, config.storage), extra={"train": _plain(config)})
    return out_dir / MODEL_FILE
