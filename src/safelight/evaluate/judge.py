"""The judge: a small convolutional network that names what a still-life picture shows.

It reads arrangement, shape and colour of the first thing, shape and colour of the second (or
"none"), in the canonical order of :mod:`safelight.data.stilllife.world`. It was trained on real
renders of *all* combinations (:mod:`safelight.evaluate.judge_training`), so that it can judge the
held-out ones, and it never meets a generated picture in training.

Residual blocks as in He et al. 2016 (1512.03385). The network first says where each thing is, on
an 8x8 grid, then reads what is there; training tells it the places too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.data.attributes import ATTRIBUTE_CLASSES
from safelight.errors import WeightsError
from safelight.spec import Record
from safelight.store.weights import load_into, read_weights, sha256

DIGEST = "695100e9d46d18ab130bf7d8d858adba10c1669cbbdd95a52af943dd48a364a9"
"""SHA-256 of the shipped ``family/judge/judge.safetensors``."""

BATCH = 64
_KINDS = ATTRIBUTE_CLASSES["arrangement"]
_NAMES = (ATTRIBUTE_CLASSES["shape_b"], ATTRIBUTE_CLASSES["colour_b"])


class JudgeSpec(Record):
    """The judge's shape."""

    size: int = 64
    """Pictures of other sizes are resized to this first."""
    stem: int = 24
    channels: tuple[int, ...] = (48, 112)
    blocks: tuple[int, ...] = (1, 2)
    """Residual blocks a level."""
    squeeze: int = 16
    """Channels of the grid that the overall impression is made from."""
    hidden: int = 128

    @property
    def grid(self) -> int:
        """Cells along one side of the grid on which things are looked for."""
        return self.size // 2 ** (1 + len(self.channels))


