"""Attempts at a run: which directory belongs to an experiment's text as it is now.

A run's id says its settings, its code and its seed, not its text: what the text *is* stands in the
run's record, as the fingerprint of the prepared data, and is compared before a result is reused.
Where it is another, or where a run is asked for again (`--redo`), a new attempt is made beside the
old ones, which stay as they are:

    runs/<id>/      the first attempt
    runs/<id>.2/    the second, and so on

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.data import Dataset, cache_key, load, prepare, recorded
from experiments.loader import own_code
from experiments.record import Run, UserError, id_parts, read_json
from experiments.schema import Experiment


def data_of(run: Run) -> Mapping[str, Any] | None:
    """What a run's provenance says of its prepared data; None where the run has not begun."""
    if not (run / "provenance.json").exists():
        return None
    known = read_json(run / "provenance.json").get("data")
    return known if isinstance(known, dict) else {}


class Attempts:
    """The attempts below a folder of runs, and which of them belongs to an experiment's text.

    Each text is hashed once, and prepared only where its key differs from a recorded one: because
    it was read by other code, which may well give the same.
    """

    def __init__(self, root: Path, progress: bool = False) -> None:
        self.root, self.progress = root, progress
        self._now: dict[str, tuple[str, str | None] | UserError] = {}
        self._ids: dict[str, list[str]] = {}
        for path in root.iterdir() if root.is_dir() else ():
            self._ids.setdefault(path.name.partition(".")[0], []).append(path.name)

    def of(self, id: str) -> list[Run]:
        """The attempts at a run that there are, the newest first; the first one's id is `id`."""
        newest = sorted(self._ids.get(id, ()), key=lambda n: id_parts(n)[2], reverse=True)
        return [Run(self.root, name) for name in newest if (self.root / name).is_dir()]

    def choose(self, experiment: Experiment, id: str, *, redo: bool = False) -> Run:
        """The attempt to be trained or reused: the newest with the text as it is now, or a new one.

        Where the text can't be read any more, nothing contradicts the newest attempt.

        Args:
            id: the first attempt's.
            redo: a new one, whatever there is; one that has not begun counts as new.

        Raises:
            UserError: a record is damaged.
        """
        every = self.of(id)
        for run in every:
            if not (run / "provenance.json").exists():
                return run
            if redo:
                break
            try:
                if self.same(experiment, run):
                    return run
            except UserError:
                return run
        return self.following(id)

    def following(self, id: str) -> Run:
        """The attempt to come after those that there are; `id` is that of any of them."""
        first = id.partition(".")[0]
        every = self.of(first)
        return Run(self.root, f"{first}.{id_parts(every[0].id)[2] + 1}" if every else first)

    def same(self, experiment: Experiment, run: Run) -> bool:
        """Whether a run's recorded data is that of this experiment as it is now.

        Raises:
            UserError: its text can't be read, or the record.
        """
        key, now = self._text(experiment)
        if now is None:  # not prepared, at least not by this code
            if (data_of(run) or {}).get("folder") == key:
                return True
            prepared = prepare(experiment.data, self.root / "data", progress=self.progress)
            now = prepared.fingerprint
            self._now[repr(experiment.data)] = key, now
        then = (
            read_json(run / "result.json").get("data") if (run / "result.json").exists() else None
        )
        return now == (then or (data_of(run) or {}).get("fingerprint"))

    def _text(self, experiment: Experiment) -> tuple[str, str | None]:
        """The key of an experiment's prepared text, and its fingerprint where it is prepared."""
        said = repr(experiment.data)
        if said not in self._now:
            try:
                key = cache_key(experiment.data)
                self._now[said] = key, fingerprint(self.root / "data" / key)
            except UserError as error:
                self._now[said] = error
        found = self._now[said]
        if isinstance(found, UserError):
            raise found
        return found


def fingerprint(folder: Path) -> str | None:
    """That of prepared data; None where it is not there, or not whole."""
    with contextlib.suppress(UserError):
        return load(folder).fingerprint
    return None


def others(experiment: Experiment, run: Run) -> list[tuple[Run, str]]:
    """Runs of the same settings and seed that have begun with other text or other code of the
    experiment's own, and in words what has changed."""
    who, seed, _ = id_parts(run.id)
    found = [(other, "the data") for other in Attempts(run.root).of(f"{who}-s{seed}")]
    settings, _, code = who.partition("-")
    if code:
        files = ", ".join(sorted(file.name for file in own_code(experiment)))
        for path in sorted(run.root.glob(f"{settings}-*-s{seed}*")):
            parts = id_parts(path.name)
            if parts[0] != who and parts[1] == seed:
                found.append((Run(run.root, path.name), f"the code of {files}"))
    return [(other, what) for other, what in found if other.id != run.id and data_of(other)]


def explain(experiment: Experiment, run: Run, *, redo: bool = False) -> list[str]:
    """What is to be said before a new attempt begins: which runs it does not go on with, and why.

    Raises:
        UserError: one of them was interrupted, and this might be taken for going on with it.
    """
    if data_of(run) is not None:
        return []
    lines = []
    for other, what in others(experiment, run):
        state = other.state
        if state in ("interrupted", "running") and not redo:
            raise UserError(
                f"{other.folder}: {what} has changed since this run began, and it is {state}; "
                "restore it to go on, or train from the start beside it: --redo"
            )
        lines.append(f"{other.folder}: {state}; {what} has changed since, training {run.id}")
    return lines


def data_for(run: Run, experiment: Experiment, progress: bool) -> Dataset:
    """The prepared data of a run that is to be trained or gone on with.

    Where the text can't be read any more, a run that has begun goes on with what it recorded.

    Raises:
        UserError: neither is there.
    """
    cache = run.root / "data"
    try:
        return prepare(experiment.data, cache, progress=progress)
    except UserError:
        known = data_of(run)
        if known is not None:
            with contextlib.suppress(UserError):
                return recorded(cache, known, str(run.folder))
        raise
