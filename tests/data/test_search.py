"""CLIP embeddings, the index, and what a search shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import picture, sidecar_folder
from PIL import Image

from safelight.cli.main import main
from safelight.data.clip import CLIP, load_clip
from safelight.data.index import Index, build_index, show
from safelight.data.sheet import picture_sheet
from safelight.data.sources import StillLife, open_source
from safelight.errors import InvalidRequest, WeightsError
from safelight.shipped import FAMILY


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return load_clip(device="cpu")


def test_text_finds_pictures_that_show_it(clip: CLIP) -> None:
    """The tiny CLIP on scenes it was not trained on: far above chance."""
    source = StillLife("val", 2, 96)
    index, bad = build_index(source, clip)
    assert bad.count == 0
    words = [source.captions(i)[0] for i in range(96)]
    rows, scores = index.nearest(clip.words(words), 5)
    found = np.mean([i in rows[i].tolist() for i in range(96)])
    assert found > 0.5  # chance: 0.05
    assert (np.diff(scores, axis=1) <= 0).all()
    own, cosines = index.nearest(clip.pictures(source.picture(i) for i in range(8)), 1)
    assert own[:, 0].tolist() == list(range(8))
    np.testing.assert_allclose(cosines, 1, atol=2e-3)


def test_a_published_clip_gives_its_embeddings(tmp_path: Path) -> None:
    import transformers

    shipped = FAMILY / "shared" / "tokenizer"
    vocab = json.loads((shipped / "vocab.json").read_text())
    torch.manual_seed(0)
    end = vocab["<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(vocab), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
            "bos_token_id": vocab["<|startoftext|>"], "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        projection_dim=12,
    )  # fmt: skip
    reference = transformers.CLIPModel(config).eval()
    reference.save_pretrained(tmp_path)
    for file in shipped.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ours = load_clip(tmp_path, device="cpu")
    assert ours.tokenizer is not None
    pixels = np.asarray(picture(1, 16, 16))
    mean = (0.48145466, 0.4578275, 0.40821073)  # as published with CLIP
    std = (0.26862954, 0.26130258, 0.27577711)
    normed = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    words = ["a red cube"]
    with torch.inference_mode():
        vision = reference.visual_projection(reference.vision_model(normed).pooler_output)
        ids = torch.tensor(ours.tokenizer.tokens(words))
        text = reference.text_projection(reference.text_model(ids).pooler_output)
    for got, expected in ((ours.pictures([picture(1, 16, 16)]), vision), (ours.words(words), text)):
        unit = torch.nn.functional.normalize(expected, dim=-1).numpy()
        np.testing.assert_allclose(got, unit, atol=1e-5)
    assert ours.digest != load_clip(device="cpu").digest
    with pytest.raises(WeightsError, match="holds no CLIP"):
        load_clip(tmp_path / "none")


def test_an_index_survives_the_disk_and_refuses_what_is_none(tmp_path: Path, clip: CLIP) -> None:
    root = sidecar_folder(tmp_path / "set")
    (root / "002.png").write_bytes(b"no picture")
    source = open_source(root)
    index, bad = build_index(source, clip)
    assert bad.count == 1
    index.save(tmp_path / "i.npz")
    again = Index.load(tmp_path / "i.npz")
    assert again.keys == ["000.png", "001.png", "003.png", "004.png", "005.png"]
    np.testing.assert_array_equal(again.embeddings, index.embeddings)
    hits = again.hits(clip.pictures([source.picture(4)])[0], 3)
    assert (hits[0].key, hits[0].place, hits[0].caption) == ("004.png", 4, "picture number 4")
    # The set has changed since: what is there is found by its key.
    (root / "000.png").unlink()
    found = show(hits[:1], again.source())
    assert found[0] is not None
    assert found[0].tobytes() == source.picture(4).tobytes()
    (root / "004.png").unlink()
    assert show(hits[:1], again.source()) == [None]
    (tmp_path / "bad.npz").write_bytes((tmp_path / "i.npz").read_bytes()[:200])
    np.savez(tmp_path / "other.npz", embeddings=np.ones((2, 2)))
    for name in ("bad", "other"):
        with pytest.raises(InvalidRequest, match="is no index"):
            Index.load(tmp_path / f"{name}.npz")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def data(*arguments: object) -> int:
        with pytest.raises(SystemExit) as leaving:
            main(["data", *map(str, arguments)])
        return int(leaving.value.code or 0)

    index, sheet = tmp_path / "i.npz", tmp_path / "found.png"
    assert data("index", "stilllife:combo:3:24", "-o", index) == 0
    caption = StillLife("combo", 3, 24).captions(5)[0]
    capsys.readouterr()
    assert data("search", index, "--text", caption, "-o", sheet, "--count", 6, "--json") == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 6
    assert Image.open(sheet).size == (4 * 200 + 8, 2 * 252 + 8)
    StillLife("combo", 3, 24).picture(9).save(tmp_path / "query.png")
    assert data("search", index, "--image", tmp_path / "query.png", "-o", sheet) == 0
    assert capsys.readouterr().out.startswith("1.000  combo-3-0000009")
    for arguments, message in (
        ([index], "give either --text or --image"),
        ([index, "--text", " "], "text: is empty"),
        ([tmp_path / "none.npz", "--text", "x"], "index: no file"),
        ([index, "--text", "x", "-o", "x.txt"], "output: cannot write"),
    ):
        assert data("search", *arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "set").mkdir()
    sidecar_folder(tmp_path / "set")
    (tmp_path / "set" / "003.txt").unlink()
    assert data("check", tmp_path / "set", "--size", 64) == 0
    captured = capsys.readouterr()
    assert "5 of 6 pictures" in captured.out
    assert "003.png: has no caption" in captured.err


def test_the_sheet_fits_every_shape_and_letter() -> None:
    pictures = [picture(1, 300, 10), None, picture(2, 5, 400)]
    sheet = picture_sheet(pictures, ["a" * 400, "日本語", ""], size=96, columns=2)
    assert sheet.size == (2 * 104 + 8, 2 * 156 + 8)
    assert sheet.getpixel((8 + 104 + 48, 8 + 48)) == (200, 200, 200)
