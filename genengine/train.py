"""Training: AdamW, exponential moving average, atomic checkpoints and bit-equal resumption.

Every draw is a function of (seed, image index, step), so the state of a run is the weights, their average,
the optimizer's moments and the step number; nothing else is stored, and a run killed at any moment
continues to the same bits as one that was left alone (same machine, library versions and number of threads).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from genengine import data
from genengine.models import checkpoint
from genengine.models.flow import FlowMatching
from genengine.nets.dit import DiT
from genengine.ops import ema_update

STATE_FILE, MODEL_FILE, LOG_FILE = "state.safetensors", "model.safetensors", "log.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What determines a trained model; two equal configs on one machine give equal weights.

    Attributes:
        family: "flow".  dataset: "digits".  split: "train", or "train_fit" while making choices.
        net: name in `nets.dit.CONFIGS`.
        steps: optimizer steps.  batch_size: images per step.
        lr: peak learning rate, after `warmup` linear steps, then a cosine to zero at `steps`.
        weight_decay: AdamW's, on matrices only.  clip_norm: largest gradient norm.
        ema_decay: decay of the averaged weights, min(ema_decay, (1 + step) / (10 + step)).
        class_drop: share of hidden labels.  time_mean, time_std: of the logit-normal times.
        precision: "fp32" or "bf16" (autocast; weights stay float32).
        storage: dtype of the final model file, "float32", "float16" or "bfloat16".
        seed: int in [0, 2^64), of initial weights, data order, times, noise and hidden labels.
    """

    family: str = "flow"
    dataset: str = "digits"
    split: str = "train"
    net: str = "tiny"
    steps: int = 5000
    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    class_drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0
    precision: str = "fp32"
    storage: str = "float32"
    seed: int = 0

    def __post_init__(self):
        rules = {
            "family": (self.family == "flow", "'flow'"),
            "dataset": (self.dataset == "digits", "'digits'"),
            "split": (self.split in data.SPLITS, f"one of {', '.join(data.SPLITS)}"),
            "steps": (isinstance(self.steps, int) and self.steps >= 1, "an int >= 1"),
            "batch_size": (isinstance(self.batch_size, int) and self.batch_size >= 1, "an int >= 1"),
            "lr": (0 < self.lr < math.inf, "a finite number > 0"),
            "warmup": (isinstance(self.warmup, int) and self.warmup >= 0, "an int >= 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number >= 0"),
            "clip_norm": (self.clip_norm > 0, "> 0 (inf for no clipping)"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "class_drop": (0 <= self.class_drop < 1, "in [0, 1)"),
            "time_std": (0 < self.time_std < math.inf, "a finite number > 0"),
            "time_mean": (math.isfinite(self.time_mean), "finite"),
            "precision": (self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            "storage": (self.storage in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
            "seed": (isinstance(self.seed, int) and 0 <= self.seed < 2**64, "an int in [0, 2^64)"),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ValueError(f"train/TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}")


# name -> TrainConfig: `digits` makes the shipped model in pretrained/, `smoke` checks an installation.
PRESETS = {
    "digits": TrainConfig(),
    "smoke": TrainConfig(steps=60, batch_size=64, warmup=10, ema_decay=0.9),
}


def preset(name, **overrides):
    """A TrainConfig from `PRESETS`, with fields replaced.

    Raises:
        ValueError: unknown preset or field, or a value out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"train/preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"train/preset: fields must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return dataclasses.replace(PRESETS[name], **overrides)


def learning_rate(config, step):
    """lr min(1, (step + 1) / warmup) (1 + cos(pi step / steps)) / 2, for step = 0 .. steps - 1."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))


def build_model(config):
    """The untrained FlowMatching model of a TrainConfig."""
    net = DiT.from_config(config.net, seed=config.seed)
    return FlowMatching(net, time_mean=config.time_mean, time_std=config.time_std, class_drop=config.class_drop)


class Run:
    """State of one training run: model, averaged model, optimizer and step.

    Args:
        config: TrainConfig.  device: where to train.
    """

    def __init__(self, config, device="cpu"):
        self.config, self.device, self.step = config, torch.device(device), 0
        self.images, self.labels = data.digits(config.split)
        self.sample_ids = torch.from_numpy(data.split_indices(config.split))
        data.batch_indices(len(self.images), config.batch_size, 0)  # refuses a batch larger than the data
        self.model, self.average = build_model(config), build_model(config)
        self.model.net.to(self.device).train()
        self.average.net.to(self.device).eval().requires_grad_(False)
        parameters = dict(self.model.net.named_parameters())
        groups = [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8)

    def train_step(self):
        """One optimizer step; returns the loss, a () tensor on the device."""
        config, step, net = self.config, self.step, self.model.net
        pick = data.batch_indices(len(self.images), config.batch_size, step, seed=config.seed)
        x0 = self.images[pick].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = self.model.loss(x0, self.labels[pick], seed=config.seed, sample_ids=self.sample_ids[pick], step=step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimizer.step()
        self.step = step + 1
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            ema_update(list(self.average.net.parameters()), list(net.parameters()), decay)
        return loss.detach()

    def state(self):
        """(tensors, config) of everything a resumed run needs."""
        tensors = {}
        for name, module in (("model", self.model.net), ("average", self.average.net)):
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, parameter in self.model.net.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                if moment != "step":
                    tensors[f"optimizer.{moment}.{name}"] = value
        return tensors, {"family": "training", "step": self.step, "train": dataclasses.asdict(self.config)}

    def save(self, path):
        """Write the state to one safetensors file, atomically."""
        checkpoint.write(path, *self.state())

    def restore(self, path):
        """Continue from a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a bad file, or one of a run with another configuration.
        """
        tensors, saved = checkpoint.read(path)
        mine = dataclasses.asdict(self.config)
        theirs = saved.get("train")
        if saved.get("family") != "training" or not isinstance(theirs, dict):
            raise ValueError(f"train/restore: {path} must be the state of a training run, got {saved.get('family')!r}")
        differ = [f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]
        if differ:
            raise ValueError(
                f"train/restore: {path} was trained with another configuration: {'; '.join(differ)}; "
                "resume with the same options or start in a new folder"
            )
        parts = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            head, _, tail = name.partition(".")
            if head not in parts:
                raise ValueError(f"train/restore: {path} has the unexpected key {name}; it was not written by save")
            parts[head][tail] = value
        if not isinstance(saved.get("step"), int) or not 0 <= saved["step"] <= self.config.steps:
            raise ValueError(
                f"train/restore: {path} must have a step in 0 .. {self.config.steps}, got {saved.get('step')!r}; "
                "it was not written by save"
            )
        checkpoint.load_into(self.model.net, parts["model"], path)
        checkpoint.load_into(self.average.net, parts["average"], path)
        self.step = saved["step"]
        self._restore_moments(parts["optimizer"], path)

    def _restore_moments(self, moments, path):
        expected = {
            f"{moment}.{name}": parameter
            for name, parameter in self.model.net.named_parameters()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        wrong = sorted(set(expected) ^ set(moments)) if self.step else []
        wrong += [name for name in expected if name in moments and moments[name].shape != expected[name].shape]
        if wrong:
            raise ValueError(f"train/restore: {path} has missing, unexpected or misshapen optimizer.{wrong[0]}")
        for name, value in moments.items():
            moment, _, _ = name.partition(".")
            state = self.optimizer.state[expected[name]]
            state[moment] = value.to(self.device)
            state["step"] = torch.tensor(float(self.step))


def train(config, out_dir, *, resume=False, device="cpu", progress=True, save_every=500, log_every=50):
    """Train a model into a folder: model.safetensors (averaged weights), state.safetensors, log.jsonl.

    Args:
        config: TrainConfig or a name in `PRESETS`.  out_dir: folder, made if needed.
        resume: continue from state.safetensors if the folder has one, to the same bits as without the break.
        device: torch device.  progress: show a progress bar on stderr.
        save_every: steps between states.  log_every: steps between log lines (step, loss, lr, seconds).
    Returns:
        Path of the model file, for `FlowMatching.load`.
    Raises:
        ValueError: a bad configuration or checkpoint; an existing state without `resume`; a loss that is not
            finite.
    """
    config = preset(config) if isinstance(config, str) else config
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    state_file = out_dir / STATE_FILE
    if state_file.exists() and not resume:
        raise ValueError(
            f"train/train: out_dir must hold no training state, got {state_file}; pass --resume to continue "
            "it or choose another folder"
        )
    run = Run(config, device)
    if state_file.exists():
        run.restore(state_file)
    _trim_log(out_dir / LOG_FILE, run.step)
    start, losses = time.monotonic(), []
    bar = tqdm(total=config.steps, initial=run.step, disable=not progress, unit="step")
    with bar, open(out_dir / LOG_FILE, "a", encoding="utf-8") as log:
        while run.step < config.steps:
            losses.append(run.train_step())
            bar.update()
            if run.step % log_every == 0 or run.step == config.steps:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                _write_log(log, run, mean, time.monotonic() - start)
                bar.set_postfix(loss=f"{mean:.4f}")
            if run.step % save_every == 0 or run.step == config.steps:
                run.save(state_file)
    model_file = out_dir / MODEL_FILE
    run.average.save(model_file, dtype=getattr(torch, config.storage), extra={"train": dataclasses.asdict(config)})
    return model_file


def _write_log(log, run, loss, seconds):
    if not math.isfinite(loss):
        raise ValueError(
            f"train/train: the loss must stay finite, got {loss} at step {run.step}; lower lr or use precision fp32"
        )
    entry = {
        "step": run.step,
        "loss": loss,
        "lr": learning_rate(run.config, run.step - 1),
        "seconds": seconds,
    }
    log.write(json.dumps(entry) + "\n")
    log.flush()


def _trim_log(path, step):
    """Drop log lines past `step` (written after the state that is resumed) and a last, half-written one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
