"""The person in front of the page lives in benchmarks/: the screenshots need them too."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
