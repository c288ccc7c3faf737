"""Frechet distance, precision and recall against other libraries and against closed forms."""

import math

import pytest
import torch

from mfd_fast.metrics import frechet_distance, frechet_from_moments, manifold, precision_recall


def gaussian(count, width, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (rows @ mix + torch.randn(width, generator=generator, dtype=torch.float64)).to(dtype)


def random_covariance(width, seed):
    return gaussian(2 * width, width, seed=seed, dtype=torch.float64).T.cov()


# Frechet distance ---------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(300, 8), (500, 64), (40, 1)])
def test_frechet_agrees_with_scipy(count, width):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(count, width, seed=1), gaussian(count + 7, width, seed=2)
    cov_a, cov_b = (torch.atleast_2d(x.double().T.cov()) for x in (a, b))
    root = torch.from_numpy(linalg.sqrtm((cov_a @ cov_b).numpy())).real
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = means + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item())


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    features = torch.nn.Flatten()
    features.num_features = 12
    metric = fid.FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    a, b = gaussian(200, 12, seed=1), gaussian(150, 12, seed=2)
    metric.update(a.view(-1, 3, 2, 2), real=True)
    metric.update(b.view(-1, 3, 2, 2), real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item())


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 2.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 2.0, 0.0])
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    found = frechet_from_moments(mean_a, std_a.square().diag(), mean_b, std_b.square().diag())
    assert found == pytest.approx(expected.item())


def test_frechet_of_a_scaled_gaussian_is_the_closed_form():
    covariance, mean = random_covariance(10, seed=3), torch.zeros(10)
    found = frechet_from_moments(mean, covariance, mean, 9 * covariance)
    assert found == pytest.approx(4 * covariance.trace().item())  # (3 - 1)^2 tr C


def test_frechet_of_samples_tends_to_that_of_their_moments():
    shift = torch.tensor([1.0, 0.0, 0.0, 0.0])
    a, b = torch.randn(200_000, 4), 2 * torch.randn(200_000, 4) + shift
    assert frechet_distance(a, b) == pytest.approx(1.0 + 4.0, rel=0.02)


def test_frechet_of_equal_sets_is_zero_and_it_is_symmetric():
    a, b = gaussian(100, 16, seed=1), gaussian(90, 16, seed=2)
    assert frechet_distance(a, a.clone()) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_frechet_with_fewer_samples_than_features():
    a = gaussian(10, 40, seed=1)  # covariance of rank 9
    assert frechet_distance(a, a.clone()) == pytest.approx(0.0, abs=1e-8)
    assert frechet_distance(a, a + 2.0) == pytest.approx(40 * 4.0)


def test_frechet_of_points_without_spread_is_the_distance_of_means():
    assert frechet_distance(torch.zeros(5, 3), torch.ones(5, 3)) == pytest.approx(3.0)


# Precision and recall -----------------------------------------------------------------------


def test_equal_sets_have_full_precision_and_recall():
    a = gaussian(200, 64)
    assert precision_recall(a, a.clone()) == (1.0, 1.0)


def test_repeated_samples_count_as_inside():
    a = gaussian(5, 3).repeat(4, 1)  # every ball has radius zero
    assert precision_recall(a, a.clone()) == (1.0, 1.0)


def test_disjoint_sets_have_none():
    a = gaussian(100, 8)
    assert precision_recall(a, a + 1000.0) == (0.0, 0.0)


def test_collapsed_fakes_have_precision_without_recall():
    real = gaussian(400, 2)
    fake = real[:1] + 1e-6 * torch.randn(100, 2)
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0 and recall <= 1 / 400


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0]])  # radii with k = 1: 1, 1, 2
    fake = torch.tensor([[2.0], [5.5], [10.0]])  # radii 3.5, 3.5, 4.5
    assert precision_recall(real, fake, k=1) == pytest.approx((1 / 3, 1.0))
    assert precision_recall(fake, real, k=1) == pytest.approx((1.0, 1 / 3))


def test_chunks_do_not_change_the_result(monkeypatch):
    real, fake = gaussian(150, 5, seed=1), gaussian(130, 5, seed=2)
    whole = precision_recall(real, fake)
    monkeypatch.setattr(manifold, "MAX_DISTANCES", 700)
    assert precision_recall(real, fake) == whole


def test_agrees_with_exact_distances():
    real, fake = (gaussian(300, 6, seed=s, dtype=torch.float64) for s in (1, 2))

    def share_inside(points, centres):
        # Differences, not products: slow and exact.
        def distance(a, b):
            return (a[:, None] - b[None]).square().sum(-1)

        radius = distance(centres, centres).sort(1).values[:, 3]
        return (distance(points, centres) <= radius).any(1).double().mean().item()

    assert precision_recall(real, fake) == (share_inside(fake, real), share_inside(real, fake))


# Bad inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall])
def test_bad_features_are_named(metric):
    good = torch.randn(20, 4)
    with pytest.raises(ValueError, match=r"shape \[N, D\]; got torch.float32 of shape \[20\]"):
        metric(good[:, 0], good)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \[20, 4\]"):
        metric(good, good.long())
    with pytest.raises(ValueError, match="got 1; draw more"):
        metric(good, good[:1])
    with pytest.raises(ValueError, match="same number of features, got 4 and 3"):
        metric(good, good[:, :3])
    broken = good.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="got 1 values that are infinite or NaN"):
        metric(good, broken)


def test_bad_k_is_named():
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 2), k=0)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))
