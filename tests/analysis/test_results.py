"""What is read is what was written; what is damaged is named, and nothing else is guessed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from analysis.results import in_state, read_curve, read_manifest, read_run, read_runs
from experiments.record import UserError, seal


def test_each_run_is_found_in_its_state(manifest_path: Path) -> None:
    manifest = read_manifest(manifest_path)
    runs = read_runs(manifest, manifest_path.parents[1])
    states = [[runs[row.runs[seed]].state for seed in (0, 1, 2)] for row in manifest.rows]
    assert states[3:] == [
        ["done", "diverged", "done"], ["done", "missing", "failed"], ["missing"] * 3
    ]  # fmt: skip
    assert list(in_state(manifest.rows[3], runs, "done")) == [0, 2]
    assert runs[manifest.rows[4].runs[2]].reason == "disk full"  # one line, no escape codes


def test_a_directory_without_a_result_is_unfinished(tmp_path: Path) -> None:
    assert read_run(tmp_path).state == "unfinished"


def test_a_result_outranks_an_older_failure(manifest_path: Path) -> None:
    done = manifest_path.parents[1] / "0000000000-s0"
    (done / "failure.json").write_text("{}")
    assert read_run(done).state == "done"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "ffffffffff-s0"}, "is the result of run"),
        ({"seed": 7}, "planned it as seed 0"),
        ({"schema": 2}, "another version"),
        ({"status": "finished"}, "neither done nor diverged"),
        ({"val/loss": None}, "no finite val/loss"),
        ({"val/loss": float("nan")}, "no finite val/loss"),
        ({"val/loss": True}, "no finite val/loss"),
        (None, "result.json"),
    ],
)
def test_a_foreign_or_damaged_result_is_one_line(
    manifest_path: Path, change: dict[str, object] | None, words: str
) -> None:
    path = manifest_path.parents[1] / "0000000000-s0" / "result.json"
    text = path.read_text()
    path.write_text(text[:40] if change is None else json.dumps({**json.loads(text), **change}))
    with pytest.raises(UserError, match=words) as error:
        read_runs(read_manifest(manifest_path), manifest_path.parents[1])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("run_id", ["../secret", "..", "", "a/b", 3])
def test_a_manifest_cannot_lead_out_of_the_runs_directory(
    manifest_path: Path, run_id: object
) -> None:
    data = json.loads(manifest_path.read_text())
    data["rows"][1]["runs"]["0"] = run_id
    manifest_path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"row 2: runs: '0'"):
        read_manifest(manifest_path)


def test_a_truncated_last_line_is_ignored_and_damage_elsewhere_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"tokens": 2, "val/loss": 4.0}\n{"tokens": 1, "val/loss": 5.0}\n{"tok')
    assert read_curve(tmp_path) == {1: 5.0, 2: 4.0}
    path.write_text('{"tokens": 1}\n{"tok\n{"tokens": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_curve(tmp_path)


def test_what_an_older_result_does_not_say_is_read_from_its_provenance(
    manifest_path: Path,
) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    attempt = {"git": {"commit": "abc", "patch": "+1"}, "versions": {"torch": "2.12", "numpy": "2"}}
    provenance = {"data": {"fingerprint": "f00d"}, "attempts": [{}, attempt]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    found = read_run(folder).result
    assert (found["data"], found["versions"]) == ("f00d", {"torch": "2.12"})
    assert found["code"]["commit"] == "abc" and found["code"]["dirty"]
    attempt["git"] = {"commit": "abc", "patch": "+2"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert read_run(folder).result["code"]["source"] != found["code"]["source"]


def test_a_row_with_seeds_of_its_own_is_read_by_the_sweeps(manifest_path: Path) -> None:
    data = json.loads(manifest_path.read_text())
    data["rows"][1]["seeds"] = {"0": 100, "1": 1, "2": 2}
    manifest_path.write_text(json.dumps(data))
    path = manifest_path.parents[1] / "0000000001-s0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 100}))
    manifest = read_manifest(manifest_path)
    runs = read_runs(manifest, manifest_path.parents[1])
    assert list(in_state(manifest.rows[1], runs, "done")) == [0, 1, 2]
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 0}))
    with pytest.raises(UserError, match="planned it as seed 100"):
        read_runs(manifest, manifest_path.parents[1])


def test_a_result_with_nan_that_has_a_seal_was_edited(manifest_path: Path) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    data = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**data, "seal": "0" * 32, "x": float("nan")}))
    run = read_run(folder)
    assert (run.state, run.result) == ("edited", {})


@pytest.mark.parametrize("value", ["fast", True, None])
def test_a_tune_over_what_is_no_number_is_one_line(manifest_path: Path, value: object) -> None:
    data = json.loads(manifest_path.read_text())
    data["rows"][1]["tuned"] = {"of": "GPT-2", "path": "model.norm", "value": value}
    manifest_path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"row 2: tuned to .* which is no number"):
        read_manifest(manifest_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("levels", "x", "row 2: levels is 'x'"),
        ("levels", {"model.norm": "rmsnorm"}, "levels are not of the same factors"),
        ("tuned", "x", "row 2: tuned is 'x'"),
        ("tuned", {"value": 1.0, "path": "training.lr"}, "row 2: of is missing"),
        ("seeds", {"first": 1}, "row 2: seeds: "),
        ("differences", 1, "row 2: differences is 1"),
        ("flops_per_token", -1, "row 2: flops_per_token is -1"),
        ("parameters", 10**400, "row 2: parameters is 1000"),
        ("label", "GPT-2\u200b ", "rows 1 and 2 both read 'GPT-2'"),
    ],
)
def test_a_manifest_edited_by_hand_is_one_line(
    manifest_path: Path, key: str, value: object, said: str
) -> None:
    data = json.loads(manifest_path.read_text())
    data["rows"][0]["levels"] = {"model.block": "pre"} if key == "levels" else None
    data["rows"][1][key] = value
    manifest_path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_manifest(manifest_path)
    assert "\n" not in str(caught.value)


def test_a_tunes_row_is_found_by_its_label_as_it_is_shown(manifest_path: Path) -> None:
    data = json.loads(manifest_path.read_text())
    data["rows"][1]["label"] = "two  words\u200d"
    data["rows"][2]["tuned"] = {"of": "two  words\u200d", "path": "training.lr", "value": 1e-3}
    manifest_path.write_text(json.dumps(data))
    rows = read_manifest(manifest_path).rows
    assert rows[2].tuned is not None and rows[2].tuned["of"] == rows[1].label == "two words"


@pytest.mark.parametrize(
    ("key", "value"), [("code", "abc"), ("versions", []), ("tokens", "many"), ("tokens", True)]
)
def test_a_result_whose_facts_are_of_another_kind_is_one_line(
    manifest_path: Path, key: str, value: object
) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    data = {**json.loads((folder / "result.json").read_text()), key: value}
    data["seal"] = seal(folder, data)
    (folder / "result.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"result\.json: {key} is "):
        read_run(folder)


@pytest.mark.parametrize("left", [{}, {"seal": None}])
def test_a_result_that_lost_its_seal_was_edited(
    manifest_path: Path, left: dict[str, object]
) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    data = {**json.loads((folder / "result.json").read_text()), "code": {"source": "a"}}
    (folder / "result.json").write_text(json.dumps({**data, "seal": seal(folder, data)}))
    assert read_run(folder).state == "done"
    (folder / "result.json").write_text(json.dumps({**data, "val/loss": 1.0, **left}))
    assert read_run(folder).state == "edited"


@pytest.mark.parametrize(
    "provenance",
    [{"attempts": "x"}, {"attempts": [1]}, {"attempts": [{"git": "x"}]}, {"data": "x"}],
)
def test_an_odd_provenance_says_nothing(manifest_path: Path, provenance: object) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    (folder / "provenance.json").write_text(json.dumps(provenance))
    run = read_run(folder)
    assert (run.state, run.result["data"], run.result["code"]["commit"]) == ("done", None, None)


def test_a_number_too_large_for_a_float_is_none(manifest_path: Path) -> None:
    folder = manifest_path.parents[1] / "0000000000-s0"
    data = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**data, "val/bpb": 10**400}))
    assert read_run(folder).number("val/bpb") is None


def test_a_byte_order_mark_is_damage_of_the_first_line(tmp_path: Path) -> None:
    row = '{"tokens": 1, "val/loss": 5.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"\xef\xbb\xbf" + 2 * row.encode())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: "):
        read_curve(tmp_path)
