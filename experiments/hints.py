"""Where a key belongs that nothing reads where it stands, and what kind of file a mapping is.

The closest word wins: a key of the same mapping, then one elsewhere in the experiment (of sections,
and of the components chosen), then what other trainers call it, then a parameter of a component
that is not chosen. Words are compared without underscores and capitals.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components import registry
from components.registry import Closed, Slot, UserError, did_you_mean, plain_value
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError, Located

CLOSE = 0.85  # how alike two words must be for a key elsewhere; 1: the same
OFFERED = 0.6  # how alike a key of the same mapping must be: as `did_you_mean` has it
AS_MANY = 3  # places that are named at the most


@dataclass(frozen=True)
class Place:
    """A key that an experiment can have.

    Attributes:
        path: dotted, `training.optimizer.weight_decay`.
        component: whose parameter it is, where another one is chosen now.
    """

    path: str
    component: str | None = None

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    def __str__(self) -> str:
        if self.component is None:
            return self.path
        slot = self.path.rpartition(".")[0]
        return f"{slot}: {{name: {self.component}, {self.key}: …}}"


def unknown_key(data: Any, path: tuple[str | int, ...], known: list[str]) -> str:
    """The message for a key that the mapping at `path[:-1]` has no place for.

    Args:
        data: the whole experiment as written.
        known: the keys which that mapping may have.
    """
    word = str(path[-1])
    head = f"unknown key '{word}'"
    here = ".".join(map(str, path[:-1]))
    if "." in word:
        nested = ": {".join(word.split("."))
        return f"{head} — in a file it is nested: {nested}: …{'}' * word.count('.')}"
    if word in known:  # a mapping of it may not stand here
        return f"{head}{did_you_mean(word, known)}"
    hint = elsewhere(data, here, word, known)
    return f"{head} — {hint}" if hint else f"{head}{did_you_mean(word, known)}"


def elsewhere(data: Any, here: str, word: str, known: Collection[str] = ()) -> str | None:
    """Where a word written in the section `here` belongs; None where the mapping's own keys are
    closer, or nothing is close.

    Args:
        here: dotted; empty for the top of the file.
        known: keys of the mapping in which it was written.
    """
    places = list(_places(Experiment, data))
    near = max((_likeness(word, key) for key in known), default=0.0)
    chosen = [p for p in places if p.component is None]
    others = [p for p in places if p.component is not None]
    slip = near >= OFFERED  # then only the very same word elsewhere is closer
    best, hint = max(near, CLOSE - 1e-9), None
    for score, text in (
        _nearest(word, here, chosen),
        _other_word(word, here, places, known),
        _nearest(word, here, others),
    ):
        if score > best and (score >= 1 or not slip):
            best, hint = score, text
    return hint


def _nearest(word: str, here: str, places: list[Place]) -> tuple[float, str]:
    """How alike the closest of these keys is to a word, and a text that names it."""
    scores = [(_likeness(word, place.key), place) for place in places]
    best = max((score for score, _ in scores), default=0.0)
    found = _closest_by_section(here, [place for score, place in scores if score == best])
    verb = "it is" if best == 1.0 else "did you mean"
    return best, f"{verb} {' or '.join(map(str, found))}{'?' * (best < 1.0)}"


def _other_word(
    word: str, here: str, places: list[Place], known: Collection[str]
) -> tuple[float, str]:
    """As `_nearest`, among the words that other trainers use."""
    match = difflib.get_close_matches(_plain(word), _WORDS, n=1, cutoff=CLOSE)
    if not match:
        return 0.0, ""
    targets = _WORDS[match[0]]
    score = _likeness(word, match[0])
    if targets[0] in ADVICE:
        section = here.partition(".")[0]
        own = any(p.key == word and p.path.startswith(f"{section}.") for p in places)
        return score + 1e-6 * (not section or not own), targets[0]
    beside = [target for target in targets if target.rpartition(".")[2] in known]
    if beside:
        key, remark = beside[0].rpartition(".")[2], REMARKS.get(beside[0], "")
        if difflib.get_close_matches(word, known, n=1) == [key] and not remark:
            return 0.0, ""  # as any other slip of the pen
        return score, f"here it is {here}.{key}{remark}"
    found = [place for target in targets for place in places if place.path == target]
    found = _closest_by_section(here, found)
    if not found:
        return 0.0, ""
    remark = next((REMARKS[p.path] for p in found if p.path in REMARKS), "")
    return score, f"here it is {' or '.join(map(str, found))}{remark}"


def _closest_by_section(here: str, places: list[Place]) -> list[Place]:
    """Those that share most of the path in which the key was written; a component that is chosen
    before those that are not."""

    def shared(place: Place) -> int:
        pairs = zip(here.split("."), place.path.split(".")[:-1], strict=False)
        same = [one == other for one, other in pairs]
        return same.index(False) if False in same else len(same)

    most = max(map(shared, places), default=0)
    found = list(dict.fromkeys(p for p in places if shared(p) == most))
    found = [p for p in found if p.component is None] or found
    return found[:AS_MANY]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, _plain(one), _plain(other)).ratio()


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Closed)


def _places(schema: type[Closed], data: Any, path: str = "") -> Iterator[Place]:
    """Every key of a section and what is below it, with the components that `data` chooses."""
    for key, info in schema.model_fields.items():
        here = f"{path}.{key}" if path else key
        value = data.get(key) if isinstance(data, Mapping) else None
        slot = next((mark for mark in info.metadata if isinstance(mark, Slot)), None)
        yield Place(here)
        if _is_section(info.annotation):
            yield from _places(info.annotation, value, here)  # type: ignore[arg-type]
        elif slot is not None:
            yield from _parameters(slot.kind, plain_value(info.default), value, here)


def _parameters(kind: str, default: Any, value: Any, path: str) -> Iterator[Place]:
    written = default if value is None else value
    name = written.get("name") if isinstance(written, Mapping) else written
    for other in registry.names(kind):
        try:
            schema = registry.get(kind, other).schema
        except UserError:  # its own fault is reported where it is chosen
            continue
        if other == name:
            yield from _places(schema, value, path)
        else:
            yield from (Place(f"{path}.{key}", other) for key in schema.model_fields)


# --- kinds of files ------------------------------------------------------------------------------

FILES = {  # kind: keys that only such a file has (a test compares the schemas), and its command
    "an experiment": (
        frozenset("imports model data training evaluation execution tracking".split()),
        "run.py train",
    ),
    "a sweep": (
        frozenset(
            "set baseline seeds rows ladder leave_one_out factorial fraction grid zip include "
            "exclude match tune max_runs".split()
        ),
        "run.py sweep",
    ),
    "a cluster file": (
        frozenset(
            "executor partition account qos constraint nodes tasks_per_node gpus_per_node "
            "cpus_per_task memory time warning_seconds setup array_parallelism runs_per_job "
            "sharding sbatch workers workers_per_gpu".split()
        ),
        "run.py submit SWEEP --cluster",
    ),
    "a published ablation": (
        frozenset("title authors year arxiv url setting sweeps tables claims".split()),
        "run.py reproduce",
    ),
}


def file_kind(data: Mapping[str, Any]) -> str | None:
    """Which kind of file has most of these keys: a key of `FILES`; None where it can't be told."""
    counts = {kind: len(keys & data.keys()) for kind, (keys, _) in FILES.items()}
    most = max(counts.values())
    kinds = [kind for kind, count in counts.items() if count == most]
    return kinds[0] if most and len(kinds) == 1 else None


