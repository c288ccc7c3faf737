"""Compiles all of ``kernel_launches`` for some architectures; a JSON line of resources for each.

    PYTHONPATH=. python tests/support/triton_to_machine_code.py 90,80 [module ...]

Every case for the first one; for the others the cases of each kernel that take the most registers
and the most shared memory there, and those that the first one is too old for.

No GPU is needed.  Run by test_triton_compile.py in a process of its own, because the tests run with
TRITON_INTERPRET=1 and then no kernel can be compiled.  With "names" in place of architectures it
prints the names of the kernels that are launched.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from kernel_launches import LAUNCHERS, launch

from bench.predict.launches import Launch, compile_launch, oldest_arch, record, specialise

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches(module: str) -> list[Launch]:
    """One of each specialisation."""
    found = record(lambda: launch(module))
    return list({(one.name, repr(specialise(one))): one for one in found}.values())


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as cuobjdump reports them; LOCAL and STACK are what was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    usage = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr)
    return {name: int(value) for name, value in usage}


def report(one: Launch, arch: int) -> dict:
    """Resources of one kernel, or the compiler's error."""
    try:
        compiled = compile_launch(one, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None, "shared": compiled.metadata.shared} | resources(compiled.asm["cubin"])


def main(archs: list[int], modules: list[str]) -> None:
    first, *others = archs
    for module in modules:
        cases = launches(module)
        rows = {}
        for index, case in enumerate(cases):
            if first >= oldest_arch(case):
                rows[index] = report_line(module, index, case, first)
        for kernel in {case.name for case in cases}:
            same = [i for i, case in enumerate(cases) if case.name == kernel]
            built = [i for i in same if i in rows and not rows[i]["error"]]
            chosen = {i for i in same if i not in built}
            for resource in ("REG", "shared") if built else ():
                chosen.add(max(built, key=lambda i, key=resource: rows[i][key]))
            for index, arch in product(sorted(chosen), others):
                if arch >= oldest_arch(cases[index]):
                    report_line(module, index, cases[index], arch)


def report_line(module: str, index: int, case: Launch, arch: int) -> dict:
    """Print and return one kernel's line."""
    row = {"module": module, "case": f"{case.name}[{index}]", "arch": arch} | report(case, arch)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    wanted = sys.argv[2:] or list(LAUNCHERS)
    if sys.argv[1] == "names":
        print(*sorted({one.name for module in wanted for one in launches(module)}))
    else:
        main([int(arch) for arch in sys.argv[1].split(",")], wanted)
