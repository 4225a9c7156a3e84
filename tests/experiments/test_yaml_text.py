"""YAML by the rules of 1.2, each value with its place, and nothing that a file could run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.yaml_text import ConfigError, parse, read, scalar

PLAIN = {
    "1e-4": 1e-4,
    "1e6": 1e6,
    "3E8": 3e8,
    ".5e-3": 5e-4,
    "1.": 1.0,
    "-2.5": -2.5,
    "10_000": 10_000,
    "0x1F": 31,
    "-7": -7,
    "+3": 3,
    "0": 0,
    "true": True,
    "False": False,
    "~": None,
    "null": None,
    "": None,
    ".inf": float("inf"),
    "-.INF": float("-inf"),
}
TEXT = (
    "yes no on off y N 012 -012 0o17 12:30 12:30:45 2024-01-02 2024-01-02T03:04:05 1_ _1 1__0 0_1 "
    "0x 0x_ e5 1e 1e+ . + 1.2.3 nan inf NaN ١٢ <<x"
).split()


@pytest.mark.parametrize(("text", "value"), PLAIN.items())
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


@pytest.mark.parametrize("text", TEXT)
def test_what_only_looks_like_a_number_a_bool_or_a_date_stays_text(text: str) -> None:
    assert scalar(text) == text
    assert parse(f"a: {text}\n", "x.yaml").data == {"a": text}


def test_quoted_scalars_are_text() -> None:
    assert parse("a: '1e-4'\nb: \"true\"\nc: |\n  3\n", "x.yaml").data == {
        "a": "1e-4",
        "b": "true",
        "c": "3\n",
    }


def test_every_value_has_the_place_of_its_key_and_every_item_its_own() -> None:
    located = parse("a:\n  b: [1,\n      {c: 2}]\n", "x.yaml")
    places = {path: str(located.mark(path)) for path in located.marks}
    assert places == {
        (): "x.yaml:1:1",
        ("a",): "x.yaml:1:1",
        ("a", "b"): "x.yaml:2:3",
        ("a", "b", 0): "x.yaml:2:7",
        ("a", "b", 1): "x.yaml:3:7",
        ("a", "b", 1, "c"): "x.yaml:3:8",
    }
    assert str(located.mark(("a", "z", "y"))) == "x.yaml:1:1"  # the nearest above


def test_merge_keys_and_anchors_work_and_own_keys_win_wherever_they_stand() -> None:
    text = """\
x: &x {p: 1, q: 1}
y: &y {q: 2, r: 2}
z:
  r: 3
  <<: [*x, *y]
