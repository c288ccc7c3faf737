"""IoU and mIoU of forecasts against a count in numpy, voxel by voxel; distances; times."""

import time

import numpy as np
import pytest
import torch

from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.metrics import frechet_distance
from mfd_fast.models.occfm.data.classes import FREE
from mfd_fast.models.occfm.forecast_time import speeds, time_forecasts
from mfd_fast.models.occfm.scores import (
    SECOND_FRAMES,
    OccupancyCounts,
    frechet_scores,
)

FRAMES = 6


def grids(seed, batch=2, shape=(5, 7, 3), labels=range(18)):
    rng = np.random.default_rng(seed)
    return rng.choice(list(labels), (batch, FRAMES, *shape)).astype(np.uint8)


def scores_of(pairs):
    counts = OccupancyCounts(frames=FRAMES, free=FREE)
    for forecast, truth in pairs:
        counts.add(torch.from_numpy(forecast), torch.from_numpy(truth))
    return counts.scores()


def brute_force(pairs):
    """(IoU, mIoU, class IoU) in percent, counted one voxel after the other."""
    iou, class_iou = np.zeros(FRAMES), np.zeros((FRAMES, FREE))
    for frame in range(FRAMES):
        count = np.zeros((FREE + 1, 3), dtype=np.int64)  # the last row: anything but free
        for forecast, truth in pairs:
            ours, theirs = forecast[:, frame].ravel().tolist(), truth[:, frame].ravel().tolist()
            for p, t in zip(ours, theirs, strict=True):
                if t != FREE:
                    count[t, 0] += 1
                    count[FREE, 0] += 1
                if p != FREE:
                    count[p, 2] += 1
                    count[FREE, 2] += 1
                if p == t != FREE:
                    count[t, 1] += 1
                if p != FREE and t != FREE:
                    count[FREE, 1] += 1
        ious = [
            1.0 if seen == 0 else correct / (seen + positive - correct)
            for seen, correct, positive in count.tolist()
        ]
        class_iou[frame], iou[frame] = ious[:FREE], ious[FREE]
    return 100 * iou, 100 * class_iou.mean(1), 100 * class_iou.mean(0)


@pytest.mark.parametrize(
    "labels",
    [range(18), (4, 7, 11, 17), (17,), (3, 3, 3, 17)],
    ids=["all", "few", "empty", "one class"],
)
def test_scores_equal_a_count_of_every_voxel(labels):
    pairs = [(grids(seed, labels=labels), grids(seed + 100, labels=labels)) for seed in range(3)]
    # Half of the forecast is right, so that every count differs from the others.
    for forecast, truth in pairs:
        right = np.random.default_rng(7).random(truth.shape) < 0.5
        forecast[right] = truth[right]
    found = scores_of(pairs)
    # An IoU is one correctly rounded quotient; sums of 17 may be added in another order.
    iou, miou, class_iou = brute_force(pairs)
    assert np.array_equal(found.iou, iou)
    np.testing.assert_array_max_ulp(np.array(found.miou), miou, maxulp=17)
    np.testing.assert_array_max_ulp(np.array(found.class_iou), class_iou, maxulp=17)


def test_a_class_that_truth_never_shows_counts_as_perfect():
    truth = np.full((1, FRAMES, 4, 4, 2), FREE, np.uint8)
    truth[..., 0] = 11
    wrong = truth.copy()
    wrong[0, 0, 0, 0, 1] = 4  # a car that is not there
    found = scores_of([(wrong, truth)])
    assert found.miou == (100.0,) * 6 and found.class_iou == (100.0,) * 17
    assert found.iou == pytest.approx((100 * 16 / 17, *[100.0] * 5))
    assert found.unseen == tuple(label for label in range(17) if label != 11)
    # in one frame only: that frame counts, the others are perfect
    truth[0, 2, 0, 0, 1] = 4
    found = scores_of([(wrong, truth)])
    assert found.class_iou[4] == pytest.approx(100 * 5 / 6)
    assert found.miou[2] == pytest.approx(100 * 16 / 17) and found.miou[0] == 100.0


