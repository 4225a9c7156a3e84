"""Any runs side by side: what they were told that differs, what came of each, and their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import curves, results
from analysis.curves import Curve
from analysis.figures.drawing import Drawing
from analysis.wording import NOT_RUN, short
from experiments import record, scores
from experiments.record import UserError
from experiments.yaml_text import read

if TYPE_CHECKING:
    from rich.console import RenderableType

NUMBERS = (  # key of result.json, what to call it
    ("val/loss", "val loss"),
    ("val/bpb", "val bpb"),
    ("train/loss", "train loss"),
    ("tokens", "tokens"),
    ("parameters", "params"),
    ("flops_per_token", "FLOPs/token"),
    ("tokens_per_s", "tokens/s"),
    ("seconds", "seconds"),
    ("peak_memory_bytes", "peak memory"),
)
EXACT = ("val/loss", "val/bpb", "train/loss")  # the others are shown with three digits
LENGTHS = "val/loss@"


@dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
        settings: dotted path -> value of its resolved experiment, and `seed` where known.
        found: its state and result.
        curve: None where it was never evaluated, and where its record was edited.
    """

    id: str
    settings: Mapping[str, Any]
    found: results.Run
    curve: Curve | None


@dataclass(frozen=True)
class Compared:
    """Runs compared.

    Attributes:
        differences: dotted path -> each run's value; None where a run has no such setting.
        notes: what makes their losses incomparable, a sentence each.
    """

    sides: tuple[Side, ...]
    differences: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its files: the runs' ids, cut short where there are many."""
        ids = [side.id for side in self.sides]
        return "compared-" + "-".join(ids[:3]) + (f"-and-{len(ids) - 3}" if len(ids) > 3 else "")

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; the curves are in the figure's CSV."""
        return {
            "schema": 1,
            "runs": [
                {
                    "id": side.id,
                    "state": side.found.state,
                    "reason": side.found.reason or None,
                    **{key: side.found.result.get(key) for key, _ in _keys(self.sides)},
                    "scores": dict(side.found.scores),
                }
                for side in self.sides
            ],
            "differences": {path: list(values) for path, values in self.differences.items()},
            "notes": list(self.notes),
        }


def compare(runs: Sequence[record.Run]) -> Compared:
    """Two or more runs, finished or not, side by side.

    Raises:
        UserError: fewer than two, one of them twice, or a record is damaged.
    """
    if len(runs) < 2:
        raise UserError("comparing takes two runs or more; list them with: run.py status")
    ids = [run.id for run in runs]
    if twice := [run.id for i, run in enumerate(runs) if run.id in ids[:i]]:
        raise UserError(f"run {twice[0]} is named twice")
    sides = tuple(_side(run) for run in runs)
    paths = dict.fromkeys(path for side in sides for path in side.settings)
    told = {path: tuple(side.settings.get(path) for side in sides) for path in paths}
    return Compared(
        sides=sides,
        differences={path: values for path, values in told.items() if _differ(values)},
        notes=tuple(_notes(sides)),
    )


def _side(run: record.Run) -> Side:
    found = results.read_run(run.folder)
    settings = dict(_flat(read(run / "experiment.yaml").data))
    seed = record.id_parts(run.id)[1]
    if seed.isdecimal():
        settings["seed"] = int(seed)
    curve = curves.read(run.folder) if found.state != "edited" else None
    return Side(run.id, settings, found, curve)


def _flat(data: Mapping[str, Any], above: str = "") -> Sequence[tuple[str, Any]]:
    """(dotted path, value) of all that is no mapping; an empty mapping says nothing."""
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        path = f"{above}{key}"
        found += _flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, value)]
    return found


