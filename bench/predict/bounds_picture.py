"""The table of ``bench.predict.issue`` as a picture: a row a launch, a column a card."""

from pathlib import Path

COLOURS = {
    "copy": "#cfe8d5",
    "issue": "#f6c9b1",
    "pipe": "#f3e2a9",
    "matmul": "#c9d9f2",
    "latency": "#e3d3ee",
}


def draw(rows: list[dict], cards: list[str], path: Path) -> None:
    """Microseconds of every kernel, shape and card, coloured by the bound that holds."""
    from matplotlib.colors import to_rgb

    from mfd_fast.pictures.grids import INK, new_figure, write_png

    places = list(dict.fromkeys((r["shape"], r["at"], r["kernel"]) for r in rows))
    found = {(r["shape"], r["at"], r["card"]): r for r in rows}
    figure = new_figure(9.0, 0.19 * len(places) + 1.6)
    axis = figure.subplots()
    cells = [[found.get((shape, at, card)) for card in cards] for shape, at, _ in places]
    axis.imshow(
        [[to_rgb(COLOURS[r["bound"]] if r else "white") for r in line] for line in cells],
        aspect="auto",
    )
    for y, line in enumerate(cells):
        for x, r in enumerate(line):
            text = f"{r['bound_us']:.1f}   {r['waves']:.1f} waves" if r else "no such type"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=INK)
    axis.set_xticks(range(len(cards)), cards, fontsize=9)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(places)), [f"{s}: {k}" for s, _, k in places], fontsize=7)
    axis.tick_params(length=0)
    for y in range(1, len(places)):
        if places[y][0] != places[y - 1][0]:
            axis.axhline(y - 0.5, color=INK, lw=0.8)
    marks = [axis.plot([], [], "s", color=c, ms=9, label=name)[0] for name, c in COLOURS.items()]
    figure.legend(handles=marks, ncols=len(marks), loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(
        "Lower bounds in microseconds, predicted from machine code; colour: which bound holds",
        x=0.01, ha="left", fontsize=10, color=INK,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    write_png(figure, path)
