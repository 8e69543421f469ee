"""Detectors as one file for ONNX Runtime, OpenVINO or torch.export, and what runs them."""
