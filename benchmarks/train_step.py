"""Training speed beside a plain GPT-2 and transformers' models: tokens per second, peak memory.

    python benchmarks/train_step.py                     all shapes, fp32 and bf16, one thread
    python benchmarks/train_step.py --shape 4x128 --precision bf16 --compile
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/train_step.py --no-memory     as a processor with AVX2 alone computes

GELU is x Φ(x) in the plain GPT-2 and in `ceteris gpt2 erf`; in the others it is GPT-2's own
approximation by tanh, which takes longer on a CPU. Peers run in a bare loop: autocast, forward,
cross-entropy, backward, clipping, AdamW (fused for transformers' models; not for the plain GPT-2,
whose usual script fuses on GPUs alone). Ours runs through
`experiments.trainer.Training.train_step`, with its data, schedule, checks and log
rows. All contenders take turns in one process, so that a noisy machine is noisy for all; each
ratio is the median over turns of the ratio within a turn, with its quartiles. Ratios are of the
process's CPU time, which others on the machine disturb less; those of wall-clock time stand
beside them. Memory is the peak of a process of its own, less what it held before the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass(frozen=True)
class Shape:
    """layers x width, heads, sequence length, vocabulary, sequences per step."""

    n_layers: int
    d_model: int
    n_heads: int
    seq_len: int
    vocab_size: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


SHAPES = {
    "4x128": Shape(4, 128, 4, 256, 256, 16),
    "6x384": Shape(6, 384, 6, 256, 65, 8),
    "8x512": Shape(8, 512, 8, 512, 16384, 4),
}
LR = 1e-3
PLAIN, PLAIN_TANH = "plain GPT-2", "plain GPT-2 tanh"
PEERS = (PLAIN, PLAIN_TANH, "GPT2LMHeadModel", "LlamaForCausalLM")
Step = Callable[[], None]


class RandomTokens:
    """A dataset's interface over uniform random tokens: speed does not depend on the text."""

    def __init__(self, shape: Shape) -> None:
        import numpy as np

        self.shape, self.vocab_size = shape, shape.vocab_size
        self.tokens = np.random.default_rng(0).integers(
            0, shape.vocab_size, (64, shape.batch, shape.seq_len + 1), dtype=np.int64
        )

    def batch(self, step: int, **_: Any) -> Any:
        return self.tokens[step % len(self.tokens)]

    def validation(self, tokens: int, seq_len: int) -> tuple[Any, int]:
        return self.tokens[0], self.tokens[0].size


def ours(preset: str, shape: Shape, precision: str, folder: Path, how: str) -> Step:
    """A step of our trainer, log rows and checks included."""
    from experiments import loader
    from experiments.progress import Progress
    from experiments.record import Run
    from experiments.start import start_accelerator
    from experiments.trainer import Training

    experiment = loader.load(preset, overrides(preset, shape, precision, how))
    run = Run(folder, f"{preset}-{how}")
    run.folder.mkdir(parents=True)
    data: Any = RandomTokens(shape)
    accelerator = start_accelerator(experiment)
    training = Training(experiment, 0, run, data, accelerator, Progress("none", run))
    training.clock.start(0.0)

    def step() -> None:
        lr, norm = training.train_step()
        if training.due(experiment.execution.log_every):
            training.log(lr, norm)
        assert not training.diverged

    return step


def overrides(preset: str, shape: Shape, precision: str, how: str) -> list[str]:
    """The preset at the benchmark's shape."""
    changes: dict[str, Any] = {
        "model.n_layers": shape.n_layers,
        "model.d_model": shape.d_model,
        "model.n_heads": shape.n_heads,
        "model.max_seq_len": shape.seq_len,
        "data.corpus": "python_docs",
        "data.tokenizer": "bytes",
        "training.seq_len": shape.seq_len,
        "training.global_batch_size": shape.batch,
        "training.tokens": 10**9,
        "training.lr": LR,
        "training.precision": precision,
        "execution.device": "cpu",
        "execution.micro_batch_size": "null",
        "execution.compile": "true" if how == "compiled" else "false",
    }
    if how == "erf":
        changes["model.ffn.activation"] = "{name: gelu, approximate: none}"
    if preset.startswith("llama"):
        changes |= {"model.mixer.n_kv_heads": shape.n_heads, "model.ffn.hidden": hidden(shape)}
    return [f"{key}={value}" for key, value in changes.items()]