class Block(nn.Module):
    """Two normed 3x3 convolutions beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = (
            nn.Conv2d(inner, outer, 1, stride, bias=False)
            if stride != 1 or inner != outer
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x), inplace=True)


class JudgeOutput(NamedTuple):
    """What the network says of pictures."""

    logits: list[Tensor]
    """``(N, classes)`` each, in the order of ``ATTRIBUTE_CLASSES``."""
    where: Tensor
    """``(N, 2, cells)``: log-probabilities of the cell in which each thing has its middle."""


class JudgeNet(nn.Module):
    """First where the two things are, then what stands there, by one reader for both."""

    def __init__(self, spec: JudgeSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = [
            nn.Conv2d(3, spec.stem, 5, 2, 2, bias=False),
            nn.BatchNorm2d(spec.stem),
            nn.ReLU(inplace=True),
        ]
        width = spec.stem
        for channels, blocks in zip(spec.channels, spec.blocks, strict=True):
            for i in range(blocks):
                layers.append(Block(width, channels, 2 if i == 0 else 1))
                width = channels
        self.body = nn.Sequential(*layers)
        grid, hidden = spec.grid, spec.hidden
        self.squeeze = nn.Conv2d(width, spec.squeeze, 1)
        self.impression = nn.Linear(spec.squeeze * grid**2, hidden)
        self.place = nn.Conv2d(width, hidden // 2, 3, padding=1)
        self.where = nn.Linear(hidden // 2 * grid**2, 2 * grid**2)
        self.relation = nn.Sequential(
            nn.Linear(hidden + 4, hidden), nn.ReLU(), nn.Linear(hidden, _KINDS)
        )
        self.reader = nn.Sequential(
            nn.Linear(width + hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, sum(_NAMES))
        )
        steps = (torch.arange(grid) + 0.5) / grid * 2 - 1
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        self.register_buffer("cells", torch.stack([x.flatten(), y.flatten()]), persistent=False)
        self.cells: Tensor

    def forward(self, pixels: Tensor) -> JudgeOutput:
        """Read pictures ``(N, 3, size, size)`` in [-1, 1]."""
        grid = self.body(pixels)
        overall = F.relu(self.impression(F.relu(self.squeeze(grid)).flatten(1)))
        where = self.where(F.relu(self.place(grid)).flatten(1))
        where = where.unflatten(1, (2, -1)).log_softmax(-1)
        share = where.exp()
        relation = self.relation(torch.cat([overall, (share @ self.cells.T).flatten(1)], dim=1))
        seen = share @ grid.flatten(2).transpose(1, 2)  # (N, 2, width)
        both = torch.cat([seen, overall[:, None].expand(-1, 2, -1)], dim=2)
        shape, colour = self.reader(both).split(_NAMES, dim=2)
        logits = [relation, shape[:, 0, :-1], colour[:, 0, :-1], shape[:, 1], colour[:, 1]]
        return JudgeOutput(logits, where)


class Judge:
    """A judge that is ready to look at pictures."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, file: str | Path | None = None) -> Judge:
        """Load a judge from a ``.safetensors`` file with its ``.json`` beside it.

        Args:
            file: None is the shipped judge, whose digest is checked.

        Raises:
            WeightsError: a file is missing, damaged or another network's.
        """
        if file is None:
            with as_file(files("safelight").joinpath("family/judge/judge.safetensors")) as path:
                if path.exists() and sha256(path) != DIGEST:
                    raise WeightsError(path, "is not the shipped judge.", "Reinstall safelight.")
                return cls.load(path)
        path = Path(file)
        try:
            spec = JudgeSpec.model_validate_json(path.with_suffix(".json").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise WeightsError(path.with_suffix(".json"), f"is no judge's spec: {error}") from error
        net = JudgeNet(spec)
        load_into(net, read_weights(path), dtype=torch.float32)
        return cls(net)

    @torch.inference_mode()
    def classes(self, pictures: np.ndarray | Iterable[np.ndarray]) -> np.ndarray:
        """What the pictures show, in the order of ``ATTRIBUTE_CLASSES``.

        Args:
            pictures: uint8 ``(N, H, W, 3)``, or an iterable of such arrays.

        Returns:
            int64 ``(N, 5)`` class numbers.
        """
        said = []
        for part in _batches(pictures):
            pixels = resized(part, self.net.spec.size)
            logits = self.net(pixels.to(memory_format=torch.channels_last)).logits
            said.append(torch.stack([k.argmax(1) for k in logits], dim=1).numpy())
        return np.concatenate(said) if said else np.empty((0, len(ATTRIBUTE_CLASSES)), np.int64)


def resized(pictures: np.ndarray, size: int) -> Tensor:
    """uint8 ``(N, H, W, 3)`` to pixels ``(N, 3, size, size)`` in [-1, 1], antialiased."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (size, size):
        if pixels.shape[-1] % size == 0 and pixels.shape[-2] % size == 0:
            pixels = F.adaptive_avg_pool2d(pixels, size)
        else:
            pixels = F.interpolate(
                pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
    return pixels / 127.5 - 1.0


def _batches(pictures: np.ndarray | Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    parts: Iterable[np.ndarray] = [pictures] if isinstance(pictures, np.ndarray) else pictures
    for part in parts:
        for start in range(0, len(part), BATCH):
            yield part[start : start + BATCH]


def describe(classes: Sequence[int]) -> str:
    """A row of class numbers in words: "stack: red cube, blue sphere"."""
    from safelight.data.stilllife import COLOURS, SHAPES, Arrangement

    kind, shape_a, colour_a, shape_b, colour_b = (int(c) for c in classes)
    words = f"{Arrangement(kind).name.lower().replace('_', '/')}: "
    words += f"{COLOURS[colour_a]} {SHAPES[shape_a]}"
    if shape_b < len(SHAPES) or colour_b < len(COLOURS):
        words += f", {(*COLOURS, 'no')[colour_b]} {(*SHAPES, 'thing')[shape_b]}"
    return words
