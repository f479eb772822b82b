"""Weights held in float16: the numbers of before, in half the memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.conditioning import Conditioning
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.model import Model
from safelight.nets import lora
from safelight.nets.taps import taps
from safelight.runtime import PLAIN, Row, prepare, stored
from safelight.store.folder import write_folder
from safelight.store.pages import release
from safelight.store.weights import read_weights, save_safetensors


@pytest.fixture(scope="module")
def speed() -> Model:
    return Model.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def small() -> Model:
    return Model.load("tiny", device="cpu", plan="low-memory")


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rows(model: Model) -> list[Row]:
    x = _draw(0, 1, 4, 16, 16)
    tokens = _draw(1, 2, 8, model.spec.unet.context_width)
    return [Row(x, 500.0, Conditioning(each)) for each in tokens]


def _bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _decibels(a: Any, b: Any) -> float:
    one, other = (torch.tensor(list(i.tobytes()), dtype=torch.float64) for i in (a, b))
    error = float((one - other).square().mean())
    return float("inf") if error == 0 else 10 * float(torch.tensor(255.0**2 / error).log10())


def test_half_the_memory(speed: Model, small: Model) -> None:
    for name in ("unet", "vae"):
        assert _bytes(small.networks[name]) < 0.6 * _bytes(speed.networks[name])
    assert small.dtype == torch.float32
    assert "halved" in small.kernels
    assert "packed" not in small.kernels
    # Who asks a network what it computes in asks its first weights.
    for net in (small.unet, small.vae):
        assert next(net.parameters()).dtype == torch.float32


def test_the_shipped_model_gives_the_same_numbers(speed: Model, small: Model) -> None:
    """Its files are in float16, so that nothing is lost."""
    rows = _rows(speed)
    expected = prepare(speed, PLAIN).predict(rows)
    for found in (small.runtime.predict(rows), prepare(small, PLAIN).predict(rows)):
        assert float((found - expected).abs().max() / expected.std()) < 1e-4
    latents = _draw(3, 1, 4, 16, 16)
    expected = speed.vae.decode(latents)
    assert float((small.runtime.decode(latents) - expected).square().mean() / 4) < 1e-9
    pixels = _draw(4, 1, 3, 64, 64).clamp(-1, 1)
    expected = speed.vae.encode(pixels).mean
    assert float((small.runtime.encode(pixels).mean - expected).abs().max()) < 1e-3


def test_pictures_of_every_plan() -> None:
    pictures = {}
    for plan in ("reference", "speed", "low-memory"):
        generator = Generator(Model.load("tiny", device="cpu", plan=plan))
        found = generator.generate("a red cube", seed=3, steps=6)[0]
        assert found.image is not None
        pictures[plan] = found.image
        kernels = found.metadata.get("kernels") or generator.model.kernels
        assert ("fused" in kernels) == (plan != "reference")
    for plan in ("speed", "low-memory"):
        assert _decibels(pictures[plan], pictures["reference"]) > 80  # 50 is promised


def test_hooks_and_adapters(small: Model) -> None:
    rows = _rows(small)
    without = small.runtime.predict(rows)
    with taps(small.unet, ["mid_block"]) as seen:
        tapped = small.runtime.predict(rows)
    assert "mid_block" in seen
    assert float((tapped - without).abs().max()) < 1e-4
    paths = lora.targets(small.unet, lora.UNET_ATTENTION)
    adapter = lora.fresh(small.unet, paths, generator=torch.Generator().manual_seed(0))
    for pair in adapter.pairs.values():
        pair.up.data.fill_(0.1)
    with lora.attach(small.unet, [(adapter, 1.0)]):
        attached = small.runtime.predict(rows)
    twin = Model(
        spec=small.spec, unet=small.unet, vae=small.vae, plan="low-memory", text=small.text
    )
    twin.unet = lora.merge(small.unet, [(adapter, 1.0)])  # type: ignore[assignment]
    assert stored.is_stored(twin.unet)
    merged = twin.runtime.predict(rows)
    assert float((attached - without).abs().max()) > 1e-2
    assert float((merged - attached).abs().max() / attached.std()) < 5e-3  # rounded once


def test_what_float16_cannot_hold_stays() -> None:
    layer = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    next(layer.parameters()).data[3, 4] = 1e6
    x = _draw(0, 5, 32)
    layer.requires_grad_(False)
    expected = layer[0](x)
    stored.store(layer)
    assert [part.weight.dtype.itemsize for part in layer] == [4, 2, 4]  # type: ignore[union-attr]
    assert torch.equal(layer[0](x), expected)


def test_the_buffer_is_a_thread_s_own_and_grows() -> None:
    one, two = _draw(0, 20, 17).half(), _draw(1, 40, 17).half()
    assert torch.equal(stored.whole(one), one.float())
    assert torch.equal(stored.whole(one, two), torch.cat([one, two]).float())
    assert stored.whole(one.float()).dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system how much is resident")
def test_pages_of_files_are_given_back(tmp_path: Path) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    save_safetensors(tmp_path / "w.safetensors", {"w": _draw(0, 4096, 2048)})
    mapped = read_weights(tmp_path / "w.safetensors")["w"]
    own = mapped.clone()
    before = resident()
    release(mapped, own)
    assert before - resident() > 0.9 * mapped.nbytes
    assert torch.equal(mapped, own)


def test_a_folder_in_float32_is_halved_too(speed: Model, tmp_path: Path) -> None:
    assert speed.text is not None
    states = {name: net.state_dict() for name, net in speed.networks.items() if name != "vision"}
    write_folder(tmp_path, speed.spec.replace(vision=None), states, speed.tokenizer)
    model = Model.load(tmp_path, device="cpu", plan="low-memory")
    rows = _rows(speed)
    expected = speed.runtime.predict(rows)
    found = model.runtime.predict(rows)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4
    assert model.unet.mid_block.resnets[0].conv1.weight.dtype == torch.float16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"plan": "fast"}, "unknown plan"),
        ({"plan": "low-memory", "dtype": "bfloat16"}, "float32"),
    ],
)
def test_plans_that_mean_nothing(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Model.load("tiny", device="cpu", **given)
