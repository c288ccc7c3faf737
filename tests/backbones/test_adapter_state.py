"""AdapterBank: how adapters start, are stored, merged, refreshed and copied; what is refused."""

import copy

import pytest
import torch
from small_networks import (
    ALPHA,
    RANK,
    TARGETS,
    ImageNetwork,
    draw_adapter,
    image_inputs,
    make_bank,
)
from torch import nn

from mfd_fast import AdapterBank
from mfd_fast.testing.numerics import assert_as_accurate


def test_a_new_adapter_is_gaussian_and_changes_nothing():
    network, t = ImageNetwork(), torch.rand(2)
    x, _, cond = image_inputs(2)
    before = network(x, t, cond)
    generator = torch.Generator().manual_seed(3)
    bank = AdapterBank(network, rank=64, targets=TARGETS, generator=generator)
    with bank.lanes((("student",),)):
        assert torch.equal(network(x, t, cond), before)
    a = torch.cat([a.flatten() for a, _ in bank.factors("aux").values()])
    assert abs(a.std().item() * 64 - 1) < 0.1 and all(
        not b.any() for _, b in bank.factors("aux").values()
    )
    assert not torch.equal(bank.parameters_of("aux")[0], bank.parameters_of("student")[0])
    again = AdapterBank(
        ImageNetwork(), rank=64, targets=TARGETS, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(again.parameters_of("aux")[0], bank.parameters_of("aux")[0])


def test_sana_adapter_has_the_published_size():
    with torch.device("meta"):
        network = nn.ModuleDict(
            {f"attn{i}_{name}": nn.Linear(2240, 2240) for i in range(40) for name in TARGETS}
        )
    bank = AdapterBank(network, targets=r"attn\d+_to_[qkv]")
    assert bank.parameters_of("student")[0].numel() == 34_406_400


def test_state_dict_goes_to_peft_and_back():
    peft = pytest.importorskip("peft")
    plain = ImageNetwork()
    _, bank = make_bank(copy.deepcopy(plain))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(plain, config)
    state = bank.adapter_state_dict("student")
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    back = peft.get_peft_model_state_dict(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    bank.load_adapter_state_dict("aux", back)
    assert torch.equal(bank.parameters_of("aux")[0], bank.parameters_of("student")[0])
    assert state["base_model.model.blocks.0.mix.to_v.lora_A.weight"].shape == (RANK, 8, 1, 1)


def test_a_frozen_adapter_takes_part_and_is_never_trained():
    network, bank = make_bank(ImageNetwork().bfloat16())
    state = bank.adapter_state_dict("student", prefix="transformer.")
    bank.add_frozen("mine", state, alpha=ALPHA, rank=RANK, prefix="transformer.")
    x, t, cond = image_inputs(2)
    x = x.bfloat16()
    with torch.no_grad():
        outs = []
        for name in ("student", "mine"):
            with bank.lanes(((name,),)):
                outs.append(network(x, t, cond))
    assert torch.equal(*outs)
    with bank.lanes((("mine", "aux"),)):
        network(x, t, cond).sum().backward()
    (frozen,) = bank.parameters_of("mine")
    assert frozen.grad is None and not frozen.requires_grad and frozen.dtype == torch.bfloat16
    assert bank.parameters_of("aux")[0].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_adapter_and_come_back_bit_for_bit(dtype):
    plain = ImageNetwork().to(dtype)
    network, bank = make_bank(copy.deepcopy(plain))
    x, t, cond = image_inputs(2)
    x = x.to(dtype)
    with torch.no_grad():
        with bank.lanes((("student",),)):
            eager = network(x, t, cond)
        bank.merge("student")
        merged = network(x, t, cond)
        wide_network, wide_bank = make_bank(copy.deepcopy(plain).double())
        with wide_bank.lanes((("student",),)):
            exact = wide_network(x.double(), t, cond)
    assert_as_accurate(merged, eager, exact)
    with pytest.raises(ValueError, match="'student' is merged into the network: leave it out"):
        bank.lanes((("student",),))
    with pytest.raises(ValueError, match="'student' is merged already; unmerge it first"):
        bank.merge("aux")
    with pytest.raises(ValueError, match="cannot unmerge 'aux': 'student' is merged"):
        bank.unmerge("aux")
    bank.unmerge("student")
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in network.state_dict().items())
    with bank.lanes((("student",),)), torch.no_grad():
        assert torch.equal(network(x, t, cond), eager)
    with pytest.raises(ValueError, match="cannot unmerge 'student': nothing is merged"):
        bank.unmerge("student")


def addresses(bank):
    pairs = [pair for name in bank.names for pair in bank.factors(name).values()]
    masters = [bank.parameters_of(name)[0] for name in bank.names]
    return [x.data_ptr() for x in (*masters, *(x for pair in pairs for x in pair))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_follows_the_master_and_keeps_addresses(dtype):
    network, bank = make_bank(ImageNetwork().to(dtype))
    before = addresses(bank)
    (master,) = bank.parameters_of("aux")
    assert master.dtype == torch.float32
    optimizer = torch.optim.AdamW([master], lr=0.1)
    x, t, cond = image_inputs(2)
    with bank.lanes((("aux",),)):
        network(x.to(dtype), t, cond).float().square().mean().backward()
    optimizer.step()
    bank.refresh("aux")
    assert addresses(bank) == before
    flat = torch.cat([x.flatten() for pair in bank.factors("aux").values() for x in pair])
    assert flat.dtype == dtype and torch.equal(flat, master.detach().to(dtype))


def test_module_state_dict_and_casts_keep_the_copies_in_step():
    _, one = make_bank(ImageNetwork().bfloat16())
    network, two = make_bank(ImageNetwork().bfloat16())
    state = {key: torch.randn_like(value) for key, value in one.state_dict().items()}
    assert sorted(state) == ["adapters.aux.master", "adapters.student.master"]
    two.load_state_dict(state)
    flat = torch.cat([x.flatten() for pair in two.factors("aux").values() for x in pair])
    assert torch.equal(flat, state["adapters.aux.master"].bfloat16())
    network.double()
    two.double()
    assert next(iter(two.factors("aux").values()))[0].dtype == torch.float64
    x, t, cond = image_inputs(2)
    with two.lanes((("aux",),)), torch.no_grad():
        network(x.double(), t, {"text": cond["text"].double()})


def test_a_copy_of_network_and_bank_is_a_bank_of_the_copy():
    network, bank = make_bank()
    twin_network, twin = copy.deepcopy((network, bank))
    draw_adapter(twin, "aux", seed=9)
    x, t, cond = image_inputs(2)
    with bank.lanes((("aux",),)), twin.lanes((("aux",),)), torch.no_grad():
        assert not torch.equal(network(x, t, cond), twin_network(x, t, cond))
    with twin.lanes((("aux",),)), torch.no_grad():
        base = network(x, t, cond)
    assert torch.equal(base, network(x, t, cond))


def bank_of(layer, **kwargs):
    network = nn.Module()
    network.to_q, network.other = layer, nn.Linear(2, 2)
    return AdapterBank(network, **{"targets": ("to_q",)} | kwargs)


def mixed_dtypes():
    network = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()])
    return AdapterBank(network, targets=r"\d")


