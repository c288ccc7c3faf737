"""The fast decoder computes what the reference decoder does, with less work."""

import pytest
import torch
from occfm_fill import VECTORS, assert_pinned, assert_samples, fill, noise

from mfd_fast.distill.graphs import check_capture_safe
from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.decoder import class_scores
from mfd_fast.models.occfm.vae.fast_decoder import HEAD_ROWS, FastDecoder
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d
from mfd_fast.testing.counting import Count
from mfd_fast.testing.numerics import assert_as_accurate

FRAMES = 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiny_vae():
    return fill(OccupancyVae(VAE_CONFIGS["tiny"])).eval().requires_grad_(False)


def latents_of(vae, dtype=torch.float32):
    return noise((FRAMES, *vae.config.latent_shape), 3).to(dtype)


def scores_and_gradient(decode, latents):
    latents = latents.clone().requires_grad_()
    scores = decode(latents)
    cotangent = noise(scores.shape, 4).to(scores.dtype)
    return scores.detach(), torch.autograd.grad(scores, latents, cotangent)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradient_are_as_accurate(dtype):
    vae = tiny_vae()
    fast = FastDecoder(vae).to(dtype)
    latents = latents_of(vae, dtype)
    actual = scores_and_gradient(fast, latents)
    eager = scores_and_gradient(tiny_vae().to(dtype).decode, latents)
    exact = scores_and_gradient(tiny_vae().double().decode, latents.double())
    for ours, theirs, true in zip(actual, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, true)


def test_classes_are_the_reference_decoders_exactly():
    vae = tiny_vae().double()
    latents = latents_of(vae, torch.float64)
    ids = FastDecoder(vae).decode_classes(latents)
    assert ids.numel() > HEAD_ROWS["cpu"] and ids.numel() % HEAD_ROWS["cpu"]  # several pieces
    assert torch.equal(ids, vae.decode_classes(latents))
    assert len(ids.unique()) == vae.config.classes


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_are_the_best_within_the_error_of_the_scores(dtype):
    """Two scores off by e each may change places if they differ by less than 2 e."""
    vae = tiny_vae()
    fast = FastDecoder(vae).to(dtype)
    latents = latents_of(vae, dtype)
    exact = tiny_vae().double().decode(latents.double())
    error = (fast(latents).double() - exact).abs().max()
    chosen = exact.gather(-1, fast.decode_classes(latents)[..., None]).squeeze(-1)
    assert (exact.amax(-1) - chosen <= 2 * error).all()


def test_pinned_decoder():
    """The published sizes, one frame."""
    vae = fill(OccupancyVae(VAE_CONFIGS["occfm_vae"]))
    fast, expected = FastDecoder(vae), VECTORS["occfm_vae"]["hash"]
    with torch.no_grad():
        decoded = fast.decoded_map(noise((1, 16, 50, 50), 1010))
        assert_pinned(decoded, expected["decoded_map"], "decoded_map")
        assert_samples(decoded[0], expected["decoded_map"]["strided_first_frame"], "decoded_map")
        assert_pinned(class_scores(decoded, fast.class_table), expected["logits"], "logits")


def test_depths_other_than_the_published_ones():
    torch.manual_seed(0)
    vae = OccupancyVae(VaeConfig(**{**vars(VAE_CONFIGS["tiny"]), "decoder_depths": (3, 1)}))
    fill(vae.double()).requires_grad_(False)
    latents = latents_of(vae, torch.float64)
    assert torch.equal(FastDecoder(vae).decode_classes(latents), vae.decode_classes(latents))


def test_constants_are_not_computed_again():
    vae = tiny_vae()
    fast, latents = FastDecoder(vae), latents_of(vae)
    with Count() as ours:
        fast.decode_classes(latents)
    with Count() as theirs, torch.no_grad():
        vae.decode_classes(latents)
    constants = {"sigmoid", "clamp", "exp", "relu", "roll", "index", "upsample_nearest2d"}
    assert constants <= theirs.ops.keys()
    assert not constants & ours.ops.keys()
    blocks = sum(vae.config.decoder_depths)
    assert ours.ops["index_select"] == blocks + 2  # a move before every block, two to the raster
    assert ours.total < theirs.total


def test_decoding_is_capture_safe():
    vae = tiny_vae()
    fast = FastDecoder(vae)
    inputs = [noise((2, *vae.config.latent_shape), stream) for stream in (5, 6)]
    check_capture_safe(lambda i: fast.decode_classes(inputs[i]))


def test_the_vae_is_left_alone():
    vae = tiny_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    fast = FastDecoder(vae).half()
    fast.decode_classes(latents_of(vae, torch.float16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert not [p for p in fast.parameters() if p.requires_grad]


def test_no_frames():
    vae = tiny_vae()
    empty = torch.empty(0, *vae.config.latent_shape)
    assert FastDecoder(vae).decode_classes(empty).shape == (0, *vae.config.grid_shape)


def test_wrong_inputs_are_named():
    fast = FastDecoder(tiny_vae())
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, 10, 10\]; got \[1, 4, 8, 8\]"):
        fast.decode_classes(torch.zeros(1, 4, 8, 8))
    clips = VaeConfig(**{**vars(VAE_CONFIGS["tiny"]), "clip": 3})
    with pytest.raises(ValueError, match="got the 3-D VAE"):
        FastDecoder(OccupancyVae3d(clips))
