"""Small networks with the layers that adapters fit: linear ones and 1x1 convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

from mfd_fast import AdapterBank

CHANNELS, SIDE, TEXT, WIDTH = 8, 4, 3, 12
SAMPLE_SHAPE = (CHANNELS, SIDE, SIDE)
TARGETS = ("to_q", "to_k", "to_v")
RANK, ALPHA = 4, 6.0


class ImageBlock(nn.Module):
    """1x1 convolutions on an image, then attention of its pixels to text."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Module()
        self.mix.to_v = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.to_q = nn.Linear(CHANNELS, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_v = nn.Linear(WIDTH, CHANNELS)

    def keys_values(self, text):
        return self.to_k(text), self.to_v(text)

    def forward(self, x, keys, values):
        x = x + torch.tanh(self.mix.to_v(x))
        tokens = x.flatten(2).transpose(1, 2)  # [B, P, C]
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), keys, values)
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class ImageNetwork(nn.Module):
    """``(x [B, C, H, W], t [B], {"text": [B, T, D]}) -> [B, C, H, W]``; two blocks."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList(ImageBlock() for _ in range(2))
        self.out = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x, t, cond):
        x = x + torch.tanh(self.time(t.to(x.dtype)[:, None]))[..., None, None]
        text = cond["text"].to(x.dtype)
        for block in self.blocks:
            x = block(x, *block.keys_values(text))
        return self.out(x)


class PreparingNetwork(ImageNetwork):
    """The same function, with keys and values made once per trajectory."""

    def __init__(self):
        super().__init__()
        self.num_prepared = 0

    def prepare(self, cond):
        self.num_prepared += 1
        text = cond["text"].to(self.time.weight.dtype)
        return [block.keys_values(text) for block in self.blocks]

    def forward(self, x, t, prepared):
        x = x + torch.tanh(self.time(t.to(x.dtype)[:, None]))[..., None, None]
        for block, (keys, values) in zip(self.blocks, prepared, strict=True):
            x = block(x, keys, values)
        return self.out(x)


NETWORKS = {"plain": ImageNetwork, "preparing": PreparingNetwork}


def null_text(cond):
    """The null condition."""
    return {"text": torch.zeros_like(cond["text"])}


def image_inputs(batch):
    """x, t and cond of ``ImageNetwork``, float32."""
    x, t = torch.randn(batch, *SAMPLE_SHAPE), torch.rand(batch)
    return x, t, {"text": torch.randn(batch, TEXT, WIDTH)}


def draw_adapter(bank, name, seed):
    """Give an adapter weights whose effect is of the order of the network's own."""
    generator = torch.Generator().manual_seed(seed)
    (master,) = bank.parameters_of(name)
    with torch.no_grad():
        master.copy_(torch.randn(master.shape, generator=generator, dtype=torch.float32) * 0.3)
    bank.refresh(name)


def make_bank(network=None, **options):
    """A network and a bank on it whose adapters all do something."""
    network = ImageNetwork() if network is None else network
    options = {"rank": RANK, "alpha": ALPHA, "targets": TARGETS} | options
    bank = AdapterBank(network, **options)
    for seed, name in enumerate(bank.names):
        draw_adapter(bank, name, seed)
    return network, bank
