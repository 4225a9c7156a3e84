"""An imported component that fails or breaks its interface is named in one line, with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import command_line
from tests.command_line import ceteris

BASE = """\
imports: [parts.py]
model: {d_model: 16, n_layers: 2, n_heads: 2}
data: {corpus: {name: text, files: [text.txt], document_bytes: 100}, validation_fraction: 0.3}
training: {tokens: 1024, seq_len: 16, global_batch_size: 4, lr: 1e-3}
evaluation: {tokens: 128}
"""
PARTS = """\
import torch
from torch import nn
from components.dims import Linear
from components.registry import register


class Base(nn.Module):
    def __init__(self, dims, layer, norm=None):
        super().__init__()
        self.w = Linear(dims.d_model, dims.d_model, bias=False)


"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with command_line.desk(tmp_path, monkeypatch):
        Path("base.yaml").write_text(BASE)
        Path("text.txt").write_text(" ".join(str(n * n) for n in range(900)))
        yield tmp_path / "runs"


def trained(part: str, setting: str, *verb: str) -> str:
    """What `train` reports of an experiment with this component; the run must not begin."""
    Path("parts.py").write_text(PARTS + part)
    done = ceteris(*(verb or ("train",)), "base.yaml", setting, "--runs", "runs")
    assert (done.code, done.out) == (2, ""), done.err
    assert not list(Path("runs").glob("*-s0/provenance.json"))
    (line,) = done.err.splitlines()
    return line.removeprefix("error: ")