def test_counts_of_a_set_are_pooled_not_averaged():
    pairs = [(grids(1), grids(2)), (grids(3, batch=1), grids(4, batch=1))]
    together = tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))
    assert scores_of(pairs) == scores_of([together])


def test_counters_stay_exact_where_float32_would_not():
    counts = OccupancyCounts(frames=FRAMES, free=FREE)
    counts.counts += 2**24
    others = torch.zeros(1, FRAMES, 1, 1, 1, dtype=torch.uint8)
    counts.add(others, others + 5)
    assert counts.counts[0, :, 0].tolist() == [2**24, 2**24, 2**24 + 1]
    assert counts.counts[0, :, 5].tolist() == [2**24 + 1, 2**24, 2**24]
    assert counts.counts[0, :, FREE].tolist() == [2**24 + 1] * 3


def test_adding_never_reads_the_device():
    counts = OccupancyCounts(frames=FRAMES, free=FREE)
    pairs = [tuple(torch.from_numpy(grids(s)) for s in (i, i + 10)) for i in (0, 1)]
    assert check_capture_safe(lambda i: counts.add(*pairs[i])) > 17


def test_rows_name_their_averages():
    row = scores_of([(grids(1), grids(2))]).row()
    scores = scores_of([(grids(1), grids(2))])
    assert SECOND_FRAMES == {1: 1, 2: 3, 3: 5}
    assert [row[f"iou_{s}s"] for s in (1, 2, 3)] == [scores.iou[i] for i in (1, 3, 5)]
    assert row["miou_mean_of_seconds"] == pytest.approx(
        np.mean([scores.miou[i] for i in (1, 3, 5)])
    )
    assert row["miou_mean_of_frames"] == pytest.approx(np.mean(scores.miou))


def test_wrong_grids_are_named():
    counts = OccupancyCounts(frames=FRAMES, free=FREE)
    good = torch.from_numpy(grids(0))
    with pytest.raises(ValueError, match=r"one shape \[B, 6, X, Y, Z\], got \[2, 6, 5, 7, 3\] and"):
        counts.add(good, good[:1])
    with pytest.raises(ValueError, match="of one shape"):
        counts.add(good[:, :5], good[:, :5])
    with pytest.raises(ValueError, match=r"uint8, got torch.int64 and torch.uint8"):
        counts.add(good.long(), good)


# Distances of clips -------------------------------------------------------------------------


def test_video_distance_sees_the_order_of_frames_and_frame_distance_does_not():
    truth = torch.randn(40, 6, 25) + torch.arange(6.0)[:, None]
    rows, turned = truth.flatten(1), truth.flip(1).flatten(1)
    scores = frechet_scores(rows, turned, frames=6)
    assert scores["fid"] == pytest.approx(0.0, abs=1e-8)
    assert scores["fvd"] > 25 * (5**2 + 3**2 + 1) * 2 * 0.9
    shifted = frechet_scores(rows, rows + 2, frames=6)
    assert shifted["fid"] == pytest.approx(25 * 4.0)
    assert shifted["fvd"] == frechet_distance(rows, rows + 2)


# Times --------------------------------------------------------------------------------------


def test_both_definitions_of_frames_per_second():
    measured = speeds([0.1, 0.3], frames=6)
    assert measured["latency"] == pytest.approx(0.2)
    assert measured["forecasts_per_second"] == pytest.approx(5.0)
    assert measured["frames_per_second"] == pytest.approx(30.0)


def test_every_forecast_is_timed_alone(device):
    seen = []

    def forecast(i):
        seen.append(i)
        time.sleep(0.02)
        return torch.zeros(3, device=device) + 1

    seconds = time_forecasts(forecast, num=3, device=device, warmup=2)
    assert seen == [0, 0, 0, 1, 2] and len(seconds) == 3
    assert min(seconds) >= 0.02
    with pytest.raises(ValueError, match="num must be >= 1, got 0"):
        time_forecasts(forecast, num=0, device=device)
