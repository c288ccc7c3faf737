"""OccFM's VAE against the pinned vectors: outputs, every probe, names, counts; its loss."""

import hashlib

import pytest
import torch
from occfm_fill import VECTORS, assert_pinned, assert_samples, fill, hash_integers, noise

from mfd_fast.models.occfm.vae.config import VAE_CONFIGS, VaeConfig
from mfd_fast.models.occfm.vae.decoder import class_scores
from mfd_fast.models.occfm.vae.loss import latent_penalty, lovasz_softmax, vae_loss
from mfd_fast.models.occfm.vae.vae import OccupancyVae
from mfd_fast.models.occfm.vae.vae3d import OccupancyVae3d

LATENTS, IDS = 1010, 1011  # streams of the pinned inputs


def pinned_vae(name, kind):
    return fill(OccupancyVae(VAE_CONFIGS[name]), kind).eval()


def pinned_latents(frames):
    return noise((frames, *VaeConfig().latent_shape), LATENTS)


def pinned_ids(frames):
    shape = (frames, *VaeConfig().grid_shape)
    ids = hash_integers(torch.Size(shape).numel(), IDS) * 18 >> 32
    return torch.from_numpy(ids.astype("int64")).reshape(shape)


def probe(module, names, run):
    """Outputs of the named submodules while ``run()`` runs, and its result."""
    found = {}
    hooks = [
        module.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: found.__setitem__(name, out)
        )
        for name in names
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    return found, result


def as_pinned(x, shape):
    """The published modules hand some images on as tokens, or channels last: the same values."""
    if list(x.shape) == shape:
        return x
    if x.ndim == 4 and x.shape[1] == shape[-1]:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(shape)


def check_probes(found, expected):
    assert found.keys() == expected.keys()
    for name, record in expected.items():
        assert_pinned(as_pinned(found[name], record["shape"]), record, name)


def check_decoder(vae, latents, expected):
    with torch.no_grad():
        found, decoded = probe(
            vae.decoder, expected["decoder_probes"], lambda: vae.decoder(latents)
        )
        scores = class_scores(decoded, vae.embedding.class_embeds.weight)
    check_probes(found, expected["decoder_probes"])
    assert_pinned(decoded, expected["decoded_map"], "decoded_map")
    assert_samples(decoded[0], expected["decoded_map"]["strided_first_frame"], "decoded_map")
    assert_pinned(scores, expected["logits"], "logits")
    return scores


def check_encoder(vae, ids, expected):
    with torch.no_grad():
        image = vae.embedding(ids)
        names = expected["encoder_probes"]
        found, moments = probe(vae.encoder, names, lambda: vae.encoder(image))
    assert_pinned(image, expected["bev_features"], "bev_features")
    check_probes(found, names)
    assert_pinned(moments, expected["compressed_features"], "compressed_features")


@pytest.mark.parametrize("kind", ["hash", "sine"])
def test_decoder_is_the_published_one(kind):
    expected = VECTORS["occfm_vae"][kind]
    scores = check_decoder(pinned_vae("occfm_vae", kind), pinned_latents(1), expected)
    if kind == "hash":  # the sine fill's scores are tied
        counts = scores.argmax(-1).flatten().bincount(minlength=18)
        flips = (counts - torch.tensor(expected["argmax_histogram"])).abs().sum() / 2
        margins = scores.topk(2).values.diff().neg()
        assert flips <= (margins < 2 * 5e-5).sum()


def test_encoder_is_the_published_one():
    check_encoder(pinned_vae("occfm_vae", "hash"), pinned_ids(1), VECTORS["occfm_vae"]["hash"])


class StopHereError(Exception):
    pass


def test_first_half_of_the_3d_decoder_is_the_published_one():
    """Up to the block over the frames, which is all that the frame-by-frame VAE does not have."""
    vae = fill(OccupancyVae3d(VAE_CONFIGS["occfm_3dvae"])).eval()
    probes = VECTORS["occfm_3dvae"]["hash"]["decoder_probes"]
    names = list(probes)[: list(probes).index("temporal_block.0") + 1]

    def stop(*_):
        raise StopHereError

    vae.decoder.upsample_blocks[0].register_forward_pre_hook(stop)

    def run():
        with torch.no_grad(), pytest.raises(StopHereError):
            vae.decoder(pinned_latents(6))

    found, _ = probe(vae.decoder, names, run)
    check_probes(found, {name: probes[name] for name in names})


