"""Training: one run from its first batch, or its newest checkpoint, to its result.

What a run does depends on its experiment and seed alone: `batch(step)` is a pure function, dropout
is seeded by step, the learning rate is a function of the step, and whatever else the loop carries
is in the checkpoint. A run killed at any moment and started again therefore writes the same
weights and the same metrics.jsonl, byte for byte, on a CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from components.decoder import Decoder, count
from components.functional import linear_cross_entropy
from components.objective import CrossEntropy
from experiments import checkpoint
from experiments.clock import Clock, peak_memory
from experiments.data import Dataset, prepare
from experiments.loader import run_id
from experiments.model import build, weights
from experiments.progress import Progress
from experiments.record import (
    SCHEMA,
    Interrupted,
    Run,
    UserError,
    append_rows,
    read_json,
    truncate,
    write_json,
)
from experiments.schema import Experiment
from experiments.start import (
    begin,
    check_directory,
    micro_batch,
    start_accelerator,
    stop_signals,
    world,
)


class LanguageModel(nn.Module):
    """Decoder and objective as one module, so that autocast, DDP and compile see the whole step."""

    def __init__(self, decoder: Decoder, objective: CrossEntropy) -> None:
        super().__init__()
        self.decoder, self.objective = decoder, objective

    def forward(self, windows: Tensor) -> Tensor:
        """`(B, T+1)` tokens -> the sum of the objective over B x T targets."""
        hidden = self.decoder(windows[:, :-1]).flatten(0, 1)
        return self.objective(hidden, self.decoder.output_weight, windows[:, 1:].flatten())


def train(
    experiment: Experiment,
    seed: int,
    root: Path,
    *,
    progress: Literal["bar", "log", "none"] = "log",
) -> dict[str, Any]:
    """Runs, or goes on with, the run of this experiment and seed; returns its result.

    Raises:
        UserError: the data or the run directory does not allow it, or the disk is full.
        Interrupted: a signal came; the checkpoint of the last step is on disk.
    """
    run = Run(root, run_id(experiment, seed))
    check_directory(run, experiment)
    if (run / "result.json").exists():
        return read_json(run / "result.json")
    with stop_signals() as stop:
        accelerator = start_accelerator(experiment)
        data = prepare(experiment.data, root / "data", progress=progress == "bar")
        t = experiment.training  # what the data can't give is said before anything is written
        data.batch(0, seed=seed, seq_len=t.seq_len, global_batch_size=t.global_batch_size)
        data.validation(experiment.evaluation.tokens, t.seq_len)
        main = accelerator.is_main_process
        with contextlib.ExitStack() as stack:
            refused: UserError | None = None
            if main:
                try:
                    stack.enter_context(run.lock())
                    if not (run / "result.json").exists():  # another process was quicker
                        begin(run, experiment, seed, data, accelerator)
                except UserError as error:
                    refused = error
            (refused,) = broadcast_object_list([refused]) if world(accelerator) > 1 else (refused,)
            if refused is not None:
                raise refused
            if (run / "result.json").exists():
                return read_json(run / "result.json")
            if not main or progress == "none":
                progress_line = Progress("none", run)
            else:
                progress_line = stack.enter_context(Progress(progress, run))
            return Training(experiment, seed, run, data, accelerator, progress_line).run_all(stop)


class Training:
    """The state of one run in training and the loop over its steps."""

    def __init__(
        self,
        experiment: Experiment,
        seed: int,
        run: Run,
        data: Dataset,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.experiment, self.seed, self.run, self.data = experiment, seed, run, data
        self.accelerator, self.progress = accelerator, progress
        t = experiment.training
        self.steps, self.tokens_per_step = t.steps, t.tokens_per_step
        self.share = t.global_batch_size // world(accelerator)
        self.micro = micro_batch(experiment, self.share)
        every = experiment.evaluation.every_tokens
        self.eval_steps = max(1, round(every / self.tokens_per_step)) if every else None
        self.windows, self.target_bytes = data.validation(experiment.evaluation.tokens, t.seq_len)

        m = experiment.model
        self.dims = experiment.dims(data.vocab_size)
        self.counts = count(self.dims, m.specs, m.tie_embeddings, t.seq_len)
        decoder = build(experiment, data.vocab_size, seed).to(accelerator.device)
        optimizer = t.optimizer.build().build(decoder, t.lr)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        model = LanguageModel(decoder, t.objective.build())
        if experiment.execution.compile:
            model.compile()
        self.decoder = decoder
        self.schedule = t.schedule.build()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

        # What the loop carries from step to step; all of it is in the checkpoint.
        self.step = 0
        self.seconds = 0.0
        self.interval = torch.zeros((), dtype=torch.float64, device=self.metric_device)
        self.interval_steps = 0
        self.first_bad = torch.full(
            (), self.steps + 1, dtype=torch.int64, device=accelerator.device
        )
        self.best: float | None = None
        self.evaluated: int | None = None  # the step of the last evaluation
        self.last: dict[str, Any] = {}
        self.clock = Clock(accelerator.device)

    @property
    def metric_device(self) -> torch.device:
        device = self.accelerator.device
        return torch.device("cpu") if device.type == "mps" else device  # it has no float64

    def run_all(self, stop: list[int]) -> dict[str, Any]:
        """Every step from the newest checkpoint to the end."""
        self.resume()
        if self.step == 0 and self.eval_steps:
            self.evaluate()  # the beginning of the curve
        self.clock.start(self.seconds)
        saved_at = time.monotonic()
        while self.step < self.steps:
            lr, norm = self.train_step()
            if self.due(self.experiment.execution.log_every):
                self.log(lr, norm)
            elif not self.boundary:
                continue
            if self.diverged:
                return self.finish("diverged")
            if self.eval_steps and self.due(self.eval_steps):
                self.clock.stop()
                self.evaluate()
                self.clock.start(self.seconds)
            elapsed = time.monotonic() - saved_at
            late = elapsed >= 60 * self.experiment.execution.checkpoint_minutes
            stopped, late = self.agree(bool(stop), late)
            if (stopped or late) and self.step < self.steps:
                self.clock.stop()
                self.save()
                if stopped:
                    raise Interrupted(stop[0] if stop else signal.SIGTERM)
                saved_at = time.monotonic()
                self.clock.start(self.seconds)
        if self.evaluated != self.step:
            self.clock.stop()
            self.evaluate()
        return self.finish("diverged" if self.diverged else "done")

    def train_step(self) -> tuple[float, Tensor]:
        """One optimizer step on one global batch; returns its learning rate and gradient norm."""
        t, accelerator = self.experiment.training, self.accelerator
        factor = self.schedule.factor(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(key(self.seed, self.step, accelerator.process_index))  # dropout
        windows = self.data.batch(
            self.step, seed=self.seed, seq_len=t.seq_len, global_batch_size=t.global_batch_size
        )
        first = accelerator.process_index * self.share
        mine = torch.from_numpy(windows[first : first + self.share]).to(accelerator.device)
        # The mean over the global batch's targets. DDP averages gradients over processes, so each
        # process's part counts as many times as there are processes.
        total = torch.zeros((), device=accelerator.device)
        scale = world(accelerator) / t.tokens_per_step
        pieces = mine.split(self.micro)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.model(piece) * scale
                accelerator.backward(loss)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), t.grad_clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # fp16's scaler skips steps whose gradients overflow: only a loss tells divergence there.
        healthy = torch.isfinite(total)
        if t.precision != "fp16":
            healthy &= torch.isfinite(norm)
        self.step += 1
        self.first_bad = torch.where(healthy, self.first_bad, self.first_bad.clamp(max=self.step))
        self.interval += total.to(self.interval)
        self.interval_steps += 1
        return float(self.optimizer.param_groups[0]["lr"]), norm

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    @property
    def boundary(self) -> bool:
        """Whether to look up from the work: each step where it is free, else at log rows."""
        return self.accelerator.device.type == "cpu" and world(self.accelerator) == 1

    @property
    def diverged(self) -> bool:
        """Whether a loss or a gradient was not finite, on any process."""
        worst = self.first_bad
        if world(self.accelerator) > 1:
            worst = -self.accelerator.gather(-worst.reshape(1)).max()
        self.bad_step = int(worst)
        return self.bad_step <= self.steps or not bool(torch.isfinite(self.interval))

    def agree(self, *flags: bool) -> list[bool]:
        """The same decision on every process: true where it is true on any."""
        if world(self.accelerator) == 1:
            return list(flags)
        mine = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        return [bool(f) for f in self.accelerator.reduce(mine, "sum")]

    def log(self, lr: float, norm: Tensor) -> None:
        """A row of metrics: the mean loss since the last row, and this step's gradient norm."""
        interval = self.interval
        if world(self.accelerator) > 1:
            interval = self.accelerator.reduce(interval, "mean")
        self.seconds = self.clock.read()
        loss = float(interval) / self.interval_steps
        row = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        speed = self.clock.rate(self.interval_steps * self.tokens_per_step)
        self.interval = torch.zeros_like(self.interval)
        self.interval_steps = 0
        finite = {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": float(norm)}
        self.last.update({k: v for k, v in finite.items() if v - v == 0.0})  # not nan, not inf
        if not self.accelerator.is_main_process:
            return
        append_rows(self.run / "metrics.jsonl", {**row, **{k: self.last.get(k) for k in finite}})
        timing = {**row, "seconds": self.seconds, "perf/tokens_per_s": speed}
        append_rows(self.run / "timing.jsonl", timing)
        self.progress.show(self.step, self.steps, self.tokens_per_step, self.last, speed)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss over the fixed validation tokens, in nats per token and bits per byte of text."""
        accelerator, decoder = self.accelerator, self.decoder
        decoder.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.metric_device)
        mine = torch.from_numpy(self.windows)[accelerator.process_index :: world(accelerator)]
        for piece in mine.split(self.micro):
            tokens = piece.to(accelerator.device)
            with accelerator.autocast():
                hidden = decoder(tokens[:, :-1]).flatten(0, 1)
                nats = linear_cross_entropy(
                    hidden, decoder.output_weight, None, tokens[:, 1:].flatten()
                )
            total += nats.to(total)
        decoder.train()
        if world(accelerator) > 1:
            total = accelerator.reduce(total, "sum")
        targets = self.windows.shape[0] * (self.windows.shape[1] - 1)
        loss = float(total) / targets
        bpb = float(total) / self.target_bytes / math.log(2)
        if loss - loss != 0.0:
            self.first_bad = self.first_bad.clamp(max=self.step)
            return
        self.best = loss if self.best is None else min(self.best, loss)
        self.evaluated = self.step
        self.last.update({"val/loss": loss, "val/bpb": bpb})
        if accelerator.is_main_process:
            row: dict[str, Any] = {"step": self.step, "tokens": self.step * self.tokens_per_step}
            row |= {"val/loss": loss, "val/bpb": bpb}
            append_rows(self.run / "metrics.jsonl", row)
            self.progress.show(self.step, self.steps, self.tokens_per_step, self.last, None)

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint; the records' sizes in it say what a resumed run must cut off."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        checkpoint.save(
            self.run / "checkpoints",
            weights(self.decoder),
            {
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            {
                "schema": SCHEMA,
                "step": self.step,
                "seconds": self.seconds,
                "interval": float(self.interval),
                "interval_steps": self.interval_steps,
                "best": self.best,
                "evaluated": self.evaluated,
                "last": self.last,
                "sizes": {n: size(self.run / n) for n in ("metrics.jsonl", "timing.jsonl")},
            },
        )

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, or begins; cuts what was recorded after it."""
        found = checkpoint.newest(self.run / "checkpoints", self.progress.say)
        sizes = {"metrics.jsonl": 0, "timing.jsonl": 0}
        if found is not None:
            path, state = found
            self.decoder.load_state_dict(checkpoint.load_weights(path))
            saved = checkpoint.load_optimizer(path)
            self.optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.interval += state["interval"]
            self.interval_steps = state["interval_steps"]
            self.best, self.last, sizes = state["best"], state["last"], state["sizes"]
            self.evaluated = state["evaluated"]
            self.progress.say(f"going on from step {self.step} of {self.steps}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name, length in sizes.items():
                truncate(self.run / name, length)

    def finish(self, status: Literal["done", "diverged"]) -> dict[str, Any]:
        """The last checkpoint, if its weights are worth keeping, and after it the result."""
        self.clock.stop()
        if status == "done":
            self.save()
        bad = self.bad_step if status == "diverged" else None
        result = {
            "schema": SCHEMA,
            "id": self.run.id,
            "status": status,
            "reason": f"non-finite loss or gradient at step {bad}" if bad is not None else None,
            "diverged_step": bad,
            "seed": self.seed,
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "train/loss": self.last.get("train/loss"),
            "val/loss": self.last.get("val/loss") if status == "done" else None,
            "val/bpb": self.last.get("val/bpb") if status == "done" else None,
            "best/val/loss": self.best,
            "parameters": self.counts.parameters,
            "parameters_non_embedding": self.counts.non_embedding,
            "flops_per_token": self.counts.flops_per_token,
            "tokens_per_s": self.clock.overall,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
        }
        if self.accelerator.is_main_process:
            write_json(self.run / "result.json", result)
            checkpoint.finish(self.run / "checkpoints")
            with contextlib.suppress(FileNotFoundError):
                (self.run / "failure.json").unlink()
            self.progress.done(result)
        self.accelerator.wait_for_everyone()
        return result


def key(*parts: int) -> int:
    """A seed for one purpose, far from all others."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
