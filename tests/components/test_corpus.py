"""What corpora and filters promise: the text that is there, in order, or one clear line."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from pathlib import Path

import pytest

from components import corpus
from components.corpus import HuggingFace, PythonDocs, Text
from components.filter import Dedup, MinLength
from components.registry import UserError


def documents(files: Path | str, **params) -> list[str]:
    return list(Text(files=str(files), **params).documents())


def zstd(raw: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def write_parquet(path: Path, **columns: list) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_python_docs_are_two_megabytes_of_distinct_documents() -> None:
    texts = list(PythonDocs().documents())
    assert 1_500_000 < sum(len(text.encode()) for text in texts) < 10_000_000
    assert len(set(texts)) == len(texts) > 300
    json_docs = next(text for text in texts if text.startswith("json\n"))
    assert "dumps(obj, *, skipkeys=False" in json_docs
    assert "Serialize ``obj`` to a JSON formatted ``str``." in json_docs
    assert any(text.startswith("builtins\n") and "isinstance(" in text for text in texts)
    assert not any(" at 0x" in line and "=<" in line for text in texts for line in text.split("\n"))
    assert PythonDocs().fingerprint() == PythonDocs().fingerprint()


def test_python_docs_are_the_same_where_something_has_put_its_own_into_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hook(*_: object) -> None:
        """A function of another package, as torch's for each of several processes."""

    def text() -> list[str]:
        corpus._python_documents.cache_clear()
        return list(PythonDocs().documents())

    before = text()
    monkeypatch.setattr(sys, "excepthook", hook)
    monkeypatch.setattr(builtins, "display", hook, raising=False)
    assert text() == before
    assert any("excepthook(exctype, value, traceback, /)" in document for document in before)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("ending", [".txt", ".md", ".html", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_its_text(tmp_path: Path, ending: str, pack) -> None:
    text = "Äpfel & Birnen\nand a second line"
    path = tmp_path / f"file{ending}"
    if ending == ".parquet":
        write_parquet(path, text=[text])
    elif ending == ".jsonl":
        path.write_text("\n" + json.dumps({"id": 1, "text": text}) + "\n")
    elif ending == ".html":
        path.write_text(
            "<html><style>b{}</style><p>Äpfel &amp; <b>Birnen</b><br>and\n a second line</p>"
            "<script>if (1 < 2) alert('no')</script></html>"
        )
    else:
        path.write_text(text)
    if pack is not bytes:
        packed = path.with_name(path.name + {gzip.compress: ".gz", zstd: ".zst"}[pack])
        packed.write_bytes(pack(path.read_bytes()))
        path = packed
    assert documents(path) == [text]


def test_html_keeps_paragraphs_and_preformatted_text(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<h1>Title</h1>\n<p>One\n  two</p><pre>a\n  b</pre><ul><li>x<li>y</ul>")
    assert documents(path) == ["Title\n\nOne two\n\na\n  b\n\nx\ny"]


def test_a_long_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"{'é' * (i % 50)} line {i}\n" for i in range(2000)) + "é" * 5000
    path = tmp_path / "long.txt"
    path.write_text(text)
    pieces = documents(path, document_bytes=1001)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 1004  # a character is never cut
    assert all(piece.endswith("\n") for piece in pieces if " line " in piece)


def test_a_separator_cuts_documents_wherever_blocks_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("components.text_files.BLOCK", 7)
    path = tmp_path / "stories.txt"
    path.write_text("\ufeffone\n<|endoftext|>\n<|endoftext|>two\r\nthree<|endoftext|>\n")
    assert documents(path, separator="<|endoftext|>") == ["one", "two\r\nthree"]


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.md"):
        Path(name).write_text(name)
    corpus = Text(files=("c.md", "*.txt", "a.*"))
    assert list(corpus.documents()) == ["c.md", "a.txt", "b.txt"]


def test_the_fingerprint_follows_content_and_cutting_not_place(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("same" if name != "other" else "else")

    def fingerprint(name: str, **params) -> str:
        return Text(files=str(tmp_path / name / "*.txt"), **params).fingerprint()

    assert fingerprint("one") == fingerprint("two")
    assert fingerprint("one") != fingerprint("other")
    assert fingerprint("one") != fingerprint("one", separator="a")


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.txt", b"good\n\xff bad", "a.txt: byte 5 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2:10: not JSON"),
        ("a.jsonl", b'\n{"page": "x", "n": 1}', "a.jsonl:2: no column 'text' (there are: page, n)"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: surrogates not allowed"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: byte 10 is not UTF-8"),
        ("a.jsonl", b"[1]", "a.jsonl:1: not a JSON object"),
        ("a.txt.gz", b"not gzip at all", "a.txt.gz: damaged gzip data"),
        ("a.txt.gz", gzip.compress(b"x" * 9999)[:-20], "a.txt.gz: damaged gzip data"),
        ("a.txt.zst", b"not zstd at all", "a.txt.zst: damaged data"),
        ("a.parquet", b"not parquet", "a.parquet: damaged data"),
        ("a.docx", b"", "a.docx: can't read this kind of file (known: .txt, .md, .html"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(
    tmp_path: Path, monkeypatch, name: str, raw: bytes, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        documents(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cutting", [{"separator": "|"}, {"document_bytes": 4}, {}])
def test_the_place_of_a_wrong_byte_counts_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch, cutting: dict
) -> None:
    monkeypatch.setattr("components.text_files.BLOCK", 7)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone|two|th\xffree")
    with pytest.raises(UserError, match="byte 13 is not UTF-8"):
        documents(path, **cutting)


def test_a_truncated_zst_is_an_error_not_a_shorter_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(bytes(range(128)) * 999)[:-8])
    with pytest.raises(UserError, match=r"a\.txt\.zst: damaged data"):
        documents(path)


def test_a_pattern_without_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*absent\.txt'"):
        documents(tmp_path / "absent.txt")
    with pytest.raises(UserError, match=r"it is a folder: write '.*/\*\.txt'"):
        documents(tmp_path)


def test_a_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet",
        title=["t"],
        body=[
            "b",
        ][:1],
    )
    with pytest.raises(UserError, match=r"no column 'text' \(there are: title, body\)"):
        documents(tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", column="body") == ["b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_reads_a_local_folder(tmp_path: Path, monkeypatch, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stories"
    folder.mkdir()
    write_parquet(folder / "train.parquet", story=["one", "two"], id=[1, 2])
    corpus = HuggingFace(path=str(folder), column="story", streaming=streaming)
    assert list(corpus.documents()) == ["one", "two"]
    before = corpus.fingerprint()
    write_parquet(folder / "train.parquet", story=["one", "2.0"], id=[1, 2])
    assert corpus.fingerprint() != before
    with pytest.raises(UserError, match=r"no column 'text' \(there are: story, id\)"):
        list(HuggingFace(path=str(folder), streaming=streaming).documents())


def test_huggingface_without_the_data_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't load data set") as error:
        list(HuggingFace(path=str(tmp_path / "absent")).documents())
    assert "\n" not in str(error.value)


def test_filters_keep_order_and_start_afresh_on_each_pass() -> None:
    dedup = Dedup()
    for _ in range(2):
        assert list(dedup(iter(["b", "a", "b", "c", "a"]))) == ["b", "a", "c"]
    assert list(MinLength(characters=2)(iter(["a", "bb", "", "ccc"]))) == ["bb", "ccc"]
