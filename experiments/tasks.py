"""Tasks by name: lm-eval's own, the shipped ones and a user's; found fast, loaded offline.

    names -> resolve -> leaves and groups   (imports neither lm_eval nor datasets nor torch)
          -> check   -> the data is there, or one line says what is missing
          -> load    -> lm-eval's own Task objects, as its TaskManager would build them

lm-eval parses all of its 14,000 YAML files whenever a TaskManager is made, 7 CPU-seconds. Here
only the keys that name things are read, which is remembered in a small file (0.02 s), and only the
files that are needed are parsed whole. A test compares both for every name there is.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.registry import UserError, did_you_mean
from experiments.record import write_atomically
from experiments.yaml_text import shown

SHIPPED = Path(__file__).resolve().parent / "presets" / "tasks"
REACH_SECONDS = 5.0  # how long the hub may take to answer
FORMATS = ("json", "csv", "parquet", "arrow", "text", "pandas", "xml", "webdataset")
GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
Config = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """`!function module.name` in a YAML file of `folder`; imported when its task is loaded."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Leaf:
    """One scorable task.

    Attributes:
        name: as lm-eval calls it; the key in `load(...)["tasks"]`.
        config: its YAML with includes and a group's changes merged; functions not yet imported.
        path: the YAML file that defines it.
        folder: where its relative data files are looked for first; None: they are not built yet.
    """

    name: str
    config: Config
    path: Path
    folder: Path | None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration, of the Python files beside it that its functions come from,
        and of its local data, wherever all of these lie; a UserError if a data file is missing.
        """
        data = {text: [*map(_hash, files)] for text, (_, files) in (_local(self) or {}).items()}

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return sorted((repr(key), plain(item)) for key, item in value.items())
            if isinstance(value, list):
                return [plain(item) for item in value]
            if isinstance(value, Function):
                file = value.folder / f"{value.name.rpartition('.')[0].replace('.', '/')}.py"
                return value.name, _hash(file) if file.is_file() else None
            return data.get(value, value) if isinstance(value, str) else value

        return hashlib.blake2b(repr(plain(self.config)).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Resolved:
    """What names stand for.

    Attributes:
        leaves: every task below the names, each once, in order.
        groups: name -> names of its direct children (leaves and groups), sub-groups included.
            A tag is no group: it stands for its tasks.
        aggregates: group -> lm-eval's `aggregate_metric_list` of it, empty where it has none.
    """

    leaves: dict[str, Leaf] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    aggregates: dict[str, list[Config]] = field(default_factory=dict)


_glob = functools.partial(glob.glob, recursive=True)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _hash(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
_Loader.add_constructor("!function", lambda x, y: Function(x.construct_scalar(y), x.folder))
_NAMING = re.compile(  # a key that names something, and the lines that belong to it
    rb"""^["']?(?:task|group|tag|class|include)["']?[ \t]*:.*(?:\n(?:[ \t\r#-].*|(?=\n)))*""",
    re.MULTILINE,
)
Index = dict[str, str | list[str]]  # a task's or a group's file, or a tag's tasks


