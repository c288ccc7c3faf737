"""Scores of images against literal computations, on small random models in the public layouts."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import score_models as small

from mfd_fast.metrics import frechet_distance, precision_recall
from mfd_fast.metrics.image_features import FEATURES, DinoFeatures, distribution_scores
from mfd_fast.metrics.image_reward import MAX_LENGTH, MEAN, STD
from mfd_fast.metrics.image_scores import SCORES, load_scores, score_images
from mfd_fast.metrics.pretrained import in_batches
from mfd_fast.testing.numerics import assert_as_accurate

PROMPTS = ["a red cube", "two cats 9", "fog", "a very long prompt that is cut in the middle"]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (len(PROMPTS), 3, 20, 28), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def squares(images):
    return images[..., :20]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and files of every model, by name."""
    root = tmp_path_factory.mktemp("models")
    names = ("clip", "open_clip", "dino", "bert")
    found = {name: root / name for name in names}
    small.save_clip(found["clip"])
    small.save_clip_preparation(found["open_clip"])
    small.save_dino(found["dino"])
    vocabulary = small.save_bert_tokenizer(found["bert"])
    found |= {"hps.pt": root / "hps.pt", "head.pth": root / "head.pth", "ir.pt": root / "ir.pt"}
    torch.save({"epoch": 3, "state_dict": small.open_clip_tensors()}, found["hps.pt"])
    torch.save(small.head_tensors(24), found["head.pth"])
    torch.save(small.image_reward_tensors(vocabulary), found["ir.pt"])
    return found


@pytest.fixture(scope="module")
def sources(models):
    return {
        "aesthetic": f"{models['clip']}:{models['head.pth']}",
        "pick": str(models["clip"]),
        "hps": f"{models['open_clip']}:{models['hps.pt']}",
        "reward": f"{models['bert']}:{models['ir.pt']}",
        "clip": str(models["clip"]),
    }