# Of the sorted lines "name shape" of a published state dict.
NAMES_DIGEST = "8807afce79f609e477b1299e80a29d0a23311c233a5189ddd59d7e1240a2f8bc"


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = OccupancyVae(VAE_CONFIGS["occfm_vae"]).state_dict()
        clips = OccupancyVae3d(VAE_CONFIGS["occfm_3dvae"]).state_dict()
    lines = sorted(f"{name} {'x'.join(map(str, t.shape))}" for name, t in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_DIGEST
    assert all(name.endswith("index") == (not t.is_floating_point()) for name, t in state.items())
    added = clips.keys() - state.keys()
    assert len(state) == 403 and len(added) == 48 and clips.keys() - added == state.keys()
    for name, width in (("encoder", 256), ("decoder", 128)):
        block = f"{name}.temporal_block.0"
        assert clips[f"{block}.temporal_attn.qkv.weight"].shape == (3 * width, width)
        assert clips[f"{block}.temporal_conv_2.conv1.weight"].shape == (width, width, 3, 3, 3)


# A world model has its VAE and its transition network (whose counts are tested with it).
COUNTS = {
    "occfm_vae": 18_537_456,
    "occfm_vae_4c": 30_287_964 - 11_792_004,
    "occfm_vae_8c": 30_314_600 - 11_804_808,
    "occfm_vae_64c": 30_687_504 - 11_984_064,
    "occfm_3dvae": 57_083_376,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        vae = OccupancyVae(VAE_CONFIGS[name])
    assert sum(p.numel() for p in vae.parameters()) == COUNTS[name]


def tiny(seed=0):
    torch.manual_seed(seed)
    config = VAE_CONFIGS["tiny"]
    return OccupancyVae(config), torch.randint(config.classes, (2, *config.grid_shape))


def test_encode_draws_and_decode_scores():
    vae, ids = tiny()
    config = vae.config
    mean, deviation = vae.moments(ids)
    assert mean.shape == deviation.shape == (2, *config.latent_shape) and (deviation > 0).all()
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    latents = vae.encode(ids, generator=torch.Generator().manual_seed(5))
    assert torch.equal(latents, mean + deviation * eps)
    scores = vae.decode(latents)
    assert scores.shape == (*ids.shape, config.classes)
    assert torch.equal(vae.decode_classes(latents), scores.argmax(-1))
    scores.sum().backward()
    assert vae.embedding.class_embeds.weight.grad is not None  # through the encoder ...
    vae.zero_grad()
    vae.decode(latents.detach()).sum().backward()
    assert vae.embedding.class_embeds.weight.grad is None  # ... and not through the scores


def test_wrong_inputs_are_named():
    vae, ids = tiny()
    with pytest.raises(ValueError, match=r"ids must be \[B, 40, 40, 4\]; got \[2, 40, 40, 3\]"):
        vae.moments(ids[..., :3])
    with pytest.raises(ValueError, match=r"integers; got torch.float32"):
        vae.moments(ids.float())
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, 10, 10\]"):
        vae.decode(torch.zeros(1, 5, 10, 10))
    with pytest.raises(ValueError, match="multiple of 20; got 50"):
        VaeConfig(grid=50)
    with pytest.raises(ValueError, match="width must be a multiple of 4, of groups and of heads"):
        VaeConfig(width=100)
    with pytest.raises(ValueError, match="clip"):
        OccupancyVae3d(vae.config)


def tiny_clips():
    torch.manual_seed(1)
    return OccupancyVae3d(VaeConfig(**{**vars(VAE_CONFIGS["tiny"]), "clip": 3})).eval()


def test_features_are_pooled_draws_of_clips():
    vae = tiny_clips()
    ids = torch.randint(vae.config.classes, (2, 3, *vae.config.grid_shape))
    features = vae.features(ids, generator=torch.Generator().manual_seed(2))
    latents = vae.encode(ids.flatten(0, 1), generator=torch.Generator().manual_seed(2))
    cells = latents.detach().reshape(2, 3 * 4, 5, 2, 5, 2).mean(dim=(3, 5))
    torch.testing.assert_close(features, cells.flatten(1))
    assert features.shape == (2, 300)
    swapped = vae.features(ids.flip(0), generator=torch.Generator().manual_seed(2))
    assert not torch.equal(swapped, features)
    with pytest.raises(ValueError, match=r"ids must be \[N, 3, 40, 40, 4\]"):
        vae.features(ids[:, :2])


def test_frames_of_other_clips_do_not_matter():
    vae = tiny_clips()
    ids = torch.randint(vae.config.classes, (6, *vae.config.grid_shape))
    with torch.no_grad():
        both, first = vae.moments(ids)[0], vae.moments(ids[:3])[0]
    torch.testing.assert_close(both[:3], first)


def test_lovasz_of_certain_predictions_is_one_minus_iou():
    torch.manual_seed(3)
    ids, guesses = torch.randint(5, (2, 400))  # of 7 classes, two do not occur
    loss = lovasz_softmax(torch.eye(7, dtype=torch.float64)[guesses], ids)
    ious = []
    for class_id in range(5):
        seen, given = ids == class_id, guesses == class_id
        ious.append((seen & given).sum() / (seen | given).sum())
    torch.testing.assert_close(loss, 1 - torch.stack(ious).double().mean(), check_dtype=False)


def test_latent_penalty_is_least_at_zero():
    """Published as is: a deviation where a log-variance belongs."""
    mean, deviation = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    penalty = latent_penalty(mean, deviation)
    assert penalty == 0
    gradients = torch.autograd.grad(penalty, [mean, deviation])
    assert all(not gradient.any() for gradient in gradients)
    assert latent_penalty(mean + 1, deviation) == 0.5
    assert latent_penalty(mean, deviation + 1) > 0


def test_a_tiny_vae_learns():
    """Its cross entropy falls below what knowing a voxel's height and nothing else allows."""
    vae, _ = tiny()
    ids = torch.full((1, *vae.config.grid_shape), vae.config.empty)
    ids[..., 0] = 11
    ids[:, 20:, :, 1:3] = 15
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        loss = vae_loss(vae, ids, generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    shares = torch.nn.functional.one_hot(ids, vae.config.classes).double().mean((0, 1, 2))
    assert loss.cross_entropy < torch.special.entr(shares).sum(1).mean()
    assert loss.total == 10 * loss.cross_entropy + loss.lovasz + loss.latent
