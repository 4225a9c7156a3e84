"""One page on a sweep: its table, its figures, what each row says and how to make it again.

    runs/sweeps/<name>-report/
        index.html      all of it, by itself: no network, no script, light and dark
        figures/        each figure as SVG, PDF, PNG and CSV

Written from the run directories alone; the same runs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis import commands, figures, methods, reading, render, task_items
from analysis import report_tables as its
from analysis.comparison import Comparison
from analysis.factorial import Factorial, factorial
from analysis.figures import drawing as drawings
from analysis.figures.drawing import Drawing
from analysis.figures.effects import verdict_text
from analysis.results import one_line
from analysis.table import Table
from analysis.wording import (
    listed,
    seeds_text,
)
from experiments.record import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
MOST_TASKS = 12  # that are shown item by item


@dataclass
class Section:
    """One heading and what stands under it, in this order."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Mapping[str, Any]] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = ()
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")

    @property
    def empty(self) -> bool:
        return not (self.text or self.tables or self.figures or self.rows or self.facts)


def write(
    comparison: Comparison,
    record: Mapping[str, Any],
    root: Path,
    folder: Path,
    changed: str | None = None,
) -> list[Path]:
    """Writes the report on a sweep into `folder`; returns the paths, the page first.

    Args:
        comparison: with its curves read.
        record: the manifest as written.
        root: where its runs lie.
        changed: one line where the sweep file says something else than when it ran.

    Raises:
        UserError: a record is damaged, or a file can't be written.
    """
    made = figures.draw(comparison, root)
    page = html(comparison, record, root, made, changed)
    paths = [path for each in made for path in drawings.write(each, folder / "figures")]
    write_atomically(folder / "index.html", page, durable=False)
    return [folder / "index.html", *paths]


