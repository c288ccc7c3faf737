"""OccFM's transition network computes the published one: pinned vectors, names, counts, tables."""

import pytest
import torch
from occfm_fill import NOISE_FLOOR, VECTORS, assert_pinned, fill, noise, trainable, uniform
from occfm_networks import TINY, inputs, make_network

from bench.updates import occfm_reference as reference
from mfd_fast.models.occfm import CONFIGS, OccfmConfig, OccfmNetwork, null_condition

# (parameters with the two frozen tables, without them); the published counts.
COUNTS = {
    "occfm": (11_830_416, 11_508_880),
    "occfm_fut": (11_854_992, 11_533_456),
    "occfm_4c": (11_792_004, 11_470_468),
    "occfm_8c": (11_804_808, 11_483_272),
    "occfm_64c": (11_984_064, 11_662_528),
}
TABLES = ("pos_embed", "temp_embed")


@torch.no_grad()
def test_every_part_of_the_published_network_has_its_pinned_result():
    """Both samples, all 29 probes; and the fast path's future frames."""
    network, expected = fill(OccfmNetwork(CONFIGS["occfm"])), VECTORS["occfm"]["hash"]
    sequence = noise((2, 12, 16, 50, 50), 1000)
    tau = torch.tensor([125.0, 730.0])
    trajectory = torch.from_numpy(4 * uniform(48, 1001)).float().reshape(2, 12, 2)
    seen = set()
    for name, result in reference.stages(network, sequence, tau, trajectory):
        assert_pinned(result, expected["probes"][name], name)
        seen.add(name)
    assert seen == set(expected["probes"])
    velocity = result.transpose(1, 2)
    assert_pinned(velocity, expected["velocity"], "velocity")

    cond = {"history": sequence[:, :6] / 10, "trajectory": trajectory}
    fast = network(sequence[:, 6:], 1 - tau / 1000, cond)
    assert (fast + velocity[:, 6:]).abs().max() <= NOISE_FLOOR


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        network = OccfmNetwork(CONFIGS[name])
    trained = sum(p.numel() for p in network.parameters())
    tables = sum(network.get_buffer(table).numel() for table in TABLES)
    assert (trained + tables, trained) == COUNTS[name]
    assert len(network.state_dict()) == 204


def test_names_are_those_of_a_checkpoint():
    """The pinned positions of the sorted list of trained parameters, and the tables."""
    with torch.device("meta"):
        network = OccfmNetwork(CONFIGS["occfm"])
    names = [name for name, _ in trainable(network)]
    assert len(names) == 202
    assert {i: names[i] for i in (0, 18, 89, 119)} == {
        0: "downs.0.0.block1.norm.gamma",
        18: "downs.0.2.adaLN_modulation.1.bias",
        89: "init_conv.weight",
        119: "time_rel_pos_bias.relative_attention_bias.weight",
    }
    assert set(network.state_dict()) - set(names) == set(TABLES)
    shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    assert shapes["ups.0.0.block1.proj.weight"] == [128, 512, 1, 3, 3]
    assert shapes["init_temporal_attn.fn.fn.fn.to_qkv.weight"] == [768, 64]
    assert shapes["mid_spatial_attn.fn.norm.gamma"] == [1, 256, 1, 1, 1]
    assert shapes["traj_encoder.0.weight"] == [128, 192]


def test_tables_have_the_published_values():
    network = OccfmNetwork(CONFIGS["occfm"])
    channels = [0, 1, 32, 64, 65, 96]
    positions = {
        50: [-0.26237485, -0.20298104, 0.96496600, 0, 0, 1],
        51: [0, 0, 1, 0.84147096, 0.68156135, 0.54030228],
        2499: [0, 0, 1, -0.95375264, -0.81590664, 0.30059254],
    }
    for token, values in positions.items():
        torch.testing.assert_close(
            network.pos_embed[0, token, channels], torch.tensor(values), rtol=0, atol=1e-8
        )
    frame = network.temp_embed[0, 11, [0, 1, 64, 65]]
    values = torch.tensor([-0.99999022, -0.10065883, 0.0044256980, -0.99492103])
    torch.testing.assert_close(frame, values, rtol=0, atol=1e-8)


def test_a_state_dict_survives_the_journey():
    network, other = make_network(), OccfmNetwork(TINY)
    other.load_state_dict(network.state_dict(), strict=True)
    args = inputs(1)
    assert torch.equal(network(*args), other(*args))


def test_tables_are_never_trained():
    """Also where everything is asked to be, as in a full copy of a teacher."""
    network = make_network().requires_grad_(True)
    trained = dict(network.named_parameters())
    assert not set(TABLES) & set(trained)


def _without(cond, key):
    return {name: value for name, value in cond.items() if name != key}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x, t, c: net(x[:, :5], t, c), r"x must be \[R, 6, 4, 10, 10\]; got"),
        (lambda net, x, t, c: net(x, t[:1], c), r"t must be \[2\], one time a row; got \[1\]"),
        (lambda net, x, t, c: net(x, t, _without(c, "history")), r"cond must have \['history'"),
        (
            lambda net, x, t, c: net(x, t, c | {"trajectory": c["trajectory"][:, :6]}),
            r"cond\['trajectory'\] must be \[R, 12, 2\]; got \[2, 6, 2\]",
        ),
        (lambda *_: OccfmConfig(grid=25), "grid, frames and heads must be even; got 25"),
        (lambda *_: OccfmConfig(frames=14), "frames must be at most 12"),
        (lambda *_: OccfmConfig(base_width=60), "must be multiples of"),
        (lambda *_: OccfmConfig(condition_width=33), "condition_width even; got 64 and 33"),
        (lambda *_: OccfmConfig(history_last=7), "history_last must be 0 to 6"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_network(), *inputs(2))


def test_the_null_condition_has_no_history_and_the_same_trajectory():
    _, _, cond = inputs(2)
    null = null_condition(cond)
    assert not null["history"].any()
    assert null["trajectory"] is cond["trajectory"]
