"""AzureML calls init() and run() of this file. What they do: safelight.serve.score."""

from safelight.serve.score import init, run

__all__ = ["init", "run"]
