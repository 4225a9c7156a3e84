"""The schema of an experiment file: everything scientific about one training, seed excepted.

Strict, frozen, closed: `"4"` is no integer, and a key that nothing reads is an error. Every field
is science, and part of a run's identity, unless it is declared `EXECUTION`: how and where a run is
carried out, which must not change what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from components.registry import Closed, Slot, Spec, UserError
from experiments.tracking import LONGEST, misnamed

if TYPE_CHECKING:
    from components.dims import Dims


def _whole(value: Any) -> Any:
    # `tokens: 1e6` is how people write a million; 1.5 stays a float and is refused.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**53)]
ONE_EACH = ("bytes", "characters")  # tokenizers with an id for each ASCII character
OURS = "held_out_"  # what the names of tasks on an experiment's own text begin with
EXECUTION: dict[str, Any] = {"execution": True}  # json_schema_extra of fields outside the identity


def component(kind: str, default: str) -> Any:
    """A field that takes a component; YAML writes its name, or a mapping with `name`."""
    return Field(default=default, validate_default=True, description=f"a {kind} component")


class Model(Closed):
    """What the model is made of."""

    d_model: Annotated[Count, Field(description="width of the residual stream")]
    n_layers: Annotated[Count, Field(description="number of blocks")]
    n_heads: Annotated[Count, Field(description="query heads")] = 1
    head_dim: Annotated[Count | None, Field(description="d_model / n_heads unless given")] = None
    max_seq_len: Annotated[Count | None, Field(description="training.seq_len unless given")] = None
    tie_embeddings: Annotated[bool, Field(description="output layer = embedding")] = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm: Annotated[Spec, Slot("norm")] = component("norm", "layernorm")
    position: Annotated[Spec, Slot("position")] = component("position", "learned")
    mixer: Annotated[Spec, Slot("mixer")] = component("mixer", "attention")
    ffn: Annotated[Spec, Slot("ffn")] = component("ffn", "mlp")
    block: Annotated[Spec, Slot("block")] = component("block", "pre")
    init: Annotated[Spec, Slot("init")] = component("init", "fan_in")

    @property
    def specs(self) -> dict[str, Spec]:
        """The component chosen for each part, by kind."""
        return {name: value for name, value in self if isinstance(value, Spec)}


class Data(Closed):
    """The text, how it becomes tokens, and what is held out."""

    corpus: Annotated[Spec, Slot("corpus")] = component("corpus", "python_docs")
    filters: tuple[Annotated[Spec, Slot("filter")], ...] = ()
    tokenizer: Annotated[Spec, Slot("tokenizer")] = component("tokenizer", "bytes")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    split_seed: Annotated[int, Field(ge=0)] = 0


class Training(Closed):
    """How the model is trained, in tokens and sequences."""

    tokens: Annotated[Count, Field(description="budget: tokens trained on")]
    seq_len: Annotated[Count, Field(description="tokens in one sequence")]
    global_batch_size: Annotated[Count, Field(description="sequences in one step")]
    lr: Annotated[float, Field(gt=0, description="peak learning rate")]
    optimizer: Annotated[Spec, Slot("optimizer")] = component("optimizer", "adamw")
    schedule: Annotated[Spec, Slot("schedule")] = component("schedule", "cosine")
    objective: Annotated[Spec, Slot("objective")] = component("objective", "cross_entropy")
    grad_clip: Annotated[float | None, Field(gt=0, description="largest gradient norm")] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps: the budget in whole batches."""
        return self.tokens // self.tokens_per_step


def scoring(description: str, **bounds: Any) -> Any:
    """A field of `evaluation` that says what else is measured: it trains no other model."""
    return Field(description=description, json_schema_extra=EXECUTION, **bounds)


class Evaluation(Closed):
    """When and on how much of the validation split the loss is measured, and in windows of which
    lengths; which tasks of lm-eval are scored. The latter can be added to a finished run, so they
    are no part of its identity."""

    every_tokens: Annotated[Count | None, Field(description="null: at the end only")] = None
    tokens: Annotated[Count, Field(description="validation tokens, the same each time")] = 65536
    lengths: Annotated[
        tuple[Count, ...], Field(description="tokens in windows whose loss is measured at the end")
    ] = ()
    tasks: Annotated[tuple[str, ...], scoring("lm-eval tasks, groups or tags")] = ()
    every: Annotated[Count | None, scoring("tokens between scorings; null: at the end")] = None
    include_path: Annotated[str | None, scoring("a folder of task YAMLs of your own")] = None
    num_fewshot: Annotated[int | None, scoring("examples; null: the task's own", ge=0)] = None
    limit: Annotated[int | float | None, scoring("first items only; below 1: a share", gt=0)] = None
    max_length: Annotated[Count | None, scoring("tokens seen at once; null: max_seq_len")] = None
    add_bos_token: Annotated[bool, scoring("end of text before every context")] = False
    precision: Annotated[Literal["fp32", "bf16"], scoring("of the weights in scoring")] = "fp32"

    def problems(self) -> Iterator[tuple[str, str]]:
        """As `Experiment.problems`."""
        limit = self.limit
        if limit is not None and limit > 1 and limit != int(limit):
            yield "evaluation.limit", f"{limit} is neither a number of items nor a share below 1"
        for index, length in enumerate(self.lengths):
            if length in self.lengths[:index]:
                yield "evaluation.lengths", f"{length} is written twice"
            if length > self.tokens:
                yield (
                    "evaluation.lengths",
                    f"a window of {length} does not fit in evaluation.tokens, {self.tokens}",
                )


