"""How likely a model finds given images: bits per dimension of each, and which of them stand out."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from genengine.data import Dataset

BATCH = 256


def measure(model, dataset: Dataset, *, seed: int = 0, labelled: bool = True, progress=False) -> dict[str, np.ndarray]:
    """`model.measure` over a whole data set: name -> (N,) float64.

    labelled: give the model the labels, if both have classes; else it finds the images likely on its own.
    progress: show a progress bar, or its title.
    """
    parts: dict[str, list] = {}
    starts = range(0, len(dataset), BATCH)
    for start in tqdm(starts, desc=progress if isinstance(progress, str) else "images", disable=not progress):
        x0, labels, _ = dataset.batch(torch.arange(start, min(start + BATCH, len(dataset))))
        labels = labels.to(model.device) if labelled and labels is not None and model.num_classes else None
        for name, value in model.measure(x0.to(model.device), labels, seed=seed).items():
            parts.setdefault(name, []).append(value.detach().double().cpu().numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def outliers(model, dataset: Dataset, usual: Dataset, *, seed: int = 0, share: float = 0.01) -> dict:
    """Bits per dimension of every image, and those outside of what is usual.

    An image is an outlier if its bits are above the (1 - share) quantile of the usual images' or below their share
    quantile: too likely is as odd as too unlikely (Nalisnick et al. 2019, "Detecting out-of-distribution inputs to deep
    generative models using typicality").

    Args:
        model: with a likelihood.  dataset: the images in question.  usual: images of the model's kind that it was not
            trained on.  share: expected share of usual images on either side, in (0, 0.5).
    Returns:
        dict with num_images, mean, usual_mean, low, high (the bounds), share, outliers (a list of index, file, bits,
        why, the farthest first) and bits (all, in order).
    Raises:
        ValueError: a model without a likelihood, no images, or a share out of range.
    """
    if model.likelihood is None:
        raise ValueError(
            f"evaluate/outliers: {model.family} has no likelihood; use a family that has one, pixelcnn say"
        )
    if not 0 < share < 0.5 or not len(dataset) or not len(usual):
        raise ValueError(
            f"evaluate/outliers: needs images and 0 < share < 0.5, got {len(dataset)} images, {len(usual)} usual ones "
            f"and share {share}"
        )
    found = [measure(model, part, seed=seed, labelled=False) for part in (dataset, usual)]
    if "bits_per_dim" not in found[0]:
        raise ValueError(f"evaluate/outliers: this {model.family} model has no likelihood of the pixels' levels")
    bits, usual_bits = (values["bits_per_dim"] for values in found)
    low, high = np.quantile(usual_bits, [share, 1.0 - share])
    spread = usual_bits.std() + 1e-12
    distance = np.maximum(bits - high, low - bits) / spread
    found = [
        {"index": int(i), "file": dataset.files[i] if dataset.files else "", "bits": float(bits[i]),
         "why": "unlikely" if bits[i] > high else "too likely"}
        for i in np.argsort(-distance, kind="stable") if distance[i] > 0
    ]  # fmt: skip
    return {
        "num_images": len(bits), "mean": float(bits.mean()), "usual_mean": float(usual_bits.mean()), "low": float(low),
        "high": float(high), "share": share, "outliers": found, "bits": bits.tolist(),
    }  # fmt: skip


def outlier_text(report: dict, most: int = 20) -> str:
    """The report for a reader: the summary, then the oddest images."""
    found = report["outliers"]
    usual = 100 - 200 * report["share"]
    lines = [
        f"{report['num_images']} images: {report['mean']:.3f} bits per dimension on average; usual images take "
        f"{report['usual_mean']:.3f}, and {usual:g} % of them {report['low']:.3f} to {report['high']:.3f}",
        f"{len(found)} outliers" + (", the farthest first:" if found else ""),
    ]
    lines += [
        f"  {entry['bits']:7.3f}  {entry['why']:10s}  {entry['file'] or entry['index']}" for entry in found[:most]
    ]
    return "\n".join(lines + ([f"  ... and {len(found) - most} more (--json has all)"] if len(found) > most else []))
