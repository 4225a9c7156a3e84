"""A sweep as one run in wandb, beside those it is made of: its table, its figure, its curves.

Its config carries the sweep as it was planned, so that whoever has the project alone gets the same
table back (see wandb_runs.py), with what is still missing marked.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import figures, render, results
from analysis import table as tables
from analysis.comparison import compare
from experiments import tracking
from experiments import wandb_client as client
from experiments.record import UserError, hold_file, read_json, write_json
from experiments.tracking import Place, tag

LAYOUT = 1  # of what is logged; with another, every sweep is logged anew
PLANNED = ("label", "group", "parameters", "flops_per_token", "mismatch", "runs")


def remembered(root: Path, sweep: str) -> dict[str, Any]:
    """runs/wandb/<sweep>.json: the summary run's id, what its offline files hold, its report."""
    path = root / "wandb" / f"{sweep}.json"
    known = read_json(path) if path.exists() else {}
    return {"schema": 1, **known} if isinstance(known.get("id", ""), str) else {"schema": 1}


def remember(root: Path, sweep: str, **changes: Any) -> dict[str, Any]:
    known = {**remembered(root, sweep), **changes}
    write_json(root / "wandb" / f"{sweep}.json", known)
    return known


def summarise(root: Path, record: Mapping[str, Any], place: Place, *, patient: bool = True) -> str:
    """Logs the sweep's table and figure as one run, a row for each time that they have changed.

    Args:
        record: the sweep's manifest.
        patient: there is time to wait for the server.

    Returns:
        its address, or the folder of its files.

    Raises:
        Unreachable: wandb can't be used.
        UserError: a record is damaged.
    """
    with hold_file(root / "wandb" / f"{record['name']}.lock"):
        return _summarise(root, record, place, patient)


def _summarise(root: Path, record: Mapping[str, Any], place: Place, patient: bool) -> str:
    name = record["name"]
    known = remembered(root, name)
    if "id" not in known:
        known = remember(root, name, id=f"{name[:64]}-summary-{secrets.token_hex(3)}")
    offline, files = place.mode == "offline", client.files_of(root)
    kept = [folder for some in client.offline_of(files, known["id"]) for folder in some]
    with tempfile.TemporaryDirectory() as folder:
        found = gathered(root, record, Path(folder))
        same = (known.get("digest"), known.get("project")) == (found.digest, place.project)
        if offline and same and kept:
            return str(kept[0])
        with client.opened(
            place,
            id=known["id"],
            name=f"{name} table",
            job_type="summary",
            group=name,
            tags=(tag(f"sweep:{name}"), "summary"),
            config={},  # the server's own is compared before it is changed
            notes="\n\n".join((found.table.caption, *found.table.footnotes)),
            folder=root,
            patient=patient,
        ) as run:
            row = 0 if offline else run.starting_step
            logged = {"digest": found.digest, "rows": row}  # rows: or a refused one would count
            if not offline and {key: run.config.get(key) for key in logged} == logged:
                return str(run.url)
            run.log(shown(found), step=row, commit=True)
            run.summary.update(headline(found.table))
            run.config.update({**found.about, **logged, "rows": row + 1}, allow_val_change=True)
            new = Path(run.settings.sync_dir)
            client.leave_to_push(files, run, bool(known.get("online")))
    client.confirm(place, run, row + 1)
    client.settle(files, run)
    changes = {"digest": found.digest} if offline else {"digest": None, "online": True}
    remember(root, name, project=place.project, **changes)
    return f"{new if offline else run.url}{found.lacking}"


@dataclass(frozen=True)
class Gathered:
    """What is logged; `about` is for config, `digest` is another one if any of it changes."""

    table: tables.Table
    figure: Path | None
    curves: Mapping[str, tuple[list[float], list[float]]]
    about: Mapping[str, Any]
    digest: str
    lacking: str


def gathered(root: Path, record: Mapping[str, Any], folder: Path) -> Gathered:
    manifest = results.read_manifest(root / "sweeps" / f"{record['name']}.json")
    runs = results.read_runs(manifest, root)
    table, compared = tables.ablation_table(manifest, runs), compare(manifest, runs)
    figure, curves, drawn, lacking = None, {}, "", ""
    try:
        _, figure, numbers = figures.loss_curves(compared, root, folder / "figure")
        curves, drawn = figures.mean_curves(compared, root), numbers.read_text("utf-8")
    except UserError as error:  # the table stands without it
        lacking = f" (no figure: {error})"
    plan = {key: record.get(key) for key in ("match", "seeds", "tokens")}
    plan["rows"] = [{key: row.get(key) for key in PLANNED} for row in record["rows"]]
    about = {"sweep": record["name"], "caption": table.caption, "plan": plan}
    about["footnotes"] = list(table.footnotes)
    parts = json.dumps((LAYOUT, about, render.json_text(table), drawn))
    digest = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    return Gathered(table, figure, curves, about, digest, lacking)


def shown(found: Gathered) -> dict[str, Any]:
    """The row to log: the table's text and then its numbers, the figure, and the mean curves."""
    import wandb

    table, curves = found.table, found.curves
    numbers = [
        (i, name)  # a column, and a detail of its cells or None for their value
        for i, column in enumerate(table.columns[1:], 1)
        for name in (None, *column.details)
    ]
    columns: list[str | int] = [column.title for column in table.columns]
    columns += ["group", *("/".join(filter(None, (table.columns[i].key, n))) for i, n in numbers)]
    rows = [
        [
            *(f"{cell.text} {cell.mark}".strip(f" {tables.FIGURE_SPACE}") for cell in row.cells),
            row.group,
            *(row.cells[i].details.get(n) if n else row.cells[i].value for i, n in numbers),
        ]
        for row in table.rows
    ]
    row: dict[str, Any] = {"ablation": wandb.Table(columns=columns, data=rows)}
    if found.figure is not None:
        row["figure"] = wandb.Image(str(found.figure), caption=table.title)
    if curves:
        row["curves"] = wandb.plot.line_series(
            xs=[list(tokens) for tokens, _ in curves.values()],
            ys=[list(losses) for _, losses in curves.values()],
            keys=list(curves),
            title="Validation loss, mean over seeds",
            xname="Training tokens",
        )
    return row


def headline(table: tables.Table) -> dict[str, Any]:
    """What stands in wandb's own table of runs: how much is done, and each variant's Δ."""
    places = {column.key: i for i, column in enumerate(table.columns)}
    seeds = [row.cells[places["seeds"]] for row in table.rows]
    deltas = {
        str(row.cells[0].value): row.cells[places["delta_val_loss"]] for row in table.rows[1:]
    }
    return {
        "sweep/done": sum(int(cell.value or 0) for cell in seeds),
        "sweep/diverged": sum(int(cell.details["diverged"] or 0) for cell in seeds),
        "sweep/planned": sum(int(cell.details["planned"] or 0) for cell in seeds),
        **{f"delta/{label}": cell.value for label, cell in deltas.items()},
    }


def main() -> None:
    """`python -m analysis.wandb_summary RUNS SWEEP`, for `tracking.bring_table`."""
    root = Path(sys.argv[1])
    code = 0
    try:
        record = read_json(root / "sweeps" / f"{sys.argv[2]}.json")
        where = tracking.place(record["rows"][0]["experiment"].get("tracking"))
        print(
            f"wandb: table: {summarise(root, record, where, patient=False)}" if where else "",
            flush=True,
        )
    except UserError as error:
        print(f"wandb: no table: {error}", file=sys.stderr, flush=True)
        code = 1
    client.tidy()
    os._exit(code)  # wandb's own end might wait for its server


if __name__ == "__main__":
    main()
