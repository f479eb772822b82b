"""How a model is run fast, with rounding as the only difference.

:func:`prepare` reads a model's networks once and lays them out for the machine; the networks
themselves stay as they are and remain the reference. Where nothing is known to be faster, or an
adapter or a tap is attached, the networks run as they are.

`plan` chooses, `stored` holds weights in half their memory, `layers` and `attention` are the
pieces, `unet` and `vae` the networks made of them, `prepared` what the engine calls; `caching` is
what pictures that ask for it keep from call to call, which is not exact.
"""

from safelight.runtime.caching import Saving
from safelight.runtime.plan import PLAIN, Plan, choose, explain, named
from safelight.runtime.prepared import Prepared, Row, prepare

__all__ = [
    "PLAIN",
    "Plan",
    "Prepared",
    "Row",
    "Saving",
    "choose",
    "explain",
    "named",
    "prepare",
]
