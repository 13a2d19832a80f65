"""Training data: replay old ones, augment the few there are, and look at them first."""

from fastft.data.augment import Augmented, SeededTransform
from fastft.data.duplicates import Match, deduplicate, find_duplicates, find_leakage, remove_leakage
from fastft.data.embeddings import neftune
from fastft.data.files import FileError, read_table
from fastft.data.images import Compose, CutMix, MixUp, RandomCrop, RandomFlip
from fastft.data.replay import ReplayMixer
from fastft.data.report import DataReport, data_report
from fastft.data.selection import Balance, Coverage, class_balance, coverage, select_representative
from fastft.data.text import (
    AugmentingCollator,
    SpanMasking,
    SynonymReplacement,
    TextAugment,
    TokenDropout,
    augment_from_spec,
    read_synonyms,
)

__all__ = [
    "Augmented",
    "AugmentingCollator",
    "Balance",
    "Compose",
    "Coverage",
    "CutMix",
    "DataReport",
    "FileError",
    "Match",
    "MixUp",
    "RandomCrop",
    "RandomFlip",
    "ReplayMixer",
    "SeededTransform",
    "SpanMasking",
    "SynonymReplacement",
    "TextAugment",
    "TokenDropout",
    "augment_from_spec",
    "class_balance",
    "coverage",
    "data_report",
    "deduplicate",
    "find_duplicates",
    "find_leakage",
    "neftune",
    "read_synonyms",
    "read_table",
    "remove_leakage",
    "select_representative",
]