def hidden(shape: Shape) -> int:
    """Two thirds of four widths, in multiples of eight."""
    return round(8 * shape.d_model / 3 / 8) * 8


def bare(
    model: Any,
    logits: Callable[[Any], Any],
    shape: Shape,
    precision: str,
    fused: bool | None = True,
) -> Step:
    """The loop that everybody writes first."""
    import torch
    import torch.nn.functional as F

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        fused=fused,
    )
    data, count = RandomTokens(shape), iter(range(10**9))

    def step() -> None:
        windows = torch.from_numpy(data.batch(next(count)))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = logits(windows[:, :-1])
            loss = F.cross_entropy(out.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_model(name: str, shape: Shape) -> Any:
    """GPT-2 or Llama from a random configuration."""
    import transformers

    transformers.logging.set_verbosity_error()
    if name == "GPT2LMHeadModel":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=shape.vocab_size,
                n_positions=shape.seq_len,
                n_embd=shape.d_model,
                n_layer=shape.n_layers,
                n_head=shape.n_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=hidden(shape),
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            max_position_embeddings=shape.seq_len,
            use_cache=False,
        )
    )


def plain_gpt2(shape: Shape, approximate: str = "none") -> Any:
    """GPT-2 as a short script writes it: fused q, k, v, torch's own attention, GELU and loss.

    Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    width, heads = shape.d_model, shape.n_heads

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.norm_1(x)).split(width, dim=2)
            q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate=approximate))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(shape.vocab_size, width)
            self.places = nn.Embedding(shape.seq_len, width)
            self.layers = nn.ModuleList(Layer() for _ in range(shape.n_layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, shape.vocab_size, bias=False)
            self.head.weight = self.words.weight
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    return GPT2()


def contender(name: str, shape: Shape, precision: str, folder: Path) -> Step:
    """A contender by its name in the printed table."""
    if name in (PLAIN, PLAIN_TANH):
        model = plain_gpt2(shape, "tanh" if name == PLAIN_TANH else "none")
        return bare(model, model, shape, precision, fused=False)
    if name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        model = transformers_model(name, shape)
        return bare(model, lambda tokens: model(tokens).logits, shape, precision)
    preset, _, how = name.removeprefix("ceteris ").partition(" ")
    if how == "bare":
        from experiments import loader
        from experiments.model import build
        from experiments.trainer import LanguageModel

        experiment = loader.load(preset, overrides(preset, shape, precision, how))
        decoder = build(experiment, shape.vocab_size, 0)
        language = LanguageModel(decoder, experiment.training.objective.build())
        return bare_ours(language, experiment, shape, precision)
    return ours(preset, shape, precision, folder, how)


def bare_ours(language: Any, experiment: Any, shape: Shape, precision: str) -> Step:
    """Our model and optimizer without our trainer: what the trainer adds is the difference."""
    import torch

    optimizer = experiment.training.optimizer.build().build(language, LR)
    data, count = RandomTokens(shape), iter(range(10**9))

    def step() -> None:
        windows = torch.from_numpy(data.batch(next(count)))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = language(windows) / shape.tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Step], turns: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall-clock) seconds per step of each contender, by turns of about `seconds` each."""
    counts = {}
    for name, step in steps.items():
        step()
        step()
        began = time.process_time()
        step()
        counts[name] = max(1, round(seconds / (time.process_time() - began)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(counts[name]):
                step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            times[name].append((cpu / counts[name], wall / counts[name]))
    return times


def peak_memory(name: str, shape: str, precision: str) -> float:
    """Mebibytes at the peak of three steps, in a process of its own."""
    words = [sys.executable, __file__, "--memory-of", name, "--shape", shape]
    done = subprocess.run(
        [*words, "--precision", precision],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    return float(done.stdout.split()[-1])


def print_peak(name: str, shape: Shape, precision: str) -> None:
    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{key}:"))

    with tempfile.TemporaryDirectory() as folder:
        warm = Shape(1, 32, 1, 32, 65, 1)  # imports and one step, so that only the model counts
        contender(name, warm, precision, Path(folder) / "warm")()
        Path("/proc/self/clear_refs").write_bytes(b"5")  # Linux forgets the peak so far
        before = status("VmRSS")
        step = contender(name, shape, precision, Path(folder) / "real")
        for _ in range(3):
            step()
        print(status("VmHWM") - before)


def report(key: str, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    shape = SHAPES[key]
    names = [PLAIN, PLAIN_TANH, "GPT2LMHeadModel"]
    names += ["ceteris gpt2", "ceteris gpt2 erf", "ceteris gpt2 bare"]
    names += ["LlamaForCausalLM", "ceteris llama-160m"]
    if args.compile:
        names.append("ceteris gpt2 compiled")
    if args.only:
        names = [name for name in names if name in args.only]
    with tempfile.TemporaryDirectory() as folder:
        steps = {n: contender(n, shape, precision, Path(folder)) for n in names}
        times = measure(steps, args.turns, args.seconds)
    rows = []
    peers = [name for name in PEERS if name in names]
    print(f"\n{key}, T {shape.seq_len}, V {shape.vocab_size}, B {shape.batch}, {precision}")
    line = "{:<22}{:>9}{:>9}" + "{:>30}" * len(peers) + "{:>9}"
    print(line.format("", "tok/CPU s", "tok/s", *(f"x {peer} (wall)" for peer in peers), "MiB"))
    for name in names:
        row: dict[str, Any] = {"shape": key, "precision": precision, "name": name}
        row["tokens_per_cpu_s"], row["tokens_per_s"] = (
            shape.tokens / statistics.median(column) for column in zip(*times[name], strict=True)
        )
        cells = []
        for peer in peers:
            cpu, wall = ratios(times[peer], times[name])
            row[f"x {peer}"], row[f"x {peer}, wall"] = cpu[1], wall[1]
            cells.append(f"{cpu[1]:.2f} [{cpu[0]:.2f}, {cpu[2]:.2f}] ({wall[1]:.2f})")
        alone = args.memory and not name.endswith(("compiled", "bare"))
        row["peak_mib"] = peak_memory(name, key, precision) if alone else None
        peak = f"{row['peak_mib']:,.0f}" if alone else ""
        speeds = f"{row['tokens_per_cpu_s']:,.0f}", f"{row['tokens_per_s']:,.0f}"
        print(line.format(name, *speeds, *cells, peak), flush=True)
        rows.append(row)
    if {"ceteris gpt2", "ceteris gpt2 bare"} <= set(names):
        cpu, _ = ratios(times["ceteris gpt2"], times["ceteris gpt2 bare"])
        low, middle, high = (100 * (q - 1) for q in cpu)
        print(f"the trainer adds {middle:+.1f}% [{low:+.1f}, {high:+.1f}] of CPU time to its model")
    return rows


def ratios(
    peer: list[tuple[float, float]], own: list[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """How many times faster `own` is, turn by turn: quartiles by CPU time and by wall clock."""
    pairs = list(zip(peer, own, strict=True))
    return tuple(statistics.quantiles([p[i] / o[i] for p, o in pairs], n=4) for i in (0, 1))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append")
    parser.add_argument("--compile", action="store_true", help="also ours with torch.compile")
    parser.add_argument("--only", action="append", help="this contender alone; repeatable")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    precisions = args.precision or ["bf16", "fp32"]
    shapes = args.shape or list(SHAPES)
    if args.memory_of:
        print_peak(args.memory_of, SHAPES[shapes[0]], precisions[0])
        return
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"torch {torch.__version__}, {capability}, {args.threads} thread(s), {args.turns} turns; "
        "ratios by CPU time: median [quartiles], and by wall clock in brackets"
    )
    rows = [row for key in shapes for p in precisions for row in report(key, p, args)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
