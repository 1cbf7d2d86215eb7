"""Turns a finished training run into a shipped model: weights and record in genengine/pretrained/.

    genengine train pixelcnn --preset digits --threads 1 --device cpu --out runs/pixelcnn
    python tools/ship_pretrained.py runs/pixelcnn [--validation runs/pixelcnn_fit]

The record has the command, the configuration, the loss curve and `genengine evaluate`'s figures on the test images. A
run of the same preset with --split train_fit gives the figures on validation, where choices are made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch

import genengine
from genengine import data, evaluate, models, train
from genengine.models import checkpoint

PRETRAINED = Path(genengine.__file__).parent / "pretrained"
POINTS = 80  # of the recorded curve
HELD_OUT = {"train": "test", "train_fit": "validation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run on the split train")
    parser.add_argument("--validation", type=Path, default=None, help="folder of the same preset on train_fit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, config = checkpoint.read(options.run / train.MODEL_FILE)
    name = f"{config['family']}_digits"
    target = PRETRAINED / f"{name}.safetensors"
    shutil.copyfile(options.run / train.MODEL_FILE, target)
    record = describe(options.run, target) | {"test": metrics(options.run)}
    if options.validation is not None:
        record["validation"] = metrics(options.validation)
    (PRETRAINED / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {target.stat().st_size:,} bytes; {record['test']['failures'] or 'every bar is met'}")


def describe(run: Path, target: Path) -> dict:
    """How the model was made."""
    model, (_, config) = models.load(target), checkpoint.read(target)
    log = [json.loads(line) for line in (run / train.LOG_FILE).read_text(encoding="utf-8").splitlines()]
    loss = "loss" if "loss" in log[0] else next(name for name in log[0] if name.endswith("/loss"))
    every = -(-len(log) // POINTS)
    return {
        "command": f"genengine train {config['family']} --preset digits --threads 1 --device cpu --out OUT",
        "train": config["extra"]["train"],
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for network in model.networks.values() for p in network.parameters()),
        "environment": {
            "torch": torch.__version__,
            "threads": 1,
            "device": "CPU, x86-64",
            "train_seconds": round(sum_of_parts([entry["cpu_seconds"] for entry in log]), 1),
        },
        "curve_of": "training loss" if loss == "loss" else f"loss of the {loss.split('/')[0]}",
        "curve": [[entry["step"], round(entry[loss], 4)] for entry in log[::every]],
    }


def sum_of_parts(seconds: list[float]) -> float:
    """The CPU time of a run from its log, whose clock starts anew whenever it is resumed."""
    ends = [a for a, b in zip(seconds, seconds[1:] + [0.0], strict=True) if b < a]
    return sum(ends)


def metrics(run: Path) -> dict:
    """`evaluate_model` without what does not belong to the model."""
    model = models.load(run / train.MODEL_FILE)
    _, config = checkpoint.read(run / train.MODEL_FILE)
    split = config["extra"]["train"]["split"]
    options = model.defaults()
    result = evaluate.evaluate_model(
        model, data.load("digits", split), data.load("digits", HELD_OUT[split]), options=options, with_baselines=False
    )
    return {key: value for key, value in result.items() if key not in ("family", "baselines")} | {"options": options}


if __name__ == "__main__":
    main()
