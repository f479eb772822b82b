"""Mean and spread of a training set's CLIP embeddings (Karlo's ``ViT-L-14_stats.th``).

unCLIP on CLIP L adds noise to *normalised* picture embeddings. The original keeps the statistics
beside its checkpoints and never inside: without them such a checkpoint is not complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from safelight.errors import WeightsError
from safelight.store.weights import Entry, StateDict, read_weights


def read_clip_stats(path: str | Path, width: int | None = None) -> StateDict:
    """Read a statistics file.

    Args:
        path: a pickled tuple (mean, std), or a file with tensors of these names.
        width: of the embeddings that it must be for.

    Returns:
        ``mean`` and ``std``, each ``(1, width)``, unread.

    Raises:
        WeightsError: it is something else, of another width, or has a spread that is not above 0.
    """
    path = Path(path)
    mean, std = _pair(path)
    found = {"mean": _row(path, mean), "std": _row(path, std)}
    shapes = {entry.shape for entry in found.values()}
    size = next(iter(shapes))[1]
    if len(shapes) > 1 or (width is not None and size != width):
        what = f"{mean.shape} and {std.shape}, not of {width or size} numbers each"
        raise WeightsError(path, f"holds statistics {what}.", "They are of another CLIP.")
    state = StateDict(found, path)
    if not bool(torch.isfinite(state["mean"]).all()) or not bool((state["std"] > 0).all()):
        raise WeightsError(path, "its mean or std is not a usable number.")
    return state


def identity(width: int, path: Path) -> StateDict:
    """Statistics that change nothing: what OpenCLIP H's unCLIP was trained with."""
    return StateDict.of({"mean": torch.zeros(1, width), "std": torch.ones(1, width)}, path)


def _pair(path: Path) -> tuple[Entry, Entry]:
    from safelight.store.adapter_files import is_pickle

    if is_pickle(path):
        from safelight.store.pickles import read_tree

        tree = read_tree(path)
    else:
        tree = dict(read_weights(path).entries)
    if isinstance(tree, Mapping):
        tree = (tree.get("mean"), tree.get("std"))
    if isinstance(tree, tuple) and len(tree) == 2:
        mean, std = tree
        if isinstance(mean, Entry) and isinstance(std, Entry):
            return mean, std
    raise WeightsError(path, "holds no statistics: expected a tuple (mean, std).")


def _row(path: Path, entry: Entry) -> Entry:
    size = max(entry.shape, default=0)
    if not entry.dtype.is_floating_point or entry.shape not in ((size,), (1, size)) or not size:
        raise WeightsError(path, f"holds a tensor {entry.shape}, not a row of numbers.")
    return entry.derive((1, size), lambda t: t.float().reshape(1, size))._replace(
        dtype=torch.float32
    )
