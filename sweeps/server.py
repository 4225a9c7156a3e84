"""The process that starts runs: torch loaded once, then one fork for each run.

    sweeps/local.py ─ Server ═ socket, one JSON line a message ═ serve ─ fork ─ worker.py, one run

    to `serve`    {"do": "start", "job": {…}, "threads", "device"}   {"do": "signal", "number"}
    from it       {"said": "ready"}   {"said": "started", "id", "pid"}
                  {"said": "ended", "id", "code"} (negative: by that signal)

Importing torch takes seconds and forking milliseconds, and a run that crashes, exits or is killed
takes nobody with it. The process never trains: no thread, device or lock of it is inherited.
It lives in a session of its own, so that Ctrl-C in the terminal reaches only the scheduler. When
the scheduler goes, however it goes, the socket closes: the runs save a checkpoint and end. When
this process itself is killed, Linux sends the runs the same signal (worker.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from components.registry import UserError
from sweeps.manifest import Job
from sweeps.worker import CAUGHT, Settings, cause, work

ROOT = Path(__file__).parent.parent


class Lines:
    """JSON messages over a socket, one a line."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.rest = channel, b""

    def send(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the other end is closed."""
        try:
            data = self.channel.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in whole]


class Server:
    """The forking process (`serve`) and the socket to it; leaving it stops its runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __enter__(self) -> Server:
        ours, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        # The same modules as here, found in the same places; -c, so that no script's folder is.
        code = (
            "import sys\n"
            f"sys.path[:] = {[str(ROOT), *sys.path]!r}; sys.argv[:] = {sys.argv!r}\n"
            "from sweeps import server\nfrom sweeps.worker import Settings\n"
            f"server.serve({theirs.fileno()}, {self.settings!r})"
        )
        # One thread until a run says otherwise: thread pools do not survive a fork.
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            # torch asks NVML, not CUDA, for devices: CUDA begun before a fork fails after it
            env={**os.environ, **single, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            preexec_fn=ignore_warnings,
        )
        theirs.close()
        self.lines = Lines(ours)
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.channel.close()
        self.process.wait()
        self.errors.close()

    def send(self, **message: Any) -> None:
        self.lines.send(**message)

    def signal(self, number: int) -> None:
        self.send(do="signal", number=number)

    def messages(self, seconds: float) -> list[dict[str, Any]]:
        """What it said, waiting for at most that long.

        Raises:
            UserError: it has ended, which it never does by itself.
        """
        self.lines.channel.settimeout(seconds)
        try:
            messages = self.lines.receive()
        except TimeoutError:
            return []
        finally:
            self.lines.channel.settimeout(None)
        if messages is None:
            code = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            why = cause(code) if code < 0 else said or f"code {code}"
            raise UserError(f"the process that starts runs has ended ({why}); run the same again")
        return messages


def ignore_warnings() -> None:
    """Slurm sends its warning to every process of a job; the scheduler alone acts on it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


# --- in the forking process ---------------------------------------------------------------------


def serve(descriptor: int, settings: Settings) -> None:
    """Forks runs as told until the scheduler's end of the socket closes, then ends them all."""
    channel = socket.socket(fileno=descriptor)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    for number in CAUGHT:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for name in settings.preload:
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays shared between the runs' processes
    children: dict[int, str] = {}
    lines = Lines(channel)
    lines.send(said="ready")
    listening = True
    while listening or children:
        watched: list[Any] = [channel, woken] if listening else [woken]
        ready, _, _ = select.select(watched, [], [], None)
        if woken in ready:
            caught = os.read(woken, 4096)
            for pid, code in ended(children):
                lines.send(said="ended", id=children.pop(pid), code=code)
            if signal.SIGTERM in caught:
                stop(children, signal.SIGTERM)
                listening = False
        if channel in ready and listening:
            messages = lines.receive()
            listening = messages is not None
            if messages is None:
                stop(children, signal.SIGTERM)
            for message in messages or ():
                if message["do"] == "signal":
                    stop(children, message["number"])
                    continue
                job = Job(**message["job"])
                # Held back until the child has its own way with it: else it would be lost there.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                server, pid = os.getpid(), os.fork()
                if pid == 0:
                    channel.close()
                    work(job, settings, message["threads"], message["device"], server)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                children[pid] = job.id
                lines.send(said="started", id=job.id, pid=pid)


def ended(children: dict[int, str]) -> list[tuple[int, int]]:
    """(pid, exit code) of the children that have ended since the last call."""
    found = []
    for pid in children:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def stop(children: dict[int, str], number: int) -> None:
    for pid in children:  # none is reaped yet, so no number has passed to another process
        os.kill(pid, number)
