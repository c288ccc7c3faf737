"""Compiles all of ``kernel_launches`` for some architectures; a JSON line of resources for each.

    PYTHONPATH=. python tests/support/triton_to_machine_code.py 80,90 [module ...]

No GPU is needed.  Run by test_triton_compile.py in a process of its own, because the tests run with
TRITON_INTERPRET=1 and then no kernel can be compiled.  With "names" in place of architectures it
prints the names of the kernels that are launched.
"""

import json
import re
import subprocess
import sys
import tempfile
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
    for module in modules:
        for index, one in enumerate(launches(module)):
            for arch in (arch for arch in archs if arch >= oldest_arch(one)):
                row = {"module": module, "case": f"{one.name}[{index}]", "arch": arch}
                print(json.dumps(row | report(one, arch)), flush=True)


if __name__ == "__main__":
    wanted = sys.argv[2:] or list(LAUNCHERS)
    if sys.argv[1] == "names":
        print(*sorted({one.name for module in wanted for one in launches(module)}))
    else:
        main([int(arch) for arch in sys.argv[1].split(",")], wanted)
