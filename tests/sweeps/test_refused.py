"""A component that would spoil its row's numbers is refused by name, by a sweep and by train."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.registry import UserError
from experiments import loader
from sweeps import design, guard, plan
from tests import command_line
from tests.command_line import ceteris

BASE = """\
imports: [parts.py]
model: {d_model: 32, n_layers: 2, n_heads: 2}
data: {corpus: {name: text, files: [text.txt], document_bytes: 100}, validation_fraction: 0.3}
training: {tokens: 2048, seq_len: 16, global_batch_size: 4, lr: 1e-3}
evaluation: {tokens: 128}
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with command_line.desk(tmp_path, monkeypatch):
        Path("base.yaml").write_text(BASE)
        Path("text.txt").write_text(" ".join(str(n * n) for n in range(3000)))
        yield tmp_path / "runs"


def looked_at(settings: str, root: Path) -> list[str]:
    """What the guard says of a sweep of a baseline and one row; an error comes up."""
    Path("s.yaml").write_text(
        f"base: base.yaml\nseeds: [0, 1]\nrows: [{{label: mine, set: {settings}}}]\n"
    )
    sweep, said = design.load("s.yaml"), list[str]()
    guard.check(sweep, plan.plan(sweep, root).manifest, root, said.append)
    return said


def refused(settings: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        looked_at(settings, root)
    (line,) = str(caught.value).splitlines()
    return line


PARTS = """\
import torch
from torch import nn
from components.dims import ResidualLinear
from components.registry import register


class Sums:
    total, seen = 0.0, 0


class Base(nn.Module):
    def __init__(self, dims, layer, norm):
        super().__init__()
        self.w = ResidualLinear(dims.d_model, dims.d_model, bias=False)

    def cache(self, batch, length):
        return Sums()


@register("mixer", "average")
class Average(Base):
    def forward(self, x, position, tables, cache=None):
        sums, start = x.cumsum(1), 0
        if cache is not None:
            sums, start = sums + cache.total, cache.seen
            cache.total, cache.seen = sums[:, -1:], start + x.shape[1]
        count = torch.arange(start + 1, start + x.shape[1] + 1, device=x.device)
        return self.w(sums / count[:, None].to(x.dtype))


"""
LINE = PARTS.count("\n") + 1
FORWARD = "    def forward(self, x, position, tables, cache=None):\n"
INIT = "    def __init__(self, dims, layer, norm):\n        super().__init__(dims, layer, norm)\n"
BROKEN = {
    "the mean of a whole sequence": (
        f"{FORWARD}        return self.w(x + x.mean(1, keepdim=True))\n",
        "it sees the future: the output at token 14 changes with token 15, which comes after it",
    ),
    "a leak behind a gate of zero": (
        "    constants = {'gate': 0.0}\n"
        f"{INIT}        self.gate = nn.Parameter(torch.empty(1))\n"
        f"{FORWARD}        return self.w(x) + self.gate * x.roll(-1, 1)\n",
        "it sees the future",
    ),
    "a chunk that sees itself": (
        f"{FORWARD}        if x.shape[1] % 4: return self.w(x)\n"
        "        chunks = x.unflatten(1, (-1, 4))\n"
        "        return self.w((chunks + chunks.mean(2, keepdim=True)).flatten(1, 2))\n",
        "it sees the future",
    ),
    "another sequence of the batch": (
        f"{FORWARD}        return self.w(x + x[:, :1].mean(0, keepdim=True))\n",
        "a sequence's output changes with the other sequences of its batch",
    ),
    "an earlier batch": (
        f"    calls = 0\n{FORWARD}        self.calls += 1\n        return self.w(x) * self.calls\n",
        "the same tokens give other outputs the second time",
    ),
    "a cache that nobody reads": (
        f"{FORWARD}        return self.w(x.cumsum(1))\n",
        "with a cache, the output at token ",
    ),
    "no cache": (
        f"    cache = None\n{FORWARD}        return self.w(x)\n",
        "cache(batch, length) is missing",
    ),
    "numbers of torch's own generator": (
        "    def initialise(self, name, parameter):\n"
        "        return parameter.normal_() is not None\n"
        f"{FORWARD}        return self.w(x)\n",
        "two builds at the same seed differ in blocks.0.mixer.w.weight",
    ),
    "a matrix that init draws over": (
        f"{INIT}        self.v = nn.Parameter(torch.zeros(dims.d_model, dims.d_model))\n"
        f"{FORWARD}        return self.w(x) + x @ self.v\n",
        "its constructor sets v to given numbers, and `init` draws others over them",
    ),
    "no finite number": (
        f"{FORWARD}        return self.w(x) / 0.0\n",
        "hidden states are not finite",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_mixer_that_would_spoil_its_numbers_is_named(fault: str, root: Path) -> None:
    body, message = BROKEN[fault]
    Path("parts.py").write_text(PARTS + f"@register('mixer', 'mine')\nclass Mine(Base):\n{body}")
    line = refused("{model.mixer: mine}", root)
    assert line.startswith(f"parts.py:{LINE}: mixer 'mine': {message}"), line
    assert line.endswith("(row 'mine')")
    done = ceteris("train", "base.yaml", "model.mixer=mine", "--runs", root)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: parts.py:{LINE}: mixer 'mine': {message}"), done.err


def test_a_mixer_that_keeps_its_promises_is_trained(root: Path) -> None:
    Path("parts.py").write_text(PARTS)
    assert looked_at("{model.mixer: average}", root) == []
    assert ceteris("train", "base.yaml", "model.mixer=average", "--runs", root).code == 0


def test_the_part_that_leaks_is_found_among_several(root: Path) -> None:
    Path("parts.py").write_text(
        f"{PARTS}@register('norm', 'mine')\nclass Mine(nn.Module):\n"
        "    def __init__(self, width):\n        super().__init__()\n"
        "    def forward(self, x):\n        return x - x.mean(1, keepdim=True)\n"
    )
    line = refused("{model.mixer: average, model.norm: mine}", root)
    assert line.startswith(f"parts.py:{LINE}: norm 'mine': it sees the future")


def test_routing_by_values_is_no_leak(root: Path) -> None:
    """Matrices of other sizes, as tokens change, round otherwise: that is within ROUNDING."""
    Path("parts.py").write_text(
        f"{PARTS}@register('ffn', 'routed')\nclass Routed(nn.Module):\n"
        "    def __init__(self, dims, layer):\n        super().__init__()\n"
        "        self.a = ResidualLinear(dims.d_model, dims.d_model, bias=False)\n"
        "        self.b = ResidualLinear(dims.d_model, dims.d_model, bias=False)\n"
        "    def forward(self, x):\n"
        "        if x.is_meta: return self.a(x) + self.b(x)\n"
        "        flat, out = x.flatten(0, 1), torch.empty_like(x).flatten(0, 1)\n"
        "        first = flat[:, 0] > 0\n"
        "        out[first], out[~first] = self.a(flat[first]), self.b(flat[~first])\n"
        "        return out.view_as(x)\n"
    )
    assert looked_at("{model.ffn: routed}", root) == []


TRAINING = """\
import torch
from components.registry import register


class Both(torch.optim.Optimizer):
    def __init__(self, inner):
        self.inner = inner
        super().__init__([g for o in inner for g in o.param_groups], {})

    def step(self, closure=None):
        for one in self.inner:
            one.step()


class Detached(Both):
    def load_state_dict(self, state):
        for one in self.inner:
            one.load_state_dict(one.state_dict())


class Nested(Both):
    def state_dict(self):
        return {"inner": [one.state_dict() for one in self.inner]}


class Forgetful(torch.optim.AdamW):
    def load_state_dict(self, state):
        super().load_state_dict({"state": {}, "param_groups": state["param_groups"]})


class Two:
    def build(self, model, lr):
        all = list(model.parameters())
        return self.cls([torch.optim.AdamW(all[:2], lr=lr), torch.optim.SGD(all[2:], lr=lr)])


@register("optimizer", "detached")
class UsesDetached(Two):
    cls = Detached


@register("optimizer", "nested")
class UsesNested(Two):
    cls = Nested


@register("optimizer", "forgetful")
class UsesForgetful:
    def build(self, model, lr):
        return Forgetful(model.parameters(), lr=lr)


@register("optimizer", "nothing")
class Nothing:
    def build(self, model, lr):
        return None


@register("schedule", "falls")
class Falls:
    def factor(self, step, steps):
        return 1 - 2 * step / steps


@register("objective", "mean")
class Mean:
    def __call__(self, hidden, weight, targets):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


@register("objective", "each")
class Each:
    def __call__(self, hidden, weight, targets):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
"""
WRONG = {
    "optimizer: detached": "at a learning rate of 0 a step changes ",
    "optimizer: nested": "state_dict has the keys 'inner'; a checkpoint needs torch's own form",
    "optimizer: forgetful": "resuming is not going on",
    "optimizer: nothing": "build should return a torch.optim.Optimizer, not None",
    "objective: mean": "it should be a sum over targets",
    "objective: each": "should return a scalar tensor",
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_would_train_a_model_wrongly_is_named(setting: str, root: Path) -> None:
    Path("parts.py").write_text(TRAINING)
    kind, _, name = setting.partition(": ")
    line = refused(f"{{training.{setting}}}", root)
    assert line.startswith("parts.py:")
    assert f": {kind} '{name}': {WRONG[setting]}" in line


def test_a_schedule_below_zero_ends_training_by_name(root: Path) -> None:
    Path("parts.py").write_text(TRAINING)
    done = command_line.ceteris("train", "base.yaml", "training.schedule=falls", "--runs", root)
    assert done.code == 2
    steps = loader.load("base.yaml").training.steps
    line = f"error: parts.py:{{}}: schedule 'falls': factor({steps // 2 + 1}, {steps}) is -"
    head, _, tail = line.partition("{}")
    (said,) = [x for x in done.err.splitlines() if x.startswith(head)]
    assert tail in said


@pytest.mark.parametrize("preset", ["positions", "arora2023", "wortsman2023", "press2021"])
def test_no_row_of_a_preset_is_refused(preset: str, root: Path) -> None:
    sweep, said = design.load(preset), list[str]()
    rows = [guard._Row(v.label, True, v.experiment, 257) for v in sweep.variants]
    guard.refuse(sweep, rows, root / "data", said.append)
    assert said == []
