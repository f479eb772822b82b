"""AzureML calls init() and run() of this file. What they do: safelight.serve.score_batch."""

from safelight.serve.score_batch import init, run

__all__ = ["init", "run"]
