"""What a run sees: a function of (seed, number); bad samples are replaced and listed; buckets."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_sets import SET, picture, png, sidecar_folder
from PIL import Image

from safelight.data.bucketed import Bucketed, sizes_of
from safelight.data.framing import BucketPlan, buckets, crop, nearest, populated
from safelight.data.reader import Reader, shuffled
from safelight.data.sources import open_source
from safelight.errors import InvalidRequest


def test_a_picture_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    source = open_source(sidecar_folder(tmp_path))
    a, b = (Reader(source, seed=3, size=12, mirror=True) for _ in range(2))
    numbers = list(range(40))
    forward = {i: a[i] for i in numbers}
    backward = {i: b[i] for i in reversed(numbers)}
    for i in numbers:
        assert forward[i][1:] == backward[i][1:]
        np.testing.assert_array_equal(forward[i].pixels, backward[i].pixels)
    assert {s.mirrored for s in forward.values()} == {True, False}
    assert len({s.crop.left for s in forward.values()}) > 3
    other = Reader(source, seed=4, size=12)
    assert [other[i].key for i in numbers] != [forward[i].key for i in numbers]
    # Each epoch shows every picture once, in an order of its own.
    epochs = [[forward[i].place for i in range(e, e + 6)] for e in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(0, 2**63))
def test_shuffled_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(shuffled(i, count, (seed, 0)) for i in range(count)) == list(range(count))


def test_shuffled_is_even() -> None:
    """Where 0 of 5 goes, over 2,000 epochs: chi-squared, 4 degrees of freedom, p = 1e-4."""
    counts = Counter(shuffled(0, 5, (1, epoch)) for epoch in range(2000))
    assert sum((counts[i] - 400) ** 2 / 400 for i in range(5)) < 23.5


def test_bad_samples_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    root = sidecar_folder(tmp_path)
    (root / "001.png").write_bytes(SET["001"][0][:70])
    (root / "002.txt").unlink()
    (root / "003.png").write_bytes(png(picture(3, 8, 4)))
    source = open_source(root)
    reader = Reader(source, size=8, min_side=8)
    seen = [reader[i] for i in range(60)]
    assert {s.key for s in seen} == {"000.png", "004.png", "005.png"}
    report = reader.report()
    assert {e["key"] for e in report["skipped_listed"]} == {"001.png", "002.png", "003.png"}
    assert report["skipped"] == 3
    assert report["replaced"] == 30
    fresh = Reader(source, size=8, min_side=8)  # a replacement does not depend on the past
    assert [fresh[i].key for i in range(59, 29, -1)] == [s.key for s in seen[59:29:-1]]
    assert Reader(source, size=8, captions="optional", shuffle=False)[2].caption == ""


def test_a_source_without_captions_is_refused_with_a_reason(tmp_path: Path) -> None:
    source = open_source(sidecar_folder(tmp_path, {k: (d, " ") for k, (d, _) in SET.items()}))
    with pytest.raises(InvalidRequest, match=r"in a row cannot be used.*has no caption"):
        Reader(source, size=8)[0]


def test_the_centre_crop_is_the_reference_transform() -> None:
    """Resize the shorter side, bicubic, then cut out the middle."""
    image = picture(5, 90, 40)
    pixels, box = crop(image, (20, 20))
    resized = image.resize((45, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels, np.asarray(resized)[:, 12:32])
    assert box == (24.0, 0.0, 64.0, 40.0)
    same, box = crop(image, (90, 40), (0.9, 0.1))
    np.testing.assert_array_equal(same, np.asarray(image))
    assert box == (0.0, 0.0, 90.0, 40.0)


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_crops_have_their_size_and_stay_inside(
    shape: tuple[int, int], size: tuple[int, int], where: tuple[float, float]
) -> None:
    pixels, box = crop(picture(1, *shape), size, where)
    assert pixels.shape == (size[1], size[0], 3)
    assert box.left >= 0
    assert box.top >= 0
    slack = max(shape[0] / size[0], shape[1] / size[1]) + 1  # rounding of the scaled size
    assert box.right <= shape[0] + slack
    assert box.bottom <= shape[1] + slack


def test_buckets_of_512_are_the_published_ones() -> None:
    """NovelAI's table for 512: up to 512 x 768 pixels there; the rule is the same."""
    shapes = buckets(512)
    assert (512, 512) in shapes
    assert {(256, 1024), (320, 768), (384, 640), (448, 576)} <= set(shapes)
    assert all(w % 64 == h % 64 == 0 and w * h <= 512 * 512 for w, h in shapes)
    assert {(h, w) for w, h in shapes} == set(shapes)
    with pytest.raises(InvalidRequest, match="no multiple"):
        buckets(500)


