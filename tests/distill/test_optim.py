"""Optimizers: which one is made, what a missing package says, clipping, warm-up."""

import sys
import types

import pytest
import torch

from mfd_fast import OptimConfig
from mfd_fast.distill.optim import clip_and_step, make_optimizer, set_warmup_lr


def weights():
    return [torch.nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("adamw8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("adamw8bit_torchao", "torchao.optim", "AdamW8bit"),
        ("fused_adam", "apex.optimizers", "FusedAdam"),
    ],
)
def test_other_packages_are_made_from_the_same_settings(kind, module, name, monkeypatch):
    """A stand-in of the package's name sees the learning rate, betas and weight decay."""
    calls = []
    package = types.ModuleType(module)
    setattr(package, name, lambda parameters, **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, package)
    make_optimizer(weights(), OptimConfig(kind=kind, lr=3e-4, weight_decay=0.5))
    expected = {"lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.5}
    assert expected.items() <= calls[0].items()


@pytest.mark.parametrize("kind", ["adamw8bit", "adamw8bit_torchao", "fused_adam"])
def test_a_missing_package_is_named(kind, monkeypatch):
    gone = ("bitsandbytes", "torchao", "apex")
    for module in [*gone, *(name for name in sys.modules if name.split(".")[0] in gone)]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"kind .* needs .* which does not import here"):
        make_optimizer(weights(), OptimConfig(kind=kind))


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer([], OptimConfig())


def test_clipping_scales_to_the_norm():
    parameter = weights()[0]
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full((4,), 3.0)
    norm, skipped = clip_and_step(optimizer, clip_norm=1.5)
    assert norm.item() == 6.0 and skipped.item() == 0.0
    moved = (torch.ones(4) - parameter.detach()).norm().item()
    assert moved == pytest.approx(1.5, rel=2e-6)  # torch's own clipping divides by norm + 1e-6 too
    assert torch.equal(parameter.grad, torch.zeros(4))


def test_an_optimizer_that_is_not_fused_sees_zeros_in_place_of_nan():
    parameter = weights()[0]
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([1.0, float("nan"), float("inf"), 1.0])
    _, skipped = clip_and_step(optimizer, clip_norm=1.0)
    assert skipped.item() == 1.0
    assert torch.equal(parameter.detach(), torch.ones(4))


def test_warm_up_is_linear_and_ends_at_the_rate():
    config = OptimConfig(lr=0.5, warmup_updates=4)
    optimizer = make_optimizer(weights(), config)
    rates = []
    for update in range(6):
        set_warmup_lr(optimizer, config, update)
        rates.append(optimizer.param_groups[0]["lr"].item())
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
