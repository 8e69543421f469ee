"""Exact metrics against their literal definitions."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from diffusionad_pipe.metrics import au_pro, evaluate_maps, f1_max


def literal_au_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Every distinct score a threshold, the overlap of every region computed by itself."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == number) for number in range(1, count + 1)]
    fprs, pros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        called = maps >= threshold
        fprs.append((called & ~masks).sum() / (~masks).sum())
        pros.append(np.mean([called[index][region].mean() for index, region in regions]))
    area = 0.0
    for f0, f1, p0, p1 in zip(fprs, fprs[1:], pros, pros[1:]):
        if f0 >= limit:
            break
        if f1 > limit:
            p1 = p0 + (p1 - p0) * (limit - f0) / (f1 - f0)
            f1 = limit
        area += (f1 - f0) * (p0 + p1) / 2
    return area / limit


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([2, 5, 1000]),
    scale=st.sampled_from([1.0, 1e-6]),
    density=st.sampled_from([0.02, 0.2, 0.6]),
    limit=st.sampled_from([0.05, 0.3, 1.0]),
)
@example(seed=49984, levels=1000, scale=1.0, density=0.6, limit=0.3)  # rises straight up at the limit
def test_au_pro_is_exact(seed: int, levels: int, scale: float, density: float, limit: float) -> None:
    random = np.random.RandomState(seed)
    masks = random.rand(3, 12, 12) < density
    masks[0, 0, 0], masks[0, 11, 11] = True, False
    maps = scale * random.randint(0, levels, masks.shape) / levels + (0.3 * scale * masks)
    assert au_pro(list(maps), list(masks), limit) == pytest.approx(literal_au_pro(maps, masks, limit), abs=1e-9)


def test_au_pro_special_cases() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[1:3, 1:3] = mask[3, 3] = True  # touching at a corner: one region
    assert au_pro([mask.astype(float)], [mask], 0.3) == pytest.approx(1.0)
    assert au_pro([np.full((8, 8), 0.4)], [mask], 0.3) == pytest.approx(0.15)  # constant: the diagonal
    assert np.isnan(au_pro([np.zeros((8, 8))], [np.zeros((8, 8), dtype=bool)]))


def test_f1_max_threshold_separates() -> None:
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    assert f1_max(labels, scores) == (1.0, pytest.approx(0.4))
    value, threshold = f1_max(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.9]))
    called = np.array([0.1, 0.2, 0.3, 0.9]) > threshold
    assert value == pytest.approx(0.8) and called.tolist() == [False, True, True, True]


def test_evaluate_maps() -> None:
    random = np.random.RandomState(0)
    masks = np.zeros((4, 16, 16), dtype=bool)
    masks[2:, 4:8, 4:8] = True
    perfect = masks + 0.1 * random.rand(4, 16, 16)
    metrics = evaluate_maps(list(perfect), list(masks), [0.1, 0.2, 0.8, 0.9])
    assert all(value == pytest.approx(1.0) for value in metrics.values())
    assert list(metrics) == [
        "image_auroc",
        "image_ap",
        "image_f1_max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1_max",
        "au_pro_0.30",
        "au_pro_0.05",
    ]


def test_a_picture_without_a_mask_counts_in_the_image_metrics_alone() -> None:
    random = np.random.RandomState(0)
    masks = [np.zeros((16, 16), dtype=bool) for _ in range(4)]
    masks[2][4:8, 4:8] = masks[3][1:9, 2:5] = True
    maps = [mask + 2 * random.rand(16, 16) for mask in masks]
    scores, labels = [0.1, 0.6, 0.5, 0.9], [0, 0, 1, 1]
    unmasked = [*maps, random.rand(16, 16)], [*masks, None], [*scores, 0.05], [*labels, 1]
    metrics, alone = evaluate_maps(*unmasked), evaluate_maps(maps, masks, scores, labels)
    assert metrics["image_auroc"] == pytest.approx(3 / 6) and alone["image_auroc"] == pytest.approx(3 / 4)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "au_pro_0.30", "au_pro_0.05"):
        assert metrics[name] == alone[name] < 1, name
    with pytest.raises(ValueError, match="picture 4 has no mask .* give labels"):
        evaluate_maps(*unmasked[:3])
    with pytest.raises(ValueError, match="all masks are empty or missing"):
        evaluate_maps(maps, [*masks[:2], None, None], scores, labels)
    with pytest.raises(ValueError, match="all masks are empty or missing"):
        evaluate_maps(maps, [None] * 4, scores, labels)
    with pytest.raises(ValueError, match="map or score 4 is not finite"):
        evaluate_maps([*maps, np.full((16, 16), np.nan)], *unmasked[1:])


def test_bad_input() -> None:
    good, bad = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    maps = [np.zeros((4, 4)), np.ones((4, 4))]
    with pytest.raises(ValueError, match="only one of the two"):
        evaluate_maps(maps, [good, good], [0, 1])
    with pytest.raises(ValueError, match="map 1 is"):
        evaluate_maps([maps[0], np.ones((4, 5))], [good, bad], [0, 1])
    with pytest.raises(ValueError, match="0 is not finite"):
        evaluate_maps([maps[0] * np.nan, maps[1]], [good, bad], [0, 1])
    with pytest.raises(ValueError, match="all masks are empty"):
        evaluate_maps(maps, [good, good], [0, 1], labels=[0, 1])
