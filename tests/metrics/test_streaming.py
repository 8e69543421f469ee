"""Streamed metrics: within their own bounds of the exact ones, and the same however the pictures come."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.exceptions import UndefinedMetricWarning

from diffusionad_pipe.metrics.exact import evaluate_maps
from diffusionad_pipe.metrics.streaming import StreamingAnomalyMetrics, lowest_scores, score_bins

finite = st.floats(-(2.0**127), 2.0**127, width=32)
# Few values that lie apart by less, by about and by more than the width of a bin, of both signs.
near_ties = st.sampled_from(
    [
        sign * scale * (1 + step / 1024)
        for sign in (-1, 1)
        for scale in (1e-40, 0.5, 3.0)
        for step in (0, 1, 7, 8, 9, 40)
    ]
    + [0.0, -0.0]
)
shape = (2, 6, 6)
maps_and_masks = st.tuples(
    st.one_of(arrays.arrays(np.float32, shape, elements=finite), arrays.arrays(np.float64, shape, elements=near_ties)),
    arrays.arrays(np.bool_, shape),
).filter(lambda case: case[1].any() and not case[1].all())


def within_bounds(maps: np.ndarray, masks: np.ndarray, fpr_limits: tuple[float, ...]) -> dict[str, float]:
    """The errors that were reported, after a check against the exact metrics."""
    exact = evaluate_maps(maps, masks, fpr_limits=fpr_limits)
    streamed = evaluate_maps(maps, masks, fpr_limits=fpr_limits, method="streaming")
    assert list(streamed) == list(exact) + [f"{name}_error" for name in exact]
    for name, value in exact.items():
        assert abs(streamed[name] - value) <= streamed[f"{name}_error"] + 1e-9, name
        assert streamed[f"{name}_error"] >= -1e-12
    return {name: streamed[f"{name}_error"] for name in exact}


@settings(max_examples=100, deadline=None)
@given(case=maps_and_masks, limit=st.sampled_from([0.02, 0.05, 0.3, 1.0]))
def test_the_exact_metrics_are_within_the_bounds(case: tuple[np.ndarray, np.ndarray], limit: float) -> None:
    within_bounds(*case, fpr_limits=(limit,))


def test_the_worst_and_the_best_order_in_one_bin() -> None:
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, :5] = True
    inside = 1 + np.arange(400).reshape(1, 20, 20) / 100_000  # all in one bin, the defective pixels lowest
    for maps in (inside, -inside, inside * masks + (1 - masks)):
        errors = within_bounds(maps, masks, (0.3, 0.05))
        # All is possible: with all pixels tied the AUROC is ½ give or take ½, and each metric has a bound that says so.
        assert errors["pixel_auroc"] == pytest.approx(0.5)
        assert errors["pixel_ap"] == pytest.approx(0.75) and errors["pixel_f1_max"] == pytest.approx(0.6)
        assert errors["au_pro_0.30"] == pytest.approx(0.85) and errors["au_pro_0.05"] == pytest.approx(0.975)


def test_the_bounds_are_small_at_every_scale() -> None:
    random = np.random.RandomState(0)
    masks = np.zeros((5, 64, 64), dtype=bool)
    masks[:3, 20:40, 10:30] = True
    maps = random.rand(5, 64, 64) + 0.5 * masks
    for scaled in (maps, 1e-30 * maps, -1 / maps, maps**40):
        assert max(within_bounds(scaled, masks, (0.3, 0.05)).values()) < 0.03
    tied = (maps * 8).round() / 8  # each value has a bin of its own
    errors = within_bounds(tied, masks, (0.3, 0.05))
    streamed, exact = evaluate_maps(tied, masks, method="streaming"), evaluate_maps(tied, masks)
    assert {name: streamed[name] for name in exact} == pytest.approx(exact, abs=1e-9) and errors["pixel_auroc"] > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(finite, near_ties, st.just(1e300), st.just(-1e300)), min_size=1, max_size=50))
def test_bins_keep_the_order(scores: list[float]) -> None:
    bins = score_bins(torch.tensor(sorted(scores), dtype=torch.float64))
    assert (bins.diff() >= 0).all() and bins.min() >= 0 and bins.max() < 2**16
    assert (score_bins(np.array(sorted(scores))) == bins.numpy()).all()
    lowest = torch.tensor(lowest_scores(bins.numpy()))
    assert (score_bins(lowest) == bins).all() and (lowest <= torch.tensor(sorted(scores)).float()).all()
    assert score_bins(torch.tensor([-0.0])) == score_bins(torch.tensor([0.0]))


def random_images(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.RandomState(3)
    masks = random.rand(count, 24, 20) < 0.1
    masks[::3] = False
    maps = (random.rand(count, 24, 20) + 0.4 * masks).astype(np.float32)
    return maps, masks, maps.max(axis=(1, 2))


def test_merging_is_one_pass() -> None:
    maps, masks, scores = random_images(30)
    expected = evaluate_maps(maps, masks, scores, method="streaming")
    one_by_one, first, second, empty = (StreamingAnomalyMetrics() for _ in range(4))
    for anomaly_map, mask, score in zip(maps, masks, scores):
        one_by_one.update(anomaly_map, mask, score)
    assert one_by_one.compute() == expected
    first.update(maps[19:], torch.tensor(masks[19:]), scores[19:])
    second.update(torch.tensor(maps[:19]), list(masks[:19]), scores[:19], [int(mask.any()) for mask in masks[:19]])
    first.merge(second)
    first.merge(empty)
    assert first.compute() == expected and first.images == 30
    empty.merge(first)
    assert empty.compute() == expected


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=3))
def test_neither_order_nor_shares_change_a_bit(order: list[int], cuts: list[int]) -> None:
    """As with any number of processes: each counts a share, and the shares are merged."""
    maps, masks, scores = random_images(12)
    expected = evaluate_maps(maps, masks, scores, method="streaming")
    merged = StreamingAnomalyMetrics()
    bounds = [0, *sorted(cuts), 12]
    for first, last in reversed(list(zip(bounds, bounds[1:]))):
        share, chosen = StreamingAnomalyMetrics(), order[first:last]
        if chosen:
            share.update(maps[chosen], masks[chosen], scores[chosen])
        merged.merge(share)
    assert merged.compute() == expected


def test_the_threshold_of_the_best_f1_is_the_lowest_score_of_its_bin() -> None:
    maps, masks, _ = random_images(6)
    streaming = StreamingAnomalyMetrics()
    streaming.update(maps, masks)
    called = maps >= streaming.operating_points().f1_max_threshold()
    f1 = 2 * (called & masks).sum() / (called.sum() + masks.sum())
    assert streaming.compute()["pixel_f1_max"] == pytest.approx(f1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_images_without_mask_or_score() -> None:
    maps, masks, scores = random_images(9)
    streaming = StreamingAnomalyMetrics(fpr_limits=[0.1])
    streaming.update(maps, masks)
    pixels = streaming.compute()
    assert "image_auroc" not in pixels and "au_pro_0.10" in pixels
    streaming.update(maps[:4], None, scores[:4], [0, 1, 0, 1])
    streaming.update(maps[0], None, 0.5, 1)
    metrics = streaming.compute()
    assert {name: metrics[name] for name in pixels} == pixels
    exact = evaluate_maps(maps[:5], None, [*scores[:4], 0.5], [0, 1, 0, 1, 1], fpr_limits=[])
    assert metrics["image_auroc"] == exact["image_auroc"] and metrics["image_ap"] == exact["image_ap"]


def test_bad_images_are_named_and_not_counted() -> None:
    maps, masks, scores = random_images(5)
    streaming = StreamingAnomalyMetrics()
    streaming.update(maps, masks, scores)
    expected = streaming.compute()
    broken = maps.copy()
    broken[[1, 3], 2, 2] = np.nan, -np.inf
    with pytest.raises(ValueError, match="map or score 6, 8 is not finite"):
        streaming.update(broken, masks, scores)
    with pytest.raises(ValueError, match="picture 5 has no mask"):
        streaming.update(maps[0], None, 0.5)
    assert streaming.compute() == expected and streaming.images == 5


def test_without_images_everything_is_nan() -> None:
    with pytest.warns(UndefinedMetricWarning, match="0 are defective and 0 good"):
        metrics = StreamingAnomalyMetrics().compute()
    assert len(metrics) == 10 and all(math.isnan(value) for value in metrics.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_tensors_are_binned_on_their_device() -> None:
    maps, masks, scores = random_images(9)
    tensors = [torch.tensor(a).cuda() for a in (maps, masks, scores)]
    for method in ("exact", "streaming", "reference"):
        assert evaluate_maps(*tensors, method=method) == evaluate_maps(maps, masks, scores, method=method)
