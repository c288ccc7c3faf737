"""What a user's own network may be: how it is called, copied, named and kept in float32.

Everything that can be told from the network is checked where it is handed over; what only a call
can tell, in the call.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mfd_fast.files.whole import first_line

# Modules that hold another one and are no part of its name: torch.compile's, checkpoint_wrapper's.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
Patterns = str | Iterable[str]
OF_DTYPES = re.compile(r"dtype|scalar type|type \(")  # torch's errors about mixed dtypes


def plain_name(name: str) -> str:
    """The name of a module or tensor as it is without the wrappers around its network."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_modules(
    network: nn.Module, patterns: Patterns
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """The modules that ``patterns`` name, by full name; and the patterns that name none.

    As in PEFT: one string is a regular expression for the whole name; strings of a tuple match the
    name or its last components (``"to_q"`` matches ``"blocks.0.attn.to_q"``).  Wrappers of
    torch.compile are no part of a name.  ``ValueError`` if the string is no regular expression.
    """
    is_match = _is_expression if isinstance(patterns, str) else _is_end
    wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    modules = {plain_name(name): module for name, module in network.named_modules()}
    found = {
        name: module
        for name, module in modules.items()
        if name and any(is_match(pattern, name) for pattern in wanted)
    }
    return found, tuple(p for p in wanted if not any(is_match(p, name) for name in found))


def names_of(setting: str) -> tuple[str, ...]:
    """The names in a setting, separated by commas, with or without blanks."""
    return tuple(name for part in setting.split(",") if (name := part.strip()))


def _is_end(last: str, name: str) -> bool:
    return name == last or name.endswith(f".{last}")


def _is_expression(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"one string is a regular expression for full module names; {pattern!r} is not "
            f"({error}). Names go in a tuple"
        ) from error


def first_floating(network: nn.Module) -> nn.Parameter:
    """The parameter whose dtype and device are the network's; ``ValueError`` if it has none."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError(
        "the network must be an nn.Module with floating-point parameters; "
        f"{type(network).__name__} has none: register its weights as parameters"
    )


def copy_of(network: nn.Module) -> nn.Module:
    """A deep copy; ``ValueError`` if the network does not allow one."""
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot be copied ({first_line(error)}): pass networks of "
            "their own as auxiliary and student"
        ) from error


def train_floating(network: nn.Module) -> None:
    """Keep fixed what the network keeps fixed; one that is frozen as a whole is trained as a
    whole, besides parameters that are no floating-point numbers.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())


def check_apart(trained: dict[str, nn.Module], others: dict[str, nn.Module]) -> None:
    """``ValueError`` if a parameter that one network trains belongs to another one too."""
    for role, network in trained.items():
        mine = {
            id(p): plain_name(name) for name, p in network.named_parameters() if p.requires_grad
        }
        for other, theirs in (trained | others).items():
            shared = [mine[id(p)] for p in theirs.parameters() if id(p) in mine]
            if other != role and shared:
                raise ValueError(
                    f"the {role} network trains {shared[0]}, which is the {other}'s too: pass "
                    "copies (copy.deepcopy), or freeze what they share (requires_grad_(False))"
                )


def kept_buffers(network: nn.Module) -> list[Tensor]:
    """The buffers that belong to the network's state, as they are: training may change them."""
    kept = [
        buffer
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    return [torch.view_as_real(x) if x.is_complex() else x for x in kept]


def check_statistics(network: Any) -> None:
    """For several processes; ``ValueError`` names a batch norm that would see one's samples."""
    for name, module in network.named_modules() if isinstance(network, nn.Module) else ():
        is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_batch_norm and module.training and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{plain_name(name)} takes the statistics of one process's samples: put it in eval "
                "mode, or pass nn.SyncBatchNorm.convert_sync_batchnorm(network) as the teacher"
            )


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Inside the block every module is in eval mode (dropout, batch norm, spectral norm)."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def velocity_of(network: nn.Module, x: Tensor, *inputs: Any, name: str) -> Tensor:
    """``network(x, *inputs)``, ``[R, *S]`` as x; ``ValueError`` says what else came, of ``name``.

    inputs are t ``[R]`` in float32, so that times stay exact, the condition, and for some
    objectives a second time.
    """
    try:
        v = network(x, *inputs)
    except RuntimeError as error:
        dtypes = {y.dtype for y in tree_leaves(inputs) if isinstance(y, Tensor)}
        others = sorted(str(d) for d in dtypes if d.is_floating_point and d != x.dtype)
        if not others or not OF_DTYPES.search(str(error)):
            raise
        raise ValueError(
            f"the {name} got x in {x.dtype} and t or cond in {', '.join(others)}, and failed with "
            f"{first_line(error)!r}: cast them where they meet x, as in t.to(x.dtype)"
        ) from error
    if not isinstance(v, Tensor):
        raise ValueError(
            f"the {name} must return one tensor, the velocity; got {type(v).__name__}: wrap it and "
            "return its element (out[0], or out.sample of a diffusers model)"
        )
    if v.shape != x.shape:
        raise ValueError(
            f"the {name} must return the shape of its input, {list(x.shape)}; got {list(v.shape)}"
        )
    return v


def check_leads(loss: Tensor, role: str) -> None:
    """``ValueError`` unless the loss leads to parameters."""
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of the {role} leads to none of its parameters: its network must compute the "
            "velocity from them, with gradients enabled (checkpoint with use_reentrant=False)"
        )


class Masters:
    """Float32 masters of the trained parameters of a network in 16 bits; in the others' place the
    parameters themselves.

    A small update of a bf16 weight rounds to nothing.  Gradients are added to the masters as soon
    as a backward has made them; :meth:`write` rounds the masters into the network.
    """

    def __init__(self, network: nn.Module, trained: list[nn.Parameter]):
        self.pairs, self.parameters = [], []
        for parameter in trained:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if wide == parameter.dtype:
                self.parameters.append(parameter)
                continue
            if hasattr(parameter, "to_local"):
                raise ValueError(
                    f"copies that are spread over ranks are trained in float32; got parameters in "
                    f"{parameter.dtype}: make the network with .float()"
                )
            master = nn.Parameter(parameter.detach().to(wide))
            parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))
            self.pairs.append((parameter, master))
            self.parameters.append(master)
        self._hook = network.register_load_state_dict_post_hook(self._read)

    def let_go(self, network: nn.Module) -> None:
        """A copy of the network has weights of its own: what is loaded into it is not read here."""
        del network._load_state_dict_post_hooks[self._hook.id]

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters into the network, in place."""
        for parameter, master in self.pairs:
            parameter.copy_(master)

    @torch.no_grad()
    def _read(self, *_: Any) -> None:
        for parameter, master in self.pairs:
            master.copy_(parameter)


def _hand_over(master: nn.Parameter, parameter: nn.Parameter) -> None:
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
