"""A sweep file to its variants: checked experiments, each the base with a named difference.

    file ─ yaml_text.read ─ SweepFile (pydantic) ─ drafts (label, changes) ─ variants (experiments)

`set:` and the command line change the base of every row; `baseline.set` only the baseline's. What
a row sets lies over that: a component is replaced whole, `model.ffn.hidden` changes one parameter.

    rows           one change at a time from the base
    ladder         cumulative: each step keeps those above it
    leave_one_out  the full recipe (the ladder's steps, or else all rows) but for one step each
    factorial      every combination of levels, the base's own level among them; with fraction,
                   a regular part of them (two levels each)
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
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pydantic

from experiments import loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError, Located, Mark, read, shown
from sweeps.drafts import Change, Draft, Drafts, Own, changes_at, fraction_of
from sweeps.fraction import Fraction
from sweeps.grammar import SweepFile, Tune, parse, too_many

PRESETS = Path(__file__).parent / "presets"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHARING = ("leave_one_out", "factorial", "tune")  # groups that may have runs of other rows
PRODUCTS = ("factorial", "grid", "zip", "tune")  # groups that `exclude` thins out


@dataclass(frozen=True)
class Variant:
    """One row: an experiment, how it differs from the base, and where that is written.

    Attributes:
        levels: of a factorial's rows (and the baseline): the level of each factor, as text.
        tuned: of a tune's rows: {"of": the variant's label, "path": …, "value": …}.
        seeds: of its own, the n-th against the sweep's n-th; empty: the sweep's.
    """

    label: str
    group: str
    changes: Mapping[str, Any]
    experiment: Experiment
    mark: Mark
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] = ()

    @cached_property
    def identity(self) -> str:
        return loader.identity(self.experiment)

    def run_id(self, seed: int) -> str:
        return f"{self.identity}-s{seed}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. The first variant is the baseline; `base` is what rows are changes of."""

    name: str
    file: Path
    description: str
    base: Experiment
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    match: Literal["params", "flops", "time"] | None
    tune: Tune | None
    overrides: tuple[str, ...] = ()
    fraction: Fraction | None = None

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    def runs(self, variant: Variant) -> dict[int, str]:
        """The sweep's seeds -> a variant's run at each, or at the seed of its own beside it."""
        own = variant.seeds or self.seeds
        return {seed: variant.run_id(s) for seed, s in zip(self.seeds, own, strict=True)}


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """The sweep in a file, or of a preset's name; `a.b=c` overrides change the base of all rows.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    path = loader.find(name_or_path, PRESETS, "sweep")
    located = read(path)
    file = parse(located)
    return _Expansion(path, located, file, tuple(overrides)).sweep()


@dataclass
class _Expansion:
    """The work of `load`, and the errors found on the way."""

    path: Path
    located: Located
    file: SweepFile
    overrides: tuple[str, ...]
    errors: list[str] = field(default_factory=list)

    def sweep(self) -> Sweep:
        f, name = self.file, self.name()
        base_data = self.base_data()
        base = self.check(base_data, None)
        drafts = list(Drafts(self.located, f, self.factors(base_data, base)))
        drafts = self.thinned(drafts, base_data)
        found = [self.variant(draft, base_data) for draft in drafts]
        self.check_labels(drafts)
        variants: list[Variant] = []
        if not self.errors:
            variants = list(self.distinct([v for v in found if v is not None]))
            self.check_size(variants)
            self.check_tries(variants)
            self.check_trainings(variants)
        if self.errors or base is None:
            raise ConfigError(*dict.fromkeys(self.errors))
        return Sweep(
            name=name,
            file=self.path,
            description=f.description,
            base=base,
            variants=tuple(variants),
            seeds=f.seeds,
            match=f.match,
            tune=f.tune,
            overrides=self.overrides,
            fraction=fraction_of(f, f.factorial),
        )

    def place(self, *path: str | int) -> Mark:
        return self.located.mark(path)

    def note(self, *lines: str) -> None:
        self.errors += [line for line in lines if line not in self.errors]

    def name(self) -> str:
        name = self.file.name or self.path.stem
        if not NAME.fullmatch(name):
            self.note(
                f"{self.place('name')}: name: {name!r} may have only letters, digits, '-', '_' "
                "and '.', and begins with a letter, a digit or '_'; set name to such a word"
            )
        return name

    def base_data(self) -> Located:
        """The base experiment's data under `set:` and the command line."""
        mark = self.place("base")
        try:
            file = loader.find_base(self.file.base, self.path.parent)
        except ConfigError as error:
            raise ConfigError(f"{mark}: base: {error}") from None
        if file.resolve() == self.path.resolve():
            raise ConfigError(f"{mark}: base: should be an experiment, not this sweep itself")
        located = loader.compose(file)
        for change in changes_at(self.located, ("set",)):
            self.apply(located, change)
        loader.apply_overrides(located, self.overrides)
        return located

    def factors(self, base_data: Located, base: Experiment | None) -> dict[str, list[Own | Change]]:
        """The levels of each factor; the base's own comes first, added where it is not listed."""
        factors: dict[str, list[Own | Change]] = {}
        for path, values in self.file.factorial.items():
            own = Own(value_at(loader.resolved(base), path) if base else None)
            others: list[Own | Change] = []
            for value in values:
                change = Change(path, value, self.place("factorial", path))
                changed = _copy(base_data)
                self.apply(changed, change)
                if base is not None and _run_id(changed) == loader.run_id(base, 0):
                    own = Own(value)
                else:
                    others.append(change)
            factors[path] = [own, *others]
            if self.file.fraction and len(others) != 1 and base is not None:
                self.note(
                    f"{self.place('factorial', path)}: fraction: needs two levels of each factor, "
                    f"{path} has {len(others) + 1} (the base's own is one); take out fraction, "
                    "or give each one other level"
                )
        return factors

    # --- drafts to experiments ----------------------------------------------------------------

    def thinned(self, drafts: list[Draft], base_data: Located) -> list[Draft]:
        """The drafts without the combinations that an `exclude` matches."""
        rules = self.file.exclude
        plain = {
            n: self.plain(draft, base_data)
            for n, draft in enumerate(drafts)
            if rules and draft.group in PRODUCTS
        }
        axes = {change.path for draft in drafts for change in draft.changes}
        dropped: set[int] = set()
        for i, rule in enumerate(rules):
            errors, probe = len(self.errors), _copy(base_data)
            for path in rule.keys() - axes:
                self.apply(probe, Change(path, rule[path], self.place("exclude", i, path)))
            self.note(*_schema_errors(probe))
            matched = {
                n
                for n, data in plain.items()
                if rule and all(_agrees(value_at(data, p), value) for p, value in rule.items())
            }
            if not matched and len(self.errors) == errors:
                self.note(
                    f"{self.place('exclude', i)}: exclude: matches no combination of factorial, "
                    "grid, zip or tune, so it drops nothing; mend or remove it"
                )
            dropped |= matched
            if self.file.fraction and any(drafts[n].group == "factorial" for n in matched):
                self.note(
                    f"{self.place('exclude', i)}: exclude: drops cells of a fraction, and what is "
                    "left would alias effects otherwise than the plan says; remove one of the two"
                )
        gone = {drafts[n].label for n in dropped}
        return [
            draft
            for n, draft in enumerate(drafts)
            if n not in dropped and not (draft.tuned and draft.tuned["of"] in gone)
        ]

    def plain(self, draft: Draft, base_data: Located) -> dict[str, Any]:
        """A draft's data with defaults; without them where it is no experiment."""
        located = _copy(base_data)
        for change in draft.changes:
            self.apply(located, change)
        try:
            return loader.resolved(loader.validate(located))
        except ConfigError:  # perhaps the very reason for excluding it
            return dict(located.data)

    def apply(self, located: Located, change: Change) -> None:
        """Sets one change in place."""
        if change.path.partition(".")[0] in ("imports", "base"):
            self.note(f"{change.mark}: {change.path}: is no setting; write it in the experiment")
            return
        try:
            loader.set_path(located, change.path, change.value, change.mark)
        except ConfigError as error:
            self.note(*error.lines)
            return
        path = tuple(change.path.split("."))
        for end in range(1, len(path)):  # an unknown section is an error at this line too
            located.marks.setdefault(path[:end], change.mark)

    def check(self, located: Located, draft: Draft | None) -> Experiment | None:
        """The experiment, or None and its errors noted."""
        try:
            return loader.validate(located)
        except ConfigError as error:
            for line in error.lines:
                if draft is None or line in self.errors or line.startswith(shown(self.path) + ":"):
                    self.note(line)
                else:  # what the row did shows at a line of the base
                    self.note(f"{draft.mark}: '{draft.label}': {line}")
            return None

    def variant(self, draft: Draft, base_data: Located) -> Variant | None:
        located = _copy(base_data)
        changes: dict[str, Any] = {}
        for change in draft.changes:
            self.apply(located, change)
            whole = [p for p in changes if f"{p}.".startswith(f"{change.path}.")]
            for replaced in whole:
                del changes[replaced]
            changes[change.path] = change.value
        experiment = self.check(located, draft)
        if experiment is None:
            return None
        group = "rows" if draft.group == "baseline" else draft.group
        return Variant(
            draft.label,
            group,
            changes,
            experiment,
            draft.mark,
            draft.levels,
            draft.tuned,
            draft.seeds,
        )

    # --- checks of the whole --------------------------------------------------------------------

    def distinct(self, variants: list[Variant]) -> Iterator[Variant]:
        """Rows of their own, and those that may share another's runs; notes the others."""
        baseline = variants[0]
        ids = {v.label: (v.identity, v.seeds) for v in variants}
        recipes = [v for v in variants if v.group == "ladder"][-1:]
        recipes += [v for v in variants if v.group == "leave_one_out"]
        first: dict[tuple[str, tuple[int, ...]], Variant] = {}
        stood_for: set[str] = set()  # combinations that are the baseline
        for above, variant in zip([baseline, *variants], variants, strict=False):
            key = ids[variant.label]
            other = first.setdefault(key, variant)
            left_out = variant.group == "leave_one_out"
            if left_out and variant is not recipes[0] and key == ids[recipes[0].label]:
                self.note(
                    f"{variant.mark}: leave_one_out: '{variant.label}' is still "
                    f"'{recipes[0].label}', since another step sets the same; "
                    "give each step a path of its own"
                )
            elif other is variant or left_out:
                yield variant
            elif variant.group in PRODUCTS and other is baseline:
                stood_for.add(variant.label)
            elif variant.tuned is not None and variant.tuned["of"] in stood_for:
                continue
            elif variant.tuned is not None and key == ids[variant.tuned["of"]]:
                continue  # a row's own value is a try already
            elif variant.group in SHARING:
                yield variant
            elif other is baseline or (variant.group == "ladder" and other is above):
                execution = all(path.startswith("execution") for path in variant.changes)
                why = " (execution settings do not count)" if execution and variant.changes else ""
                self.note(
                    f"{variant.mark}: '{variant.label}' changes nothing: it is the same experiment "
                    f"as '{other.label}'{why}; set something else, or remove it"
                )
            else:
                self.note(
                    f"{variant.mark}: '{variant.label}' is the same experiment as '{other.label}' "
                    f"(line {other.mark.line}); remove one of them"
                )

    def check_labels(self, drafts: Sequence[Draft]) -> None:
        first: dict[str, Draft] = {}
        for draft in drafts:
            other = first.setdefault(draft.label, draft)
            if other is not draft:
                where = "baseline" if other.group == "baseline" else f"line {other.mark.line}"
                self.note(
                    f"{draft.mark}: the label '{draft.label}' is used twice (first: {where}); "
                    "give one of them another"
                )

    def check_size(self, variants: Sequence[Variant]) -> None:
        f = self.file
        replicated = "seeds" in f.model_fields_set and len(f.seeds) > 1
        if len(variants) < 2 and not replicated and not self.errors:
            self.note(
                f"{self.place()}: nothing to compare: add rows, ladder, factorial, grid, zip or "
                "include (or seeds, two or more, to measure the noise of the baseline alone)"
            )
        rows = len({(v.identity, v.seeds) for v in variants})
        if rows * len(f.seeds) > f.max_runs:
            self.note(too_many(self.located, f, rows))

    def check_tries(self, variants: Sequence[Variant]) -> None:
        tune = self.file.tune
        if tune is not None and not any(v.tuned for v in variants) and not self.errors:
            self.note(
                f"{self.place('tune')}: tune: gives no row a try: each sets {tune.over} itself, or "
                "its runs are the same at every value; remove it, or tune something else"
            )

    def check_trainings(self, variants: Sequence[Variant]) -> None:
        """Rows that train the same and are only measured otherwise would look like a finding."""
        first: dict[tuple[str, tuple[int, ...]], Variant] = {}
        for variant in variants:
            science = loader.dump(variant.experiment, everything=False)
            science.pop("evaluation", None)
            key = json.dumps(science, sort_keys=True), variant.seeds
            other = first.setdefault(key, variant)
            if other.identity != variant.identity:
                self.note(
                    f"{variant.mark}: '{variant.label}' trains the same model as '{other.label}': "
                    "they differ in evaluation alone; set it for all rows, under set"
                )


def value_at(plain: Mapping[str, Any], dotted: str) -> Any:
    """What stands at a dotted path, None if nothing does."""
    value: Any = plain
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _agrees(actual: Any, wanted: Any) -> bool:
    """Whether a value is what an `exclude` says; a component agrees in what is said of it."""
    if isinstance(actual, str) and isinstance(wanted, dict):
        actual = {"name": actual}
    if isinstance(wanted, dict):
        return isinstance(actual, dict) and all(
            _agrees(actual.get(key), value) for key, value in wanted.items()
        )
    if isinstance(actual, dict):
        return bool(actual.get("name") == wanted)
    return bool(actual == wanted) and isinstance(actual, bool) == isinstance(wanted, bool)


def _copy(located: Located) -> Located:
    return Located(copy.deepcopy(located.data), dict(located.marks))


def _run_id(located: Located) -> str | None:
    try:
        return loader.run_id(loader.validate(located), 0)
    except ConfigError:
        return None


def _schema_errors(located: Located) -> list[str]:
    """What the schema alone refuses: unknown paths and values of a wrong type."""
    try:
        Experiment.model_validate_json(json.dumps(located.data), strict=True)
    except pydantic.ValidationError as error:
        return [loader.describe(located, e) for e in error.errors()]
    return []
