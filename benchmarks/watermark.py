"""Does an invisible watermark from a kept library survive JPEG and resizing?

    pip install --no-deps invisible-watermark blind-watermark PyWavelets opencv-python-headless
    python -m benchmarks.watermark --count 24

Each library writes 32 fixed bits into pictures of ``tiny`` at 128, 256 and 512 pixels; then the
picture is saved as JPEG of quality 80, resized to 75 % (bicubic), or both, and read. It counts as
found where at least 25 bits are right, which by chance happens once in a thousand (binomial). The
same reading of pictures that were never marked gives the false positives. None of the libraries is
a dependency: they are measured, not shipped (docs/provenance.md).

To pass, a library must find at least 95 % of the marks after each change at every size, with at
most 1 % false positives.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from safelight.evaluate.metrics import psnr

BITS, NEEDED = 32, 25
SIZES = (128, 256, 512)
PROMPTS = (
    "a red cube on top of a blue sphere",
    "a small green cone to the left of a yellow cylinder",
    "a purple sphere in front of a gray cube",
    "a large orange cylinder",
)

Array = np.ndarray
"""Pixels, uint8 (H, W, 3), RGB."""


@dataclass(frozen=True)
class Method:
    """A library's way in and out."""

    name: str
    write: Callable[[Array, Array], Array]
    read: Callable[[Array, tuple[int, int]], Array]
    """Takes the changed picture and the first one's size, which only a generous test knows."""


def methods() -> Iterator[Method]:
    """The libraries that are installed."""
    try:
        imwatermark = import_module("imwatermark")
    except ImportError as error:
        print(f"invisible-watermark: {error}")
    else:
        for kind in ("dwtDct", "dwtDctSvd"):

            def write(pixels: Array, bits: Array, kind: str = kind) -> Array:
                encoder = imwatermark.WatermarkEncoder()
                encoder.set_watermark("bits", bits.tolist())
                return encoder.encode(pixels[:, :, ::-1].copy(), kind)[:, :, ::-1]

            def read(pixels: Array, size: tuple[int, int], kind: str = kind) -> Array:
                decoder = imwatermark.WatermarkDecoder("bits", BITS)
                return np.asarray(decoder.decode(pixels[:, :, ::-1].copy(), kind), dtype=bool)

            yield Method(f"invisible-watermark {kind}", write, read)
    try:
        WaterMark = import_module("blind_watermark").WaterMark
    except ImportError as error:
        print(f"blind-watermark: {error}")
    else:

        def write_blind(pixels: Array, bits: Array) -> Array:
            mark = WaterMark(password_img=1, password_wm=1)
            mark.read_img(img=pixels[:, :, ::-1].astype(np.float32))
            mark.read_wm(bits.astype(bool), mode="bit")
            return np.clip(mark.embed().round(), 0, 255).astype(np.uint8)[:, :, ::-1]

        def read_blind(pixels: Array, size: tuple[int, int]) -> Array:
            mark = WaterMark(password_img=1, password_wm=1)
            image = pixels[:, :, ::-1].astype(np.float32)
            return mark.extract(embed_img=image, wm_shape=BITS, mode="bit") > 0.5

        def read_told(pixels: Array, size: tuple[int, int]) -> Array:
            back = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            return read_blind(np.asarray(back), size)

        yield Method("blind-watermark", write_blind, read_blind)
        yield Method("blind-watermark, told the first size", write_blind, read_told)


def _jpeg(pixels: Array) -> Array:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80)
    return np.asarray(Image.open(out))


def _smaller(pixels: Array) -> Array:
    image = Image.fromarray(pixels)
    size = (round(image.width * 0.75), round(image.height * 0.75))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


CHANGES: dict[str, Callable[[Array], Array]] = {
    "unchanged": lambda pixels: pixels,
    "JPEG 80": _jpeg,
    "75 %": _smaller,
    "both": lambda pixels: _jpeg(_smaller(pixels)),
}


def pictures(size: int, count: int, folder: Path | None) -> list[Array]:
    """``count`` pictures of the tiny model, kept in ``folder`` between runs."""
    import safelight

    made: list[Array] = []
    model = None
    for seed in range(count):
        path = folder / f"{size}-{seed}.png" if folder else None
        if path is None or not path.is_file():
            model = model or safelight.load("tiny", device="cpu")
            prompt = PROMPTS[seed % len(PROMPTS)]
            (result,) = model.generate(prompt, seed=seed, steps=8, width=size, height=size)
            assert result.image is not None
            if path is None:
                made.append(np.asarray(result.image))
                continue
            safelight.save(result, path)
        made.append(np.asarray(Image.open(path).convert("RGB")))
    return made


def measure(method: Method, images: list[Array], bits: Array) -> str:
    """A row of the table: how often the mark is found, and where there is none."""

    def found(pixels: Array, size: tuple[int, int]) -> bool:
        try:
            return int((method.read(pixels, size) == bits).sum()) >= NEEDED
        except Exception:  # a library that cannot read a picture has not found its mark
            return False

    sizes = [(image.shape[1], image.shape[0]) for image in images]
    try:
        marked = [method.write(image, bits) for image in images]
    except Exception as error:
        return f"refused: {str(error).splitlines()[0]}"
    cells = [f"{np.mean(psnr(np.stack(images), np.stack(marked))):.1f} dB"]
    for change in CHANGES.values():
        hits = [found(change(m), s) for m, s in zip(marked, sizes, strict=True)]
        cells.append(f"{100 * np.mean(hits):.0f} %")
    wrong = [
        found(change(i), s)
        for i, s in zip(images, sizes, strict=True)
        for change in CHANGES.values()
    ]
    cells.append(f"{100 * np.mean(wrong):.1f} %")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="pictures a size")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--keep", type=Path, help="folder that keeps the pictures between runs")
    options = parser.parse_args()
    bits = np.random.default_rng(0).integers(0, 2, BITS).astype(bool)
    print(f"| library | pixels | quality | {' | '.join(CHANGES)} | found where there is none |")
    print("|---" * (4 + len(CHANGES)) + "|")
    for size in options.sizes:
        images = pictures(size, options.count, options.keep)
        for method in methods():
            print(f"| {method.name} | {size} | {measure(method, images, bits)} |", flush=True)


if __name__ == "__main__":
    main()
