"""Which attention a diffusers network runs, and whether the student's pass can go back through."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from mfd_fast.files.whole import first_line

TOKENS, HEADS = 128, 2  # of the attention that is tried
ADVICE = (
    "take native, flash (flash-attn 2) or _flash_3, or leave --pipeline.attention and "
    "DIFFUSERS_ATTN_BACKEND out"
)


def use_attention(
    transformer: nn.Module, name: str = "", *, device: torch.device | None = None
) -> str:
    """Run all attention by a backend of diffusers' dispatcher; what then runs, in words.

    Args:
        transformer: in its dtype.
        name: of the backend, such as ``flash``; empty: what the network and the environment say.
        device: where it will run; where it is if None.

    ``ValueError`` for a backend that diffusers does not know, that is not installed or does not run
    here, and for one without a backward, which the student's pass needs.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    device = transformer.device if device is None else device
    known = [backend.value for backend in AttentionBackendName]
    if name and name not in known:
        raise ValueError(f"pipeline.attention must be one of {known}, got {name!r}")
    try:
        if name:
            transformer.set_attention_backend(name)
        used = _backends(transformer, device)
        for backend in used:
            name = backend
            _check_gradient(_inputs(transformer, device), dispatch_attention_fn, backend)
    except (RuntimeError, ImportError, NotImplementedError, AttributeError, TypeError) as error:
        raise ValueError(
            f"attention {name!r} cannot train the student on {device} in "
            f"{transformer.dtype}: {first_line(error).rstrip('.')}; {ADVICE}"
        ) from error
    return ", ".join(sorted(used.values()))


def _backends(transformer: Any, device: torch.device) -> dict[str, str]:
    """The backends of the network's attentions, and each in words."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    found = {}
    default = registry.get_active_backend()[0].value
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        own = getattr(processor, "_attention_backend", None)
        # An older processor calls torch's attention by itself, whatever the dispatcher is told.
        is_older = not hasattr(processor, "_attention_backend")
        name = "native" if is_older else getattr(own, "value", own) or default
        found[name] = (
            f"native, torch's {_torchs(_inputs(transformer, device))}" if name == "native" else name
        )
    return found


def _torchs(inputs: list[Tensor]) -> str:
    """The kernel that PyTorch chooses where nothing is masked."""
    choice = SDPBackend(torch._fused_sdp_choice(*inputs))
    return choice.name.removesuffix("_ATTENTION").lower().replace("_", " ")


def _inputs(transformer: Any, device: torch.device) -> list[Tensor]:
    """Queries, keys and values ``[1, HEADS, TOKENS, width]`` that lead back to leaves."""
    width = transformer.config.get("attention_head_dim") or 64
    shape = (1, HEADS, TOKENS, width if isinstance(width, int) else 64)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for _ in range(3)]
    return [x.to(device, transformer.dtype).requires_grad_() for x in made]


def _check_gradient(leaves: list[Tensor], attention: Any, backend: str) -> None:
    """``RuntimeError`` unless the backend gives queries, keys and values a gradient."""
    with torch.enable_grad():
        out = attention(*(x.transpose(1, 2) for x in leaves), backend=backend)
        if not out.requires_grad:
            raise RuntimeError("it has no backward")
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    if any(grad is None or not grad.abs().sum() > 0 for grad in grads):
        raise RuntimeError("its backward gives no gradient")
