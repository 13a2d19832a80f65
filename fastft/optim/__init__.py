"""The optimizer: ``AdamW``, its functional twin ``adamw_``, and the same update in plain PyTorch, ``reference``.

Also the float32 that 16-bit weights and 8-bit moments stand for, a learning rate for each layer, schedules, and the
numbers of a run.
"""

from fastft.optim import reference
from fastft.optim.adamw import AdamW
from fastft.optim.anchor_schedules import AnchorDecayScheduler, RecAdamScheduler
from fastft.optim.functional import adamw_
from fastft.optim.in_backward import StepInBackward, step_in_backward
from fastft.optim.layer_lr import biases_and_norms, layerwise_lr
from fastft.optim.master import full_precision_state, master_weights
from fastft.optim.planning import TrainingPlan, plan_training
from fastft.optim.schedules import RewarmLR, SlantedTriangularLR, warm_up_then_decay

__all__ = [
    "AdamW",
    "AnchorDecayScheduler",
    "RecAdamScheduler",
    "RewarmLR",
    "SlantedTriangularLR",
    "StepInBackward",
    "TrainingPlan",
    "adamw_",
    "biases_and_norms",
    "full_precision_state",
    "layerwise_lr",
    "master_weights",
    "plan_training",
    "reference",
    "step_in_backward",
    "warm_up_then_decay",
]
