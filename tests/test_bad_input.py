"""Every mistake a person can make: one clear line, exit code 2, and nothing half written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import loader
from experiments.record import Run
from tests.command_line import Outcome, ceteris, desk, files, start


@pytest.fixture
def here(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with tiny.yaml in it, and texts that are no good."""
    with desk(tmp_path, monkeypatch) as folder:
        Path("empty.txt").touch()
        Path("latin1.txt").write_bytes("café\n".encode("latin-1"))
        Path("short.txt").write_text("\n<|doc|>\n".join(f"{n} words" for n in range(40)))
        yield folder


def refused(outcome: Outcome, message: str) -> None:
    """One line on stderr, which is `message` (or begins with it, where it ends with …)."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    line, end = outcome.err.removeprefix("error: "), "\n"
    if message.endswith("…"):
        line, message, end = line[: len(message) - 1], message[:-1], ""
    assert line == message + end, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err


# --- experiments ---------------------------------------------------------------------------------

EXPERIMENTS = [  # what is added to tiny.yaml's line on the command line; the whole message after it
    ("modle.d_model=3", "modle: unknown key 'modle' — did you mean 'model'? (known: …"),
    (
        "model.norm=rmsnrom",
        "model.norm: unknown norm 'rmsnrom' — did you mean 'rmsnorm'? (known: …",
    ),
    ("model.norm.epss=1", "model.norm.epss: unknown key 'epss' — did you mean 'eps'? (known: …"),
    ("model.d_model=wide", "model.d_model: should be a whole number, got 'wide'"),
    ("model.d_model=1e400", "model.d_model: should be a whole number, got inf"),
    ("model.d_model=-1", "model.d_model: should be at least 1, got -1"),
    ("model.tie_embeddings=1", "model.tie_embeddings: should be true or false, got 1"),
    ("model=3", "model: should be a mapping, got 3"),
    ("training.lr=0", "training.lr: should be greater than 0, got 0"),
    ("training.lr=nan", "training.lr: should be a number, got 'nan'"),
    ("model.n_heads=3", "model.n_heads: n_heads 3 does not divide d_model 32"),
    ("model.mixer.n_kv_heads=3", "model.mixer.n_kv_heads: n_kv_heads 3 does not divide n_heads 2"),
    ("training.seq_len=65", "training.seq_len: seq_len 65 is longer than model.max_seq_len 64"),
    ("training.tokens=1", "training.tokens: 1 tokens are less than one step of 8 x 32 = 256"),
    ("model.d_model", "is no override; write it as a.b=c"),
]


@pytest.mark.parametrize(("word", "message"), EXPERIMENTS, ids=[word for word, _ in EXPERIMENTS])
def test_a_mistake_in_an_override_is_one_line_that_repeats_it(
    here: Path, word: str, message: str
) -> None:
    refused(ceteris("train", "tiny.yaml", word), f"command line: {word}: {message}")
    assert not Path("runs").exists()


def test_an_odd_head_under_rotary_is_told_at_the_position(here: Path) -> None:
    refused(
        ceteris("train", "tiny.yaml", "model.head_dim=3", "model.position=rotary"),
        "command line: model.position=rotary: model.position: "
        "rotary needs an even head size, got head_dim 3",
    )


DATA = [
    (
        "data.corpus.files=nothere.txt",
        "corpus.files: no file matches 'nothere.txt'; check the path",
    ),
    ("data.corpus.files=empty.txt", "data.corpus: 'text' has no text; check its files or filters"),
    (
        "data.corpus.files=latin1.txt",
        "latin1.txt: byte 3 is not UTF-8 text; convert the file to UTF-8",
    ),
    (
        "data.corpus.files=short.txt",
        "data: the training split has 290 tokens, 8 windows of seq_len 32, fewer than one batch "
        "of 64; take more text, or lower seq_len or global_batch_size",
    ),
    (
        "evaluation.tokens=5",
        "data: no validation window of seq_len 32 fits: the split has 13,221 tokens and 5 are "
        "asked for; raise validation_fraction or the evaluation's tokens, or lower seq_len",
    ),
]


@pytest.mark.parametrize(("word", "message"), DATA, ids=[word for word, _ in DATA])
def test_text_that_is_no_good_is_refused_before_a_run_begins(
    here: Path, word: str, message: str
) -> None:
    words = [word, "training.global_batch_size=64"] if "batch" in message else [word]
    before = files(here)
    refused(ceteris("train", "tiny.yaml", *words), message)
    written = files(here) - before  # shards may be: they are whole, and the next run's too
    assert all(name.startswith("runs/data/") and "tmp" not in name for name in written)


FILES = [  # what stands in x.yaml, and the line
    ("base: x.yaml\n", "x.yaml:1:1: base: a file includes itself: x.yaml -> x.yaml"),
    ("base: nope\n", "x.yaml:1:1: base: no experiment 'nope': no such file or preset (known: …"),
    ("- 1\n", "x.yaml:1:1: should be a mapping (key: value), got a list"),
    ("base: tiny.yaml\nmodel: {d_model: }\n", "x.yaml:2:9: model.d_model: should be a whole …"),
    ("base: tiny.yaml\nbase: demo\n", "x.yaml:2:1: duplicate key 'base' (first set at line 1)"),
    ("model:\n\td_model: 3\n", "x.yaml:2:1: not YAML: while scanning for the next token, found …"),
    ("\udcff", "x.yaml: byte 0 is not UTF-8; save it as UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[repr(text) for text, _ in FILES])
def test_a_mistake_in_a_file_is_told_with_its_line(here: Path, text: str, message: str) -> None:
    Path("x.yaml").write_bytes(text.encode(errors="surrogateescape"))
    refused(ceteris("train", "x.yaml"), message)
    assert not Path("runs").exists()


def test_a_file_that_is_not_there_is_told_with_the_one_that_is(here: Path) -> None:
    refused(
        ceteris("train", "tny.yaml"),
        "no experiment 'tny.yaml': no such file or preset — did you mean 'tiny.yaml'?",
    )


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(here: Path) -> None:
    plain = ceteris("show", "tiny.yaml")
    raw = Path("tiny.yaml").read_bytes()
    Path("tiny.yaml").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    assert plain.code == 0
    assert ceteris("show", "tiny.yaml") == plain


# --- sweeps --------------------------------------------------------------------------------------

HEAD = "base: tiny.yaml\nseeds: [0, 1]\n"
SWEEPS = [
    (
        "max_runs: 3\ngrid: {model.n_heads: [1, 4]}\n",
        "x.yaml:3:1: max_runs: 3 rows x 2 seeds = 6 runs, more than 3; "
        "set max_runs: 6 if you want them all",
    ),
    (
        "rows:\n  - {label: X, set: {model.n_heads: 2}}\n",
        "x.yaml:4:6: 'X' changes nothing: it is the same experiment as 'baseline'; "
        "set something else, or remove it",
    ),
    (
        "rows:\n  - {label: X, set: {model.n_heads: 4}}\n  - {label: Y, set: {model.n_heads: 4}}\n",
        "x.yaml:5:6: 'Y' is the same experiment as 'X' (line 4); remove one of them",
    ),
    (
        "rows:\n  - {label: X, set: {model.n_heads: 4}}\n  - {label: X, set: {model.n_heads: 1}}\n",
        "x.yaml:5:6: the label 'X' is used twice (first: line 4); give one of them another",
    ),
    (
        "rows:\n  - {label: X, set: {model.n_headz: 4}}\n",
        "x.yaml:4:22: model.n_headz: unknown key 'n_headz' — did you mean 'n_heads'? (known: …",
    ),
    ("rowz: []\n", "x.yaml:3:1: rowz: unknown key 'rowz' — did you mean 'rows'? (known: …"),
    (
        "rows:\n  - {label: X, set: {data.corpus.files: gone.txt}}\n",
        "x.yaml:4:6: 'X': corpus.files: no file matches 'gone.txt'; check the path",
    ),
    *[
        (
            f"name: {name}\nrows:\n  - {{label: X, set: {{model.n_heads: 4}}}}\n",
            f"x.yaml:3:1: name: {name!r} may have only letters, digits, '-', '_' and '.', and "
            "begins with a letter, a digit or '_'; set name to such a word",
        )
        for name in ("../x", "a/b", "..", "a b", "naïve", "-rf")
    ],
]


@pytest.mark.parametrize(("text", "message"), SWEEPS, ids=[message[:40] for _, message in SWEEPS])
def test_a_mistake_in_a_sweep_is_told_before_anything_is_written(
    here: Path, text: str, message: str
) -> None:
    Path("x.yaml").write_text(HEAD + text)
    before = files(here)
    refused(ceteris("sweep", "x.yaml"), message)
    assert files(here) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x.yaml\n", "x.yaml:1:1: base: should be an experiment, not this sweep itself"),
        ("base: tiny.yaml\nseeds: [0, 0]\n", "x.yaml:2:12: seeds: 0 is given twice"),
        ("base: tiny.yaml\nseeds: [-1]\n", "x.yaml:2:9: seeds.0: should be at least 0, got -1"),
        (f"base: tiny.yaml\nseeds: [{2**63}]\n", "x.yaml:2:9: seeds.0: should be less than …"),
        ("model: {}\n", "'x.yaml' is an experiment, and plan takes a sweep: train it with: …"),
        ("", "x.yaml:1:1: base: is missing; give it a value"),
    ],
)  # fmt: skip
def test_a_sweep_of_no_base_or_no_seeds_is_told_so(here: Path, text: str, message: str) -> None:
    Path("x.yaml").write_text(text)
    refused(ceteris("plan", "x.yaml"), message)


# --- the words of the command line ---------------------------------------------------------------

WORDS = [
    ("trian tiny.yaml", "no such command 'trian'. Did you mean 'train'? (see: run.py --help)"),
    ("train", "missing argument 'EXPERIMENT' (see: run.py train --help)"),
    (
        "train tiny.yaml --sede 3",
        "no such option '--sede'. Did you mean '--seed'? (see: run.py train --help)",
    ),
    (
        "train tiny.yaml --seed one",
        "invalid value for '--seed': 'one' is not a valid integer range (see: run.py train --help)",
    ),
    (
        "train tiny.yaml --runs tiny.yaml",
        "invalid value for '--runs': Directory 'tiny.yaml' is a file (see: run.py train --help)",
    ),
    (
        "table demo --format latx",
        "invalid value for '--format': 'latx' is not one of 'md', 'latex', 'html', 'csv', 'json' "
        "(see: run.py table --help)",
    ),
    *[
        (
            f"{verb} demo",
            "no sweep 'demo' in runs (none is known); make it with: run.py sweep FILE, "
            "or submit FILE",
        )
        for verb in ("status", "table", "retry", "cancel", "sample", "table --json")
    ],
    ("generate abc", "no run 'abc' in runs (no runs yet)"),
    ("generate a --top-p 0", "--top-p 0.0: should be above 0 and at most 1"),
    ("generate a --top-p nan", "--top-p nan: should be above 0 and at most 1"),
    ("generate a --top-k 0", "--top-k 0: should be 1 or more"),
    ("generate a --temperature -1", "--temperature -1.0: should be 0 or more"),
    ("generate a --temperature nan", "--temperature nan: should be 0 or more"),
    ("generate a --max-tokens 0", "--max-tokens 0: should be 1 or more"),
    ("components nrom", "unknown kind 'nrom' — did you mean 'norm'? (known: …"),
    ("components --import gone.py", "imports: no file …"),
]


@pytest.mark.parametrize(("words", "message"), WORDS, ids=[words for words, _ in WORDS])
def test_a_mistyped_command_is_one_line(here: Path, words: str, message: str) -> None:
    refused(ceteris(*words.split()), message)
    assert not Path("runs").exists()


def test_a_process_of_its_own_says_so_on_stderr_and_exits_2(here: Path) -> None:
    process = start("train", "tiny.yaml", "model.n_heads=3")
    out, err = process.communicate()
    message = "model.n_heads: n_heads 3 does not divide d_model 32"
    refused(Outcome(process.returncode, out, err), f"command line: model.n_heads=3: {message}")


# --- what lies below --runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with runs/ of a sweep of one row and one more run; the first run's id."""
    folder = tmp_path_factory.mktemp("finished")
    tiny = f"""\
model: {{d_model: 32, n_layers: 1, n_heads: 2}}
data:
  corpus: {{name: text, files: "{text_file}", separator: "<|doc|>"}}
  validation_fraction: 0.2
training: {{tokens: 512, seq_len: 32, global_batch_size: 8, lr: 3e-3}}
evaluation: {{tokens: 2000}}
execution: {{threads: 1}}
"""
    (folder / "tiny.yaml").write_text(tiny)
    (folder / "pair.yaml").write_text("base: tiny.yaml\nseeds: [0, 1]\n")
    with pytest.MonkeyPatch.context() as patch, desk(folder, patch):
        for seed in (0, 1):
            assert ceteris("train", "tiny.yaml", "--seed", seed).code == 0
        assert ceteris("sweep", "pair.yaml").code == 0  # finds both runs done
    return folder, loader.run_id(loader.load(folder / "tiny.yaml"), 0)


