"""AdapterBank: what numbers it gives: PEFT's, for every role, packed or not."""

import copy

import pytest
import torch
from small_networks import ALPHA, RANK, TARGETS, ImageNetwork, image_inputs, make_bank
from torch import nn

from mfd_fast.testing.counting import Count
from mfd_fast.testing.numerics import assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore:Already found a .peft_config")  # two adapters

ROLES = {"teacher": (), "aux": ("aux",), "student": ("student",), "both": ("student", "aux")}


def with_peft(network, bank):
    """A copy of the plain network with the bank's adapters injected by PEFT."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )
    for name in bank.names:
        network = peft.inject_adapter_in_model(config, network, adapter_name=name)
        state = bank.adapter_state_dict(name, prefix="")
        result = peft.set_peft_model_state_dict(network, state, adapter_name=name)
        assert not result.unexpected_keys
    return network.eval()


def set_peft_role(network, names):
    for module in network.modules():
        if hasattr(module, "set_adapter") and hasattr(module, "lora_A"):
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(list(names))


def peft_gradients(network, bank, names, x, t, cond):
    """Velocity, gradient of x, and of each adapter flat in the bank's order, through PEFT."""
    set_peft_role(network, names)
    x = x.detach().requires_grad_()
    v = network(x, t, cond)
    v.square().mean().backward()
    parameters = dict(network.named_parameters())
    grads = {
        name: torch.cat(
            [
                parameters[f"{target.name}.{factor}.{name}.weight"].grad.flatten()
                for target in bank.targets
                for factor in ("lora_A", "lora_B")
            ]
        )
        for name in names
    }
    return v.detach(), x.grad, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("role", ROLES)
def test_forward_and_gradients_equal_peft(role, dtype):
    plain = ImageNetwork().to(dtype)
    network, bank = make_bank(copy.deepcopy(plain))
    x, t, cond = image_inputs(3)
    x, cond = x.to(dtype), {"text": cond["text"].to(dtype)}
    names = ROLES[role]

    x_ours = x.clone().requires_grad_()
    with bank.lanes((names,)):
        v = network(x_ours, t, cond)
        with torch.no_grad():
            v_in_place = network(x, t, cond)
    v.square().mean().backward()

    eager = peft_gradients(with_peft(copy.deepcopy(plain), bank), bank, names, x, t, cond)
    wide = {"text": cond["text"].double()}
    exact_network = with_peft(copy.deepcopy(plain).double(), bank)
    exact = peft_gradients(exact_network, bank, names, x.double(), t, wide)
    assert_as_accurate(v.detach(), eager[0], exact[0])
    assert_as_accurate(v_in_place, eager[0], exact[0])
    assert_as_accurate(x_ours.grad, eager[1], exact[1])
    for name in bank.names:
        (master,) = bank.parameters_of(name)
        if name in names:
            assert_as_accurate(master.grad, eager[2][name].float(), exact[2][name])
        else:
            assert master.grad is None
    assert all(parameter.grad is None for parameter in network.parameters())


PACKED = [
    (("base",), ("base",), ("base", "aux")),
    ((), (), ("aux",)),
    ((), ("aux",)),
    (("student",), (), ("aux", "student"), ("student",)),
]


