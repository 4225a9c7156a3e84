"""A Report on a sweep in wandb: its table to read, and panels over its runs to look into.

One report a sweep, written anew each time but for what people add below its last heading.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from analysis import render, results
from analysis import table as tables
from analysis.wandb_summary import remember, remembered
from experiments import wandb_client as client
from experiments.record import UserError
from experiments.tracking import Place, tag

NOTES = "Notes"
NEEDED = "wandb report needs wandb-workspaces: pip install 'ceteris[report]'"
LONGEST_TITLE = 128


def report(root: Path, record: Mapping[str, Any], place: Place) -> str:
    """Saves the sweep's report, the same one each time; returns its address.

    Args:
        record: the sweep's manifest.

    Raises:
        Unreachable: wandb can't be used.
        UserError: wandb-workspaces is not installed, or a record is damaged.
    """
    if place.mode != "online":
        raise UserError("a report is a page of wandb's server; it can't be made offline")
    wr = library()
    name = record["name"]
    manifest = results.read_manifest(root / "sweeps" / f"{name}.json")
    table = tables.ablation_table(manifest, results.read_runs(manifest, root))
    api = client.api(place)
    with client.guarded(f"no report (is the sweep pushed? run.py wandb push {name})"):
        entity = str(place.entity or api.default_entity)
        page = earlier(remembered(root, name).get("report"), entity, place.project)
        kept = notes(page) if page else []
        page = page or wr.Report(project=place.project, entity=entity)
        page.title, page.width = name[:LONGEST_TITLE], "fluid"
        page.description = record.get("description") or ""
        page.blocks = [
            wr.MarkdownBlock(render.markdown(table)),
            *panels(entity, place.project, name),
            *(kept or [wr.H2(NOTES), wr.P("What you write below this heading is kept.")]),
        ]
        page.save()
        url = str(page.url)
    remember(root, name, report=url)
    return url


def library() -> Any:
    """wandb-workspaces, which only reports need."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UserError(NEEDED) from None
    return wr


def earlier(url: str | None, entity: str, project: str) -> Any:
    """The report as it is in wandb now; None if there is none in this project, or no more."""
    if url is None or urlsplit(url).path.split("/")[1:3] != [entity, project]:
        return None
    try:
        return library().Report.from_url(url)
    except TypeError:  # the server answers null where it has been deleted
        return None


def notes(page: Any) -> list[Any]:
    """The blocks from the heading `Notes` on, which are people's own."""
    wr = library()

    def above(block: Any) -> bool:
        return not (isinstance(block, wr.H1 | wr.H2 | wr.H3) and block.text == NOTES)

    return [*itertools.dropwhile(above, page.blocks)]


def panels(entity: str, project: str, sweep: str) -> list[Any]:
    """The runs by variant, and the summary run's table and figure."""
    wr = library()

    def runs(job_type: str, **more: Any) -> list[Any]:
        chosen = f"Tags() in [{tag(f'sweep:{sweep}')!r}] and Metric('JobType') == {job_type!r}"
        return [wr.Runset(entity=entity, project=project, name=job_type, filters=chosen, **more)]

    variant = {"groupby": wr.Config("variant"), "groupby_aggfunc": "mean"}
    variant["groupby_rangefunc"] = "stddev"
    curve = {"x": "tokens", "title_x": "Training tokens", "smoothing_type": "none", **variant}
    wide, half = wr.Layout(0, 8, 24, 12), [wr.Layout(x, 0, 8, 8) for x in (0, 8, 16)]
    return [
        wr.H2("Runs"),
        wr.PanelGrid(
            runsets=runs("train", groupby=["config.variant"]),
            panels=[
                wr.LinePlot(title="Validation loss", y=["val/loss"], layout=half[0], **curve),
                wr.LinePlot(title="Training loss", y=["train/loss"], layout=half[1], **curve),
                wr.BarPlot(title="Final loss", metrics=["val/loss"], layout=half[2], **variant),
                wr.RunComparer(diff_only="split", layout=wide),
            ],
        ),
        wr.H2("Table and figure"),
        wr.PanelGrid(
            runsets=runs("summary"),
            panels=[
                wr.MediaBrowser(media_keys=["figure"], layout=wr.Layout(0, 0, 12, 10)),
                wr.WeavePanelSummaryTable(table_name="ablation", layout=wr.Layout(12, 0, 12, 10)),
            ],
        ),
    ]
