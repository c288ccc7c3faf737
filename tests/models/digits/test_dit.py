"""The small DiT: shapes, null class, gradients, guidance, and its file."""

import pytest
import torch

from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.files.weights import save_weights
from mfd_fast.flow.integrate import generate, guided
from mfd_fast.models.digits.dit import DiT, DiTConfig, load_dit, save_dit

SMALL = DiTConfig(image_size=6, channels=2, patch_size=3, width=16, depth=2, heads=2, num_classes=3)


def make_model(config=SMALL):
    """A network that is not the zero field it starts as."""
    model = DiT(config)
    for layer in (model.modulation, model.patch_out):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model


def make_inputs(batch=4, config=SMALL):
    x = torch.randn(batch, config.channels, config.image_size, config.image_size)
    return x, torch.rand(batch), torch.randint(config.num_classes, (batch,))


@pytest.mark.parametrize("config", [SMALL, DiTConfig()])
@pytest.mark.parametrize("batch", [1, 5])
def test_velocity_has_the_shape_of_x(config, batch):
    x, t, label = make_inputs(batch, config)
    assert make_model(config)(x, t, label).shape == x.shape


def test_default_size():
    assert 0.25e6 < sum(p.numel() for p in DiT(DiTConfig()).parameters()) < 0.35e6


def test_starts_as_the_zero_field():
    x, t, label = make_inputs()
    assert DiT(SMALL)(x, t, label).eq(0).all()


def test_patches_and_images_are_inverse():
    model, (x, _, _) = DiT(SMALL), make_inputs()
    patches = model._patchify(x)
    assert patches.shape == (4, 4, 18)
    assert torch.equal(patches[:, 1], x[:, :, :3, 3:].flatten(1))  # top right
    assert torch.equal(model._unpatchify(patches), x)


def test_null_label_is_label_num_classes():
    x, t, _ = make_inputs(config=DiTConfig())
    model = make_model(DiTConfig())
    null = torch.full((4,), 10)
    torch.testing.assert_close(model(x, t), model(x, t, null))
    assert not torch.allclose(model(x, t), model(x, t, torch.full((4,), 9)))


def test_samples_do_not_see_each_other():
    model, (x, t, label) = make_model().double(), make_inputs()
    x = x.double()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t, label), alone)


def test_every_input_and_parameter_gets_a_gradient():
    model, (x, t, label) = make_model(), make_inputs()
    x.requires_grad_()
    model(x, t, label).square().mean().backward()
    assert x.grad.abs().sum() > 0
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradient_matches_finite_differences():
    model, (x, t, label) = make_model().double(), make_inputs(2)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, t, label), (x,), fast_mode=True)


def test_forward_and_backward_never_wait_for_the_device():
    model = make_model()

    batches = [make_inputs() for _ in range(2)]

    def forward_backward(i):
        x, t, label = batches[i % 2]
        loss = (model(x, t, label) + model(x, t)).square().mean()
        torch.autograd.grad(loss, list(model.parameters()))

    assert check_capture_safe(forward_backward) > 0


def test_runs_in_bfloat16():
    model, (x, t, label) = make_model().bfloat16(), make_inputs()
    assert model(x.bfloat16(), t, label).dtype == torch.bfloat16


def test_guidance_mixes_the_null_class():
    model, (x, t, label) = make_model(), make_inputs()

    def conditional(x, t):
        return model(x, t, label)

    with torch.no_grad():
        v_cond, v_null = conditional(x, t), model(x, t)
        torch.testing.assert_close(guided(conditional, model, 3.0)(x, t), 3 * v_cond - 2 * v_null)
        one_step = generate(guided(conditional, model, 3.0), x, steps=1)
        v_cond, v_null = conditional(x, torch.ones(4)), model(x, torch.ones(4))
    torch.testing.assert_close(one_step, x - (3 * v_cond - 2 * v_null))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 1, 6, 6)}, r"x must be images of shape \[B, 2, 6, 6\]; got \[4, 1,"),
        ({"t": torch.zeros(3)}, r"t must have one value per image, shape \[4\]; got \[3\]"),
        ({"label": torch.zeros(4, 1)}, r"label must have one value .* got \[4, 1\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    x, t, label = make_inputs()
    with pytest.raises(ValueError, match=message):
        make_model()(**({"x": x, "t": t, "label": label} | change))


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"patch_size": 3}, {"heads": 3}, {"width": 6}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"DiTConfig\.\w+ must be .* got \d"):
        DiTConfig(**wrong)


# The file -----------------------------------------------------------------------------------


def test_file_round_trip_is_bit_exact(tmp_path):
    model, path = make_model(), tmp_path / "new folder" / "model.safetensors"
    save_dit(model, path, {"note": "kept"})
    loaded = load_dit(path)
    assert loaded.config == SMALL and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_same_weights_give_the_same_bytes(tmp_path):
    model = make_model()
    for name in "ab":
        save_dit(model, tmp_path / name, {"x": 1, "y": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a dit weights file at .*none\.st, found"
    ):
        load_dit(tmp_path / "none.st")


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_dit(make_model(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"expected a complete dit .* copy or train it again"):
        load_dit(path)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other"
    save_weights(torch.nn.Linear(2, 2), path, kind="classifier", config={}, metadata={})
    with pytest.raises(ValueError, match=r"expected dit weights .* got a file with 'classifier'"):
        load_dit(path)
    save_weights(torch.nn.Linear(2, 2), path, kind="dit", config={}, metadata={})
    with pytest.raises(ValueError, match=r"expected bias of shape none .* got \(2,\)"):
        load_dit(path)
    save_weights(torch.nn.Linear(2, 2), path, kind="dit", config={"size": 3}, metadata={})
    with pytest.raises(ValueError, match=r"expected the config of a DiT .* got \{'size': 3\}"):
        load_dit(path)
