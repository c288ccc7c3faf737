"""Triton kernels, one file per operator; installed as ``mfd_fast.kernels``.

A launcher validates nothing: ``mfd_fast.ops`` did.  Every module lists ``COMPILE_CASES``, the
specialisations that the tests compile to machine code for each architecture without a GPU.
"""

from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One specialisation of a kernel.

    ``signature`` maps every parameter to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``,
    ``"constexpr"``), ``constexprs`` the compile-time ones to their values; ``min_arch`` is the
    oldest architecture that has its types.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    min_arch: int = 80
