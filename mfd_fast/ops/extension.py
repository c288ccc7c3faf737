"""The compiled extension, if this install has one, and which implementation of an operator runs.

``MFD_FAST_BACKEND`` (read once, at import):

    auto       compiled operators where they exist; on CUDA what an operator prefers (``define``)
    reference  the slow, obvious PyTorch of ``ops/reference.py`` on the CPU; Triton on CUDA
    cpp        compiled operators; an error if the extension is missing
    triton     Triton on CUDA even where a compiled CUDA operator exists
"""

import os
from functools import cache

BACKENDS = ("auto", "reference", "cpp", "triton")


@cache
def backend() -> str:
    """The value of ``MFD_FAST_BACKEND``; ``ValueError`` names the choices if it is another word."""
    name = os.environ.get("MFD_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"MFD_FAST_BACKEND must be one of {list(BACKENDS)}, got {name!r}")
    return name


@cache
def has_ext() -> bool:
    """True once ``mfd_fast._C`` is loaded.  A missing extension is fine; a broken one raises."""
    if backend() == "reference":
        return False
    import torch  # noqa: F401  (its libraries must be loaded before the extension's)

    try:
        import mfd_fast._C  # noqa: F401
    except ModuleNotFoundError:
        if backend() == "cpp":
            raise RuntimeError(
                "MFD_FAST_BACKEND=cpp, but this install has no compiled operators; install with a "
                "C++ compiler present: pip install --no-build-isolation ."
            ) from None
        return False
    return True


def build_info() -> dict:
    """How ``_C`` was built: torch, compiler, native, cuda, cuda_archs; empty without ``_C``."""
    if not has_ext():
        return {}
    import mfd_fast._C

    return mfd_fast._C.build_info()


def running(device: str) -> str:
    """What the operators are on ``"cpu"`` or ``"cuda"``, in words."""
    if device == "cuda":
        compiled = build_info().get("cuda") and backend() in ("auto", "cpp")
        return "compiled CUDA, Triton for the others" if compiled else "Triton"
    return "C++" if has_ext() else "PyTorch references, slow: mfd-fast info says how to compile"
