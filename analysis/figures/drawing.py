"""What every figure has in common: how it looks, and the files that it becomes.

A `Drawing` is a figure with its own numbers beside it. Written twice, its files are the same byte
for byte. In a page its letters are the page's letters and its colours are CSS variables, so that
it follows the reader's choice of light or dark.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from experiments.record import UserError

# Okabe and Ito 2008, Color Universal Design. Black is the baseline's; yellow is lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))  # the palette again, for more than 6 variants
INK, GREY, FAINT, RULE, PAPER = "#000000", "#666666", "#B3B3B3", "#E6E6E6", "#FFFFFF"
BETTER, WORSE = PALETTE[0], PALETTE[1]
VARIABLES = {  # what a page may redefine
    INK: "ink", GREY: "grey", FAINT: "faint", RULE: "rule", PAPER: "paper",
    **{colour: f"c{i}" for i, colour in enumerate(PALETTE, 1)},
}  # fmt: skip
NAMED_AT_MOST = 9  # variants that a picture of curves tells apart; the others are grey
LONGEST = 36  # letters of a name
SMALL = 7  # points, of notes beside the marks
LINE = 0.135  # inches from one name to the next
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "svg.hashsalt": "ceteris",
    "pdf.fonttype": 42,  # letters stay letters
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
}


class Look(NamedTuple):
    """How one variant is drawn, in every figure of its sweep."""

    color: str
    dash: Any


@dataclass(frozen=True)
class Drawing:
    """A figure, what it says in words, and its numbers: `rows` under the names in `columns`."""

    name: str  # of its files, without an ending
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    figure: Any


def looks(count: int) -> list[Look]:
    """One look for each row: the baseline's first, then the palette."""
    n = len(PALETTE)
    return [
        Look(PALETTE[(i - 1) % n], DASHES[(i - 1) // n % len(DASHES)]) if i else Look(INK, "-")
        for i in range(count)
    ]


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib as it ships, and our few settings; to draw in, and to write in."""
    import matplotlib

    with (
        matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | STYLE),  # type: ignore[arg-type]
        warnings.catch_warnings(),
    ):
        # A label's emoji becomes a box in PDF and PNG; a page has its reader's own fonts.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield


def blank(width: float, height: float) -> Any:
    """An empty figure (inches)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def panel(figure: Any, left: float, bottom: float, width: float, height: float, **more: Any) -> Any:
    """Axes at a place given in inches."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, bottom / high, width / wide, height / high), **more)


def shortened(label: str) -> str:
    """A label that leaves room for the figure."""
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def name_width(labels: Sequence[str]) -> float:
    """Inches that the longest of these names takes at most."""
    return 0.062 * max((len(shortened(label)) for label in labels), default=0) + 0.05


def write(drawing: Drawing, folder: Path) -> list[Path]:
    """The drawing as .svg, .pdf, .png and .csv in `folder`; returns their paths.

    Raises:
        UserError: they can't be written.
    """
    return save(drawing, folder / drawing.name, (".svg", ".pdf", ".png", ".csv"))


def save(drawing: Drawing, stem: Path, endings: Sequence[str]) -> list[Path]:
    """The drawing as `stem` + each of `endings`; returns the paths. Raises as `write`."""
    paths = [stem.with_name(stem.name + ending) for ending in endings]
    unsaid: dict[str, dict[str, None]] = {
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
        ".png": {"Software": None},
    }
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with style():
            for ending, path in zip(endings, paths, strict=True):
                if ending == ".csv":
                    path.write_text(csv_text(drawing), encoding="utf-8")
                else:
                    drawing.figure.savefig(path, dpi=200, metadata=unsaid[ending])
    except OSError as error:
        raise UserError(f"{stem}: the figure can't be written: {error.strerror}") from error
    return paths


def csv_text(drawing: Drawing) -> str:
    """The drawing's numbers at full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(drawing.columns)
    writer.writerows(drawing.rows)
    return out.getvalue()


def inline(drawing: Drawing) -> str:
    """The drawing as an `<svg>` to stand in a page, in the page's letters and colours."""
    import matplotlib

    out = io.StringIO()
    with style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        drawing.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids must be the only ones of the page: those that something points at get the figure's name.
    targets = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', svg))
    svg = re.sub(
        r' id="([\w.-]+)"',
        lambda m: f' id="{drawing.name}-{m[1]}"' if m[1] in targets else "",
        svg,
    )
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = re.sub(
        r"(: )(#[0-9a-f]{6})",
        lambda m: m[1] + (f"var(--{VARIABLES[c]}, {c})" if (c := m[2].upper()) in VARIABLES else c),
        svg,
    )
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    box = re.findall(r'viewBox="([^"]+)"', svg)[0]
    rest = svg[svg.index(">") + 1 :].replace("xlink:href", "href").strip()
    return f'<svg role="img" aria-label="{escape(drawing.title)}" viewBox="{box}">\n{rest}'


def pixels(svg: str) -> int:
    """The width of an inline drawing at its own size, in the pixels of CSS."""
    return round(float(re.findall(r'viewBox="\S+ \S+ (\S+) ', svg)[0]) * 96 / 72)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights apart to at least `gap`, each block kept about its own mean.

    The least-squares answer (pool adjacent violators); nothing goes below 0.
    """
    blocks: list[list[float]] = []  # [sum of (height - position·gap), count]
    for i, height in enumerate(heights):
        blocks.append([height - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [max(total / count, 0.0) for total, count in blocks for _ in range(int(count))]
    return [start + i * gap for i, start in enumerate(starts)]


class End(NamedTuple):
    """Where a variant's drawing ends, in the axes' data, and the name to write beside it."""

    x: float
    y: float
    name: str
    color: str


def name_ends(axes: Any, ends: Sequence[End]) -> None:
    """Names at the right, moved apart to a line's height, each with a thin leader from its end."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    scale = axes.transData + axes.transAxes.inverted()
    places = [scale.transform((min(max(e.x, left), right), min(max(e.y, low), high))) for e in ends]
    order = sorted(range(len(ends)), key=lambda i: (places[i][1], -i))
    inches = axes.get_position().height * axes.figure.get_figheight()
    heights = spread([float(places[i][1]) for i in order], LINE / inches)
    reach = axes.get_position().width * axes.figure.get_figwidth()
    tip, text = 1 + 0.16 / reach, 1 + 0.2 / reach
    for i, y in zip(order, heights, strict=True):
        place = {"transform": axes.transAxes, "clip_on": False}
        x_end = float(places[i][0]) + 0.05 / reach
        axes.plot([x_end, tip], [float(places[i][1]), y], color=FAINT, linewidth=0.5, zorder=1,
                  **place)  # fmt: skip
        axes.text(text, y, shortened(ends[i].name), color=ends[i].color, va="center",
                  parse_math=False, **place)  # fmt: skip
