"""Small random models in the layouts of the published ones, for the tests of scores."""

import string

import torch
import transformers

SIZE = 16  # of the images that the small networks take
LETTERS = string.ascii_lowercase + string.digits
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_config(**vision):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.CLIPConfig(
        text_config=text
        | {"num_attention_heads": 4, "max_position_embeddings": 12, "hidden_act": "gelu"}
        | {"vocab_size": 2 * len(LETTERS) + 2, "bos_token_id": 2 * len(LETTERS)}
        | {"eos_token_id": 2 * len(LETTERS) + 1},
        vision_config={"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2}
        | {"num_attention_heads": 5, "image_size": SIZE, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=24,
    )


def save_clip_preparation(folder):
    """config.json, tokenizer and preprocessor, but no weights."""
    clip_config().save_pretrained(folder)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    save_processor(transformers.CLIPImageProcessorPil, folder)


def save_processor(kind, folder, **settings):
    edges = {"height": SIZE, "width": SIZE}
    kind(size={"shortest_edge": SIZE}, crop_size=edges, **settings).save_pretrained(folder)


def randomized(network, seed=0):
    """Every tensor normal, so that none is left out of a comparison by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def save_clip(folder):
    """A whole CLIP; the network is returned."""
    save_clip_preparation(folder)
    network = randomized(transformers.CLIPModel(clip_config()))
    network.save_pretrained(folder)
    return network


def save_dino(folder):
    config = transformers.Dinov2Config(
        **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2},
        **{"image_size": SIZE, "patch_size": 8},
    )
    network = randomized(transformers.Dinov2Model(config))
    network.save_pretrained(folder)
    settings = {"image_mean": DINO_MEAN, "image_std": DINO_STD}
    save_processor(transformers.BitImageProcessorPil, folder, **settings)
    return network


def save_bert_tokenizer(folder):
    words = [*BERT_SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertConfig(vocab_size=len(words)).save_pretrained(folder)
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return len(words)


def normal_tensors(shapes, seed=0):
    """A state dict of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def open_clip_tensors():
    """The weights of an open_clip ViT of the sizes of ``clip_config``, under open_clip's names."""
    config = clip_config()
    text, vision, out = config.text_config, config.vision_config, config.projection_dim
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    shapes = {
        "positional_embedding": (text.max_position_embeddings, text.hidden_size),
        "text_projection": (text.hidden_size, out),
        "logit_scale": (),
        "visual.class_embedding": (vision.hidden_size,),
        "visual.positional_embedding": (tokens, vision.hidden_size),
        "visual.proj": (vision.hidden_size, out),
        "visual.conv1.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
        "token_embedding.weight": (text.vocab_size, text.hidden_size),
    }
    for name, width in (("visual.ln_pre", vision.hidden_size), ("ln_final", text.hidden_size),
                        ("visual.ln_post", vision.hidden_size)):  # fmt: skip
        shapes |= linear(name, (width,))
    for prefix, tower in (("visual.transformer", vision), ("transformer", text)):
        width, inner = tower.hidden_size, tower.intermediate_size
        for number in range(tower.num_hidden_layers):
            block = f"{prefix}.resblocks.{number}"
            shapes |= linear(f"{block}.ln_1", (width,)) | linear(f"{block}.ln_2", (width,))
            shapes |= linear(f"{block}.attn.out_proj", (width, width))
            shapes |= linear(f"{block}.mlp.c_fc", (inner, width))
            shapes |= linear(f"{block}.mlp.c_proj", (width, inner))
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
    return normal_tensors(shapes)


def image_reward_tensors(vocabulary):
    """The weights of a small ImageReward under its authors' names: heads are 64 wide."""
    image, text = 128, 64
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, image),
        "blip.visual_encoder.pos_embed": (1, 5, image),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, text),
        "blip.visual_encoder.patch_embed.proj.bias": (image,),
        "blip.visual_encoder.patch_embed.proj.weight": (image, 3, 8, 8),
        **linear("blip.visual_encoder.norm", (image,)),
        **linear("blip.text_encoder.embeddings.LayerNorm", (text,)),
        **linear("blip.vision_proj", (8, image)),
        **linear("blip.text_proj", (8, text)),
    }
    for number in range(2):
        block = f"blip.visual_encoder.blocks.{number}"
        shapes |= linear(f"{block}.norm1", (image,)) | linear(f"{block}.norm2", (image,))
        shapes |= linear(f"{block}.attn.qkv", (3 * image, image))
        shapes |= linear(f"{block}.attn.proj", (image, image))
        shapes |= linear(f"{block}.mlp.fc1", (96, image)) | linear(f"{block}.mlp.fc2", (image, 96))
        layer = f"blip.text_encoder.encoder.layer.{number}"
        for attention, width in (("attention", text), ("crossattention", image)):
            shapes |= linear(f"{layer}.{attention}.self.query", (text, text))
            shapes |= linear(f"{layer}.{attention}.self.key", (text, width))
            shapes |= linear(f"{layer}.{attention}.self.value", (text, width))
            shapes |= linear(f"{layer}.{attention}.output.dense", (text, text))
            shapes |= linear(f"{layer}.{attention}.output.LayerNorm", (text,))
        shapes |= linear(f"{layer}.intermediate.dense", (72, text))
        shapes |= linear(f"{layer}.output.dense", (text, 72))
        shapes |= linear(f"{layer}.output.LayerNorm", (text,))
    return normal_tensors(shapes) | {f"mlp.{k}": v for k, v in head_tensors(text).items()}


def head_tensors(width):
    """The five linear layers of the aesthetic predictor's file."""
    shapes = {}
    for name, into, out in ((0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16),
                            (7, 16, 1)):  # fmt: skip
        shapes |= linear(f"layers.{name}", (out, into))
    return normal_tensors(shapes, seed=1)


def linear(name, shape):
    """Weight and bias; a norm's have one dimension."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
