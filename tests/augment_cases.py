"""Tokenizers and rows for the tests of fastft.data's augmentations."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["good", "great", "fine", "bad", "poor", "film", "movie", "the", "a", "was", "is", "not", "very", "plot"]
WORDS += ["actor", "scene", "it", "long", "short", "slow", "feel", "ing", "feeling"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces() -> Any:
    """A small tokenizer of BERT's kind, with ``##`` for what goes on with a word."""
    import transformers
    from tokenizers import BertWordPieceTokenizer

    pieces = BertWordPieceTokenizer({word: i for i, word in enumerate([*SPECIAL, *WORDS, "##ing", "##s", ".", ","])})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_pairs() -> Any:
    """A small tokenizer of GPT-2's kind, with ``Ġ`` for what begins a word; it has no mask token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(WORDS)) | set("Ġ.GM"))
    whole = ["feel", "ing", "good", "great", "Good", "Great"]
    vocabulary = ["<|end|>", *letters]
    merges = []
    for word in [*(f"Ġ{word}" for word in whole), *whole]:  # the first merge that applies is taken
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|end|>", unk_token="<|end|>", pad_token="<|end|>"
    )


def texts(count: int, seed: int = 0, most: int = 30) -> list[str]:
    """Different texts of 0 to ``most`` words, the first two empty and of one word."""
    draw = random.Random(seed)
    return ["", "good", *(" ".join(draw.choices(WORDS, k=draw.randint(2, most))) for _ in range(count - 2))]


class Padded:
    """A collate function: pads ``input_ids`` and stacks ``labels``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self.tokenizer.pad(examples, return_tensors="pt")
