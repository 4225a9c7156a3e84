"""The words of a sweep file, checked: what may stand where, before any of it is expanded."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from components.registry import Closed, did_you_mean
from experiments import hints, loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError, Located, Path_
from sweeps.fraction import GENERATORS, SHARES

GIVEN = ("data", "evaluation", "training.tokens")  # the same for all tries of a `tune`
MOST_ROWS = 5000  # a product past this, and past max_runs, is refused before it is written out

Label = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Axes = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]


def number(value: Any) -> float:
    """What a tune may try: something that lies between others."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(
            f"should be a number, got {loader.shorten(value)}; what is no number can be compared "
            "with grid or factorial"
        )
    return value


class Row(Closed):
    """A label and what it sets."""

    label: Label
    set: dict[str, Any] = Field(default_factory=dict)


class Replicated(Row):
    """A row that may have seeds of its own, as many as the sweep: the n-th of the one stands
    against the n-th of the other, with other batches and other initial values."""

    seeds: Annotated[tuple[Seed, ...] | None, Field(min_length=1)] = None


class Baseline(Closed):
    """The row that all others are compared with."""

    label: Label = "baseline"
    set: dict[str, Any] = Field(default_factory=dict)


class Tune(Closed):
    """Each variant tried at several values of one number; its own value is a try too.

    The try with the lowest mean `tuning/loss` stands for the variant in the table.
    """

    over: str
    values: Annotated[tuple[Annotated[Any, AfterValidator(number)], ...], Field(min_length=1)]


