"""When memory runs out: once more on a cheaper plan, said, and the process stays healthy."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from micro_models import ToyUNet, ToyVAE, micro_model, toy_model
from safelight.generate import Generator
from safelight.generate.thrift import TOLD, decode_in_tiles, is_out_of_memory, relieve
from safelight.request import ImageResult, Outcome

CUBE = "a red cube"
ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
]


def pixels(result: ImageResult) -> np.ndarray:
    assert result.image is not None, result.message
    return np.asarray(result.image, dtype=int)


def unet_of(generator: Generator) -> ToyUNet:
    unet = generator.model.unet
    assert isinstance(unet, ToyUNet)
    return unet


def vae_of(generator: Generator) -> ToyVAE:
    vae = generator.model.vae
    assert isinstance(vae, ToyVAE)
    return vae


def test_every_outcome_has_a_name() -> None:
    wanted = ["ok", "nsfw", "rejected", "nan_recovered", "nan", "cancelled", "out_of_memory"]
    assert [o.value for o in Outcome if o != "error"] == wanted


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: str(e)[:30])
def test_each_allocators_words_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_are_others(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", ERRORS[:2], ids=["MemoryError", "torch"])
def test_a_network_call_that_is_too_large_is_split(error: Exception) -> None:
    generator = Generator(toy_model())
    wanted = generator.generate(CUBE, seed=1, count=3, steps=2, sampler="euler")
    unet = unet_of(generator)
    unet.calls.clear()

    def poison(answer: Tensor) -> Tensor:
        if len(answer) > 1:
            raise error
        return answer

    unet.poison = poison
    results = generator.generate(CUBE, seed=1, count=3, steps=2, sampler="euler")
    assert unet.calls == [6] + [1] * (3 * 2 * 2)
    for result, clean in zip(results, wanted, strict=True):
        assert result.outcome == "ok"
        assert result.notices[-1] == TOLD
        assert result.metadata["plan"]["cheaper"] == ["rows"]
        assert result.metadata["notices"][-1] == TOLD
        assert np.abs(pixels(result) - pixels(clean)).max() <= 1
        assert "cheaper" not in clean.metadata["plan"]
    unet.poison = lambda answer: answer
    (after,) = generator.generate(CUBE, seed=1, steps=2, sampler="euler")
    assert (after.outcome, after.notices) == ("ok", ())
    assert np.array_equal(pixels(after), pixels(generator.generate(
        CUBE, seed=1, steps=2, sampler="euler")[0]))  # fmt: skip


def test_a_picture_that_is_too_large_to_decode_is_decoded_in_tiles() -> None:
    generator = Generator(toy_model())
    (wanted,) = generator.generate(CUBE, seed=1, steps=2, width=64, height=48)
    vae, sizes = vae_of(generator), []

    def poison(decoded: Tensor) -> Tensor:
        sizes.append(tuple(decoded.shape[-2:]))
        if decoded.shape[-1] > 32:
            raise MemoryError
        return decoded

    vae.poison = poison
    calls = generator.engine.calls
    (result,) = generator.generate(CUBE, seed=1, steps=2, width=64, height=48)
    assert sizes[0] == (48, 64)
    assert set(sizes[1:]) == {(32, 32)}
    assert generator.engine.calls - calls == 3  # it was denoised once (PNDM asks once more)
    assert result.outcome == "ok"
    assert result.metadata["plan"]["cheaper"] == ["tiles"]
    assert result.notices[-1] == TOLD
    # The toy's pixels hang on one cell each: tiles make no difference.
    assert np.abs(pixels(result) - pixels(wanted)).max() <= 1


@pytest.mark.parametrize("where", ["unet", "vae", "text", "checker"])
def test_what_is_too_large_even_so_is_an_outcome(where: str) -> None:
    from safety_micro import rigged

    generator = Generator(toy_model(checker=rigged([0.0])))
    model, tries = generator.model, []

    def fail(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        if where == "unet":
            patch.setattr(unet_of(generator), "poison", fail)
        elif where == "vae":
            patch.setattr(vae_of(generator), "poison", fail)
        elif where == "text":
            patch.setattr("safelight.generate.course.encode_prompts", fail)
        else:
            patch.setattr(model.checker, "cosines", fail)
        results = generator.generate(CUBE, seed=1, count=2, steps=1)
    assert [r.outcome for r in results] == ["out_of_memory"] * 2
    assert all(r.image is None and "cheaper plan" in r.message for r in results)
    assert results[0].metadata["outcome"] == "out_of_memory"
    assert len(tries) < 9  # once more, not forever
    assert [r.outcome for r in generator.generate(CUBE, seed=1, count=2, steps=1)] == ["ok"] * 2


def test_the_others_pictures_stay() -> None:
    generator = Generator(toy_model(), micro_batch=1)
    vae, count = vae_of(generator), []

    def poison(decoded: Tensor) -> Tensor:
        count.append(1)
        if 2 <= len(count) <= 6:  # the second picture: whole, then its first tile
            raise MemoryError
        return decoded

    vae.poison = poison
    results = generator.generate(CUBE, seed=1, count=3, steps=1)
    assert results[0].outcome == results[2].outcome == "ok"


def test_what_failed_is_let_go_of() -> None:
    held: list[weakref.ref[Any]] = []

    class Large:
        pass

    def compute() -> None:
        large = Large()
        held.append(weakref.ref(large))
        try:
            raise KeyError("x")
        except KeyError as first:
            raise MemoryError from first

    kept: Exception | None = None
    try:
        compute()
    except MemoryError as error:
        kept = error
    gc.collect()
    assert held[0]() is not None  # the frames of the error keep it alive
    relieve(kept)  # type: ignore[arg-type]
    assert held[0]() is None


def test_tiles_of_a_real_decoder_are_close() -> None:
    model = micro_model()
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model.vae.decode(latents)
        tiles = decode_in_tiles(model.vae.decode, latents, model.spec.vae.factor)
    assert tiles.shape == whole.shape
    assert torch.isfinite(tiles).all()
    assert (tiles - whole).abs().mean() < 0.5 * whole.std()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (5, 9), (13, 8), (64, 64)])
def test_tiles_cover_every_cell_once_in_the_sum(size: tuple[int, int]) -> None:
    """A decoder of single cells: blending must give it back exactly."""
    latents = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def decode(z: Tensor) -> Tensor:
        seen.append(z.shape[-1] * z.shape[-2])
        return torch.nn.functional.interpolate(z, scale_factor=4, mode="nearest")

    tiles = decode_in_tiles(decode, latents, 4)
    assert torch.allclose(tiles, decode(latents), atol=1e-6)
    if min(size) > 4:
        assert max(seen[:-1]) < size[0] * size[1]
