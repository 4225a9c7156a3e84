"""What a sweep's runs were made from, beside its settings: code of one's own, and text.

Both are written into the manifest when a sweep is planned, so that `status` and `table` can say,
without torch, that they have changed since. `plan` and `sweep` go by the ids of the runs: changed
code gives another id, changed text another attempt, which are trained beside the old ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import source
from components.registry import UserError, did_you_mean
from experiments.record import Run, disk_error, id_parts

if TYPE_CHECKING:
    from experiments.schema import Experiment
    from sweeps.design import Sweep
    from sweeps.status import Row


def code_of(experiment: Experiment) -> dict[str, str]:
    """The imported files that an experiment uses, and their digests; not those of packages."""
    from experiments.loader import own_code

    known = own_code(experiment)
    return {str(p): code for p, code in known.items() if _code(str(p)) == code}


def _code(path: str) -> str | None:
    return source.digest(source.closure(Path(path))) if Path(path).is_file() else None


def text_of(experiments: Iterable[Experiment]) -> dict[str, list[Any]]:
    """The local files that corpora read: [bytes, time of change in ns, digest] of each. Nothing of
    those that can't be read now."""
    found: dict[str, list[Any]] = {}
    seen = set()
    for experiment in experiments:
        corpus = experiment.data.corpus
        if (said := repr(corpus)) in seen:
            continue
        seen.add(said)
        try:
            for path, digest in getattr(corpus.build(), "sources", dict)().items():
                status = path.stat()
                found[str(path.resolve())] = [status.st_size, status.st_mtime_ns, digest]
        except (UserError, OSError):
            continue
    return found


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each file of code or text that is not what a sweep's manifest was planned with."""
    again = f"python run.py sweep {record['file']} trains them again, beside the old runs"
    labels: dict[str, list[str]] = {}
    for row in record["rows"]:
        for path, code in (row.get("code") or {}).items():
            labels.setdefault(f"{path}\0{code}", []).append(row["label"])
    for key, rows in labels.items():
        path, _, code = key.partition("\0")
        if _code(path) not in (None, code):
            who = ", ".join(f"'{label}'" for label in rows)
            yield f"stale: {who}: {path}, or what it imports, has changed since; {again}"
    changed = [path for path, known in (record.get("text") or {}).items() if _differs(path, known)]
    if changed:
        more = f" and {len(changed) - 1} more files" if changed[1:] else ""
        yield f"stale: {record['name']}: its text has changed since ({changed[0]}{more}); {again}"


def _differs(path: str, known: list[Any]) -> bool:
    """Whether a file is there and holds something else."""
    try:
        status = Path(path).stat()
    except OSError:
        return False
    if [status.st_size, status.st_mtime_ns] == known[:2]:
        return False
    from components.text_files import digest

    return digest(Path(path)) != known[2]


def replaced(root: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each row of a new manifest whose begun runs in the one before are of other code or
    text, so that it is trained again."""
    from sweeps import manifest

    try:
        before = manifest.load(root, record["name"])["rows"]
    except UserError:
        return
    old = {row["label"]: row["runs"] for row in before}
    for row in record["rows"]:
        runs = [(old.get(row["label"], {}).get(seed), id) for seed, id in row["runs"].items()]
        gone = [(then, now) for then, now in runs if then and then != now and _begun(root, then)]
        code = [then for then, now in gone if _settings(then) == _settings(now)]
        if not code:
            continue
        texts = [then for then, now in gone if id_parts(then)[:2] == id_parts(now)[:2]]
        files = ", ".join(Path(path).name for path in row.get("code") or {}) or "its code"
        what = "an earlier attempt, or other text" if texts else f"another version of {files}"
        yield (
            f"stale: '{row['label']}': {len(code)} of its runs are of {what}; trained again, and "
            f"kept as they are ({', '.join(code[:3])}{', …' if code[3:] else ''})"
        )


def chosen(sweep: Sweep, redo: bool, labels: Collection[str], seeds: Collection[int]) -> set[str]:
    """The ids of a sweep's runs that are to be done again.

    Raises:
        UserError: a label or a seed that the sweep does not have, or one of them without `redo`.
    """
    _check_asked(redo, labels, seeds, [v.label for v in sweep.variants], sweep.seeds)
    return {
        id
        for variant in (sweep.variants if redo else ())
        for seed, id in sweep.runs(variant).items()
        if (not labels or variant.label in labels) and (not seeds or seed in seeds)
    }


def _check_asked(
    redo: bool,
    labels: Collection[str],
    seeds: Collection[int],
    known: Sequence[str],
    known_seeds: Sequence[int],
) -> None:
    if not redo and (labels or seeds):
        raise UserError("--row and --seed say what to train again: write --redo with them")
    for label in labels:
        if label not in known:
            raise UserError(f"--row: no row '{label}'{did_you_mean(label, [*known])}")
    for seed in seeds:
        if seed not in known_seeds:
            raise UserError(
                f"--seed: {seed} is none of the sweep's ({', '.join(map(str, known_seeds))})"
            )


def rows_to_redo(
    root: Path,
    record: Mapping[str, Any],
    freed: Sequence[Row],
    redo: bool,
    labels: Collection[str],
    seeds: Collection[int],
) -> list[Row]:
    """The runs of a manifest to be trained again: those that `retry` takes up (`freed`), or all
    that are named.

    Raises:
        UserError: as `chosen`; or one of them runs or waits.
    """
    from sweeps import status

    _check_asked(redo, labels, seeds, [row["label"] for row in record["rows"]], record["seeds"])
    if not labels and not seeds:
        return list(freed)
    rows = [
        row
        for row in status.sweep_status(root, record)
        if (not labels or row.label in labels) and (not seeds or row.seed in seeds)
    ]
    busy = [row for row in rows if row.state in ("running", "queued")]
    if busy:
        raise UserError(
            f"{busy[0].label} s{busy[0].seed} is {busy[0].state}; stop it first: "
            f"run.py cancel {record['name']}"
        )
    return rows


def with_new_attempts(
    root: Path, record: Mapping[str, Any], ids: Collection[str]
) -> dict[str, Any]:
    """A manifest in which new attempts stand for these runs."""
    from experiments.attempts import Attempts

    attempts = Attempts(root)
    new = {id: attempts.following(id).id for id in ids}
    rows = [
        {**row, "runs": {seed: new.get(id, id) for seed, id in row["runs"].items()}}
        for row in record["rows"]
    ]
    return {**record, "rows": rows}


def open_attempts(root: Path, record: Mapping[str, Any]) -> None:
    """Makes the folders of new attempts that were asked for, which stand for their runs from now
    on, whether or not they come to begin.

    Raises:
        UserError: the disk refuses.
    """
    for row in record["rows"]:
        for id in row["runs"].values():
            if id_parts(id)[2] > 1:
                try:
                    (root / id).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise disk_error(error, root / id) from error


def check(record: Mapping[str, Any], ids: Collection[str]) -> None:
    """Runs that are to be gone on with are of the code and text as they are now.

    Raises:
        UserError: they are not; a line for each file.
    """
    rows = [row for row in record["rows"] if set(row["runs"].values()) & set(ids)]
    if wrong := list(lines({**record, "rows": rows})) if rows else []:
        raise UserError("\n".join(f"{line}; put it back to go on" for line in wrong))


def _settings(id: str) -> tuple[str, str]:
    identity, seed, _ = id_parts(id)
    return identity.partition("-")[0], seed


def _begun(root: Path, id: str) -> bool:
    return (Run(root, id) / "provenance.json").exists()
