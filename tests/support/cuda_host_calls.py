"""The launchers of a library of cuda_host_build as functions of tensors.

Every tensor that a kernel sees lies in a buffer of its own with signalling NaN on both sides: what
is read past an edge shows in the result, and what is written past one is found afterwards, because
arithmetic never leaves those bits behind.  Outputs start as NaN.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROOM = 1024  # elements on either side; keeps the alignment of the buffer
NAN = float("nan")
# The bits of the smallest signalling NaN.
SIGNALLING = {
    torch.float32: (torch.int32, 0x7F800001),
    torch.bfloat16: (torch.int16, 0x7F81),
    torch.float16: (torch.int16, 0x7C01),
}


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(SIGNALLING[tensor.dtype][0])


def in_a_buffer(tensor: Tensor | None) -> Tensor | None:
    """A copy with the same strides; ``_base`` is the buffer."""
    if tensor is None:
        return None
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    bits, signalling = SIGNALLING[tensor.dtype]
    buffer = torch.full((extent + 2 * ROOM,), signalling, dtype=bits).view(tensor.dtype)
    return buffer.as_strided(tensor.shape, tensor.stride(), ROOM).copy_(tensor)


def edges_are_whole(copy: Tensor) -> bool:
    buffer = as_bits(copy._base)
    edges = torch.cat([buffer[:ROOM], buffer[-ROOM:]])
    return bool((edges == SIGNALLING[copy.dtype][1]).all())


def nan_like(tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output that nobody has written yet; of the shape of ``tensor`` if none is given."""
    return torch.full(shape or tensor.shape, NAN, dtype=dtype or tensor.dtype)


class HostKernels:
    """One library, with the device that its kernels believe to be on."""

    def __init__(self, library: Path, *, multiprocessors: int = 1, descending: bool = False):
        self.library = ctypes.CDLL(str(library))
        self.settings = (multiprocessors, int(descending))

    def launch(
        self,
        name: str,
        tensors: Sequence[Tensor | None],
        sizes: Sequence[int],
        *options: object,
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        """The tensors after the kernel; AssertionError for what the emulator found."""
        copies = [in_a_buffer(tensor) for tensor in tensors]
        addresses = [None if copy is None else copy.data_ptr() for copy in copies]
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        self.library.configure(*self.settings)
        failure = function(
            TYPES[dtype],
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_int64 * len(sizes))(*sizes),
            *options,
        ).decode()
        assert not failure, f"{name}: {failure}"
        for place, copy in enumerate(copies):
            assert copy is None or edges_are_whole(copy), f"{name}: a write past tensor {place}"
        return copies

    def glu_depthwise(self, x, weight, bias, height, width, in_bias):
        channels = x.shape[2] // 2
        out = nan_like(x, *x.shape[:2], channels)
        tensors = (x, weight, bias, in_bias, out, None, None, None)
        sizes = (x.shape[0], height, width, channels)
        return self.launch("glu_depthwise", tensors, sizes, dtype=x.dtype)[4]

    def glu_depthwise_backward(self, grad, x, weight, bias, in_bias, height, width, with_conv):
        outputs = (nan_like(x), nan_like(x) if with_conv else None)
        tensors = (x, weight, bias, in_bias, None, grad, *outputs)
        sizes = (x.shape[0], height, width, x.shape[2] // 2)
        return self.launch("glu_depthwise_backward", tensors, sizes, dtype=x.dtype)[6:]

    def _attention(self, name, qkv, bias, row_major, scale, out, grad, grad_qkv, grad_bias):
        rows, tokens, _three, heads, width = qkv.shape
        strides = (0, 0, 0) if bias is None else bias.stride()
        tensors = (qkv, bias, out, grad, grad_qkv, grad_bias)
        sizes = (rows, tokens, heads, width, *strides)
        options = (int(row_major), ctypes.c_float(scale))
        return self.launch(name, tensors, sizes, *options, dtype=qkv.dtype)

    def short_attention(self, qkv, bias, row_major, scale):
        rows, tokens, _three, heads, width = qkv.shape
        out = nan_like(qkv, rows, tokens, heads * width)
        args = (qkv, bias, row_major, scale, out, None, None, None)
        return self._attention("short_attention", *args)[2]

    def short_attention_backward(self, grad, qkv, bias, row_major, scale):
        """The gradients to the fused product and to the bias, if there is one."""
        grad_bias = None if bias is None else nan_like(bias, *bias.shape)
        args = (qkv, bias, row_major, scale, None, grad, nan_like(qkv), grad_bias)
        return self._attention("short_attention_backward", *args)[4:]

    def interpolate(self, x0, noise, t, with_target=True):
        tensors = (x0, noise, t, nan_like(x0), nan_like(x0) if with_target else None)
        sizes = (x0.shape[0], x0[0].numel())
        return tuple(self.launch("interpolate", tensors, sizes, dtype=x0.dtype)[3:])

    def ode_step_(self, guidance, x, v, history, coef, x_in):
        """In place, as the operator is."""
        sizes = (x.shape[0], x.shape[1], v.shape[1], x[0, 0].numel())
        option = ctypes.c_float(guidance)
        after = self.launch("ode_step", (x, v, history, coef, x_in), sizes, option, dtype=v.dtype)
        for tensor, new in zip((x, v, history, coef, x_in), after, strict=True):
            if tensor is not None:
                tensor.copy_(new)

    def mfd_loss(self, x, end_teacher, end_aux, span, weight):
        loss = torch.full((), NAN)
        tensors = (x, end_teacher, end_aux, nan_like(x), span, weight, loss, nan_like(span))
        sizes = (x.shape[0], x[0].numel(), end_teacher.stride(0), end_aux.stride(0))
        after = self.launch("mfd_loss", tensors, sizes, dtype=x.dtype)
        return after[6], after[7], after[3]
