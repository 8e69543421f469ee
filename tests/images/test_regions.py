"""Defect regions: what counts as one, and its area, peak and box."""

import numpy as np
import pytest
import torch

from diffusionad_pipe.images.regions import DefectRegion, find_defect_regions


def test_area_peak_and_box():
    anomaly_map = np.zeros((20, 30), np.float32)
    anomaly_map[2:5, 10:14] = 0.6
    anomaly_map[3, 12] = 0.75
    anomaly_map[18:, 29] = 0.9
    small = DefectRegion(2, np.float32(0.9), (29, 18, 30, 20))
    assert find_defect_regions(anomaly_map, 0.5) == [DefectRegion(12, 0.75, (10, 2, 14, 5)), small]
    assert find_defect_regions(torch.from_numpy(anomaly_map), 0.8) == [small]
    assert find_defect_regions(anomaly_map, 0.9) == []  # not above


def test_corners_touch_and_equal_areas_are_in_reading_order():
    anomaly_map = np.zeros((8, 8))
    anomaly_map[[0, 1, 2], [0, 1, 2]] = 1  # a diagonal
    anomaly_map[[5, 5, 7, 7], [6, 7, 0, 1]] = 1
    regions = find_defect_regions(anomaly_map, 0.5)
    assert [(region.area, region.box) for region in regions] == [
        (3, (0, 0, 3, 3)),
        (2, (6, 5, 8, 6)),
        (2, (0, 7, 2, 8)),
    ]


def test_regions_are_those_of_the_mask():
    anomaly_map = torch.rand(64, 48, generator=torch.Generator().manual_seed(0))
    regions = find_defect_regions(anomaly_map, 0.8)
    assert sum(region.area for region in regions) == int((anomaly_map > 0.8).sum())
    assert max(region.peak for region in regions) == pytest.approx(anomaly_map.max().item())


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\): give one map"):
        find_defect_regions(np.zeros((1, 8, 8)), 0.5)
