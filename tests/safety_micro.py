"""Micro safety checkers: random ones by the reference, and one whose cosines a test decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from safelight.checker import Checker
from safelight.nets.safety_head import Cosines, SafetyHead
from safelight.spec import PictureSpec, SafetySpec, VisionSpec
from safelight.text.tokenizer import byte_symbols

VISION = VisionSpec(
    image_size=16, patch_size=8, width=32, layers=2, heads=4, mlp_width=64, projection_width=24
)
SPEC = SafetySpec(vision=VISION, pictures=PictureSpec(resize=16, crop=16))


def reference(seed: int = 0) -> StableDiffusionSafetyChecker:
    """diffusers' checker with random weights; its thresholds flag about half of all pictures."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"num_hidden_layers": 1, "projection_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
        peer = StableDiffusionSafetyChecker(config).eval().requires_grad_(False)
        for parameter in peer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    pixels = processor()(pictures(32, seed), return_tensors="pt").pixel_values
    seen = torch.nn.functional.normalize(peer.visual_projection(peer.vision_model(pixels)[1]))
    for name, share in (("concept_embeds", 0.95), ("special_care_embeds", 0.7)):
        cosines = seen @ torch.nn.functional.normalize(getattr(peer, name)).T
        getattr(peer, f"{name}_weights").copy_(cosines.quantile(share, dim=0))
    return peer


def flag_half(peer: StableDiffusionSafetyChecker, images: Sequence[Image.Image]) -> None:
    """Thresholds that flag half of these: by the concept that tells them apart most widely, in
    the middle of the widest gap near their median."""
    with torch.no_grad():
        pixels = processor()(images, return_tensors="pt").pixel_values
        seen = torch.nn.functional.normalize(peer.visual_projection(peer.vision_model(pixels)[1]))
        cosines = (seen @ torch.nn.functional.normalize(peer.concept_embeds).T).sort(dim=0).values
        gaps = cosines[1:] - cosines[:-1]
        quarter = len(images) // 4
        inner = gaps[quarter:-quarter]
        row, concept = divmod(int(inner.argmax()), inner.shape[1])
        peer.concept_embeds_weights.fill_(1.0)
        peer.special_care_embeds_weights.fill_(1.0)
        row += quarter
        peer.concept_embeds_weights[concept] = cosines[row : row + 2, concept].mean()


def processor() -> Any:
    """The reference's processor of pictures."""
    size = {"height": 16, "width": 16}
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)


def save_reference(peer: StableDiffusionSafetyChecker, folder: Path) -> Path:
    """As a model's folder keeps them: two folders beside each other."""
    peer.save_pretrained(folder / "safety_checker")
    processor().save_pretrained(folder / "feature_extractor")
    return folder


class Rigged(SafetyHead):
    """Answers with cosines that a test chose, one row a picture; the last one again and again."""

    def __init__(self, rows: Sequence[Sequence[float]], special: Sequence[float]) -> None:
        super().__init__(VISION, concepts=len(rows[0]), special=len(special))
        self.rows, self.care, self.asked = list(rows), list(special), 0
        self.concept_embeds_weights.data.fill_(0.2)
        self.special_care_embeds_weights.data.fill_(0.2)

    def cosines(self, pixels: torch.Tensor) -> Cosines:
        found = []
        for _ in range(len(pixels)):
            found.append(self.rows[min(self.asked, len(self.rows) - 1)])
            self.asked += 1
        return Cosines(torch.tensor(found), torch.tensor([self.care] * len(found)))


def rigged(*rows: Sequence[float], special: Sequence[float] = (0.0,)) -> Checker:
    """A checker whose every threshold is 0.2 and whose cosines are these."""
    head = Rigged(rows, special)
    names = (*(f"thing {k}" for k in range(len(rows[0]))), *("care" for _ in special))
    spec = SPEC.replace(concepts=len(rows[0]), special=len(special), names=names)
    return Checker(spec, head)


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (33, 21)) -> list[Image.Image]:
    """Noise of several grains and colours, so that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        cells = torch.randint(0, 256, (2 + k % 5, 2 + k % 3, 3), generator=generator)
        image = Image.fromarray(cells.to(torch.uint8).numpy())
        found.append(image.resize(size, Image.Resampling.BICUBIC))
    return found


def byte_vocab() -> dict[str, int]:
    """CLIP's 512 byte symbols and the two specials, which is all a tokenizer needs."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
