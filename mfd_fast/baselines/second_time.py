"""A student that takes a second time, made from a network that takes one."""

from dataclasses import replace

import torch
from torch import nn


def with_second_time(network: nn.Module) -> nn.Module:
    """A copy of ``network`` (``DiT`` or ``UNet``) that takes a second time.

    Its new layers, ``span_mlp``, end in zeros: for every ``end`` it is the same function as
    ``network``, bit for bit, until it is trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = type(network)(replace(network.config, second_time=True))
    own = {name: value for name, value in student.state_dict().items() if "span_mlp" in name}
    student.load_state_dict(own | network.state_dict())
    weight = next(network.parameters())
    return student.to(weight.device, weight.dtype).eval()
