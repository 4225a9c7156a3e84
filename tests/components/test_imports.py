"""Imported component files: their digest is of tokens, each experiment has its own version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components import imports, registry, source
from components.registry import Spec, UserError

PART = """\
from components.registry import register
{extra}
@register("{kind}", "{name}")
class Part:
    def __init__(self, *, gain: float = 1.0) -> None:
        self.gain = gain * {value}
"""
SAMPLE = """\
import helper

class A:
    def f(self, x):
        y = f"a{x + 1!r:>{3}} {{b}}" + rf\'\'\'over
lines {x}\'\'\'
        if x: return (y, 1_000, 0x1F, b"\\x00", "é")
        return y @ x
"""
GOLDEN = "d57861c673aa8c69"  # the same from Python 3.11, 3.12 and 3.13


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.load_builtin()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(imports, "_files", dict(imports._files))
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    sys.path[:] = path


def write(path: Path, text: str = "", **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text or PART.format(**{"extra": "", "kind": "norm", "name": "t_mine", "value": 1, **how})
    path.write_text(text, encoding="utf-8")
    return path


def use(*paths: Path) -> None:
    wrong = list(imports.use_files(paths))
    assert not wrong, wrong


def gain(name: str = "t_mine") -> float:
    return float(registry.build("norm", name).gain)


def digest(path: Path) -> str:
    return source.digest(source.closure(path))


# --- digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("import helper\n", "# why\nimport helper  # what\n\n", True),
        ("        y =", "            y =", False),  # no Python: counts as its bytes
        ("(y, 1_000,", "(\n            y,  # first\n            1_000,", True),
        ("\n", "\r\n", True),
        ("1_000", "1000", False),
        ("over\nlines", "over\n lines", False),
        ("x + 1", "x+1", False),  # inside an f-string, which is one token
        ("y @ x", "y*x", False),
        ("class A", "class B", False),
    ],
)
def test_a_digest_is_of_tokens_not_of_layout(
    tmp_path: Path, old: str, new: str, same: bool
) -> None:
    one, other = write(tmp_path / "a.py", SAMPLE), tmp_path / "b.py"
    other.write_bytes(SAMPLE.replace(old, new).encode())
    assert (digest(one) == digest(other)) is same


def test_a_digest_is_the_same_on_every_python(tmp_path: Path) -> None:
    assert digest(write(tmp_path / "a.py", SAMPLE)) == GOLDEN


def test_modules_beside_a_file_are_in_its_digest(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.py", "def f():\n    import one.two as two\n    from three import x\n"
    )
    alone = digest(file)
    write(tmp_path / "one" / "__init__.py", "X = 1")
    write(tmp_path / "one" / "two.py", "from four import y")
    write(tmp_path / "three.py", "x = 1")
    write(tmp_path / "four.py", "y = 1")
    write(tmp_path / "five.py", "z = 1")
    names = ["", "four.py", "one/__init__.py", "one/two.py", "three.py"]
    assert list(source.closure(file)) == names
    before = digest(file)
    assert before != alone
    write(tmp_path / "four.py", "y = 2")
    assert digest(file) != before


def test_a_file_beside_this_program_does_not_count_it(tmp_path: Path) -> None:
    write(tmp_path / "components" / "__init__.py", "X = 1")
    assert list(source.closure(write(tmp_path / "a.py"))) == [""]


# --- versions in one process -------------------------------------------------------------------


def test_an_edited_file_is_another_and_specs_keep_their_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.py", value=1)
    use(file)
    old = registry.spec("norm", "t_mine")
    write(file, value=2)
    use(file)
    new = registry.spec("norm", "t_mine")
    assert (old.build().gain, new.build().gain, gain()) == (1.0, 2.0, 2.0)
    assert old.entry.code != new.entry.code
    write(file, value=1)
    use(file)
    assert gain() == 1.0


def test_only_the_files_of_the_experiment_at_hand_are_known(tmp_path: Path) -> None:
    use(write(tmp_path / "a.py", name="t_a"))
    use(write(tmp_path / "b.py", name="t_b"))
    assert "t_a" not in registry.names("norm")
    use(tmp_path / "a.py", tmp_path / "b.py")
    assert {"t_a", "t_b"} <= set(registry.names("norm"))


@pytest.mark.parametrize("lazy", [False, True])
def test_each_folder_has_its_own_module_of_a_name(tmp_path: Path, lazy: bool) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(tmp_path / name / "t_beside.py", f"VALUE = {value}")
        write(tmp_path / name / "a.py", extra="import t_beside", value="t_beside.VALUE")
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        use(tmp_path / name / "a.py")
        assert gain() == value
    if lazy:
        text = PART.format(extra="", kind="norm", name="t_mine", value="self.late()")
        late = "    def late(self):\n        import t_late\n        return t_late.VALUE\n"
        write(tmp_path / "t_late.py", "VALUE = 3.0")
        use(write(tmp_path / "late.py", text + late))
        assert gain() == 3.0


def test_a_module_beside_that_registers_is_known_with_each(tmp_path: Path) -> None:
    write(tmp_path / "t_shared.py", name="t_shared", value=5)
    files = [
        write(tmp_path / f"{n}.py", extra="import t_shared", name=f"t_{n}") for n in ("one", "two")
    ]
    for file in files:
        use(file)
        assert gain("t_shared") == 5.0


def test_an_error_in_a_module_beside_names_its_line(tmp_path: Path) -> None:
    write(tmp_path / "t_broken.py", "x = 1\nraise ValueError('no')\n")
    file = write(tmp_path / "a.py", extra="import t_broken")
    with pytest.raises(UserError, match=r"t_broken\.py:2: ValueError: no"):
        registry.load_file(file)
    assert "t_mine" not in registry.names("norm")


@pytest.mark.parametrize("kind", ["activaton", "norms", "attention"])
def test_a_kind_that_nothing_takes_is_refused(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "a.py", kind=kind)
    with pytest.raises(UserError, match=rf"a\.py:\d+: 't_mine' .*'{kind}', which nothing takes"):
        registry.load_file(file)


def test_two_files_with_one_name_are_refused_together(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.py"), write(tmp_path / "b.py", value=2)
    ((index, error),) = imports.use_files([one, two])
    assert index == 1
    assert "already registered" in str(error)


# --- what an experiment uses --------------------------------------------------------------------


def used(*specs: Spec, files: list[Path]) -> set[str]:
    return {path.name for path in imports.used(specs, map(str, files))}


def test_only_files_that_are_used_count(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.py", name="t_a"),
        write(tmp_path / "b.py", name="t_b", extra='OTHER = "t_c"'),
        write(tmp_path / "c.py", name="t_c"),
        write(tmp_path / "d.py", "import math\nmath.t_patched = True\n"),
    ]
    use(*files)
    plain = registry.spec("norm", "rmsnorm")
    assert used(plain, files=files) == {
        "d.py"
    }  # it registers nothing: what it does, it does to all
    assert used(registry.spec("norm", "t_a"), files=files) == {"a.py", "d.py"}
    assert used(registry.spec("norm", "t_b"), files=files) == {"b.py", "c.py", "d.py"}


def test_a_class_of_a_package_counts_by_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "t_package"
    write(package / "__init__.py", "X = 1")
    write(package / "sizes.py", "VALUE = 1.0")
    write(package / "parts.py", "from .sizes import VALUE\nclass Part:\n    gain = VALUE\n")
    entry = registry.spec("norm", "t_package.parts:Part").entry
    assert entry.code == source.digest(source.closure(package / "parts.py", "t_package.parts"))
    assert "t_package/sizes.py" in source.closure(package / "parts.py", "t_package.parts")
    assert registry.spec("activation", "torch.nn:ReLU").entry.code is None
