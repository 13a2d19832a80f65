"""Each CPU loop of AdamW, for the sanitizers: every dtype with every kind of anchoring, masked, clipped and not.

Not named test_*: scripts/sanitize.sh runs it. What the loops compute is tested elsewhere, over the ordinary module.
"""

from __future__ import annotations

import pytest
from cuda_on_cpu.kernel_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_no_sanitizer_objects(name: str) -> None:
    assert CASES[name]()
