"""Full copies in bfloat16 or float16: float32 masters are trained, averaged and continued."""

import copy
from functools import partial

import pytest
import torch
from own_networks import COND, DIM, Plain, assert_same, conds, make
from recorded_graph import RecordedGraph

from mfd_fast import AUX, CopiedBackbone, DistillConfig, Distiller, OptimConfig
from mfd_fast.distill.captured import CapturedDistiller


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_in_16_bits_are_trained_in_float32(dtype):
    """Literally: 16-bit gradients of two parts added in float32, AdamW there, rounded back."""
    torch.manual_seed(1)
    network = Plain().to(dtype)
    distiller = make(copy.deepcopy(network))
    backbone = distiller.backbone
    masters = [p.detach().float().requires_grad_() for p in network.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=1e-4, fused=True)
    x, t, cond = torch.randn(2, 4, 1, DIM).to(dtype), torch.rand(2, 4), torch.randn(2, 4, COND)
    for _ in range(3):
        for part in range(2):
            v = backbone.forward(x[part], t[part], backbone.prepare(cond[part]), (AUX,))
            v.float().square().mean().backward()
            network(x[part, :, 0], t[part], cond[part]).float().square().mean().backward()
            for master, parameter in zip(masters, network.parameters(), strict=True):
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                parameter.grad = None
        mine = backbone.parameters_of("aux")
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, masters, strict=True))
        distiller.optimizers["aux"].step()
        distiller.optimizers["aux"].zero_grad()
        backbone.refresh("aux")
        optimizer.step()
        optimizer.zero_grad()
        for master, parameter in zip(masters, network.parameters(), strict=True):
            parameter.data.copy_(master)
        assert all(torch.equal(a, b) for a, b in zip(mine, masters, strict=True))
        assert_same(backbone.aux.state_dict(), network.state_dict())


def test_small_updates_of_16_bit_copies_move_weights_and_average():
    optim = OptimConfig(lr=1e-4)
    torch.manual_seed(1)
    config = {"ema_decay": 0.999, "micro_batches": 2}
    backbone = CopiedBackbone(Plain().bfloat16(), sample_shape=(DIM,), null_cond=torch.zeros_like)
    start = [p.detach().clone() for p in backbone.parameters_of("student")]
    distiller = Distiller(
        backbone,
        DistillConfig(aux_updates=1, student_optim=optim, aux_optim=optim, **config),
    )
    for cond in conds(20):
        distiller.step(cond)
    trained = backbone.parameters_of("student")
    for old, new, averaged in zip(start, trained, distiller.ema, strict=True):
        assert new.dtype == averaged.dtype == torch.float32
        assert (new != old).all() and (averaged != old).all()
    with distiller.averaged_student():
        for parameter, averaged in zip(backbone.student.parameters(), distiller.ema, strict=True):
            assert torch.equal(parameter, averaged.bfloat16())
    for parameter, master in zip(backbone.student.parameters(), trained, strict=True):
        assert torch.equal(parameter, master.detach().bfloat16())


@pytest.mark.parametrize("cls", [Distiller, partial(CapturedDistiller, graph=RecordedGraph)])
def test_16_bit_copies_continue_bit_for_bit(cls):
    torch.manual_seed(1)
    network = Plain().bfloat16()
    one, two = (make(copy.deepcopy(network), cls, ema_decay=0.5) for _ in range(2))
    updates = conds(16)
    for cond in updates[:8]:
        one.step(cond)
    two.load_state_dict(one.state_dict())
    for cond in updates[8:]:
        assert_same(one.step(cond), two.step(cond))
    noise, cond = torch.randn(4, DIM), torch.randn(4, COND)
    assert torch.equal(one.generate(noise, cond), two.generate(noise, cond))


def test_weights_loaded_into_a_16_bit_student_are_kept():
    distiller = make(Plain().bfloat16())
    loaded = {key: value + 1 for key, value in distiller.backbone.student.state_dict().items()}
    distiller.backbone.student.load_state_dict(loaded)
    distiller.backbone.refresh("student")
    assert_same(loaded, distiller.backbone.student.state_dict())


def test_replayed_updates_of_16_bit_copies_equal_eager_ones():
    torch.manual_seed(1)
    network = Plain().bfloat16()
    eager = make(copy.deepcopy(network))
    captured = make(network, partial(CapturedDistiller, graph=RecordedGraph))
    for cond in conds(16):
        assert_same(eager.step(cond), captured.step(cond))


def test_the_student_on_its_own_holds_no_masters():
    """What is loaded into the copy does not reach the run, and the run trains on."""
    torch.manual_seed(2)
    distiller = make(Plain().to(torch.bfloat16))
    for cond in conds(4):
        distiller.step(cond)
    before = [p.detach().clone() for p in distiller.parameters_of("student")]
    student = distiller.student_network()
    trained = distiller.backbone.student.state_dict()
    assert_same(dict(student.state_dict()), dict(trained))
    student.load_state_dict({name: torch.zeros_like(x) for name, x in trained.items()})
    assert not any(parameter.any() for parameter in student.parameters())
    after = distiller.parameters_of("student")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
