"""The small models are those of the optimizer's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "optimizer"))
