"""The registry: one decorator adds a component, its signature is the schema, errors say where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from components import registry
from components.registry import Entry, Slot, Spec, UserError, register, spec


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    registry.load_builtin()
    before = dict(registry._entries)
    yield
    registry._entries.clear()
    registry._entries.update(before)


class Scaled:
    """Multiplies."""

    def __init__(
        self,
        width: int,
        *,
        factor: Annotated[float, Field(gt=0)] = 2.0,
        side: Literal["left", "right"] = "left",
        inner: Annotated[Spec, Slot("activation")] = "gelu",  # type: ignore[assignment]
        pair: tuple[int, int] = (1, 2),
    ) -> None:
        self.width, self.factor, self.side, self.inner, self.pair = width, factor, side, inner, pair


@pytest.fixture
def scaled() -> Entry:
    register("toy", "scaled")(Scaled)
    return registry.get("toy", "scaled")


def test_a_decorator_is_all_it_takes(scaled: Entry) -> None:
    built = registry.build("toy", {"name": "scaled", "factor": 3}, 7)
    assert isinstance(built, Scaled)
    assert (built.width, built.factor, built.side) == (7, 3.0, "left")
    assert "scaled" in registry.names("toy")
    assert "toy" in registry.kinds()


def test_keyword_only_parameters_are_the_schema_and_positional_ones_are_not(scaled: Entry) -> None:
    fields = scaled.schema.model_fields
    assert list(fields) == ["factor", "side", "inner", "pair"]
    assert fields["factor"].default == 2.0
    assert scaled.summary == "Multiplies."


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"factor": -1.0}, "factor: Input should be greater than 0"),
        ({"factor": "2"}, "factor: Input should be a valid number"),
        ({"side": "top"}, "side: Input should be 'left' or 'right'"),
        ({"width": 3}, "width: Extra inputs are not permitted"),
        ({"pair": [1]}, "pair.1: Field required"),
        ({"inner": "gelo"}, "inner: unknown activation 'gelo' — did you mean 'gelu'?"),
        ({"inner": 3}, "inner: needs the name of a component"),
        ({"inner": {"name": "gelu", "x": 1}}, "inner.x: Extra inputs are not permitted"),
    ],
)
def test_values_are_checked_against_the_signature(
    scaled: Entry, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as error:
        spec("toy", {"name": "scaled", **params})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parameter_without_annotation_is_an_error_that_names_it() -> None:
    @register("toy", "loose")
    class Loose:
        def __init__(self, *, amount=1) -> None: ...

    with pytest.raises(UserError, match=r"test_registry\.py:\d+: toy 'loose': parameter 'amount'"):
        spec("toy", "loose")


def test_two_of_one_name_is_an_error_that_names_both_places(scaled: Entry) -> None:
    with pytest.raises(UserError) as error:

        @register("toy", "scaled")
        class Other: ...

    places = str(error.value).count("test_registry.py:")
    assert places == 2, error.value
    assert "'scaled' is already registered" in str(error.value)
    register("toy", "scaled")(Scaled)  # the same class again, as by a reload, is none


def test_a_wrong_name_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(UserError) as error:
        registry.get("norm", "rmsnrom")
    assert "did you mean 'rmsnorm'?" in str(error.value)
    assert all(name in str(error.value) for name in registry.names("norm"))


def test_an_import_path_stands_where_a_name_would() -> None:
    chosen = spec("activation", "torch.nn:Tanh")
    assert type(chosen.build()).__name__ == "Tanh"
    assert chosen.dump() == {"name": "torch.nn:Tanh"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.at_all:Norm", "can't be imported: No module named 'no_such_package'"),
        ("torch.nn:NoSuchNorm", "can't be imported: module 'torch.nn' has no attribute"),
        ("torch.nn:functional", "is not a class"),
    ],
)
def test_a_wrong_import_path_says_why(path: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        registry.get("norm", path)
    assert said in str(error.value)


def test_specs_are_equal_where_they_mean_the_same(scaled: Entry) -> None:
    short = spec("toy", "scaled")
    long = spec("toy", {"name": "scaled", "factor": 2, "inner": {"name": "gelu"}, "pair": [1, 2]})
    other = spec("toy", {"name": "scaled", "inner": "relu"})
    assert short == long
    assert hash(short) == hash(long)
    assert short != other
    assert spec("toy", short) is short


def test_a_dump_loads_to_the_same_and_can_leave_defaults_out(scaled: Entry) -> None:
    chosen = spec("toy", {"name": "scaled", "side": "right"})
    assert chosen.dump() == {
        "name": "scaled",
        "factor": 2.0,
        "side": "right",
        "inner": {"name": "gelu", "approximate": "tanh"},
        "pair": [1, 2],
    }
    assert chosen.dump(defaults=False) == {"name": "scaled", "side": "right"}
    for everything in (True, False):
        assert spec("toy", chosen.dump(everything)) == chosen


def test_a_file_registers_its_components_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from components.registry import register\n"
        "@register('norm', 'mine')\n"
        "class Mine:\n    'Mine.'\n"
    )
    registry.load_file(file)
    registry.load_file(file)
    assert registry.get("norm", "mine").source == f"{file}:2"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ny = x / 0\n", ":2: ZeroDivisionError"),
        ("def f(:\n", ":1: SyntaxError"),
        ("import no_such_thing\n", ":1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_import_names_its_line(tmp_path: Path, source: str, said: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(UserError) as error:
        registry.load_file(file)
    assert f"{file}{said}" in str(error.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.py"):
        registry.load_file(tmp_path / "absent.py")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(UserError, match="not a Python file"):
        registry.load_file(text)
