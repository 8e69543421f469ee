"""Datasets of normal and anomalous images in the layouts of the benchmarks. Knows no models."""

from .loading import export_parquet, find_categories, load_anomaly_dataset

__all__ = ["export_parquet", "find_categories", "load_anomaly_dataset"]