class SweepFile(Closed):
    """The words of a sweep file."""

    base: str
    name: str | None = None
    description: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    baseline: Baseline = Baseline()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    rows: tuple[Replicated, ...] = ()
    ladder: tuple[Row, ...] = ()
    leave_one_out: bool = False
    factorial: Axes = Field(default_factory=dict)
    fraction: Literal["1/2", "1/4", "1/8"] | None = None
    grid: Axes = Field(default_factory=dict)
    zip: tuple[Axes, ...] = ()
    include: tuple[Replicated, ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    match: Literal["params", "flops", "time"] | None = None
    tune: Tune | None = None
    max_runs: Annotated[int, Field(ge=1)] = 200


def parse(located: Located) -> SweepFile:
    """The mapping of a sweep file against its schema.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    data = located.data
    if isinstance(data.get("zip"), dict):  # one mapping is a list of one
        data["zip"] = [data["zip"]]
        moved = {("zip", 0, *p[1:]): m for p, m in located.marks.items() if p[:1] == ("zip",)}
        located.marks.update(moved)
    hints.expect(located, "a sweep")
    file = check(SweepFile, located)
    lines = [*_twice(located, ("seeds",), file.seeds), *_own_seeds(located, file)]
    for i, axes in enumerate(file.zip):
        lengths = {path: len(values) for path, values in axes.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{path} has {n}" for path, n in lengths.items())
            lines.append(
                f"{located.mark(('zip', i))}: zip: lists side by side need one length: {told}"
            )
    steps = len(file.ladder or [row for row in file.rows if row.seeds is None])
    if file.leave_one_out and steps < 2:
        lines.append(
            f"{located.mark(('leave_one_out',))}: leave_one_out: needs two or more steps in ladder "
            f"(or rows) to leave one out of, got {steps}"
        )
    lines += _fraction(located, file)
    lines += _tune(located, file.tune) if file.tune else ()
    cells = math.prod(map(len, file.factorial.values()))
    rows = math.prod(map(len, file.grid.values())) * bool(file.grid)
    rows += cells * bool(file.factorial and not file.fraction)
    rows *= 1 + len(file.tune.values) if file.tune else 1
    if rows > max(MOST_ROWS, file.max_runs):
        lines.append(too_many(located, file, rows))
    if lines:
        raise ConfigError(*lines)
    return file


def _twice(located: Located, path: Path_, seeds: tuple[int, ...]) -> Iterator[str]:
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            yield f"{located.mark((*path, i))}: seeds: {seed} is given twice"


def _tune(located: Located, tune: Tune) -> Iterator[str]:
    """What is wrong with a tune before its tries are experiments."""
    if any(f"{tune.over}.".startswith(f"{path}.") for path in GIVEN):
        yield (
            f"{located.mark(('tune', 'over'))}: tune: {tune.over} is what all rows are given or "
            "judged by, not to be chosen for each; tune how the model is made or trained"
        )
    for i, value in enumerate(tune.values):
        if value in tune.values[:i]:
            yield f"{located.mark(('tune', 'values', i))}: tune: {value} is given twice"


def _fraction(located: Located, file: SweepFile) -> Iterator[str]:
    """What is wrong with a fraction before its factors' levels are known."""
    if file.fraction is None:
        return
    mark, count = located.mark(("fraction",)), len(file.factorial)
    if not file.factorial:
        yield f"{mark}: fraction: of what? there is no factorial beside it"
    elif (count, SHARES[file.fraction]) not in GENERATORS:
        most = max(k for k, _ in GENERATORS)
        least = min(k for k, p in GENERATORS if p == SHARES[file.fraction])
        yield (
            f"{mark}: fraction: {file.fraction} of {count} factors is no tabled design; "
            f"it takes {least} to {most} factors"
        )


def _own_seeds(located: Located, file: SweepFile) -> Iterator[str]:
    """What is wrong with the seeds of single rows."""
    for group in ("rows", "include"):
        for i, row in enumerate(getattr(file, group)):
            if row.seeds is None:
                continue
            path = (group, i, "seeds")
            yield from _twice(located, path, row.seeds)
            if len(row.seeds) != len(file.seeds):
                yield (
                    f"{located.mark(path)}: seeds: '{row.label}' has {len(row.seeds)} of its own, "
                    f"the sweep has {len(file.seeds)}; give it as many, each stands against one"
                )
            for seed in set(row.seeds) & set(file.seeds):
                yield (
                    f"{located.mark(path)}: seeds: {seed} is one of the sweep's, and '{row.label}' "
                    "would share batches with another row's run; take others, 100 and up"
                )


def too_many(located: Located, file: SweepFile, rows: int) -> str:
    """The line that refuses a sweep of so many rows."""
    runs = rows * len(file.seeds)
    return (
        f"{located.mark(('max_runs',))}: max_runs: {rows} rows x {len(file.seeds)} seeds = {runs} "
        f"runs, more than {file.max_runs}; set max_runs: {runs} if you want them all"
    )


Schema = TypeVar("Schema", bound=Closed)


def check(schema: type[Schema], located: Located) -> Schema:
    """The mapping of a file against its schema.

    Raises:
        ConfigError: all that is wrong, one line each, in the order of the file.
    """
    try:
        return schema.model_validate_json(json.dumps(located.data), strict=True)
    except pydantic.ValidationError as error:
        found = sorted(error.errors(), key=lambda e: located.mark(tuple(e["loc"])).order)
        inner = {e["loc"][:-1] for e in found}  # a list counts as too short where an item is wrong
        found = [e for e in found if e["type"] != "too_short" or e["loc"] not in inner]
        lines = (_describe(schema, located, e) for e in found)
        raise ConfigError(*dict.fromkeys(lines)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{located.mark(())}: {error}") from None


def _describe(schema: type[Closed], located: Located, error: Any) -> str:
    """One error of such a schema as `file:line:col: dotted: what is wrong`."""
    path: Path_ = tuple(part for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        known = [*_schema_at(schema, path[:-1]).model_fields]
        message = f"unknown key '{path[-1]}'{_hint(str(path[-1]), known)}"
    elif error["type"] == WHOLE:
        message = error["msg"]
    else:
        return loader.describe(located, {**error, "loc": path})
    return f"{located.mark(path)}: {'.'.join(map(str, path))}: {message}"


def _hint(word: str, known: list[str]) -> str:
    """What follows `unknown key` in a sweep file: a setting of the experiment goes under `set`."""
    own = word in SweepFile.model_fields  # though not here
    if (
        "set" in known
        and not own
        and not difflib.get_close_matches(word, known, n=1, cutoff=hints.CLOSE)
    ):
        if word.partition(".")[0] in Experiment.model_fields:
            path = word if "." in word else f"{word}.…"
            return f" — a setting of the experiment goes under set: {{{path}: …}}"
        if (hint := hints.elsewhere({}, "", word, known)) is not None:
            return f" — {hint}{'' if hint in hints.ADVICE else '; in a sweep it goes under set'}"
    return did_you_mean(word, known)


WHOLE = "whole"  # type of errors whose message says all: no `, got …` follows


def wrong(message: str) -> PydanticCustomError:
    """What a validator of a schema raises for a message of its own."""
    return PydanticCustomError(WHOLE, "{message}", {"message": message})


def _schema_at(schema: type[Closed], path: Path_) -> type[Closed]:
    """The schema of the mapping at `path`: an index into a list of mappings leads no deeper."""
    for key in path:
        if isinstance(key, str):
            schema = next(_schemas_in(schema.model_fields[key].annotation))
    return schema


def _schemas_in(annotation: Any) -> Iterator[type[Closed]]:
    if isinstance(annotation, type) and issubclass(annotation, Closed):
        yield annotation
    for argument in get_args(annotation):
        yield from _schemas_in(argument)
