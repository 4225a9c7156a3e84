"""A sweep file to its variants: checked experiments, each the base with a named difference.

    file ─ yaml_text.read ─ SweepFile (pydantic) ─ drafts (label, changes) ─ variants (experiments)

`set:` and the command line change the base of every row; `baseline.set` only the baseline's. What
a row sets lies over that: a component is replaced whole, `model.ffn.hidden` changes one parameter.

    rows           one change at a time from the base
    ladder         cumulative: each step keeps those above it
    leave_one_out  the full recipe (the ladder's steps, or else all rows) but for one step each
    factorial      every combination of levels, the base's own level among them
    grid, zip      every combination of values; values taken side by side
    include        rows written out
    exclude        drops the combinations (factorial, grid, zip, tune) that match all it says
    tune           each variant again at each of some values, to be compared at its own best

Seeds are replicates, crossed with everything, and never a row. A combination that is the baseline
is not repeated: the baseline's row stands for it. Rows of leave_one_out, factorial and tune may
have runs in common with others; anything else that is the same experiment twice is an error.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from components.registry import Closed, did_you_mean
from experiments import loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError, Located, Mark, Path_, read, shown

PRESETS = Path(__file__).parent / "presets"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MOST_DRAFTS = 5000  # past this a product is refused before it is written out
SHARING = ("leave_one_out", "factorial", "tune")  # groups that may have runs of other rows
PRODUCTS = ("factorial", "grid", "zip", "tune")  # groups that `exclude` thins out

Label = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
Axes = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]


class Row(Closed):
    """A label and what it sets."""

    label: Label
    set: dict[str, Any] = {}


class Baseline(Closed):
    """The row that all others are compared with."""

    label: Label = "baseline"
    set: dict[str, Any] = {}


class Tune(Closed):
    """Each variant tried at several values of one setting; its own value is a try too."""

    over: str
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    by: str = "val/loss"


class SweepFile(Closed):
    """The words of a sweep file."""

    base: str
    name: str | None = None
    description: str = ""
    set: dict[str, Any] = {}
    baseline: Baseline = Baseline()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    rows: tuple[Row, ...] = ()
    ladder: tuple[Row, ...] = ()
    leave_one_out: bool = False
    factorial: Axes = {}
    grid: Axes = {}
    zip: tuple[Axes, ...] = ()
    include: tuple[Row, ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    match: Literal["params", "flops"] | None = None
    tune: Tune | None = None
    max_runs: Annotated[int, Field(ge=1)] = 200


@dataclass(frozen=True)
class Variant:
    """One row: an experiment, how it differs from the base, and where that is written.

    Attributes:
        levels: of a factorial's rows (and the baseline): the level of each factor, as text.
        tuned: of a tune's rows: {"of": the variant's label, "path": …, "value": …}.
    """

    label: str
    group: str
    changes: Mapping[str, Any]
    experiment: Experiment
    mark: Mark
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None

    def run_id(self, seed: int) -> str:
        return loader.run_id(self.experiment, seed)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. The first variant is the baseline; `base` is what rows are changes of."""

    name: str
    file: Path
    description: str
    base: Experiment
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    match: Literal["params", "flops"] | None
    tune: Tune | None
    overrides: tuple[str, ...] = ()

    @property
    def baseline(self) -> Variant:
        return self.variants[0]


@dataclass(frozen=True)
class Change:
    """One dotted path, its new value, and where that is written."""

    path: str
    value: Any
    mark: Mark


