"""What of a diffusers network is the same along a trajectory, computed once for all of it.

A family names the modules whose results the condition alone decides (``Family.constants``).  They
run once for a prepared condition, under its lanes' adapters and with their gradient; in every
evaluation stand-ins hand out the results in their place.  Tables of positions follow from shapes
alone and are kept from condition to condition.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mfd_fast.models.diffusers.family import Cond, Family

CALL = "a call of the network"
TABLE = "a table that follows from the shapes"
MIN_SHARE = 0.01


class Constant(NamedTuple):
    """Modules of a network, each of which gets the result of the one before.

    source: of the first one's input: a leaf of the condition (in the network's dtype), the last
    module of an earlier constant, ``CALL``, which finds inputs and result in a call that ends
    before the blocks, or ``TABLE``, the same with results without rows.
    """

    source: str
    modules: tuple[str, ...]


def keys_values(
    stack: nn.ModuleList, name: str, source: str, tokens: tuple[int, int], *, is_normed: bool = True
) -> Iterator[Constant]:
    """Keys and values of a text in the cross-attention ``attn2`` of every block of a stack.

    tokens: of the text, and of a sample; is_normed: ``norm_k``, if any, takes what ``to_k`` gives,
    all heads together.  Nothing where their products are less than ``MIN_SHARE`` of the block's:
    they are bytes that every row keeps, in a long video more than they are worth.
    """
    text, sample = tokens
    kept = _products(stack[0].attn2.to_k) + _products(stack[0].attn2.to_v)
    others = _products(stack[0]) - kept
    if text * kept < MIN_SHARE * (text * kept + sample * others):
        return
    for i, block in enumerate(stack):
        attention = f"{name}.{i}.attn2"
        has_norm = is_normed and block.attn2.norm_k is not None
        normed = (f"{attention}.norm_k",) if has_norm else ()
        yield Constant(source, (f"{attention}.to_k", *normed))
        yield Constant(source, (f"{attention}.to_v",))


def _products(module: nn.Module) -> int:
    """Numbers in its weights, however they are stored: products for a token."""
    layers = [x for x in module.modules() if isinstance(x, nn.Linear | nn.Conv2d)]
    return sum(
        x.in_features * x.out_features if isinstance(x, nn.Linear) else x.weight.numel()
        for x in layers
    )


class StandIn(nn.Module):
    """In a module's place: its result; of a list, the result of each of its calls in turn."""

    def __init__(self):
        super().__init__()
        self.given_result: Any = None
        self.turn = 0

    def forward(self, *_: Any, **__: Any) -> Any:
        if not isinstance(self.given_result, list):
            return self.given_result
        self.turn += 1
        return self.given_result[(self.turn - 1) % len(self.given_result)]


class _Complete(Exception):  # noqa: N818 it is no error
    """All that was looked for was found."""


class _Recorder(nn.Module):
    """In a module's place: runs it and keeps what it gives."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.results = module, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.results.append(self.module(*args, **kwargs))
        return self.results[-1]


class _Block(nn.Module):
    """In a block's place: its input, or the end of the call."""

    def __init__(self, recorders: Mapping[str, _Recorder]):
        super().__init__()
        self.recorders = dict(recorders)

    def forward(self, x: Any = None, *_: Any, **__: Any) -> Any:
        if all(recorder.results for recorder in self.recorders.values()):
            raise _Complete
        return x


class InForce:
    """Inside the block the stand-ins hand out ``results`` (None: the network is itself); reusable,
    and usable from another thread.
    """

    def __init__(self, constants: "Constants", results: dict[str, Any] | None):
        self.constants, self.results = constants, results

    def __enter__(self) -> None:
        self.before = self.constants.put(self.results)

    def __exit__(self, *_: Any) -> None:
        self.constants.put(self.before)


class Constants:
    """The constants of one network of a family, which has the given name."""

    def __init__(self, family: "Family", name: str, transformer: nn.Module):
        self.family, self.transformer = family, transformer
        self.all = tuple(family.constants(transformer))
        self.last_of = {name: x.modules[-1] for x in self.all for name in x.modules}
        self.stand_ins = {name: StandIn() for name in self.last_of}
        self.blocks = [
            part
            for part, _ in transformer.named_modules()
            if re.fullmatch(family.blocks, f"{name}.{part}") and part not in self.last_of
        ]
        self.tables: dict[tuple, dict[str, list]] = {}
        self.in_force: dict[str, Any] | None = None

    def prepare(self, cond: "Cond") -> dict[str, Tensor]:
        """Results ``[R, ...]`` for a condition of R rows; its tables are made and kept."""
        key, looked_for = self._key(cond), [CALL]
        if key not in self.tables:
            looked_for.append(TABLE)
        names = [x.modules[-1] for x in self.all if x.source in looked_for]
        found = self._found(names, cond) if names else {}
        tables = {x.modules[-1] for x in self.all if x.source == TABLE}
        if key not in self.tables:
            self.tables[key] = {name: found[name] for name in tables}
        made = {name: results[0] for name, results in found.items() if name not in tables}
        for source, modules in self.all:
            if source not in (CALL, TABLE):
                x = made[source] if source in made else cond[source].to(self.transformer.dtype)
                for name in modules:
                    x = self.transformer.get_submodule(name)(x)
                made[modules[-1]] = x
        return made

    def given(self, made: dict[str, Tensor], cond: "Cond") -> InForce:
        """A context in which the network takes what :meth:`prepare` made for these rows."""
        return InForce(self, made | self.tables[self._key(cond)])

    def resumed(self) -> InForce:
        """A context in which the network takes what it takes now."""
        return InForce(self, self.in_force)

    def put(self, results: dict[str, Any] | None) -> dict[str, Any] | None:
        """Let the stand-ins hand out these, or nothing; what they did before."""
        before, self.in_force = self.in_force, results
        for name, stand_in in self.stand_ins.items():
            stand_in.given_result = None if results is None else results[self.last_of[name]]
            stand_in.turn = 0
        if before is None and results is not None:
            self.own = _replace(self.transformer, self.stand_ins)
        elif before is not None and results is None:
            _replace(self.transformer, self.own)
        return before

    def _found(self, names: list[str], cond: "Cond") -> dict[str, list]:
        """What these modules give in a call of the network that ends before the blocks."""
        recorders = {name: _Recorder(self.transformer.get_submodule(name)) for name in names}
        rows = len(next(iter(cond.values())))
        x = self.family.zeros(rows, *self.family.sample_shape)
        t = self.family.zeros(rows, dtype=torch.float32)
        blocks = dict.fromkeys(self.blocks, _Block(recorders))
        with _replaced(self.transformer, blocks | recorders), suppress(_Complete):
            self.family.velocity(self.transformer, x, t, cond)
        return {name: recorder.results for name, recorder in recorders.items()}

    def _key(self, cond: "Cond") -> tuple:
        """What tables depend on."""
        shapes = tuple(sorted((name, leaf.shape[1:]) for name, leaf in cond.items()))
        return self.transformer.device, self.transformer.dtype, shapes


@contextmanager
def _replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    own = _replace(network, modules)
    try:
        yield
    finally:
        _replace(network, own)


def _replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in the places of others, past hooks and parameters; the others."""
    others = {}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        siblings = network.get_submodule(parent)._modules
        others[name], siblings[child] = siblings[child], module
    return others
