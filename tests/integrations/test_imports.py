"""fastft imports nothing of what it integrates with, and says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One process for all of it, since importing torch takes seconds.
SCRIPT = """
import json, sys
import fastft, fastft.integrations

others = ("transformers", "accelerate", "lightning", "pytorch_lightning", "peft")
report = {"imported": [name for name in others if name in sys.modules]}
for module, missing in (
    ("lightning", ("lightning", "pytorch_lightning")), ("transformers", ("accelerate",)),
    ("transformers", ("transformers",)),
):
    sys.modules.update(dict.fromkeys(missing))
    try:
        __import__(f"fastft.integrations.{module}")
    except ImportError as error:
        report[missing[0]] = str(error)
    for name in missing:
        del sys.modules[name]
print(json.dumps(report))
"""


@pytest.mark.slow
def test_imports() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report.pop("imported") == []
    for missing, said in report.items():
        extra = "lightning" if missing == "lightning" else "transformers"
        assert said.startswith(f"fastft.integrations.{extra} needs {extra}")
        assert said.endswith(f'python -m pip install "fastft[{extra}]"')
        assert "\n" not in said
    assert set(report) == {"transformers", "accelerate", "lightning"}
