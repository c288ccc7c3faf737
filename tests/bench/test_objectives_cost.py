"""What every objective costs: the committed file against what is known without a trace."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench.predict import objectives_cost
from bench.results import RESULTS
from mfd_fast.baselines.objectives import COMPARED
from mfd_fast.cost.cycle import evaluations_of_lane

ROWS = json.loads((RESULTS / "objectives_cost.json").read_text())["rows"]
FOUND = {(row["network"], row["objective"], row["where"]): row for row in ROWS}
OURS, NETWORKS = objectives_cost.OURS, objectives_cost.NETWORKS


def test_every_objective_is_on_every_network():
    expected = {(n, name, "diffusers") for n in NETWORKS for name in (*OURS, *COMPARED)}
    assert set(FOUND) == expected | {(n, name, "here") for n in NETWORKS for name in OURS}


@pytest.mark.parametrize("name", NETWORKS)
def test_forwards_are_those_that_a_cycle_makes(name):
    """10 auxiliary updates on 4 steps of the student; E[N] evaluations of every lane, of which the
    auxiliary's alone has factors.  Bounds are those of numbers rounded to a tenth.
    """
    mfd, vsd = (FOUND[name, objective, "diffusers"]["phases"] for objective in ("mfd", "vsd"))
    assert mfd["aux/generate"] == vsd["aux/generate"] and mfd["aux/forward"] == vsd["aux/forward"]
    one = vsd["aux/forward"]["forwards"] / 10  # with factors
    assert one + 0.005 >= 1
    assert vsd["aux/generate"]["forwards"] == pytest.approx(40 * one, abs=0.05 + 4 * 0.05)
    model = objectives_cost.Model(name)
    lanes = (1 if model.distill.guidance == 1 else 2) + one
    assert vsd["student/integrate"]["forwards"] == pytest.approx(lanes, abs=0.05 + 0.005)
    evaluations = evaluations_of_lane(model.config("mfd"))
    bound = 0.05 + 0.005 * evaluations
    assert mfd["student/integrate"]["forwards"] == pytest.approx(evaluations * lanes, abs=bound)


def test_only_what_this_project_captures_has_captured_seconds():
    for row in ROWS:
        assert ("h100_captured_s" in row) == (row["objective"] in OURS)
        assert row["h100_eager_s"][0] <= row["h100_eager_s"][1]
        launches = sum(phase["launches"] for phase in row["phases"].values())
        assert launches == pytest.approx(row["launches"], abs=len(row["phases"]))
