"""Compiles ``COMPILE_CASES`` for some architectures; a JSON line of resources for each.

    python tests/support/triton_to_machine_code.py 90,80,100 [module ...]

Every case for the first one; for the others the cases of each kernel that take the most registers
and the most shared memory there, and those that the first one is too old for.

No GPU is needed.  Run by test_triton_compile.py in a process of its own, because the tests run with
TRITON_INTERPRET=1 and then no kernel can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from itertools import product
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
        if kind.startswith("*")
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
    first, *others = archs
    for module in modules or MODULES:
        cases = getattr(import_module(f"mfd_fast.kernels.{module}"), "COMPILE_CASES", ())
        rows = {}
        for index, case in enumerate(cases):
            if first >= case.min_arch:
                rows[index] = report_line(module, index, case, first)
        for kernel in {case.kernel.__name__ for case in cases}:
            same = [i for i, case in enumerate(cases) if case.kernel.__name__ == kernel]
            built = [i for i in same if i in rows and not rows[i]["error"]]
            chosen = {i for i in same if i not in built}
            for resource in ("REG", "shared") if built else ():
                chosen.add(max(built, key=lambda i, key=resource: rows[i][key]))
            for index, arch in product(sorted(chosen), others):
                if arch >= cases[index].min_arch:
                    report_line(module, index, cases[index], arch)


def report_line(module: str, index: int, case, arch: int) -> dict:
    """Print and return one kernel's line."""
    name = f"{case.kernel.__name__}[{index}]"
    row = {"module": module, "case": name, "arch": arch} | report(case, arch)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1].split(",")], sys.argv[2:])
