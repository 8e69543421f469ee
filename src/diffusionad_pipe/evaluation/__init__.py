"""Measuring a model on test images, thresholds from good ones, tables and the report."""