@settings(max_examples=25)
@given(st.integers(100, 4000), st.integers(100, 4000))
def test_the_nearest_bucket_cuts_least_in_logarithm(width: int, height: int) -> None:
    shapes = buckets(512)
    w, h = shapes[nearest(width, height, shapes)]
    best = min(abs(math.log(a / b * height / width)) for a, b in shapes)
    assert abs(math.log(w / h * height / width)) == pytest.approx(best)


def test_bucket_batches_show_everything_and_can_start_anywhere() -> None:
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(200, 1200, 2).tolist()) for _ in range(101)]
    sizes[17] = None
    shapes = buckets(512)
    plan = BucketPlan(sizes, shapes, 4, seed=9)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for number in range(epoch * len(plan), (epoch + 1) * len(plan)):
            shape, places = plan[number]
            assert len(places) == 4
            assert all(shapes[nearest(*sizes[p], shapes)] == shape for p in places)
            seen.update(places)
        assert set(seen) == set(range(101)) - {17}
    again = BucketPlan(sizes, shapes, 4, seed=9)
    assert again[len(plan) + 3] == plan[len(plan) + 3]
    assert [plan[i] for i in range(len(plan))] != [plan[len(plan) + i] for i in range(len(plan))]


def test_pictures_in_buckets_are_of_one_shape_and_bad_ones_are_replaced(tmp_path: Path) -> None:
    shapes = [(64, 16), (63, 16), (16, 64), (17, 64), (32, 32), (62, 16), (33, 32), (50, 30)]
    members = {f"{i}": (png(picture(i, *shape)), f"number {i}") for i, shape in enumerate(shapes)}
    root = sidecar_folder(tmp_path / "set", members)
    (root / "8.png").write_bytes(b"no picture")
    source = open_source(root)
    sizes, bad = sizes_of(source, tmp_path / "cache")
    assert sizes == [*shapes, None]
    (root / "5.png").write_bytes(b"")  # broken since its size was read
    assert sizes_of(source, tmp_path / "cache")[0] == sizes, "read once"
    made = Bucketed(Reader(source, size=32), sizes, buckets(32, step=8), 2, bad=bad)
    assert made.plan.shapes == [(16, 64), (32, 32), (64, 16)], "one of (50, 30) alone is no batch"
    seen, epoch = set(), 2 * len(made.plan)
    for first in range(0, epoch, 2):
        batch = [made[first], made[first + 1]]
        (shape,) = {s.pixels.shape for s in batch}
        seen |= {(shape[1], shape[0])}
    assert seen == set(made.plan.shapes)
    assert made.report()["buckets"] == {"32x32": 3, "64x16": 3, "16x64": 2}
    assert {e["key"] for e in made.report()["skipped_listed"]} == {"5.png", "8.png"}
    assert made.reader.replaced >= 1
    again = Bucketed(Reader(source, size=32), sizes, buckets(32, step=8), 2, bad=bad)
    for index in (5 * epoch + 1, 3, 0):  # anywhere, in any order
        mine, other = made[index], again[index]
        assert (mine.key, mine.crop) == (other.key, other.crop)
        np.testing.assert_array_equal(mine.pixels, other.pixels)


def test_pictures_of_rare_shapes_go_to_what_is_nearest() -> None:
    shapes = [(16, 64), (32, 32), (40, 24), (64, 16)]
    sizes = [(10, 10)] * 9 + [(20, 12)] * 3 + [(12, 60)] * 2 + [None]
    assert populated(sizes, shapes, 2) == shapes[:3]
    assert populated(sizes, shapes, 3) == [(32, 32), (40, 24)]
    assert populated(sizes, shapes, 6) == [(32, 32)]
    assert populated(sizes, shapes, 100) == [(32, 32)], "one stays, however few"
