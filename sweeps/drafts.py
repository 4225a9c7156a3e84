"""A sweep file's rows as drafts: labels and what they set, not yet experiments.

Every kind of row is written out here, in the order of the table. See design.py for the rules.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import loader
from experiments.yaml_text import Located, Mark, Path_
from sweeps.fraction import Fraction
from sweeps.grammar import Replicated, Row, SweepFile, Tune


@dataclass(frozen=True)
class Change:
    """One dotted path, its new value, and where that is written."""

    path: str
    value: Any
    mark: Mark


@dataclass(frozen=True)
class Draft:
    """A variant before its experiment is checked; see `design.Variant`."""

    label: str
    group: str
    changes: tuple[Change, ...]
    mark: Mark
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Own:
    """The level of a factor that the base has already: nothing to set."""

    value: Any


@dataclass(frozen=True)
class Drafts:
    """Writes the rows of one sweep file out. `factors`: each factor's levels, the base's first."""

    located: Located
    file: SweepFile
    factors: Mapping[str, Sequence[Own | Change]]

    def __iter__(self) -> Iterator[Draft]:
        """Every row in the order of the table; products are not yet thinned by `exclude`."""
        f = self.file
        rows = [self.row("rows", i) for i in range(len(f.rows))]
        steps = [self.row("ladder", i) for i in range(len(f.ladder))]
        drafts = [self.baseline(), *rows]
        for i, step in enumerate(steps):
            kept = tuple(c for s in steps[: i + 1] for c in s.changes)
            drafts.append(Draft(step.label, "ladder", kept, step.mark))
        if f.leave_one_out:
            recipe = steps or [row for row in rows if not row.seeds]
            drafts += self.leave_one_out(recipe, has_full=bool(steps))
        if self.factors:
            drafts += self.factorial()
        drafts += self.product("grid", f.grid, itertools.product)
        for i, axes in enumerate(f.zip):
            drafts += self.product("zip", axes, zip, i)
        drafts += [self.row("include", i) for i in range(len(f.include))]
        yield from drafts
        if f.tune:
            yield from self.tune(f.tune, drafts)

    def place(self, *path: str | int) -> Mark:
        return self.located.mark(path)

    def baseline(self) -> Draft:
        changes = tuple(changes_at(self.located, ("baseline", "set")))
        levels = {path: shown_value(values[0]) for path, values in self.factors.items()}
        own = levels if levels and not changes else None  # it is the cell of the base's levels
        mark = self.place("baseline", "label")
        return Draft(self.file.baseline.label, "baseline", changes, mark, own)

    def row(self, group: str, index: int) -> Draft:
        row: Row = getattr(self.file, group)[index]
        changes = tuple(changes_at(self.located, (group, index, "set")))
        mark = self.place(group, index, "label")
        seeds = row.seeds if isinstance(row, Replicated) else None
        return Draft(row.label, group, changes, mark, seeds=seeds or ())

    def leave_one_out(self, steps: Sequence[Draft], has_full: bool) -> Iterator[Draft]:
        mark = self.place("leave_one_out")
        if not has_full:
            yield Draft("full", "leave_one_out", tuple(c for s in steps for c in s.changes), mark)
        for left in steps:
            kept = tuple(c for s in steps if s is not left for c in s.changes)
            yield Draft(f"full − {left.label.lstrip('+ ')}", "leave_one_out", kept, mark)

    def factorial(self) -> Iterator[Draft]:
        names = short_names(self.factors)
        fraction = fraction_of(self.file, self.factors)
        for cell in itertools.product(*self.factors.values()):
            if fraction and not fraction.has([isinstance(level, Change) for level in cell]):
                continue
            levels = {p: shown_value(level) for p, level in zip(self.factors, cell, strict=True)}
            label = ", ".join(f"{names[path]}={text}" for path, text in levels.items())
            changes = tuple(level for level in cell if isinstance(level, Change))
            mark = changes[0].mark if changes else self.place("factorial")
            yield Draft(label, "factorial", changes, mark, levels)

    def product(
        self, group: str, axes: Mapping[str, Sequence[Any]], combine: Any, *at: int
    ) -> Iterator[Draft]:
        """Rows of a grid (`combine` is itertools.product) or of a zip."""
        names = short_names(axes)
        for indexes in combine(*(range(len(values)) for values in axes.values())):
            changes = tuple(
                Change(path, values[i], self.place(group, *at, path))
                for (path, values), i in zip(axes.items(), indexes, strict=True)
            )
            label = ", ".join(f"{names[c.path]}={shown_value(c)}" for c in changes)
            if changes:
                yield Draft(label, group, changes, changes[0].mark)

    def tune(self, tune: Tune, drafts: Sequence[Draft]) -> Iterator[Draft]:
        """Each row at each value, but for those that set the tuned path themselves."""
        name = tune.over.rpartition(".")[2]
        for draft in drafts:
            if any(c.path == tune.over for c in draft.changes):
                continue
            for value in tune.values:
                change = Change(tune.over, value, self.place("tune", "over"))
                tuned = {"of": draft.label, "path": tune.over, "value": value}
                label = f"{draft.label} @ {name}={shown_value(value)}"
                changes = (*draft.changes, change)
                mark = change.mark
                yield Draft(label, "tune", changes, mark, tuned=tuned, seeds=draft.seeds)


def fraction_of(file: SweepFile, factors: Iterable[str]) -> Fraction | None:
    """The fraction of a factorial that a sweep file asks for, its factors by their short names."""
    return Fraction(tuple(short_names(factors).values()), file.fraction) if file.fraction else None


def changes_at(located: Located, where: Path_) -> Iterator[Change]:
    """What a `set:` says, as dotted paths, the shorter first; sections may be nested."""
    data: Any = located.data
    for key in where:
        data = data[int(key)] if isinstance(data, list) else data.get(key, {})

    def leaves(value: Mapping[str, Any], dotted: str, at: Path_) -> Iterator[Change]:
        for key, item in value.items():
            path = f"{dotted}.{key}" if dotted else key
            if isinstance(item, dict) and loader.section(tuple(path.split("."))):
                yield from leaves(item, path, (*at, key))
            else:
                yield Change(path, item, located.mark((*at, key)))

    yield from sorted(leaves(data, "", where), key=lambda c: c.path.count("."))


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path's last words, as many as tell them apart: `lr`, but `ffn.hidden`."""
    split = {path: path.split(".") for path in paths}
    names = {}
    for path, words in split.items():
        others = [w for p, w in split.items() if p != path]
        count = 1
        while count < len(words) and any(w[-count:] == words[-count:] for w in others):
            count += 1
        names[path] = ".".join(words[-count:])
    return names


def shown_value(value: Any) -> str:
    """A value as a label shows it: `rmsnorm`, `rmsnorm(eps=1e-06)`, `true`, `0.003`."""
    if isinstance(value, Own):
        inner = value.value
        return shown_value(inner["name"] if isinstance(inner, dict) and "name" in inner else inner)
    if isinstance(value, Change):
        return shown_value(value.value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        params = ", ".join(f"{k}={shown_value(v)}" for k, v in value.items() if k != "name")
        return f"{value['name']}({params})" if params else value["name"]
    return value if isinstance(value, str) else json.dumps(value)