def pixels(images, mean, std):
    """Pillow's bicubic to 16 pixels on the short edge, the middle square, normalised, float64."""
    from PIL import Image

    rows = []
    for image in images:
        height, width = image.shape[1:]
        short = min(height, width)
        size = (width * small.SIZE // short, height * small.SIZE // short)
        page = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.BICUBIC)
        left, top = ((edge - small.SIZE) // 2 for edge in size)
        page = page.crop((left, top, left + small.SIZE, top + small.SIZE))
        rows.append(torch.from_numpy(np.array(page)).permute(2, 0, 1))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    return (torch.stack(rows).double() / 255 - mean) / std


def clip_pixels(images):
    return pixels(images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def clip_tokens(prompt):
    """Start, letters with the last of a word marked, end; at most 12."""
    letters = small.LETTERS
    ids = [2 * len(letters)]
    for word in prompt.split():
        ids += [letters.index(c) for c in word[:-1]] + [len(letters) + letters.index(word[-1])]
    return [*ids[:11], 2 * len(letters) + 1]


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def norm(x, weights, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attend(q, k, v, heads, mask=None):
    """Softmax attention written out; q ``[B, L, D]``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def open_clip_tower(x, weights, prefix, heads, mask=None):
    for number in range(2):
        block = f"{prefix}.resblocks.{number}"
        into = (weights[f"{block}.attn.in_proj_{kind}"] for kind in ("weight", "bias"))
        q, k, v = F.linear(norm(x, weights, f"{block}.ln_1"), *into).chunk(3, -1)
        x = x + linear(attend(q, k, v, heads, mask), weights, f"{block}.attn.out_proj")
        hidden = linear(norm(x, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(hidden), weights, f"{block}.mlp.c_proj")
    return x


def literal_hps(images, prompts, dtype):
    """open_clip's forward from its own names, one prompt at a time, without padding."""
    weights = {name: t.to(dtype) for name, t in small.open_clip_tensors().items()}
    x = F.conv2d(clip_pixels(images).to(dtype), weights["visual.conv1.weight"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + weights["visual.positional_embedding"], weights, "visual.ln_pre")
    x = open_clip_tower(x, weights, "visual.transformer", heads=5)
    image = unit(norm(x[:, 0], weights, "visual.ln_post") @ weights["visual.proj"])
    texts = []
    for prompt in prompts:
        ids = torch.tensor(clip_tokens(prompt))
        x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][: len(ids)]
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        x = open_clip_tower(x[None], weights, "transformer", 4, causal)[0, -1]
        texts.append(unit(norm(x, weights, "ln_final") @ weights["text_projection"]))
    return (image * torch.stack(texts)).sum(1)


def literal_clip(network, images, prompts, dtype):
    """transformers' own forward, a pair at a time: cosines, and the factor it has learnt."""
    network = network.to(dtype)
    logits = [
        network(
            input_ids=torch.tensor([clip_tokens(prompt)]),
            pixel_values=clip_pixels(image[None]).to(dtype),
        ).logits_per_image[0, 0]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    factor = network.logit_scale.exp()
    return torch.stack(logits) / factor, factor


def bert_tokens(prompt):
    start, ids = len(small.BERT_SPECIAL), [small.BERT_SPECIAL.index("[CLS]")]
    for word in prompt.split():
        places = [small.LETTERS.index(letter) for letter in word]
        ids += [start + places[0], *(start + len(small.LETTERS) + place for place in places[1:])]
    return [*ids[: MAX_LENGTH - 1], small.BERT_SPECIAL.index("[SEP]")]


def literal_reward(weights, images, prompts, dtype):
    """BLIP's image encoder, its BERT with cross attention, and the head, from the authors' names;
    padding is left out, as the mask leaves it out.
    """
    weights = {name.removeprefix("blip."): tensor.to(dtype) for name, tensor in weights.items()}
    x = F.conv2d(clip_pixels(images).to(dtype), weights["visual_encoder.patch_embed.proj.weight"],
                 weights["visual_encoder.patch_embed.proj.bias"], stride=8)  # fmt: skip
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual_encoder.cls_token"].expand(len(x), 1, -1), x], 1)
    x = x + weights["visual_encoder.pos_embed"]
    for number in range(2):
        block = f"visual_encoder.blocks.{number}"
        qkv = linear(norm(x, weights, f"{block}.norm1", 1e-6), weights, f"{block}.attn.qkv")
        x = x + linear(attend(*qkv.chunk(3, -1), heads=2), weights, f"{block}.attn.proj")
        hidden = linear(norm(x, weights, f"{block}.norm2", 1e-6), weights, f"{block}.mlp.fc1")
        x = x + linear(F.gelu(hidden), weights, f"{block}.mlp.fc2")
    seen = norm(x, weights, "visual_encoder.norm", 1e-6)
    rewards = []
    for prompt, image in zip(prompts, seen, strict=True):
        first = literal_blip_text(weights, torch.tensor(bert_tokens(prompt)), image[None])[:, 0]
        for number in (0, 2, 4, 6, 7):
            first = linear(first, weights, f"mlp.layers.{number}")
        rewards.append((first[0, 0] - MEAN) / STD)
    return torch.stack(rewards)


def literal_blip_text(weights, ids, image):
    tables = (weights[f"text_encoder.embeddings.{n}_embeddings.weight"] for n in
              ("word", "position"))  # fmt: skip
    words, positions = tables
    x = (words[ids] + positions[: len(ids)])[None]
    x = norm(x, weights, "text_encoder.embeddings.LayerNorm", 1e-12)
    for number in range(2):
        layer = f"text_encoder.encoder.layer.{number}"
        for part, other in (("attention", None), ("crossattention", image)):
            name, other = f"{layer}.{part}", x if other is None else other
            q = linear(x, weights, f"{name}.self.query")
            k, v = (linear(other, weights, f"{name}.self.{role}") for role in ("key", "value"))
            x = x + linear(attend(q, k, v, heads=1), weights, f"{name}.output.dense")
            x = norm(x, weights, f"{name}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(x, weights, f"{layer}.intermediate.dense"))
        x = x + linear(hidden, weights, f"{layer}.output.dense")
        x = norm(x, weights, f"{layer}.output.LayerNorm", 1e-12)
    return x


def score(name, sources, images, prompts=PROMPTS):
    return load_scores({name: sources[name]}, device="cpu")[name](images, prompts)


@torch.no_grad()
def test_clip_score_and_pick_score_are_the_networks_own_logits(models, sources, images):
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(models["clip"])
    (eager, _), (exact, factor) = (literal_clip(network, images, PROMPTS, d) for d in DTYPES)
    assert_as_accurate(score("clip", sources, images), 100 * eager, 100 * exact)
    eager, exact = (cosine * (factor / 100).to(cosine.dtype) for cosine in (eager, exact))
    assert_as_accurate(score("pick", sources, images), eager, exact)


def test_hps_is_what_open_clip_computes_from_the_published_layout(sources, squares):
    eager, exact = (literal_hps(squares, PROMPTS, dtype) for dtype in DTYPES)
    assert_as_accurate(score("hps", sources, squares), eager, exact)


def test_image_reward_is_what_its_authors_compute(models, sources, images):
    weights = torch.load(models["ir.pt"], weights_only=True)
    eager, exact = (literal_reward(weights, images, PROMPTS, dtype) for dtype in DTYPES)
    assert_as_accurate(score("reward", sources, images), eager, exact)


@torch.no_grad()
def test_the_aesthetic_score_is_a_linear_function_of_the_unit_embedding(models, sources, images):
    from transformers import CLIPModel

    network, results = CLIPModel.from_pretrained(models["clip"]), []
    for dtype in DTYPES:
        rows = network.to(dtype).vision_model(clip_pixels(images).to(dtype)).pooler_output
        rows = unit(rows @ network.visual_projection.weight.T)
        for number in (0, 2, 4, 6, 7):
            weights = {k: v.to(dtype) for k, v in small.head_tensors(24).items()}
            rows = linear(rows, weights, f"layers.{number}")
        results.append(rows[:, 0])
    assert_as_accurate(score("aesthetic", sources, images), *results)


@torch.no_grad()
def test_dino_features_are_the_class_tokens(models, images):
    from transformers import Dinov2Model

    network = Dinov2Model.from_pretrained(models["dino"])
    rows = pixels(images, small.DINO_MEAN, small.DINO_STD)
    eager, exact = (network.to(dtype)(rows.to(dtype)).last_hidden_state[:, 0] for dtype in DTYPES)
    assert_as_accurate(DinoFeatures(str(models["dino"]))(images), eager, exact)


def test_distribution_scores_are_the_three_of_the_table(models):
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    features = FEATURES["dinov2"](str(models["dino"]))
    real, same, darker = features(data[:20]), features(data[20:]), features(data[20:] // 4)
    assert distribution_scores(real, real) == {"fid": 0.0, "precision": 1.0, "recall": 1.0}
    near, far = distribution_scores(real, same), distribution_scores(real, darker)
    assert near["fid"] == frechet_distance(real, same)
    assert (near["precision"], near["recall"]) == precision_recall(real, same)
    assert near["fid"] < far["fid"] and near["recall"] > far["recall"]


def test_inception_features_are_torchmetrics_own(tmp_path, images, monkeypatch):
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = tmp_path / "inception.pth"
    torch.save({}, file)
    with pytest.raises(ValueError, match="does not hold the weights of FID's Inception"):
        FEATURES["inception"](file)
    with monkeypatch.context() as patch:  # what it does without a download: no weights are loaded
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    assert torch.equal(FEATURES["inception"](file)(images[:2]), network(images[:2]))


def test_batches_are_put_together_in_order(monkeypatch):
    monkeypatch.setattr("mfd_fast.metrics.pretrained.MAX_BATCH", 3)
    sizes, rows = [], torch.arange(8)

    def compute(part, names):
        sizes.append((len(part), len(names)))
        return part + torch.tensor([int(name) for name in names])

    names = [str(number) for number in range(8)]
    together = in_batches(compute, torch.nn.Identity(), torch.device("cpu"), rows, names)
    assert torch.equal(together, 2 * rows) and sizes == [(3, 3), (3, 3), (2, 2)]


def test_the_table_holds_the_means_over_the_pairs(sources, squares):
    scores = load_scores(sources, device="cpu")
    table = score_images(squares, PROMPTS, scores)
    assert list(table) == list(SCORES)
    for name, loaded in scores.items():
        assert table[name] == loaded(squares, PROMPTS).double().mean().item()


def test_a_score_depends_on_the_pairing_but_the_aesthetic_one_does_not(sources, squares):
    scores = load_scores(sources, device="cpu")
    turned = [*PROMPTS[1:], PROMPTS[0]]
    for name, loaded in scores.items():
        is_same = torch.equal(loaded(squares, PROMPTS), loaded(squares, turned))
        assert is_same == (name == "aesthetic"), name


def test_an_image_that_means_its_prompt_has_the_full_score(sources, images):
    score = load_scores({"clip": sources["clip"]}, device="cpu")["clip"]
    of_prompts = score.embedder.of_prompts(PROMPTS)
    score.embedder.of_images = lambda _: of_prompts
    own, turned = score(images, PROMPTS), score(images, [*PROMPTS[1:], PROMPTS[0]])
    assert_as_accurate(own, 100 * of_prompts.square().sum(1), torch.full((4,), 100.0).double())
    assert (turned < own).all()


BROKEN = [
    ("clip", "{root}/none", "is neither a folder nor a model id"),
    ("clip", "{dino}", "expected a model of type clip in .*dino, got a dinov2"),
    ("clip", "{open_clip}", "open_clip: .*no file named model.safetensors"),
    ("clip", "{empty}", "empty has no config.json"),
    ("clip", "{clip}:{head}", "head.pth is no checkpoint of an open_clip ViT: it holds layers.0"),
    ("pick", "{no_tokenizer}", "no_tokenizer has no tokenizer"),
    ("pick", "{half}", "the weights in .*half are not those of a CLIPModel: 1 tensors are missing"),
    ("hps", "{open_clip}:{root}/none.pt", "there is no weights file .*none.pt"),
    ("hps", "{open_clip}:{short}", "not those of a CLIPModel: .* tensors are missing"),
    ("hps", "{open_clip}:{cut}", "cut.pt, 5000 bytes, does not read as"),
    ("hps", "{open_clip}:{code}", "code.pt is refused: .* names __builtin__.print .under 'a'"),
    ("aesthetic", "{clip}", "a CLIP and the file of its head; name both"),
    ("aesthetic", "{clip}:{wide}", "score head on embeddings of width 24 .*layers.0.weight"),
    ("reward", "{bert}", "a tokenizer and the file of its weights; name both"),
    ("reward", "{bert}:{head}", "head.pth does not hold ImageReward: it holds layers.0"),
    ("reward", "{bert}:{few}", "the tokenizer of .*bert has 77 words, .*few.pt embeds 70; name"),
    ("beauty", "{clip}", "unknown score 'beauty'; there is"),
]


@pytest.fixture(scope="module")
def broken(models, tmp_path_factory):
    """The whole models by name, and what is wrong with the others."""
    root = tmp_path_factory.mktemp("broken")
    names = ("empty", "no_tokenizer", "half")
    places = {name: root / name for name in names} | {"root": root}
    places["empty"].mkdir()
    for name in names[1:]:
        shutil.copytree(models["clip"], places[name])
    for path in places["no_tokenizer"].glob("*token*"):
        path.unlink()
    state = load_file(models["clip"] / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, places["half"] / "model.safetensors", {"format": "pt"})
    tensors = small.open_clip_tensors()
    del tensors["visual.ln_post.bias"]
    files = {"short": tensors, "wide": small.head_tensors(25), "code": {"a": print}}
    files["few"] = small.image_reward_tensors(70)
    for name, content in files.items():
        torch.save(content, root / f"{name}.pt")
    (root / "cut.pt").write_bytes(models["hps.pt"].read_bytes()[:5000])
    return (
        places
        | {name: root / f"{name}.pt" for name in (*files, "cut")}
        | {name.partition(".")[0]: path for name, path in models.items()}
    )


@pytest.mark.parametrize(("name", "source", "message"), BROKEN)
def test_a_wrong_model_is_refused_by_name(name, source, message, broken):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_scores({name: source.format(**broken)}, device="cpu")
    assert "\n" not in str(caught.value)


def test_wrong_images_and_prompts_are_refused(models, sources, images):
    with pytest.raises(ValueError, match="expected uint8 images of shape"):
        score_images(images.float(), PROMPTS, {})
    with pytest.raises(ValueError, match="for each of the 4 images, got 3 prompts"):
        score_images(images, PROMPTS[:3], {})
    with pytest.raises(ValueError, match=r"HPSv2 is for square images here, got \[20, 28\]"):
        score("hps", sources, images)
    with pytest.raises(ValueError, match="expected a model of type dinov2 or"):
        DinoFeatures(str(models["clip"]))