@pytest.fixture
def damaged(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """A copy of it to damage, as the working directory: the first run."""
    folder, id = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with desk(tmp_path, monkeypatch):
        yield Run(Path("runs"), id)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "id', "can't be read: damaged (…"),
        ('{"schema": 1}', "status is None, neither done nor diverged; remove it and run the same…"),
        ("3", "holds int, not the record of a run"),
        ("", "can't be read: damaged (Expecting value: line 1 column 1 (char 0)); remove it and…"),
    ],
)
def test_a_damaged_result_is_named_and_hides_no_other_run(
    damaged: Run, text: str, message: str
) -> None:
    (damaged / "result.json").write_text(text)
    message = f"{damaged / 'result.json'}: {message}"
    refused(ceteris("sweep", "pair.yaml"), message)
    refused(ceteris("train", "tiny.yaml"), message)
    status = ceteris("status", "--json")
    assert (status.code, status.json["counts"]) == (0, {"done": 1, "failed": 1})
    assert message.rstrip("…") in str([run["note"] for run in status.json["runs"]])


def test_a_result_removed_is_made_again_from_the_checkpoint(damaged: Run) -> None:
    before = json.loads((damaged / "result.json").read_text())
    (damaged / "result.json").unlink()
    again = ceteris("train", "tiny.yaml", "--json")
    assert (again.code, again.json["val/loss"]) == (0, before["val/loss"])


