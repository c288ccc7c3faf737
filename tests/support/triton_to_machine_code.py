"""Compiles every ``COMPILE_CASES`` entry for some architectures; a JSON line of resources for each.

    python tests/support/triton_to_machine_code.py 80,90 [module ...]

No GPU is needed.  Run by test_triton_compile.py in a process of its own, because the tests run with
TRITON_INTERPRET=1 and then no kernel can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_case(case, arch: int):
    """One kernel to machine code; pointers are multiples of 16 bytes, as torch allocates them."""
    names = case.kernel.arg_names
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.signature.items()
        if isinstance(kind, str) and kind.startswith("*")
    }
    source = ASTSource(case.kernel, case.signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as cuobjdump reports them; LOCAL and STACK are what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    usage = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr)
    return {name: int(value) for name, value in usage}


def report(case, arch: int) -> dict:
    """Resources of one kernel, or the compiler's error."""
    try:
        compiled = compile_case(case, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None, "shared": compiled.metadata.shared} | resources(compiled.asm["cubin"])


def main(archs: list[int], modules: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    for module in modules or MODULES:
        cases = getattr(import_module(f"mfd_fast.kernels.{module}"), "COMPILE_CASES", ())
        for index, case in enumerate(cases):
            for arch in (arch for arch in archs if arch >= case.min_arch):
                name = f"{case.kernel.__name__}[{index}]"
                row = {"module": module, "case": name, "arch": arch} | report(case, arch)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1].split(",")], sys.argv[2:])
