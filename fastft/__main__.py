"""``python -m fastft``."""

import sys

from fastft.commands.shell import main

sys.exit(main())