again: *x
"""
    located = parse(text, "x.yaml")
    assert located.data["z"] == {"p": 1, "q": 1, "r": 3}  # the first source wins over the second
    assert located.data["again"] == {"p": 1, "q": 1}
    where = {key: str(located.mark(("z", key))) for key in "pqr"}
    assert where == {"p": "x.yaml:1:8", "q": "x.yaml:1:14", "r": "x.yaml:4:3"}


def test_an_anchored_value_is_not_shared_between_its_places() -> None:
    data = parse("a: &a {p: [1]}\nb: *a\n", "x.yaml").data
    data["a"]["p"].append(2)
    assert data["b"] == {"p": [1]}


REFUSED = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", "x.yaml:3:1: duplicate key 'a' (first set at line 1)"),
    "duplicate merge": (
        "a: &a {p: 1}\nb:\n  <<: *a\n  <<: *a\n",
        "x.yaml:4:3: duplicate key '<<' (first set at line 3)",
    ),
    "merge of a scalar": ("a:\n  <<: 3\n", "x.yaml:2:7: << merges a mapping, and no other thing"),
    "python object": (
        "a: !!python/object/apply:os.system [ls]\n",
        "x.yaml:1:4: the tag !!python/object/apply:os.system is not supported; remove it",
    ),
    "tag on a mapping": (
        "a: !!python/object:os.path {}\n",
        "x.yaml:1:4: the tag !!python/object:os.path is not supported; remove it",
    ),
    "tag on a key": ("!!int 3: 4\n", "x.yaml:1:1: the tag !!int is not supported; remove it"),
    "tag of one's own": ("a: !mine 3\n", "x.yaml:1:4: the tag !mine is not supported; remove it"),
    "alias in itself": (
        "a: &a\n  b: *a\n",
        "x.yaml:1:4: this value holds an alias of itself",
    ),
    "merge of itself": (
        "a: &a\n  <<: *a\n",
        "x.yaml:1:4: this value holds an alias of itself",
    ),
    "list as a key": ("? [a, b]\n: 1\n", "x.yaml:1:3: a key must be a word"),
    "half a character": ('a: "\\ud800"\n', "x.yaml:1:4: \\ud800 alone is no character; remove it"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "x.yaml:1:53: nested more than 50 levels deep"),
    "very deep": ("a: " + "[" * 1500 + "]" * 1500, "x.yaml: nested too deeply"),
    "no alias": (
        "a: *b\n",
        "x.yaml:1:4: not YAML: found undefined alias 'b'",
    ),
    "open bracket": (
        "a: [1, 2\nb: 3\n",
        "x.yaml:2:2: not YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
    ),
    "tab": (
        "a:\n\tb: 1\n",
        "x.yaml:2:1: not YAML: while scanning for the next token, found character '\\t' that "
        "cannot start any token; indent with spaces",
    ),
    "control character": (
        "a: 1\nb: \x07\n",
        "x.yaml:2:4: not YAML: character U+0007 is not allowed",
    ),
    "two documents": (
        "a: 1\n---\nb: 1\n",
        "x.yaml:2:1: not YAML: expected a single document in the stream, but found another "
        "document",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_in_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml")
    assert str(caught.value) == message


def test_structural_errors_come_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a: 1\na: 2\nb: !x 1\nc: {d: 1, d: 2}\n", "x.yaml")
    assert [line.split(": ")[0] for line in caught.value.lines] == [
        "x.yaml:2:1",
        "x.yaml:3:4",
        "x.yaml:4:11",
    ]


@pytest.mark.parametrize("leaf", ["x", "{}"])
def test_a_billion_laughs_end_early(leaf: str) -> None:
    lists = [f"a0: &a0 [{leaf}]"]
    lists += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    merges = [f"m0: &m0 {{x: {leaf}}}"]
    merges += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    for lines in (lists, merges):
        with pytest.raises(ConfigError, match=r"^x.yaml: aliases expand to more than 50000 values"):
            parse("\n".join(lines), "x.yaml")


UNREADABLE = {
    "utf-16": ("a: 1\n".encode("utf-16"), "x.yaml: byte 0 is not UTF-8; save it as UTF-8"),
    "binary": (b"PK\x03\x04\xff\xfe", "x.yaml: byte 4 is not UTF-8; save it as UTF-8"),
    "list": (b"- 1\n", "x.yaml:1:1: should be a mapping (key: value), got a list"),
    "text": (b"hello\n", "x.yaml:1:1: should be a mapping (key: value), got text"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_hold_no_mapping_say_so(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "x.yaml")
    assert str(caught.value) == message


def test_a_folder_or_no_file_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read(tmp_path / "none.yaml")


def test_windows_line_ends_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    for content, data in ((b"\xef\xbb\xbfa: 1\r\nb: x\r\n", {"a": 1, "b": "x"}), (b"", {})):
        (tmp_path / "x.yaml").write_bytes(content)
        assert read(tmp_path / "x.yaml").data == data


def test_an_error_is_one_line_even_where_what_it_quotes_is_not() -> None:
    error = ConfigError("x: unknown 'a\nb\x1b[31m\u2028\ud800'")
    assert error.lines == ("x: unknown 'a\\nb\\x1b[31m\\u2028\\ud800'",)
