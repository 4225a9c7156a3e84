"""What the held-out tasks promise: the text itself answers, fairly, and always the same items."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from components.registry import UserError, spec
from experiments import held_out, made
from experiments.data import Dataset, load, prepare
from tests.conftest import ROOT

FORK = multiprocessing.get_context("fork")
PRESETS = ROOT / "experiments" / "presets" / "tasks"
PAIRS = ("held_out_order", "held_out_agreement", "held_out_brackets")
Row = dict[str, Any]


def dataset(folder: Path, file: Path, tokenizer: Any = "bytes", fraction: float = 0.5) -> Dataset:
    corpus = {"name": "text", "files": str(file), "separator": "<|doc|>"}
    config = SimpleNamespace(
        corpus=spec("corpus", corpus),
        filters=(),
        tokenizer=spec("tokenizer", tokenizer),
        validation_fraction=fraction,
        split_seed=0,
    )
    return prepare(config, folder, progress=False)


def rows_of(folder: Path) -> dict[str, list[Row]]:
    return {name: read(folder / f"{name}.jsonl") for name in held_out.TASKS}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def right(row: Row) -> tuple[str, str]:
    """The (context, continuation) that stands in the text."""
    if "contexts" in row:
        return row["contexts"][row["gold"]], row["continuation"]
    return row["context"], row["choices"][row["gold"]]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def changed(row: Row) -> tuple[str, str]:
    """What differs between the right and the wrong continuation: (right, wrong), by words."""
    one, other = row["choices"][row["gold"]].split(), row["choices"][1 - row["gold"]].split()
    assert len(one) == len(other)
    differing = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    first, last = differing[0], differing[-1] + 1
    return " ".join(one[first:last]), " ".join(other[first:last])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Dataset:
    return dataset(tmp_path_factory.mktemp("bytes"), text_file)


@pytest.fixture(scope="module")
def documents(data: Dataset) -> dict[str, str]:
    return dict(held_out._documents(data))


@pytest.fixture(scope="module")
def rows(data: Dataset) -> dict[str, list[Row]]:
    return rows_of(held_out.build(data))


def test_the_right_answer_is_what_a_held_out_document_says(
    data: Dataset, documents: dict[str, str], rows: dict[str, list[Row]]
) -> None:
    assert len(documents) == data.meta["counts"]["val"]["documents"]
    for some in rows.values():
        assert held_out.FEWEST <= len(some) <= held_out.MOST
        for row in some:
            text = documents[row["cluster"].split(".")[0]]
            context, continuation = right(row)
            assert text[: row["start"]].endswith(context)
            assert text.startswith(continuation, row["start"])


def test_texts_are_short_and_begin_and_end_with_whole_words(
    documents: dict[str, str], rows: dict[str, list[Row]]
) -> None:
    for row in (row for some in rows.values() for row in some):
        text = documents[row["cluster"].split(".")[0]]
        context, continuation = right(row)
        assert held_out.CONTEXT // 2 <= len(context) <= held_out.CONTEXT
        assert len(continuation) <= held_out.CONTINUATION
        assert continuation[0] == " " and not context[-1].isspace()
        start, end = row["start"] - len(context), row["start"] + len(continuation)
        assert start == 0 or text[start - 1].isspace()
        assert end == len(text) or text[end].isspace()


def test_each_kind_of_pair_differs_in_what_it_is_about(rows: dict[str, list[Row]]) -> None:
    for row in rows["held_out_order"]:
        one, other = (words_of(choice) for choice in row["choices"])
        assert one[:2] == other[1::-1] != other[:2] and one[2:] == other[2:]
    partners = {frozenset(pair) for pair in held_out._PARTNERS}
    assert all(frozenset(changed(row)) in partners for row in rows["held_out_agreement"])
    for row in rows["held_out_brackets"]:
        differing = [{a, b} for a, b in zip(*row["choices"], strict=True) if a != b]
        assert len(differing) == 1 and differing[0] < set(")]}\"'”’")


def test_passages_are_far_from_each_other_and_take_turns(
    documents: dict[str, str], rows: dict[str, list[Row]]
) -> None:
    passages = rows["held_out_passage"]
    for first in range(0, len(passages), 4):
        four = passages[first : first + 4]
        assert [row["gold"] for row in four] == [0, 1, 2, 3]
        assert len({tuple(row["contexts"]) for row in four}) == 1
        places = [(row["cluster"].split(".")[0], row["start"]) for row in four]
        for i, (document, start) in enumerate(places):
            assert all(
                document != other or abs(start - place) >= held_out.APART
                for other, place in places[:i]
            )


@pytest.mark.parametrize("name", PAIRS)
def test_the_right_answer_comes_first_in_half_of_the_items(
    name: str, rows: dict[str, list[Row]]
) -> None:
    golds = Counter(row["gold"] for row in rows[name])
    assert abs(golds[0] - golds[1]) <= 1


def test_who_only_knows_how_common_words_are_scores_at_chance(
    documents: dict[str, str], rows: dict[str, list[Row]]
) -> None:
    """The items' point: context or order is needed. Counts of characters and of words tell
    nothing, not even when taken from the held-out documents themselves."""
    whole = " ".join(documents.values())
    words, marks = Counter(words_of(whole)), Counter(whole)

    def common(text: str) -> float:
        return sum(log(1 + words[word]) for word in words_of(text))

    order = [[common(choice) for choice in row["choices"]] for row in rows["held_out_order"]]
    assert all(one == pytest.approx(other) for one, other in order)
    for name, count in (("held_out_agreement", words), ("held_out_brackets", marks)):
        hits = 0.0
        for row in rows[name]:
            one, other = changed(row)
            if name == "held_out_brackets":
                one, other = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
            hits += (count[one] > count[other]) + (count[one] == count[other]) / 2
        assert hits == len(rows[name]) / 2


def test_the_same_items_whatever_the_tokenizer(
    tmp_path: Path, text_file: Path, data: Dataset, rows: dict[str, list[Row]]
) -> None:
    bpe = dataset(tmp_path, text_file, {"name": "bpe", "vocab_size": 400})
    assert rows_of(held_out.build(bpe)) == rows
    for row in (row for some in rows.values() for row in some):
        context, continuation = right(row)
        before = bpe.tokenizer.encode(context)
        whole = bpe.tokenizer.encode(context + continuation)
        assert whole[: len(before)] == before and len(whole) > len(before)


def test_a_long_split_is_read_in_part_and_alike_by_all_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "DOCUMENT", 500)
    monkeypatch.setattr(held_out, "TEXT", 3000)
    file = tmp_path / "wide.txt"  # characters of one to four bytes
    file.write_text(
        "<|doc|>".join(f"{i} " + "aß€𝄞 " * 40 * (1 + i % 9) for i in range(60)), "utf-8"
    )
    read_by = [
        list(held_out._documents(dataset(tmp_path / str(number), file, tokenizer)))
        for number, tokenizer in enumerate(("bytes", {"name": "bpe", "vocab_size": 300}))
    ]
    assert read_by[0] == read_by[1]
    lengths = [len(document.text) for document in read_by[0]]
    assert max(lengths) == 500 and sum(lengths[:-1]) < 3000 <= sum(lengths)
    assert "\ufffd" not in "".join(document.text for document in read_by[0])


def test_no_item_holds_a_character_that_the_tokenizer_lost(tmp_path: Path, text_file: Path) -> None:
    texts = text_file.read_text("utf-8").split("<|doc|>")
    file = tmp_path / "odd.txt"
    odd = [text.replace(" the ", f" th{chr(0x4E00 + i)} ") for i, text in enumerate(texts)]
    file.write_text("<|doc|>".join(odd), "utf-8")
    data = dataset(tmp_path, file, "characters")
    assert "\ufffd" in data.tokenizer.decode(data.val.tolist())
    folder = held_out.build(data, ["held_out_order"])
    text = (folder / "held_out_order.jsonl").read_text("utf-8")
    assert "ufffd" not in text and "\ufffd" not in text


def test_too_little_text_is_one_line_that_names_tasks_and_corpus(tmp_path: Path) -> None:
    file = tmp_path / "plain.txt"
    sentence = "{} words follow {} words here without any of the marks {} looked for, as one sees. "
    file.write_text(
        "<|doc|>".join("".join(sentence.format(f"w{i}", chr(97 + j) * 3, chr(97 + i) * 4)
                               for j in range(9)) for i in range(24)), "utf-8"
    )  # fmt: skip
    data = dataset(tmp_path, file)
    with pytest.raises(UserError, match="too few") as error:
        held_out.build(data)
    message = str(error.value)
    assert "held_out_agreement (0), held_out_brackets (0)" in message and "'text'" in message
    assert "held_out_order" not in message and "\n" not in message
    with pytest.raises(UserError, match="held_out_brackets"):  # again, not only the first time
        held_out.build(data, ["held_out_brackets"])
    folder = held_out.build(data, ["held_out_order"])
    assert len(read(folder / "held_out_order.jsonl")) >= held_out.FEWEST


def test_no_held_out_text_at_all_says_so(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(UserError, match=r"held_out_order \(0\)"):
        held_out.build(dataset(tmp_path, text_file, fraction=0.0))


def _build(folder: Path) -> str:
    return str(held_out.build(load(folder)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_many_processes_at_once_make_them_once(
    tmp_path: Path, text_file: Path, rows: dict[str, list[Row]]
) -> None:
    made = dataset(tmp_path, text_file)
    with FORK.Pool(4) as pool:
        folders = set(pool.map(_build, [made.folder] * 8))
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert rows_of(folder) == rows
    assert {path.name for path in folder.iterdir()} - {"lock"} == {
        f"{name}.jsonl" for name in held_out.TASKS
    }


def test_what_is_there_is_not_made_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset(tmp_path, text_file)
    folder = held_out.build(made)
    (folder / "held_out_order.jsonl").unlink()  # as if killed before it was written
    kept = (folder / "held_out_passage.jsonl").stat().st_mtime_ns
    held_out.build(made)
    assert (folder / "held_out_order.jsonl").is_file()
    assert (folder / "held_out_passage.jsonl").stat().st_mtime_ns == kept
    monkeypatch.setattr(held_out, "_documents", None)
    assert held_out.build(made) == folder


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    made = dataset(tmp_path, text_file)
    monkeypatch.setattr(held_out, "FileLock", refused)
    with pytest.raises(UserError, match="Permission denied"):
        held_out.build(made)


def test_items_need_no_lm_eval_and_finding_them_no_torch(tmp_path: Path, text_file: Path) -> None:
    folder = dataset(tmp_path, text_file).folder
    code = (
        "import sys; from pathlib import Path; from experiments import data, held_out; "
        "print(held_out.build(data.load(Path(sys.argv[1])))); print(*sys.modules)"
    )

    def modules() -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        made, imported = done.stdout.splitlines()
        assert {path.stem for path in Path(made).glob("*.jsonl")} == held_out.TASKS.keys()
        return set(imported.split())

    assert not {"lm_eval", "datasets"} & modules()  # made now: the tokenizer's package has torch
    assert not {"lm_eval", "datasets", "torch"} & modules()  # only found


# ── as lm-eval sees them ───────────────────────────────────────────────────────────────────────


def test_the_yaml_files_are_of_these_rules() -> None:
    files = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in PRESETS.glob("*.yaml")}
    groups = {name: set(files.pop(name)["task"]) for name in ("held_out", "held_out_copy")}
    assert groups["held_out"] == set(held_out.TASKS)
    assert groups["held_out_copy"] == {n for n in made.TASKS if n.startswith(made.COPY)}
    assert set(files) == {*held_out.TASKS, *made.TASKS}
    for name, config in files.items():
        assert config["task"] == name
        assert config["metadata"]["version"] == held_out.VERSION
        assert config["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_lm_eval_asks_what_the_items_say(
    tmp_path: Path, data: Dataset, rows: dict[str, list[Row]]
) -> None:
    from lm_eval.tasks import TaskManager

    folder = held_out.build(data)
    manager = TaskManager(include_defaults=False, include_path=str(PRESETS))
    members = [
        {"task": name, "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")},
                                          "cache_dir": str(tmp_path)}}
        for name in held_out.TASKS
    ]  # fmt: skip
    loaded = manager.load([{"group": "here", "task": members}])["tasks"]
    for name, task in loaded.items():
        task.build_all_requests(limit=40, rank=0, world_size=1)
        asked: dict[int, list[tuple[str, str]]] = {}
        for request in task.instances:
            asked.setdefault(request.doc_id, []).append(request.args)
        assert len(asked) == 40
        for number, row in enumerate(rows[name][:40]):
            if "contexts" in row:
                expected = [(context, row["continuation"]) for context in row["contexts"]]
            else:
                expected = [(row["context"], choice) for choice in row["choices"]]
            assert asked[number] == expected
            best = [(-1.0 if pair == right(row) else -2.0, False) for pair in expected]
            assert task.process_results(task.eval_docs[number], best) == {"acc": 1.0}
            worst = [(-2.0 - score, greedy) for score, greedy in best]
            assert task.process_results(task.eval_docs[number], worst) == {"acc": 0.0}
