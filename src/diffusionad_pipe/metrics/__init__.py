"""Metrics of anomaly maps and image scores, exact or streaming. Knows no images and no models."""

from .exact import au_pro, evaluate_maps, f1_max, mean_metrics, reference_au_pro
from .names import METRIC_NAMES
from .operating_points import OperatingPoints
from .streaming import StreamingAnomalyMetrics

__all__ = [
    "METRIC_NAMES",
    "OperatingPoints",
    "StreamingAnomalyMetrics",
    "au_pro",
    "evaluate_maps",
    "f1_max",
    "mean_metrics",
    "reference_au_pro",
]