def _differ(values: Sequence[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _notes(sides: Sequence[Side]) -> list[str]:
    notes = []
    for key, words in (("data", "other data"), ("floor/loss", "corpora of other entropy")):
        known = {str(v) for side in sides if (v := side.found.result.get(key)) is not None}
        if len(known) > 1:
            notes.append(f"The runs saw {words}: their losses per token can't be compared.")
            break
    tokens = {v for side in sides if (v := side.found.number("tokens")) is not None}
    if len(tokens) > 1:
        notes.append("The runs ended after other numbers of tokens.")
    source = {str(code.get("source")) for side in sides if (code := side.found.result.get("code"))}
    if len(source) > 1:
        notes.append("The runs were made with other code.")
    if edited := [side.id for side in sides if side.found.state == "edited"]:
        notes.append(
            f"Edited after it ended, so neither result nor curve is shown: {', '.join(edited)}."
        )
    return notes


def _keys(sides: Sequence[Side]) -> list[tuple[str, str]]:
    """The numbers that one of the runs has, and their names."""
    lengths = dict.fromkeys(
        key for side in sides for key in side.found.result if key.startswith(LENGTHS)
    )
    keys = [*NUMBERS, *((key, f"loss at {key.removeprefix(LENGTHS)}") for key in lengths)]
    return [(k, name) for k, name in keys if any(s.found.number(k) is not None for s in sides)]


def text(compared: Compared) -> RenderableType:
    """Two tables for a terminal: what differs, and what came of it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    sides = compared.sides

    def table(title: str, first: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        made.add_column(first, overflow="fold")
        for side in sides:
            made.add_column(Text(side.id), overflow="fold")
        return made

    told = table("Configuration: what differs", "setting")
    for path, values in compared.differences.items():
        told.add_row(Text(path), *(Text(NOT_RUN if v is None else _shown(v)) for v in values))
    came = table("Results", "")
    came.add_row("state", *(Text(_state(side)) for side in sides))
    for key, name in _keys(sides):
        came.add_row(name, *(Text(_number(side, key)) for side in sides))
    for task in dict.fromkeys(name for side in sides for name in side.found.scores):
        came.add_row(Text(task), *(Text(_score(side, task)) for side in sides))
    same = Text("The same configuration.") if not compared.differences else told
    return Group(same, Text(), came, *(Text(note, "yellow") for note in compared.notes))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _state(side: Side) -> str:
    reason = side.found.reason
    return f"{side.found.state}: {reason}" if reason else side.found.state


def _number(side: Side, key: str) -> str:
    value = side.found.number(key)
    if value is None:
        return NOT_RUN
    return f"{value:.4f}" if key in EXACT or key.startswith(LENGTHS) else short(value)


def _score(side: Side, task: str) -> str:
    known = {name: kept for name, kept in side.found.scores.items() if name == task}
    return scores.lines(known)[0][2] if known else NOT_RUN


def drawn(compared: Compared) -> Drawing | None:
    """Validation loss against training tokens, one line a run; None where none was evaluated."""
    from analysis.figures.drawing import End, blank, looks, name_ends, name_width, panel, style

    known = [
        (side, side.curve, look)
        for side, look in zip(compared.sides, looks(len(compared.sides)), strict=True)
        if side.curve is not None
    ]
    if not known:
        return None
    from matplotlib.ticker import EngFormatter

    ends = [min(float(curve.losses[-1]) for _, curve, _ in known)]
    ends += [float(curve.losses[len(curve.losses) // 3]) for _, curve, _ in known]
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    reach = max(float(curve.tokens[-1]) for _, curve, _ in known)
    with style():
        high = max(2.5, 0.5 + 0.15 * len(known))
        figure = blank(0.85 + 3.5 + name_width([side.id for side, _, _ in known]), high + 0.6)
        axes = panel(figure, 0.55, 0.45, 3.5, high)
        lowest = min(float(curve.losses.min()) for _, curve, _ in known)
        axes.set(xlim=(0, reach), ylim=(lowest - margin, max(ends) + margin),
                 xlabel="Training tokens", ylabel="Validation loss")  # fmt: skip
        for _, curve, look in known:
            axes.plot(curve.tokens, curve.losses, color=look.color, linestyle=look.dash,
                      linewidth=1.2)  # fmt: skip
            if len(curve.tokens) == 1:
                axes.plot(curve.tokens, curve.losses, "o", color=look.color, ms=4)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=5)
        name_ends(
            axes,
            [
                End(float(c.tokens[-1]), float(c.losses[-1]), s.id, look.color)
                for s, c, look in known
            ],
        )
    return Drawing(
        name=compared.name,
        title="Validation loss against training tokens",
        caption="One line a run.",
        columns=("run", "tokens", "seconds", "val_loss"),
        rows=[
            (side.id, int(tokens), None if curve.seconds is None else float(curve.seconds[i]),
             float(loss))
            for side, curve, _ in known
            for i, (tokens, loss) in enumerate(zip(curve.tokens, curve.losses, strict=True))
        ],
        figure=figure,
    )  # fmt: skip


def write(compared: Compared, folder: Path) -> list[Path]:
    """The curves as SVG, PDF, PNG and CSV in `folder`; nothing where there are none.

    Raises:
        UserError: they can't be written.
    """
    from analysis.figures import drawing

    made = drawn(compared)
    return drawing.write(made, folder) if made is not None else []
