"""`run.py check`: which promises the components of a file keep, in words for a person.

    python run.py check parts.py                                every component with its defaults
    python run.py check parts.py mixer:gated conv=4             and one with these parameters
    python run.py check parts.py mixer:gated model.position=rotary    in a model with that part

The words after the file are cases: `kind:name` begins one, `parameter=value` sets a parameter of
it, `model.kind=value` another part of the small model that it stands in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from components import contract, faults, registry
from components.contract import Case, Check
from components.faults import Broken
from components.registry import Entry, Spec, UserError, did_you_mean

ADVICE = (contract.has_a_one_line_summary, contract.says_where_it_comes_from)


@dataclass(frozen=True)
class Finding:
    """A promise of a case: kept, or why not. `advice` is no matter of numbers, and spoils none."""

    promise: str
    broken: str | None = None
    advice: bool = False


@dataclass(frozen=True)
class Report:
    """A case with its findings; `unchecked` says why there are none."""

    case: Case
    findings: tuple[Finding, ...]
    unchecked: str | None = None

    @property
    def kept(self) -> bool:
        return self.unchecked is None and all(f.broken is None or f.advice for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        entry = self.case.entry
        return {
            "kind": entry.kind,
            "name": entry.name,
            "source": entry.source,
            "parameters": registry.plain_value(self.case.params),
            "kept": self.kept,
            "unchecked": self.unchecked,
            "checks": [
                {"promise": f.promise, "broken": f.broken, "advice": f.advice}
                for f in self.findings
            ],
        }

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        entry, given = self.case.entry, self.case.words()
        yield f"{entry.source}: {entry.kind} '{entry.name}'{given}"
        if self.unchecked:
            yield f"  not checked: {self.unchecked}"
        said: set[str] = set()
        for finding in self.findings:
            if finding.broken is None:
                yield f"  kept    {finding.promise}"
                continue
            yield f"  {'advice' if finding.advice else 'BROKEN'}  {finding.promise}"
            yield f"          {'as above' if finding.broken in said else finding.broken}"
            said.add(finding.broken)


def report(case: Case) -> Report:
    """Puts a case through its kind's contract."""
    if wrong := _misfit(case):
        return Report(case, (), wrong)
    promised = contract.promised(case)
    return Report(case, tuple(Finding(_words(c), _broken(c, case), c in ADVICE) for c in promised))


def _words(check: Check) -> str:
    return (inspect.getdoc(check) or check.__name__).split("\n")[0].removesuffix(".")


def _misfit(case: Case) -> str | None:
    """Why a case can't stand in the small model: its own parameters, or these sizes."""
    required = [k for k, info in case.entry.schema.model_fields.items() if info.is_required()]
    if missing := [key for key in required if key not in case.params]:
        words = " ".join(f"{key}=…" for key in missing)
        return f"it needs {', '.join(missing)}; add: {case.entry.kind}:{case.entry.name} {words}"
    try:
        specs = case.specs if case.entry.kind in contract.BASE else {case.entry.kind: case.spec}
        for kind, spec in specs.items():
            check = getattr(spec.entry.cls, "check", None)
            for parameter, message in check(contract.DIMS, dict(spec.params)) if check else ():
                where = f"{kind}.{parameter}" if parameter else kind
                return f"{where}: {message}, in the small model of {contract.DIMS}"
    except UserError as error:
        return str(error)
    return None


def _broken(check: Check, case: Case) -> str | None:
    """Why a promise is not kept, in one line; None where it is."""
    try:
        check(case)
    except (Broken, UserError) as error:
        return str(error).removeprefix(f"{faults.title(case.entry)}: ")
    except Exception as error:  # of the component, or in built-in code that it drives
        line = faults.attribute(error) or faults.message(error)
        return line.removeprefix(f"{faults.title(case.entry)}: ")
    return None


def cases(
    entries: Iterable[Entry], words: Iterable[str], value: Callable[[str], Any]
) -> list[Case]:
    """The components of a file with their defaults, and the cases that `words` add.

    A component that has no defaults is left out where a case gives them.

    Raises:
        UserError: a word is no case, no parameter, or names nothing in the file.
    """
    listed = list(entries)
    given = _given(listed, words, value)
    usual = [
        Case(entry)
        for entry in listed
        if contract.usual(entry) or all(case.entry is not entry for case in given)
    ]
    return [*usual, *given]


def _given(listed: list[Entry], words: Iterable[str], value: Callable[[str], Any]) -> list[Case]:
    by_name = {f"{entry.kind}:{entry.name}": entry for entry in listed}
    given: list[Case] = []
    for word in words:
        left, equals, right = word.partition("=")
        if not equals:
            if word not in by_name:
                raise UserError(f"{word}: no component of the file{did_you_mean(word, [*by_name])}")
            given.append(Case(by_name[word]))
            continue
        if not given and len(listed) == 1:
            given.append(Case(listed[0]))
        if not given:
            raise UserError(f"{word}: of which component? write kind:name before it, such as "
                            f"{next(iter(by_name))} {word}")  # fmt: skip
        case, part = given[-1], left.removeprefix("model.")
        known = [*case.entry.schema.model_fields, *(f"model.{kind}" for kind in contract.BASE)]
        if left not in known:
            what = f"{case.entry.kind} '{case.entry.name}'"
            raise UserError(f"{word}: {what} has no parameter '{left}'{did_you_mean(left, known)}")
        around, params = dict(case.around), dict(case.params)
        (around if part != left else params)[part] = value(right)
        given[-1] = Case(case.entry, params, around)
        _ = given[-1].spec  # refuses a value of another type
    return given


def of_specs(specs: Iterable[Spec], model: dict[str, Spec]) -> list[Case]:
    """A case for each component of an experiment, in a small model of its other parts."""
    found = []
    for spec in specs:
        around = {k: v for k, v in model.items() if k != spec.kind} if spec.kind in model else {}
        found.append(Case(spec.entry, dict(spec.params), dict(around)))
    return found
