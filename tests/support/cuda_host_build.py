"""Compiles csrc/cuda for the host with g++ and cuda_host/emulator.h; no GPU, no nvcc pass.

Three things of CUDA C++ that g++ does not know are rewritten: launches, dynamic shared memory and
inline PTX.  Everything else is the text of the kernels.  What was built stays under
build/cuda_host, by the hash of everything that the compiler read.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/cuda"
HOST = ROOT / "tests/support/cuda_host"
CACHE = ROOT / "build/cuda_host"
FLAGS = [
    *("-std=c++20", "-O1", "-march=native", "-fPIC", "-w"),
    # Two libraries in one process share nothing; fibers have stacks of their own.
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-stack-protector"),
]
PROCESSES = 2

LAUNCH = re.compile(r"(\w+(?:<(?:[^<>;]|<[^<>;]*>)*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
PTX = re.compile(r'asm\("([\w.]+) [^"]*" : "=f"\((\w+)\) : ([^;]*)\);')


@cache
def cuda_headers() -> Path | None:
    """The include folder of the toolkit that nvcc runs (nvcc may be a wrapper), if there is one."""
    if shutil.which("nvcc") is None:
        return None
    command = ["nvcc", "--dryrun", "-x", "cu", "/dev/null", "-c", "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
    headers = Path(top[1].strip()) / "include" if top else None
    return headers if headers and (headers / "cuda_runtime.h").is_file() else None


def missing() -> str:
    """What this machine lacks to build, or an empty string."""
    if shutil.which("g++") is None:
        return "needs g++ on the PATH"
    return "" if cuda_headers() else "needs nvcc on the PATH, for the headers of CUDA"


def split_arguments(text: str) -> list[str]:
    """At the commas outside of any bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "(<[{") - (char in ")>]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def host_launch(match: re.Match) -> str:
    kernel, sizes, arguments = match.groups()
    grid, block, shared, _stream = split_arguments(sizes)
    call = f"[=] {{ {kernel}({arguments}); }}"
    return f"emulator::launch(dim3({grid}), dim3({block}), {shared}, {call});"


def host_instruction(match: re.Match) -> str:
    instruction, result, operands = match.groups()
    function = instruction.replace(".", "_").lower()
    values = re.findall(r'"f"\((\w+)\)', operands)
    return f"{result} = emulator::ptx::{function}({', '.join(values)});"


def prepare(text: str) -> str:
    """CUDA C++ as g++ takes it."""
    text = text.replace("#include <cuda_pipeline.h>\n", "")
    text = LAUNCH.sub(host_launch, text)
    text = SHARED.sub(r"auto* const \2 = reinterpret_cast<\1*>(emulator::shared_memory);", text)
    text = PTX.sub(host_instruction, text)
    unknown = re.search(r"<<<|extern __shared__|\basm\b", text)
    assert unknown is None, f"cuda_host_build does not know how to rewrite this {unknown[0]}"
    return text


def prepared_sources(bug: tuple[str, str, str] | None) -> dict[str, str]:
    """Every source by its path below the folder of the build; ``bug`` is (file, text, by what)."""
    sources = {}
    for path in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]):
        text = path.read_text()
        if bug and bug[0] == path.name:
            assert text.count(bug[1]) == 1, f"{path.name} does not have this once: {bug[1]}"
            text = text.replace(bug[1], bug[2])
        name = path.name if path.suffix == ".cuh" else path.stem + ".cpp"
        sources[f"cuda/{name}"] = prepare(text)
    return sources | {path.name: path.read_text() for path in sorted(HOST.iterdir())}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@cache
def compiler() -> str:
    """What else the machine code depends on: the compiler, the processor and the CUDA headers."""
    command = ["g++", "-march=native", "-Q", "--help=target", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    headers = (cuda_headers() / "cuda_runtime_api.h").read_text()
    version = re.search(r"#define CUDART_VERSION\s+\d+", headers)[0]
    return f"{said}{version}{cuda_headers()}{FLAGS}"


def compile_unit(unit: str, sources: dict[str, str], folder: Path) -> Path:
    """The object of one source; one that differs in nothing is taken from an earlier build."""
    headers = [sources[name] for name in sorted(sources) if name.endswith((".h", ".cuh"))]
    name = f"{Path(unit).stem}-{digest(compiler(), headers, sources[unit])}.o"
    target = CACHE / "objects" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        run(["g++", *FLAGS, "-include", "emulator.h", "-c", unit], target, folder)
    return target


def run(command: list[str], target: Path, folder: Path) -> None:
    """A compiler in ``folder``; its output is at ``target`` only when it is whole."""
    part = target.with_suffix(".part")
    include = ["-I.", "-isystem", str(cuda_headers())]
    command = [*command, *include, "-o", str(part)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    os.replace(part, target)


def build(bug: tuple[str, str, str] | None = None) -> Path:
    """The shared library with every launcher; with ``bug``, after that one substitution."""
    sources = prepared_sources(bug)
    folder = CACHE / digest(compiler(), sources)
    library = folder / "kernels.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers side by side build it once
        if not library.exists():
            for name, text in sources.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
            units = [name for name in sources if name.endswith(".cpp")]
            with ThreadPoolExecutor(PROCESSES) as pool:
                objects = list(pool.map(lambda unit: compile_unit(unit, sources, folder), units))
            run(["g++", "-shared", *map(str, objects)], library, folder)
    return library
