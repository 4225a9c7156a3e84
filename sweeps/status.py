"""Where runs stand: from their directories and, where they were submitted, from Slurm.

    manifest + run directories + scheduler.view ─ sweep_status ─ rows ─ render (terminal) or as_json

A result is the last word. A run works while its lock is held, which the kernel lets go with its
process. A running.json without a lock is what a killed process left behind: the run is interrupted
and can go on. For a run in Slurm's hands, Slurm tells what the directory can't: that it waits, or
how its job ended. Where Slurm no longer knows the job and the run gives no sign, it is `stale`:
nobody here knows better. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.registry import UserError
from experiments import scores
from experiments.record import FINISHED, Run, all_ids, id_parts, last_row, read_json, tail
from sweeps import manifest, queue, scheduler, stale, worker
from sweeps.queue import Place
from sweeps.scheduler import Answer, Element, View

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
STATES = ("done diverged running queued interrupted failed unscored stale pending").split()
STYLES = {"done": "green", "diverged": "yellow", "running": "cyan", "failed": "red"}
STYLES |= {"stale": "magenta"}
SILENT_SECONDS = 300.0  # a running run refreshes its record every few seconds
ASK_SECONDS = 15  # a site's scheduler is asked no more often, however often the screen is drawn
LOG_LINES = 5
MOST_ROWS = 100
ATTENTION = ("running", "interrupted", "failed", "unscored", "stale")


@dataclass(frozen=True)
class Row:
    """How far one run is; None where that is not known.

    Attributes:
        job: the Slurm job that it was last submitted in.
        note: why it waits, failed, diverged or was cut off, in one line.
        log: the last lines of its log, if it failed or nobody knows how it is.
        log_file: which log they are of: the run's, or Slurm's where the run printed nothing.
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
    job: str | None = None
    note: str | None = None
    log: tuple[str, ...] = ()
    log_file: str | None = None

    def as_json(self) -> dict[str, Any]:
        names = {"train_loss": "train/loss", "val_loss": "val/loss"}
        return {names.get(k, k): v for k, v in vars(self).items()}


def sweep_status(root: Path, record: Mapping[str, Any], view: View | None = None) -> list[Row]:
    """A row for each run of a manifest, in the order in which they are run."""
    jobs = list(manifest.jobs(record))
    view = view or unfinished(root, jobs)
    return [read(root, job, record["name"], view) for job in jobs]


def all_status(root: Path, view: View | None = None) -> list[Row]:
    """A row for each run of every sweep, and for each run that belongs to none."""
    records = manifest.all_of(root)[0]
    ids = all_ids(root)
    view = view or unfinished(root, all_jobs(root, records))
    rows: dict[str, Row] = {}
    for record in records:
        for row in sweep_status(root, record, view):
            rows.setdefault(row.id, row)
    for id in ids:
        if id not in rows:
            seed = id_parts(id)[1]
            number = int(seed) if seed.isdecimal() else 0
            rows[id] = read(root, manifest.Job(id, number, "", {}), None, view)
    return list(rows.values())


def all_jobs(root: Path, records: Iterable[Mapping[str, Any]]) -> list[manifest.Job]:
    """Every run of these manifests, and every other one below `root`."""
    planned = [job for record in records for job in manifest.jobs(record)]
    rest = {*all_ids(root), *queue.places(root)} - {job.id for job in planned}
    return [*planned, *(manifest.Job(id, 0, "", {}) for id in sorted(rest))]


def unfinished(root: Path, jobs: Iterable[manifest.Job]) -> View:
    """What Slurm says of those of these runs with which something is left to do."""
    return scheduler.view(root, {job.id for job in jobs if not manifest.finished(root, job)})


def read(root: Path, job: manifest.Job, sweep: str | None, view: View | None = None) -> Row:
    """One run's row. A damaged record is told in its note: one run hides no other."""
    run = Run(root, job.id)
    place = view.places.get(job.id) if view else None
    number: str | None = None
    try:
        state, note = manifest.state(root, job), None
        if view and place and (array := view.answer.job(place.submission)):
            number = place.element(array)
        if view and place and state not in FINISHED:
            state, note = in_queue(run, state, place, view.answer)
        known: dict[str, Any] = {}
        if state in FINISHED or (run / "result.json").exists():
            known = finished(read_json(run / "result.json"))
            if state == "unscored":
                lacking = ", ".join(scores.lacking(run, job.experiment["evaluation"]))
                known["note"] = scores.failure(run) or f"not scored yet: {lacking}"
            elif state == "done" and not job.experiment:  # of no sweep: what it wants is not known
                known["note"] = known["note"] or scores.failure(run)
            elif state == "running":
                known |= {"pid": run.live().get("pid"), "note": "trained; its tasks are scored"}
        elif state == "running":
            known = running(run.live())
        elif state != "pending":
            known = stopped(run, state)
        known["note"] = note or known.get("note")
    except (UserError, ValueError, TypeError) as error:
        state, known = "failed", {"note": str(error)}
    known.setdefault("steps", planned_steps(job.experiment))
    if state in ("failed", "stale"):
        known |= last_lines(run, place, number)
    return Row(job.id, state, job.label or None, job.seed, sweep, job=number, **known)


