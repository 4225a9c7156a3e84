"""Whatever the bytes of a file or the words of a command line, the answer is an experiment or lines
for a person to read; never another exception."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError
from sweeps import design

SEEDS = [
    """\
description: everything at once
model:
  d_model: &width 64
  n_layers: 2
  n_heads: 4
  norm: {name: rmsnorm, eps: 1e-6}
  mixer: {name: attention, n_kv_heads: 2, qk_norm: true}
  ffn: {name: gated, hidden: 128, activation: {name: gelu, approximate: none}}
data:
  corpus: {name: text, files: [a.txt, "b*.txt"], separator: "\\n"}
  filters: [dedup, {name: min_length, characters: 10}]
  tokenizer: {name: bpe, vocab_size: 512}
training:
  tokens: 1e6
  seq_len: *width
  global_batch_size: 8
  lr: 1e-3
  optimizer:
    name: adamw
    betas: [0.9, 0.95]
""",
    *(p.read_text(encoding="utf-8") for p in sorted(loader.PRESETS.glob("*.yaml"))),
]
SWEEPS = [p.read_text(encoding="utf-8") for p in sorted(design.PRESETS.glob("*.yaml"))]
ODD = """null|true|.nan|.inf|-1|0|1e400|1e-400|1e300|0x_|''|[]|{}|[[]]|[1,2,3]|{name: x}|{name: }|\
{name: [1]}|{name: rmsnorm, eps: {}}|*width|&a [*a]|&width|!!int|!!python/object:os.system|<<|\
{<<: 3}|{<<: *width}|rmsnorm|os:system|.|..|../x|/|:|x:|'a b'|os.path:join|a.b:c|no_such:Class|\
none|lstm|demo|- |? |: |\t|\\x00""".split("|")
ODD += ["9" * 350, "0x" + "f" * 300, "{" * 60, "\ud800", *"\n\r\u2028\x00\x1b\ufeff🙂"]
WORDS = sorted({w.strip("{}[],:'\"") for text in SEEDS + SWEEPS for w in text.split()})


def lines_of(text: str) -> list[str]:
    return text.split("\n")


def mutate(text: str, rng: random.Random) -> str:
    """One small accident."""
    rows = lines_of(text)
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    at = rng.randrange(len(text) + 1)
    kind = rng.randrange(10)
    if kind == 0:
        rows.pop(i)
    elif kind == 1:
        rows.insert(j, rows[i])
    elif kind == 2:
        rows[i], rows[j] = rows[j], rows[i]
    elif kind == 3:
        rows[i] = " " * rng.randrange(6) + rows[i].lstrip(rng.choice([" ", "", " -"]))
    elif kind == 4:
        rows[i] = rows[i].split(":")[0] + ": " + rng.choice(ODD)
    elif kind == 5:
        return text[:at] + rng.choice(ODD) + text[at:]
    elif kind == 6:
        return text[:at] + text[at + rng.randrange(1, 4) :]
    elif kind == 7:
        old = rng.choice(WORDS) or "x"
        return text.replace(old, rng.choice([*WORDS, *ODD]), 1)
    elif kind == 8:
        return text[:at] + rng.choice(string.printable) + text[at + 1 :]
    else:
        path = ".".join(rng.choice(WORDS) or "x" for _ in range(rng.randrange(1, 4)))
        rows.insert(i, " " * rng.choice([0, 2, 4]) + f"{path}: {rng.choice(ODD)}")
    return "\n".join(rows)


def mutated(texts: list[str], rng: random.Random) -> bytes:
    """A text after one to four accidents, as bytes; sometimes with a byte flipped too."""
    text = rng.choice(texts)
    for _ in range(rng.choice([1, 1, 2, 4])):
        text = mutate(text, rng)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if data and rng.random() < 0.1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def override(rng: random.Random) -> str:
    """A word of the command line: a path of real and odd parts, and a real or odd value."""
    heads = ["model", "training", "data", "execution", "evaluation", "imports", "base", ""]
    parts = [rng.choice(heads)] + [rng.choice(WORDS) for _ in range(rng.randrange(4))]
    return ".".join(parts) + rng.choice(["=", "=", "=", "", "=="]) + rng.choice([*ODD, *WORDS])


def survives(load: Callable[..., Any], *words: str) -> Any:
    """What `load` returns, or None after an error that is fit to be read."""
    try:
        return load("x.yaml", words)
    except ConfigError as error:
        lines = error.lines
    assert lines
    for line in lines:
        assert line.strip()
        assert line.isprintable()
        assert "Traceback" not in line
    return None


def check_experiment(seed: int) -> bool:
    rng = random.Random(seed)
    Path("x.yaml").write_bytes(mutated(SEEDS, rng))
    words = [override(rng) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    loaded = survives(loader.load, *words)
    if loaded is not None:
        assert isinstance(loaded, Experiment)
        assert loader.validate(loader.parse(loader.to_yaml(loaded), "x.yaml")) == loaded
    return loaded is not None


def check_sweep(seed: int) -> bool:
    rng = random.Random(seed)
    Path("x.yaml").write_bytes(mutated(SWEEPS, rng))
    return survives(design.load) is not None


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        yield


def fuzz(examples: int) -> Callable[[Any], Any]:
    every = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: every(given(st.integers(0, 2**32))(test))


@fuzz(1000)
def test_no_file_and_no_word_makes_the_loader_stumble(seed: int) -> None:
    check_experiment(seed)


@fuzz(150)
def test_no_sweep_file_makes_the_design_stumble(seed: int) -> None:
    check_sweep(seed)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace")))
@settings(max_examples=300, deadline=None, database=None)
def test_no_bytes_at_all_make_the_loader_stumble(data: bytes) -> None:
    Path("x.yaml").write_bytes(data)
    survives(loader.load)


def test_the_accidents_are_neither_all_fatal_nor_all_harmless() -> None:
    good = sum(check_experiment(seed) for seed in range(200))
    assert 20 < good < 180


@pytest.mark.slow
@fuzz(20_000)
def test_no_file_and_no_word_makes_the_loader_stumble_at_length(seed: int) -> None:
    check_experiment(seed)


@pytest.mark.slow
@fuzz(2_000)
def test_no_sweep_file_makes_the_design_stumble_at_length(seed: int) -> None:
    check_sweep(seed)
