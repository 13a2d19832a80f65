"""The task that ``fastft demo`` and the benchmarks share: its data, its model, and how an answer is scored.

MiniLM, a sentence encoder of 22 million parameters, learns whether a review is positive (the target). What it should
keep is finding the example sentence of a word's sense by the sense's definition (the source).

``ReviewProblem`` is the whole task for one choice of rows; ``split_reviews`` and ``sense_pools`` make that choice.
"""

from .classifier import Classifier, batches_by_length, fit_linear_probe
from .corpus import distinct_texts, load_senses, read_table, sense_pools, split_reviews
from .minilm import load_tokenizer, model_folder
from .reviews import ItemScores, ReviewProblem

__all__ = [
    "Classifier",
    "ItemScores",
    "ReviewProblem",
    "batches_by_length",
    "distinct_texts",
    "fit_linear_probe",
    "load_senses",
    "load_tokenizer",
    "model_folder",
    "read_table",
    "sense_pools",
    "split_reviews",
]