def wrong_state(change):
    bank = make_bank()[1]
    state = bank.adapter_state_dict("aux")
    change(state)
    bank.load_adapter_state_dict("aux", state)


FIRST = "base_model.model.blocks.0.to_k.lora_A.weight"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: make_bank(targets=("nope",)), r"\('nope',\) match nothing; the network has \['ti"),
        (lambda: make_bank(targets="("), r"is a regular expression .* '\(' is not"),
        (lambda: make_bank(rank=0), "rank of adapter 'aux' must be >= 1, got 0"),
        (lambda: make_bank(names=("a", "a")), r"must be a new identifier; got 'a', and .* \['a'\]"),
        (lambda: make_bank(names=("a.b",)), "must be a new identifier; got 'a.b'"),
        (lambda: bank_of(nn.Conv2d(2, 2, 3)), "must be nn.Linear or a 1x1 nn.Conv2d .*; to_q is C"),
        (lambda: bank_of(nn.Conv2d(2, 2, 1, groups=2)), "groups 1, stride 1 and no padding; to_q"),
        (lambda: bank_of(nn.LayerNorm(2)), "to_q is LayerNorm.* Narrow the targets"),
        (mixed_dtypes, "one floating dtype and one device; got .*bfloat16 on cpu.*float32 on cpu"),
        (lambda: make_bank()[1].lanes((("judge",),)), r"no adapter 'judge'; there is \['aux', 'st"),
        (lambda: make_bank()[1].lanes(("aux",)), "tuple of different adapters; lane 0 is 'aux'"),
        (lambda: make_bank()[1].refresh("judge"), "there is no adapter 'judge'"),
        (
            lambda: wrong_state(lambda s: s.pop(FIRST)),
            r"missing: \['base_model.model.blocks",
        ),
        (
            lambda: wrong_state(lambda s: s.update(x=s[FIRST])),
            r"rank 4: unexpected: \['x'\]. C",
        ),
        (
            lambda: wrong_state(lambda s: s.update({FIRST: torch.zeros(2, 12)})),
            r"of another shape: \['.*lora_A.weight \[2, 12\] in place of \[4, 12\]'\]",
        ),
        (
            lambda: make_bank()[1].add_frozen("mine", {}, alpha=1.0, rank=2),
            "does not fit adapter 'mine' of rank 2: missing: .* and 8 more",
        ),
    ],
)
def test_errors_say_how_to_mend_them(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_refused_frozen_adapter_leaves_nothing_behind():
    bank = make_bank()[1]
    with pytest.raises(ValueError, match="'mine'"):
        bank.add_frozen("mine", {}, alpha=1.0, rank=2)
    assert bank.names == ("aux", "student")
