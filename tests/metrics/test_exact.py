"""Exact metrics against scikit-learn's and their literal definitions, the reference's against its procedure."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from diffusionad_pipe.metrics.exact import (
    au_pro,
    evaluate_maps,
    f1_max,
    mean_metrics,
    rank_pixels,
    reference_au_pro,
)
from diffusionad_pipe.metrics.operating_points import OperatingPoints
from diffusionad_pipe.metrics.scored_images import check_images

EIGHT_CONNECTED = np.ones((3, 3))


def images(seed: int, scores: str, defects: str) -> tuple[np.ndarray, np.ndarray]:
    """Three maps and their masks, `[3, 12, 12]`: the first has defects, the last has none."""
    random = np.random.RandomState(seed)
    masks = np.zeros((3, 12, 12), dtype=bool)
    if defects == "noise":
        masks[:2] = random.rand(2, 12, 12) < random.choice([0.02, 0.2, 0.6])
    elif defects == "tiny":
        masks[0, 5, 7] = masks[1, 0, 0] = masks[1, 11, 11] = True
    elif defects == "hole":
        masks[0, 2:9, 2:9] = True
        masks[0, 4:7, 4:7] = False
        masks[0, 5, 5] = masks[1, 1:3, 1:11] = True  # a region in the hole of another
    else:  # touching at corners, which makes one region, with a hole that leaks through a corner
        masks[0, 1:3, 1:3] = masks[0, 3:5, 3:5] = masks[1, 8, 0] = masks[1, 9, 1] = True
        masks[0, 8, 9] = masks[0, 9, 8] = masks[0, 9, 10] = masks[0, 10, 9] = True
    masks[0, 0, 0], masks[0, 11, 11] = True, False
    maps = {
        "random": random.rand(*masks.shape) + 0.3 * masks,
        "tied": random.randint(0, random.choice([2, 5, 40]), masks.shape) / 40 + 0.1 * masks,
        "constant": np.full(masks.shape, 0.4),
        "squeezed": (0.6 * random.rand(*masks.shape) + 0.4 * masks) ** 30,
        "negative": random.randn(*masks.shape).round(1) + masks,
    }[scores]
    return maps.astype(random.choice(["float32", "float64"])), masks


any_images = st.builds(
    images,
    st.integers(0, 10**6),
    st.sampled_from(["random", "tied", "constant", "squeezed", "negative"]),
    st.sampled_from(["noise", "tiny", "hole", "touching"]),
)


def literal_curve(maps: np.ndarray, masks: np.ndarray) -> tuple[list[float], list[float]]:
    """Every distinct score a threshold, the overlap of every region computed by itself."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
        regions += [(index, labels == number) for number in range(1, count + 1)]
    fprs, pros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        called = maps >= threshold
        fprs.append((called & ~masks).sum() / (~masks).sum())
        pros.append(np.mean([called[index][region].mean() for index, region in regions]))
    return fprs, pros


def literal_au_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    fprs, pros = literal_curve(maps, masks)
    area = 0.0
    for f0, f1, p0, p1 in zip(fprs, fprs[1:], pros, pros[1:]):
        if f0 >= limit:
            break
        if f1 > limit:
            p1 = p0 + (p1 - p0) * (limit - f0) / (f1 - f0)
            f1 = limit
        area += (f1 - f0) * (p0 + p1) / 2
    return area / limit


