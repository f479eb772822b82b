"""What counts as safe: verdicts on scores, moderation, and checkers of one's own.

Three places: `nets/safety_head.py` scores, `decide` says what a score means, and
`generate/guard.py` acts. `moderation` asks a service before and after; `build` makes a checker from
sentences or pictures; `measure` says how good one is.
"""

from safelight.safety.decide import DEFAULT, decide
from safelight.safety.moderation import BATCH, ONLINE, Moderation, Moderator

__all__ = ["BATCH", "DEFAULT", "ONLINE", "Moderation", "Moderator", "decide"]
