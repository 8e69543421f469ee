"""Foreground mattes, of every provider."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.synthesis.foregrounds import (
    random_foregrounds,
    segmentation_model_digest,
    segmentation_model_foreground,
    threshold_foreground,
)
from diffusionad_pipe.synthesis.sampling import sample_generator
from diffusionad_pipe.training.images import ImageInputs, foreground_mattes


@pytest.mark.parametrize("background, part", [(0.1, 0.8), (0.9, 0.3)])
def test_threshold_foreground_on_dark_and_bright_backgrounds(background: float, part: float) -> None:
    image = torch.full((3, 96, 96), background) + 0.02 * torch.randn(3, 96, 96, generator=sample_generator(0))
    truth = torch.zeros(96, 96, dtype=torch.bool)
    truth[30:70, 20:60] = True
    image[:, truth] += part - background
    matte = threshold_foreground(image.clamp(0, 1))
    found = matte[0] > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    assert 0 < ((matte > 0) & (matte < 1)).float().mean() < 0.1  # soft at the edge only


def test_threshold_foreground_gives_up_on_textures() -> None:
    assert threshold_foreground(torch.full((3, 64, 64), 0.5)).min() == 1
    stripes = (torch.arange(64) % 8 < 4).float().expand(3, 64, 64)
    assert threshold_foreground(stripes.contiguous()).min() == 1


def test_random_foregrounds() -> None:
    mattes = random_foregrounds(40, 60, [sample_generator(index) for index in range(400)])
    areas = mattes.mean((1, 2, 3))
    assert mattes.shape == (400, 1, 40, 60) and 0.01 < areas.min() < 0.1 and 0.7 < areas.max() <= 1
    share = mattes.mean((0, 1))
    assert share[20, 30] > 0.3
    # Defects at the border are as real as others: a corner is reached by at least a fifth of what reaches the middle.
    assert min(share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]) > share[20, 30] / 5


def images(folder: Path, count: int = 3) -> ImageInputs:
    names = [str(folder / "train" / "good" / f"{index:03d}.png") for index in range(count)]
    return ImageInputs(names, torch.zeros(count, 3, 32, 32, dtype=torch.uint8), [""] * count)


@pytest.mark.parametrize("layout", ["DISthresh", "thresh", "own"])
def test_mattes_from_a_folder(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / layout / "good"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.new("L", (64, 48), 80 * index).save(folder / f"{index:03d}.png")
    mattes = foreground_mattes("folder", images(tmp_path), folder=str(folder) if layout == "own" else None)
    assert mattes.shape == (3, 1, 32, 32) and mattes[:, 0, 5, 5].tolist() == [0, 80, 160]


def test_missing_mattes_are_named_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "mattes"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "001.png")
    with pytest.raises(ValueError, match=r"2 of 3 pictures(.|\n)*000\.png(.|\n)*002\.png(.|\n)*--foreground threshold"):
        foreground_mattes("folder", images(tmp_path), folder=str(folder))


@pytest.fixture
def segformer(tmp_path: Path) -> Path:
    """A tiny real SegFormer that calls bright pixels its class 1."""
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 1], sr_ratios=[1, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[1, 1], decoder_hidden_size=8,
        id2label={0: "part", 1: "background", 2: "other part"},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_mattes_from_a_segmentation_model(segformer: Path, tmp_path: Path) -> None:
    image = torch.rand(3, 40, 56, generator=sample_generator(0))
    matte = segmentation_model_foreground(image, str(segformer))
    assert matte.shape == (1, 40, 56) and matte.min() > 0 and matte.max() < 1
    assert segmentation_model_digest(str(segformer)) == segmentation_model_digest(str(segformer))


def test_mattes_are_kept_for_the_same_image_and_model(segformer: Path, tmp_path: Path) -> None:
    generator, folder = sample_generator(0), OutputFolder(tmp_path / "run", "train")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=generator).byte()
    names = ["part.png", "Hub/parts[1]", "../odd:name\udcff.png"]

    def mattes(order: list[int], model: Path = segformer) -> torch.Tensor:
        chosen = ImageInputs([names[index] for index in order], pixels[order], [""] * len(order))
        return foreground_mattes("transformers", chosen, model=str(model), cache=folder)

    first = mattes([0, 1, 2])
    files = sorted((tmp_path / "run" / "foregrounds").iterdir())
    assert len(files) == 3 and all(folder.owns(f"foregrounds/{file.name}") for file in files)
    assert torch.equal(mattes([0, 1, 2]), first)
    for file in files:  # so that one sees where they come from
        folder.write(f"foregrounds/{file.name}", Image.new("L", (32, 32), 77).save)
    assert (mattes([2, 0]) == 77).all()  # wherever they stand

    other = tmp_path / "other"
    shutil.copytree(segformer, other)
    torch.manual_seed(1)
    network = SegformerForSemanticSegmentation.from_pretrained(segformer)
    torch.nn.init.normal_(network.decode_head.classifier.bias)
    network.save_pretrained(other)
    assert not torch.equal(mattes([0, 1, 2], other), first)
    assert len(list((tmp_path / "run" / "foregrounds").iterdir())) == 6
    pixels[0] = 0  # another picture of the same name
    again = mattes([0, 1, 2])
    assert (again[0] != 77).any() and (again[1:] == 77).all()
    assert len(list((tmp_path / "run" / "foregrounds").iterdir())) == 7


def test_unusable_providers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none, random, threshold, folder, transformers"):
        foreground_mattes("salient", images(tmp_path))
    with pytest.raises(ValueError, match="--foreground_model"):
        foreground_mattes("transformers", images(tmp_path))
    with pytest.raises(ValueError, match="not a semantic segmentation model"):
        foreground_mattes("transformers", images(tmp_path), model=str(tmp_path / "nothing"))
