"""What all tests share: one CPU thread, no network, and a small real text."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).parent.parent


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
