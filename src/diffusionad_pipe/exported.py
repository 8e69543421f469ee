"""The public name of [`export.detector`]: `from diffusionad_pipe.exported import ExportedDetector`."""

from .export.detector import ExportedDetector, ExportedDetectorOutput, ExportedFileError

__all__ = ["ExportedDetector", "ExportedDetectorOutput", "ExportedFileError"]
