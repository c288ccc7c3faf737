"""Is every compiled CUDA operator there?  Imports mfd_fast from the path and asks the dispatcher.

Needs a CUDA build of torch and of mfd_fast._C, but no GPU.  Exit status 1 if something is missing.
"""

import re
from pathlib import Path

import torch

import mfd_fast.ops  # noqa: F401  (defines the operators)
from mfd_fast.ops.extension import build_info

BINDINGS = Path(__file__).resolve().parents[1] / "csrc/bindings"


def registered(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mfd_fast::{name}", "CUDA")


def main() -> int:
    info = build_info()
    print("build_info:", info)
    print(
        "torch:", torch.__version__, "CUDA", torch.version.cuda, "GPU:", torch.cuda.is_available()
    )
    text = "".join(path.read_text() for path in sorted(BINDINGS.glob("*.cpp")))
    bound = set(re.findall(r'm\.impl\("(_\w+_cuda)"', text))
    schemas = {schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()}
    defined = {name for space, _, name in schemas if space == "mfd_fast" and name.endswith("_cuda")}
    for name in sorted(bound | defined):
        state = "ok" if registered(name) else "MISSING"
        print(f"  {name:<36} schema {'yes' if name in defined else 'NO ':<4} CUDA kernel {state}")
    broken = [name for name in bound | defined if name not in defined or not registered(name)]
    if broken or not info.get("cuda"):
        print(f"cuda build is incomplete: {sorted(broken) or 'built without CUDA'}")
        return 1
    print(f"cuda build is complete: {len(bound)} operators for sm {info['cuda_archs']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
