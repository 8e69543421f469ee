"""Held-out pictures, and the guarantees of the thresholds that rest on them."""

import math

import numpy as np
import pytest

from diffusionad_pipe.evaluation.calibration import (
    calibrate_image_threshold,
    calibrate_pixel_threshold,
    smallest_rate,
    split_held_out,
)
from diffusionad_pipe.evaluation.pixel_levels import PixelLevels


def test_held_out_images_are_spread_evenly() -> None:
    for count, fraction, expected in ((28, 0.15, 4), (2, 0.15, 1), (3, 0.9, 2), (1000, 0.1, 100)):
        held_out = split_held_out(count, fraction)
        assert held_out.sum() == expected and held_out.shape == (count,)
    gaps = split_held_out(100, 0.1).nonzero()[:, 0].diff()
    assert gaps.max() - gaps.min() <= 1
    with pytest.raises(ValueError, match="1 readable picture"):
        split_held_out(1, 0.15)


def test_the_image_threshold_keeps_its_guarantee() -> None:
    """Over many calibrations, a new good picture is called defective as often as promised, and hardly less."""
    generator = np.random.default_rng(0)
    for count, rate in ((99, 0.01), (150, 0.05)):
        alarms = []
        for _ in range(4000):
            scores = generator.normal(size=count + 2)
            labels = np.zeros(count + 1, dtype=int)
            labels[-1] = 1  # one synthetic anomaly, which must not matter
            threshold = calibrate_image_threshold(scores[:-1], labels, rate)
            alarms.append(scores[-1] > threshold)
        error = 4 * math.sqrt(rate / len(alarms))
        assert rate - 1 / (count + 1) - error < np.mean(alarms) < rate + error


def test_few_images_take_the_largest_good_score_or_the_best_f1() -> None:
    assert smallest_rate(4) == pytest.approx(0.2)
    good, anomalous = np.array([0.1, 0.2, 0.15, 0.3]), np.array([0.7, 0.8, 0.9])
    scores, labels = np.append(good, anomalous), np.repeat([0, 1], (4, 3))
    assert calibrate_image_threshold(scores, labels, 0.01) == pytest.approx(0.5)  # the middle of the gap
    # Anomalies below the good pictures cannot pull the threshold under the largest good score.
    scores = np.append(good, [0.01, 0.02, 0.03])
    assert calibrate_image_threshold(scores, labels, 0.01) == pytest.approx(0.3)
    # With a rate that four pictures can guarantee, their own quantile is taken.
    assert calibrate_image_threshold(np.append(good, anomalous), labels, 0.4) == pytest.approx(0.2)


def test_the_pixel_threshold_controls_the_expected_share() -> None:
    generator = np.random.default_rng(1)
    count, rate = 120, 0.05
    shares = []
    for _ in range(300):
        # Pictures differ: each has its own level, so pixels of one picture are not independent.
        levels = generator.normal(size=(count + 1, 1, 1))
        maps = levels + generator.normal(size=(count + 1, 6, 6))
        labels = np.zeros(count, dtype=int)
        threshold = calibrate_pixel_threshold(maps[:-1], np.zeros((count, 6, 6), dtype=bool), labels, rate)
        shares.append((maps[-1] > threshold).mean())
    assert rate - 0.03 < np.mean(shares) < rate + 4 * np.std(shares) / math.sqrt(len(shares))


def test_few_images_use_the_pixels_quantile_or_the_best_f1() -> None:
    generator = np.random.default_rng(2)
    maps = generator.uniform(0, 0.4, size=(4, 20, 20))
    masks = np.zeros((4, 20, 20), dtype=bool)
    masks[2:, :5] = True
    maps[2:, :5] = 0.9
    labels = np.array([0, 0, 1, 1])
    assert calibrate_pixel_threshold(maps, masks, labels, 0.01) == pytest.approx(0.65, abs=0.01)
    maps[masks] = 0.0
    expected = np.quantile(maps[:2], 0.99)
    assert calibrate_pixel_threshold(maps, masks, labels, 0.01) == pytest.approx(expected)


def test_levels_give_the_threshold_that_all_pixels_together_would() -> None:
    generator = np.random.default_rng(3)
    maps = [generator.beta(0.5, 3, size=(40, 50)).astype(np.float32) for _ in range(30)]
    levels = PixelLevels()
    for anomaly_map in maps:
        levels.add(anomaly_map)
    ordered = np.sort(np.stack(maps), axis=None)
    for share in (0.02, 0.1, 0.5):
        exact = ordered[-round(share * ordered.size) - 1]
        assert exact <= levels.threshold(share) <= exact * (1 + 2**-15)
        assert np.mean([(one > levels.threshold(share)).mean() for one in maps]) <= share
    # A map of a hundred times the pixels counts as one of few does.
    levels.add(np.full((400, 500), 0.999, dtype=np.float32))
    assert levels.threshold(0.5) < 0.5 and levels.threshold(1 / 40) == pytest.approx(0.999, abs=1e-4)
    full = PixelLevels()
    full.add(np.array([[-0.0, 1.0]], dtype=np.float32))
    assert full.threshold(0) == 1.0 and full.threshold(0.5) < 1e-37
