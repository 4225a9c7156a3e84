"""A stand-in for the W&B server, on the loopback: what wandb's own client asks for, and no more.

`wandb.init` online, `wandb sync`, `wandb.Api()` and the reports of wandb-workspaces work against it
unchanged. What they stored are plain objects that a test reads; `fail`, `stop` and `start` make the
server misbehave. What the real one does beyond this (its limits, its pages) can't be tested here.

    with WandbServer(tmp_path) as server:
        subprocess.run([sys.executable, "-c", program], env=server.env, check=True)
        assert server.runs["me", "lab", "r1"].history[0]["val/loss"] == 2

Each client needs a process of its own: wandb reads its environment once.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import quote, unquote

KEY = "canary" + "0123456789abcdef" * 2 + "zz"  # 40 letters, as the client insists
DATE = "2024-01-01T00:00:00Z"
NOTHING: dict[str, Any] = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
VIEWER = dict.fromkeys(("id", "entity", "username", "name"), "me") | {
    "email": "me@example.org", "flags": "{}", "admin": False, "deletedAt": None, "photoUrl": None,
    "apiKeys": NOTHING, "teams": NOTHING}  # fmt: skip
ALWAYS = {"viewer": VIEWER, "serverInfo": {"features": []},
          "entity": {"organization": None, "xxhashDigestsEnabled": False}}  # fmt: skip
Given = dict[str, Any]  # a query's variables, or a reply


@dataclass
class Stored:
    """One run, as the server has it."""

    entity: str
    project: str
    id: str
    number: int
    name: str
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    raw_config: Given = field(default_factory=dict)
    summary: Given = field(default_factory=dict)
    history: list[Given] = field(default_factory=list)
    events: list[Given] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False

    @property
    def config(self) -> Given:
        return {k: v.get("value") for k, v in self.raw_config.items() if k != "_wandb"}

    @property
    def key(self) -> str:
        return base64.b64encode(f"Run:{self.entity}/{self.project}/{self.id}".encode()).decode()

    def node(self) -> Given:
        """Whatever a query asks of a run: clients pass over what they did not ask for."""
        keys = {k: {"typeCounts": [{"type": "number"}]} for row in self.history for k in row}
        last = max((row.get("_step", -1) for row in self.history), default=-1)
        return {
            "id": self.key, "name": self.id, "displayName": self.name, "state": self.state,
            "group": self.group, "jobType": self.job_type, "tags": self.tags, "notes": self.notes,
            "description": self.notes, "config": json.dumps(self.raw_config), "sweepName": None,
            "summaryMetrics": json.dumps(self.summary), "systemMetrics": "{}", "commit": None,
            "readOnly": False, "createdAt": DATE, "heartbeatAt": DATE, "user": VIEWER,
            "historyLineCount": len(self.history), "eventsLineCount": len(self.events),
            "logLineCount": len(self.log), "historyTail": json.dumps(_lines(self.history[-1:])),
            "eventsTail": json.dumps(_lines(self.events[-1:])), "wandbConfig": '{"t":1}',
            "historyKeys": {"keys": keys, "lastStep": last, "sets": []}, "projectId": 1,
            "fileCount": len(self.files), "project": _project(self.entity, self.project),
        }  # fmt: skip


@dataclass
class Artifact:
    id: str
    name: str
    type: str
    digest: str
    run: str
    state: str = "PENDING"
    files: dict[str, bytes] = field(default_factory=dict)  # "" is the manifest


def _lines(rows: list[Given]) -> list[str]:
    return [json.dumps(row) for row in rows]


def _edges(nodes: list[Given]) -> Given:
    return NOTHING | {"edges": [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes)]}


def _project(entity: str, name: str) -> Given:
    return {"__typename": "Project", "id": name, "internalId": "1", "name": name, "user": VIEWER,
            "entityName": entity, "entity": {"id": entity, "name": entity}, "createdAt": DATE,
            "isBenchmark": False, "readOnly": False, "description": "", "access": "PRIVATE",
            "views": "{}", "artifactType": None, "artifact": None}  # fmt: skip


def matches(run: Stored, filters: Given) -> bool:
    """The part of MongoDB's query language that runs are filtered with."""
    return all(_fits(run, key, wanted) for key, wanted in filters.items())


