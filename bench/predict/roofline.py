"""This device's roofline, and where every measured operator stands under it.

It is a large copy and large square matmuls in every dtype the device multiplies.  The
picture's operators come from the result files of the same device; those that multiply stand in
the left panel (operations a byte against operations a second), all in the right one (share of the
copy).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.results import RESULTS
from bench.running import Options
from mfd_fast.cost.devices import COPY_BYTES, MATMUL_SIDE, copy_bandwidth, matmul_flops, seconds_of

# A CPU multiplies float16 by converting it: no roof of its own.
DTYPES = {
    "cpu": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "cuda": {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
}
FP8 = "float8_e4m3fn"


def roofs(device: str) -> list[dict]:
    """Rows of ``kind`` copy (GB/s) and matmul (TFLOP/s, by dtype)."""
    rows = [{"kind": "copy", "dtype": "uint8", "gb_s": round(copy_bandwidth(device) / 1e9, 2)}]
    for name, dtype in DTYPES[device].items():
        rate = matmul_flops(device, dtype)
        rows.append({"kind": "product", "dtype": name, "tflop_s": round(rate / 1e12, 4)})
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        rows.append({"kind": "product", "dtype": FP8, "tflop_s": round(_fp8_flops() / 1e12, 4)})
    side = MATMUL_SIDE[torch.device(device).type]
    return [row | {"side": side} if row["kind"] == "product" else row for row in rows]


def _fp8_flops() -> float:
    """Operations a second of a scaled matmul of 8-bit factors into bfloat16."""
    side = MATMUL_SIDE["cuda"]
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in "ab")
    one = torch.ones((), device="cuda")
    product = torch._scaled_mm
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return 2 * side**3 / seconds_of(lambda: product(a, b.t(), **options))


def operators(device_name: str, threads: int) -> Iterator[dict]:
    """The rows of our implementations on this device and as many threads, with their operator."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if (result.get("device"), result.get("threads")) != (device_name, threads):
            continue
        for row in result.get("rows", ()):
            if row.get("impl") == "ours" and "copy_fraction" in row:
                yield {"op": result["op"], **row}


def draw(rows: list[dict], points: list[dict], device_name: str, path: Path) -> None:
    """The picture."""
    from mfd_fast.pictures.grids import INK, new_figure, write_png

    figure = new_figure(13.0, max(4.5, 0.16 * len(points) + 1.2))
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1]})
    copy = next(row["gb_s"] for row in rows if row["kind"] == "copy")
    tops = {row["dtype"]: row["tflop_s"] for row in rows if row["kind"] == "product"}
    names = sorted({point["op"] for point in points})
    colours = dict(zip(names, _colours(len(names)), strict=True))
    _roofline(left, copy, tops, points, colours)
    _shares(right, points, colours)
    figure.suptitle(device_name, x=0.01, ha="left", fontsize=10, color=INK)
    figure.tight_layout()
    write_png(figure, path)


def _roofline(axis, copy: float, tops: dict, points: list[dict], colours: dict) -> None:
    intensity = [2.0**k for k in range(-2, 14)]
    for dtype, top in tops.items():
        axis.plot(intensity, [min(top, x * copy / 1e3) for x in intensity], label=dtype, lw=1.2)
    seen = set()
    for point in points:
        if not point["tflop_s"]:
            continue
        flops = point["tflop_s"] * 1e12 * point["us"] * 1e-6
        label = None if point["op"] in seen else point["op"]
        seen.add(point["op"])
        marker = "o" if point["dtype"] == "float32" else "^"
        axis.plot(flops / point["bytes_moved"], point["tflop_s"], marker, label=label,
                  color=colours[point["op"]], ms=5)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte", fontsize=9)
    axis.set_title("TFLOP/s; lines: copy and matmul rooflines, o float32, ^ 16-bit",
                   fontsize=9, loc="left")  # fmt: skip
    axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.3)


def _shares(axis, points: list[dict], colours: dict) -> None:
    names = [f"{p['op']}, {p['shape']}, {p['dtype']}" for p in points]
    places = range(len(points))
    axis.barh(places, [p["copy_fraction"] for p in points],
              color=[colours[p["op"]] for p in points])  # fmt: skip
    axis.set_yticks(places, names, fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1.0, color="#1f2933", lw=0.8)
    axis.set_title("bytes a second, share of the copy's (above 1: in cache)",
                   fontsize=9, loc="left")  # fmt: skip


def _colours(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["tab20"](i % 20) for i in range(count)]


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    return "roofline", {"copy_bytes": COPY_BYTES[options.device]}, iter([roofs(options.device)])
