"""The parity machinery lives in benchmarks/ (the full-size command uses it too)."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
