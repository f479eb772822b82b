"""Checkers of one's own, from sentences and from pictures, and their curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from scipy.stats import mannwhitneyu
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from safelight.checker import Checker, clip_pixels
from safelight.cli.main import main
from safelight.data import stilllife
from safelight.errors import InvalidRequest
from safelight.safety.build import UNUSED, fitted, thresholds
from safelight.safety.clip import load_clip
from safelight.safety.concepts import read_concepts
from safelight.safety.measure import measure, plot, table
from safelight.text.tokenizer import Tokenizer
from safety_micro import byte_vocab, pictures, rigged


@pytest.fixture(scope="module")
def sorted_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Still life with a lone red cube in it, and without."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes = [stilllife.scene(3, k, "val") for k in range(400)]
    captions = [stilllife.plain_caption(scene) for scene in scenes]
    red = [k for k, words in enumerate(captions) if "red cube" in words][:12]
    rest = [k for k, words in enumerate(captions) if "red" not in words and "cube" not in words]
    for name, chosen in (("unsafe", red), ("safe", rest[:32])):
        (folder / name).mkdir()
        drawn = stilllife.render([scenes[k] for k in chosen], 64)
        for k, picture in enumerate(drawn):
            Image.fromarray(picture).save(folder / name / f"{k:03}.png")
    return folder


def run(*arguments: object) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_a_checker_from_a_sentence_with_the_shipped_clip(
    sorted_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path: build, measure, and diffusers' own verdict on the same pictures."""
    (tmp_path / "concepts.txt").write_text("# what to find\na red cube\n\nspecial: a red thing\n")
    folder = tmp_path / "checker"
    assert run("safety", "build", "--concepts", tmp_path / "concepts.txt", "-o", folder,
               "--examples", sorted_scenes, "--json") == 0  # fmt: skip
    built = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in built["concepts"]] == ["a red cube", "a red thing"]
    checker = Checker.load(folder)
    assert checker.names[:2] == ("a red cube", UNUSED)
    assert checker.names[17:] == ("a red thing", UNUSED, UNUSED)

    assert run("safety", "measure", sorted_scenes, "--checker", folder, "--json",
               "--plot", tmp_path / "roc.png") == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["safe"], found["unsafe"]) == (32, 12)
    assert found["area"] > 0.9
    assert found["flagged_of_unsafe"] - found["flagged_of_safe"] > 0.7
    with Image.open(tmp_path / "roc.png") as drawn:
        assert drawn.width > 200
    assert run("safety", "measure", sorted_scenes, "--checker", folder) == 0
    assert "area under the curve" in capsys.readouterr().out

    files = sorted(sorted_scenes.rglob("*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = CLIPImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    peer = StableDiffusionSafetyChecker.from_pretrained(folder).eval()
    _, flags = peer(pixels, torch.ones(len(images), 1))
    wrong = {Path(name) for name in found["wrong"]}
    ours = [(file.parent.name == "unsafe") != (file in wrong) for file in files]
    assert ours == flags


def test_a_checker_from_pictures(sorted_scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        f'[[concept]]\nname = "these"\npictures = "{sorted_scenes / "unsafe"}"\n'
    )
    assert run("safety", "build", "--concepts", tmp_path / "c.toml", "-o", tmp_path / "out",
               "--examples", sorted_scenes, "--false-positives", 0) == 0  # fmt: skip
    safe, unsafe = (sorted((sorted_scenes / n).iterdir()) for n in ("safe", "unsafe"))
    roc = measure(Checker.load(tmp_path / "out"), safe, unsafe)
    assert roc.at[1] == 0  # none of the safe ones, as was asked
    assert roc.area > 0.8


def test_any_clip_will_do(tmp_path: Path) -> None:
    """A published CLIPModel's folder: the same directions as transformers'."""
    text = {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        peer = CLIPModel(config).eval()
    peer.save_pretrained(tmp_path / "clip")
    Tokenizer.from_vocab(byte_vocab(), [], context_length=16).save(tmp_path / "clip")
    clip = load_clip(tmp_path / "clip")
    assert clip.tokenizer is not None
    encoded = torch.tensor(clip.tokenizer.tokens(["a cube"]))
    (image,) = pictures(1)
    image.save(tmp_path / "a.png")
    pixels = clip_pixels(image, clip.pictures)[None]
    with torch.no_grad():
        out = peer(input_ids=encoded, pixel_values=pixels)
    assert torch.allclose(clip.of_sentences(["a cube"]), out.text_embeds, atol=1e-5)
    assert torch.allclose(clip.of_pictures([tmp_path / "a.png"]), out.image_embeds, atol=1e-5)


# -- thresholds ------------------------------------------------------------------------------------


def test_a_threshold_lies_in_the_middle_of_the_widest_gap() -> None:
    safe, unsafe = np.array([[0.1], [0.2]]), np.array([[0.4], [0.5]])
    assert thresholds(safe, unsafe) == [pytest.approx(0.3)]


def test_where_they_overlap_the_difference_of_rates_decides() -> None:
    safe = np.array([[0.1], [0.2], [0.25], [0.45]])
    unsafe = np.array([[0.3], [0.4], [0.5], [0.6]])
    assert thresholds(safe, unsafe) == [pytest.approx(0.275)]
    assert thresholds(safe, unsafe, 0.0) == [pytest.approx(0.475)]


def test_each_unsafe_example_counts_for_its_nearest_concept() -> None:
    safe = np.array([[0.10, 0.30], [0.12, 0.32], [0.11, 0.31]])
    unsafe = np.array([[0.30, 0.31], [0.11, 0.50], [0.32, 0.30]])
    assert thresholds(safe, unsafe) == [pytest.approx(0.21), pytest.approx(0.41)]
    lonely = thresholds(safe, unsafe[[0, 2]])
    assert lonely[1] > safe[:, 1].max()  # nobody's nearest: above everything that is safe


# -- the curve -------------------------------------------------------------------------------------


def test_the_area_is_mann_and_whitneys_and_the_mark_is_the_checkers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cosines = np.concatenate([rng.normal(0.15, 0.05, 20), rng.normal(0.22, 0.05, 12)])
    checker = rigged(*[[float(c)] for c in cosines], special=[0.0])
    files = []
    for k, image in enumerate(pictures(32)):
        files.append(tmp_path / f"{k}.png")
        image.save(files[-1])
    roc = measure(checker, files[:20], files[20:])
    truth = [0] * 20 + [1] * 12
    rounded = np.round(cosines - 0.2, 3)
    wins = mannwhitneyu(rounded[20:], rounded[:20]).statistic
    assert roc.area == pytest.approx(wins / (20 * 12))
    assert roc.at == ((rounded[20:] > 0).mean(), (rounded[:20] > 0).mean())
    assert set(roc.wrong) == {
        f for f, t, s in zip(files, truth, rounded, strict=True) if t != (s > 0)
    }
    assert (np.diff(roc.false) >= 0).all()
    assert (np.diff(roc.true) >= 0).all()
    assert "as it is" in table(roc)
    plot(roc, tmp_path / "roc.png")


def test_a_picture_without_a_number_is_flagged_in_the_curve_too(tmp_path: Path) -> None:
    checker = rigged([float("nan")], [0.0])
    files = []
    for k, image in enumerate(pictures(2)):
        files.append(tmp_path / f"{k}.png")
        image.save(files[-1])
    roc = measure(checker, files[:1], files[1:])
    assert roc.at == (0.0, 1.0)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "# nothing\n", "names none"),
        ("a.txt", "special: a cone\n", "names none"),
        ("a.txt", "\n".join(f"thing {k}" for k in range(18)), "a checker holds 17"),
        ("a.toml", "[[concept]]\nname = 3\n", "name"),
        ("a.toml", "[[concept]]\nname = 'x'\n", "sentences or pictures"),
        ("a.toml", "[[concept]]\nname = 'x'\nsentence = ['y']\n", "sentence"),
        ("a.toml", "concept = 3\n", "concept"),
        ("a.toml", "[[", "a.toml"),
    ],
)
def test_concepts_that_make_no_sense(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        read_concepts(tmp_path / name)


def test_what_the_commands_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "c.txt"
    words.write_text("a red cube\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    build = ("safety", "build", "--concepts", words, "-o")
    assert run(*build, tmp_path / "full") == 2
    assert run(*build, tmp_path / "new", "--false-positives", 2) == 2
    assert run(*build, tmp_path / "new") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is not empty" in err
    assert "examples: are needed to choose a threshold for a red cube" in err
    measure = ("safety", "measure", tmp_path, "--checker", "x")
    assert run(*measure, "--plot", "a.jpg") == 2
    assert run(*measure) == 2
    assert "no folder safe" in capsys.readouterr().err


def test_a_trained_direction_has_the_smallest_loss_there_is() -> None:
    """Against scipy's minimiser, on sets that overlap; twice the same; sizes do not matter."""
    from scipy.optimize import minimize
    from scipy.special import expit

    rng = np.random.default_rng(0)
    low, high = rng.standard_normal((300, 6)), rng.standard_normal((90, 6))
    high[:, :2] += (1, 0.5)
    safe, unsafe = (torch.nn.functional.normalize(torch.tensor(x).float()) for x in (low, high))
    found = fitted(safe, unsafe)
    assert torch.equal(found, fitted(safe, unsafe))

    both = torch.cat([unsafe, safe]).double().numpy()
    seen = (both - both.mean(0)) / both.std(ddof=1)
    sign = np.r_[-np.ones(90), np.ones(300)]
    weight = np.r_[np.full(90, 0.5 / 90), np.full(300, 0.5 / 300)]

    def loss(w: np.ndarray) -> float:
        margin = sign * (seen @ w[:-1] + w[-1])
        return float(-(weight * np.log(expit(-margin))).sum() + 1e-4 * (w[:-1] ** 2).sum())

    best = minimize(loss, np.zeros(7), options={"gtol": 1e-8}).x[:-1]
    assert float(found.double() @ torch.tensor(best / np.linalg.norm(best))) > 0.9999
    more = torch.cat([safe] * 3)
    assert torch.allclose(fitted(more, unsafe), found, atol=1e-3)


def test_a_trained_checker_beats_the_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sorted by the command, trained, measured on scenes of another series."""
    for name, seed in (("train", 1), ("test", 2)):
        folder, count = tmp_path / name, 400 if name == "train" else 200
        assert run("stilllife", "sorted", "cone", "-o", folder, "--count", count,
                   "--seed", seed, "--size", 64) == 0  # fmt: skip
        assert len(list((folder / "unsafe").iterdir())) == count // 2
    (tmp_path / "c.txt").write_text("a cone\n")
    areas = {}
    for name, options in (("sentence", ()), ("trained", ("--fit",))):
        assert run("safety", "build", "--concepts", tmp_path / "c.txt", "-o", tmp_path / name,
                   "--examples", tmp_path / "train", *options) == 0  # fmt: skip
        capsys.readouterr()
        assert run("safety", "measure", tmp_path / "test", "--checker", tmp_path / name,
                   "--json") == 0  # fmt: skip
        areas[name] = json.loads(capsys.readouterr().out)["area"]
    assert areas["trained"] > 0.99
    assert areas["trained"] > areas["sentence"]


def test_what_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.txt").write_text("a cone\na cube\n")
    (tmp_path / "one.txt").write_text("a cone\n")
    build = ("safety", "build", "-o", tmp_path / "new", "--fit", "--concepts")
    assert run(*build, tmp_path / "two.txt") == 2
    assert run(*build, tmp_path / "one.txt") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "fit: examples say of one concept only" in err
    assert "examples: are what is fitted to" in err
    assert run("stilllife", "sorted", "pyramid", "-o", tmp_path / "s") == 2
    assert "there is no 'pyramid'" in capsys.readouterr().err
