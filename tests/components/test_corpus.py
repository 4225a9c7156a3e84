"""What corpora and filters promise: the text that is there, in order, or one clear line."""

from __future__ import annotations

import builtins
import errno
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from components import corpus, text_files
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


# A frame of one empty block whose header asks for a window of 2 GiB, as `zstd --long=31` does.
LONG_WINDOW = bytes.fromhex("28b52ffd 00 a8 010000")


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


PACKED = gzip.compress(b"x", mtime=0)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("ending", [".txt", ".md", ".html", ".htm", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_its_text(tmp_path: Path, ending: str, pack) -> None:
    text = "Äpfel & Birnen\nand a second line"
    path = tmp_path / f"file{ending}"
    if ending == ".parquet":
        write_parquet(path, text=[text])
    elif ending == ".jsonl":
        path.write_text("\n" + json.dumps({"id": 1, "text": text}) + "\n")
    elif ending in (".html", ".htm"):
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


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("book [vol 1].txt", ["book [vol 1].txt"]),
        ("shard[1].txt", ["shard[1].txt"]),
        ("shard[12].txt", ["shard1.txt"]),
        ("what?.txt", ["what?.txt"]),
        ("*[[]*.txt", ["book [vol 1].txt", "shard[1].txt"]),
        ("set [a]/*.txt", ["set [a]/x.txt"]),
        ("s*/x.txt", ["set [a]/x.txt"]),
        ("**/x.txt", ["loop/x.txt", "set [a]/x.txt"]),
        ("loop/**", ["loop/x.txt"]),
        (".hidden.txt", [".hidden.txt"]),
        ("loop/../shard1.txt", ["loop/../shard1.txt"]),
    ],
)
def test_a_path_that_exists_is_that_file_else_a_pattern(
    tmp_path: Path, monkeypatch, pattern: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("book [vol 1].txt", "shard1.txt", "shard[1].txt", "what?.txt", "whats.txt",
                 ".hidden.txt", "set [a]/x.txt", "loop/x.txt", "set a/y.md"):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    Path("loop/back").symlink_to("../loop")
    assert [str(path) for path in Text(files=pattern).paths()] == expected


def test_a_file_reached_by_two_names_is_read_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("b.txt").symlink_to("a.txt")
    assert list(Text(files=("*.txt", "./a.txt", f"../{tmp_path.name}/a.txt")).documents()) == [
        "text"
    ]


def test_a_name_that_is_not_utf_8_can_be_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    assert documents(tmp_path / "*.txt") == ["text"]
    assert Text(files=str(tmp_path / "*.txt")).fingerprint()


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def denied(_: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("components.text_files.os.listdir", denied)
    with pytest.raises(UserError, match="can't list this folder: Permission denied"):
        documents(tmp_path / "**/*.txt")


@pytest.mark.parametrize("ending", [".txt", ".md", ".html", ".jsonl", ".parquet"])
def test_a_byte_order_mark_is_no_text_but_inside_it_stays(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        write_parquet(path, text=["\ufeffa\ufeffb"])
    else:
        text = '{"text": "a\ufeffb"}' if ending == ".jsonl" else "a\ufeffb"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert documents(path) == ["a\ufeffb"]
    if ending != ".parquet":
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(b"\xef", mtime=0) + gzip.compress(path.read_bytes()[1:]))
        assert documents(packed) == ["a\ufeffb"]


def test_a_separator_that_is_absent_is_reported_once(tmp_path: Path, capsys) -> None:
    for name, text in (("a.txt", "one|two"), ("b.txt", "three\n"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    corpus = Text(files=str(tmp_path / "*.txt"), separator="|")
    for _ in range(2):
        assert list(corpus.documents()) == ["one", "two", "three"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "separator '|' does not occur in" in err
    assert "b.txt (1 of 3 files)" in err


@pytest.mark.parametrize("cutting", [{"separator": "||||||||"}, {"document_bytes": 1 << 30}])
def test_reading_takes_time_linear_in_the_file(tmp_path: Path, monkeypatch, cutting: dict) -> None:
    class Counting(bytearray):
        looked = 0

        def find(self, what: bytes, start: int) -> int:  # type: ignore[override]
            Counting.looked += len(self) - start
            return super().find(what, start)

    monkeypatch.setattr(text_files, "bytearray", Counting, raising=False)
    monkeypatch.setattr(text_files, "BLOCK", 100)
    path = tmp_path / "a.txt"
    path.write_text("é" * 50_000)
    assert documents(path, **cutting) == ["é" * 50_000]
    assert Counting.looked < 120_000


def test_a_separator_is_found_wherever_blocks_end(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ein–ß–zwei–ß–ß–\r\ndrei\r\n–ß–".encode())
    for block in range(4, 30):
        monkeypatch.setattr(text_files, "BLOCK", block)
        assert documents(path, separator="–ß–") == ["ein", "zwei", "ß–\r\ndrei"]
        lines = documents(path, separator="\n")
        assert lines == ["ein–ß–zwei–ß–ß–", "drei", "–ß–"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_without_end_is_refused(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 1 << 20)
    monkeypatch.setattr(text_files, "BLOCK", 1 << 16)
    (tmp_path / name).write_text('{"text": "' + "x" * (1 << 21) + '"}')
    with pytest.raises(UserError, match=r"a document of more than 1 MiB; (check|write)"):
        documents(tmp_path / name, separator="|")


def test_a_page_too_large_for_the_parser_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST_PAGE", 99)
    (tmp_path / "a.html").write_text("<p>" + "x" * 99)
    with pytest.raises(UserError, match=r"a\.html: a page of more than 0 MiB; split it"):
        documents(tmp_path / "a.html")


def test_parquet_says_which_row_is_no_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def write(column: pyarrow.Array) -> Path:
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    offsets, letters = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0])), b"oka\xffb"
    wrong = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(letters)]
    )
    for column, expected in [
        (wrong, "row 2: byte 1 of the text is not UTF-8; write the column again as UTF-8"),
        (pyarrow.array(["a", None]), "row 2: column 'text' is null; drop such rows"),
        (pyarrow.array([b"a"]), "row 1: column 'text' holds bytes, not text"),
        (pyarrow.array([["a"]]), "row 1: column 'text' holds list, not text"),
    ]:
        with pytest.raises(UserError, match=expected):
            documents(write(column))
    for kind in (pyarrow.large_string(), pyarrow.string_view(),
                 pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):  # fmt: skip
        assert documents(write(pyarrow.array(["a", "b", "a"]).cast(kind))) == ["a", "b", "a"]


def test_the_fingerprint_sees_a_file_rewritten_with_its_old_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    times = path.stat()
    before = Text(files=str(path)).fingerprint()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Text(files=str(path)).fingerprint() != before


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
        ("a.jsonl", b'[\n{"text": "x"}]', "a.jsonl:1:1: not JSON (Expecting value); a JSON array"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: column 'text' is null; drop such rows"),
        ("a.jsonl", b'{"text": NaN}', "a.jsonl:1: column 'text' holds float, not text"),
        ("a.jsonl", b"{}", "a.jsonl:1: no column 'text' (there are: none)"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "a.jsonl:1: column 'text' twice in one row"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl:1: can't be read (Exceeds the limit"),
        ("a.jsonl", b'{"n": ' + b"[" * 10**5, "a.jsonl:1: nested too deep to be read"),
        ("a.txt", "text".encode("utf-16"), "a.txt: UTF-16, not UTF-8; convert the file to UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "a.txt: UTF-16, not UTF-8"),
        ("a.txt", "text".encode("utf-32"), "a.txt: UTF-32, not UTF-8"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl: UTF-16, not UTF-8"),
        ("a.html", "<p>x".encode("utf-16"), "a.html: UTF-16, not UTF-8"),
        ("a.html", b"\xef\xbb\xbf<p>\xff", "a.html: byte 6 is not UTF-8 text; convert the file"),
        ("a.html", b"<meta charset=latin-1>\xe9", "(its <meta> says latin-1); convert the file"),
        ("a.html", b"<div>" * 10**6, "a.html: more than 1,000 elements within one another"),
        ("a.txt.gz", gzip.compress(PACKED, mtime=0), "a.txt.gz: gzip data, not text"),
        ("a.txt.gz", PACKED + b"more", "a.txt.gz: damaged gzip data"),
        ("a.txt.gz", b"", "a.txt.gz: empty, so not compressed data"),
        ("a.txt", b"PK\x03\x04", "a.txt: a zip archive, not text; unpack it"),
        ("a.txt.gz", b"not gzip at all", "a.txt.gz: damaged gzip data"),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-20], "a.txt.gz: damaged gzip data"),
        ("a.txt.zst", b"not zstd at all", "a.txt.zst: damaged data"),
        ("a.parquet", b"not parquet", "a.parquet: damaged data"),
        ("a.parquet", b"PAR1" + b"\0" * 99 + b"PARE", "a.parquet: an encrypted Parquet file"),
        ("a.txt.zst", LONG_WINDOW, "a.txt.zst: compressed with a window over 128 MiB; unpack it"),
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


def test_huggingface_reads_the_text_that_was_hashed(tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stories"
    folder.mkdir()
    file = folder / "train.jsonl"
    corpus = HuggingFace(path=str(folder))
    seen: dict[str, str] = {}
    for text in ("one", "two", "one"):
        file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, ns=(10**18, 10**18))
        (folder / ".DS_Store").write_text(str(len(seen)))  # which decides nothing
        assert list(corpus.documents()) == [text]
        assert seen.setdefault(text, corpus.fingerprint()) == corpus.fingerprint()
    assert len(set(seen.values())) == 2


def test_huggingface_without_the_data_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't load data set") as error:
        list(HuggingFace(path=str(tmp_path / "absent")).documents())
    assert "\n" not in str(error.value)


def test_filters_keep_order_and_start_afresh_on_each_pass() -> None:
    dedup = Dedup()
    for _ in range(2):
        assert list(dedup(iter(["b", "a", "b", "c", "a"]))) == ["b", "a", "c"]
    assert list(MinLength(characters=2)(iter(["a", "bb", "", "ccc"]))) == ["bb", "ccc"]