FAULTS = {
    "wrong shape": (
        "    def __init__(self, dims, layer):\n"
        "        super().__init__(dims, layer)\n"
        "        self.w = Linear(dims.d_model, 17, bias=False)\n"
        "    def forward(self, x):\n        return self.w(x)\n",
        "forward is given (1, 16, 16) and should return that shape, not (1, 16, 17)",
    ),
    "a width of one, which would be broadcast": (
        "    def forward(self, x):\n        return self.w(x)[..., :1]\n",
        "forward is given (1, 16, 16) and should return that shape, not (1, 16, 1)",
    ),
    "no value": (
        "    def forward(self, x):\n        self.w(x)\n",
        "forward should return a tensor, not None",
    ),
    "a tuple": (
        "    def forward(self, x):\n        return self.w(x), None\n",
        "forward should return a tensor, not a tuple",
    ),
    "another dtype": (
        "    def forward(self, x):\n        return self.w(x).double()\n",
        "forward is given torch.float32 and should return that, not torch.float64",
    ),
    "its input changed in place": (
        "    def forward(self, x):\n        x += 1\n        return self.w(x)\n",
        "forward changes its input in place, which others read after it; work on a copy "
        "(x = x + …, not x += …)",
    ),
    "an error in its constructor": (
        "    def __init__(self, dims, layer):\n        raise KeyError('experts')\n",
        "KeyError: 'experts' (at parts.py:17) while the model is built",
    ),
    "a constructor that takes something else": (
        "    def __init__(self, dims):\n        super().__init__(dims, 0)\n",
        "TypeError: Mine.__init__() takes 2 positional arguments but 3 were given "
        "while the model is built",
    ),
    "one parameter under two names": (
        "    def __init__(self, dims, layer):\n        super().__init__(dims, layer)\n"
        "        self.v = self.w\n"
        "    def forward(self, x):\n        return self.w(x) + self.v(x)\n",
        "one parameter is registered twice, as blocks.0.ffn.w.weight and blocks.0.ffn.v.weight; "
        "keep one name, and use it from there",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", [("train",), ("train", "-n")], ids=["train", "dry run"])
def test_a_faulty_part_is_named_in_one_line(fault: str, verb: tuple[str, ...]) -> None:
    body, message = FAULTS[fault]
    part = f"@register('ffn', 'mine')\nclass Mine(Base):\n    '''Mine.'''\n{body}"
    assert trained(part, "model.ffn=mine", *verb) == f"parts.py:13: ffn 'mine': {message}"


def test_sparse_routing_is_refused_with_what_counting_needs() -> None:
    part = (
        "@register('ffn', 'mine')\nclass Mine(Base):\n"
        "    def forward(self, x):\n        return self.w(x) + len((x > 0).nonzero())\n"
    )
    line = trained(part, "model.ffn=mine")
    assert line.startswith("parts.py:13: ffn 'mine': NotImplementedError: ")
    assert "(at parts.py:16) while parameters and FLOPs are counted" in line


def test_an_error_in_built_in_code_that_it_drives_is_its_own() -> None:
    part = (
        "from components.ffn import MLP\n"
        "@register('ffn', 'mine')\nclass Mine(MLP):\n    '''Mine.'''\n"
        "    def __init__(self, dims, layer):\n        super().__init__(dims, layer)\n"
        "        self.w_down = Linear(3, dims.d_model, bias=False)\n"
    )
    line = trained(part, "model.ffn=mine")
    assert line.startswith("parts.py:14: ffn 'mine': RuntimeError: ")


def test_an_initial_value_of_no_number_names_the_init() -> None:
    part = (
        "@register('init', 'mine')\nclass Mine:\n"
        "    def std(self, role, shape, dims):\n        return None\n"
    )
    line = trained(part, "model.init=mine")
    assert line.startswith("parts.py:13: init 'mine': TypeError: normal_()")


def test_a_filter_that_raises_is_named_with_its_line() -> None:
    part = (
        "@register('filter', 'mine')\nclass Mine:\n    def __call__(self, documents):\n"
        "        for document in documents:\n            raise ValueError('no model')\n"
        "        yield\n"
    )
    line = trained(part, "data.filters=[mine]")
    assert line == (
        "parts.py:13: filter 'mine': ValueError: no model (at parts.py:17) "
        "while the text is prepared"
    )


def test_a_filter_that_gives_no_text_is_named() -> None:
    part = (
        "@register('filter', 'mine')\nclass Mine:\n    def __call__(self, documents):\n"
        "        return (len(document) for document in documents)\n"
    )
    line = trained(part, "data.filters=[mine]")
    assert line.startswith("parts.py:13: filter 'mine': AttributeError: ")
    assert line.endswith("while the text is prepared")


def test_a_buffer_holds_what_its_constructor_gave_it() -> None:
    part = (
        "@register('ffn', 'mine')\nclass Mine(Base):\n    '''Mine.'''\n"
        "    def __init__(self, dims, layer):\n        super().__init__(dims, layer)\n"
        "        two = torch.full((dims.d_model,), 2.0)\n"
        "        self.register_buffer('scale', two, persistent=False)\n"
        "    def forward(self, x):\n        assert x.is_meta or (self.scale == 2.0).all()\n"
        "        return self.w(x) * self.scale\n"
    )
    Path("parts.py").write_text(PARTS + part)
    done = ceteris("train", "base.yaml", "model.ffn=mine", "--runs", "runs", "--json")
    assert done.code == 0, done.err
    again = ceteris("generate", done.json["id"], "--runs", "runs", "--max-tokens", 2)
    assert again.code == 0, again.err


def test_generating_with_a_mixer_without_a_cache_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import precheck

    monkeypatch.setattr(precheck, "check_run", lambda *_: None)  # as of a run from before
    Path("parts.py").write_text(
        PARTS + "@register('mixer', 'mine')\nclass Mine(Base):\n    '''Mine.'''\n"
        "    def forward(self, x, position, tables, cache=None):\n        return self.w(x)\n"
    )
    done = ceteris("train", "base.yaml", "model.mixer=mine", "--runs", "runs", "--json")
    again = ceteris("generate", done.json["id"], "--runs", "runs")
    assert again.code == 2
    assert re.fullmatch(  # the copy that the run was trained with
        r"error: runs/code/imports/\w+/parts\.py:13: mixer 'mine': cache\(batch, length\) is "
        r"missing, which generation needs; see docs/add-a-component\.md\n",
        again.err,
    )