class Execution(Closed):
    """How a run is carried out; no part of its identity."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    micro_batch_size: Annotated[
        Count | None, Field(description="sequences at once on one device; null: all of them")
    ] = None
    compile: Annotated[bool, Field(description="torch.compile")] = False
    threads: Annotated[Count | None, Field(description="CPU threads; null: as torch finds")] = None
    log_every: Annotated[Count, Field(description="steps between rows of metrics.jsonl")] = 10
    checkpoint_minutes: Annotated[
        float, Field(ge=0, description="work that a crash may cost; 0: every step")
    ] = 5.0


class Wandb(Closed):
    """Where wandb shows the run. Each is also wandb's own variable: WANDB_PROJECT, WANDB_ENTITY,
    WANDB_MODE, of which the last wins over the file."""

    project: Annotated[str | None, Field(description="null: ceteris")] = None
    entity: Annotated[str | None, Field(description="user or team; null: your own")] = None
    mode: Annotated[
        Literal["online", "offline", "disabled"] | None,
        Field(description="null: online where a project is named or you are logged in"),
    ] = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """As `Experiment.problems`."""
        for key, most in LONGEST.items():
            value = getattr(self, key)
            if value is not None and (wrong := misnamed(value, most)):
                yield f"tracking.wandb.{key}", f"{value!r} {wrong}"


class Tracking(Closed):
    """Who else is told how a run goes; see experiments/tracking.py. No part of its identity."""

    wandb: Wandb = Field(default_factory=Wandb)


class Experiment(Closed):
    """One YAML file: everything scientific about one training, seed excepted."""

    description: Annotated[str, Field(json_schema_extra=EXECUTION)] = ""
    imports: Annotated[tuple[str, ...], Field(json_schema_extra=EXECUTION)] = ()
    model: Model
    data: Data = Field(default_factory=Data)
    training: Training
    evaluation: Evaluation = Field(default_factory=Evaluation)
    execution: Annotated[Execution, Field(default_factory=Execution, json_schema_extra=EXECUTION)]
    tracking: Annotated[Tracking, Field(default_factory=Tracking, json_schema_extra=EXECUTION)]

    @property
    def max_seq_len(self) -> int:
        return self.model.max_seq_len or self.training.seq_len

    def dims(self, vocab_size: int) -> Dims:
        """The dimensions that the harness passes to components."""
        from components.dims import Dims

        m = self.model
        return Dims(
            d_model=m.d_model,
            n_layers=m.n_layers,
            n_heads=m.n_heads,
            head_dim=m.head_dim or m.d_model // m.n_heads,
            max_seq_len=self.max_seq_len,
            vocab_size=vocab_size,
            dropout=m.dropout,
        )

    def problems(self) -> Iterator[tuple[str, str]]:
        """What no single field can tell: (dotted path, message) for each."""
        m, t = self.model, self.training
        if m.head_dim is None and m.d_model % m.n_heads:
            yield "model.n_heads", f"n_heads {m.n_heads} does not divide d_model {m.d_model}"
            return
        if t.seq_len > self.max_seq_len:
            yield (
                "training.seq_len",
                f"seq_len {t.seq_len} is longer than model.max_seq_len {self.max_seq_len}",
            )
        if t.steps < 1:
            yield (
                "training.tokens",
                f"{t.tokens} tokens are less than one step of {t.global_batch_size} x {t.seq_len} "
                f"= {t.tokens_per_step}",
            )
        yield from self.evaluation.problems()
        yield from self.tracking.wandb.problems()
        yield from self._made_text()
        micro = self.execution.micro_batch_size
        if micro is not None and t.global_batch_size % micro:
            yield (
                "execution.micro_batch_size",
                f"{micro} does not divide global_batch_size {t.global_batch_size}",
            )
        dims = self.dims(vocab_size=1)
        for slot, spec in m.specs.items():
            check = getattr(spec.entry.cls, "check", None)
            for param, message in check(dims, dict(spec.params)) if check else ():
                yield ".".join(filter(None, ("model", slot, param))), message
        if m.norm.name == "none" and m.mixer.params.get("qk_norm"):
            yield "model.mixer.qk_norm", "qk_norm uses the model's norm, which is none"

    def _made_text(self) -> Iterator[tuple[str, str]]:
        """What does not go together of a made corpus, the windows of its text, and tasks on it."""
        spec, seq_len, asked = self.data.corpus, self.training.seq_len, self.evaluation.tasks
        if getattr(spec.entry.cls, "surprisal", None) is not None:  # it is made
            try:
                window = spec.build().window
            except UserError as error:  # begins with `corpus.` and the parameter
                where, _, message = str(error).partition(": ")
                yield f"data.{where}", message
                return
            letters = self.data.tokenizer.name in ONE_EACH
            if letters and window is not None and seq_len % window:
                yield (
                    "training.seq_len",
                    f"corpus {spec.name} has documents of {window} tokens; a window "
                    f"of {seq_len} cuts them, take {window} or a multiple",
                )
        if self.evaluation.include_path is None and any(task.startswith(OURS) for task in asked):
            from experiments.made import mismatch

            for task in asked:
                if wrong := mismatch(task, spec.name):
                    yield "evaluation.tasks", wrong


PRESETS = Path(__file__).parent / "presets"
