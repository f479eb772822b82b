"""Pictures that come with a request: read, hashed, bounded, turned upright, given again."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight import inputs, presets
from safelight.errors import InvalidRequest
from safelight.request import GenerateRequest
from safelight.store import maps, pictures


def picture(width: int = 6, height: int = 4, mode: str = "RGB") -> Image.Image:
    values = np.arange(width * height * len(mode), dtype=np.uint8).reshape(height, width, -1)
    return Image.fromarray(values.squeeze() if mode == "L" else values, mode)


def png(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def test_a_file_is_known_by_its_bytes_and_a_picture_by_its_pixels(tmp_path: Path) -> None:
    data = png(picture())
    file = tmp_path / "a.png"
    file.write_bytes(data)
    made = [GenerateRequest(image=given) for given in (file, str(file), data)]  # type: ignore[arg-type]
    wanted = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert {each.image.digest for each in made if each.image} == {wanted}
    assert made[0] == made[1] == made[2]
    file.write_bytes(b"changed afterwards")
    assert made[0].image is not None
    assert made[0].image.value == data
    pixels = [GenerateRequest(image=each) for each in (picture(), np.asarray(picture()))]  # type: ignore[arg-type]
    assert all(each.image and each.image.digest.startswith("pixels:") for each in pixels)
    changed = picture()
    changed.putpixel((0, 0), (9, 9, 9))
    assert GenerateRequest(image=changed) != pixels[0]  # type: ignore[arg-type]


def test_the_request_holds_what_was_given_when_it_was_made() -> None:
    own = picture()
    request = GenerateRequest(image=own)  # type: ignore[arg-type]
    own.putpixel((0, 0), (255, 0, 0))
    assert request.image is not None
    assert request.image.value.getpixel((0, 0)) == (0, 1, 2)  # type: ignore[union-attr]


def test_json_names_pictures_only_where_there_are_some() -> None:
    plain = GenerateRequest(prompt="a cone")
    assert not {"image", "images", "strength", "mask"} & set(json.loads(plain.canonical()))
    full = GenerateRequest(
        prompt="a cone",
        image=png(picture()),  # type: ignore[arg-type]
        mask=png(picture(mode="L")),  # type: ignore[arg-type]
        strength=0.5,
        strength_rule="diffusers",
    )
    said = json.loads(full.canonical())
    assert said["image"].startswith("sha256:")
    assert (said["strength"], said["strength_rule"]) == (0.5, "diffusers")
    again = GenerateRequest.from_json(full.canonical())
    assert again == full
    assert again.digest == full.digest
    assert again.image is not None
    assert again.image.value is None
    several = GenerateRequest(images=[picture(), picture(5)], image_weights=[1, 3])  # type: ignore[arg-type]
    assert GenerateRequest.from_json(several.canonical()) == several
    row = GenerateRequest(image_embedding=np.ones((1, 3), np.float32))  # type: ignore[arg-type]
    assert GenerateRequest.from_json(row.canonical()).image_embedding == (1.0, 1.0, 1.0)
    assert GenerateRequest.from_kwargs(image_embeds=[1, 1, 1]) == row  # diffusers' name


def test_json_opens_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    path = str(tmp_path / "a.png")
    for fields in ({"image": path}, {"images": [path]}, {"image": path, "mask": path}):
        with pytest.raises(InvalidRequest, match="is no digest"):
            GenerateRequest.from_json({"schema": 1, "prompt": "a cone", **fields})
    with pytest.raises(InvalidRequest, match="is not a file"):
        GenerateRequest(image=tmp_path)  # type: ignore[arg-type]


def test_pictures_are_given_again() -> None:
    data = png(picture())
    request = GenerateRequest(prompt="a cone", image=data, strength=0.5)  # type: ignore[arg-type]
    read = GenerateRequest.from_json(request.canonical())
    again = read.given(image=data, mask=None, depth=data)  # it has no depth
    assert again == request
    assert again.image is not None
    assert again.image.value == data
    with pytest.raises(InvalidRequest, match="image: is not the file it was made from"):
        read.given(image=png(picture(8)))
    with pytest.raises(ValueError, match="digest alone"):
        read.image.size  # type: ignore[union-attr] # noqa: B018


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"image": "/no/such/file.png"}, "image", "no file"),
    ({"image": 3}, "image", "must be a path"),
    ({"image": np.zeros((0, 3))}, "image", "shape"),
    ({"image": [b"a"], "images": [b"a"]}, "images", "several"),
    ({"image": b"a", "images": [b"b"]}, "images", "comes with image"),
    ({"image": b"a", "image_embedding": [1.0]}, "image_embedding", "comes with a picture"),
    ({"images": [b"a", b"b"], "image_weights": [1]}, "image_weights", "1 weights for 2"),
    ({"images": [b"a", b"b"], "image_weights": [1, -1]}, "image_weights", "above 0"),
    ({"image_embedding": "abc"}, "image_embedding", "row of numbers"),
    ({"image_embedding": [1, float("nan")]}, "image_embedding", "finite"),
    ({"mask": b"a"}, "mask", "needs an image"),
    ({"strength": 0.5}, "strength", "needs an image"),
    ({"image": b"a", "strength": 1.5}, "strength", "at most 1"),
    ({"image": b"a", "strength_rule": "webui"}, "strength_rule", "must be"),
    ({"image": b"a", "noise_level": 1001}, "noise_level", "at most 1000"),
    ({"image": b"a", "mask_crop": 3}, "mask_crop", "needs a mask"),
]


@pytest.mark.parametrize(("fields", "named", "says"), WRONG)
def test_wrong_pictures_are_named(fields: dict[str, Any], named: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(prompt="a cone", **fields)
    assert caught.value.field == named
    assert says in str(caught.value)


def test_no_words_are_needed_where_a_picture_is() -> None:
    assert GenerateRequest(image=b"a").prompt == ""  # type: ignore[arg-type]
    assert GenerateRequest(image_embedding=[1.0]).looks  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="prompt: is missing"):
        GenerateRequest()


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(101))
    for given in (tmp_path / "a.png", bytes(101)):
        with pytest.raises(InvalidRequest, match="Make it smaller first"):
            GenerateRequest(image=given)  # type: ignore[arg-type]


def bomb(side: int) -> bytes:
    """A PNG that says it is ``side`` pixels a side, in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + end

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_would_fill_the_memory_is_refused_undecoded() -> None:
    for side in (10_000, 100_000):
        with pytest.raises(InvalidRequest, match="image"):
            pictures.open_picture(bomb(side), field="image")
        with pytest.raises(InvalidRequest, match="mask"):
            maps.open_mask(bomb(side))
    request = GenerateRequest(image=bomb(100_000))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="image: is too large"):
        request.resolved(presets.SD_V1)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    out = io.BytesIO()
    picture(16, 8).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_pictures_stand_upright() -> None:
    request = GenerateRequest(image=turned())  # type: ignore[arg-type]
    assert request.image is not None
    assert request.image.size == (8, 16)
    assert pictures.open_picture(turned()).size == (8, 16)
    assert maps.open_mask(turned()).size == (8, 16)
    assert maps.open_depth(turned()).shape == (16, 8)


