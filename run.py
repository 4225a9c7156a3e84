"""The command line. Thin: each command imports what it needs when it runs.

stdout carries data, stderr messages. Exit codes: 0 ok, 1 some run failed (`train`: or diverged; in
a sweep that is a result, marked in its table), 2 usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import locale
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])
SEED = click.IntRange(0, 2**63 - 1)
COMMANDLINE = click.core.ParameterSource.COMMANDLINE
FORMATS = {"md": "markdown", "latex": "latex", "html": "html", "csv": "csv", "json": "json"}
ENDINGS = {  # of files that --out writes; a format of FORMATS
    ".md": "md",
    ".markdown": "md",
    ".tex": "latex",
    ".latex": "latex",
    ".html": "html",
    ".htm": "html",
    ".csv": "csv",
    ".json": "json",
}
BINARY = (".xlsx", ".xls", ".ods", ".docx", ".odt", ".pdf", ".png", ".svg", ".parquet", ".pkl")
MOST_DRAWN = 200  # runs whose curves `table` draws; the figures of more are the report's


class Commands(click.Group):
    """Commands in the order of a piece of work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ceteris", prog_name="ceteris")
def cli() -> None:
    """Ceteris: find out, with all else equal, which parts of a language model matter.

    \b
    An EXPERIMENT or SWEEP is a YAML file or a preset's name. Examples:
      python run.py train gpt2-tiny training.tokens=1e6
      python run.py sweep demo && python run.py table demo --format latex
    """


# --- options that several commands share ---------------------------------------------------------


class HomePath(click.Path):
    """A path in which `~` is the home folder: a shell leaves it in `--runs=~/r`."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111


def runs_option(command: F) -> F:
    return click.option(
        "--runs",
        "root",
        type=HomePath(path_type=Path, file_okay=False),
        default=lambda: os.environ.get("CETERIS_RUNS", "runs"),
        show_default="$CETERIS_RUNS, or runs",
        help="Where runs live.",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", "-n", is_flag=True, help="Show what would be done.")(command)


def workers_option(command: F) -> F:
    return click.option(
        "--workers", type=click.IntRange(min=1), help="Runs at a time; as many as pay by default."
    )(command)


def cluster_option(command: F) -> F:
    return click.option(
        "--cluster",
        default=lambda: os.environ.get("CETERIS_CLUSTER"),
        show_default="$CETERIS_CLUSTER",
        help="A cluster file, or the name of an example.",
    )(command)


def redo_options(command: F) -> F:
    for option in (
        click.option("--seed", "seeds", type=SEED, multiple=True, help="Of this seed only."),
        click.option("--row", "labels", multiple=True, help="With --redo: of the row LABEL only."),
        click.option("--redo", is_flag=True, help="Train again, beside the runs that are there."),
    ):
        command = option(command)
    return command


def takes(argument: str, *kinds: str) -> Callable[[F], F]:
    """Refuses an argument that means something of a kind which the command does not take."""

    def wrap(command: F) -> F:
        @functools.wraps(command)
        def checked(*args: Any, **kwargs: Any) -> Any:
            root = kwargs.get("root") or Path(os.environ.get("CETERIS_RUNS", "runs"))
            words = kwargs[argument]
            for word in (words,) if isinstance(words, str) else words or ():
                with contextlib.suppress(OSError, ValueError):  # what it plainly is needs no search
                    if "MADE" in kinds and (root / "sweeps" / f"{word}.json").is_file():
                        continue
                    if "RUN" in kinds and (root / word / "experiment.yaml").is_file():
                        continue
                from sweeps import targets

                wanted = [getattr(targets, kind) for kind in kinds]
                targets.expect(root, word, wanted, str(click.get_current_context().info_name))
            return command(*args, **kwargs)

        return cast("F", checked)

    return wrap


def writes_table(command: F) -> F:
    """Refuses an --out whose ending contradicts --format, or is none of ours, before any work."""

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        form, target, as_json = kwargs["form"], kwargs["target"], kwargs["as_json"]
        if as_json and (target is not None or form not in (None, "json")):
            raise click.UsageError("--json prints JSON; with --out or --format, use --format json")
        if target is not None:
            check_ending(target, form)
        return command(*args, **kwargs)

    return cast("F", checked)


def check_ending(target: Path, form: str | None) -> None:
    """Raises UsageError where a file's ending is not that of the format, or says no format."""
    ending = target.suffix.lower()
    own = ENDINGS.get(ending)
    known = ", ".join(ENDINGS)
    if ending in BINARY or (ending and own is None and form is None):
        raise click.UsageError(
            f"--out {target}: no table is written as {ending} (known endings: {known}); "
            "a spreadsheet opens .csv"
        )
    if own is not None and form is not None and own != form:
        raise click.UsageError(
            f"--out {target} is {own} by its ending, and --format says {form}: change one of them"
        )


def folder_only(context: click.Context, parameter: click.Parameter, value: Path | None) -> Any:
    """Of an --out that takes a folder: refuses what is plainly the name of a file."""
    if value is not None and value.suffix.lower() in (*ENDINGS, *BINARY) and not value.is_dir():
        raise click.UsageError(
            f"--out {value}: several files are written; give a folder, such as {value.stem}"
        )
    return value


made_sweep = takes("name", "SWEEP", "MADE")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
sweep_argument = click.argument("name", metavar="SWEEP")


def out(data: Any) -> None:
    """Data to stdout, as JSON."""
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    """A message to stderr."""
    click.echo(text, err=True)