def _fits(run: Stored, key: str, wanted: Any) -> bool:
    if key in ("$and", "$or"):
        return {"$and": all, "$or": any}[key](matches(run, part) for part in wanted)
    have = _value(run, key)
    if not isinstance(wanted, dict):
        return wanted in have if isinstance(have, list) else have == wanted
    operators: dict[str, Callable[[Any], bool]] = {
        "$ne": lambda to: not _fits(run, key, to),
        "$in": lambda to: any(_fits(run, key, one) for one in to),
        "$exists": lambda to: (have is not None) == to,
        "$regex": lambda to: re.search(to, str(have)) is not None,
    }
    return all(operators[name](to) for name, to in wanted.items())


def _value(run: Stored, key: str) -> Any:
    root, _, rest = key.partition(".")
    if root not in ("config", "summary_metrics"):
        ours = {"jobType": "job_type", "display_name": "name", "displayName": "name", "name": "id",
                "created_at": "number", "createdAt": "number"}  # fmt: skip
        return getattr(run, ours.get(key, key))
    value: Any = run.config if root == "config" else run.summary
    for part in [rest] if rest in value else rest.removesuffix(".value").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class WandbServer:
    """The server and what it has. `folder` gets the client's home, caches and staging."""

    def __init__(self, folder: Path, key: str = KEY) -> None:
        self.folder, self.key, self.port = Path(folder), key, 0
        self.runs: dict[tuple[str, str, str], Stored] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.reports: dict[str, Given] = {}
        self.projects: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []  # ("GRAPHQL", operation) or (method, path)
        self.errors: list[str] = []  # mistakes of this stand-in, and questions it can't answer
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._clients: dict[str, str] = {}  # an artifact's id at the client: its id here
        self._faults: list[Given] = []
        self._healed = threading.Event()
        self.listener: _Listener | None = None

    def __enter__(self) -> WandbServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to listen; after `stop` on the same port, with all that was stored."""
        self.listener = _Listener(("127.0.0.1", self.port), self)
        self.port = self.listener.server_address[1]
        serve = self.listener.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """As when the machine goes: the port closes, and so does every open connection."""
        if self.listener is not None:
            self.listener.shutdown()
            self.listener.server_close()
            self.listener = None
        with self.lock:
            connections = list(self.connections)
        for connection in connections:
            _hang_up(connection)
        self._release()

    def fail(self, what: str, how: int | str, times: int | None = None, after: int = 0) -> None:
        """Lets requests fail, all or so many `times`, when `after` of them have passed.

        Args:
            what: "graphql", "graphql:<operation>", "file_stream", "files" or "artifacts".
            how: an HTTP status, "hang" (no answer until `heal` or `stop`) or "close".
        """
        with self.lock:
            self._faults.append({"what": what, "how": how, "times": times, "after": after})

    def heal(self) -> None:
        self._faults.clear()
        self._release()

    def _release(self) -> None:
        with self.lock:
            self._healed.set()
            self._healed = threading.Event()

    def fault(self, names: set[str]) -> tuple[int | str | None, threading.Event]:
        """How a request that goes by these names is to fail, and what a hanging one waits for."""
        for fault in self._faults:
            if fault["what"] not in names or fault["times"] == 0:
                continue
            if fault["after"] > 0:
                fault["after"] -= 1
                continue
            if fault["times"] is not None:
                fault["times"] -= 1
            return fault["how"], self._healed
        return None, self._healed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """This process's environment without its WANDB_ variables, and with a client's."""
        rooms = {"HOME": "home", "WANDB_CONFIG_DIR": "config", "WANDB_CACHE_DIR": "cache",
                 "WANDB_DATA_DIR": "data"}  # fmt: skip
        for name in rooms.values():
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        return kept | {k: str(self.folder / v) for k, v in rooms.items()} | {
            "WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key, "NO_PROXY": "127.0.0.1",
            "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1"}  # fmt: skip

    @property
    def operations(self) -> list[str]:
        """The GraphQL operations asked for, in order."""
        return [what for method, what in self.requests if method == "GRAPHQL"]

    @property
    def viewer_calls(self) -> int:
        return self.operations.count("Viewer")

    # GraphQL: `_on_<field>` answers for the field at a query's root, given the query's variables.

    def answer(self, text: str, given: Given) -> Given:
        found = re.search(r"\{\s*(?:(\w+)\s*:\s*)?(\w+)", text)
        alias, name = found.groups() if found else (None, text)
        method = getattr(self, f"_on_{name}", None)
        if method is None and name not in ALWAYS:
            self.errors.append(f"no answer for {name}")
            return {"errors": [{"message": self.errors[-1]}]}
        return {"data": {alias or name: method(given) if method else ALWAYS[name]}}

    def _run(self, given: Given) -> Stored | None:
        if given.get("id"):
            return next((run for run in self.runs.values() if run.key == given["id"]), None)
        name = given.get("runName") or given.get("run") or given.get("name")
        return self.runs.get((given.get("entity") or "me", given.get("project") or "", str(name)))

    def _at(self, kind: str, owner: str, name: str) -> Given:
        url = f"{self.url}/store/{kind}/{quote(owner, safe='')}/{quote(name)}"
        return {"name": name, "uploadUrl": url, "uploadHeaders": [], "url": url, "directUrl": url}

    def _on_model(self, given: Given) -> Given:
        run = self._run(given)
        if run is not None:
            run.preempting = False  # asked once, by an attempt that begins
        where = _project(given.get("entity") or "me", given.get("project") or "")
        return where | {"bucket": run and run.node()}

    def _on_models(self, given: Given) -> Given:
        entity = given.get("entity") or "me"
        return _edges([_project(*where) for where in sorted(self.projects) if where[0] == entity])

    def _on_project(self, given: Given) -> Given | None:
        """All that is asked of a project: one run with its rows and files, runs, reports."""
        name = given.get("project") or given.get("projectName") or given.get("name") or ""
        where = (given.get("entity") or given.get("entityName") or "me", name)
        if where not in self.projects:
            return None
        runs = [run for run in self.runs.values() if (run.entity, run.project) == where]
        runs = [run for run in runs if matches(run, json.loads(given.get("filters") or "{}"))]
        order = given.get("order") or "+created_at"
        ranks = {run.id: _value(run, order.lstrip("+-")) for run in runs}
        runs.sort(key=lambda run: ranks[run.id] or 0, reverse=order.startswith("-"))
        start, size = int(given.get("cursor") or 0), given.get("perPage") or 50
        page = _edges([run.node() for run in runs[start : start + size]])
        for edge in page["edges"]:
            edge["cursor"] = str(start + int(edge["cursor"]) + 1)
        page["pageInfo"] = {"endCursor": None, "hasNextPage": start + size < len(runs)}
        views = [v for v in self.reports.values() if v["where"] == where
                 and v["type"] == (given.get("viewType") or "runs")
                 and given.get("viewName") in (None, v["name"])]  # fmt: skip
        run = self._run(given)
        return _project(*where) | {"runCount": len(runs), "runs": page, "allViews": _edges(views),
                                   "run": run and run.node() | self._rows(run, given)}  # fmt: skip

    def _rows(self, run: Stored, given: Given) -> Given:
        """A run's history, in each of the forms that it is asked for, and its files."""
        rows, end = run.history, given.get("maxStep", float("inf"))
        rows = [row for row in rows if given.get("minStep", 0) <= row.get("_step", 0) < end]
        samples = []
        for spec in map(json.loads, given.get("specs") or [given.get("spec", '{"keys": []}')]):
            low, high, keys = spec.get("minStep", 0), spec.get("maxStep", end), spec["keys"]
            within = [row for row in rows if low <= row.get("_step", 0) <= high]
            whole = [row for row in within if all(key in row for key in keys)]
            samples.append([{key: row[key] for key in keys} for row in whole])
        like = (given.get("pattern") or "%").replace("%", "*")
        names = given.get("fileNames") or [n for n in run.files if fnmatch.fnmatchcase(n, like)]
        files = [self._at("run", run.key, n) | {"id": n, "mimetype": "", "md5": "",
                 "sizeBytes": len(run.files.get(n, b"")),
                 "updatedAt": DATE if n in run.files else None} for n in names]  # fmt: skip
        return {"history": _lines(rows[: given.get("samples")]), "events": _lines(run.events),
                "sampledHistory": samples, "files": _edges(files),
                "parquetHistory": {"parquetUrls": [], "liveData": rows}}  # fmt: skip

    def _on_upsertBucket(self, given: Given) -> Given:
        run = self._run(given)
        inserted = run is None
        if run is None:
            entity, project = given.get("entity") or "me", given.get("project") or "uncategorized"
            run = Stored(entity, project, given["name"], len(self.runs), given["name"])
            self.runs[entity, project, run.id] = run
            self.projects.add((entity, project))
        if not given.get("id"):  # from a run under way; with an id, a change from elsewhere
            run.state, run.exit_code = given.get("state") or "running", None
        run.raw_config = json.loads(given.get("config") or "null") or run.raw_config
        run.summary = json.loads(given.get("summaryMetrics") or "null") or run.summary
        for names in ("displayName name", "display_name name", "groupName group",
                      "jobType job_type", "notes notes", "tags tags"):  # fmt: skip
            theirs, ours = names.split()
            if given.get(theirs) is not None:
                setattr(run, ours, given[theirs])
        return {"bucket": run.node(), "inserted": inserted}

    def _on_deleteRun(self, given: Given) -> Given:
        self.runs = {k: run for k, run in self.runs.items() if run.key != given["id"]}
        return {"clientMutationId": None}

    def _on_createRunFiles(self, given: Given) -> Given:
        run = self.runs[given["entity"], given["project"], given["run"]]
        files = [self._at("run", run.key, name) for name in given["files"]]
        return {"runID": run.key, "uploadHeaders": [], "files": files}

    def _on_createArtifact(self, given: Given) -> Given:
        it = given["input"]
        name = (it.get("artifactCollectionNames") or [it.get("artifactCollectionName")])[0]
        same = [a for a in self.artifacts.values() if a.name == name and a.state == "COMMITTED"]
        made = Artifact(
            f"a{len(self.artifacts)}", name, it["artifactTypeName"], it["digest"], it["runName"]
        )
        made = next((a for a in same if a.digest == it["digest"]), made)  # what is there, is there
        self.artifacts[made.id] = made
        self._clients[it["clientID"]] = made.id
        sequence = {"id": name, "latestArtifact": {"id": same[-1].id} if same else None}
        return {"artifact": {"id": made.id, "state": made.state, "artifactSequence": sequence}}

    def _on_createArtifactManifest(self, given: Given) -> Given:
        id = given.get("artifactID") or given["artifactManifestID"]
        return {"artifactManifest": {"id": id, "file": self._at("artifact", id, "") | {"id": id}}}

    _on_updateArtifactManifest = _on_createArtifactManifest

    def _on_createArtifactFiles(self, given: Given) -> Given:
        nodes = []
        for it in given["input"]["artifactFiles"]:
            more = {"storagePath": it["name"], "artifact": {"id": it["artifactID"]}}
            nodes.append(self._at("artifact", it["artifactID"], it["name"]) | more)
        return {"files": _edges(nodes)}

    def _on_commitArtifact(self, given: Given) -> Given:
        artifact = self.artifacts[given["artifactID"]]
        artifact.state = "COMMITTED"
        return {"artifact": {"id": artifact.id, "digest": artifact.digest}}

    def _on_clientIDMapping(self, given: Given) -> Given:
        return {"serverID": self._clients[given["clientID"]]}

    def _on_upsertModel(self, given: Given) -> Given:
        where = (given["input"]["entityName"], given["input"]["name"])
        self.projects.add(where)
        return {"project": _project(*where), "model": _project(*where), "inserted": True}

    def _on_view(self, given: Given) -> Given | None:
        return self.reports.get(given["reportId"])

    def _on_upsertView(self, given: Given) -> Given:
        new = base64.b64encode(f"View:{len(self.reports):04}".encode()).decode()
        view = self.reports.setdefault(given.get("id") or new, {"id": new, "user": VIEWER})
        view |= {k: given.get(k) for k in ("type", "name", "displayName", "description", "spec")}
        where = (given["entityName"], given["projectName"])
        view |= {"where": where, "project": _project(*where), "createdAt": DATE, "updatedAt": DATE}
        return {"view": view, "inserted": not given.get("id")}

    def _on_deleteView(self, given: Given) -> Given:
        return {"success": self.reports.pop(given["id"], None) is not None}

    # The rest: a run's rows as they come, and the bytes of files.

    def stream(self, where: tuple[str, str, str], sent: Given) -> None:
        """Puts what a client streams where it says it belongs: sent twice, it is there once."""
        run = self.runs[where]
        kept: dict[str, list[Any]] = {
            "wandb-history.jsonl": run.history, "wandb-events.jsonl": run.events,
            "output.log": run.log, "wandb-summary.json": []}  # fmt: skip
        for name, part in (sent.get("files") or {}).items():
            start, lines = part.get("offset") or 0, part.get("content") or []
            if name != "output.log":  # NaN and Infinity come back from the real server as strings
                lines = [json.loads(line, parse_constant=str) for line in lines]
            kept[name][start : start + len(lines)] = lines
            if name == "wandb-summary.json":
                run.summary = lines[-1]
        run.preempting = bool(sent.get("preempting", run.preempting))
        run.state = "preempting" if run.preempting else "running"
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
            ended = "preempted" if run.preempting else "failed"
            run.state = ended if run.exit_code else "finished"

    def shelf(self, path: str) -> tuple[dict[str, bytes], str]:
        """Where the bytes of an address belong: among whose files, and under which name."""
        _, _, kind, owner, name = path.split("/", 4)
        if kind == "artifact":
            return self.artifacts[unquote(owner)].files, unquote(name)
        run = self._run({"id": unquote(owner)})
        return (run.files if run else {}), unquote(name)


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class _Listener(ThreadingMixIn, TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: WandbServer) -> None:
        super().__init__(address, _Handler)
        self.owner = owner

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away is no mistake
            self.owner.errors.append(repr(error))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: _Listener

    def setup(self) -> None:
        super().setup()
        with self.server.owner.lock:
            self.server.owner.connections.add(self.connection)
        if self.server.owner.listener is not self.server:  # stopped meanwhile
            _hang_up(self.connection)

    def finish(self) -> None:
        with self.server.owner.lock:
            self.server.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        owner, sent = self.server.owner, json.loads(self._body())
        if self.path.startswith("/graphql"):
            text = sent["query"]
            name = sent.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", text)[0]
            names = {"graphql", f"graphql:{name}", "artifacts" if "Artifact" in name else ""}
            failed = self._failed(names, ("GRAPHQL", name))
        else:
            failed = self._failed({"file_stream"}, ("POST", unquote(self.path)))
        if failed:
            return
        wanted = base64.b64encode(f"api:{owner.key}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {wanted}":
            self._reply(401, {"errors": [{"message": "invalid API key"}]})
        elif self.path.startswith("/graphql"):
            with owner.lock:
                reply = owner.answer(text, sent.get("variables") or {})
            self._reply(200, reply)
        else:
            _, _, entity, project, run, _ = unquote(self.path).split("/")
            with owner.lock:
                if known := (entity, project, run) in owner.runs:
                    owner.stream((entity, project, run), sent)
            self._reply(*((200, {"exitcode": None, "limits": {}}) if known else (404, {})))

    def do_PUT(self) -> None:
        body, kind = self._body(), "artifacts" if "/artifact/" in self.path else "files"
        if not self._failed({kind}, ("PUT", unquote(self.path))):
            with self.server.owner.lock:
                files, name = self.server.owner.shelf(self.path)
                files[name] = body
            self._reply(200, {})

    def do_GET(self) -> None:
        if not self._failed({"files"}, ("GET", unquote(self.path))):
            files, name = self.server.owner.shelf(self.path)
            self._reply(200 if name in files else 404, files.get(name, b""))

    def _failed(self, names: set[str], request: tuple[str, str]) -> bool:
        """Notes the request, and fails it if a test has asked for that."""
        with self.server.owner.lock:
            self.server.owner.requests.append(request)
            how, healed = self.server.owner.fault(names)
        if isinstance(how, int):
            self._reply(how, {"errors": [{"message": f"told to fail with {how}"}]})
        elif how is not None:
            if how == "hang":
                healed.wait()
            self.close_connection = True
            _hang_up(self.connection)
        return how is not None

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
