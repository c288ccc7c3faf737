"""Triton's interpreter, which patches ``triton.language`` once a launch.

By itself it does so at every call of one kernel function by another too, and scans the whole
language for it: most of the time of a kernel that is made of small functions.
"""

from types import FunctionType, SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

NOTHING_TO_UNDO = SimpleNamespace(restore=lambda: None)


def patch_once() -> None:
    """Leave out what is patched already, until the launch that patched it ends."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched = set()

    def patch_lang(fn: FunctionType):
        seen = {id(value) for value in fn.__globals__.values()}
        modules = id(tl) in seen, id(tl.core) in seen
        if modules in patched:
            return NOTHING_TO_UNDO
        patched.add(modules)
        return patch(fn)

    def restore_and_forget(scope: interpreter._LangPatchScope):
        patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_lang
    interpreter._LangPatchScope.restore = restore_and_forget