def in_queue(run: Run, state: str, place: Place, answer: Answer) -> tuple[str, str | None]:
    """The state of an unfinished run that was submitted to Slurm, and a note to it."""
    element, array = answer.of(place), answer.job(place.submission)
    live = run.live()
    if element is None and array is not None:
        element = scheduler.last_words(place, array)
    if state == "unscored" and not (element and (element.waiting or element.active)):
        return state, None
    if element is None:
        never = array is None and answer.silence is None  # its submission did not reach Slurm
        if state in ("running", "failed") or never or (state == "interrupted" and not live):
            return state, None  # what a run leaves behind when it ends in good order
        if manifest.cancel_marker(run.root, place.submission.sweep).exists():
            return state, None
        if live and time.time() - live.get("updated", 0) < SILENT_SECONDS:
            return "running", None
        if answer.foreign(place.submission):
            return "queued", f"on the Slurm {place.submission.slurm}: ask there, this is another"
        job = f"job {place.element(array)}" if array else "its job"
        return "stale", answer.silence or f"{job} is no longer in the queue and left no result"
    if element.waiting:
        return "queued", " ".join(filter(None, (f"job {element.job}:", waits_for(element))))
    if element.state == "COMPLETING":
        return "running", f"job {element.job} is ending"
    if element.active:
        old = place.submission.time
        if state == "failed" and (run / "failure.json").stat().st_mtime > old:
            return state, None  # the others of its pack go on
        alive = live.get("job") == element.job and live.get("updated", 0) > old
        if state == "running" or alive:
            return "running", None
        what = "starting" if len(place.submission.tasks[place.index]) == 1 else "not begun"
        return "queued", f"job {element.job} on {element.nodes}: {what}"
    if state == "running" or element.state == "COMPLETED":
        return state, None
    if state == "failed" and element.state != "OUT_OF_MEMORY":
        return state, None  # its process could say why itself
    if element.code.startswith(f"{worker.INTERRUPTED}:"):
        return state, None  # it saved and left when it was asked to
    cancelled = element.state in ("CANCELLED", "PREEMPTED", "REVOKED")
    return "interrupted" if cancelled else "failed", scheduler.cause(element, place.submission)


def last_lines(run: Run, place: Place | None, number: str | None) -> dict[str, Any]:
    """The end of a run's log, or of Slurm's where the run came to print nothing."""
    logs = [run / "log.txt"]
    if place is not None and number is not None:
        logs.append(place.log(number.partition("_")[0]))
    for path in logs:
        if lines := tail(path, LOG_LINES):
            return {"log": tuple(lines), "log_file": str(path)}
    return {}


def waits_for(element: Element) -> str:
    """Slurm's reason in words that a person reads."""
    why = element.why.strip("()")
    if "held" in why.lower():
        return f"held ({why}); free it with: scontrol release {element.job}"
    return "" if why in ("None", "") else why


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
    if state == "failed" and (run / "failure.json").exists():
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
    """The rows for a terminal; of very many, those that somebody may have to look after."""
    from rich.table import Table
    from rich.text import Text

    caption = None
    if len(rows) > MOST_ROWS:
        every = len(rows)
        rows = [row for row in rows if row.state in ATTENTION][:MOST_ROWS]
        caption = f"… and {every - len(rows)} more; all of them: --json"
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=None,
        header_style="bold", pad_edge=False,
    )  # fmt: skip
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


def failures(rows: Sequence[Row]) -> list[str]:
    """Why each failed run failed, where its log is, and the log's last lines."""
    lines: list[str] = []
    for row in rows:
        if row.state in ("failed", "unscored", "stale"):
            if len(lines) > MOST_ROWS:
                return [*lines, "… and more: --json has them all"]
            who = row.id if row.label is None else f"{row.label} s{row.seed}"
            where = f"  ({row.log_file})" if row.log_file else ""
            lines.append(f"{row.state}: {who}: {row.note}{where}")
            lines += [f"    {line[:200]}" for line in row.log]
    return lines


def command(root: Path, name: str | None, *, as_json: bool = False, watch: bool = False) -> None:
    """Prints where the runs of a sweep, or all runs, stand; with `watch`, until they have ended."""
    from rich.console import Console

    record = manifest.load(root, name) if name is not None else None
    title = record["name"] if record else None
    asked: list[tuple[float, View]] = []

    def look() -> list[Row]:
        if not asked or time.monotonic() - asked[-1][0] > ASK_SECONDS:
            records = [record] if record else manifest.all_of(root)[0]
            jobs = manifest.jobs(record) if record else all_jobs(root, records)
            asked[:] = [(time.monotonic(), unfinished(root, jobs))]
        view = asked[-1][1]
        return sweep_status(root, record, view) if record else all_status(root, view)

    def shown(rows: Sequence[Row]) -> Table:
        return render(rows, f"{title or root}: {summary(rows)}")

    for line in stale.lines(record) if record else ():
        print(line, file=sys.stderr)
    for damage in manifest.all_of(root)[1] if record is None else ():
        print(f"passed over: {damage}", file=sys.stderr)
    rows = look()
    tty = sys.stdout.isatty()
    console = Console(width=None if tty else 120)
    if watch:
        rows = follow(look, shown, console if tty and not as_json else None)
    silence = asked[-1][1].answer.silence
    if as_json:
        data = globals()["as_json"](rows, title) | {"silence": silence}
        print(json.dumps(data, indent=1, ensure_ascii=False))
        return
    console.print(shown(rows))
    if silence:
        print(f"Slurm gives no answer: {silence}", file=sys.stderr)
    for line in failures(rows):
        print(line)


def follow(look: Any, shown: Any, console: Any) -> list[Row]:
    """Looks every second until no run works or waits; draws it where there is a console."""
    from rich.live import Live

    def looks() -> Iterator[list[Row]]:
        while True:
            rows = look()
            yield rows
            if not any(row.state in ("running", "queued", "pending") for row in rows):
                return
            time.sleep(1.0)

    if console is None:
        return list(looks())[-1]
    rows: list[Row] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for rows in looks():
            live.update(shown(rows), refresh=True)
    return rows
