"""Synthetic anomalies a second on one core: our batched synthesis against the same recipe a picture at a time in NumPy.

    python benchmarks/synthesis.py

Both make every picture anomalous, half of them with a texture and half with the picture itself, inside mattes that
`threshold` finds on the shipped hazelnuts, 256 px, from uint8 pictures in memory to float32 ones. The NumPy version
below is the recipe as it is usually written: Perlin noise from per-cell gradients, scipy's rotation, Pillow's and
NumPy's augmenters on uint8 arrays. Its masks cover as much as ours, which the table shows, and it may not be slower
than it has to be. Rounds are taken in turns, A B A B, in processor seconds of one thread, so that other programs on the
machine do not count; medians are reported.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from tqdm.auto import tqdm

from diffusionad_pipe.synthesis.anomalies import (
    MASK_TRIES,
    MAX_PERLIN_EXPONENT,
    PERLIN_THRESHOLD,
    SHUFFLE_GRID,
    anomaly_sources,
    perlin_masks,
    synthesize_anomalies,
)
from diffusionad_pipe.synthesis.sampling import sample_generator
from diffusionad_pipe.training.images import foreground_mattes, read_good_images, read_textures

Generator = np.random.Generator


def perlin_noise(shape: tuple[int, ...], rows: int, columns: int, rng: Generator) -> np.ndarray:
    """Perlin noise `[H, W]` with a random gradient at each corner of rows × columns cells."""
    height, width = shape
    angles = rng.uniform(0, 2 * math.pi, (rows + 1, columns + 1))
    gradient_y, gradient_x = np.sin(angles), np.cos(angles)
    y, x = np.arange(height)[:, None] * rows / height, np.arange(width)[None, :] * columns / width
    row, column = y.astype(int), x.astype(int)
    dy, dx = y - row, x - column

    def corner(down: int, right: int) -> np.ndarray:
        place = row + down, column + right
        return gradient_y[place] * (dy - down) + gradient_x[place] * (dx - right)

    fade_y, fade_x = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (dy, dx))
    top = corner(0, 0) + fade_x * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + fade_x * (corner(1, 1) - corner(1, 0))
    return math.sqrt(2) * (top + fade_y * (bottom - top))


def perlin_mask(foreground: np.ndarray, rng: Generator) -> np.ndarray:
    """M `[H, W]` inside the matte, the first of 50 tries that is not empty."""
    rows, columns = 2 ** rng.integers(0, MAX_PERLIN_EXPONENT + 1, 2)
    for _ in range(MASK_TRIES):
        noise = perlin_noise(foreground.shape, rows, columns, rng)
        noise = ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1)
        mask = (noise > PERLIN_THRESHOLD) * foreground
        if mask.any():
            break
    return mask


def gamma_contrast(image: np.ndarray, rng: Generator) -> np.ndarray:
    return (255 * (image / 255) ** rng.uniform(0.5, 2, 3)).round().astype(np.uint8)


def brightness(image: np.ndarray, rng: Generator) -> np.ndarray:
    return (image * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)).round().clip(0, 255).astype(np.uint8)


def sharpness(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(rng.uniform(0, 2)))


def hue_and_saturation(image: np.ndarray, rng: Generator) -> np.ndarray:
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(int)
    hue = (hsv[..., 0] + rng.integers(-50, 51)) % 256
    saturation = (hsv[..., 1] + rng.integers(-50, 51)).clip(0, 255)
    hsv = np.stack([hue, saturation, hsv[..., 2]], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def solarize(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.where(image > rng.uniform(32, 128), 255 - image, image) if rng.random() < 0.5 else image


def posterize(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.asarray(ImageOps.posterize(Image.fromarray(image), int(rng.integers(1, 9))))


def invert(image: np.ndarray, rng: Generator) -> np.ndarray:
    return 255 - image


def autocontrast(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def equalize(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def rotate(image: np.ndarray, rng: Generator) -> np.ndarray:
    return ndimage.rotate(image, rng.uniform(-45, 45), reshape=False, order=1)


AUGMENTERS: tuple[Callable[[np.ndarray, Generator], np.ndarray], ...] = (
    gamma_contrast,
    brightness,
    sharpness,
    hue_and_saturation,
    solarize,
    posterize,
    invert,
    autocontrast,
    equalize,
    rotate,
)


def shuffle_tiles(image: np.ndarray, rng: Generator) -> np.ndarray:
    """The picture `[H, W, 3]` cut in 8 × 8 tiles, in random order."""
    height, width = image.shape[0] // SHUFFLE_GRID, image.shape[1] // SHUFFLE_GRID
    tiles = image.reshape(SHUFFLE_GRID, height, SHUFFLE_GRID, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    tiles = tiles[rng.permutation(len(tiles))].reshape(SHUFFLE_GRID, SHUFFLE_GRID, height, width, 3)
    return tiles.swapaxes(1, 2).reshape(image.shape)


def synthesize(
    image: np.ndarray, foreground: np.ndarray, textures: np.ndarray, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One anomalous picture `[3, H, W]` and its mask `[1, H, W]`, float32 in [0, 1].

    Args:
        image: `[H, W, 3]` uint8.
        foreground: `[H, W]` float32 in [0, 1].
        textures: `[T, H, W, 3]` uint8.
        rng: of every draw.
    """
    mask = perlin_mask(foreground, rng)[..., None].astype(np.float32)
    itself = rng.random() < 0.5
    source = image if itself else textures[rng.integers(len(textures))]
    for index in rng.choice(len(AUGMENTERS), 3, replace=False):
        source = AUGMENTERS[index](source, rng)
    source = shuffle_tiles(source, rng) if itself else source
    opacity = np.float32(rng.uniform(0.2, 0.8))
    normal, anomaly = image.astype(np.float32) / 255, source.astype(np.float32) / 255
    result = (1 - mask) * normal + mask * (opacity * normal + (1 - opacity) * anomaly)
    return result.transpose(2, 0, 1), mask.transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="training/data/hazelnut_toy/hazelnut", help="folder of good pictures")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8, help="of ours")
    parser.add_argument("--count", type=int, default=64, help="pictures a round, a multiple of the batch size")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    good = read_good_images(arguments.data, arguments.resolution)
    tensors, mattes = good.pixels, foreground_mattes("threshold", good)
    textures = read_textures(None, arguments.resolution)
    assert isinstance(mattes, torch.Tensor) and textures is not None
    arrays = [t.permute(0, 2, 3, 1).contiguous().numpy() for t in (tensors, mattes, textures)]  # [N, H, W, C]

    def batches(draws: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Generator]]]:
        for start in range(0, len(draws), arguments.batch_size):
            batch = draws[start : start + arguments.batch_size]
            rows = torch.tensor(batch) % len(tensors)
            yield tensors[rows].float() / 255, mattes[rows].float() / 255, [sample_generator(0, n) for n in batch]

    def plain(draws: Sequence[int]) -> list[np.ndarray]:
        rngs = ((n % len(tensors), np.random.default_rng(n)) for n in draws)
        images, foregrounds, sources = arrays
        return [synthesize(images[i], foregrounds[i, ..., 0] / np.float32(255), sources, rng)[1] for i, rng in rngs]

    def plain_masks(draws: Sequence[int]) -> list[np.ndarray]:
        rngs = ((n % len(tensors), np.random.default_rng(n)) for n in draws)
        return [perlin_mask(arrays[1][i, ..., 0] / np.float32(255), rng) for i, rng in rngs]

    def ours(draws: Sequence[int]) -> list[np.ndarray]:
        samples = [
            synthesize_anomalies(images, foregrounds, textures, generators, anomaly_probability=1)
            for images, foregrounds, generators in batches(draws)
        ]
        return [sample.masks.numpy() for sample in samples]

    def ours_masks(draws: Sequence[int]) -> list[np.ndarray]:
        return [perlin_masks(foregrounds, generators).numpy() for _, foregrounds, generators in batches(draws)]

    def ours_sources(draws: Sequence[int]) -> list[np.ndarray]:
        options = {"texture_probability": 0.5, "procedural_probability": 0.0}
        return [anomaly_sources(images, textures, own, **options).numpy() for images, _, own in batches(draws)]

    methods = {
        "NumPy, a picture at a time": plain,
        "of NumPy: masks": plain_masks,
        f"ours, batches of {arguments.batch_size}": ours,
        "of ours: masks": ours_masks,
        "of ours: augmented sources": ours_sources,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    covered: dict[str, list[float]] = {name: [] for name in methods}
    for turn in tqdm(range(arguments.rounds + 1), desc="rounds, the first not counted"):
        draws = range(turn * arguments.count, (turn + 1) * arguments.count)
        for name, method in methods.items():
            started = time.process_time()
            masks = method(draws)
            if turn > 0:
                seconds[name].append((time.process_time() - started) / arguments.count)
                covered[name].append(100 * float(np.mean([mask.mean() for mask in masks])))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = medians["NumPy, a picture at a time"]
    print(
        f"{arguments.resolution} px, one thread, medians of {arguments.rounds} rounds of {arguments.count} pictures\n"
    )
    print("| synthesis | ms a picture | pictures a second | times NumPy | area under masks |\n|---|---|---|---|---|")
    for name, median in medians.items():
        area = "" if "sources" in name else f"{statistics.mean(covered[name]):.1f} %"
        print(f"| {name} | {1000 * median:.2f} | {1 / median:.0f} | {slowest / median:.2f} | {area} |")


if __name__ == "__main__":
    main()
