"""This device's roofline, and where every measured operator stands under it.

It is a large copy and large square matmuls in every dtype the device multiplies.  The
picture's operators come from the result files of the same device; those that multiply stand in
the left panel (operations a byte against operations a second), all in the right one (share of the
copy).
"""

import json
from collections.abc import Iterator
from importlib import import_module
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
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#2c7a7b", "#d69e2e",
           "#e53e3e", "#4a5568")  # fmt: skip


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
    """The rows of our implementations on this device and as many threads, with their operator.

    ``flops`` are those of the case, so that rates are not the rounded ones of the file.
    """
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if (result.get("device"), result.get("threads")) != (device_name, threads):
            continue
        rows = [r for r in result["rows"] if r.get("impl") == "ours" and "copy_fraction" in r]
        counted = _counted(result["op"], "cuda" if result["driver"] else "cpu") if rows else {}
        for row in rows:
            flops = counted.get((row["shape"], row["dtype"]), 0)
            yield {"op": result["op"], **row, "flops": flops}


def _counted(op: str, device: str) -> dict[tuple[str, str], int]:
    """(shape, dtype) -> operations of every case of an operator."""
    operator = import_module(f"bench.ops.{op}").OPERATOR
    return {
        tuple(operator.name_of(case).values()): case.flops for case in operator.cases(device, False)
    }


def draw(rows: list[dict], points: list[dict], device_name: str, path: Path) -> None:
    """The picture: a colour is an operator in both panels, a ceiling is grey."""
    from mfd_fast.pictures.grids import INK, new_figure, plain_axis, write_png

    figure = new_figure(13.0, max(4.5, 0.17 * len(points) + 1.4))
    left, right = figure.subplots(1, 2)
    copy = next(row["gb_s"] for row in rows if row["kind"] == "copy")
    tops = {row["dtype"]: row["tflop_s"] for row in rows if row["kind"] == "product"}
    colours = dict(zip(sorted({point["op"] for point in points}), COLOURS * 2, strict=False))
    plain_axis(left)
    plain_axis(right)
    _roofline(left, copy, tops, [p for p in points if p["flops"]], colours)
    _shares(right, points, colours)
    figure.suptitle(f"{device_name}: fused operators under its ceilings", x=0.01, ha="left",
                    fontsize=11, color=INK)  # fmt: skip
    figure.tight_layout()
    write_png(figure, path)


def _roofline(axis, copy: float, tops: dict, points: list[dict], colours: dict) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    from mfd_fast.pictures.grids import FAINT, INK

    highest = max(top * 1e3 / copy for top in tops.values())
    ends = (min([1.0, *(p["flops"] / p["bytes_moved"] for p in points)]) / 2, 400 * highest)
    for style, (dtype, top) in zip(("-", "--", ":"), tops.items(), strict=False):
        ridge = top * 1e3 / copy
        axis.plot((ends[0], ridge, ends[1]), (ends[0] * copy, top * 1e3, top * 1e3), style,
                  color=FAINT, lw=1.4)  # fmt: skip
        axis.text(ends[1], top * 1.06e3, f"matmul {dtype}, {top * 1e3:.4g} GFLOP/s", ha="right",
                  fontsize=8, color=INK)  # fmt: skip
    axis.text(ends[0], ends[0] * copy * 12, f"copy, {copy:.3g} GB/s", fontsize=8, color=INK)
    seen = set()
    for point in points:
        label = None if point["op"] in seen else point["op"]
        seen.add(point["op"])
        marker = "o" if point["dtype"] == "float32" else "^"
        axis.plot(point["flops"] / point["bytes_moved"], point["flops"] / point["us"] * 1e-3,
                  marker, label=label, color=colours[point["op"]], ms=6)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte moved", fontsize=9)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("GFLOP/s", fontsize=9)
    axis.set_title("operators that multiply; circles float32, triangles 16-bit", fontsize=9,
                   loc="left")  # fmt: skip
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def _shares(axis, points: list[dict], colours: dict) -> None:
    names = [f"{p['op']}, {p['shape']}, {p['dtype']}" for p in points]
    places = range(len(points))
    axis.barh(places, [p["copy_fraction"] for p in points],
              color=[colours[p["op"]] for p in points])  # fmt: skip
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="#1f2933", lw=0.8)
    axis.set_xlabel("bytes a second / those of a large copy", fontsize=9)
    axis.set_title("all operators against the copy (beyond 1 the data were in cache)",
                   fontsize=9, loc="left")  # fmt: skip


def benchmark(options: Options) -> tuple[str, dict, Iterator[list[dict]]]:
    return "roofline", {"copy_bytes": COPY_BYTES[options.device]}, iter([roofs(options.device)])