def literal_reference_au_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """The authors' procedure a threshold at a time."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
        for region in (labels == number for number in range(1, count + 1)):
            regions.append((index, ndimage.binary_fill_holes(region, structure=EIGHT_CONNECTED), region.sum()))
    step = (maps.max() - maps.min()) / 1000
    fprs, pros = [], []
    for number in range(1000):
        called = maps > maps.max() - number * step
        fprs.append((called & ~masks).sum() / (~masks).sum())
        pros.append(np.mean([called[index][filled].sum() / area for index, filled, area in regions]))
    kept = np.array(fprs) <= limit
    fpr, pro = np.array(fprs)[kept], np.array(pros)[kept]
    return auc(fpr / fpr.max(), pro) if fpr.max() > 0 else math.nan


@settings(max_examples=40, deadline=None)
@given(any_images)
def test_metrics_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    maps, masks = case
    metrics = evaluate_maps(maps, masks)
    labels, scores = masks.ravel(), maps.ravel()
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert metrics["pixel_f1_max"] == pytest.approx(best, abs=1e-9)
    assert metrics["pixel_f1_max"] == pytest.approx(f1_max(labels, scores)[0], abs=1e-9)
    called = scores >= rank_pixels(check_images(maps, masks)).f1_max_threshold()
    assert metrics["pixel_f1_max"] == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()))

    image_scores, image_labels = maps[:, :, 3].ravel().astype(float), masks[:, 3, :].any(axis=0).repeat(3)
    image_labels[:2] = True, False
    metrics = evaluate_maps([np.zeros((2, 2))] * 36, [None] * 35 + [np.eye(2)], image_scores, image_labels)
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(image_labels, image_scores), abs=1e-9)
    assert metrics["image_ap"] == pytest.approx(average_precision_score(image_labels, image_scores), abs=1e-9)
    assert metrics["image_f1_max"] == pytest.approx(f1_max(image_labels, image_scores)[0], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(case=any_images, limit=st.sampled_from([0.05, 0.3, 1.0]))
# The curve rises straight up at the limit.
@example(case=(np.array([[[3, 2, 1, 0, 0]]]), np.array([[[0, 1, 0, 1, 0]]], dtype=bool)), limit=1 / 3)
def test_au_pro_is_exact(case: tuple[np.ndarray, np.ndarray], limit: float) -> None:
    assert au_pro(*case, limit) == pytest.approx(literal_au_pro(*case, limit), abs=1e-9)


def test_au_pro_special_cases() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[1:3, 1:3] = mask[3, 3] = True  # touching at a corner: one region
    assert au_pro([mask.astype(float)], [mask], 0.3) == pytest.approx(1.0)
    metrics = evaluate_maps([np.full((8, 8), 0.4)], [mask], fpr_limits=(0.3, 0.05))
    assert metrics["pixel_auroc"] == 0.5
    # A constant map takes the diagonal, half of the limit.
    assert metrics["au_pro_0.30"] == pytest.approx(0.15) and metrics["au_pro_0.05"] == pytest.approx(0.025)
    for masks in ([np.zeros((8, 8))], [np.ones((8, 8))], [None]):
        with pytest.warns(UndefinedMetricWarning, match="both are needed"):
            assert math.isnan(au_pro([np.zeros((8, 8))], masks))


@settings(max_examples=6, deadline=None)
@given(case=any_images, limit=st.sampled_from([0.05, 0.3]))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_the_reference_follows_the_authors_procedure(case: tuple[np.ndarray, np.ndarray], limit: float) -> None:
    expected = literal_reference_au_pro(*case, limit)
    assert reference_au_pro(*case, limit) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    metrics, exact = evaluate_maps(*case, fpr_limits=[limit], method="reference"), evaluate_maps(*case)
    assert metrics.pop(f"au_pro_{limit:.2f}") == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert metrics == {name: exact[name] for name in metrics} and len(metrics) == 3


def test_the_reference_depends_on_the_scale_of_the_scores_and_the_exact_does_not() -> None:
    random = np.random.RandomState(0)
    masks = np.zeros((6, 32, 32), dtype=bool)
    masks[:3, 8:16, 8:20] = True
    maps = random.rand(6, 32, 32) + 0.5 * masks
    squeezed = (maps / 1.5) ** 16  # the same order, nearly all of it close to 0
    exact = au_pro(maps, masks)
    assert au_pro(squeezed, masks) == pytest.approx(exact, abs=1e-12)
    assert abs(reference_au_pro(maps, masks) - exact) < 0.02
    assert reference_au_pro(squeezed, masks) < exact - 0.1


def test_the_reference_is_undefined_where_it_reaches_no_false_positive() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 2:4] = True
    for maps, masks in (([np.ones((8, 8))], [mask]), ([np.ones((8, 8))], [~mask & mask]), ([mask], [None])):
        with pytest.warns(UndefinedMetricWarning, match="the reference's AU-PRO is NaN"):
            assert math.isnan(reference_au_pro(maps, masks))


@pytest.mark.parametrize("lowest", [-1.0, 0.0, 5e-324, 0.25])
def test_the_threshold_of_the_best_f1_calls_what_it_was_chosen_for(lowest: float) -> None:
    above = float(np.nextafter(lowest, 1))
    for scores, labels in (([lowest, above], [1, 1]), ([lowest, above], [0, 1]), ([lowest, lowest], [1, 0])):
        value, threshold = f1_max(np.array(labels), np.array(scores))
        called = np.array(scores) > threshold
        assert value == 2 * (called & np.array(labels, dtype=bool)).sum() / (called.sum() + sum(labels))


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
    names = [
        "image_auroc",
        "image_ap",
        "image_f1_max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1_max",
        "au_pro_0.30",
        "au_pro_0.05",
    ]
    assert list(metrics) == names
    assert list(evaluate_maps(perfect, masks)) == names[3:]  # no scores, no image metrics


@pytest.mark.parametrize("method", ["exact", "streaming", "reference"])
def test_tensors_give_what_arrays_give(method: str) -> None:
    maps, masks = images(0, "random", "hole")
    scores = maps.max(axis=(1, 2))
    expected = evaluate_maps(maps, masks, scores, method=method)
    maps.flags.writeable = False  # as pictures read by Pillow are
    assert evaluate_maps(list(maps), masks * np.uint8(255), list(scores), [1, 1, 0], method=method) == expected
    tensors = [torch.tensor(a) for a in (maps, masks, scores)]
    assert evaluate_maps(*tensors, torch.tensor([1, 1, 0]), method=method) == expected
    half = [tensor.bfloat16() for tensor in tensors]
    full = [tensor.float().numpy() for tensor in half]
    expected = evaluate_maps(full[0], full[1], full[2], method=method)
    assert evaluate_maps(*half, method=method) == expected
    assert evaluate_maps(list(half[0]), list(half[1]), list(half[2]), method=method) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_whole_numbers_keep_their_order(dtype: type) -> None:
    maps = np.arange(16).reshape(1, 4, 4) + (2**25 if np.iinfo(dtype).max > 2**25 else 0)  # tied in float32
    masks = maps > maps.max() - 3
    assert evaluate_maps(maps.astype(dtype), masks) == dict.fromkeys(evaluate_maps(maps, masks), 1.0)


def test_an_image_without_a_mask_counts_in_the_image_metrics_alone() -> None:
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
    with pytest.raises(ValueError, match="map or score 1, 4 is not finite"):
        evaluate_maps([*maps, np.full((16, 16), np.nan)], unmasked[1], [0.1, np.inf, *unmasked[2][2:]], unmasked[3])


@pytest.mark.parametrize("method", ["exact", "streaming", "reference"])
def test_what_is_undefined_is_nan_with_a_warning(method: str) -> None:
    good, bad = np.zeros((4, 4), dtype=bool), np.eye(4, dtype=bool)
    maps, scores = np.random.RandomState(0).rand(2, 4, 4), [0.1, 0.2]

    def undefined(masks: list | None, labels: list[int]) -> set[str]:
        metrics = evaluate_maps(maps, masks, scores, labels, method=method)
        return {name.split("_")[0] for name, value in metrics.items() if math.isnan(value)}

    with (
        pytest.warns(UndefinedMetricWarning, match="pictures with a score 0 are defective and 2 good"),
        pytest.warns(UndefinedMetricWarning, match="pixels with a mask 0 are defective and 32 good"),
    ):
        assert undefined([good, good], [0, 0]) == {"image", "pixel", "au"}
    with pytest.warns(UndefinedMetricWarning, match="2 are defective and 0 good"):
        assert undefined([bad, bad], [1, 1]) == {"image"}
    for masks in ([good, good], [None, None], None, [~good, None]):
        with pytest.warns(UndefinedMetricWarning, match="pixel metrics are NaN"):
            assert undefined(masks, [0, 1]) == {"pixel", "au"}


def test_undefined_metrics_are_left_out_of_means() -> None:
    nan = math.nan
    means = mean_metrics([{"a": 0.5, "b": nan, "c": nan}, {"a": 1.0, "b": 0.25, "c": nan}, {"b": 0.75}])
    assert means == pytest.approx({"a": 0.75, "b": 0.5, "c": nan}, nan_ok=True)


def test_bad_input() -> None:
    good, bad = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    maps = [np.zeros((4, 4)), np.ones((4, 4))]
    with pytest.raises(ValueError, match="map 1 is"):
        evaluate_maps([maps[0], np.ones((4, 5))], [good, bad], [0, 1])
    with pytest.raises(ValueError, match=r"map 0 is \(1, 4, 4\)"):
        evaluate_maps(np.zeros((2, 1, 4, 4)), None)
    with pytest.raises(ValueError, match="0 is not finite"):
        evaluate_maps([maps[0] * np.nan, maps[1]], [good, bad], [0, 1])
    with pytest.raises(ValueError, match="2 maps and 3 scores"):
        evaluate_maps(maps, [good, bad], [0, 1, 2])
    for limit in (0, -0.1, 1.5, math.nan):
        for method in ("exact", "streaming", "reference"):
            with pytest.raises(ValueError, match="give one above 0, and at most 1"):
                evaluate_maps(maps, [good, bad], fpr_limits=[limit], method=method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no method 'fast'"):
        evaluate_maps(maps, [good, bad], method="fast")  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(any_images)
def test_curves_have_the_areas_of_the_metrics(case: tuple[np.ndarray, np.ndarray]) -> None:
    maps, masks = case
    metrics = evaluate_maps(maps, masks, fpr_limits=[1.0])
    points = rank_pixels(check_images(maps, masks))
    fpr, tpr = points.roc_curve()
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics["pixel_auroc"], abs=1e-3)
    fpr, pro = points.pro_curve()
    assert np.trapezoid(pro, fpr) == pytest.approx(metrics["au_pro_1.00"], abs=1e-3)
    recall, precision = points.precision_recall_curve()
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert best == pytest.approx(metrics["pixel_f1_max"], abs=0.01)


def curves(points: OperatingPoints) -> list[tuple[np.ndarray, np.ndarray]]:
    return [points.roc_curve(), points.precision_recall_curve(), points.pro_curve()]


def test_long_curves_are_thinned() -> None:
    random = np.random.RandomState(0)
    masks = np.zeros((4, 128, 128), dtype=bool)
    masks[:2, 40:80, 40:90] = True
    maps = random.rand(4, 128, 128) + 0.3 * masks
    metrics = evaluate_maps(maps, masks, fpr_limits=[1.0])
    points = rank_pixels(check_images(maps, masks))
    for x, y in curves(points):
        assert 250 < len(x) == len(y) <= 500
        assert x[0] == 0 and x[-1] == pytest.approx(1) and (np.diff(x) >= 0).all()
    assert np.trapezoid(*points.roc_curve()[::-1]) == pytest.approx(metrics["pixel_auroc"], abs=1e-3)
    assert np.trapezoid(*points.pro_curve()[::-1]) == pytest.approx(metrics["au_pro_1.00"], abs=1e-3)
    for curve in curves(rank_pixels(check_images(maps[2:], masks[2:]))):
        assert len(curve[0]) == len(curve[1]) == 0
