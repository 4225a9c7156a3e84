"""What a cluster file may say, what is said of a wrong one, and what Slurm gets of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from submitit.slurm.slurm import _make_sbatch_string

from experiments.yaml_text import ConfigError
from sweeps import cluster
from sweeps.cluster import CLUSTERS, Cluster, minutes, seconds
from tests.conftest import ROOT

EXAMPLES = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that paths in messages are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Cluster:
    Path("mine.yaml").write_text(text)
    return cluster.load("mine.yaml", overrides).cluster


def complaints(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return list(caught.value.lines)


def script(settings: Cluster, name: str = "powers") -> list[str]:
    """The lines that submitit makes of it for an array of 9 jobs."""
    text = _make_sbatch_string(
        command="true", folder="/runs/x", map_count=9, **settings.parameters(name)
    )
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text.splitlines()


# --- the examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_found_by_name_and_gives_a_script(name: str):
    found = cluster.load(name)
    assert found.path == CLUSTERS / f"{name}.yaml"
    if found.cluster.executor == "slurm":
        assert "#SBATCH --array=0-8%" in "\n".join(script(found.cluster))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_a_comment_at_every_key(name: str):
    first, *lines = (CLUSTERS / f"{name}.yaml").read_text("utf-8").splitlines()
    assert first.startswith("# ")
    keys = [line for line in lines if line and line[0].isalpha()]
    named = {line.partition(":")[0] for line in keys}
    bare = {line.partition(":")[0] for line in keys if "#" not in line}
    assert named <= {*Cluster.model_fields}
    assert bare <= {"executor", "partition", "gpus_per_node", "sbatch"}  # said by the name alone


def test_the_examples_together_show_every_key():
    shown = {key for name in EXAMPLES for key in cluster.load(name).cluster.model_fields_set}
    assert shown == {*Cluster.model_fields}


def test_every_key_says_what_it_is_for():
    assert all(info.description for info in Cluster.model_fields.values())


# --- what is said of a wrong file -----------------------------------------------------------------


def test_all_mistakes_are_told_at_once_each_at_its_line():
    assert complaints(
        "partitoin: gpu\n"
        "nodes: 0\n"
        "gpus_per_node: '2'\n"
        "memory: 1.5GB\n"
        "time: 5h\n"
        "setup: module load cuda\n"
        "sharding: zero\n"
        "sbatch:\n"
        "  partition: gpu\n"
        "  hold: false\n"
    ) == [
        "mine.yaml:1:1: partitoin: unknown key 'partitoin' — did you mean 'partition'? (known: "
        f"{', '.join(Cluster.model_fields)})",
        "mine.yaml:2:1: nodes: should be at least 1, got 0",
        "mine.yaml:3:1: gpus_per_node: should be a whole number, got '2'",
        "mine.yaml:4:1: memory: should be a whole number with K, M, G or T, such as 16GB, or 0 for "
        "the whole node's, got '1.5GB'",
        "mine.yaml:5:1: time: should be minutes, or one of M:S, H:M:S, D-H, D-H:M, D-H:M:S "
        "(4:00:00 is four hours), got '5h'",
        "mine.yaml:6:1: setup: should be a list of lines; put '- ' before each",
        "mine.yaml:7:1: sharding: should be 'ddp' or 'fsdp2', got 'zero'",
        "mine.yaml:9:3: sbatch.partition: is the key partition of the cluster file; write it there",
        "mine.yaml:10:3: sbatch.hold: false is no value of a flag; write true, or leave the line "
        "out",
    ]


def test_a_name_that_is_no_file_is_compared_with_the_examples():
    with pytest.raises(ConfigError) as caught:
        cluster.load("slrum-gpu")
    assert str(caught.value) == (
        "no cluster file 'slrum-gpu': no such file or preset — did you mean 'slurm-gpu'? (known: "
        f"{', '.join(EXAMPLES)})"
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("partition: x\n", "1:1: time", "is missing"),
        ("time: 1\n", "1:1: time", "none of the 60 s"),
        ("time: 5\nwarning_seconds: 300\n", "2:1: warning_seconds", "none of the 300 s"),
        ("time: 9\nnodes: 2\nruns_per_job: 4\n", "3:1: runs_per_job", "all its processes"),
        ("time: 9\ntasks_per_node: 2\ngpus_per_node: 4\n", "2:1: tasks_per_node", "one process"),
        ("time: 9\ngpus_per_node: 4\n", "2:1: gpus_per_node", "3 of 4 GPUs would idle"),
        ("time: 9\nsharding: fsdp2\n", "2:1: sharding", "over several GPUs"),
        ("time: 9\nsharding: fsdp2\ntasks_per_node: 2\n", "2:1: sharding", "over several GPUs"),
        ("time: 9\nworkers_per_gpu: 2\n", "2:1: workers_per_gpu", "several runs and a GPU"),
        ("time: 9\nworkers: 1\n", "2:1: workers", "set runs_per_job too"),
        ("time: 9\nruns_per_job: 4\nworkers: 4\n", "3:1: workers", "set cpus_per_task to 4"),
        ("time: 9\nmemory: 1G\nsbatch: {mem-per-cpu: 1G}\n", "3:10: sbatch.mem-per-cpu", "exclude"),
        ("time: 9\nsbatch: {gres: 'gpu:a:2'}\n", "2:10: sbatch.gres", "2 GPUs on each node"),
        ("executor: local\ntime: 9\n", "2:1: time", "executor: local has none"),
        ("executor: local\nworkers: 2\nworkers_per_gpu: 2\n", "3:1: workers_per_gpu", "already"),
    ],
)
def test_settings_that_contradict_each_other_are_told_where_one_was_written(
    text: str, line: str, words: str
):
    (told,) = complaints(text)
    assert told.startswith(f"mine.yaml:{line}: ")
    assert words in told


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("mem", "is the key memory"),
        ("signal", "is the key warning_seconds"),
        ("ntasks_per_node", "is the key tasks_per_node"),
        ("gpus", "is the key gpus_per_node"),
        ("array", "is set by Ceteris itself"),
        ("output", "logs lie beside the submission"),
        ("no-requeue", "from their checkpoints"),
        ("export", "under setup"),
        ("parti", "sbatch takes it for partition, which is the key partition"),
        ("--nice", "without dashes"),
        ("p", "no long name"),
        ("nice --wrap", "no long name"),
    ],
)
def test_what_ceteris_sets_itself_is_no_further_option(option: str, words: str):
    (told,) = complaints(f"time: 9\nsbatch:\n  {option}: 1\n")
    assert told.startswith(f"mine.yaml:3:3: sbatch.{option}: ")
    assert words in told


@pytest.mark.parametrize("sign", ["\\n", "\\0", "\\r", "\\x1b", "\\u2028"])
@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "setup.0", "sbatch.comment"]
)
def test_nothing_can_begin_a_line_of_its_own_in_the_script(key: str, sign: str):
    written = {"setup.0": "setup: [%s]", "sbatch.comment": "sbatch: {comment: %s}"}
    text = written.get(key, f"{key}: %s") % f'"a{sign}#SBATCH --uid=0"'
    (told,) = complaints(f"time: 9\n{text}\n")
    assert told.endswith(f": {key}: should be one line of printable text")


def test_a_setup_line_that_sbatch_would_read_as_an_option_is_refused():
    (told,) = complaints("time: 9\nsetup:\n  - module load cuda\n  - '#SBATCH --array=0-9'\n")
    assert told.startswith("mine.yaml:4:5: setup.1: is an option of sbatch")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from([*Cluster.model_fields]), VALUES, max_size=5))
def test_a_file_is_taken_or_refused_line_by_line(data: dict[str, Any]):
    Path("mine.yaml").write_text(json.dumps({"time": 60, **data}))
    try:
        made = cluster.load("mine.yaml").cluster
    except ConfigError as error:
        told = error.lines
    else:
        told = tuple(line for line in script(made) if line.startswith("srun "))
        assert len(told) == 1
    assert told
    assert all(line.isprintable() for line in told)


# --- times and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "limit"),  # as Slurm 22.05 reads them, in minutes
    [
        ("5", 5),
        ("007", 7),
        ("5:30", 6),
        ("0:30", 1),
        ("00:00:61", 2),
        ("1:5:30", 66),
        ("25:99:99", 24 * 60 + 161),
        ("1-2", 26 * 60),
        ("1-25", 49 * 60),
        ("1-2:3", 26 * 60 + 3),
        ("1-2:3:4", 26 * 60 + 4),
    ],
)
def test_a_time_is_what_slurm_makes_of_it(written: str, limit: int):
    assert minutes(load(f"warning_seconds: 1\ntime: {written}\n").time) == limit
    assert minutes(load(f"warning_seconds: 1\ntime: '{written}'\n").time) == limit


def test_a_time_in_seconds_and_none():
    assert seconds("1-2:3:4") == ((26 * 60) + 3) * 60 + 4
    assert seconds(90) == 5400
    assert seconds(None) == minutes(None) == 0


@pytest.mark.parametrize(
    "written", ["'5:'", "1:2:3:4", "5m", "1h", "1.5", "-1", "infinite", "true", "1-", "'5 '", "[5]"]
)
def test_a_time_in_none_of_the_forms_of_slurms_manual_is_refused(written: str):
    (told,) = complaints(f"time: {written}\n")
    assert told.startswith("mine.yaml:1:1: time: should be minutes, or one of")


@pytest.mark.parametrize("written", ["0", "0:0:0", "0-0", "367-0"])
def test_no_limit_is_no_time(written: str):  # as which Slurm takes 0
    (told,) = complaints(f"time: {written}\n")
    assert "more than nothing and at most a year" in told


@pytest.mark.parametrize(
    ("written", "given"),
    [("16GB", "16G"), ("800mb", "800M"), ("1T", "1T"), ("100K", "100K"), ("0", "0")],
)
def test_memory_is_given_to_slurm_in_its_own_form(written: str, given: str):
    assert load(f"time: 9\nmemory: {written}\n").parameters("x")["mem"] == given


@pytest.mark.parametrize("written", ["16", "16GiB", "0.5G", "-5G", "0G", "much", "true"])
def test_memory_without_a_unit_or_in_parts_is_refused(written: str):
    (told,) = complaints(f"time: 9\nmemory: {written}\n")
    assert told.startswith("mine.yaml:2:1: memory: should be a whole number with K, M, G or T")


# --- what becomes of it ---------------------------------------------------------------------------


def test_slurm_gets_what_was_written_and_nothing_else():
    settings = load(
        "partition: fast,slow\n"
        "constraint: 'a100&ib'\n"
        "gpus_per_node: 1\n"
        "cpus_per_task: 3\n"
        "memory: 800MB\n"
        "time: 1-0:30\n"
        "warning_seconds: 60\n"
        "setup: [module load cuda, 'export A=\"b c\"']\n"
        "array_parallelism: 4\n"
        "sbatch: {mail_type: 'END,FAIL', exclusive: true, nice: 5, comment: it's $HOME}\n"
    )
    lines = script(settings, "a sweep")
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")}
    assert {o for o in options if not o.startswith(("output", "error"))} == {
        "array=0-8%4",
        "comment='it'\"'\"'s $HOME'",
        "constraint='a100&ib'",
        "cpus-per-task=3",
        "exclusive",
        "gpus-per-node=1",
        "job-name='a sweep'",
        "mail-type=END,FAIL",
        "mem=800M",
        "nice=5",
        "nodes=1",
        "ntasks-per-node=1",
        "open-mode=append",
        "partition=fast,slow",
        "requeue",
        "signal=USR2@60",
        "time=1470",
    }
    start = lines.index("# setup")
    assert lines[start + 1 : start + 3] == ["module load cuda", 'export A="b c"']
    (step,) = (line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpus-per-task=3" in step  # which srun no longer inherits


def test_jobs_run_as_many_at_a_time_as_slurm_likes_unless_told():
    assert "#SBATCH --array=0-8%9" in script(load("time: 9\n"))


def test_a_type_of_gpu_replaces_their_number():
    lines = script(load("time: 9\ngpus_per_node: 1\nsbatch: {gres: 'gpu:a:1,tmp:5'}\n"))
    assert "#SBATCH --gres=gpu:a:1,tmp:5" in lines
    assert not [line for line in lines if "gpus-per-node" in line]  # Slurm would add the two up


def test_a_run_over_several_nodes_has_a_process_for_each_gpu():
    settings = load("time: 9\nnodes: 2\ntasks_per_node: 4\ngpus_per_node: 4\nsharding: fsdp2\n")
    assert (settings.tasks, settings.gpus, settings.cpus) == (8, 8, 8)
    lines = script(settings)
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4"} <= {*lines}


def test_a_pack_works_on_as_many_runs_as_it_has_places():
    packed = "time: 9\nruns_per_job: 20\ncpus_per_task: 8\n"
    assert load(packed).runs_at_once == 8
    assert load(packed + "workers: 4\n").runs_at_once == 4
    assert load(packed + "gpus_per_node: 2\nworkers_per_gpu: 3\n").runs_at_once == 6
    assert load("time: 9\ncpus_per_task: 8\n").runs_at_once == 1


def test_the_cost_is_the_time_limit_of_every_job():
    cost = load("time: 1:30:00\nnodes: 2\ngpus_per_node: 1\ncpus_per_task: 4\n").cost(10)
    assert (cost.jobs, cost.hours, cost.gpu_hours, cost.cpu_hours) == (10, 1.5, 30.0, 120.0)


def test_an_override_lies_over_the_file_and_is_named_in_its_errors():
    text = "time: 9\nsbatch: {nice: 5}\n"
    assert load(text, "sbatch.comment=x", "time=10").sbatch == {"nice": 5, "comment": "x"}
    assert complaints(text, "nodes=2", "runs_per_job=2") == [
        "command line: runs_per_job=2: runs_per_job: 2 runs can't share a job of nodes 2 x "
        "tasks_per_node 1: each needs all its processes"
    ]


def test_later_errors_can_name_the_line_of_a_key():
    Path("mine.yaml").write_text("# a comment\npartition: x\ntime: 9\nsbatch:\n  nice: 5\n")
    found = cluster.load("mine.yaml", ["account=me"])
    assert found.mark("partition") == "mine.yaml:2:1: partition"
    assert found.mark("sbatch.nice") == "mine.yaml:5:3: sbatch.nice"
    assert found.mark("account") == "command line: account=me: account"
    assert found.mark("qos") == "mine.yaml"
    stored = cluster.ClusterFile(found.cluster)
    assert stored.mark("qos") == "the settings of the last submission: qos"


@pytest.mark.parametrize("name", EXAMPLES)
def test_settings_come_back_from_a_submissions_record(name: str):
    first = cluster.load(name).cluster
    stored = json.loads(json.dumps(first.model_dump(mode="json")))
    assert Cluster.model_validate(stored) == first
    assert Cluster.model_validate_json(json.dumps(stored)) == first


def test_a_cluster_file_is_read_without_torch():
    code = (
        "import sys\nfrom sweeps import cluster, snapshot\ncluster.load('slurm-gpu')\n"
        "heavy = {'torch', 'submitit'} & {*sys.modules}\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
