"""The tiny decoder against ``AutoencoderTiny``, and its files in both published layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from safelight.errors import InvalidRequest, WeightsError
from safelight.model import Model
from safelight.nets.tiny_decoder import TinyDecoder
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.parts import load_tiny_decoder
from safelight.runtime import choose
from safelight.runtime.tiny_decoder import FusedTinyDecoder
from safelight.spec import ModelSpec, TinyDecoderSpec, UNetSpec, VAESpec

SHAPES = {
    "published": ((64, 64, 64, 64), (3, 3, 3, 1)),
    "the family's": ((16, 16, 16, 16), (4, 4, 3, 1)),
    "two levels": ((24, 24), (2, 1)),
}


def peer(channels: tuple[int, ...], blocks: tuple[int, ...]) -> AutoencoderTiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=blocks[::-1],
            num_decoder_blocks=blocks,
        ).eval()


def latents(size: int = 8) -> torch.Tensor:
    return 2 * torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(SHAPES))
def test_parity_with_the_published_layout(name: str, tmp_path: Path) -> None:
    theirs = peer(*SHAPES[name])
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_tiny_decoder(tmp_path)
    assert (ours.spec.channels, ours.spec.blocks) == SHAPES[name]
    with torch.no_grad():
        (expected,) = theirs.decode(latents(), return_dict=False)
        assert torch.allclose(ours(latents()), expected, atol=1e-5)
    assert float(expected.std()) > 0.01
    spec = ModelSpec(name="m", unet=UNetSpec(channels=(32,), attention=(True,), heads=(2,),
                     only_cross_attention=(False,)), vae=VAESpec())  # fmt: skip
    plan = choose(Model(spec=spec, unet=UNet(spec.unet), vae=VAE(VAESpec(channels=(32,)))))
    assert plan.fused
    with torch.inference_mode():
        assert torch.allclose(FusedTinyDecoder(ours, plan)(latents()), expected, atol=1e-4)


def test_its_authors_own_file_counts_one_more(tmp_path: Path) -> None:
    theirs = peer(*SHAPES["two levels"])
    state = theirs.decoder.state_dict()
    split = {k.removeprefix("layers.").partition(".")[::2]: v for k, v in state.items()}
    moved = {f"{int(place) + 1}.{rest}": v for (place, rest), v in split.items()}
    save_file(moved, tmp_path / "taesd_decoder.safetensors")
    ours = load_tiny_decoder(tmp_path / "taesd_decoder.safetensors")
    with torch.no_grad():
        (expected,) = theirs.decode(latents(), return_dict=False)
        assert torch.allclose(ours(latents()), expected, atol=1e-5)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no tiny decoder"):
        load_tiny_decoder(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no tiny decoder"):
        load_tiny_decoder(tmp_path / "nothing")


def test_a_decoder_of_another_autoencoder_is_refused() -> None:
    unet = UNetSpec(channels=(32,), attention=(True,), heads=(2,), only_cross_attention=(False,))
    spec = ModelSpec(name="m", unet=unet, vae=VAESpec(channels=(32, 32)))
    tiny = TinyDecoder(TinyDecoderSpec())  # eight times, not twice
    with pytest.raises(InvalidRequest, match="tiny_decoder"):
        Model(spec=spec, unet=UNet(unet), vae=VAE(spec.vae), tiny_decoder=tiny)
