"""What an experiment asks of its text, beside what the text has: epochs, and what is cut short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from components.registry import path_from
from experiments.record import UserError

if TYPE_CHECKING:
    from experiments.data import Dataset
    from experiments.schema import Data, Experiment

MANY_EPOCHS = 4  # up to here repeated text is worth almost as much as new: Muennighoff et al. 2023
NOTED_CUT = 0.01  # share of training.tokens that whole steps may leave out without a word


def trained_tokens(experiment: Experiment) -> int:
    """Tokens that a finished run has trained on: the budget in whole steps."""
    return experiment.training.steps * experiment.training.tokens_per_step


def epochs(tokens: int, data: Dataset) -> float:
    """How often `tokens` training tokens go through the training split."""
    return tokens / len(data.train)


def on_hub(data: Data) -> bool:
    """Whether the text is a data set of the hub, which only a connection tells about."""
    params = data.corpus.params
    if data.corpus.name != "huggingface":
        return False
    return not path_from(str(params.get("relative_to", "")), str(params["path"])).exists()


def prepared(data: Data, cache: Path, *, check: bool = False) -> Dataset | None:
    """The shards for `data` where `cache` has them; None where they are not made yet, and of the
    hub's data sets. Prepares nothing.

    Args:
        check: look for the text also where there is no cache yet.

    Raises:
        UserError: with `check`, a file of the corpus is not there or can't be read.
    """
    from experiments.data import cache_key, load

    if on_hub(data) or not (check or cache.is_dir()):
        return None
    try:
        folder = cache / cache_key(data)
    except UserError:
        if check:
            raise
        return None
    try:
        return load(folder) if folder.is_dir() else None
    except UserError:  # damaged: the next run makes it again
        return None


def warnings(experiment: Experiment, data: Dataset | None) -> Iterator[str]:
    """A line for each thing that a run will do otherwise than its numbers say.

    Without `data`, only what the experiment alone shows.
    """
    t, e = experiment.training, experiment.evaluation
    trained, step = trained_tokens(experiment), t.tokens_per_step
    if trained < t.tokens * (1 - NOTED_CUT):
        yield (
            f"training.tokens: {trained:,} of {t.tokens:,} are trained, "
            f"{t.steps:,} whole steps of {step:,}"
        )
    scored = e.every if e.tasks else None
    for key, every in (("evaluation.every_tokens", e.every_tokens), ("evaluation.every", scored)):
        if every is not None and every > trained:
            yield (
                f"{key}: {every:,} is more than the {trained:,} tokens of training, so there is "
                "nothing between start and end"
            )
    if data is None:
        return
    if (repeats := epochs(trained, data)) > MANY_EPOCHS:
        yield (
            f"training.tokens: {trained:,} are {times(repeats)} epochs of the training split's "
            f"{len(data.train):,} tokens; past about {MANY_EPOCHS}, repeated text is worth less "
            "than new (Muennighoff et al. 2023, arXiv 2305.16264)"
        )
    yield from _validation(experiment, data)


def _validation(experiment: Experiment, data: Dataset) -> Iterator[str]:
    """What the validation split is too short for."""
    asked, seq_len = experiment.evaluation.tokens, experiment.training.seq_len
    windows = (len(data.val) - 1) // seq_len
    reported = min(asked // seq_len, windows)
    if 0 < windows < asked // seq_len:
        yield (
            f"evaluation.tokens: {asked:,} are asked for and the validation split has "
            f"{len(data.val):,}, so val/loss is over {reported * seq_len:,}"
        )
    if 0 < windows <= reported:
        yield (
            "tuning/loss: will be null, since validation takes the whole split; lower "
            "evaluation.tokens to leave text to tune on"
        )


def times(count: float) -> str:
    """`0.035`, `2.5`, `41`, `417,000`: three digits at the most worth reading."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"
