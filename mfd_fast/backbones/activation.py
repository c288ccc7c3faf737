"""What a forward with gradient keeps for its backward: all, the expensive part, or block inputs.

    none     everything autograd asks for
    cheap    results of large matmuls, convolutions and attention; norms, activations,
             gates and other pointwise work are computed again
    block    the input of every block; the block is computed again
    chunk    the same, and the MLPs of a block run over CHUNK tokens at a time, each piece computed
             again by itself: their hidden layers are never there for a whole long sequence

The frozen network needs no inputs for gradients of its weights, so what ``cheap`` and ``block``
drop is mostly what pointwise operators keep.  Built on torch.utils.checkpoint.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mfd_fast.backbones.networks import Patterns, find_modules

POLICIES = ("none", "cheap", "block", "chunk")
CHUNK = 8192  # tokens; shorter sequences are whole
POINTWISE = tuple(f"torch.nn.modules.{name}" for name in ("activation", "dropout", "linear"))

# Which argument of a product is its first factor; its last dimension is summed over.
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "linear": 0}
ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "linear_attention",
)

# A product over K terms costs 2 K FLOP per result; reading a kept bf16 result costs 2 bytes.  An
# H100 does about 270 FLOP (measured 798 TFLOP/s) in the time of a byte (3.0 TB/s), so below this
# length (an adapter's second factor, attention scores, depthwise convolutions) it is recomputed.
MIN_KEPT_LENGTH = 128


class ActivationPolicy:
    """The policy in force on some blocks; :meth:`remove` gives them back as they were."""

    def __init__(self, blocks: dict[str, nn.Module]):
        self.blocks = blocks

    def remove(self) -> None:
        """Undo, compiled forwards too; nothing happens the second time."""
        for block in self.blocks.values():
            del block.forward
        self.blocks = {}


def apply_activation_policy(
    network: nn.Module,
    policy: str,
    blocks: Patterns,
    *,
    recompute_context: Callable[[], AbstractContextManager] = nullcontext,
    compiled: Callable[[dict[str, nn.Module]], dict[str, Callable]] | None = None,
) -> ActivationPolicy:
    """Let the blocks of a network keep less in forwards with gradient; others are untouched.

    Args:
        policy: ``"none"``, ``"cheap"``, ``"block"`` or ``"chunk"``, above.
        blocks: the modules to treat, usually the repeated blocks: names in a tuple or one regular
            expression (``networks.find_modules``).
        recompute_context: called in the forward; entered for the recomputation.  Restores what the
            blocks depend on besides their arguments (``AdapterBank.resumed``).
        compiled: blocks by name -> their compiled forwards (``compiled.compile_blocks``).  A
            compiler keeps what ``"cheap"`` keeps and computes pointwise work again by itself.

    No random numbers may be drawn inside a block: recomputation does not restore their state.
    ``ValueError``: unknown policy, no block found, blocks inside each other or treated already, no
    MLP to take in pieces, or pieces of compiled blocks.
    """
    if policy not in POLICIES:
        raise ValueError(f"the activation policy must be one of {list(POLICIES)}, got {policy!r}")
    if policy == "none" and compiled is None:
        return ActivationPolicy({})
    found, unmatched = find_modules(network, blocks)
    if unmatched or not found:
        there = [name for name, module in network.named_modules() if _is_list(module)]
        raise ValueError(
            f"activation policy {policy!r}{', compiled' * (compiled is not None)}: blocks "
            f"{unmatched} match nothing; the network's lists of modules are {there}"
        )
    for name, block in found.items():
        outer = [other for other in found if name.startswith(f"{other}.")]
        if outer:
            raise ValueError(f"block {name} lies inside block {outer[0]}; name only one of them")
        if "forward" in vars(block):
            raise ValueError(f"the forward of block {name} is replaced already; remove that first")
    mlps = _mlps(found, compiled) if policy == "chunk" else {}
    make_contexts = _contexts_of(policy, is_compiled=compiled is not None)
    forwards = {name: block.forward for name, block in found.items()}
    for name, forward in (forwards if compiled is None else compiled(found)).items():
        if make_contexts is not None:
            forward = partial(_forward, forward, partial(make_contexts, recompute_context))
        found[name].forward = forward
    for mlp in mlps.values():
        contexts = partial(_block_contexts, recompute_context)
        mlp.forward = partial(_in_pieces, mlp.forward, contexts)
    return ActivationPolicy(found | mlps)


def _contexts_of(policy: str, *, is_compiled: bool) -> Callable | None:
    """What makes the two contexts of a checkpoint around a block; None without one."""
    if policy == "cheap":
        return None if is_compiled else _cheap_contexts
    return None if policy == "none" else _block_contexts


def _mlps(blocks: dict[str, nn.Module], compiled: Any) -> dict[str, nn.Module]:
    """The modules of blocks that do the same to every token, by name; the outermost of them."""
    if compiled is not None:
        raise ValueError("activation policy 'chunk' and compiled blocks exclude each other")
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        for part, module in block.named_modules(prefix=name):
            if _is_mlp(module) and not any(part.startswith(f"{other}.") for other in found):
                found[part] = module
    if not found:
        raise ValueError(
            f"activation policy 'chunk' found no MLP of linear layers in {', '.join(blocks)}; take "
            "'block'"
        )
    return found


def _is_mlp(module: nn.Module) -> bool:
    """A Sequential or what calls itself a feed-forward, of linear layers and pointwise functions
    alone.
    """
    leaves = [x for x in module.modules() if next(x.children(), None) is None]
    others = [x for x in leaves if not isinstance(x, nn.Linear)]
    if len(leaves) < len(others) + 2 or any(list(x.parameters()) for x in others):
        return False
    if isinstance(module, nn.Sequential):
        return all(type(x).__module__ in POINTWISE and "max" not in repr(x) for x in others)
    return type(module).__name__.endswith("FeedForward")


def _in_pieces(forward: Callable, contexts: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    """An MLP's forward over x ``[B, N, C]``, N tokens in pieces; other calls are as they were."""
    if args or kwargs or x.ndim != 3 or x.shape[1] <= CHUNK:
        return forward(x, *args, **kwargs)
    pieces = x.split(CHUNK, dim=1)
    return torch.cat([_forward(forward, contexts, piece) for piece in pieces], dim=1)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _forward(forward: Callable, contexts: Callable, *args: Any, **kwargs: Any) -> Any:
    """A block's forward under the policy."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        **kwargs,
    )


def _block_contexts(recompute_context: Callable) -> tuple:
    return nullcontext(), recompute_context()


def _cheap_contexts(recompute_context: Callable) -> tuple:
    keep, reuse = create_selective_checkpoint_contexts(_keep_if_expensive)
    return keep, Together(recompute_context(), reuse)


class Together:
    """Contexts as one; reusable if they are."""

    def __init__(self, *contexts: AbstractContextManager):
        self.contexts = contexts

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for context in self.contexts:
            self.stack.enter_context(context)

    def __exit__(self, *exc: Any) -> Any:
        return self.stack.__exit__(*exc)


def _keep_if_expensive(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__
    is_expensive = name in ATTENTION or _product_length(name, args) > MIN_KEPT_LENGTH
    return CheckpointPolicy.MUST_SAVE if is_expensive else CheckpointPolicy.PREFER_RECOMPUTE


def _product_length(name: str, args: tuple) -> int:
    """Terms summed for one result of a matmul or convolution; 0 for other operators."""
    if name in PRODUCTS:
        return args[PRODUCTS[name]].shape[-1]
    if name == "convolution":
        return math.prod(args[1].shape[1:])
    return 0
