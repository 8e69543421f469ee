"""`training/evaluate.py` on test pictures of which some have no usable mask."""

import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two good pictures and three scratched ones: with a mask, with an empty one and without any."""
    random = np.random.RandomState(0)
    root = tmp_path / "data"
    for name in ("train/good/0", "test/good/0", "test/good/1", "test/scratch/0", "test/scratch/1", "test/scratch/2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (32, 40, 3), dtype=np.uint8)).save(root / f"{name}.png")
    (root / "ground_truth" / "scratch").mkdir(parents=True)
    mask = np.zeros((32, 40), dtype=np.uint8)
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "1_mask.png")
    mask[4:9, 7:30] = 200  # anti-aliased masks are grey
    mask[4:9, 30:33] = 100
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "0_mask.png")
    return root


def test_pictures_without_a_usable_mask(
    tiny_pipeline: DiffusionADPipeline, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")

    def measure(folder: Path) -> tuple[dict[str, float], str]:
        metrics = evaluate.evaluate(str(tmp_path / "model"), str(folder), None, 4)
        return metrics, capsys.readouterr().out

    assert evaluate.read_mask(data / "ground_truth" / "scratch" / "0_mask.png").sum() == 5 * 23
    metrics, printed = measure(data)
    assert printed == "2 of 5 pictures are defective without a usable mask: not in the pixel metrics\n"
    for name in ("1", "2"):
        (data / "test" / "scratch" / f"{name}.png").unlink()
    marked, printed = measure(data)
    assert printed == ""
    assert {k: v for k, v in metrics.items() if k.startswith(("pixel", "au_pro"))} == pytest.approx(
        {k: v for k, v in marked.items() if k.startswith(("pixel", "au_pro"))},
        rel=1e-4,  # the pictures are in other batches, so the last bits of their maps differ
    )
    assert 5 * metrics["right_decisions"] == pytest.approx(round(5 * metrics["right_decisions"]))

    shutil.rmtree(data / "ground_truth")
    with pytest.raises(ValueError, match="all masks are empty or missing"):
        measure(data)
