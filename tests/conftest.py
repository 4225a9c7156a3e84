"""What all tests share: one CPU thread, no network, a small real text, and a real Slurm."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ceteris-hf-")  # no leftovers of other runs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"  # whoever is logged in; tests that want it say so

import pytest
from hypothesis import HealthCheck, settings

from tests.slurm import PrivateSlurm, is_slurms, missing

ROOT = Path(__file__).parent.parent
# Hypothesis would fail a test whose examples are slow, or slow to draw: as on a busy machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
for name in [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_MODE"]:
    del os.environ[name]
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 kB of English: the licence-free parts of Python's own topics, one per document."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n<|doc|>\n".join(topics[k] for k in sorted(topics))[:60_000], "utf-8")
    return path


@pytest.fixture
def tiny_yaml(tmp_path: Path, text_file: Path) -> Path:
    """An experiment that trains in a second or two: 2 layers of 32, bytes, 40 steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
model: {{d_model: 32, n_layers: 2, n_heads: 2, max_seq_len: 64}}
data:
  corpus: {{name: text, files: "{text_file}", separator: "<|doc|>"}}
  tokenizer: bytes
  validation_fraction: 0.2
training: {{tokens: 10240, seq_len: 32, global_batch_size: 8, lr: 3e-3}}
evaluation: {{every_tokens: 3000, tokens: 2000}}
execution: {{threads: 1, log_every: 3}}
"""
    )
    return path


NO_SLURM = "no real Slurm"


@pytest.fixture(scope="session")
def slurm_of_session() -> Iterator[PrivateSlurm]:
    """One private Slurm for all tests that want one; they take it through `slurm`."""
    if reason := missing():
        pytest.skip(f"{NO_SLURM}: {reason}")
    with PrivateSlurm(nodes=2, gpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_accounting_of_session() -> Iterator[PrivateSlurm]:
    """The same with slurmdbd; taken through `slurm_accounting`."""
    if reason := missing(accounting=True):
        pytest.skip(f"{NO_SLURM}: {reason}")
    with PrivateSlurm(nodes=2, accounting=True) as cluster:
        yield cluster


@pytest.fixture
def slurm(
    slurm_of_session: PrivateSlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PrivateSlurm]:
    """A real Slurm whose commands this test, and what it starts, find; idle and whole at first."""
    yield from lent(slurm_of_session, monkeypatch)


@pytest.fixture
def slurm_accounting(
    slurm_accounting_of_session: PrivateSlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PrivateSlurm]:
    """As `slurm`; sacct answers (a few seconds late), and accounts and QOS are enforced."""
    yield from lent(slurm_accounting_of_session, monkeypatch)


def lent(cluster: PrivateSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateSlurm]:
    for name in filter(is_slurms, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a real Slurm share one, so they go to one worker (`pytest --dist loadgroup`)."""
    for item in items:
        if {"slurm_of_session", "slurm_accounting_of_session"} & {
            *getattr(item, "fixturenames", ())
        }:
            item.add_marker(pytest.mark.slurm)
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A green suite that never met Slurm says so."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    found = Counter(re.findall(f"{NO_SLURM}: (.*?)['\")\\]]*$", "\n".join(skipped), re.MULTILINE))
    if found:
        terminalreporter.section("NOT RUN", sep="!", red=True, bold=True)
    for reason, count in found.items():
        terminalreporter.line(
            f"tests on a real Slurm that were NOT run: {count} ({reason})", red=True
        )
