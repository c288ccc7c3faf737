"""Others' measurements beside predictions: the fit, the networks, what the committed file says."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.predict import published
from bench.predict.networks import NETWORKS
from bench.results import RESULTS
from mfd_fast.cost import Trace

BILLIONS = {"sd3.5-medium": 2.243, "auraflow": 6.859, "lumina2": 2.610, "flux.1-dev": 11.901}
ANOMALOUS = {("chroma", "layer")}  # another attention than the row beside it: docs/cost.md says so


def point(numbers, operators, products, attention, memory):
    """A step that follows the model exactly."""
    one = published.Sums.__new__(published.Sums)
    one.work = SimpleNamespace(num_ops=operators)
    rows = (("product", products, 0.0), ("attention", attention, 0.0), ("memory", 0.0, memory))
    one.rows = [(*row, 1) for row in rows]
    one.case = SimpleNamespace(seconds=one.seconds(numbers))
    return one


def test_the_fit_finds_the_numbers_that_made_the_steps():
    numbers = (30e-6, 0.5, 0.2, 0.9)
    steps = [(9000, 0.01, 0.0, 0.0), (10, 0.4, 0.01, 0.1), (10, 0.1, 0.3, 0.1), (10, 0.1, 0.0, 0.9)]
    found = published.fitted([point(numbers, *step) for step in steps])
    assert found == pytest.approx(numbers, rel=0.05)


def test_families_are_fitted_and_tested_in_turn_of_their_names():
    names = [family.network for family in published.FAMILIES]
    assert names == sorted(names)
    halves = [case.half for case in published.cases(published.FAMILIES, published.alternating)]
    assert set(halves) == {"fit", "test"} and len(halves) >= 30


@pytest.mark.parametrize("name", BILLIONS)
def test_the_networks_have_as_many_parameters_as_the_published(name):
    parameters = sum(p.numel() for p in NETWORKS[name].make().parameters())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], abs=6e-4)


def test_attention_is_one_operator_however_it_is_called():
    q = torch.empty(2, 8, 16, 4, device="meta")
    shared = torch.empty(2, 2, 16, 4, device="meta")
    with Trace() as trace:
        whole = F.scaled_dot_product_attention(query=q, key=q, value=q)
        F.scaled_dot_product_attention(q, shared, shared, enable_gqa=True)
    work = trace.work[""].by_family()["attention"]
    assert whole.shape == q.shape and work.num_ops == 2
    assert work.flops == 2 * 4 * q.numel() * 16  # as many operations with shared heads


def test_held_out_predictions_are_as_near_as_the_page_says():
    result = json.loads((RESULTS / "published.json").read_text())
    rows = result["rows"]
    tested = [row for row in rows if row["half"] == "test"]
    far = {(r["network"], r["mode"]) for r in tested if published.factor(r["ratio"]) > 1.6}
    assert len(tested) >= 10 and far == ANOMALOUS
    assert result["config"]["test_median"] <= 1.3
    assert len(result["config"]["sides"]["right"]) >= 5 and not result["config"]["sides"]["wrong"]
    near = [r for r in rows if r["half"] == "memory" and abs(r["ratio"] - 1) <= 0.1]
    assert len(near) >= 3
