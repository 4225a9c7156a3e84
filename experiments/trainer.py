"""Training: one run from its first batch, or its newest checkpoint, to its result.

What a run does depends on its experiment and seed alone: `batch(step)` is a pure function, dropout
is seeded by step, the learning rate is a function of the step, and whatever else the loop carries
is in the checkpoint. A run killed at any moment and started again therefore writes the same
weights and the same metrics.jsonl, byte for byte, on a CPU with the same number of threads and
processes. What depends on time (when to look for signals, when to save) never reaches the records.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from components.decoder import count
from components.dims import ResidualLinear
from components.promises_training import factor_is_a_rate
from experiments import (
    attempts,
    budget,
    checkpoint,
    measure,
    precheck,
    provenance,
    scores,
    tracking,
)
from experiments.clock import Clock, peak_memory
from experiments.data import Dataset
from experiments.evaluate import Subject, score
from experiments.loader import run_id
from experiments.measure import Measure, finite
from experiments.model import LanguageModel, build, load_trained
from experiments.progress import Progress
from experiments.record import (
    SCHEMA,
    Interrupted,
    Run,
    UserError,
    append_rows,
    read_json,
    seal,
    truncate,
    write_json,
)
from experiments.schema import Experiment
from experiments.scores import ScoringFailed
from experiments.sharding import Sharding, load_optimizer, load_weights, shard, whole
from experiments.start import (
    check_directory,
    hold,
    micro_batch,
    start_accelerator,
    stop_signals,
    world,
)

LOOK_SECONDS = 10.0  # between looks at what came from outside, where processes meet for it


def train(
    experiment: Experiment,
    seed: int,
    root: Path,
    *,
    progress: Literal["bar", "log", "none"] = "log",
    sharding: Sharding = "ddp",
    stop: list[int] | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Runs, or goes on with, the run of this experiment and seed; returns its result.

    Args:
        run: which attempt at it; by default the one of the text as it is now (attempts.py).
        sharding: how several processes hold the model, see experiments/sharding.py.
        stop: numbers of the signals that the caller's own handlers have caught so far; by default
            SIGTERM and SIGINT are caught here.

    Raises:
        UserError: the data or the run directory does not allow it, or the disk is full.
        ScoringFailed: the run is done, but one of its tasks could not be scored.
        Interrupted: a signal came; the checkpoint of the last step is on disk.
    """
    if run is None:
        run = attempts.Attempts(root).choose(experiment, run_id(experiment, seed))
        attempts.explain(experiment, run)
    check_directory(run, experiment)
    mirror_to = tracking.place(experiment.tracking.model_dump())
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    known = alone and (run / "result.json").exists()
    if known and not scores.lacking(run, experiment.evaluation.model_dump()):
        return read_json(run / "result.json")
    with contextlib.nullcontext(stop) if stop is not None else stop_signals() as caught:
        accelerator = start_accelerator(experiment, sharding)
        data = attempts.data_for(run, experiment, progress=progress == "bar")
        t = experiment.training  # what the data can't give is said before anything is written
        data.batch(0, seed=seed, seq_len=t.seq_len, global_batch_size=t.global_batch_size)
        data.validation(experiment.evaluation.tokens, t.seq_len)
        for length in experiment.evaluation.lengths:
            if length >= len(data.val):
                raise UserError(
                    f"evaluation.lengths: no window of {length:,} tokens fits in the validation "
                    f"split, which has {len(data.val):,}; leave it out, or hold out more text"
                )
        with hold(run, experiment, seed, data, accelerator) as result:
            main = accelerator.is_main_process
            with Progress(progress, run) if main else Progress("none", None) as line:
                training: Training | None = None
                facts: dict[str, float] = {}
                if result is None:  # else it was done before, or another process was quicker
                    training = Training(experiment, seed, run, data, accelerator, line)
                    for warning in budget.warnings(experiment, data) if main else ():
                        line.say(warning)
                    training.resume()
                    facts = {
                        "parameters": training.counts.parameters,
                        "parameters_non_embedding": training.counts.non_embedding,
                        "flops_per_token": training.counts.flops_per_token,
                    }
                with tracking.mirrored(run, mirror_to if main else None, facts, line.say):
                    if training is not None:
                        result = training.run_all(caught)
                    assert result is not None
                    if result["status"] == "done" and experiment.evaluation.tasks:
                        score_end(experiment, run, data, accelerator, line, caught)
            return result


