"""What one operator costs: floating-point operations of its matmuls, and bytes it moves.

A multiply-add is two operations.  Only matmuls, convolutions and attentions have operations;
everything else is limited by memory and is charged its traffic alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., float]  # (args, output) -> operations

# Operators that move no data: no kernel on a GPU.
VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "alias", "detach"),
        *("transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "unbind"),
        *("split", "split_with_sizes", "chunk", "unflatten", "lift_fresh", "t", "is_same_size"),
        *("_record_function_enter_new", "_record_function_exit", "diagonal", "unfold", "real"),
    }
)
ALLOCATIONS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
)

# Operators that read only the rows they are asked for: what they write decides their traffic.
LOOKUPS = frozenset({"index_select", "embedding", "gather", "index"})


def _torchs(family: str, name: str) -> tuple[str, Formula]:
    """What PyTorch's own counter charges for one of its operators."""
    formula = flop_registry[getattr(torch.ops.aten, name)]
    return family, lambda args, out: formula(*args, out_val=out)


def _linear_attention(args: tuple, out: Any) -> float:
    rows, tokens, heads, width = args[0].shape
    return 4 * rows * tokens * heads * width * (width + 1)


def _linear_attention_backward(args: tuple, out: Any) -> float:
    rows, tokens, heads, width = args[1].shape
    return 2 * rows * tokens * heads * width * (4 * (width + 1) + width)


def _short_attention(args: tuple, out: Any) -> float:
    rows, tokens, heads, width = args[0].shape
    return 4 * rows * heads * tokens * tokens * width


def _short_attention_qkv(args: tuple, out: Any) -> float:
    return _short_attention((args[0].select(2, 0),), out)


def _short_attention_backward(args: tuple, out: Any) -> float:
    return 2.5 * _short_attention(args[1:], out)  # five matmuls where the forward has two


def _segmented_lora(args: tuple, out: Any) -> float:
    """With an adapter on every row; the trace scales it to the rows that have one."""
    y, x, a = args[:3]
    return 2 * y.shape[0] * y.shape[1] * a.shape[2] * (a.shape[1] * x.shape[2] + y.shape[2])


def _segmented_lora_backward(args: tuple, out: Any) -> float:
    grad, x, _, a, *_, need_x = args
    rows, groups = grad.shape[0] * grad.shape[1], a.shape[1]
    return 2 * rows * a.shape[2] * ((1 + need_x) * groups * x.shape[2] + 2 * grad.shape[2])


def _glu_depthwise(args: tuple, out: Any) -> float:
    return 2 * args[0].numel() * math.prod(args[1].shape[2:])


def _glu_depthwise_backward(args: tuple, out: Any) -> float:
    return 2 * _glu_depthwise(args[1:], out)  # the convolution again, and its transpose


# name of an operator -> its family and formula
PRODUCTS: dict[str, tuple[str, Formula]] = {
    **{name: _torchs("product", name) for name in ("mm", "_scaled_mm", "addmm", "bmm", "baddbmm")},
    **{name: _torchs("convolution", name) for name in ("convolution", "convolution_backward")},
    **{
        f"_scaled_dot_product_{kind}{end}": _torchs(
            "attention", f"_scaled_dot_product_flash_attention{end}"
        )
        for kind in (
            *("flash_attention", "flash_attention_for_cpu", "efficient_attention"),
            *("cudnn_attention", "fused_attention_overrideable"),
        )
        for end in ("", "_backward")
    },
    "glu_depthwise": ("convolution", _glu_depthwise),
    "_glu_depthwise_backward": ("convolution", _glu_depthwise_backward),
    "linear_attention": ("attention", _linear_attention),
    "_linear_attention_backward": ("attention", _linear_attention_backward),
    "short_attention": ("attention", _short_attention),
    "short_attention_qkv": ("attention", _short_attention_qkv),
    "_short_attention_backward": ("attention", _short_attention_backward),
    "segmented_lora": ("adapter", _segmented_lora),
    "segmented_lora_": ("adapter", _segmented_lora),
    "_segmented_lora_backward": ("adapter", _segmented_lora_backward),
}

# Operators of ours that compute no matmuls; a new operator belongs here or above.
MEMORY_BOUND = frozenset(
    {
        *("interpolate", "mfd_loss", "ode_step_", "gated_residual", "_gated_residual_backward"),
        *("layer_norm_modulate", "_layer_norm_modulate_backward"),
        *("rms_norm_modulate_silu", "_rms_norm_modulate_silu_backward", "quantize_rows"),
        *("rms_norm_rotary", "_rms_norm_rotary_backward", "dequantize_nf4"),
        "renormalised_guidance",
    }
)

FAMILIES = ("product", "convolution", "attention", "adapter", "memory", "optimizer")


def family_of(name: str) -> str:
    """``product``, ``convolution``, ``attention``, ``adapter``, ``memory`` or ``optimizer``."""
    return PRODUCTS[name][0] if name in PRODUCTS else "memory"


def operations(name: str, args: tuple, out: Any) -> float:
    """Floating-point operations of one call of the operator ``name``."""
    return PRODUCTS[name][1](args, out) if name in PRODUCTS else 0.0


def traffic(name: str, args: Any, out: Any) -> int:
    """Bytes read and written: every tensor once, broadcast ones as they are stored."""
    written = sum(stored_bytes(x) for x in tensors_of(out))
    if name in LOOKUPS:
        return 2 * written
    read = {id(x): stored_bytes(x) for x in tensors_of(args)}
    return written + sum(read.values())


def stored_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: dimensions of stride 0 hold one."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0) * x.element_size()


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which are at most lists of tensors."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_of(value)
