"""What a run says of itself while it goes on: log.jsonl, and accelerate's trackers."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..files.output_folder import OutputFolder
from .config import TrainingConfig

LOG = "log.jsonl"
TRACKER_FOLDERS = "diffusionad", "wandb"


class RunLog:
    """Writes numbers and pictures of a run, in its first process; the others are silent.

    Args:
        config: the settings, which trackers are told.
        accelerator: has the trackers.
        folder: of the run.

    Example:
        ```python
        from accelerate import Accelerator

        from diffusionad_pipe.files.output_folder import OutputFolder
        from diffusionad_pipe.training.config import TrainingConfig
        from diffusionad_pipe.training.run_log import RunLog

        with OutputFolder("runs/mine", "train") as folder:
            log = RunLog(TrainingConfig(output_dir="runs/mine"), Accelerator(), folder)
            log.write(10, {"noise_loss": 0.1, "mask_loss": 0.2})
            log.end()
        ```
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, folder: OutputFolder) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.known_files = self._tracker_files()
        if config.report_to:
            settings = {name: str(value) for name, value in asdict(config).items()}
            # wandb alone would write into the working folder, pictures too.
            accelerator.init_trackers("diffusionad", settings, {"wandb": {"dir": str(folder.path)}})

    def write(self, step: int, entry: dict[str, float]) -> None:
        """One line of numbers."""
        if self.accelerator.is_main_process:
            self.folder.append(LOG, json.dumps({"step": step} | entry) + "\n")
            self.accelerator.log(entry, step=step)

    def write_grid(self, step: int, grid: Image.Image) -> None:
        """Pictures of held-out samples, as a file too."""
        self.folder.write(f"samples/step-{step:07d}.png", grid.save)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                # [1, H, W, 3], which tensorboard alone must be told.
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"held_out": np.asarray(grid)[None]}, step=step, **layout)
        self._record_trackers()

    def end(self) -> None:
        """Let the trackers write what they hold."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self._record_trackers()

    def _record_trackers(self) -> None:
        """Take for the run's own what trackers have written since, pictures among it."""
        new = self._tracker_files() - self.known_files
        self.folder.adopt(*new, growing=True)
        self.known_files |= new

    def _tracker_files(self) -> set[Path]:
        """The files where accelerate's trackers write beside a run."""
        return {path for name in TRACKER_FOLDERS for path in (self.folder.path / name).rglob("*") if path.is_file()}
