"""A pipeline's network as the engine calls it, with what a condition decides computed once."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from mfd_fast.backbones.activation import Together
from mfd_fast.models.diffusers.constants import Constants
from mfd_fast.models.diffusers.family import Cond, Family

CONSTANTS = "constants"  # of a condition: what FamilyNetwork.prepare added to it


class FamilyNetwork(nn.Module):
    """``network(x, t, cond) -> v`` of a family; its child is called ``transformer``, so that names
    of adapters are those that ``pipe.load_lora_weights`` takes.

    Of two children one is evaluated for all rows: ``only`` if it is given, else that of the first
    row's time.  prepares: whether what is constant along a trajectory is computed once for it;
    not where the weights of a block are there in its own calls alone (spread over ranks).
    """

    def __init__(self, family: Family, *, prepares: bool = True):
        super().__init__()
        for name, network in family.networks.items():
            self.add_module(name, network)
        self.family = family
        self.combine = family.combine
        self.only = ""
        self.constants = {
            name: Constants(family, name, network) for name, network in self.named_children()
        }
        if not prepares:
            self.prepare = None

    def prepare(self, cond: Cond) -> dict[str, Any]:
        """cond with the results of the constant modules for its rows (``constants``)."""
        return cond | {CONSTANTS: {k: x.prepare(cond) for k, x in self.constants.items()}}

    def resumed(self) -> AbstractContextManager:
        """A context in which modules are replaced as now: recomputation enters it later."""
        return Together(*(x.resumed() for x in self.constants.values()))

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        names = list(self.family.networks)
        name = self.only or names[0]
        if len(names) > 1 and not self.only and not self.family.is_first(t[:1]).all():
            name = names[1]
        made = cond.get(CONSTANTS)
        if made is None:
            return self.family.velocity(getattr(self, name), x, t, cond)
        cond = {key: leaf for key, leaf in cond.items() if key != CONSTANTS}
        with self.constants[name].given(made[name], cond):
            return self.family.velocity(getattr(self, name), x, t, cond)