def html(
    comparison: Comparison,
    record: Mapping[str, Any],
    root: Path,
    made: Sequence[Drawing],
    changed: str | None = None,
) -> str:
    """The page. See `write`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    manifest = comparison.manifest
    return environment.get_template("report.html").render(
        title=manifest.name,
        description=manifest.description,
        headline=reading.headline(comparison),
        warnings=[f"Note: {changed}."] if changed else [],
        sections=[s for s in _sections(comparison, record, root, made, changed) if not s.empty],
    )


def _sections(
    comparison: Comparison,
    record: Mapping[str, Any],
    root: Path,
    made: Sequence[Drawing],
    changed: str | None,
) -> list[Section]:
    crossed = factorial(comparison)
    some = comparison.largest(figures.MOST_ROWS)
    tasks = task_items.tasks(comparison)
    by_item = task_items.read(some, root, tasks[:MOST_TASKS])
    shown = {drawing.name: drawing for drawing in made}

    def these(*names: str) -> list[Mapping[str, Any]]:
        return [_figure(shown[name]) for name in names if name in shown]

    sections = [
        Section(
            "Results",
            text=_left_out(comparison, some),
            tables=_tables(its.first(comparison)),
            figures=these("differences"),
        ),
        Section("The ladder", figures=these("ladder")),
        Section(
            "Factors",
            text=_factorial_text(crossed),
            tables=_tables(its.shares(crossed)),
            figures=these("effects", "interactions"),
        ),
        Section("Tuning", tables=_tables(its.tries(some)), figures=these("sensitivity")),
        Section("Row by row", rows=[*_rows(some, record, root, changed is not None)]),
        Section("Training", figures=these("curves-tokens", "curves-flops", "curves-time")),
        Section(
            "Cost",
            tables=_tables(its.costs(some), its.budgets(some)),
            figures=these("cost"),
        ),
        Section("Beyond the training length", figures=these("lengths", "positions")),
        Section(
            "Tasks, item by item",
            text=[*task_items.sentences(some, by_item), *_more_tasks(tasks)],
            tables=_tables(its.items(some, by_item)),
        ),
        Section(
            "Noise",
            text=list(_noise(comparison)),
            tables=_tables(its.tests(some), its.power(some)),
        ),
        Section("What failed", facts=list(_failures(comparison))),
        Section("Methods", facts=list(methods.methods(comparison))),
        Section("Provenance", facts=list(_provenance(comparison, record))),
    ]
    _number(sections)
    return sections


def _number(sections: Iterable[Section]) -> None:
    """Tables and figures count from 1, in the order of the page."""
    for kind in ("tables", "figures"):
        everything = [each for section in sections for each in getattr(section, kind)]
        for number, each in enumerate(everything, 1):
            each["number"] = number


def _figure(drawing: Drawing) -> dict[str, Any]:
    from markupsafe import Markup

    svg = drawings.inline(drawing)
    files = ("svg", "pdf", "png", "csv")
    # Ours: matplotlib escapes what people wrote in it.
    return {"drawing": drawing, "svg": Markup(svg), "width": drawings.pixels(svg), "files": files}


def _tables(*made: Table | None) -> list[Mapping[str, Any]]:
    from markupsafe import Markup

    found: list[Mapping[str, Any]] = []
    for table in made:
        if table is None:
            continue
        whole = re.sub(r"<caption>.*?</caption>", "", render.html(table), flags=re.DOTALL)
        body, _, notes = whole.partition("</table>")  # what it says stands below, with its number
        found.append(
            {"html": Markup(f"{body}</table>"), "caption": table.caption, "notes": Markup(notes)}
        )
    return found


def _rows(
    comparison: Comparison, record: Mapping[str, Any], root: Path, changed: bool
) -> Iterator[Mapping[str, Any]]:
    written = {one_line(row["label"]): row for row in record["rows"]}
    for row in comparison.rows:
        yield {
            "label": row.label,
            "verdict": row.verdict.replace(" ", "-"),
            "said": verdict_text(row),
            "text": " ".join(reading.sentences(comparison, row)),
            "differences": row.read.differences,
            "command": commands.train(record, written[row.read.label], root, changed=changed),
        }


def _left_out(comparison: Comparison, some: Comparison) -> list[str]:
    count, shown = len(comparison.rows) - 1, len(some.rows) - 1
    said = (
        f"The sweep has {count:,} rows beside the baseline. All are in the table below; figures and"
        f" all else of this page show the {shown} that differ most from it."
    )
    return [said] * (shown < count)


def _more_tasks(tasks: Sequence[str]) -> list[str]:
    more = f"Another {len(tasks) - MOST_TASKS} tasks are in: run.py table SWEEP --columns items."
    return [more] * (len(tasks) > MOST_TASKS)


def _noise(comparison: Comparison) -> Iterator[str]:
    noise = comparison.noise
    if noise is None or noise.sd is None:
        return
    yield (
        f"{comparison.baseline.label} differs from itself by an sd of {noise.sd:.4f} nats over"
        f" {noise.n} seeds. Pairing by seed takes out of a difference what both sides share."
    )


def _factorial_text(found: Factorial | None) -> list[str]:
    if found is None:
        return []
    gaps = [f"Cells that do not count: {listed(found.missing)}."] if found.missing else []
    return [*gaps, *found.notes]


def _failures(comparison: Comparison) -> Iterator[tuple[str, str]]:
    for row in comparison.rows:
        told = [
            f"seed {seed} diverged at step {run.result.get('diverged_step')} ({run.reason})"
            for seed, run in row.diverged.items()
        ]
        told += [
            f"seed {seed} failed: {run.reason or 'no reason recorded'}"
            for seed, run in row.waiting.items()
            if run.state == "failed"
        ]
        if others := [seed for seed, run in row.waiting.items() if run.state != "failed"]:
            told.append(f"{seeds_text(others)} without a result")
        told += [f"seed {seed} does not count: {why}" for seed, why in row.excluded.items()]
        if row.tuning:
            told += [
                f"{attempt.diverged} of {attempt.planned} seeds diverged at"
                f" {row.tuning.path} {attempt.value:g}"
                for i, attempt in enumerate(row.tuning.tries)
                if attempt.diverged and i != row.tuning.chosen
            ]
        if told:
            yield row.label, "; ".join(told) + "."


def _provenance(comparison: Comparison, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    runs = [run for row in comparison.rows for run in row.runs.values()]
    yield "Made with", commands.again(record)
    count = f"{comparison.started} started"
    for number, word in ((comparison.diverged, "diverged"), (comparison.failed, "failed"),
                         (comparison.edited, "edited since")):  # fmt: skip
        count += f", {number} {word}" * bool(number)
    yield "Runs", count
    if comparison.commits:
        yield "Code", listed(comparison.commits)
    libraries = {
        f"{name} {version}"
        for run in runs
        for name, version in (run.result.get("versions") or {}).items()
        if version
    }
    if libraries:
        yield "Libraries", listed(sorted(libraries))
    if data := {str(run.result["data"]) for run in runs if run.result.get("data")}:
        yield "Data", f"fingerprint {listed(sorted(data))}"
    for mixed in comparison.mixed:
        values = [f"{value}: {listed(labels)}" for value, labels in mixed.values.items()]
        yield f"Not alike: {mixed.key}", "; ".join(values)
    floors = {f for row in comparison.rows for f in row.by_seed("floor/loss").values()}
    if floors:
        yield "Floor", f"{min(floors):.4f} nats per token: the corpus's own entropy"
