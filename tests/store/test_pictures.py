"""Pictures: reading what people have, writing texts that other programs read."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from safelight.errors import InvalidRequest
from safelight.store.pictures import encode, open_picture, read_metadata, save

PARAMETERS = "a red cube, naïve\nNegative prompt: 中文 🎨\nSteps: 20, Sampler: DPM++ 2M, Seed: 1"
RECORD = json.dumps({"schema": 1, "prompt": "中文 🎨"}, ensure_ascii=False)


def picture(mode="RGB", size=(6, 4)) -> Image.Image:
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(values).convert(mode)


def data(image: Image.Image, format="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
@pytest.mark.parametrize("texts", [(PARAMETERS, RECORD), ("plain", "{}"), ("", "")])
def test_texts_survive_every_format(tmp_path, ending, texts):
    path = tmp_path / "new" / f"x{ending}"
    save(path, picture(), *texts)
    found = read_metadata(path)
    assert (found.parameters or "", found.json or "") == texts
    assert found.other == {}
    assert read_metadata(path.read_bytes()) == found
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.size == (6, 4)


def test_png_pixels_and_bytes_are_exact(tmp_path):
    save(tmp_path / "x.png", picture(), PARAMETERS, RECORD)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "x.png")), np.asarray(picture()))
    assert encode(picture(), "PNG", PARAMETERS, RECORD) == (tmp_path / "x.png").read_bytes()


def test_a1111_reads_what_we_write(tmp_path):
    """The web UI reads PNG's ``parameters`` and EXIF's ``UserComment`` in UTF-16, big-endian."""
    with Image.open(io.BytesIO(encode(picture(), "PNG", "plain", "{}"))) as image:
        assert image.info["parameters"] == "plain"
    raw = encode(picture(), "PNG", "plain", "{}")
    assert b"tEXtparameters\0plain" in raw
    with Image.open(io.BytesIO(encode(picture(), "JPEG", PARAMETERS, RECORD))) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")


def test_other_programs_texts_are_read():
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("prompt", '{"3": {}}')
    texts.add_itxt("invokeai_metadata", '{"é": 1}')
    found = read_metadata(data(picture(), pnginfo=texts))
    assert found.parameters is None
    assert found.other == {"prompt": '{"3": {}}', "invokeai_metadata": '{"é": 1}'}


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "a red cube".encode("utf-16-le"), "a red cube"),
        (b"ASCII\0\0\0a red cube", "a red cube"),
        (b"\0" * 8 + b"a red cube", "a red cube"),
    ],
)
def test_user_comments_of_other_writers(comment, text):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    assert read_metadata(data(picture(), "JPEG", exif=exif)).parameters == text


def test_texts_too_long_for_a_jpeg_are_refused():
    with pytest.raises(InvalidRequest, match="JPEG cannot hold"):
        encode(picture(), "JPEG", "a" * 70_000)
    assert read_metadata(encode(picture(), "PNG", "a" * 70_000)).parameters == "a" * 70_000


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt"])
def test_unknown_endings(tmp_path, name):
    with pytest.raises(InvalidRequest, match=r"Use \.png"):
        save(tmp_path / name, picture())
    assert not list(tmp_path.iterdir())


def test_every_kind_of_source(tmp_path):
    expected = np.asarray(picture())
    save(tmp_path / "x.png", picture())
    sources = [
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        data(picture()),
        picture(),
        expected,
        expected.astype(np.float32) / 255,
    ]
    for source in sources:
        assert np.array_equal(np.asarray(open_picture(source)), expected)
    grey = expected[:, :, :1]
    assert open_picture(grey).mode == "RGB"
    assert np.array_equal(np.asarray(open_picture(grey[:, :, 0]))[:, :, 2], grey[:, :, 0])


def test_rotation_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_picture(data(picture(), "PNG", exif=exif))
    assert turned.size == (4, 6)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture()), -1))


def test_alpha_is_laid_over_the_background():
    image = picture("RGBA")
    image.putalpha(0)
    assert open_picture(image).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(image, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert open_picture(image, background=None).getpixel((1, 0)) == (3, 4, 5)
    palette = picture("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert open_picture(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    found = open_picture(data(Image.fromarray(values)))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA", "P"])
def test_other_modes(mode):
    assert open_picture(picture("RGB").convert(mode)).mode == "RGB"


def bomb() -> bytes:
    """A PNG of a few bytes that claims to be 60000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "source",
    [
        "absent.png",
        b"",
        b"not a picture",
        data(picture())[:50],
        data(picture(), "JPEG")[:-100],
        bomb(),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2), np.int64),
        np.full((2, 2), np.nan),
        np.full((2, 2), 200.0),
    ],
    ids=str,
)
def test_what_is_not_a_picture_names_the_field(source):
    with pytest.raises(InvalidRequest, match=r"^mask: "):
        open_picture(source, field="mask")


def test_large_pictures_are_refused():
    with pytest.raises(InvalidRequest, match="6x4"):
        open_picture(picture(), max_pixels=20)
    with pytest.raises(InvalidRequest, match="6x4"):
        read_metadata(data(picture()), max_pixels=20)
    with pytest.raises(InvalidRequest):
        read_metadata(b"nothing")