def expect(located: Located, wanted: str) -> None:
    """Passes a file that may be of the `wanted` kind, a key of `FILES`.

    Raises:
        ConfigError: it is plainly of another; says which command takes it.
    """
    kind = file_kind(located.data)
    if kind is not None and kind != wanted:
        mark = located.mark(())
        raise ConfigError(f"{mark}: this is {kind}, not {wanted}; use: {FILES[kind][1]} FILE")


# --- what other trainers call it -----------------------------------------------------------------

REMARKS = {
    "training.tokens": " (steps x seq_len x global_batch_size; `train -n` says how many epochs)",
    "training.schedule.warmup_fraction": " (a share of all steps, from 0 to 1)",
    "training.schedule.min_lr_ratio": " (a share of training.lr)",
    "training.schedule.decay_fraction": " (a share of all steps)",
    "execution.micro_batch_size": " (sequences at once; gradients of the rest are accumulated)",
    "execution.checkpoint_minutes": " (minutes between checkpoints)",
    "evaluation.every_tokens": " (training tokens between evaluations)",
    "model.dropout": " (one rate for all)",
    "training.precision": " (fp32, bf16 or fp16)",
}
ADVICE = {
    "not in an experiment: train --seed N, or seeds: [0, 1, 2] in a sweep file": (
        "seed random_seed manual_seed torch_seed global_seed rng_seed"
    ),
    "not in an experiment: --runs FOLDER or $CETERIS_RUNS says where runs go": (
        "output_dir out_dir save_dir run_dir log_dir logging_dir results_dir checkpoint_dir "
        "ckpt_dir save_path output_path output"
    ),
    "not in an experiment: a run is named by the hash of its settings; for people: description": (
        "name run_name exp_name experiment_name run_id notes tags comment title"
    ),
    "not needed: batches have no workers; runs at a time: sweep --workers": (
        "num_workers n_workers dataloader_workers dataloader_num_workers num_proc pin_memory "
        "prefetch_factor"
    ),
    "not needed: the same command goes on where it was stopped": (
        "resume resume_from resume_from_checkpoint load_checkpoint auto_resume"
    ),
    "a key of sweep files, which name this experiment as their base": (
        "seeds rows ladder grid factorial zip baseline match tune leave_one_out max_runs"
    ),
    "of cluster files (submit --cluster FILE), or torchrun's": (
        "gpus num_gpus n_gpus n_gpu num_nodes nodes nnodes gpus_per_node partition time_limit "
        "world_size"
    ),
    "not possible: execution.micro_batch_size is what lowers memory": (
        "gradient_checkpointing activation_checkpointing grad_checkpointing recompute"
    ),
}
SYNONYMS = {
    "training.lr": "learning_rate max_lr peak_lr base_lr init_lr max_learning_rate",
    "training.tokens": (
        "max_tokens total_tokens num_tokens train_tokens n_tokens token_budget steps max_steps "
        "num_steps n_steps total_steps train_steps num_train_steps max_train_steps max_iters "
        "num_iters iterations num_iterations train_iters max_iterations epochs num_epochs n_epochs "
        "max_epochs num_train_epochs"
    ),
    "training.seq_len": (
        "block_size context_length context_size context_len ctx_len ctx_length n_ctx context "
        "sequence_length sequence_len seq_length max_seq_length max_length max_sequence_length"
    ),
    "model.max_seq_len": "n_positions max_position_embeddings max_positions",
    "training.global_batch_size": "batch_size batch train_batch_size total_batch_size global_batch",
    "execution.micro_batch_size": (
        "grad_accum gradient_accumulation gradient_accumulation_steps grad_accumulation "
        "accumulate_grad_batches accumulation_steps grad_accum_steps accumulate_gradients "
        "micro_batch microbatch_size device_batch_size per_device_batch_size "
        "per_device_train_batch_size"
    ),
    "training.grad_clip": (
        "max_grad_norm gradient_clipping clip_grad clip_grad_norm gradient_clip_val clip "
        "grad_norm_clip gradient_clip max_norm clip_norm grad_clip_norm"
    ),
    "training.optimizer": "optim optimiser optimizer_type optimizer_name",
    "training.optimizer.weight_decay": "wd l2 l2_reg",
    "training.optimizer.betas": "beta beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "training.optimizer.eps": "epsilon adam_eps adam_epsilon",
    "training.schedule": (
        "scheduler lr_scheduler lr_schedule lr_scheduler_type lr_decay decay_lr lr_decay_style "
        "schedule_type learning_rate_schedule"
    ),
    "training.schedule.warmup_fraction": (
        "warmup warmup_steps warmup_tokens warmup_iters warmup_ratio warmup_frac warmup_epochs "
        "num_warmup_steps lr_warmup_steps lr_warmup warm_up lr_warmup_iters"
    ),
    "training.schedule.min_lr_ratio": (
        "min_lr lr_min final_lr end_lr eta_min min_learning_rate final_lr_fraction min_lr_fraction"
    ),
    "training.schedule.decay_fraction": (
        "cooldown cooldown_steps cooldown_fraction decay_steps decay_iters lr_decay_iters warmdown "
        "lr_decay_steps warmdown_iters"
    ),
    "training.precision": (
        "dtype amp fp16 bf16 fp32 mixed_precision half float16 bfloat16 torch_dtype autocast "
        "use_amp param_dtype"
    ),
    "training.objective": "loss loss_fn criterion loss_function",
    "training.objective.z_loss": "z_loss_weight z_loss_coef z_loss_coefficient z_loss_multiplier",
    "model.d_model": (
        "n_embd n_embed hidden_size hidden_dim embed_dim embedding_dim emb_dim dim width model_dim "
        "d_embed embedding_size"
    ),
    "model.n_layers": (
        "num_layers num_hidden_layers layers depth num_blocks n_blocks num_layer decoder_layers"
    ),
    "model.n_heads": "num_heads num_attention_heads heads attention_heads num_head",
    "model.head_dim": "d_head head_size d_key d_kv attention_head_dim",
    "model.mixer": "attention attn attention_type mixer_type token_mixer",
    "model.mixer.n_kv_heads": (
        "num_kv_heads num_key_value_heads kv_heads n_query_groups num_query_groups n_kv"
    ),
    "model.mixer.window": "sliding_window window_size attention_window",
    "model.mixer.qk_norm": "qk_layernorm use_qk_norm query_key_norm qk_ln",
    "model.mixer.bias": "attention_bias qkv_bias attn_bias use_bias",
    "model.tie_embeddings": (
        "tie_word_embeddings weight_tying tie_weights share_embeddings tied_embeddings tied"
    ),
    "model.dropout": (
        "dropout_rate attn_dropout attention_dropout resid_dropout residual_dropout hidden_dropout "
        "embd_dropout embd_pdrop attn_pdrop resid_pdrop hidden_dropout_prob emb_dropout dropout_p "
        "attention_probs_dropout_prob drop_rate ffn_dropout"
    ),
    "model.norm": (
        "normalization normalisation norm_type layer_norm layernorm rmsnorm rms_norm norm_layer"
    ),
    "model.norm.eps": "norm_eps layer_norm_eps layer_norm_epsilon rms_norm_eps layernorm_epsilon",
    "model.position": (
        "pos_emb position_embedding position_embedding_type positional_encoding pos_encoding rope "
        "positional_embedding pos_embed rotary position_encoding positions alibi"
    ),
    "model.position.theta": (
        "rope_theta rotary_base rope_base rotary_emb_base rotary_theta rope_freq_base"
    ),
    "model.ffn": "mlp feed_forward feedforward mlp_type ffn_type",
    "model.ffn.hidden": (
        "d_ff d_mlp ffn_dim ffn_hidden_size intermediate_size intermediate_dim mlp_dim ffn_hidden "
        "d_hidden n_inner dim_feedforward mlp_hidden hidden_size hidden_dim mlp_ratio "
        "mlp_expansion expansion_factor"
    ),
    "model.ffn.activation": "act hidden_act activation_function act_fn nonlinearity activation_fn",
    "model.init": "initializer init_type weight_init initialization initialisation",
    "model.init.std": "initializer_range init_std init_method_std initialization_std",
    "model.block": (
        "block_type pre_norm post_norm norm_first norm_position parallel_residual norm_placement "
        "use_parallel_residual"
    ),
    "data.corpus": (
        "dataset dataset_name dataset_path data_path train_data data_dir train_file train_files"
    ),
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_type",
    "data.tokenizer.vocab_size": "n_vocab vocab vocabulary_size padded_vocab_size num_embeddings",
    "data.validation_fraction": (
        "val_fraction val_split validation_split test_size val_frac valid_fraction val_ratio "
        "eval_fraction"
    ),
    "evaluation.every_tokens": (
        "eval_interval eval_every eval_steps evaluation_interval val_every val_interval eval_freq "
        "val_check_interval eval_every_tokens"
    ),
    "evaluation.tokens": "eval_iters eval_tokens val_tokens eval_batches limit_val_batches",
    "evaluation.tasks": "eval_tasks benchmarks lm_eval_tasks",
    "evaluation.num_fewshot": "fewshot num_shots n_shot shots n_fewshot",
    "execution.device": "cuda gpu use_cuda device_type",
    "execution.compile": "torch_compile use_compile compile_model",
    "execution.threads": "num_threads n_threads cpu_threads",
    "execution.log_every": (
        "log_interval logging_steps log_steps log_freq print_every log_every_n_steps"
    ),
    "execution.checkpoint_minutes": (
        "save_every save_steps checkpoint_every save_interval ckpt_interval checkpoint_interval"
    ),
    "tracking.wandb": "wandb_log use_wandb report_to logger",
    "tracking.wandb.project": "wandb_project project_name",
    "tracking.wandb.entity": "wandb_entity wandb_team team",
    "tracking.wandb.mode": "wandb_mode",
}


def _targets() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for target, words in {**ADVICE, **SYNONYMS}.items():
        for word in words.split():
            found.setdefault(_plain(word), []).append(target)
    return found


_WORDS = _targets()
