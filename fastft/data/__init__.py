"""Training data: replay old examples, augment the few there are, and examine them first."""

from fastft.data.augment import Augmented, SeededTransform
from fastft.data.duplicates import deduplicate, find_duplicates, find_leakage, remove_leakage
from fastft.data.embeddings import neftune
from fastft.data.files import read_rows, read_table
from fastft.data.images import Compose, CutMix, MixUp, RandomCrop, RandomFlip
from fastft.data.replay import ReplayMixer
from fastft.data.report import data_report
from fastft.data.selection import class_balance, coverage, select_representative
from fastft.data.text import AugmentingCollator, SpanMasking, SynonymReplacement, TextAugment, TokenDropout

__all__ = [
    "Augmented",
    "AugmentingCollator",
    "Compose",
    "CutMix",
    "MixUp",
    "RandomCrop",
    "RandomFlip",
    "ReplayMixer",
    "SeededTransform",
    "SpanMasking",
    "SynonymReplacement",
    "TextAugment",
    "TokenDropout",
    "class_balance",
    "coverage",
    "data_report",
    "deduplicate",
    "find_duplicates",
    "find_leakage",
    "neftune",
    "read_rows",
    "read_table",
    "remove_leakage",
    "select_representative",
]
