"""Random numbers: one picture at a time, by its seed, never by call order.

Picture *k* of seed *s* has the noise of picture 0 of seed *s + k*. All noise is drawn in float32
on the CPU, so that it is the same on every device and in any batch.

The Brownian path is the "virtual Brownian tree" of Li et al. 2020, "Scalable Gradients for
Stochastic Differential Equations", Section 4: a dyadic tree of bridges whose nodes are keyed by
(seed, level, index), so that nothing need be stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[float, float], Tensor]
"""``noise(sigma_from, sigma_to)``: unit normal, of one picture's (or the batch's) shape."""

MAX_SEED = 2**63 - 1
_DEPTH = 16
_CELLS = 2**_DEPTH
"""Resolution of the Brownian path: a twentieth of the closest steps of a 1000-step run."""


def picture_seed(seed: int, picture: int = 0) -> int:
    """The seed of picture ``picture`` of ``seed``: their sum, wrapped into 0..2^63-1."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is outside 0..{MAX_SEED}")
    return (seed + picture) % (MAX_SEED + 1)


def _keyed(shape: Sequence[int], *key: object) -> np.ndarray:
    """Unit normal float32 from a counter-based generator keyed by all of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def initial_noise(seed: int, shape: Sequence[int], picture: int = 0) -> Tensor:
    """The noise a picture starts from.

    For seeds below 2^32 this is what diffusers draws, in float32, for
    ``generator=torch.Generator("cpu").manual_seed(seed)``. PyTorch's CPU generator ignores all
    higher bits of a seed: larger ones are keyed by all 63 bits here instead, so that no two seeds
    share a picture.

    Args:
        seed: 0..2^63-1.
        shape: of one picture, ``(4, H/8, W/8)``; a leading 1 is allowed and changes nothing.

    Returns:
        float32 on the CPU, of ``shape``.
    """
    seed = picture_seed(seed, picture)
    if seed >= 2**32:
        return torch.from_numpy(_keyed(shape, "initial", seed))
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def stream(seed: int, shape: Sequence[int], name: str) -> Tensor:
    """One picture's noise for one purpose beside its latents: an encoder's posterior, a noised
    embedding. Streams of different names share nothing.

    Returns:
        unit normal, float32 on the CPU, of ``shape``.
    """
    return torch.from_numpy(_keyed(shape, "stream", name, picture_seed(seed)))


def _cell(sigma: float, cells: int = _CELLS) -> int:
    """Time of a noise level: the angle ``atan(sigma)`` of the VP circle
    (``x = cos(angle) x0 + sin(angle) eps``), 0 at no noise and ``cells`` at nothing but noise.

    Whole numbers, so that the last bit of a logarithm on another machine cannot change the key.
    """
    return round(math.atan(sigma) / (math.pi / 2) * cells)


def step_noise(seed: int, shape: Sequence[int], picture: int = 0, *, name: str = "step") -> Noise:
    """Independent noise for every step, keyed by (seed, sigma_from, sigma_to).

    Asking again for a step gives the same noise; the number and order of other steps play no part.
    Another ``name`` is another, independent source.
    """
    seed = picture_seed(seed, picture)

    def noise(sigma_from: float, sigma_to: float) -> Tensor:
        key = (name, seed, _cell(sigma_from, 2**24), _cell(sigma_to, 2**24))
        return torch.from_numpy(_keyed(shape, *key))

    return noise


class BrownianPath:
    """A Brownian path W over noise levels, fixed by a seed: ``W(sigma)`` is always the same tensor.

    Time is ``atan(sigma) * 2/pi``, from 0 to 1. Hence increments add up, W(a→c) = W(a→b) + W(b→c),
    whatever is asked first, and a run with more steps refines the noise of a run with fewer.
    Levels are resolved to 1.5e-5 of that range. A new level costs at most 16 draws of ``shape``;
    the last one, and the nodes above it, are kept.
    """

    def __init__(self, seed: int, shape: Sequence[int], picture: int = 0) -> None:
        self._seed = picture_seed(seed, picture)
        self._shape = tuple(shape)
        zero = np.zeros(self._shape)
        whole = (0, _CELLS, zero, self._normal(0, 0).astype(np.float64))
        self._last: tuple[int, np.ndarray] = (0, zero)
        self._trail: list[tuple[int, int, np.ndarray, np.ndarray]] = [whole]

    def _normal(self, level: int, index: int) -> np.ndarray:
        return _keyed(self._shape, "brownian", self._seed, level, index)

    def _at(self, cell: int) -> np.ndarray:
        last, w_last = self._last
        if cell == last:
            return w_last
        trail = self._trail
        while len(trail) > 1 and not trail[-1][0] <= cell <= trail[-1][1]:
            trail = trail[:-1]
        trail = list(trail)
        low, high, w_low, w_high = trail[-1]
        while low != cell and high != cell:
            # Bridge: given both ends, the middle is normal around their mean with variance
            # length / 4 (length in units of the whole path).
            middle = (low + high) // 2
            std = math.sqrt((high - low) / _CELLS / 4)
            w = (w_low + w_high) / 2 + std * self._normal(len(trail), middle)
            if cell <= middle:
                high, w_high = middle, w
            else:
                low, w_low = middle, w
            trail.append((low, high, w_low, w_high))
        w = w_low if cell == low else w_high
        # Caches only, each replaced by one assignment: threads cannot see them half made.
        self._trail, self._last = trail, (cell, w)
        return w

    def increment(self, sigma_from: float, sigma_to: float) -> Tensor:
        """``W(sigma_to) - W(sigma_from)``, float64, variance the time between them."""
        start = self._at(_cell(sigma_from))  # first: most often the end of the step before
        return torch.from_numpy(self._at(_cell(sigma_to)) - start)

    def __call__(self, sigma_from: float, sigma_to: float) -> Tensor:
        """The increment scaled to unit variance, float32, as solvers want it.

        It takes its sign from the forward direction of time, so a step from high to low noise
        and the same step asked backwards differ by sign.
        """
        length = abs(_cell(sigma_to) - _cell(sigma_from)) / _CELLS
        if length == 0:  # closer than the path resolves
            key = ("gap", self._seed, sigma_from, sigma_to)
            return torch.from_numpy(_keyed(self._shape, *key))
        return (self.increment(sigma_from, sigma_to) / math.sqrt(length)).float()


def brownian_noise(seed: int, shape: Sequence[int], picture: int = 0) -> Noise:
    """:class:`BrownianPath` as a noise source, for SDE solvers and ancestral ones."""
    return BrownianPath(seed, shape, picture)


def sequential(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Noise:
    """Noise from one generator in call order, as diffusers draws it. For comparisons."""

    def noise(sigma_from: float, sigma_to: float) -> Tensor:
        device = generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)

    return noise


def batched(sources: Sequence[Noise]) -> Noise:
    """One source a picture, stacked along a new first dimension."""

    def noise(sigma_from: float, sigma_to: float) -> Tensor:
        return torch.stack([source(sigma_from, sigma_to) for source in sources])

    return noise
