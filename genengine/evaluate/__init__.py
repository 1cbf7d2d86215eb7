"""Honest metrics: sample quality, diversity, memorisation and likelihood, with baselines to compare with.

No single number is proof. Class histograms reach a good accuracy, a copy of the training set reaches a good
everything else, so `Report.passes` asks for all bars at once, and `baselines` shows what fools which metric.
"""

from genengine.evaluate.baselines import baselines
from genengine.evaluate.density import measure, outlier_text, outliers
from genengine.evaluate.family import evaluate_model, text
from genengine.evaluate.features import class_features
from genengine.evaluate.metrics import (
    class_entropy,
    frechet_distance,
    knn_classify,
    live_features,
    manifold_metrics,
    nearer_train_share,
    principal_axes,
    sliced_wasserstein,
    squared_distances,
)
from genengine.evaluate.report import QUALITY_BARS, Report, evaluate_samples, evaluate_seeds

__all__ = [
    "QUALITY_BARS", "Report", "baselines", "class_entropy", "class_features", "evaluate_model", "evaluate_samples",
    "evaluate_seeds", "frechet_distance", "knn_classify", "live_features", "manifold_metrics", "measure",
    "nearer_train_share", "outlier_text", "outliers", "principal_axes", "sliced_wasserstein", "squared_distances",
    "text",
]  # fmt: skip
