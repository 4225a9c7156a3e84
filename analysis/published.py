"""Published ablations as data: what a paper's tables say, and the claims that can be put to a test.

One YAML file for each paper beside this module: `analysis/published/shazeer2020.yaml`. A file of
your own may stand anywhere. Every table says how sure we are of its numbers:

    verified      read in the paper itself, or in its authors' repository
    second-hand   read in a transcription
    recalled      from memory; check before you print it

A claim is what our sweeps are held against, see analysis/claims.py. Where a paper shows a figure
and no table, its claim has a direction and no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from components.registry import Closed, UserError, did_you_mean
from experiments.yaml_text import ConfigError, Located, read, shown

FOLDER = Path(__file__).parent / "published"
Budget = Literal["minutes", "gpu-hour"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Mark = Literal["verified", "second-hand", "recalled"]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
Sweeps = Annotated[tuple[Text, ...], Field(min_length=1)]
Value = float | tuple[float, float]  # a mean, or a mean and the sd over n runs


class Column(Closed):
    """What one column of a table measures. `n`: runs behind each value, where it is said."""

    metric: Text
    unit: Text
    better: Literal["lower", "higher"]
    n: Annotated[int, Field(ge=1)] | None = None


class PublishedTable(Closed):
    """A table: label → column → value. `marks` are of single rows that we are less sure of."""

    where: Text
    mark: Mark
    marks: dict[str, Mark] = Field(default_factory=dict)
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    rows: Annotated[dict[str, dict[str, Value]], Field(min_length=1)]


class Reference(Closed):
    """Two cells of a table, whose difference a claim is about; the claim's own labels unless said
    otherwise."""

    table: str
    column: str
    variant: str | None = None
    than: str | None = None
    than_column: str | None = None


class _Claim(Closed):
    """What all claims have.

    Attributes:
        says: the claim as a sentence.
        where: in the paper, of a claim without a `published` table.
        beyond: the paper does not say it; we do.
        metric: what is measured, see `claims.values`.
    """

    says: Text
    where: Text | None = None
    mark: Mark | None = None
    beyond: bool = False
    metric: Text = "val/loss"


class DifferenceClaim(_Claim):
    """`variant` is lower (or higher) than `than`. `than_metric`: what is measured of the other.
    `at`: both tuned rows are taken at this value of the tuned setting, not at their best."""

    kind: Literal["difference"]
    variant: Text
    than: Text
    than_metric: Text | None = None
    at: float | None = None
    expect: Literal["lower", "higher"]
    published: Reference | None = None


class SameClaim(_Claim):
    """`variant` and `than` differ by less than `margin`, in the unit of the metric."""

    kind: Literal["no difference"]
    variant: Text
    than: Text
    margin: Annotated[float, Field(gt=0)]
    published: Reference | None = None


class OrderClaim(_Claim):
    """These rows have this order, the lowest first."""

    kind: Literal["order"]
    lowest_first: Annotated[tuple[Text, ...], Field(min_length=2)]


class SlopeClaim(_Claim):
    """ln metric grows by `published` ± `margin` for each unit of ln `over`, a dotted path of the
    experiment, among the rows whose settings are as `among` says."""

    kind: Literal["slope"]
    over: Text
    among: dict[str, Any]
    published: float
    margin: Annotated[float, Field(gt=0)]


class ThresholdClaim(_Claim):
    """The metric of `variant` is above (or below) a value."""

    kind: Literal["threshold"]
    variant: Text
    above: float | None = None
    below: float | None = None

    @property
    def bound(self) -> float:
        """The one of the two that is given."""
        bound = self.above if self.above is not None else self.below
        assert bound is not None  # `_problems` refuses a file without
        return bound


KINDS = ("difference", "no difference", "order", "slope", "threshold")
Claim = Annotated[
    DifferenceClaim | SameClaim | OrderClaim | SlopeClaim | ThresholdClaim,
    Field(discriminator="kind"),
]


class PaperFile(Closed):
    """The words of such a file."""

    title: Text
    authors: Text
    year: int
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")] | None = None
    url: Text | None = None
    setting: Text
    sweeps: Annotated[dict[Budget, Sweeps], Field(min_length=1)]
    tables: dict[str, PublishedTable] = Field(default_factory=dict)
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Paper:
    """A published ablation. `key` is the name of its file: `shazeer2020`, in `folder`."""

    key: str
    file: PaperFile
    folder: Path = FOLDER

    @property
    def source(self) -> str:
        """`Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202`."""
        f = self.file
        place = f"arXiv {f.arxiv}" if f.arxiv else f.url
        return f"{f.authors} {f.year}, {f.title}" + (f", {place}" if place else "")

    def sweeps(self, budget: Budget) -> list[str]:
        """Names of presets, or paths of sweep files, which are written relative to the paper's.

        Raises:
            UserError: there are none for this budget.
        """
        if budget not in self.file.sweeps:
            known = ", ".join(self.file.sweeps)
            raise UserError(f"{self.key}: has no sweeps for the budget {budget} (known: {known})")
        return [
            shown(self.folder / name) if name.endswith((".yaml", ".yml")) else name
            for name in self.file.sweeps[budget]
        ]


@dataclass(frozen=True)
class PublishedDifference:
    """A difference of two published cells.

    Attributes:
        variant, than: the two values, in the column's unit.
        mean: variant − than; of perplexities the difference of their logarithms.
        error: standard error of `mean` from the published sds and numbers of runs (Welch), None
            where they are not given.
        unit: nats where `mean` is a difference of losses, else the column's.
        improves: whether the variant is the better one; None where both are alike.
    """

    variant: float
    than: float
    mean: float
    error: float | None
    unit: str
    improves: bool | None
    where: str
    mark: Mark


def names() -> list[str]:
    """Names of the papers that come with Ceteris, in the order of their years."""
    return sorted((p.stem for p in FOLDER.glob("*.yaml")), key=lambda key: (key[-4:], key))


def load(name: str) -> Paper:
    """The paper of this name, or in this file.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
        UserError: there is none of that name.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        path = Path(name)
        if not (path.suffix in (".yaml", ".yml") and path.is_file()):
            raise UserError(f"no published ablation '{name}'{did_you_mean(name, names())}")
    located = read(path)
    try:
        file = PaperFile.model_validate_json(json.dumps(located.data), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(*dict.fromkeys(_lines(located, error))) from None
    if lines := dict.fromkeys(_problems(located, file)):
        raise ConfigError(*lines)
    return Paper(path.stem, file, path.parent)


def difference(paper: Paper, claim: DifferenceClaim | SameClaim) -> PublishedDifference | None:
    """What the paper's table says of a claim's two rows; None where it has no table for it."""
    reference = claim.published
    if reference is None:
        return None
    table = paper.file.tables[reference.table]
    labels = reference.variant or claim.variant, reference.than or claim.than
    columns = reference.column, reference.than_column or reference.column
    column = table.columns[columns[0]]
    cells = [table.rows[label][name] for label, name in zip(labels, columns, strict=True)]
    (a, sd_a), (b, sd_b) = (cell if isinstance(cell, tuple) else (cell, None) for cell in cells)
    counts = [table.columns[name].n for name in columns]
    error = None
    if sd_a is not None and sd_b is not None and counts[0] and counts[1]:
        error = math.sqrt(sd_a**2 / counts[0] + sd_b**2 / counts[1])
    logarithm = column.unit == "perplexity"
    sure = [table.marks.get(label, table.mark) for label in labels]
    return PublishedDifference(
        variant=a,
        than=b,
        mean=math.log(a / b) if logarithm else a - b,
        error=None if logarithm else error,
        unit="nats" if logarithm else column.unit,
        improves=None if a == b else (a < b) == (column.better == "lower"),
        where=f"{table.where}, {reference.column}",
        mark=max(sure, key=get_args(Mark).index),
    )


def _lines(located: Located, error: pydantic.ValidationError) -> Iterator[str]:
    for found in error.errors():
        # the word by which pydantic tells claims apart stands in its path
        loc = tuple(part for part in found["loc"] if part not in KINDS)
        what = found["msg"][:1].lower() + found["msg"][1:]
        yield f"{located.mark(loc)}: {'.'.join(map(str, loc)) or 'file'}: {what}"


def _problems(located: Located, file: PaperFile) -> Iterator[str]:
    """What no single field can tell."""
    for name, table in file.tables.items():
        for label, row in table.rows.items():
            for column in row.keys() - table.columns.keys():
                mark = located.mark(("tables", name, "rows", label))
                yield f"{mark}: tables.{name}: no column '{column}'{_hint(column, table.columns)}"
    for i, claim in enumerate(file.claims):
        mark = located.mark(("claims", i))
        if isinstance(claim, ThresholdClaim) and (claim.above is None) == (claim.below is None):
            yield f"{mark}: claims.{i}: say either above or below"
        reference = getattr(claim, "published", None)
        if isinstance(reference, Reference) and isinstance(claim, DifferenceClaim | SameClaim):
            yield from (
                f"{mark}: claims.{i}: {wrong}" for wrong in _missing(file, claim, reference)
            )


def _missing(
    file: PaperFile, claim: DifferenceClaim | SameClaim, reference: Reference
) -> Iterator[str]:
    table = file.tables.get(reference.table)
    if table is None:
        yield f"no table '{reference.table}'{_hint(reference.table, file.tables)}"
        return
    for label, column in (
        (reference.variant or claim.variant, reference.column),
        (reference.than or claim.than, reference.than_column or reference.column),
    ):
        if column not in table.columns:
            yield f"no column '{column}'{_hint(column, table.columns)}"
        elif label not in table.rows:
            yield f"no row '{label}'{_hint(label, table.rows)}"
        elif column not in table.rows[label]:
            yield f"row '{label}' has nothing in column '{column}'"


def _hint(word: str, known: Mapping[str, Any]) -> str:
    return did_you_mean(word, list(known))