def _read(path: str, naming: bool = False) -> Config:
    """The mapping of a YAML file, its includes' keys and then its own; or only those that name."""
    try:
        with open(path, "rb") as file:
            text = b"\n".join(_NAMING.findall(file.read())) if naming else file.read()
        loader = _Loader(text)
        loader.folder = Path(path).parent
        own = loader.get_single_data() or {}
        if not isinstance(own, dict):
            raise ValueError("should be a mapping (key: value)")
    except OSError as error:
        raise UserError(f"{shown(Path(path))}: can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        why = _line(error).replace('in "<byte string>", ', "at ")
        raise UserError(f"{shown(Path(path))}: not a task's YAML: {why}") from None
    merged: Config = {}
    for include in _listed(own.pop("include", None)):
        beside = os.path.join(os.path.dirname(path), include)  # noqa: PTH118, PTH120
        merged |= _read(os.path.normpath(beside), naming)
        merged.pop("task_list", None)
    return merged | own


def _index(root: Path, official: bool = False) -> Index:
    """Names in a folder or file by lm-eval's rules: the first file of a name has it.

    A user's broken file, or two of one name, are a UserError; `official` ones are left out.
    """
    files = [str(root)] if root.is_file() else _glob(f"{glob.escape(str(root))}/**/*.yaml")
    index: Index = {}
    for path in sorted(files):
        with suppress(*((UserError, RecursionError) if official else ())):
            head = _read(path, naming=official)
            group = "group" in head and "class" not in head
            name = head.get("group" if group else "task")
            if not isinstance(name, str):
                continue
            if (first := index.setdefault(name, path)) != path:
                raise UserError(f"{shown(Path(path))}: the name '{name}' is taken by {first}")
            for tag in [] if group else _listed(head.get("tag")):
                if isinstance(of := index.setdefault(tag, []), list):
                    of.append(name)
    return index


@functools.cache
def official(anew: bool = False) -> Index:
    """lm-eval's index; remembered from one process to the next unless asked for `anew`."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("tasks need lm-eval, which is not installed: pip install lm-eval")
    root = Path(spec.origin).resolve().parent / "tasks"
    key = repr((4, importlib.metadata.version("lm_eval"), str(root), root.stat().st_mtime_ns))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    file = cache / "ceteris" / f"lm-eval-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not anew:
        with suppress(OSError, ValueError):
            return json.loads(file.read_bytes())
    index = _index(root, official=True)
    with suppress(UserError):  # a home that can't be written costs a second in each process
        write_atomically(file, json.dumps(index), durable=False)
    return index


def resolve(
    names: Iterable[str], include_path: Path | None = None, held_out: Path | None = None
) -> Resolved:
    """The tasks and groups behind `names`: tasks, groups, tags, globs over these.

    A name in `include_path` (a folder, searched in depth, or one YAML file) goes before a shipped
    one, that before lm-eval's. `held_out` is where the data of shipped tasks lies; None while it
    is not built yet: such data is then neither checked nor part of a fingerprint.

    Raises:
        UserError: an unknown name, a broken YAML, two of the user's files with one name.
    """
    try:
        return _resolve(list(names), include_path, held_out)
    except RecursionError:
        raise UserError(
            f"tasks: {', '.join(names)}: an include or a group contains itself; look in "
            f"{shown(include_path) if include_path else 'its YAML'}"
        ) from None


def _resolve(names: list[str], include_path: Path | None, held_out: Path | None) -> Resolved:
    own = _index(SHIPPED)
    if include_path is not None:
        if not include_path.exists():
            raise UserError(f"include_path: {shown(include_path)}: no such folder or file")
        own |= _index(include_path)
    try:
        return _Resolver(official() | own, held_out).all(names)
    except UserError:  # lm-eval may have been edited in place since its index was made
        return _Resolver(official(anew=True) | own, held_out).all(names)


class _Resolver:
    """Follows lm-eval's TaskFactory, except that it makes configurations, not objects.

    One difference: where a group lists `{task: other_group, ...}`, lm-eval gives all tasks below
    the other's name, so that only the last is scored (`openllm`). Here they keep their own.
    """

    def __init__(self, index: Index, held_out: Path | None) -> None:
        self.index, self.held_out, self.out = index, held_out, Resolved()

    def all(self, names: list[str]) -> Resolved:
        for name in names:
            matches = [name] if name in self.index else fnmatch.filter(self.index, name)
            if not matches:
                raise self.unknown(name)
            for match in sorted(matches):
                self.build(match, {})
        return self.out

    def unknown(self, name: str, where: str = "") -> UserError:
        hint = did_you_mean(name, difflib.get_close_matches(name, self.index, n=1))
        places = f"the {len(self.index):,} names of lm-eval, Ceteris and include_path"
        return UserError(f"{where}unknown task '{name}'{hint.partition(' (')[0]} (of {places})")

    def build(self, name: str, changes: Config) -> list[str]:
        """Adds what a name of the index stands for; the names of the leaves or of the group."""
        place = self.index[name]
        if isinstance(place, list):
            return [leaf for task in sorted(place) for leaf in self.build(task, changes)]
        config = _read(place)
        if config.get("group") == name and "class" not in config:
            return [self.group(name, config, changes, Path(place))]
        if config.get("task") != name:
            raise self.unknown(name)
        return [self.leaf(config | changes, Path(place))]

    def leaf(self, config: Config, path: Path) -> str:
        name = config["task"]
        if config.get("doc_to_image") or config.get("doc_to_audio"):
            raise UserError(f"task '{name}' shows images or sound, and the model reads text only")
        if config.get("unsafe_code"):
            raise UserError(f"task '{name}' runs the code that the model writes; left undone here")
        config = {k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}
        metadata = config.get("metadata", {})
        config["metadata"] = metadata if isinstance(metadata, dict) else {"_metadata": metadata}
        leaf = Leaf(name, config, path, self.held_out if path.parent == SHIPPED else path.parent)
        if (known := self.out.leaves.setdefault(name, leaf)) != leaf:
            raise UserError(
                f"task '{name}' is asked for in two forms, of {shown(known.path)} and of "
                f"{shown(path)}, or as a group changes it and as it is; leave one of them out"
            )
        return name

    def group(self, name: str, config: Config, changes: Config, path: Path) -> str:
        changes = {k: v for k, v in config.items() if k not in GROUP_KEYS} | changes
        items = config["task"] if isinstance(config.get("task"), list) else []
        self.out.groups[name] = [*dict.fromkeys(self.members(items, name, changes, path))]
        self.out.aggregates[name] = _listed(config.get("aggregate_metric_list"))
        return name

    def members(self, items: list[Any], group: str, changes: Config, path: Path) -> Iterator[str]:
        for item in items:
            item = item if isinstance(item, dict) else {"task": item}
            name = str(item.get("group", item.get("task")))
            merged = {k: v for k, v in (changes | item).items() if k not in ("task", "group")}
            if name in self.index:
                yield from self.build(name, merged)
            elif "group" in item:
                yield self.group(f"{group}::{name}", item, changes, path)
            elif {"dataset_path", "custom_dataset", "class"} & merged.keys():
                yield self.leaf({**merged, "task": f"{group}::{name}"}, path)
            else:
                raise self.unknown(name, f"{shown(path)}: ")


def _local(leaf: Leaf) -> dict[str, tuple[str, list[Path]]] | None:
    """Each path or pattern of a leaf's local data: its absolute form, and the files there.

    None where the data is not local, nothing where it is still to be built.
    """
    dataset, kwargs = leaf.config.get("dataset_path") or "?", leaf.config.get("dataset_kwargs")
    folder = leaf.folder or Path()
    texts = [dataset]
    if dataset in FORMATS:
        named = (kwargs or {}).get("data_dir") or (kwargs or {}).get("data_files")
        groups = named.values() if isinstance(named, dict) else [named]
        texts = [text for group in groups for text in _listed(group)]
        if any("://" in text for text in texts):
            return None
    elif not (dataset.startswith((".", "/", "~")) or (folder / dataset).is_dir()):
        return None
    local: dict[str, tuple[str, list[Path]]] = {}
    for text in texts if leaf.folder else []:
        for place in (str(folder / Path(text).expanduser()), str(Path.cwd() / text)):
            below = [found for each in (place, f"{place}/**") for found in sorted(_glob(each))]
            if files := [path for path in map(Path, below) if path.is_file()]:
                local[text] = (place, files)
                break
        else:
            raise UserError(
                f"task '{leaf.name}': no file {shown(folder / text)} (named in {shown(leaf.path)})"
            )
    return local


def check(resolved: Resolved) -> None:
    """Sees to it that every leaf's data is there, before hours of training rely on it.

    Local files exist; a hub's dataset is in the local cache, or the hub answers for it (one try
    per dataset, at most a few seconds; none with HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1).
    What a task's own Python code loads, or files at an address, can't be foreseen.

    Raises:
        UserError: one line: the task, what it needs, what to do.
    """
    answered: set[str] = set()
    for leaf in resolved.leaves.values():
        _reach(leaf, answered)


def fetch(resolved: Resolved) -> None:
    """`check`, and builds each task, raising what `load` raises; its data is there afterwards.

    Only what a run's own text has yet to be made into is left out.
    """
    check(resolved)
    for leaf in resolved.leaves.values():
        if leaf.folder is not None:
            _task(leaf)


def _reach(leaf: Leaf, answered: set[str]) -> None:
    """Asks the hub for a leaf's dataset, once, unless it is local or was prepared before."""
    dataset, kwargs = leaf.config.get("dataset_path"), leaf.config.get("dataset_kwargs") or {}
    others = leaf.config.get("class") or leaf.config.get("custom_dataset")
    if _local(leaf) is not None or others or not dataset or dataset in (*FORMATS, *answered):
        return
    from huggingface_hub import HfApi, constants

    answered.add(dataset)
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    owner, _, name = dataset.rpartition("/")
    snake = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    subset = glob.escape(leaf.config.get("dataset_name") or "")
    subset += "*" if not subset or {*kwargs} - {"trust_remote_code"} else ""
    folder = glob.escape(f"{owner}___{snake}" if owner else snake)
    if any(cache.expanduser().glob(f"{folder}/{subset}/*/*/dataset_info.json")):
        return
    try:
        if os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            raise ConnectionError("HF_DATASETS_OFFLINE is set")
        HfApi().dataset_info(dataset, timeout=REACH_SECONDS)
    except Exception as error:
        why = f"the hub can't be reached ({_line(error)})"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            why = f"the hub does not give it (HTTP {status}: unknown, or it needs an HF_TOKEN)"
        raise UserError(
            f"task '{leaf.name}' needs the dataset '{dataset}', which is not in the cache "
            f"(HF_HOME={constants.HF_HOME}), and {why}; run the same where there is a network "
            "first, or copy its HF_HOME here"
        ) from error