def edited(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda record: json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda _: "{", "can't be read: damaged (…"),
        (lambda _: "[]", "holds list, not the record of a run"),
        (edited(schema=99), "schema is 99, this version reads 1; write it anew with: …"),
        (edited(rows=[]), "has no rows; write it anew with: run.py sweep FILE"),
        (edited(seeds=["x"]), "seeds are ['x']; write it anew with: run.py sweep FILE"),
        (edited(name="../../up"), "name is '../../up'; give the file its name back"),
        (lambda r: json.dumps(r).replace("-s0", "/../../x"), "row 1: runs: '0': …"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named_and_leads_nowhere_else(
    damaged: Run, edit: Callable[[dict[str, Any]], str], message: str
) -> None:
    path = Path("runs/sweeps/pair.json")
    path.write_text(edit(json.loads(path.read_text())))
    before = files(Path("..").resolve())
    for verb in ("status", "retry", "cancel", "sample"):
        refused(ceteris(verb, "pair"), f"{path}: {message}")
    assert ceteris("table", "pair", "--json").code == 2
    everything = ceteris("status", "--json")
    assert (everything.code, everything.json["counts"]) == (0, {"done": 2})
    assert everything.err.startswith(f"passed over: {path}: {message.rstrip('…')}")
    assert files(Path("..").resolve()) == before


def test_a_foreign_directory_as_runs_is_looked_at_without_harm(here: Path) -> None:
    Path("site/thing").mkdir(parents=True)
    Path("site/thing/experiment.yaml").write_text("hello: 3\n")
    Path("site/thing/result.json").write_text("[]")
    Path("site/sweeps").mkdir()
    Path("site/sweeps/package.json").write_text('{"name": "x"}')
    Path("x.yaml").write_text(HEAD)
    before = files(here)
    status = ceteris("status", "--runs", "site", "--json")
    assert [run["state"] for run in status.json["runs"]] == ["failed"]
    assert ceteris("plan", "x.yaml", "--runs", "site").code == 0
    assert ceteris("generate", "thing", "--runs", "site").code == 2
    assert files(here) == before


def test_a_file_where_a_run_or_the_sweeps_belong_is_named(damaged: Run) -> None:
    shutil.rmtree(damaged.folder)
    damaged.folder.touch()
    refused(ceteris("train", "tiny.yaml"), f"{damaged.folder}: File exists")
    shutil.rmtree("runs/sweeps")
    Path("runs/sweeps").touch()
    refused(ceteris("sweep", "pair.yaml"), "runs/sweeps/pair.json: File exists")


def test_a_run_without_a_checkpoint_or_of_two_that_are_meant_is_told(damaged: Run) -> None:
    stem = damaged.id[:4]
    refused(
        ceteris("generate", stem),
        f"run '{stem}' may mean {damaged.id}, {damaged.id[:-1]}1: write more of it",
    )
    shutil.rmtree(damaged / "checkpoints")
    refused(ceteris("generate", damaged.id), f"{damaged.folder}: no …")


def test_a_prompt_that_fills_the_context_or_is_no_text_is_told(damaged: Run) -> None:
    refused(
        ceteris("generate", damaged.id, "--prompt", "x" * 100),
        "the prompt has 101 tokens, the model's context 32",
    )
    refused(
        ceteris("generate", damaged.id, "--prompt", "ab\udc80"),
        "the prompt is not UTF-8 text at character 3",
    )


# --- bad luck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_per_file", [30_000, 200_000])  # of the shards; of a checkpoint
def test_where_files_can_grow_no_more_the_run_says_so_and_goes_on_later(
    here: Path, bytes_per_file: int
) -> None:
    words = ("train", "tiny.yaml", "training.tokens=2560")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, hard))
    try:
        stopped = ceteris(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.code == 2
    *progress, line = stopped.err.splitlines()
    assert line.startswith("error: runs/")
    assert "oo large" in line or "is the disk full?" in line
    assert not any(text.startswith("error") for text in progress)
    assert not [name for name in files(here) if "tmp" in name or "/.step" in name]
    assert ceteris("status", "--json").json["counts"].get("done") is None
    assert ceteris(*words).code == 0


def test_a_full_disk_is_told_with_what_to_do(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("x.yaml").write_text(HEAD)
    before = files(here)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(
            ceteris("sweep", "x.yaml"),
            "runs/sweeps/x.json: no space left on the disk; free some, then run the same again",
        )
    assert files(here) == before
