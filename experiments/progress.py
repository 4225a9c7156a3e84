"""How far a run is: a bar on a terminal, a plain line now and then in a log, and a heartbeat."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Literal

from experiments.record import Run, UserError

LINE_SECONDS = 10.0
BEAT_SECONDS = 1.0
PULSE_SECONDS = 30.0  # the longest silence while training goes on


class Progress:
    """Shows the run's progress and refreshes its running.json.

    Args:
        style: `bar` for one run on a terminal, `log` for lines, `none` for silence.
        run: None for a process that shows nothing and has no heartbeat: another one does.
    """

    def __init__(self, style: Literal["bar", "log", "none"], run: Run | None) -> None:
        self.style = style if style != "bar" or sys.stderr.isatty() else "log"
        self.run, self.bar = run, None  # type: Run | None, Any
        self.began = time.time()
        self.line_at = self.beat_at = 0.0
        self.speed: float | None = None
        self.known: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self.beat()  # the first step may take minutes to compile
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.run is not None:
            with contextlib.suppress(OSError):
                (self.run / "running.json").unlink()

    def say(self, text: str) -> None:
        """A line for whoever looks on."""
        if self.style == "none":
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def beat(self, **news: Any) -> None:
        """Refreshes running.json with what is new, if anything."""
        self.beat_at = time.monotonic()
        self.known |= news
        if self.run is not None:
            with contextlib.suppress(UserError):
                self.run.heartbeat(started=self.began, **self.known)

    def pulse(self, **news: Any) -> None:
        """A heartbeat where the last one was long ago; costs a look at the clock."""
        if time.monotonic() - self.beat_at >= PULSE_SECONDS:
            self.beat(**news)

    def show(
        self, step: int, steps: int, tokens: int, last: dict[str, Any], speed: float | None
    ) -> None:
        """The state after `step` of `steps`, each of `tokens` tokens."""
        self.speed = speed or self.speed
        left = (steps - step) * tokens / self.speed if self.speed else None
        now = time.monotonic()
        news = {"step": step, "steps": steps, "tokens": step * tokens, **last}
        news |= {"tokens_per_s": self.speed, "seconds_left": left}
        if now - self.beat_at >= BEAT_SECONDS or "step" not in self.known:
            self.beat(**news)
        if self.style == "none":
            return
        losses: dict[str, str] = {
            k: f"{last[k]:.4f}" for k in ("train/loss", "val/loss") if k in last
        }
        if self.style == "bar":
            self.draw(step, steps, {**losses, "tokens/s": f"{self.speed or 0:,.0f}"})
        elif now - self.line_at >= LINE_SECONDS:
            self.line_at = now
            words = "  ".join(f"{k} {v}" for k, v in losses.items())
            rate = f"  {self.speed:,.0f} tokens/s" if self.speed else ""
            wait = f"  {left:.0f} s left" if left else ""
            self.say(f"step {step}/{steps}  {words}{rate}{wait}")

    def draw(self, step: int, steps: int, words: dict[str, str]) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
        self.bar.n = step
        self.bar.set_postfix(words)

    def done(self, result: dict[str, Any]) -> None:
        """The last line."""
        if self.style == "log" and result["status"] == "done":
            words = "  ".join(f"{k} {result[k]:.4f}" for k in ("train/loss", "val/loss"))
            self.say(f"step {result['step']}/{result['step']}  {words}  {result['seconds']:.0f} s")
