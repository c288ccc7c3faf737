"""Parameters that are views of one tensor, so that several layers are one matmul.

The parameters keep their names, shapes and values: a state dict is what it would be without
packing, and nothing is stored twice.
"""

from typing import Any

import torch
from torch import Tensor, nn


class PackedModule(nn.Module):
    """Calls :meth:`pack` again whenever its tensors may have got new storage.

    That is after a move or cast, a copy, and the loading of a state dict.
    """

    DERIVED: tuple[str, ...] = ()  # attributes that pack makes

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_post_hook(_pack_again)

    def pack(self) -> None:
        """Make what is derived from the parameters."""
        raise AssertionError("a subclass of PackedModule packs its own tensors")

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedModule":
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in self.DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


def _pack_again(module: PackedModule, _: Any) -> None:
    module.pack()


def share_storage(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters one after the other along dimension 0; they become views of the result."""
    together = torch.cat([parameter.data for parameter in parameters])
    parts = together.split([parameter.shape[0] for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return together


def joined(parameters: list[nn.Parameter], together: Tensor) -> Tensor:
    """``together`` if the parameters are frozen; else their concatenation, with gradients."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return torch.cat(parameters)
    return together