@pytest.mark.parametrize("is_grad", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("per_lane", PACKED)
def test_packed_lanes_equal_one_lane_at_a_time(per_lane, n, is_grad):
    network, bank = make_bank(names=("aux", "student", "base"))
    wide_network, wide_bank = make_bank(copy.deepcopy(plain_of(network)).double(), names=bank.names)
    lanes = len(per_lane)
    x, t, cond = image_inputs(n * lanes)

    def separate(network, bank, x, cond):
        outs = []
        for lane, names in enumerate(per_lane):
            text = cond["text"].unflatten(0, (n, lanes))[:, lane]
            with bank.lanes((names,)):
                rows = x.unflatten(0, (n, lanes))[:, lane]
                outs.append(network(rows, t.unflatten(0, (n, lanes))[:, lane], {"text": text}))
        return torch.stack(outs, dim=1).flatten(0, 1)

    def run(call, bank):
        with torch.set_grad_enabled(is_grad):
            v = call()
        if not is_grad:
            return v, None
        v.square().mean().backward()
        grad = torch.cat([p.grad for name in bank.names for p in bank.parameters_of(name)
                          if p.grad is not None])  # fmt: skip
        for name in bank.names:
            bank.parameters_of(name)[0].grad = None
        return v.detach(), grad

    def packed():
        with bank.lanes(per_lane, rows=len(x)):
            return network(x, t, cond)

    ours = run(packed, bank)
    eager = run(lambda: separate(network, bank, x, cond), bank)
    wide_cond = {"text": cond["text"].double()}
    exact = run(lambda: separate(wide_network, wide_bank, x.double(), wide_cond), wide_bank)
    for actual, theirs, truth in zip(ours, eager, exact, strict=True):
        if truth is not None:
            assert_as_accurate(actual, theirs, truth)


def plain_of(network):
    """A fresh network with the same weights and no hooks."""
    plain = ImageNetwork()
    plain.load_state_dict(network.state_dict())
    return plain


class Windowed(nn.Module):
    """Its target sees two windows in place of each row; x ``[rows, 2, ...]``."""

    def __init__(self, layer):
        super().__init__()
        self.to_q = layer

    def forward(self, x):
        return self.to_q(x.flatten(0, 1)).unflatten(0, x.shape[:2])


WINDOWS = {
    "vector": lambda: torch.randn(6, 2, 8),
    "tokens": lambda: torch.randn(6, 2, 4, 8),
    "image": lambda: torch.randn(6, 2, 8, 3, 3),
    "channels_last": lambda: torch.randn(6, 2, 3, 3, 8).permute(0, 1, 4, 2, 3),
    "transposed": lambda: torch.randn(6, 2, 8, 4).transpose(2, 3),
}


@pytest.mark.parametrize("is_grad", [False, True])
@pytest.mark.parametrize("kind", WINDOWS)
def test_targets_that_see_several_rows_in_place_of_one(kind, is_grad):
    x = WINDOWS[kind]()
    layer = nn.Conv2d(8, 6, 1) if x.ndim == 5 else nn.Linear(8, 6)

    def one_lane_at_a_time(dtype):
        network, bank = make_bank(Windowed(copy.deepcopy(layer).to(dtype)), targets=("to_q",))
        outs = []
        for lane, names in enumerate([("student",), (), ("aux",)]):
            with bank.lanes((names,)), torch.no_grad():
                outs.append(network(x[lane::3].to(dtype)))
        return torch.stack(outs, dim=1).flatten(0, 1)

    network, bank = make_bank(Windowed(copy.deepcopy(layer)), targets=("to_q",))
    with bank.lanes((("student",), (), ("aux",)), rows=6), torch.set_grad_enabled(is_grad):
        v = network(x).detach()
    assert_as_accurate(v, one_lane_at_a_time(torch.float32), one_lane_at_a_time(torch.float64))


def test_packed_lanes_cost_two_products_per_target_and_no_copy():
    network, bank = make_bank()
    x, t, cond = image_inputs(6)
    with torch.no_grad(), Count() as plain:
        network(x, t, cond)
    with torch.no_grad(), Count() as one, bank.lanes((("aux",),)):
        network(x, t, cond)
    with torch.no_grad(), Count() as packed, bank.lanes(((), (), ("aux",))):
        network(x, t, cond)
    assert one.total == packed.total == plain.total + 2 * len(bank.targets)


def test_backward_is_one_concatenation_per_adapter():
    """No operator per matrix, also where keys and values were not used."""
    network, bank = make_bank()
    x, _, cond = image_inputs(2)
    keys_values = [block.keys_values(cond["text"]) for block in network.blocks]
    with bank.lanes((("aux",),)):
        v = network.blocks[0](x, *keys_values[0])
    with Count() as count:
        v.sum().backward()
    assert count.ops["cat"] == 1 and count.ops.get("split_with_sizes_backward", 0) == 0
    assert count.ops.get("new_zeros", 0) <= 1


def test_autocast_gives_what_peft_gives():
    plain = ImageNetwork()
    network, bank = make_bank(copy.deepcopy(plain))
    theirs = with_peft(copy.deepcopy(plain), bank)
    set_peft_role(theirs, ("aux",))
    exact_network = with_peft(copy.deepcopy(plain).double(), bank)
    set_peft_role(exact_network, ("aux",))
    x, t, cond = image_inputs(2)
    with torch.no_grad():
        exact = exact_network(x.double(), t, {"text": cond["text"].double()})
    for per_lane in [(("aux",),), (("aux",), ())]:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            eager = theirs(x, t, cond)
            with bank.lanes(per_lane):
                ours = network(x, t, cond)
        rows = slice(None, None, len(per_lane))
        assert_as_accurate(ours[rows], eager[rows], exact[rows])


def test_rows_that_do_not_divide_into_lanes_are_refused():
    network, bank = make_bank()
    x, t, cond = image_inputs(4)
    with bank.lanes(((), (), ("aux",))), pytest.raises(
        ValueError, match=r"blocks.0.to_k got 4 rows; with 3 lanes it must get n \* 3"
    ):  # fmt: skip
        network(x, t, cond)
