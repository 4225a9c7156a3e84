"""Where runs stand, read from their directories alone; and stopping or freeing them.

    manifest + run directories ─ sweep_status ─ rows ─ render (terminal) or as_json

A run works while its lock is held, which the kernel lets go with its process. A running.json
without a lock is what a killed process left behind: the run is interrupted and can go on.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.registry import UserError
from experiments.record import FINISHED, Run, all_ids, last_row, read_json, write_atomically
from sweeps import manifest

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
STATES = ("done", "diverged", "running", "interrupted", "failed", "pending")
STYLES = {"done": "green", "diverged": "yellow", "running": "cyan", "failed": "red"}
SILENT_SECONDS = 300.0  # a running run refreshes its record every few seconds


@dataclass(frozen=True)
class Row:
    """How far one run is; None where that is not known.

    Attributes:
        note: why it failed, diverged or was cut off, in one line.
    """

    id: str
    state: str
    label: str | None = None
    seed: int | None = None
    sweep: str | None = None
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    pid: int | None = None
    host: str | None = None
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        names = {"train_loss": "train/loss", "val_loss": "val/loss"}
        return {names.get(k, k): v for k, v in vars(self).items()}


def sweep_status(root: Path, record: Mapping[str, Any]) -> list[Row]:
    """A row for each run of a manifest, in the order in which they are run."""
    return [read(root, job, record["name"]) for job in manifest.jobs(record)]


def all_status(root: Path) -> list[Row]:
    """A row for each run of every sweep, and for each run that belongs to none."""
    rows: dict[str, Row] = {}
    for record in manifest.all_of(root)[0]:
        for row in sweep_status(root, record):
            rows.setdefault(row.id, row)
    for id in all_ids(root):
        if id not in rows:
            seed = id.rpartition("-s")[2]
            number = int(seed) if seed.isdecimal() else 0
            rows[id] = read(root, manifest.Job(id, number, "", {}), None)
    return list(rows.values())


def read(root: Path, job: manifest.Job, sweep: str | None) -> Row:
    """One run's row. A damaged record is told in its note: one run hides no other."""
    run = Run(root, job.id)
    try:
        state, known = run.state, {}
        if state in FINISHED:
            known = finished(read_json(run / "result.json"))
        elif state == "running":
            known = running(run.live())
        elif state != "pending":
            known = stopped(run, state)
    except (UserError, ValueError, TypeError) as error:
        state, known = "failed", {"note": str(error)}
    known.setdefault("steps", planned_steps(job.experiment))
    return Row(job.id, state, job.label or None, job.seed, sweep, **known)


def finished(result: Mapping[str, Any]) -> dict[str, Any]:
    known = {k: result.get(k) for k in ("step", "tokens_per_s", "seconds")}
    losses = {"train_loss": result.get("train/loss"), "val_loss": result.get("val/loss")}
    steps = {"steps": result.get("step")} if result.get("status") == "done" else {}
    return {**known, **losses, **steps, "note": result.get("reason")}


def running(live: Mapping[str, Any]) -> dict[str, Any]:
    known = {k: live.get(k) for k in ("step", "tokens_per_s", "seconds_left", "pid", "host")}
    known |= {"train_loss": live.get("train/loss"), "val_loss": live.get("val/loss")}
    if live.get("steps"):
        known["steps"] = live["steps"]
    now = time.time()
    if live.get("started") is not None:
        known["seconds"] = now - live["started"]
    if live and (silent := now - live["updated"]) > SILENT_SECONDS:
        known["note"] = f"no sign for {duration(silent)}"
    return known


def stopped(run: Run, state: str) -> dict[str, Any]:
    last = last_row(run / "metrics.jsonl") or {}
    note = None
    if state == "failed":
        note = str(read_json(run / "failure.json").get("error"))
    elif live := run.live():
        note = f"cut off: process {live.get('pid')} on {live.get('host')} is gone"
    known = {"step": last.get("step"), "train_loss": last.get("train/loss")}
    return {**known, "val_loss": last.get("val/loss"), "note": note}


