"""Named features of pictures: what distances between sets are measured in.

A number without the name of its features says nothing: distances in CLIP's embeddings and in
Inception's are on other scales, and those of two CLIPs are too. So an extractor carries a name with
a digest of its weights, and every result carries that name.

Inception-v3 as "the" FID uses it (Heusel et al. 2017, 1706.08500: the 2,048 pooled features of the
network of 2015-12-05) is read from a TorchScript file, which brings the network and its resizing
along: NVIDIA publishes one (``inception-2015-12-05.pt``, of stylegan2-ada-pytorch). A file of
weights alone (``pt_inception-2015-12-05-….pth``) is refused: there is nothing here to check a
network of our own against, and an Inception that is nearly right gives numbers that are wrong.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight import shipped
from safelight.data.clip import CLIP, load_clip
from safelight.errors import InvalidRequest, WeightsError
from safelight.model import pick_device
from safelight.store.weights import sha256

Pictures = Iterable[Image.Image | np.ndarray]
"""PIL pictures, or uint8 ``(H, W, 3)``, of any size."""

BATCH = 64
POOL3 = 2048


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network's view of pictures.

    Attributes:
        name: network, weights and layer; part of every result.
        of: at most :data:`BATCH` pictures to float ``(N, D)``.
    """

    name: str
    of: Callable[[Sequence[Image.Image]], np.ndarray]

    def __call__(self, pictures: Pictures) -> np.ndarray:
        """Features of a stream of pictures, float32 ``(N, D)``. Only the features are held.

        Raises:
            ValueError: no pictures, or features that are not finite.
        """
        parts = [self.of(part) for part in batches(pictures)]
        if not parts:
            raise ValueError("no pictures")
        features = np.concatenate(parts).astype(np.float32, copy=False)
        if not np.isfinite(features).all():
            raise ValueError(f"{self.name} gives NaN or infinity")
        return features


def batches(pictures: Pictures, size: int = BATCH) -> Iterator[list[Image.Image]]:
    """Consecutive pictures, as RGB."""
    stream = (
        Image.fromarray(p) if isinstance(p, np.ndarray) else p.convert("RGB") for p in pictures
    )
    while part := list(islice(stream, size)):
        yield part


def clip_extractor(clip: CLIP) -> Extractor:
    """The embeddings of a CLIP, not normalised: ``clip:NAME@DIGEST``."""
    return Extractor(f"clip:{clip.name}@{clip.digest[:12]}", clip.embeddings)


def named_clip(name: str | Path | None = None, *, device: str | None = None) -> CLIP:
    """A CLIP by what people have at hand.

    Args:
        name: a folder that :func:`~safelight.data.clip.load_clip` reads; a published pipeline's
            folder with an ``image_encoder``; a shipped model. None: the tiny one.
        device: default: the best there is.
    """
    if name is None or shipped.find(name) is not None:
        return load_clip(device=device)  # the family shares one
    inner = Path(name) / "image_encoder"
    return load_clip(inner if inner.is_dir() else name, device=device)


def inception_extractor(file: str | Path, *, device: str | None = None) -> Extractor:
    """The pooled features of Inception-v3: ``inception:FILE@DIGEST:pool3``.

    TorchScript is a program: load a file only from where you would take a program.

    Args:
        file: TorchScript whose ``forward`` takes uint8 ``(N, 3, H, W)`` and gives ``(N, 2048)``;
            if it knows ``return_features``, that is set.
        device: default: the best there is.

    Raises:
        InvalidRequest: there is no such file.
        WeightsError: the file is weights alone, no TorchScript, or gives other features.
    """
    path, place = Path(file), pick_device(device)
    if not path.is_file():
        raise InvalidRequest("inception", f"no file {path}.", "Give the TorchScript file.")
    if not _is_torchscript(path):
        raise WeightsError(
            path,
            "is not TorchScript; weights alone are not read.",
            "Give a TorchScript file of the network (NVIDIA's inception-2015-12-05.pt), or leave "
            "--inception out and compare CLIP features.",
        )
    try:
        network = torch.jit.load(str(path), map_location=place).eval()
        known = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, AttributeError) as error:
        raise WeightsError(path, f"cannot be loaded: {error}") from error
    options: dict[str, Any] = {"return_features": True} if "return_features" in known else {}

    @torch.inference_mode()
    def of(pictures: Sequence[Image.Image]) -> np.ndarray:
        parts = []
        for same in _of_one_size(pictures):
            pixels = torch.from_numpy(np.stack([np.asarray(p) for p in same]))
            found = network(pixels.permute(0, 3, 1, 2).to(place), **options)
            if found.shape != (len(same), POOL3):
                raise WeightsError(
                    path, f"gives features {tuple(found.shape)}, pool3 has {POOL3} a picture."
                )
            parts.append(found.float().cpu().numpy())
        return np.concatenate(parts)

    return Extractor(f"inception:{path.name}@{sha256(path)[:12]}:pool3", of)


def _is_torchscript(path: Path) -> bool:
    """A zip archive with code; what ``torch.save`` writes has none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _of_one_size(pictures: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    """Runs of consecutive pictures that fit into one array."""
    run: list[Image.Image] = []
    for picture in pictures:
        if run and picture.size != run[0].size:
            yield run
            run = []
        run.append(picture)
    if run:
        yield run
