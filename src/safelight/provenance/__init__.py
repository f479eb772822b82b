"""What a picture says about how it was made: writing, reading, checking it; making it again.

``record`` writes and reads the settings, ``again`` makes a picture again, ``signing`` is C2PA with
the user's own key (extra ``sign``), ``verify`` reads every mark and says what it proves.
"""

from safelight.provenance.again import LOSSY, Difference, Replay, compare, replay
from safelight.provenance.record import (
    KIND,
    NUMERICS,
    SCHEMA,
    Provenance,
    digest,
    encode,
    from_parameters,
    metadata,
    parameters_text,
    parse_parameters,
    pixel_digest,
    plan,
    read,
    save,
)
from safelight.provenance.signing import Signer
from safelight.provenance.verify import Finding, Report, verify

__all__ = [
    "KIND",
    "LOSSY",
    "NUMERICS",
    "SCHEMA",
    "Difference",
    "Finding",
    "Provenance",
    "Replay",
    "Report",
    "Signer",
    "compare",
    "digest",
    "encode",
    "from_parameters",
    "metadata",
    "parameters_text",
    "parse_parameters",
    "pixel_digest",
    "plan",
    "read",
    "replay",
    "save",
    "verify",
]