def planned_steps(experiment: Mapping[str, Any]) -> int | None:
    """Steps of a resolved experiment, as its schema counts them."""
    training = experiment.get("training", {})
    with contextlib.suppress(KeyError, ZeroDivisionError):
        return int(training["tokens"] // (training["seq_len"] * training["global_batch_size"]))
    return None


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Runs in each state that occurs, in a fixed order."""
    found = Counter(row.state for row in rows)
    return {state: found[state] for state in STATES if found[state]}


def summary(rows: Sequence[Row]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts(rows).items()) or "no runs"


def as_json(rows: Sequence[Row], name: str | None = None) -> dict[str, Any]:
    runs = [row.as_json() for row in rows]
    return {"schema": SCHEMA, "sweep": name, "counts": counts(rows), "runs": runs}


def render(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    sweeps = {row.sweep for row in rows}
    if len(sweeps) > 1:
        table.add_column("sweep", no_wrap=True)
    table.add_column("run", overflow="fold")
    for name in ("seed", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "tokens/s", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1, overflow="fold")
    for row in rows:
        cells = [
            Text(row.label or row.id),
            Text("" if row.seed is None else str(row.seed)),
            Text(row.state, STYLES.get(row.state, "")),
            Text(progress(row)),
            Text(loss(row)),
            Text(f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else ""),
            Text(duration(row.seconds_left)),
            Text(row.note or "", "dim"),
        ]
        table.add_row(*([Text(row.sweep or "")] if len(sweeps) > 1 else []), *cells)
    return table


def progress(row: Row) -> str:
    return "" if row.step is None else f"{row.step}/{row.steps}" if row.steps else str(row.step)


def loss(row: Row) -> str:
    """The validation loss, or that of training until there is one."""
    if row.val_loss is not None:
        return f"val {row.val_loss:.3f}"
    return "" if row.train_loss is None else f"train {row.train_loss:.3f}"


def duration(seconds: float | None) -> str:
    """`41 s`, `3:20`, `2:05:00`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def failures(root: Path, record: Mapping[str, Any]) -> str:
    """A line for each failed run of a sweep: why, and where its log is."""
    return "\n".join(
        f"failed: {row.label} s{row.seed}: {row.note}  ({Run(root, row.id) / 'log.txt'})"
        for row in sweep_status(root, record)
        if row.state == "failed"
    )


def command(root: Path, name: str | None, *, as_json: bool = False, watch: bool = False) -> None:
    """Prints where the runs of a sweep, or all runs, stand; with `watch`, until they have ended."""
    from rich.console import Console

    record = manifest.load(root, name) if name is not None else None
    title = record["name"] if record else None

    def look() -> list[Row]:
        return sweep_status(root, record) if record else all_status(root)

    def shown(rows: Sequence[Row]) -> Table:
        return render(rows, f"{title or root}: {summary(rows)}")

    for damage in manifest.all_of(root)[1] if record is None else ():
        print(f"passed over: {damage}", file=sys.stderr)
    rows = look()
    tty = sys.stdout.isatty()
    console = Console(width=None if tty else 120)
    if watch:
        rows = follow(look, shown, console if tty and not as_json else None)
    if as_json:
        print(json.dumps(globals()["as_json"](rows, title), indent=1, ensure_ascii=False))
    elif not (watch and tty):
        console.print(shown(rows))


def follow(look: Any, shown: Any, console: Any) -> list[Row]:
    """Looks every second until no run works or waits; draws it where there is a console."""
    from rich.live import Live

    def looks() -> Iterator[list[Row]]:
        while True:
            rows = look()
            yield rows
            if not any(row.state in ("running", "pending") for row in rows):
                return
            time.sleep(1.0)

    if console is None:
        return list(looks())[-1]
    rows: list[Row] = []
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for rows in looks():
            live.update(shown(rows), refresh=True)
    return rows


# --- stopping and freeing ------------------------------------------------------------------------


def cancel_marker(root: Path, name: str) -> Path:
    """While this file is there, no executor on any host starts or goes on with the sweep's runs."""
    return root / "sweeps" / f"{name}.cancelled"


def cancel(root: Path, record: Mapping[str, Any], *, dry_run: bool = False) -> list[str]:
    """Stops a sweep: asks its running runs to save and end, and lets no more start.

    Returns:
        What was done (or would be), a line for each run and one for those that wait.
    """
    rows = [row for row in sweep_status(root, record) if row.state not in FINISHED]
    waiting = sum(row.state != "running" for row in rows)
    lines = []
    if rows and not dry_run:
        write_atomically(cancel_marker(root, record["name"]), "")
    for row in rows:
        if row.state != "running":
            continue
        run, who = Run(root, row.id), f"{row.label} s{row.seed} ({row.id})"
        here = row.host == socket.gethostname()
        if here and row.pid is not None and holds(row.pid, run):
            if not dry_run:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row.pid, signal.SIGTERM)
            lines.append(f"{who}: process {row.pid} saves a checkpoint and stops")
        elif row.host is None or here:
            lines.append(f"{who}: starting; its sweep stops it")
        else:
            lines.append(f"{who}: on {row.host}, process {row.pid}: its sweep there stops it")
    if waiting:
        lines.append(f"{record['name']}: {waiting} more not started, until it is run again")
    return lines


def holds(pid: int, run: Run) -> bool:
    """Whether this process has the run's lock file open: its number may be another's by now."""
    import psutil

    lock = str((run / "lock").resolve())
    try:
        return any(file.path == lock for file in psutil.Process(pid).open_files())
    except psutil.Error:
        return False


def retry(root: Path, record: Mapping[str, Any], *, dry_run: bool = False) -> list[str]:
    """Frees the failed and interrupted runs of a sweep to be run again; a line for each."""
    rows = [r for r in sweep_status(root, record) if r.state in ("failed", "interrupted")]
    if not dry_run:
        cancel_marker(root, record["name"]).unlink(missing_ok=True)
        for row in rows:
            (Run(root, row.id) / "failure.json").unlink(missing_ok=True)
    return [
        f"{row.id}  {row.label} s{row.seed}  {row.state}{f': {row.note}' if row.note else ''}"
        for row in rows
    ]
