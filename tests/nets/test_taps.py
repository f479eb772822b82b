"""Taps see what the layers put out, in order, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safelight import presets
from safelight.nets.clip import TextTower, VisionTower
from safelight.nets.taps import taps, text_taps, unet_taps, vae_taps, vision_taps
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE

SPEC = presets.TINY_UNET.replace(channels=(16, 32), context_width=8, norm_groups=8)


def run(unet: UNet) -> torch.Tensor:
    return unet(torch.ones(2, 4, 8, 8), torch.tensor([3, 700]), torch.ones(2, 5, 8))


def test_blocks_in_running_order_with_gradients() -> None:
    unet = UNet(SPEC)
    with taps(unet, unet_taps(SPEC)) as seen:
        out = run(unet)
    assert list(seen) == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert seen["down_blocks.0"].shape == (2, 16, 4, 4)
    assert seen["up_blocks.1"].shape == (2, 16, 8, 8)
    seen["mid_block"].square().mean().backward()
    assert unet.conv_in.weight.grad is not None
    assert not any(part._forward_hooks for part in unet.modules())
    assert torch.equal(out, run(unet))


def test_every_listed_name_exists_and_runs_in_the_listed_order() -> None:
    for spec in (
        SPEC,
        SPEC.replace(class_embedding="table", class_embedding_size=4),
        presets.TINY_UNET.replace(attention=(True, False), layers_per_block=2),
    ):
        unet = UNet(spec)
        vector = torch.tensor([1]) if spec.class_embedding == "table" else None
        context = torch.ones(1, 5, spec.context_width)
        names = unet_taps(spec, layers=True)
        with torch.no_grad(), taps(unet, names[::-1]) as seen:
            unet(torch.ones(1, 4, 8, 8), torch.tensor(3), context, vector)
        assert list(seen) == names


def test_a_callback_sees_instead_of_the_dictionary() -> None:
    module, reported = nn.Sequential(nn.Identity(), nn.Identity()), []
    with taps(module, ["1", "0"], on=lambda name, value: reported.append((name, value))) as seen:
        module(torch.ones(()))
    assert ([name for name, _ in reported], seen) == (["0", "1"], {})


@pytest.mark.parametrize(
    ("network", "names", "spec"),
    [
        (UNet, unet_taps, presets.SD_V1.unet),
        (UNet, unet_taps, presets.SD_SMALL.unet),
        (UNet, unet_taps, presets.UNCLIP_H.unet),
        (UNet, unet_taps, presets.X4_UNET),
        (VAE, vae_taps, presets.SD_V1.vae),
        (VAE, vae_taps, presets.X4_VAE),
        (TextTower, text_taps, presets.OPENCLIP_H_TEXT),
        (VisionTower, vision_taps, presets.CLIP_L_VISION),
    ],
)
def test_published_sizes_have_every_listed_name(network: type, names: object, spec: object) -> None:
    with torch.device("meta"):
        parts = dict(network(spec).named_modules())
    blocks, layers = names(spec), names(spec, layers=True)
    assert set(blocks) < set(layers) <= set(parts)
    # Together the layers hold every tensor but a transformer's embeddings of its own.
    covered = {f"{name}.{key}" for name in layers for key in parts[name].state_dict()}
    assert covered >= set(parts[""].state_dict())


def test_small_and_v1_share_their_block_names() -> None:
    assert unet_taps(presets.SD_SMALL.unet) == unet_taps(presets.SD_V1.unet)


def test_the_first_of_several_outputs_is_taken() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x + 1, None

    module = nn.Sequential(Two())
    with taps(module, ["0", ""]) as seen:
        module(torch.zeros(1))
    assert {name: value.item() for name, value in seen.items()} == {"0": 1, "": 1}


def test_unknown_names_are_an_error_and_a_failure_leaves_no_hook() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError, match=r"no submodules 1, mid"), taps(module, ["0", "1", "mid"]):
        pass
    with pytest.raises(ZeroDivisionError), taps(module, ["0"]):
        raise ZeroDivisionError
    assert not module[0]._forward_hooks
