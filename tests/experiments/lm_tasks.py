"""Ordinary lm-eval tasks over a few lines of text, one of each kind of request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "the list of a tuple is not an object but its method returns None for each key é 漢 🙂".split()
)


def sentences(n: int, length: int = 12) -> list[str]:
    """`n` sentences of about `length` words, multi-byte ones among them; always the same."""
    return [
        " ".join(WORDS[(7 * i + k * k + 3 * k) % len(WORDS)] for k in range(length - i % 5))
        for i in range(n)
    ]


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], yaml: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    head = f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n"
    head += f"dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
    (folder / f"{name}.yaml").write_text(head + yaml)


def mean(*metrics: str) -> str:
    rows = [f"{{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in metrics]
    return f"metric_list: [{', '.join(rows)}]\n"


def write_tasks(folder: Path, items: int = 12) -> Path:
    """tiny_choice, tiny_pairs (empty contexts), tiny_last, tiny_perplexity, tiny_answer; the group
    tiny_both of the first two, the tag tiny_tag of the first and third."""
    text = sentences(items)
    write_task(
        folder,
        "tiny_choice",
        [
            {
                "start": t[: len(t) // 2],
                "ends": [t[len(t) // 2 :], " other words", " no"],
                "right": 0,
            }
            for t in text
        ],
        "tag: tiny_tag\noutput_type: multiple_choice\ndoc_to_text: '{{start}}'\n"
        "doc_to_choice: '{{ends}}'\ndoc_to_target: right\ntarget_delimiter: ''\n"
        + mean("acc", "acc_norm"),
    )
    write_task(
        folder,
        "tiny_pairs",
        [
            {"good": t, "bad": " ".join(reversed(t.split())), "cluster": i // 3}
            for i, t in enumerate(text)
        ],
        "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_choice: '{{[good, bad]}}'\n"
        "doc_to_target: 0\n" + mean("acc"),
    )
    write_task(
        folder,
        "tiny_last",
        [{"text": t} for t in text],
        "tag: tiny_tag\noutput_type: loglikelihood\n"
        "doc_to_text: \"{{text.split(' ')[:-1] | join(' ')}}\"\n"
        "doc_to_target: \"{{' ' + text.split(' ')[-1]}}\"\ntarget_delimiter: ''\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},\n"
        "  {metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )
    write_task(
        folder,
        "tiny_perplexity",
        [{"page": " ".join(text[i : i + 3])} for i in range(0, items, 3)],
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list:\n" + "".join(
            f"  - {{metric: {m}, aggregation: {a}, higher_is_better: false}}\n"
            for m, a in (("word_perplexity", "weighted_perplexity"),
                         ("byte_perplexity", "weighted_perplexity"),
                         ("bits_per_byte", "bits_per_byte"))
        ),
    )  # fmt: skip
    write_task(
        folder,
        "tiny_answer",
        [{"q": t, "a": t.split()[0]} for t in text],
        "output_type: generate_until\ndoc_to_text: 'Q: {{q}} A:'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['\\n', ' the'], max_gen_toks: 8, do_sample: false}\n"
        + mean("exact_match"),
    )
    (folder / "tiny_both.yaml").write_text(
        "group: tiny_both\ntask: [tiny_choice, tiny_pairs]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 1}\n"
    )
    return folder
