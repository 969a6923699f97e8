"""Draws the method in one picture, docs/figures/method.png: layers, off-ramps, entropy, threshold, exits.

    python scripts/studies/method_figure.py [FILE]     a second

The background is opaque, so that a page may be light or dark.
"""

import sys
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon
from PIL import Image

MODEL, EXIT, HARD, INK, GREY = "#0072B2", "#008060", "#C05000", "#222222", "#6E6E6E"  # Okabe and Ito's colours
PALE = {MODEL: "#DCEBF5", EXIT: "#DDF1EA", HARD: "#FBE6D9", INK: "#F1F1F1"}
COLUMNS = {"1": 2.5, "2": 5.0, "N-1": 8.8, "N": 11.3}  # the middle of each layer's box
WIDTH, HEIGHT, EMBEDDINGS = 1.65, 0.8, 1.42  # of a box; the width of that of the embeddings
LAYER, OFF_RAMP, DECISION, OUTPUT = 1.9, 3.3, 4.8, 6.35  # the middle of each row
EASY, DIFFICULT = 0.85, 0.3  # the height of the two examples' paths


def box(axes, x: float, y: float, text: str, color: str, width: float = WIDTH) -> None:
    corner = (x - width / 2, y - HEIGHT / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": PALE[color], "edgecolor": color}
    axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, **style, linewidth=1.4))
    axes.text(x, y, text, ha="center", va="center", color=INK)


def decision(axes, x: float, y: float, text: str) -> None:
    corners = [(x - 0.95, y), (x, y + 0.6), (x + 0.95, y), (x, y - 0.6)]
    axes.add_patch(Polygon(corners, facecolor="white", edgecolor=INK, linewidth=1.2))
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=13)


def arrow(axes, start: tuple, end: tuple, color: str = INK, **style) -> None:
    look = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", end, start, arrowprops=look | style)


def draw_layer(axes, name: str, x: float) -> None:
    """A layer with what is above it: off-ramp, decision and exit; above the last layer the final classifier."""
    box(axes, x, LAYER, f"layer ${name}$", MODEL)
    arrow(axes, (x, LAYER + HEIGHT / 2), (x, OFF_RAMP - HEIGHT / 2), MODEL)
    if name == "N":
        box(axes, x, OFF_RAMP, "final\nclassifier", MODEL)
        arrow(axes, (x, OFF_RAMP + HEIGHT / 2), (x, OUTPUT - HEIGHT / 2), MODEL)
        box(axes, x, OUTPUT, "logits $z_N$", MODEL)
        return
    index = f"{{{name}}}"
    box(axes, x, OFF_RAMP, f"off-ramp ${name}$", EXIT)
    arrow(axes, (x, OFF_RAMP + HEIGHT / 2), (x, DECISION - 0.6), EXIT)
    axes.text(x + 0.1, (OFF_RAMP + DECISION) / 2 - 0.1, f"$z_{index}$", color=EXIT, va="center", fontsize=13)
    decision(axes, x, DECISION, f"$H(z_{index}) < \\tau$ ?")
    arrow(axes, (x, DECISION + 0.6), (x, OUTPUT - HEIGHT / 2), EXIT)
    axes.text(x + 0.1, DECISION + 0.85, "yes: exit", color=EXIT, va="center")
    box(axes, x, OUTPUT, f"logits $z_{index}$", EXIT)
    gate = x + 1.25  # between this layer and the next: "no" opens the way
    axes.plot(
        [x + 0.95, gate, gate], [DECISION, DECISION, LAYER + 0.12], color=GREY, linewidth=1.2, linestyle=(0, (4, 2))
    )
    axes.plot(gate, LAYER, "o", markersize=7, markerfacecolor="white", markeredgecolor=GREY, zorder=5)
    axes.text(gate + 0.08, (LAYER + DECISION) / 2 + 0.75, "no:\ngo on", color=GREY, va="center")


def draw_path(axes, y: float, end: float, name: str, about: str, color: str) -> None:
    """How far one text runs: a line from the first layer to where the text exits."""
    axes.text(0.65, y, name, color=color, ha="center", va="center")
    arrow(axes, (COLUMNS["1"] - WIDTH / 2, y), (end, y), color, linewidth=2.4)
    axes.text(end + 0.15, y, about, color=color, va="center")


def draw() -> Figure:
    figure = Figure(figsize=(11, 6), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.15, 12.5), ylim=(0, 6.95))
    axes.set_axis_off()
    box(axes, 0.65, LAYER, "embeddings", INK, width=EMBEDDINGS)
    for name, x in COLUMNS.items():
        draw_layer(axes, name, x)
    stops = [0.65 + EMBEDDINGS / 2, *(x + side * WIDTH / 2 for x in COLUMNS.values() for side in (-1, 1))]
    for start, end in zip(stops[::2], stops[1::2], strict=False):
        if end - start < 1:  # not across the dots
            arrow(axes, (start, LAYER), (end, LAYER), MODEL)
    middle = (COLUMNS["2"] + COLUMNS["N-1"]) / 2
    arrow(axes, (stops[4], LAYER), (middle - 0.25, LAYER), MODEL)
    axes.text(middle, LAYER, "$\\cdots$", ha="center", va="center", fontsize=16, color=MODEL)
    arrow(axes, (middle + 0.25, LAYER), (stops[5], LAYER), MODEL)
    draw_path(axes, EASY, COLUMNS["2"], "an easy text", "exits after layer 2; layers 3 to $N$ do not run", EXIT)
    draw_path(axes, DIFFICULT, COLUMNS["N"], "a hard text", "all layers", HARD)
    note = "$H$: entropy\n$\\tau$: threshold"
    axes.text(0, DECISION, note, va="center", fontsize=13, color=INK, linespacing=1.6)
    return figure


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs/figures/method.png"
    with mpl.rc_context({"font.size": 12, "mathtext.fontset": "cm"}):
        draw().savefig(drawn := BytesIO(), dpi=130)
    Image.open(drawn).convert("RGB").quantize(64).save(file, optimize=True)  # a palette: a third of the size
    print(file)


if __name__ == "__main__":
    main()
