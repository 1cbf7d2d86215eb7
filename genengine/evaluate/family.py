"""The whole evaluation of one model: samples over several seeds, given images, the baselines, and the family's bars."""

from __future__ import annotations

import numpy as np

from genengine.evaluate.baselines import baselines
from genengine.evaluate.density import measure
from genengine.evaluate.metrics import ARROWS
from genengine.evaluate.report import evaluate_seeds
from genengine.evaluate.table import comparison, measured, met


def evaluate_model(
    model, train, held_out, *, seeds=range(5), options=None, with_baselines=True, progress=False
) -> dict:
    """Everything there is to measure about a model.

    Samples are drawn with the training images' labels in their order: as many, and as balanced, as the set that they
    are compared with.

    Args:
        model: a `models.Model`.  train, held_out: Datasets, what it was trained on and what it has not seen.
        seeds: of sampling, at least two.  options: keyword arguments of `model.sample`.
        with_baselines: measure the baselines too.  progress: say on stderr how far it is.
    Returns:
        dict with family, samples (of `evaluate_seeds`), measured (name -> {"train": mean, "held_out": mean}, of
        `model.measure`), baselines (name -> Report), bars, and failures (the bars that are missed, as text).
    Raises:
        ValueError: images that do not fit the model, or too few of them.
    """
    for name, part in (("train", train), ("held_out", held_out)):
        if part.image_shape != model.image_shape or len(part) < 6:
            raise ValueError(
                f"evaluate/evaluate_model: {name} must be at least 6 images of shape (C, H, W) = {model.image_shape}, "
                f"which the model makes, got {len(part)} of {part.image_shape} in {part.name}"
            )
    train, held_out = (part.with_levels(model.num_levels) for part in (train, held_out))
    sets = {"reference": (train.images, train.labels), "held_out": (held_out.images, held_out.labels)}
    sets["num_levels"] = model.num_levels
    sample_bars = {name: bar for name, bar in model.bars.items() if name in ARROWS}

    def draw(labels, seed):
        return model.sample(
            len(train), labels, seed=seed, check_finite=True, progress=progress and f"seed {seed}", **(options or {})
        )

    asked = train.labels if model.num_classes else None
    samples = evaluate_seeds(draw, asked, seeds=seeds, bars=sample_bars, **sets)
    values: dict[str, dict[str, float]] = {}
    for split, images in (("train", train), ("held_out", held_out)):
        for name, each in measure(model, images, progress=progress and split).items():
            values.setdefault(name, {})[split] = float(np.mean(each))
    failures = samples["mean"].failures(sample_bars)
    for name, bar in model.bars.items():
        if name not in ARROWS and not (name in values and met(values[name]["held_out"], bar)):
            got = f"{values[name]['held_out']:.4f}" if name in values else "missing"
            failures.append(f"{name} {got}, bar {bar[0]} {bar[1]}")
    return {
        "family": model.family,
        "samples": samples,
        "measured": values,
        "baselines": baselines(train.labels, **sets) if with_baselines else {},
        "bars": dict(model.bars),
        "failures": failures,
    }


def text(result: dict) -> str:
    """What `evaluate_model` returned, for a reader."""
    parts = [comparison(result["samples"], result["baselines"], result["bars"])]
    if result["measured"]:
        parts.append(measured(result["measured"], result["bars"]))
    failures = result["failures"]
    parts.append("MISSED: " + "; ".join(failures) if failures else "every bar is met")
    return "\n\n".join(parts)