def load(
    resolved: Resolved, names: Iterable[str] | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """lm-eval's TaskDict of `names` among the leaves, each on its own; of all when None.

    `num_fewshot` as lm-eval's `simple_evaluate` takes it: it overrides the task's own unless that
    is 0; a task with neither gets 0. The sampler's seed is lm-eval's default, 1234. Local and
    cached data are loaded with the network switched off.

    Raises:
        UserError: one line naming the task: its data, a split, a column, a package is missing.
    """
    tasks = {name: _task(resolved.leaves[name]) for name in names or resolved.leaves}
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        shots = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return {"tasks": tasks, "groups": {}, "group_map": {}}


def _task(leaf: Leaf) -> Any:
    """The leaf as lm-eval's Task; with the network only where it can't be had without."""
    if leaf.folder is None:
        raise UserError(f"task '{leaf.name}': its data is made from an experiment's own, first")
    try:
        with offline():
            return _built(leaf)
    except UserError:
        if _local(leaf) is not None:
            raise
    _reach(leaf, set())
    return _built(leaf)


def _built(leaf: Leaf) -> Any:
    """The leaf as lm-eval makes it; an error that this raises or logs is one line."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import Entry, Kind
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    local = _local(leaf) or {}

    def live(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: live(item) for key, item in value.items()}
        if isinstance(value, list):
            return [live(item) for item in value]
        if isinstance(value, Function):
            return _import_func_in_yml(value.name, value.folder)
        return local[value][0] if isinstance(value, str) and value in local else value

    task: Any = ConfigurableTask.__new__(ConfigurableTask)  # so that half a one can be asked why
    errors: list[str] = []
    try:
        with quiet() as errors:
            config = live(leaf.config)
            config["metadata"]["config_source"] = str(leaf.path)
            if "class" in config:
                entry = Entry(leaf.name, Kind.PY_TASK, None, config)
                task = TaskFactory().build(entry, registry={})
            else:
                task.__init__(config=config)
                if None in task._aggregation_list.values():  # found out after scoring, else
                    raise ValueError("metric_list: no such aggregation")
        if errors:  # lm-eval goes on with choices that are no list, and without a metric
            raise ValueError(errors[0])
    except Exception as error:
        why = _why(error, leaf, task, errors)
        raise UserError(f"task '{leaf.name}': {why} (in {shown(leaf.path)})") from error
    return task


def _why(error: BaseException, leaf: Leaf, task: Any, errors: Iterable[str] = ()) -> str:
    """What is wrong, by the exception, the errors that were logged and what there is of a task."""
    if type(error).__name__ == "UndefinedError":
        columns = ", ".join(getattr(task, "features", None) or ["unknown"])
        return f"a template names what its data has not: {_line(error)} (columns: {columns})"
    for file in [file for _, files in (_local(leaf) or {}).values() for file in files]:
        if damage := _damage(file):
            return damage
    data = getattr(task, "dataset", None)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = leaf.config.get(key)
        if isinstance(data, dict) and split is not None:
            if split not in data:
                return f"its data has no split '{split}' ({key}), only {', '.join(data)}"
            if not len(data[split]):
                return f"its split '{split}' ({key}) is empty"
    while error.__cause__ is not None:  # datasets' own message says little
        error = error.__cause__
    return next(iter(errors), f"{type(error).__name__}: {_line(error)}")


def _damage(file: Path) -> str | None:
    """The first line of a JSONL file that is not JSON, which datasets does not name."""
    lines = file.read_bytes().splitlines() if file.suffix == ".jsonl" else [b"{}"]
    if not any(lines):
        return f"{shown(file)} is empty"
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.strip() or b"{}")
        except ValueError as error:
            return f"{shown(file)}:{number}: not JSON: {error}"
    return None


@contextmanager
def explained(leaf: Leaf, task: Any = None) -> Iterator[None]:
    """Around what runs a task: a template that asks for what an item has not is one UserError."""
    from jinja2 import UndefinedError

    try:
        yield
    except UndefinedError as error:
        why = _why(error, leaf, task)
        raise UserError(f"task '{leaf.name}': {why} (in {shown(leaf.path)})") from error


@contextmanager
def _changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, attributes (of what, name, value) are other ones."""
    before = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    try:
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


@contextmanager
def fast_templates() -> Iterator[None]:
    """Inside, lm-eval compiles each Jinja template once instead of once for each document."""
    from lm_eval.utils import env

    with _changed((env, "from_string", functools.lru_cache(maxsize=4096)(env.from_string))):
        yield


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Inside, no log, warning or bar of lm-eval reaches a terminal; yields what errors it logs."""
    import lm_eval.api.task
    from tqdm import tqdm

    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    changes: list[tuple[Any, str, Any]] = [(each, "handlers", [handler]) for each in loggers]
    changes += [(each, "propagate", False) for each in loggers]
    changes += [(lm_eval.api.task, "tqdm", functools.partial(tqdm, disable=True))]
    with _changed(*changes), warnings.catch_warnings(action="ignore"):
        yield errors


@contextmanager
def offline() -> Iterator[None]:
    """Inside, datasets, evaluate and huggingface_hub do without the network."""
    import datasets.config
    import huggingface_hub.constants

    changes = [
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ]
    fresh = "evaluate" not in sys.modules and "HF_EVALUATE_OFFLINE" not in os.environ
    if fresh:  # a metric may import it now (3 s), and then it reads this
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
    elif "evaluate" in sys.modules:
        changes.append((sys.modules["evaluate"].config, "HF_EVALUATE_OFFLINE", True))
    try:
        with _changed(*changes):
            yield
    finally:
        if fresh:
            del os.environ["HF_EVALUATE_OFFLINE"]
            if "evaluate" in sys.modules:
                sys.modules["evaluate"].config.HF_EVALUATE_OFFLINE = False
