"""From a request to pictures.

    import safelight
    model = safelight.load("tiny")
    for result in model.generate("a red cube on top of a blue sphere", seed=7, count=2):
        ...

`generator` is the river, `course` says what a request means on a model, `events` what a running
call tells.
"""

from safelight.generate.events import Cancel, Event, Preview, Progress
from safelight.generate.generator import Generator, load

__all__ = ["Cancel", "Event", "Generator", "Preview", "Progress", "load"]
