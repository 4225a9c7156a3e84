"""How far a run is: a bar on a terminal, a plain line now and then in a log, and a heartbeat."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Literal

from experiments.record import Run, UserError

LINE_SECONDS = 10.0
BEAT_SECONDS = 1.0


class Progress:
    """Shows the run's progress and refreshes its running.json.

    Args:
        style: `bar` for one run on a terminal, `log` for lines, `none` for silence.
    """

    def __init__(self, style: Literal["bar", "log", "none"], run: Run) -> None:
        self.style = style if style != "bar" or sys.stderr.isatty() else "log"
        self.run, self.bar = run, None  # type: Run, Any
        self.began = time.time()
        self.line_at = self.beat_at = 0.0
        self.speed: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
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

    def show(
        self, step: int, steps: int, tokens: int, last: dict[str, Any], speed: float | None
    ) -> None:
        """The state after `step` of `steps`, each of `tokens` tokens."""
        self.speed = speed or self.speed
        left = (steps - step) * tokens / self.speed if self.speed else None
        now = time.monotonic()
        if now - self.beat_at >= BEAT_SECONDS:
            self.beat_at = now
            with contextlib.suppress(UserError):
                self.run.heartbeat(
                    started=self.began, step=step, steps=steps, tokens=step * tokens,
                    tokens_per_s=self.speed, seconds_left=left, **last,
                )  # fmt: skip
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
