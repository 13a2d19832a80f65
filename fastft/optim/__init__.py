"""The optimizer: ``AdamW``, its functional twin ``adamw_``, and the same update in plain PyTorch, ``reference``."""

from fastft.optim import reference
from fastft.optim.adamw import AdamW
from fastft.optim.functional import adamw_

__all__ = ["AdamW", "adamw_", "reference"]