def show_rich(renderable: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(renderable)


# --- one run -------------------------------------------------------------------------------------


@cli.command()
@click.argument("experiment")
@overrides_argument
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--redo", is_flag=True, help="From the start, beside the run that is there.")
@runs_option
@dry_run_option
@json_option
@takes("experiment", "EXPERIMENT")
def train(
    experiment: str,
    overrides: tuple[str, ...],
    seed: int,
    redo: bool,
    root: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train one EXPERIMENT, or go on where it was stopped."""
    from experiments import attempts, environment
    from experiments.loader import load, run_id

    environment.check_ranks()
    checked = load(experiment, overrides)
    run = attempts.Attempts(root).choose(checked, run_id(checked, seed), redo=redo)
    state = run.state  # a damaged result is told here
    for line in attempts.explain(checked, run, redo=redo):
        say(line)
    slow = slow_bf16({"": checked}) if state not in ("done", "diverged") else None
    if slow is not None and int(os.environ.get("RANK", "0")) == 0:
        say(slow)
    if dry_run:
        from components.decoder import count
        from experiments import budget
        from experiments.data import vocab_size

        data = budget.prepared(checked.data, root / "data", check=True)
        model = checked.model
        vocabulary = vocab_size(checked.data, root / "data")
        counts = count(
            checked.dims(vocabulary), model.specs, model.tie_embeddings, checked.training.seq_len
        )
        plan: dict[str, Any] = {
            "schema": 1,
            "id": run.id,
            "state": state,
            "folder": str(run.folder),
            "steps": checked.training.steps,
            "tokens": (tokens := budget.trained_tokens(checked)),
            "epochs": None if data is None else budget.epochs(tokens, data),
            "parameters": counts.parameters,
            "flops_per_token": counts.flops_per_token,
            "warnings": list(budget.warnings(checked, data)),
        }
        if as_json:
            out(plan)
            return
        if data is None:
            plan["epochs"] = "not known until the text is prepared"
        click.echo("\n".join(f"{k}: {v}" for k, v in plan.items() if k != "warnings"))
        for line in plan["warnings"]:
            say(line)
        return
    from experiments import evaluate, scores
    from experiments.record import read_json
    from experiments.scores import ScoringFailed
    from experiments.trainer import train as run_training

    evaluate.check(checked.evaluation, fetch=True)
    unscored, before = None, state in ("done", "diverged")
    try:
        result = run_training(checked, seed, root, progress="bar", run=run)
    except ScoringFailed as error:
        result, unscored = read_json(run / "result.json"), error
    leave_group()
    if int(os.environ.get("RANK", "0")) != 0:  # one of several processes speaks
        return
    if before and not as_json:
        say(f"{run.id}: finished before{on_date(run / 'result.json')}; result as stored")
    if as_json:
        out(result)
    elif result["status"] == "done":
        click.echo(f"val/loss {result['val/loss']:.4f}  val/bpb {result['val/bpb']:.4f}")
        tasks = checked.evaluation.tasks
        if tasks and (found := scores.of_tasks(run, result["step"], checked.evaluation)):
            show_scores(found)
        say(f"{run.folder}\nnext: python run.py generate {run.id} --prompt 'Return the'{at(root)}")
    if unscored is not None:
        say(f"error: trained, but not scored: {unscored}")
        say(f"next, for the scores alone: python run.py eval {run.id}{at(root)}")
        sys.exit(1)
    if result["status"] != "done":
        say(f"diverged: {result['reason']}")
        sys.exit(1)


def on_date(path: Path) -> str:
    """`, on 2026-03-01`: the day on which a record was written."""
    import datetime

    with contextlib.suppress(OSError):
        return f", on {datetime.date.fromtimestamp(path.stat().st_mtime)}"
    return ""


def slow_bf16(experiments: dict[str, Any]) -> str | None:
    """A warning where these experiments, by label, train in bf16 on a CPU that is slow at it."""
    from components import products

    settings = {k: (e.training.precision, e.execution.device) for k, e in experiments.items()}
    return products.slow_bf16(settings)


def leave_group() -> None:
    """Ends the work of several processes together: else gloo's threads may end one by a signal."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch.distributed import destroy_process_group, is_initialized

        if is_initialized():
            destroy_process_group()


def scoring_options(command: F) -> F:
    for option in reversed(
        [
            click.option("--tasks", help="lm-eval tasks, groups or tags, with commas between."),
            click.option("--limit", help="First items of each task; below 1: a share; or all."),
            click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples."),
            click.option(
                "--include-path", type=HomePath(), help="A folder of task YAMLs of your own."
            ),
            click.option("--max-length", type=click.IntRange(min=1), help="Tokens seen at once."),
            click.option("--add-bos-token", is_flag=True, default=None, help="Before contexts."),
            click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of weights."),
        ]
    ):
        command = option(command)
    return command


@cli.command("eval")
@click.argument("target", metavar="RUN|SWEEP")
@scoring_options
@click.option("--checkpoint", type=click.IntRange(min=0), help="Its step; the newest by default.")
@click.option("--probe", is_flag=True, help="What can these tasks tell? Keeps no score.")
@cluster_option
@runs_option
@workers_option
@json_option
@takes("target", "RUN", "SWEEP", "MADE")
def evaluate_command(
    target: str,
    checkpoint: int | None,
    probe: bool,
    cluster: str | None,
    root: Path,
    workers: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Score RUN, or the trained runs of SWEEP, on tasks of lm-eval: what is not scored yet.

    Without --tasks those of the experiment. --probe scores the first 200 items of each task (of a
    sweep: on its baseline) and says on which of them this model is above chance.
    """
    from experiments import environment, evaluate, scores, tracking
    from experiments.record import find
    from experiments.yaml_text import read

    environment.check_ranks()
    change = {key: value for key, value in given.items() if value is not None}
    if "tasks" in change:
        change["tasks"] = tuple(t.strip() for t in change["tasks"].split(",") if t.strip())
    if "include_path" in change:
        change["include_path"] = str(Path(change["include_path"]).resolve())
    if "limit" in change:
        change["limit"] = read_limit(change["limit"])
    run, record = None, scored_sweep(root, target)
    if record is not None and not probe:
        if checkpoint is not None:
            raise click.UsageError(
                "--checkpoint is of one RUN; a sweep's runs are scored at their end"
            )
        score_sweep(record, change, root, cluster, workers, as_json)
        return
    if record is not None:
        from sweeps import scoring

        done = scoring.trained(root, record)[0]
        run = find(root, done[0]) if done else None
    if probe:
        change.setdefault("limit", scores.PROBE_ITEMS)
    run = run or find(root, target)
    where = tracking.place(read(run / "experiment.yaml").data.get("tracking"))
    failed = None
    try:
        records = evaluate.score_run(run, change, checkpoint=checkpoint, kept=not probe, say=say)
    except scores.ScoringFailed as error:  # the others are shown
        records, failed = dict(error.records), error
    leave_group()
    if int(os.environ.get("RANK", "0")) == 0:
        if records and not probe:
            with tracking.mirrored(run, where, {}, say):
                pass
        if as_json:
            out({"schema": 1, "run": run.id, "scores": records})
        elif records:
            show_scores(records)
        if failed is not None:
            say(f"error: {failed}")
        elif not probe and not as_json:
            say(f"kept in {run.folder}/scores")
    if failed is not None:
        sys.exit(1)


def read_limit(text: str) -> int | float | None:
    """`100`, `0.1`, or `all` for no limit where the experiment has one."""
    if text == "all":
        return None
    try:
        number = float(text)
        return int(number) if number == int(number) else number
    except (ValueError, OverflowError):
        raise click.UsageError(f"--limit {text}: give a number of items, a share, or all") from None


def scored_sweep(root: Path, name: str) -> dict[str, Any] | None:
    """The manifest that a name means, if it means one."""
    from experiments.record import UserError
    from sweeps import manifest

    if (Path(name) / "experiment.yaml").is_file():
        return None
    try:
        return manifest.load(root, name)
    except UserError:
        if manifest.path_of(root, Path(name).stem).exists():
            raise
        return None


def score_sweep(
    record: dict[str, Any],
    change: dict[str, Any],
    root: Path,
    cluster: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Scores the trained runs of a sweep here or on Slurm, and shows the table."""
    from sweeps import cluster as clusters
    from sweeps import control, manifest, scoring

    wanted = scoring.with_tasks(record, change)
    _, others = scoring.trained(root, record)
    if others:
        say(f"{len(others)} runs are not trained yet, and left out")
    file = clusters.load(cluster) if cluster is not None else None
    if file is not None and file.cluster.executor == "slurm":
        say_sent(control.submit(root, wanted, file, "unscored"), record["name"], root, as_json)
        return
    manifest.write(root, wanted)
    carry_out(wanted, root, workers, as_json, leave=others)


def show_scores(records: dict[str, Any]) -> None:
    """Scores for a terminal, with what they can tell."""
    from rich.table import Table

    from experiments import scores

    table = Table(box=None, pad_edge=False)
    for title in ("task", "items", "score (95% of items)", "chance", "", "bits/byte", "P(answer)"):
        table.add_column(title)
    rows = scores.lines(records)
    for row in rows:
        table.add_row(*row)
    show_rich(table)
    if blind := [row[0] for row in rows if row[4] == "at chance"]:
        say(f"at chance, so they can't tell variants apart at this size: {', '.join(blind)}")
        if any(row[4] == "at chance" and row[5] != "—" for row in rows):
            say("compare their bits per byte or probability of the right answer instead")
    for key, what in scores.COUNTED.items():
        if some := [f"{name} {r[key]}" for name, r in records.items() if r[key]]:
            say(f"items {what}: {', '.join(some)}")


def at(root: Path) -> str:
    """The --runs option for a suggested command, where it is needed."""
    usual = os.path.expanduser(os.environ.get("CETERIS_RUNS", "runs"))  # noqa: PTH111
    return "" if str(root) == usual else f" --runs {shlex.quote(str(root))}"


@cli.command()
@click.argument("experiment")
@overrides_argument
@json_option
@takes("experiment", "EXPERIMENT")
def show(experiment: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print an EXPERIMENT resolved: every default filled in, as YAML."""
    from experiments.loader import load, resolved, to_yaml

    checked = load(experiment, overrides)
    if as_json:
        out({"schema": 1, "experiment": resolved(checked)})
    else:
        click.echo(to_yaml(checked), nl=False)


@cli.command()
@click.argument("kind", required=False)
@click.argument("name", required=False)
@click.option(
    "--import",
    "imports",
    multiple=True,
    type=HomePath(path_type=Path),
    help="A .py file of your own.",
)
@json_option
def components(
    kind: str | None, name: str | None, imports: tuple[Path, ...], as_json: bool
) -> None:
    """List what can stand in an experiment: all, one KIND, or one NAME with its parameters."""
    from components import catalogue

    rows = catalogue.rows(kind, name, imports)
    out({"schema": 1, "components": rows}) if as_json else click.echo(
        catalogue.text(rows, whole=name is not None)
    )


@cli.command()
@click.argument("file")
@click.argument("words", nargs=-1, metavar="[KIND:NAME a=b ...]")
@json_option
def check(file: str, words: tuple[str, ...], as_json: bool) -> None:
    """Check what the components of FILE promise: a .py file of yours, or an experiment.

    \b
    Every component of a .py file with its defaults, and with the parameters that you add:
      python run.py check parts.py mixer:gated conv=4 mixer:gated conv=2 model.position=rotary
    Of an experiment, its components with their parameters (and overrides a.b=c).
    """
    from components import contract_report as reports
    from experiments import precheck

    cases = precheck.cases(file, words)
    found = []
    for case in cases:
        found.append(reports.report(case))
        if not as_json:
            click.echo("\n".join(found[-1].lines()))
    kept = sum(report.kept for report in found)
    if as_json:
        rows = [report.as_json() for report in found]
        out({"schema": 1, "kept": kept == len(found), "components": rows})
    say(f"{kept} of {len(found)} keep their contract (docs/add-a-component.md)")
    sys.exit(0 if kept == len(found) else 1)


def sampling_options(command: F) -> F:
    for option in reversed(
        [
            click.option(
                "--max-tokens",
                default=200,
                show_default=True,
                help="New tokens; where the context is full, its later half goes on.",
            ),
            click.option("--temperature", default=0.8, show_default=True, help="0: likeliest."),
            click.option("--top-k", type=int, help="Only the k likeliest tokens."),
            click.option("--top-p", type=float, help="Only the likeliest that reach p together."),
            click.option("--seed", type=SEED, default=0, show_default=True, help="Of the draws."),
            click.option("--samples", "-s", type=click.IntRange(min=1), default=1),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("run")
@click.option("--prompt", default="", help="What the text begins with; nothing by default.")
@sampling_options
@runs_option
@json_option
@takes("run", "RUN")
def generate(
    run: str, prompt: str, samples: int, root: Path, as_json: bool, **sampling: Any
) -> None:
    """Continue a text with the model of RUN (an id, its first letters, or a folder)."""
    from experiments.generate import Printer, Sampling
    from experiments.generate import generate as continue_text
    from experiments.model import open_run
    from experiments.record import UserError, find

    how = Sampling(**sampling)
    trained, data = open_run(find(root, run))
    if as_json:
        results = continue_text(trained.model, data.tokenizer, prompt, how, samples)
        texts = [{"text": r.text, "tokens": r.tokens, "ended": r.ended} for r in results]
        out({"schema": 1, "prompt": prompt, "continuations": texts})
        return
    page = Printer(prompt, samples, functools.partial(click.echo, nl=False))  # which flushes
    try:
        continue_text(trained.model, data.tokenizer, prompt, how, samples, page.write)
    except (KeyboardInterrupt, UserError):
        page.stop()
        raise


@cli.command()
@sweep_argument
@click.option("--prompt", default="", help="What each text begins with.")
@sampling_options
@runs_option
@json_option
@made_sweep
def sample(
    name: str, prompt: str, samples: int, root: Path, as_json: bool, **sampling: Any
) -> None:
    """A text from the first finished run of each row of SWEEP, side by side to read."""
    from experiments.generate import Sampling
    from experiments.generate import generate as continue_text
    from experiments.model import open_run
    from experiments.record import Run, UserError
    from sweeps import manifest

    how = Sampling(**sampling)
    texts = []
    for row in manifest.load(root, name)["rows"]:
        done = [i for i in row["runs"].values() if Run(root, i).state == "done"]
        if done:
            trained, data = open_run(Run(root, done[0]))
            for result in continue_text(trained.model, data.tokenizer, prompt, how, samples):
                texts.append({"label": row["label"], "run": done[0], "text": prompt + result.text})
    if not texts:
        raise UserError(f"{name}: no run is done yet; start them with: run.py sweep {name}")
    if as_json:
        out({"schema": 1, "texts": texts})
        return
    for text in texts:
        click.echo(f"── {text['label']} ({text['run']})\n{text['text']}\n")


# --- many runs -----------------------------------------------------------------------------------


@cli.command()
@sweep_argument
@overrides_argument
@runs_option
@json_option
@takes("name", "SWEEP")
def plan(name: str, overrides: tuple[str, ...], root: Path, as_json: bool) -> None:
    """Rows of SWEEP as differences from its base: size, cost, and what is done already."""
    from sweeps import design
    from sweeps import plan as planning

    designed = design.load(name, overrides)
    planned = planning.plan(designed, root)
    warnings = design_warnings(planned, root)
    slow = slow_bf16({row.label: row.experiment for row in designed.variants})
    warnings += [] if slow is None else [slow]
    if as_json:
        out({**planned.as_json(), "warnings": warnings})
    else:
        show_rich(planning.render(planned))
        for line in warnings:
            say(line)
        say(f"next: python run.py sweep {name}{at(root)}")


def design_warnings(planned: Any, root: Path) -> list[str]:
    """What a sweep's design can't find, and grids of `tune` whose best value is at their edge."""
    from analysis import comparison, power, results
    from experiments.record import UserError
    from sweeps import manifest
    from sweeps import plan as planning

    rows = [row for row in planned.rows if row.try_of is None]
    warning = power.design_warning(len(planned.seeds), len(rows) - 1)
    lines = [] if warning is None else [warning]
    path = manifest.path_of(root, planned.name)
    if planned.tune is None or not path.exists():
        return lines
    with contextlib.suppress(UserError):  # what came of it is told by `table`
        record = results.read_manifest(path)
        compared = comparison.compare(record, results.read_runs(record, root))
        lines += planning.at_edges(
            (row.label, row.tuning.path, [t.value for t in row.tuning.tries], row.tuning.edge)
            for row in compared.rows
            if row.tuning is not None
        )
    return lines


@cli.command()
@sweep_argument
@overrides_argument
@redo_options
@runs_option
@workers_option
@dry_run_option
@json_option
@takes("name", "SWEEP")
def sweep(
    name: str,
    overrides: tuple[str, ...],
    redo: bool,
    labels: tuple[str, ...],
    seeds: tuple[int, ...],
    root: Path,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run what SWEEP still lacks on this machine, then print its table."""
    from sweeps import design, manifest, stale
    from sweeps import plan as planning

    designed = design.load(name, overrides)
    again = stale.chosen(designed, redo, labels, seeds)
    planned = planning.plan(designed, root, redo=again)
    if dry_run:
        out(planned.as_json()) if as_json else show_rich(planning.render(planned))
        return
    for line in planned.stale:
        say(line)
    if planned.missing:
        check_rows(designed, planned, root)
    manifest.write(root, planned.manifest)
    if redo:
        stale.open_attempts(root, planned.manifest)
    carry_out(manifest.load(root, designed.name), root, workers, as_json)


def check_rows(designed: Any, planned: Any, root: Path) -> None:
    """What would waste the runs of a sweep: text that is not there, rows that do nothing."""
    from sweeps import guard
    from sweeps import plan as planning

    planning.check_data(designed)
    guard.check(designed, planned.manifest, root, say)


@cli.command()
@sweep_argument
@overrides_argument
@cluster_option
@runs_option
@dry_run_option
@json_option
@takes("name", "SWEEP")
def submit(
    name: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    root: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Submit what SWEEP lacks to Slurm, and return. What is done or queued is left alone."""
    from experiments import tracking
    from sweeps import cluster as clusters
    from sweeps import control, design, manifest
    from sweeps import plan as planning

    file = clusters.load(needed(cluster))
    designed = design.load(name, overrides)
    local = file.cluster.executor == "local"
    planned = planning.plan(designed, root, here=local)
    tracking.place(planned.manifest["rows"][0]["experiment"]["tracking"])  # WANDB_MODE is none?
    if dry_run and local:
        out(planned.as_json()) if as_json else show_rich(planning.render(planned))
        return
    if dry_run:
        show_submission(planned, file, root, as_json)
        return
    for line in planned.stale:
        say(line)
    if planned.missing:
        check_rows(designed, planned, root)
    if local:
        manifest.write(root, planned.manifest)
        record = manifest.load(root, designed.name)
        carry_out(record, root, file.cluster.workers, as_json, file.cluster.workers_per_gpu)
    else:
        sent = control.submit(root, planned.manifest, file)
        say_sent(sent, designed.name, root, as_json)


def needed(cluster: str | None) -> str:
    """The cluster file's name.

    Raises:
        UserError: none was given.
    """
    from experiments.record import UserError

    if cluster is None:
        raise UserError(
            "which cluster? write --cluster FILE (an example to copy: sweeps/clusters/), "
            "or set $CETERIS_CLUSTER"
        )
    return cluster


def show_submission(planned: Any, file: Any, root: Path, as_json: bool) -> None:
    """What would be submitted: the plan, what it may cost at the most, and sbatch's text."""
    from sweeps import control, slurm
    from sweeps import plan as planning

    jobs, silence = control.lacking(root, planned.manifest)
    cost = slurm.cost_text(jobs, file.cluster)
    text = slurm.script(root, planned.name, jobs, file.cluster) if jobs else ""
    if as_json:
        out({**planned.as_json(), "cost": cost, "sbatch": text})
    else:
        show_rich(planning.render(planned))
        click.echo(f"\n{cost}\n\n{text}", nl=False)
    if silence:
        say(f"Slurm gives no answer, queued runs are counted as to be submitted: {silence}")
    elif jobs:
        say(slurm.check(text, file))


def say_sent(sent: Any, name: str, root: Path, as_json: bool) -> None:
    """What was submitted, what was left alone, and what Slurm would not take."""
    from experiments.record import FINISHED

    made, left = sent.submitted.submissions, sent.submitted.left
    if as_json:
        jobs = [{"job": s.job, "runs": [list(t) for t in s.tasks], "folder": str(s.folder)}
                for s in made]  # fmt: skip
        refused = {"left": [job.id for job in left], "refusal": sent.submitted.refusal}
        out({"schema": 1, "sweep": name, "jobs": jobs, **refused})
    else:
        for s in made:
            runs = sum(map(len, s.tasks))
            count = len(s.tasks)
            packed = f" in {count} job{'s' * (count != 1)}" if runs > count else ""
            click.echo(f"job {s.job}: {runs} run{'s' * (runs != 1)}{packed}")
    done = sum(row.state in FINISHED for row in sent.rows)
    say(f"{name}: {done} finished before, {len(sent.underway)} running or queued already, "
        f"{sum(len(t) for s in made for t in s.tasks)} submitted now")  # fmt: skip
    if left:
        say(f"error: {len(left)} runs were not taken: {sent.submitted.refusal}")
        say(
            f"later, for the rest, the same again; meanwhile: python run.py status {name}{at(root)}"
        )
        sys.exit(2)
    unfinished = bool(made) or bool(sent.underway)
    what = f"status {name} --watch" if unfinished else f"table {name}"
    say(f"next: python run.py {what}{at(root)}")


def carry_out(
    record: dict[str, Any],
    root: Path,
    workers: int | None,
    as_json: bool,
    per_gpu: int = 1,
    leave: Collection[str] = (),
) -> None:
    """Runs what is missing but `leave`; shows and writes the table; exits as the module says."""
    from analysis import wandb_push as pushing
    from sweeps import local, manifest
    from sweeps import status as states

    where = pushing.place_wanted(record)
    queued = {row.id for row in states.sweep_status(root, record) if row.state == "queued"}
    if queued:
        say(f"{len(queued)} runs are queued on Slurm and left to it (cancel takes them back)")
    outcome = local.run_manifest(
        record, root, workers=workers, workers_per_gpu=per_gpu, leave={*queued, *leave}
    )
    say("")
    show_table(manifest.path_of(root, record["name"]), root, as_json)
    if where is not None:
        say("\n".join(pushing.outcome(root, record, where, table=not outcome.interrupted)))
    if outcome.interrupted:
        say(f"stopped; nothing is lost. Go on with: python run.py retry {record['name']}{at(root)}")
        sys.exit(130)
    if outcome.failed:
        say("\n".join(states.failures(states.sweep_status(root, record))))
        say(f"next: python run.py retry {record['name']}{at(root)}")
        sys.exit(1)
    say(f"next: python run.py sample {record['name']} --prompt 'Return the'{at(root)}")


def show_table(
    path: Path, root: Path, as_json: bool, columns: tuple[str, ...] | None = None
) -> None:
    """The table in the terminal; in its usual columns also on disk, with a figure."""
    from analysis import comparison, render, results
    from analysis import table as tables
    from experiments.record import UserError

    record = results.read_manifest(path)
    runs = results.read_runs(record, root)
    compared = comparison.compare(record, runs, root)
    table = tables.table(compared, columns, root)
    print_table(table, "json" if as_json else None, None)
    if columns is not None:
        say_missing(record, runs, root)
        return
    written = render.write(table, path)
    if compared.started <= MOST_DRAWN:
        from analysis import figures

        try:
            written += figures.loss_curves(compared, root, path.with_name(f"{path.stem}-curves"))
        except UserError as error:  # the table stands without it
            say(f"no figure: {error}")
    say("written: " + "  ".join(str(p) for p in written))
    say_missing(record, runs, root)


def changes(planned: dict[str, Any], root: Path) -> list[str]:
    """Lines that say what has changed since a sweep was planned: its file, its code, its text."""
    from sweeps import manifest, stale

    changed = manifest.changed_since(root, planned)
    return [*([changed] if changed else []), *stale.lines(planned)]


def say_missing(record: Any, runs: Any, root: Path) -> None:
    """Which runs the table of a `results.Manifest` still lacks, and how they are."""
    from experiments.record import FINISHED
    from sweeps import manifest
    from sweeps import status as states

    scored = any(row.setting("evaluation.tasks") for row in record.rows)
    if not scored and all(run.state in (*FINISHED, "edited") for run in runs.values()):
        return
    rows = states.sweep_status(root, manifest.load(root, record.name))
    lacking = [row for row in rows if row.state not in FINISHED]
    if lacking:
        named = [f"{row.label} s{row.seed} {row.state}" for row in lacking[:6]]
        more = f", and {len(lacking) - 6} more" if len(lacking) > 6 else ""
        say(f"still missing: {len(lacking)} of {len(rows)} runs ({', '.join(named)}{more})")


@cli.command()
@click.argument("name", metavar="[SWEEP]", required=False)
@runs_option
@json_option
@click.option("--watch", is_flag=True, help="Refresh until everything has ended.")
@made_sweep
def status(name: str | None, root: Path, as_json: bool, watch: bool) -> None:
    """Where the runs of SWEEP, or all runs, stand."""
    from sweeps import status as states

    states.command(root, name, as_json=as_json, watch=watch)


@cli.command()
@sweep_argument
@redo_options
@cluster_option
@runs_option
@workers_option
@dry_run_option
@json_option
@made_sweep
def retry(
    name: str,
    redo: bool,
    labels: tuple[str, ...],
    seeds: tuple[int, ...],
    cluster: str | None,
    root: Path,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the failed and interrupted runs of SWEEP again, from their checkpoints.

    With --redo from the start, or any run that --row or --seed names; the old ones are kept.
    Those that were submitted are submitted again, with the settings of the last time or CLUSTER's.
    """
    from sweeps import cluster as clusters
    from sweeps import control, manifest, stale

    record = manifest.load(root, name)
    rows, file = control.to_retry(root, record)
    if redo or labels or seeds:
        rows = stale.rows_to_redo(root, record, rows, redo, labels, seeds)
        record = stale.with_new_attempts(root, record, {row.id for row in rows})
    elif not dry_run:
        stale.check(record, {row.id for row in rows})
    if click.get_current_context().get_parameter_source("cluster") == COMMANDLINE:
        file = clusters.load(needed(cluster))
    if dry_run:
        lines = control.described(rows)
        out({"schema": 1, "runs": lines}) if as_json else click.echo("\n".join(lines) or "nothing")
    elif file is not None and file.cluster.executor == "slurm":
        sent = control.submit(root, record, file, "lacking" if redo else "freed")
        say_sent(sent, record["name"], root, as_json)
    else:
        control.free(root, record, rows)
        if redo:
            manifest.write(root, record)
            stale.open_attempts(root, record)
        carry_out(record, root, workers, as_json)


@cli.command()
@click.argument("target", metavar="RUN|SWEEP")
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@runs_option
@json_option
@takes("target", "RUN", "SWEEP", "MADE")
def rm(target: str, yes: bool, root: Path, as_json: bool) -> None:
    """Remove RUN, or SWEEP with its tables and the runs that no other sweep has. Asks first."""
    from sweeps import removal

    found = removal.found(root, target, scored_sweep(root, target))
    for line in found.lines():
        say(line)
    if not yes:
        click.confirm("Remove them for good?", abort=True, err=True)
    removal.remove(root, found)
    if as_json:
        out({"schema": 1, "sweep": found.sweep, "runs": [run.id for run in found.runs]})
    else:
        say(f"removed: {len(found.runs)} run{'s' * (len(found.runs) != 1)}")


@cli.command()
@sweep_argument
@runs_option
@dry_run_option
@json_option
@made_sweep
def cancel(name: str, root: Path, dry_run: bool, as_json: bool) -> None:
    """Stop the running runs of SWEEP, each after a checkpoint; take the queued ones back."""
    from sweeps import control, manifest

    lines = control.cancel(root, manifest.load(root, name), dry_run=dry_run)
    out({"schema": 1, "cancelled": lines}) if as_json else click.echo("\n".join(lines) or "nothing")
    if lines and not dry_run:
        say(f"next, to go on: python run.py retry {name}{at(root)}")


@cli.command()
@sweep_argument
@click.option("--row", "label", help="The label of its row.")
@click.option("--seed", type=SEED)
@click.option("--lines", "-n", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
@runs_option
@json_option
@made_sweep
def logs(
    name: str,
    label: str | None,
    seed: int | None,
    lines: int,
    follow: bool,
    root: Path,
    as_json: bool,
) -> None:
    """The end of what one run of SWEEP printed, and of what Slurm printed for it."""
    from experiments.record import tail
    from sweeps import logs as logging
    from sweeps import manifest

    record = manifest.load(root, name)
    row = logging.chosen(root, record, label, seed)
    found = {path: tail(path, lines) for path in logging.sources(root, row)}
    if as_json:
        said = [{"file": str(path), "lines": text} for path, text in found.items()]
        out({"schema": 1, "run": row.as_json(), "logs": said})
        return
    say(f"{row.label} s{row.seed}: {row.state}{f': {row.note}' if row.note else ''}")
    for path, text in found.items():
        say(f"── {path}")
        click.echo("\n".join(text))
    if not found:
        say("no log yet")
    if follow:
        logging.follow(root, record, row, lambda text: click.echo(text, nl=False))


@cli.command()
@sweep_argument
@click.option("--columns", help="Their keys, with commas between; or all.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Not for a terminal.")
@click.option("--out", "target", type=HomePath(path_type=Path, dir_okay=False), help="To a file.")
@runs_option
@json_option
@click.option("--wide", is_flag=True, help="LaTeX: table*, over both columns of a page.")
@click.option("--scale", is_flag=True, help="LaTeX: keep all columns, scaled to the line.")
@made_sweep
@writes_table
def table(
    name: str,
    columns: str | None,
    wide: bool,
    scale: bool,
    form: str | None,
    target: Path | None,
    root: Path,
    as_json: bool,
) -> None:
    """The ablation table of SWEEP from its run directories, at any time."""
    from analysis import results
    from analysis import table as tables
    from sweeps import manifest

    form = "json" if as_json else form
    if (wide or scale) and "latex" not in (form, ENDINGS.get(target.suffix) if target else None):
        raise click.UsageError("--wide and --scale are of LaTeX: add --format latex or --out X.tex")
    planned = manifest.load(root, name)
    path = manifest.path_of(root, planned["name"])
    chosen = tuple(key.strip() for key in columns.split(",")) if columns is not None else None
    for line in changes(planned, root):
        say(line)
    if form is None and target is None:
        show_table(path, root, False, chosen)
        return
    record = results.read_manifest(path)
    runs = results.read_runs(record, root)
    made = tables.ablation_table(record, runs, root, chosen)
    say_missing(record, runs, root)
    print_table(made, form, target, wide=wide, scale=scale)


@cli.command()
@sweep_argument
@click.option(
    "--detect",
    type=click.FloatRange(min=0, min_open=True),
    required=True,
    metavar="NATS",
    help="The smallest difference that matters, in nats per token.",
)
@runs_option
@json_option
@made_sweep
def power(name: str, detect: float, root: Path, as_json: bool) -> None:
    """How many seeds SWEEP needs to find a difference, from its measured noise and pairing."""
    from analysis import comparison, results
    from analysis import power as powers
    from sweeps import manifest

    path = manifest.path_of(root, manifest.load(root, name)["name"])
    record = results.read_manifest(path)
    found = powers.report(comparison.compare(record, results.read_runs(record, root)), detect)
    out({"schema": 1, **found.as_json()}) if as_json else click.echo(found.text())


@cli.command()
@click.argument("name", metavar="[PAPER]", required=False)
@click.option(
    "--budget",
    type=click.Choice(["minutes", "gpu-hour"]),
    default="minutes",
    show_default=True,
    help="On two CPU cores, or about an hour on one GPU (an estimate).",
)
@click.option("--no-run", is_flag=True, help="Only from the runs that are there.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Not for a terminal.")
@click.option("--out", "target", type=HomePath(path_type=Path, dir_okay=False), help="To a file.")
@runs_option
@workers_option
@dry_run_option
@json_option
@takes("name", "PAPER")
@writes_table
def reproduce(
    name: str | None,
    budget: str,
    no_run: bool,
    form: str | None,
    target: Path | None,
    root: Path,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a PAPER's ablation in small: measured beside published, claim by claim.

    Without PAPER lists those that there are; a file like those in analysis/published is one too.
    """
    from analysis import claims, comparison, published, results
    from experiments.record import UserError
    from sweeps import manifest

    if name is None:
        papers = [published.load(key) for key in published.names()]
        if as_json:
            listed = [{"name": p.key, "source": p.source, "sweeps": p.file.sweeps} for p in papers]
            out({"schema": 1, "papers": listed})
        else:
            width = max(len(p.key) for p in papers)
            click.echo("\n".join(f"{p.key:{width}}  {p.source}" for p in papers))
        return
    paper = published.load(name)
    names = paper.sweeps(cast("published.Budget", budget))
    if dry_run:
        from sweeps import design
        from sweeps import plan as planning

        plans = [planning.plan(design.load(sweep), root) for sweep in names]
        if as_json:
            out({"schema": 1, "plans": [planned.as_json() for planned in plans]})
        else:
            for planned in plans:
                show_rich(planning.render(planned))
        return
    unfinished, compared = [], []
    for sweep_name in names:
        if not no_run:
            unfinished += run_lacking(sweep_name, root, workers)
        try:
            path = manifest.path_of(root, manifest.load(root, sweep_name)["name"])
        except UserError as error:
            if not no_run:
                raise
            say(str(error))
            continue
        record = results.read_manifest(path)
        runs = results.read_runs(record, root)
        compared.append(comparison.compare(record, runs))
        if record.overrides:
            say(f"{record.name}: was last run with {' '.join(record.overrides)}")
        say_missing(record, runs, root)
    findings = claims.check(paper, compared)
    if as_json:
        told = [claims.as_json(finding) for finding in findings]
        out({"schema": 1, "paper": paper.key, "source": paper.source, "claims": told})
    else:
        print_table(claims.table(paper, findings), form, target)
    if unfinished:
        say("\n".join(unfinished))
        sys.exit(1)


def run_lacking(name: str, root: Path, workers: int | None) -> list[str]:
    """Runs what a sweep lacks on this machine; a line for each run that failed."""
    from sweeps import design, local, manifest
    from sweeps import plan as planning
    from sweeps import status as states

    designed = design.load(name)
    planned = planning.plan(designed, root)
    for line in planned.stale:
        say(line)
    if planned.missing:
        say(f"{designed.name}: {planning.totals(planned)}")
        check_rows(designed, planned, root)
    manifest.write(root, planned.manifest)
    if not planned.missing:
        return []
    record = manifest.load(root, designed.name)
    outcome = local.run_manifest(record, root, workers=workers)
    if outcome.interrupted:
        say("stopped; nothing is lost, the same again goes on")
        sys.exit(130)
    return states.failures(states.sweep_status(root, record)) if outcome.failed else []


@cli.command()
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Not for a terminal.")
@click.option("--out", "target", type=HomePath(path_type=Path, dir_okay=False), help="To a file.")
@runs_option
@json_option
@writes_table
def ledger(form: str | None, target: Path | None, root: Path, as_json: bool) -> None:
    """Every variant ever run, with its effect and verdict; failures too, the newest last."""
    from analysis import ledger as ledgers

    entries, wrong = ledgers.read(root)
    if as_json:
        out({"schema": 1, "entries": [ledgers.as_json(entry) for entry in entries]})
    elif entries:
        print_table(ledgers.table(entries, root), form, target)
    else:
        say(f"nothing has been run in {root} yet")
    for line in wrong:
        say(f"error: {line}")


@cli.command()
@sweep_argument
@click.option(
    "--out",
    "folder",
    type=HomePath(path_type=Path, file_okay=False),
    callback=folder_only,
    help="A folder; by default SWEEP-report beside the sweep's table.",
)
@runs_option
@json_option
@made_sweep
def report(name: str, folder: Path | None, root: Path, as_json: bool) -> None:
    """One page on SWEEP: table, figures, a sentence for each row, methods. No network needed."""
    from analysis import comparison, results
    from analysis import report as reports
    from sweeps import manifest

    planned = manifest.load(root, name)
    path = manifest.path_of(root, planned["name"])
    changed = "\n".join(changes(planned, root)) or None
    if changed:
        say(changed)
    record = results.read_manifest(path)
    runs = results.read_runs(record, root)
    compared = comparison.compare(record, runs, root)
    say_missing(record, runs, root)
    folder = folder or path.with_name(f"{path.stem}-report")
    written = reports.write(compared, planned, root, folder, changed)
    if as_json:
        out({"schema": 1, "page": str(written[0]), "figures": [str(p) for p in written[1:]]})
    else:
        click.echo(written[0])
        say(f"written: {len(written[1:])} figure files in {folder / 'figures'}")


@cli.command()
@click.argument("names", metavar="RUN RUN...", nargs=-1, required=True)
@click.option(
    "--out",
    "folder",
    type=HomePath(path_type=Path, file_okay=False),
    callback=folder_only,
    help="A folder for the figure; by default that of the runs.",
)
@runs_option
@json_option
@takes("names", "RUN")
def compare(names: tuple[str, ...], folder: Path | None, root: Path, as_json: bool) -> None:
    """Any runs side by side: what differs in their configuration, results, curves."""
    from analysis import runs_compared
    from experiments.record import find

    compared = runs_compared.compare([find(root, name) for name in names])
    written = runs_compared.write(compared, folder or root)
    if as_json:
        out({**compared.as_json(), "figures": [str(path) for path in written]})
    else:
        show_rich(runs_compared.text(compared))
    say("written: " + "  ".join(map(str, written)) if written else "no figure: no run has a curve")


def print_table(made: Any, form: str | None, target: Path | None, **of_latex: bool) -> None:
    """A table in a format, by default that of the file's ending, or a terminal's, to a file.

    `of_latex`: what `render.latex` takes besides.
    """
    from analysis import render
    from experiments.record import write_atomically

    if form is None and target is None:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(render.terminal(made, console.width))
        return
    if form is None and target is not None:
        form = ENDINGS.get(target.suffix.lower(), "md")
    if form == "latex":
        text = render.latex(made, **of_latex)
        if gone := render.left_out_of_latex(made, **of_latex):
            say(f"left out for want of width (--wide or --scale keeps more): {', '.join(gone)}")
    else:
        text = render.RENDERERS[FORMATS[str(form)]](made)
    if target is None:
        click.echo(text, nl=not text.endswith("\n"))
    else:
        if target.exists() and not target.is_file():  # a pipe or a device is no file to replace
            target.write_text(text, encoding="utf-8")
        else:
            write_atomically(target.resolve(), text)
        say(f"written: {target}")


# --- wandb ---------------------------------------------------------------------------------------


@cli.group("wandb", cls=Commands)
def wandb_commands() -> None:
    """Show runs in wandb: push, report; or read them from there: pull."""


def ends_quickly(command: F) -> F:
    """Exits without wandb's own end, which would wait for a server that is gone."""

    @functools.wraps(command)
    def carried_out(*args: Any, **kwargs: Any) -> NoReturn:
        from experiments.record import UserError
        from experiments.wandb_client import tidy

        def leave(code: int) -> NoReturn:
            tidy()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

        def interrupted(*_: object) -> NoReturn:
            say("interrupted; the same again does what is lacking")
            leave(130)

        signal.signal(signal.SIGINT, interrupted)  # at once: wandb waits for its server else
        try:
            code = command(*args, **kwargs) or 0
        except UserError as error:
            say("\n".join(f"error: {line}" for line in str(error).splitlines()))
            code = 2
        except BrokenPipeError:
            code = 0
        except Exception:  # a mistake of ours
            traceback.print_exc()
            code = 1
        leave(code)

    return cast("F", carried_out)


def place_options(command: F) -> F:
    entity = click.option("--entity", help="User or team; your own by default.")
    return click.option("--project", help="By default the experiment's.")(entity(command))


@wandb_commands.command("push")
@click.argument("target", metavar="[RUN|SWEEP]", required=False)
@place_options
@runs_option
@json_option
@ends_quickly
@takes("target", "RUN", "SWEEP", "MADE")
def wandb_push(
    target: str | None, project: str | None, entity: str | None, root: Path, as_json: bool
) -> int:
    """Bring RUN, all of SWEEP with its table, or everything to wandb: what is not there yet."""
    from analysis import wandb_push as pushing
    from components.registry import did_you_mean
    from experiments.record import Run, UserError, all_ids, find
    from sweeps import manifest

    record = scored_sweep(root, target) if target is not None else None
    wrong: list[str] = []
    if record is not None:
        sweeps, runs = [record], [Run(root, job.id) for job in manifest.jobs(record)]
    elif target is not None:
        known = sorted(path.stem for path in (root / "sweeps").glob("*.json"))
        if (hint := did_you_mean(target, known)) and target not in all_ids(root):
            raise UserError(f"no sweep '{target}' in {root}{hint}")
        sweeps, runs = [], [find(root, target)]
    else:
        sweeps, wrong = manifest.all_of(root)
        runs = [Run(root, id) for id in all_ids(root)]
    begun = [run for run in runs if (run / "provenance.json").exists()]
    if not begun:
        raise UserError(
            f"nothing has been trained in {root} yet; push what `train` or `sweep` made"
        )
    rows = list(pushing.push(begun, sweeps, project, entity, say))
    failed = [row for row in rows if row["error"]]
    if as_json:
        out({"schema": 1, "pushed": rows})
    elif not failed:
        added = sum(row["rows"] for row in rows)
        say(f"{len(rows)} in wandb, {added} rows added now")
    if failed:
        say(
            f"error: {len(failed)} of {len(rows)} not pushed whole; push again adds what is lacking"
        )
    for line in wrong:
        say(f"error: {line}")
    return 1 if failed or wrong else 0


@wandb_commands.command("report")
@sweep_argument
@place_options
@runs_option
@json_option
@ends_quickly
@made_sweep
def wandb_report(
    name: str, project: str | None, entity: str | None, root: Path, as_json: bool
) -> None:
    """Write a Report on SWEEP in wandb, or bring it up to date (needs ceteris[report])."""
    from analysis import wandb_report as reports
    from analysis.wandb_push import place_of
    from sweeps import manifest

    record = manifest.load(root, name)
    url = reports.report(root, record, place_of(root, record, project, entity))
    out({"schema": 1, "url": url}) if as_json else click.echo(url)


@wandb_commands.command("pull")
@click.argument("project", metavar="[ENTITY/]PROJECT")
@click.option("--group", required=True, help="The sweep.")
@click.option("--by", help="The key of config that names the variant, for runs of other programs.")
@click.option("--baseline", metavar="LABEL", help="Which variant is the baseline.")
@click.option("--metric", default="val/loss", show_default=True, help="In the runs' summaries.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Not for a terminal.")
@click.option("--out", "target", type=HomePath(path_type=Path, dir_okay=False), help="To a file.")
@json_option
@writes_table
@ends_quickly
def wandb_pull(
    project: str,
    group: str,
    by: str | None,
    baseline: str | None,
    metric: str,
    form: str | None,
    target: Path | None,
    as_json: bool,
) -> None:
    """The table of a sweep from runs that are only in wandb."""
    from analysis import table as tables
    from analysis import wandb_runs
    from experiments.tracking import Place

    entity, _, name = project.rpartition("/")
    place = Place("online", name, entity or os.environ.get("WANDB_ENTITY"))
    record, runs, notes = wandb_runs.pulled(place, group, by=by, baseline=baseline, metric=metric)
    for note in notes:
        say(note)
    print_table(tables.ablation_table(record, runs), "json" if as_json else form, target)


def usage(error: click.ClickException) -> str:
    """What was wrong with the words of the command line, in one line."""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        closest = list(error.possibilities)[:1]
        error = click.NoSuchOption(error.option_name, possibilities=closest, ctx=error.ctx)
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "run.py"
    return f"{message[:1].lower()}{message[1:].removesuffix('.')} (see: {command} --help)"


def program() -> None:
    """What the shell starts: `main`, where the environment decides no result.

    Where the locale is not UTF-8, Python starts again in its UTF-8 mode (PEP 686 makes that the
    default): file names, arguments and what libraries open would be other text under Latin-1.
    """
    encodings = {sys.getfilesystemencoding().lower(), locale.getencoding().lower()}
    again = os.environ.get("PYTHONUTF8") != "1"  # once: python -E or -X utf8=0 overrules it
    restart = not sys.flags.utf8_mode and encodings != {"utf-8"} and again
    if restart:
        os.environ["PYTHONUTF8"] = "1"
    if "error" in os.environ.get("PYTHONWARNINGS", ""):  # libraries warn when they are imported
        del os.environ["PYTHONWARNINGS"]
        restart = True
    if restart and sys.executable:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    from experiments import environment

    if (ignored := environment.forget()) and os.environ.get("RANK", "0") == "0":
        more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
        say(f"no effect: {', '.join(ignored[:3])}{more}; experiments decide, not the environment")
    main()


def main() -> None:
    """Runs the command; every mistake a person can make is one line and exit code 2."""
    from experiments.record import Interrupted, UserError

    if isinstance(sys.stdout, io.TextIOWrapper):  # a Latin-1 terminal has no minus sign, nor Δ
        sys.stdout.reconfigure(errors="backslashreplace")
    try:  # as cli.main does, but that a closed pipe is no failure
        with cli.make_context(Path(sys.argv[0]).name, sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except UserError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        sys.exit(2)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        say(f"error: {usage(error)}")
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # no file: a mistake of ours
            raise
        say(f"error: {error.filename or 'the output'}: {error.strerror}")
        sys.exit(2)
    except Interrupted as error:
        say(f"{error}; what is done is saved, run the same again to go on")
        sys.exit(130)
    except Exception as error:
        from components import faults

        place = faults.attribute(error)  # of an imported part? what is ours keeps its traceback
        if place is None:
            raise
        say(f"error: {place}")
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    program()