def score_end(
    experiment: Experiment,
    run: Run,
    data: Dataset,
    accelerator: Accelerator,
    line: Progress,
    stop: list[int],
) -> None:
    """Scores the last checkpoint on the tasks that it lacks; each process holds the whole model.

    Raises:
        ScoringFailed, Interrupted: as `evaluate.score`.
    """
    trained = load_trained(run, experiment, data.vocab_size)
    model = trained.model.to(accelerator.device)
    tokens = trained.step * experiment.training.tokens_per_step
    main = accelerator.is_main_process
    subject = Subject(run, model, data, trained.step, tokens, main, stop, line.say, line.pulse)
    score(subject, experiment.evaluation)


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
        every = experiment.evaluation.every if experiment.evaluation.tasks else None
        self.score_steps = max(1, round(every / self.tokens_per_step)) if every else None
        if self.score_steps and accelerator.is_fsdp2:
            raise UserError(
                "evaluation.every: a model spread over processes (fsdp2) is scored at the end "
                "only; leave `every` out, or use ddp"
            )
        self.windows, self.target_bytes = data.validation(experiment.evaluation.tokens, t.seq_len)

        m = experiment.model
        self.dims = experiment.dims(data.vocab_size)
        self.counts = count(self.dims, m.specs, m.tie_embeddings, t.seq_len)
        self.sharded = accelerator.is_fsdp2
        compile = experiment.execution.compile
        self.decoder = build(experiment, data.vocab_size, seed)
        if not self.sharded:
            self.decoder.to(accelerator.device)
        optimizer = t.optimizer.build().build(self.decoder, t.lr)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        self.language = LanguageModel(self.decoder, t.objective.build())
        if self.sharded:
            prepared = shard(accelerator, self.language, optimizer, compile)
        else:
            if compile:
                self.language.compile()
            prepared = accelerator.prepare(self.language, optimizer)
        self.model, self.optimizer = prepared
        self.schedule = t.schedule.build()
        at_once = self.micro * t.seq_len
        self.measure = Measure(self.language, accelerator, at_once, progress.pulse)

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
        self.initial: dict[str, float | None] = {}  # what the first batch says of the first weights
        self.clock = Clock(accelerator.device)

    @property
    def metric_device(self) -> torch.device:
        device = self.accelerator.device
        return torch.device("cpu") if device.type == "mps" else device  # it has no float64

    def run_all(self, stop: list[int]) -> dict[str, Any]:
        """Every step from where `resume` left it to the end, or to a signal in `stop`."""
        if self.score_steps and 0 < self.step < self.steps and self.due(self.score_steps):
            self.score(stop)  # what a signal at this step left out
        if self.step == 0:
            self.initial["init/loss"] = self.measure.mean(self.batch())
            if self.eval_steps:
                self.evaluate()  # the beginning of the curve
        self.clock.start(self.seconds)
        saved_at = time.monotonic()
        self.looked, self.look_at = (self.step, saved_at), self.step + 1
        while self.step < self.steps:
            lr, norm = self.train_step()
            row = self.due(self.experiment.execution.log_every)
            evaluation = self.eval_steps is not None and self.due(self.eval_steps)
            if row:
                self.log(lr, norm)
            if (row or evaluation or self.numbers_are_here) and self.diverged:
                return self.finish("diverged")
            if evaluation:
                self.clock.stop()
                self.evaluate()
                self.clock.start(self.seconds)
            if self.score_steps and self.due(self.score_steps) and self.step < self.steps:
                self.clock.stop()
                self.score(stop)
                self.clock.start(self.seconds)
            alone = world(self.accelerator) == 1
            if self.step == self.steps or not (row or alone or self.step >= self.look_at):
                continue
            elapsed = time.monotonic() - saved_at
            late = elapsed >= 60 * self.experiment.execution.checkpoint_minutes
            number, late = self.look_up(stop[0] if stop else 0, late)
            if number or late:
                self.clock.stop()
                self.save()
                if number:
                    raise Interrupted(number)
                saved_at = time.monotonic()
                self.clock.start(self.seconds)
        if self.evaluated != self.step:
            self.clock.stop()
            self.evaluate()
        return self.finish("diverged" if self.diverged else "done")

    def train_step(self) -> tuple[float, Tensor]:
        """One optimizer step on one global batch; returns its learning rate and gradient norm."""
        t, accelerator = self.experiment.training, self.accelerator
        with precheck.named(t.schedule):
            factor = factor_is_a_rate(self.schedule, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        torch.manual_seed(key(self.seed, self.step, accelerator.process_index))  # dropout
        first = accelerator.process_index * self.share
        share = self.batch()[first : first + self.share]
        mine = torch.from_numpy(share).to(accelerator.device)
        # The mean over the global batch's targets. Gradients are averaged over processes, so each
        # process's part counts as many times as there are processes.
        total = torch.zeros((), device=accelerator.device)
        scale = world(accelerator) / t.tokens_per_step
        pieces = mine.split(self.micro)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            at_once = last or self.sharded
            with contextlib.nullcontext() if at_once else accelerator.no_sync(self.model):
                loss = self.model(piece) * scale
                accelerator.backward(loss)
            total += loss.detach()
        if self.step == 0:
            self.initial["init/grad_norm_ffn"] = self.ffn_gradient()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), t.grad_clip or float("inf"))
        norm = norm.full_tensor() if self.sharded else norm
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

    def batch(self) -> np.ndarray:
        """The windows of the step that comes next, of all processes."""
        t = self.experiment.training
        return self.data.batch(
            self.step, seed=self.seed, seq_len=t.seq_len, global_batch_size=t.global_batch_size
        )

    def ffn_gradient(self) -> float | None:
        """Norm of the gradient of the last block's feed-forward output matrix, before clipping.

        What Xiong et al. 2020, arXiv 2002.04745, theorem 1, bounds for Pre-LN and Post-LN. None
        where the block has no such matrix.
        """
        ffn = getattr(self.decoder.blocks[-1], "ffn", None)
        layers = [m for m in ffn.modules() if isinstance(m, ResidualLinear)] if ffn else []
        gradient = layers[-1].weight.grad if layers else None
        if gradient is None:
            return None
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        return finite(float(whole(gradient, keep=True).norm()) / scale)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    @property
    def numbers_are_here(self) -> bool:
        """Whether to look at the loss each step, since that waits for nobody; else at log rows."""
        return self.accelerator.device.type == "cpu" and world(self.accelerator) == 1

    @property
    def diverged(self) -> bool:
        """Whether a loss or a gradient was not finite, on any process."""
        self.bad_step = int(self.over_processes(self.first_bad).min())
        return self.bad_step <= self.steps or not bool(torch.isfinite(self.interval))

    def over_processes(self, mine: Tensor) -> Tensor:
        """`(...)` of this process -> `(n, ...)`, that of each; a meeting of all n."""
        return self.accelerator.gather(mine[None]) if world(self.accelerator) > 1 else mine[None]

    def look_up(self, number: int, late: bool) -> tuple[int, bool]:
        """The signal that some process has caught (0: none), and whether a checkpoint is late.

        One process looks after each step. Several must meet for it, at steps that all know: log
        rows, and the step until which the first of them reckons LOOK_SECONDS to pass.
        """
        self.progress.pulse(step=self.step, tokens=self.step * self.tokens_per_step)
        if world(self.accelerator) == 1:
            return number, late
        (before, at), self.looked = self.looked, (self.step, time.monotonic())
        ahead = steps_ahead(self.step - before, self.looked[1] - at)
        mine = torch.tensor([number, late, ahead], device=self.accelerator.device)
        numbers, lates, aheads = self.over_processes(mine).T.tolist()
        self.look_at = self.step + aheads[0]
        return number or next(filter(None, numbers), 0), any(lates)

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
        timing = {**row, "seconds": self.seconds, "perf/tokens_per_s": speed}
        append_rows(self.run / "timing.jsonl", timing)  # first: who sees a row may look for it
        append_rows(self.run / "metrics.jsonl", {**row, **{k: self.last.get(k) for k in finite}})
        self.progress.show(self.step, self.steps, self.tokens_per_step, self.last, speed)

    def evaluate(self) -> None:
        """Loss over the fixed validation tokens, in nats per token and bits per byte of text."""
        total = self.measure.total(self.windows)
        loss = total / (self.windows.shape[0] * (self.windows.shape[1] - 1))
        bpb = total / self.target_bytes / math.log(2)
        if loss - loss != 0.0:
            self.first_bad = self.first_bad.clamp(max=self.step)
            return
        self.best = loss if self.best is None else min(self.best, loss)
        self.evaluated = self.step
        self.last.update({"val/loss": loss, "val/bpb": bpb})
        if self.accelerator.is_main_process:
            row: dict[str, Any] = {"step": self.step, "tokens": self.step * self.tokens_per_step}
            row |= {"val/loss": loss, "val/bpb": bpb}
            append_rows(self.run / "metrics.jsonl", row)
            self.progress.show(self.step, self.steps, self.tokens_per_step, self.last, None)

    def score(self, stop: list[int]) -> None:
        """Scores the model as it is now; a task that fails is said, and training goes on."""
        tokens, main = self.step * self.tokens_per_step, self.accelerator.is_main_process
        line = self.progress
        subject = Subject(
            self.run, self.decoder, self.data, self.step, tokens, main, stop, line.say, line.pulse
        )
        try:
            score(subject, self.experiment.evaluation)
        except ScoringFailed as error:
            self.progress.say(f"scoring failed at step {self.step}: {error}")
        except Interrupted:  # the loop saves at this step, and the rest is scored after
            pass

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint; the records' sizes in it say what a resumed run must cut off."""
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        accelerator.wait_for_everyone()
        intervals = self.over_processes(self.interval).tolist()
        first_bad = int(self.over_processes(self.first_bad).min())
        weights, optimizer = self.decoder.state_dict(), self.optimizer.state_dict()
        if self.sharded:
            weights, optimizer = whole(weights, main), whole(optimizer, main)
        if not main:
            return
        scaler = accelerator.scaler
        checkpoint.save(
            self.run / "checkpoints",
            {k: v.detach().cpu().contiguous() for k, v in weights.items()},
            {
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            {
                "schema": SCHEMA,
                "step": self.step,
                "seconds": self.seconds,
                "interval": sum(intervals) / len(intervals),
                "intervals": intervals,
                "interval_steps": self.interval_steps,
                "first_bad": first_bad,
                "best": self.best,
                "evaluated": self.evaluated,
                "last": self.last,
                "initial": self.initial,
                "sizes": {n: size(self.run / n) for n in ("metrics.jsonl", "timing.jsonl")},
            },
        )

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, or begins; cuts what was recorded after it."""
        found = checkpoint.newest(self.run / "checkpoints", self.progress.say)
        sizes = {"metrics.jsonl": 0, "timing.jsonl": 0}
        if found is not None:
            path, state = found
            saved = checkpoint.load_optimizer(path, mmap=self.sharded)
            load_weights(self.decoder, checkpoint.load_weights(path))
            load_optimizer(self.optimizer, saved["optimizer"])
            if saved["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self.step, self.seconds = state["step"], state["seconds"]
            each = state.get("intervals", [])  # of as many processes as there were
            same = len(each) == world(self.accelerator)
            self.interval += each[self.accelerator.process_index] if same else state["interval"]
            self.first_bad.clamp_(max=state.get("first_bad", self.steps + 1))
            self.interval_steps = state["interval_steps"]
            self.best, self.last, sizes = state["best"], state["last"], state["sizes"]
            self.evaluated, self.initial = state["evaluated"], state.get("initial", {})
            self.progress.say(f"going on from step {self.step} of {self.steps}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name, length in sizes.items():
                truncate(self.run / name, length)

    def finish(self, status: Literal["done", "diverged"]) -> dict[str, Any]:
        """The last checkpoint, if its weights are worth keeping, and after it the result."""
        self.clock.stop()
        done, data, peak = status == "done", self.data, peak_memory(self.accelerator.device)
        tuning, lengths = None, {}
        if done:
            self.save()
            tokens = self.experiment.evaluation.tokens
            tuning = self.measure.mean(data.tuning(tokens, self.experiment.training.seq_len))
            lengths = measure.at_lengths(self.experiment, data, self.measure)
        result: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            bad = None if done else self.bad_step
            attempt = read_json(self.run / "provenance.json")["attempts"][-1]
            result = {
                "schema": SCHEMA,
                "id": self.run.id,
                "status": status,
                "reason": f"non-finite loss or gradient at step {bad}" if bad is not None else None,
                "diverged_step": bad,
                "seed": self.seed,
                "step": self.step,
                "tokens": self.step * self.tokens_per_step,
                "epochs": budget.epochs(self.step * self.tokens_per_step, data),
                "train/loss": self.last.get("train/loss"),
                "val/loss": self.last.get("val/loss") if done else None,
                "val/bpb": self.last.get("val/bpb") if done else None,
                **{f"val/loss@{length}": found["loss"] for length, found in lengths.items()},
                "tuning/loss": tuning,
                "best/val/loss": self.best,
                "init/loss": self.initial.get("init/loss"),
                "init/grad_norm_ffn": self.initial.get("init/grad_norm_ffn"),
                "floor/loss": measure.floor(self.experiment, data, len(self.windows)),
                "parameters": self.counts.parameters,
                "parameters_non_embedding": self.counts.non_embedding,
                "flops_per_token": self.counts.flops_per_token,
                "tokens_per_s": self.clock.overall,
                "seconds": self.seconds,
                "peak_memory_bytes": peak,
                "data": data.fingerprint,
                "code": provenance.code(attempt),
                "versions": {"torch": attempt["versions"]["torch"]},
            }
            result["seal"] = seal(self.run.folder, result)
            if lengths:
                write_json(self.run / "lengths.json", lengths)
            write_json(self.run / "result.json", result)
            checkpoint.finish(self.run / "checkpoints")
            with contextlib.suppress(FileNotFoundError):
                (self.run / "failure.json").unlink()
            self.progress.done(result)
        if world(self.accelerator) > 1:
            result = broadcast_object_list([result])[0]
        return result


def steps_ahead(steps: int, seconds: float) -> int:
    """After how many steps to look up again, where the last `steps` took `seconds`."""
    return max(1, int(LOOK_SECONDS * steps / max(seconds, 1e-6)))


def key(*parts: int) -> int:
    """A seed for one purpose, far from all others."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
