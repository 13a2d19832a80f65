"""Small models, files of rows, and runs of ``fastft finetune`` on them."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.commands import shell
from fastft.problems import corpus

Row = Mapping[str, Any]


all_reviews = functools.cache(corpus.load_reviews)


def review_rows(count: int, longest: int = 60) -> list[dict[str, str]]:
    """Short reviews, as many positive as negative, as ``{"id", "text", "label"}``."""
    reviews = [review for review in all_reviews() if len(review.text) <= longest]
    halves = ([r for r in reviews if r.positive][: count // 2], [r for r in reviews if not r.positive][: count // 2])
    both = [review for pair in zip(*halves, strict=True) for review in pair]
    return [
        {"id": str(i), "text": review.text, "label": "positive" if review.positive else "negative"}
        for i, review in enumerate(both)
    ]


# -- files of rows -------------------------------------------------------------------------------------------


def as_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_tsv(rows: Sequence[Row]) -> str:
    return "".join("\t".join(map(str, line)) + "\n" for line in (rows[0], *(row.values() for row in rows)))


def as_jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write the rows in the format that the file's name asks for."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
        return path
    kind = path.suffixes[-2] if path.suffix == ".gz" else path.suffix
    content = {".csv": as_csv, ".tsv": as_tsv, ".jsonl": as_jsonl}[kind](rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# -- models --------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, texts: Sequence[str], **special: str) -> None:
    """A small word tokenizer of these texts, as a user finds one beside a model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = sorted({"[UNK]", *special.values()})
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=500, special_tokens=words))
    if "cls_token" in special:
        ends = [(name, tokenizer.token_to_id(name)) for name in (special["cls_token"], special["sep_token"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=64, **special
    ).save_pretrained(folder)  # fmt: skip


def save_model(folder: Path, kind: str) -> Path:
    """A tiny model with random weights, dropout and a tokenizer: "bert" (no head), "llama" or "gpt2" (tied)."""
    import transformers

    texts = [review.text for review in corpus.load_reviews()[:400]]
    if kind == "bert":
        save_tokenizer(folder, texts, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    else:
        save_tokenizer(folder, texts, eos_token="</s>")
    sizes: dict[str, Any] = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
            model = transformers.BertModel(config)
        elif kind == "llama":
            config = transformers.LlamaConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPT2Config(vocab_size=500, n_embd=32, n_layer=3, n_head=2, n_positions=64)
            model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return folder


def minilm(folder: Path) -> Path:
    """The real MiniLM, in a folder as a user has it."""
    from fastft.problems import model_folder

    return Path(shutil.copytree(model_folder(), folder, dirs_exist_ok=True))


# -- runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a run went."""

    status: int
    out: str
    err: str


def flags(**options: Any) -> list[str]:
    """``label_column="label"`` as ``["--label-column", "label"]``; a list gives several words, True a bare flag."""
    words = []
    for name, value in options.items():
        values = [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
        words += [f"--{name.replace('_', '-')}", *values]
    return words


def finetune(**options: Any) -> Done:
    """``fastft finetune`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = shell.main(["finetune", *flags(**options)])
        except SystemExit as left:
            status = int(left.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def finetune_apart(first: str, **options: Any) -> Done:
    """``fastft finetune`` in a process of its own that executes ``first`` before, with as many threads as here."""
    program = (
        f"{first}\nimport sys\nfrom fastft.commands import shell\nsys.exit(shell.main(['finetune', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *flags(**options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