@pytest.mark.parametrize(
    ("size", "fields", "wanted"),
    [
        ((512, 512), {}, (512, 512)),
        ((517, 640), {}, (512, 640)),
        ((4000, 3000), {}, (584, 440)),
        ((64, 64), {}, (512, 512)),
        ((1000, 500), {"width": 512}, (512, 256)),
        ((1000, 500), {"width": 512, "height": 512}, (512, 512)),
    ],
)
def test_the_size_follows_the_picture(
    size: tuple[int, int], fields: dict[str, int], wanted: tuple[int, int]
) -> None:
    request = GenerateRequest(image=Image.new("RGB", size), **fields)  # type: ignore[arg-type]
    resolved = request.resolved(presets.SD_V1)
    assert (resolved.width, resolved.height) == wanted
    assert (resolved.strength, resolved.noise_level) == (0.8, None)
    large = request.resolved(presets.UNCLIP_H)
    if not fields:
        assert (large.width, large.height) == (768, 768)
    assert (large.strength, large.noise_level) == (None, 0)


def test_the_cards_defaults_of_each_system() -> None:
    image = Image.new("RGB", (50, 40))
    up = GenerateRequest(image=image).resolved(presets.X4_UPSCALER)  # type: ignore[arg-type]
    assert (up.width, up.height, up.steps, up.guidance_scale) == (192, 160, 75, 9)
    assert (up.noise_level, up.strength) == (20, None)
    huge = GenerateRequest(image=Image.new("RGB", (3000, 8)))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="more than 8192 a side"):
        huge.resolved(presets.X4_UPSCALER)
    look = GenerateRequest(image=image).resolved(presets.IMAGE_VARIATIONS)  # type: ignore[arg-type]
    assert (look.width, look.steps, look.guidance_scale, look.strength) == (512, 50, 7.5, None)
    unclip = GenerateRequest(image=image).resolved(presets.UNCLIP_L)  # type: ignore[arg-type]
    assert (unclip.steps, unclip.guidance_scale, unclip.sampler) == (20, 10, "ddim")
    text = GenerateRequest(prompt="a cone").resolved(presets.UNCLIP_L_PRIOR)
    assert (text.prior_steps, text.prior_guidance_scale) == (25, 4)
    given = {"image": image, "mask": image}
    paint = GenerateRequest(prompt="a cone", **given)  # type: ignore[arg-type]
    assert paint.resolved(presets.SD_V1_INPAINT).strength == 1
    assert paint.resolved(presets.SD_V1).strength == 1
    depth = GenerateRequest(prompt="a cone", image=image).resolved(presets.SD_V2_DEPTH)  # type: ignore[arg-type]
    assert depth.strength == 0.8


# -- masks and depth maps --------------------------------------------------------------------------


def test_masks_are_white_or_clear() -> None:
    grey = Image.fromarray(np.array([[0, 255], [128, 10]], np.uint8))
    assert np.array_equal(np.asarray(maps.open_mask(grey)), np.asarray(grey))
    assert maps.transparency(grey) is None
    clear = Image.new("RGBA", (2, 2), (255, 255, 255, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(maps.open_mask(png(clear))).tolist() == [[0, 255], [0, 0]]  # type: ignore[arg-type]


def test_depth_keeps_its_bits() -> None:
    deep = np.array([[0, 300], [60_000, 5]], np.uint16)
    assert maps.open_depth(png(Image.fromarray(deep))).tolist() == deep.tolist()
    real = np.array([[0.5, -3.0]])
    assert maps.open_depth(real).tolist() == real.tolist()
    for wrong in (np.zeros((2, 2, 3)), np.array([[np.nan]])):
        with pytest.raises(InvalidRequest, match="depth"):
            maps.open_depth(wrong)
