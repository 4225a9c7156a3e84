"""The clock that throughput is read from, and the peak of memory."""

from __future__ import annotations

import sys
import time

import torch


class Clock:
    """Seconds spent on training steps: data, forward, backward, update; not evaluation or saving.

    The rate over a run leaves out the first interval of each start, where caches are cold and
    kernels are compiled.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0
        self.began: float | None = None
        self.last_read = 0.0
        self.warm_tokens, self.warm_seconds = 0, 0.0
        self.cold: float | None = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, seconds: float) -> None:
        if self.began is None:
            self.total = max(self.total, seconds)
            self.last_read = self.last_read or self.total
            self.began = self.now()

    def stop(self) -> None:
        if self.began is not None:
            self.total += self.now() - self.began
            self.began = None

    def read(self) -> float:
        """Training seconds so far, over all attempts."""
        running = self.now() - self.began if self.began is not None else 0.0
        return self.total + running

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now = self.read()
        spent, self.last_read = now - self.last_read, now
        rate = tokens / spent if spent > 0 else 0.0
        if self.cold is None:
            self.cold = rate
        else:
            self.warm_tokens += tokens
            self.warm_seconds += spent
        return rate

    @property
    def overall(self) -> float | None:
        return self.warm_tokens / self.warm_seconds if self.warm_seconds > 0 else self.cold


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it counts them, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