@dataclass(frozen=True)
class Draft:
    """A variant before its experiment is checked."""

    label: str
    group: str
    changes: tuple[Change, ...]
    mark: Mark
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """The sweep in a file, or of a preset's name; `a.b=c` overrides change the base of all rows.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    path = loader.find(name_or_path, PRESETS, "sweep")
    located = read(path)
    file = parse(located)
    words = tuple(overrides)
    return _Expansion(path, located, file, words).sweep()


def parse(located: Located) -> SweepFile:
    """The mapping of a sweep file against its schema.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    data = located.data
    if "base" in data and isinstance(data.get("zip"), dict):  # one mapping is a list of one
        data["zip"] = [data["zip"]]
        located.marks.update({("zip", 0, *p[1:]): m for p, m in located.marks.items() if p[:1] == ("zip",)})
    if "base" not in data and {"model", "training"} & set(data):
        raise ConfigError(
            f"{located.mark(())}: this is an experiment, not a sweep; a sweep has a base and rows"
        )
    try:
        file = SweepFile.model_validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        found = sorted(error.errors(), key=lambda e: located.mark(tuple(e["loc"])).order)
        raise ConfigError(*dict.fromkeys(_describe(located, e) for e in found)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{located.mark(())}: {error}") from None
    lines = [
        f"{located.mark(('seeds', i))}: seeds: {seed} is given twice"
        for i, seed in enumerate(file.seeds)
        if seed in file.seeds[:i]
    ]
    for i, axes in enumerate(file.zip):
        lengths = {path: len(values) for path, values in axes.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{path} has {n}" for path, n in lengths.items())
            lines.append(
                f"{located.mark(('zip', i))}: zip: lists side by side need one length: {told}"
            )
    if lines:
        raise ConfigError(*lines)
    return file


def _describe(located: Located, error: Any) -> str:
    """One error of the sweep's own schema as `file:line:col: dotted: what is wrong`."""
    path: Path_ = tuple(error["loc"])
    mark, dotted = located.mark(path), ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        inner = {"rows": Row, "ladder": Row, "include": Row, "baseline": Baseline, "tune": Tune}
        model = inner.get(str(path[0]), SweepFile) if len(path) > 1 else SweepFile
        key = str(path[-1])
        return f"{mark}: {dotted}: unknown key '{key}'{did_you_mean(key, [*model.model_fields])}"
    line = loader.describe(located, error)
    for formal, plain in (
        ("a valid array", "a list"),
        ("a valid tuple", "a list"),
        ("a valid dictionary", "a mapping of paths to values"),
        ("an object", "a mapping"),
        ("a valid string", "text"),
        ("a valid boolean", "true or false"),
        ("tuple should have", "should have"),
    ):
        line = line.replace(formal, plain)
    return line


@dataclass
class _Expansion:
    """The work of `load`, with the errors found on the way."""

    path: Path
    located: Located
    file: SweepFile
    overrides: tuple[str, ...]
    errors: list[str] = field(default_factory=list)

    def sweep(self) -> Sweep:
        name = self.name()
        base_data = self.base_data()
        base = self.check(base_data, None)
        base_errors = len(self.errors)
        drafts = self.thinned(list(self.drafts(base_data, base)), base_data)
        variants = [v for draft in drafts if (v := self.variant(draft, base_data)) is not None]
        if base is None and len(self.errors) == base_errors and variants:
            self.errors.clear()  # what the base lacked, every row and the baseline supply
            base = variants[0].experiment
        self.check_labels(drafts)
        if not self.errors:
            variants = list(self.distinct(variants))
            self.check_size(variants)
        if self.errors or base is None:
            raise ConfigError(*dict.fromkeys(self.errors))
        f = self.file
        return Sweep(
            name, self.path, f.description, base, tuple(variants), f.seeds, f.match, f.tune,
            self.overrides,
        )  # fmt: skip

    def name(self) -> str:
        name = self.file.name or self.path.stem
        if not NAME.fullmatch(name):
            self.errors.append(
                f"{self.located.mark(('name',))}: name: {name!r} should have only letters, digits, "
                "'-', '_' and '.', and not begin with '.' or '-'; set name"
            )
        return name

    def base_data(self) -> Located:
        """The base experiment's data under `set:` and the command line."""
        mark = self.located.mark(("base",))
        try:
            file = loader.find_base(self.file.base, self.path.parent)
        except ConfigError as error:
            raise ConfigError(f"{mark}: base: {error}") from None
        if file.resolve() == self.path.resolve():
            raise ConfigError(f"{mark}: base: a sweep's base is an experiment, not the sweep itself")
        located = loader.compose(file)
        loader.load_imports(located)
        for change in self.changes(("set",)):
            self.apply(located, change)
        loader.apply_overrides(located, self.overrides)
        return located

    # --- what a file says, as drafts ----------------------------------------------------------

    def drafts(self, base_data: Located, base: Experiment | None) -> Iterator[Draft]:
        """Every variant in the order of the table; products are not yet thinned by `exclude`."""
        f = self.file
        self.check_products()
        factors = self.factors(base_data, base)
        own = tuple(self.changes(("baseline", "set")))
        levels = {p: shown_value(v[0]) for p, v in factors.items()} if factors else None
        drafts = [Draft(f.baseline.label, "baseline", own, self.place("baseline", "label"), levels)]
        rows = [self.row("rows", i) for i in range(len(f.rows))]
        steps = [self.row("ladder", i) for i in range(len(f.ladder))]
        drafts += rows
        for i, step in enumerate(steps):
            kept = tuple(c for s in steps[: i + 1] for c in s.changes)
            drafts.append(Draft(step.label, "ladder", kept, step.mark))
        if f.leave_one_out:
            drafts += self.leave_one_out(steps or rows, has_full=bool(steps))
        if factors:
            drafts += self.factorial(factors)
        drafts += self.product("grid", f.grid, itertools.product)
        for i, axes in enumerate(f.zip):
            drafts += self.product("zip", axes, zip, i)
        drafts += [self.row("include", i) for i in range(len(f.include))]
        yield from drafts
        if f.tune:
            yield from self.tune(f.tune, drafts)

    def row(self, group: str, index: int) -> Draft:
        changes = tuple(self.changes((group, index, "set")))
        label: str = getattr(self.file, group)[index].label
        return Draft(label, group, changes, self.place(group, index, "label"))

    def leave_one_out(self, steps: list[Draft], has_full: bool) -> Iterator[Draft]:
        mark = self.place("leave_one_out")
        if len(steps) < 2:
            self.errors.append(
                f"{mark}: leave_one_out: needs two or more steps in ladder (or rows) to leave one "
                f"out of, got {len(steps)}"
            )
            return
        if not has_full:
            yield Draft("full", "leave_one_out", tuple(c for s in steps for c in s.changes), mark)
        for left in steps:
            kept = tuple(c for s in steps if s is not left for c in s.changes)
            yield Draft(f"full − {left.label}", "leave_one_out", kept, mark)

    def factors(self, base_data: Located, base: Experiment | None) -> dict[str, list[Any]]:
        """The levels of each factor, the base's own first: it is added where it is not listed.

        The base's level is a `_Base`, which changes nothing.
        """
        factors: dict[str, list[Any]] = {}
        for path, values in self.file.factorial.items():
            mark = self.place("factorial", path)
            own: Any = _Base(value_at(loader.resolved(base), path) if base else None)
            others = []
            for value in values:
                changed = copy.deepcopy(base_data)
                self.apply(changed, Change(path, value, mark))
                if base is None or _identity(changed) != loader.run_id(base, 0):
                    others.append(value)
                else:
                    own = _Base(value)
            factors[path] = [own, *others]
        return factors

    def factorial(self, factors: dict[str, list[Any]]) -> Iterator[Draft]:
        names = short_names(factors)
        for combination in itertools.product(*factors.values()):
            cell = dict(zip(factors, combination, strict=True))
            changes = tuple(
                Change(path, value, self.place("factorial", path))
                for path, value in cell.items()
                if not isinstance(value, _Base)
            )
            levels = {path: shown_value(value) for path, value in cell.items()}
            label = ", ".join(f"{names[path]}={text}" for path, text in levels.items())
            yield Draft(label, "factorial", changes, self.place("factorial"), levels)

    def product(self, group: str, axes: Mapping[str, Any], combine: Any, *at: int) -> Iterator[Draft]:
        """Rows of a grid (`combine` is itertools.product) or of a zip."""
        if not axes:
            return
        names = short_names(axes)
        places = [range(len(values)) for values in axes.values()]
        for indexes in combine(*places):
            changes = tuple(
                Change(path, values[i], self.place(group, *at, path, i))
                for (path, values), i in zip(axes.items(), indexes, strict=True)
            )
            label = ", ".join(f"{names[c.path]}={shown_value(c.value)}" for c in changes)
            yield Draft(label, group, changes, changes[0].mark)

    def tune(self, tune: Tune, drafts: list[Draft]) -> Iterator[Draft]:
        """Each variant at each value, but for those that set the tuned path themselves."""
        name = tune.over.rpartition(".")[2]
        for draft in drafts:
            if any(c.path == tune.over for c in draft.changes):
                continue
            for i, value in enumerate(tune.values):
                change = Change(tune.over, value, self.place("tune", "values", i))
                yield Draft(
                    f"{draft.label} @ {name}={shown_value(value)}",
                    "tune",
                    (*draft.changes, change),
                    change.mark,
                    tuned={"of": draft.label, "path": tune.over, "value": value},
                )

    def changes(self, where: Path_) -> Iterator[Change]:
        """What a `set:` says, as dotted paths, the shorter first; sections may be nested."""
        data: Any = self.located.data
        for key in where:
            data = data[key] if isinstance(data, list) else data.get(key, {})

        def leaves(value: Mapping[str, Any], dotted: str, at: Path_) -> Iterator[Change]:
            for key, item in value.items():
                path = f"{dotted}.{key}" if dotted else key
                inside = isinstance(item, dict) and loader.section(tuple(path.split(".")))
                if inside:
                    yield from leaves(item, path, (*at, key))
                else:
                    yield Change(path, item, self.place(*at, key))

        yield from sorted(leaves(data, "", where), key=lambda c: c.path.count("."))

    def place(self, *path: str | int) -> Mark:
        return self.located.mark(path)

    # --- drafts to experiments ----------------------------------------------------------------

    def thinned(self, drafts: list[Draft], base_data: Located) -> list[Draft]:
        """Without the products that an `exclude` matches."""
        dropped: set[int] = set()
        for i, rule in enumerate(self.file.exclude):
            errors = len(self.errors)
            probe = copy.deepcopy(base_data)
            for path, value in rule.items():
                self.apply(probe, Change(path, value, self.place("exclude", i, path)))
            self.errors += [line for line in _unknown_keys(probe) if line not in self.errors]
            matched = {
                n
                for n, draft in enumerate(drafts)
                if draft.group in PRODUCTS and rule and self.matches(draft, rule, base_data)
            }
            if not matched and len(self.errors) == errors:
                self.errors.append(
                    f"{self.place('exclude', i)}: exclude: matches no row of "
                    f"{', '.join(PRODUCTS[:-1])} or {PRODUCTS[-1]}, so it drops nothing"
                )
            dropped |= matched
        return [draft for n, draft in enumerate(drafts) if n not in dropped]

    def matches(self, draft: Draft, rule: Mapping[str, Any], base_data: Located) -> bool:
        located = copy.deepcopy(base_data)
        for change in draft.changes:
            self.apply(located, change)
        try:
            plain = loader.resolved(loader.validate(located))
        except ConfigError:
            plain = located.data  # perhaps the very reason for excluding it
        return all(_agrees(value_at(plain, path), value) for path, value in rule.items())

    def apply(self, located: Located, change: Change) -> None:
        """Sets one change in place; notes an error that has no other place to come out."""
        if change.path.partition(".")[0] in ("imports", "base"):
            line = f"{change.mark}: {change.path}: can't be changed in a sweep; write it in the base"
            self.errors += [line] if line not in self.errors else []
            return
        try:
            loader.set_path(located, change.path, change.value, change.mark)
        except ConfigError as error:
            self.errors += [line for line in error.lines if line not in self.errors]
            return
        path = tuple(change.path.split("."))
        for end in range(1, len(path)):  # an unknown section is an error at this line too
            located.marks.setdefault(path[:end], change.mark)

    def check(self, located: Located, draft: Draft | None) -> Experiment | None:
        """The experiment, or None and its errors noted."""
        try:
            return loader.validate(located)
        except ConfigError as error:
            file = shown(self.path) + ":"
            for line in error.lines:
                if line in self.errors:
                    continue
                ours = draft is None or line.startswith(file)
                self.errors.append(line if ours else f"{draft.mark}: '{draft.label}': {line}")  # type: ignore[union-attr]
            return None

    def variant(self, draft: Draft, base_data: Located) -> Variant | None:
        located = copy.deepcopy(base_data)
        changes: dict[str, Any] = {}
        for change in draft.changes:
            self.apply(located, change)
            for inner in [p for p in changes if p.startswith(change.path + ".")]:
                del changes[inner]  # replaced whole
            changes.pop(change.path, None)
            changes[change.path] = change.value
        experiment = self.check(located, draft)
        if experiment is None:
            return None
        group = "rows" if draft.group == "baseline" else draft.group
        return Variant(
            draft.label, group, changes, experiment, draft.mark, draft.levels, draft.tuned
        )

    def distinct(self, variants: list[Variant]) -> Iterator[Variant]:
        """Variants that are experiments of their own, or may share another's; errors noted."""
        seen: dict[str, Variant] = {}
        baseline, full = variants[0], None
        if baseline.run_id(0) != loader.run_id(baseline.experiment, 0):  # pragma: no cover
            raise AssertionError
        for variant in variants:
            key = variant.run_id(0)
            other = seen.setdefault(key, variant)
            if variant.group == "leave_one_out":
                full = full or self.full_recipe(variants)
                if full is not None and variant is not full and key == full.run_id(0):
                    self.errors.append(
                        f"{variant.mark}: leave_one_out: '{variant.label}' is the full recipe "
                        "still, since other steps set the same; make the steps independent"
                    )
                yield variant
            elif other is variant:
                yield variant
            elif other is baseline and variant.group in PRODUCTS:
                continue
            elif variant.group in SHARING:
                yield variant
            else:
                self.errors.append(self.same(variant, other, baseline, variants))

    def full_recipe(self, variants: list[Variant]) -> Variant | None:
        ladder = [v for v in variants if v.group == "ladder"]
        return ladder[-1] if ladder else next(v for v in variants if v.group == "leave_one_out")

    def same(
        self, variant: Variant, other: Variant, baseline: Variant, variants: list[Variant]
    ) -> str:
        above = variants[variants.index(variant) - 1]
        if other is baseline or variant.group == "ladder" and other is above:
            only = all(p.startswith("execution") for p in variant.changes) and variant.changes
            why = " (execution settings are not part of an experiment)" if only else ""
            return (
                f"{variant.mark}: '{variant.label}' changes nothing: it is the same experiment as "
                f"'{other.label}'{why}; set something else, or remove it"
            )
        where = f"line {other.mark.line}" if other.mark.line else "above"
        return (
            f"{variant.mark}: '{variant.label}' is the same experiment as '{other.label}' "
            f"({where}); remove one of them"
        )

    # --- checks of the whole --------------------------------------------------------------------

    def check_products(self) -> None:
        f = self.file
        sizes = [math.prod(len(v) for v in f.grid.values()) if f.grid else 0]
        sizes.append(math.prod(len(v) + 1 for v in f.factorial.values()) if f.factorial else 0)
        rows = sum(sizes) * (1 + len(f.tune.values) if f.tune else 1)
        if rows > MOST_DRAFTS:
            mark = self.place("grid" if f.grid else "factorial")
            raise ConfigError(
                f"{mark}: {rows:,} rows x {_times(len(f.seeds), 'seed')} = "
                f"{rows * len(f.seeds):,} runs, more than max_runs {f.max_runs}; "
                "take values away, or split the sweep"
            )

    def check_labels(self, drafts: list[Draft]) -> None:
        first: dict[str, Mark] = {}
        for draft in drafts:
            earlier = first.setdefault(draft.label, draft.mark)
            if earlier is not draft.mark or draft.label in (d.label for d in drafts if d is not draft):
                if draft is next(d for d in drafts if d.label == draft.label):
                    continue
                where = f"line {earlier.line}" if earlier.line else "the baseline's"
                self.errors.append(
                    f"{draft.mark}: the label '{draft.label}' is used twice (first: {where}); "
                    "give one of them another"
                )

    def check_size(self, variants: list[Variant]) -> None:
        f = self.file
        if len(variants) < 2 and not ("seeds" in f.model_fields_set and len(f.seeds) > 1):
            self.errors.append(
                f"{self.place()}: nothing to compare: add rows, ladder, grid, zip, factorial or "
                "include (or seeds, two or more, to measure the noise of the baseline alone)"
            )
        experiments = len({v.run_id(0) for v in variants})
        runs = experiments * len(f.seeds)
        if runs > f.max_runs:
            self.errors.append(
                f"{self.place('max_runs')}: {_times(experiments, 'row')} x "
                f"{_times(len(f.seeds), 'seed')} = {runs} runs, more than max_runs {f.max_runs}; "
                f"set max_runs: {runs} if you want them all"
            )
