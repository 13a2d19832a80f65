"""Retention: measure what was forgotten, see where the weights went, and take some of it back.

>>> import torch, fastft
>>> from fastft.retention import RetentionReport, best_alpha, drift_report, interpolate_
>>> _ = torch.manual_seed(0)
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> anchor = fastft.Anchor.snapshot(model)
>>> inputs = torch.randn(200, 4)
>>> old, new = inputs[:, 0] > 0, inputs[:, 1] > 0  # what the model could do, and what it learns

Score the model on both before and after, item by item:

>>> def evaluate(model):
...     answers = model(inputs).argmax(1) == 1
...     return {"source": answers == old, "target": answers == new}
>>> def train(labels):
...     optimizer = fastft.AdamW(model.parameters(), lr=0.02)
...     for _ in range(50):
...         optimizer.zero_grad()
...         torch.nn.functional.cross_entropy(model(inputs), labels.long()).backward()
...         optimizer.step()
>>> train(old)
>>> before, anchor = evaluate(model), fastft.Anchor.snapshot(model)
>>> train(new)
>>> after = evaluate(model)
>>> report = RetentionReport({"left or right": before["source"]}, {"up or down": before["target"]})
>>> result = report.add("AdamW", source={"left or right": after["source"]}, target={"up or down": after["target"]})
>>> result.source["left or right"].forgetting.value > 10  # points
True

``print(report)`` is a table with bootstrap intervals, ``report.plot(path)`` draws the trade-off, ``drift_report`` shows
how far the weights went in which layers, and ``best_alpha`` finds how far to go back:

>>> drift_report(model, anchor).total.relative > 0.1
True
>>> search = best_alpha(model, anchor, evaluate, min_target=0.8)
>>> with interpolate_(model, anchor, search.alpha):
...     kept = evaluate(model)["source"].float().mean() > after["source"].float().mean()
>>> bool(kept)
True

Against forgetting: before training, ``fit_head_`` (so that a new head does not start at random); while training, beside
the anchor in the step itself, ``distillation_loss`` (an anchor on outputs), ``child_tuning_`` and ``MoFO`` (move only
some of the weights), ``estimate_fisher`` (which weights matter), and ``fastft.optim``'s ``AnchorDecayScheduler`` and
``RecAdamScheduler``.
"""

from fastft.retention.distill import FrozenBase, distillation_loss
from fastft.retention.drift import DriftReport, drift_report
from fastft.retention.fisher import Fisher, estimate_fisher
from fastft.retention.head import fit_head_, linear_probe
from fastft.retention.interpolate import best_alpha, interpolate_
from fastft.retention.masks import MoFO, child_tuning_
from fastft.retention.report import Estimate, RetentionReport, Scores, backward_transfer, hypervolume, pareto_front

__all__ = [
    "DriftReport",
    "Estimate",
    "Fisher",
    "FrozenBase",
    "MoFO",
    "RetentionReport",
    "Scores",
    "backward_transfer",
    "best_alpha",
    "child_tuning_",
    "distillation_loss",
    "drift_report",
    "estimate_fisher",
    "fit_head_",
    "hypervolume",
    "interpolate_",
    "linear_probe",
    "pareto_front",
]
