"""The checker against diffusers': folders, pictures, scores, the border, what is not a number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import safety_checker as peer_module
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from safelight.checker import Checker, clip_pixels
from safelight.errors import ModelNotFound, WeightsError
from safelight.nets.safety_head import Cosines, SafetyScores, adjusted_scores
from safelight.safety import decide
from safelight.spec import PictureSpec
from safelight.store.checkers import picture_spec, read_checker, write_checker
from safety_micro import SPEC, pictures, processor, reference, rigged, save_reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(reference(), tmp_path_factory.mktemp("model"))


def peer_flags(peer: StableDiffusionSafetyChecker, images: list[Image.Image]) -> list[bool]:
    pixels = processor()(images, return_tensors="pt").pixel_values
    return peer(pixels, torch.ones(len(images), 1))[1]


# -- the same as the reference --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flags_are_diffusers(seed: int, tmp_path: Path) -> None:
    peer = reference(seed)
    checker = Checker.load(save_reference(peer, tmp_path))
    images = pictures(32, seed)
    wanted = peer_flags(peer, images)
    found = decide(checker, checker.scores(images))
    assert [verdict.nsfw for verdict in found] == wanted
    assert 2 < sum(wanted) < 30  # both happen, or nothing was tested


@pytest.mark.parametrize("size", [(33, 21), (21, 33), (16, 16), (224, 300), (17, 64), (9, 9)])
def test_pictures_go_in_as_transformers_processor_has_it(size: tuple[int, int]) -> None:
    (image,) = pictures(1, 3, size)
    wanted = processor()(image, return_tensors="pt").pixel_values[0]
    assert torch.allclose(clip_pixels(image, SPEC.pictures), wanted, atol=1e-5)


def test_a_palette_and_a_grey_picture_go_in() -> None:
    (image,) = pictures(1)
    for mode in ("P", "L", "RGBA"):
        assert clip_pixels(image.convert(mode), SPEC.pictures).shape == (3, 16, 16)


def test_the_rule_is_diffusers_at_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's rounding and torch's, where the last bit of a float32 decides."""
    peer = reference()
    weights = torch.linspace(0.15, 0.25, 17), torch.linspace(0.1, 0.2, 3)
    peer.concept_embeds_weights.copy_(weights[0])
    peer.special_care_embeds_weights.copy_(weights[1])
    # Steps of one unit in the last place around every place where a rounded score changes.
    ulps = torch.arange(-8, 9)
    edges = torch.tensor([0.0005, -0.0005, 0.0015, -0.0095, -0.0105, 0.0, -0.01])
    rows = []
    for k, edge in enumerate(edges.tolist()):
        for ulp in ulps.tolist():
            plain, special = (w + edge if k < 6 else w - 0.0095 for w in weights)
            rows.append([nudge(plain, ulp), nudge(weights[1] - 0.3, 0)])  # nothing special
            rows.append([nudge(weights[0] - 0.3, 0), nudge(special, ulp)])
            rows.append([nudge(plain, ulp), nudge(weights[1] + 0.1, 0)])  # all raised
            rows.append([nudge(weights[0] - 0.0095, ulp), nudge(special, -ulp)])
    cosines = Cosines(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))
    answers = iter([cosines.special, cosines.concepts])
    monkeypatch.setattr(peer_module, "cosine_distance", lambda *_: next(answers))
    peer.vision_model.forward = lambda pixels: (None, pixels)
    peer.visual_projection = torch.nn.Identity()
    _, wanted = peer(torch.ones(len(rows), 1), torch.ones(len(rows), 1))
    found = adjusted_scores(cosines, Cosines(*weights))
    assert (found.concepts > 0).any(1).tolist() == wanted
    assert 100 < sum(wanted) < len(rows) - 100
    # A planted fault: rounding to four decimals, or none, is not the same.
    unrounded = cosines.concepts - weights[0] > 0
    assert unrounded.any(1).tolist() != wanted


def nudge(values: torch.Tensor, ulps: int) -> torch.Tensor:
    bits = values.clone().view(torch.int32)
    return (bits + ulps).view(torch.float32)


def test_float32_rounding_is_numpys() -> None:
    """Bit for bit, on every float32 near a multiple of half a thousandth."""
    centre = (torch.arange(-40, 41) * 0.0005)[:, None]
    near = nudge(centre.expand(-1, 33).contiguous(), 0)
    near = torch.stack([nudge(near[:, k], k - 16) for k in range(33)], dim=1).flatten()
    near = near[near.abs() < 1]
    zero = Cosines(torch.zeros(1), torch.zeros(1))
    ours = adjusted_scores(Cosines(near[:, None], torch.zeros(len(near), 1)), zero)
    wanted = [round(np.float32(value), 3) for value in near.numpy()]
    assert ours.concepts[:, 0].tolist() == [float(v) for v in wanted]


def test_the_unrounded_variant_differs_at_the_border() -> None:
    """diffusers' ONNX form rounds nothing: this one follows the published checker, and says so."""
    checker = rigged([0.2004], special=[0.0])
    (verdict,) = decide(checker, checker.scores(pictures(1)))
    assert verdict.nsfw is False
    assert verdict.scores[0].score == 0
    assert 0.2004 - 0.2 > 0


# -- verdicts ------------------------------------------------------------------------------------


def test_a_special_concept_alone_flags_nothing() -> None:
    checker = rigged([0.19], special=[0.9])
    (verdict,) = decide(checker, checker.scores(pictures(1)))
    assert [score.score for score in verdict.scores] == [0.0, 0.7]  # raised by 0.01, not above
    assert verdict.nsfw is False
    checker = rigged([0.195], special=[0.9])
    assert decide(checker, checker.scores(pictures(1)))[0].nsfw is True
    assert decide(rigged([0.195]), rigged([0.195]).scores(pictures(1)))[0].nsfw is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("special", [False, True])
def test_what_is_not_a_number_is_never_safe(bad: float, special: bool) -> None:
    checker = rigged([0.0, 0.0], special=[0.0])
    plain, care = torch.zeros(1, 2) - 0.2, torch.zeros(1, 1) - 0.2
    (care if special else plain)[0, 0] = bad
    (verdict,) = decide(checker, SafetyScores(plain, care))
    assert verdict.nsfw is True
    assert verdict.scores[2 if special else 0].score is None
    assert "not numbers" in verdict.reason
    verdict.model_dump_json()


def test_weights_that_are_not_numbers_are_never_safe(tmp_path: Path) -> None:
    peer = reference()
    peer.visual_projection.weight.fill_(float("nan"))
    images = pictures(2)
    assert peer_flags(peer, images) == [False, False]  # the reference lets them pass
    checker = Checker.load(save_reference(peer, tmp_path))
    assert [v.nsfw for v in decide(checker, checker.scores(images))] == [True, True]


def test_a_verdict_names_what_it_found(folder: Path) -> None:
    checker = Checker.load(folder)
    (verdict,) = decide(checker, checker.scores(pictures(1)), "flag")
    assert len(verdict.scores) == 20
    assert [s.special for s in verdict.scores] == [False] * 17 + [True] * 3
    assert verdict.scores[0].name == "concept 0"
    assert verdict.scores[0].threshold == pytest.approx(
        float(checker.head.concept_embeds_weights[0]), abs=1e-6
    )
    assert verdict.policy == "flag"
    assert verdict.checker == checker.digest[:12]


# -- folders -------------------------------------------------------------------------------------


def test_a_checker_loads_from_its_own_folder_too(folder: Path) -> None:
    whole, alone = Checker.load(folder), Checker.load(folder / "safety_checker")
    assert whole.digest == alone.digest
    assert whole.spec == alone.spec == SPEC
    assert alone.notes == ()


def test_old_spellings_are_read(folder: Path, tmp_path: Path) -> None:
    """The double ``vision_model.``, a buffer of old files, numbers for sizes, a pickle."""
    place = tmp_path / "safety_checker"
    place.mkdir()
    state = dict(Checker.load(folder).head.state_dict())
    assert "vision_model.vision_model.embeddings.class_embedding" in state
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, place / "pytorch_model.bin")
    (place / "config.json").write_text((folder / "safety_checker" / "config.json").read_text())
    (tmp_path / "feature_extractor").mkdir()
    old = {"size": 16, "crop_size": 16, "do_resize": True, "do_center_crop": True, "resample": 3}
    (tmp_path / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(old))
    checker, wanted = Checker.load(tmp_path), Checker.load(folder)
    images = pictures(3)
    assert torch.equal(checker.scores(images).concepts, wanted.scores(images).concepts)


def test_without_a_feature_extractor_it_says_so(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.mkdir()
    for file in (folder / "safety_checker").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    checker = Checker.load(place)
    assert "no feature_extractor" in checker.notes[0]
    assert checker.spec == SPEC


def test_what_we_write_diffusers_reads(folder: Path, tmp_path: Path) -> None:
    checker = Checker.load(folder)
    write_checker(tmp_path / "new", checker.spec, checker.head.state_dict())
    peer = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "new")
    again = Checker.load(tmp_path / "new")
    images = pictures(16, 5)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "new")(images, return_tensors="pt")
    _, flags = peer.eval()(pixels.pixel_values, torch.ones(16, 1))
    assert [v.nsfw for v in decide(again, again.scores(images))] == flags
    assert again.digest == checker.digest
    assert again.spec == checker.spec


def test_what_is_no_checker_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no safety checker"):
        Checker.load(tmp_path)
    with pytest.raises(ModelNotFound, match="no safety checker 'x'"):
        Checker.load("x", local_only=True)
    place = tmp_path / "tower"
    reference().vision_model.save_pretrained(place)
    with pytest.raises(WeightsError, match="concept_embeds"):
        read_checker(place)
    notes = tmp_path / "named"
    checker = Checker.load(folder)
    write_checker(notes, checker.spec, checker.head.state_dict())
    (notes / "safelight.json").write_text('{"schema": 1, "names": ["a"]}')
    with pytest.raises(WeightsError, match="names 1 concepts of 20"):
        read_checker(notes)


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 16, "width": 16}},
        {"crop_size": {"height": 16, "width": 8}},
        {"do_rescale": False},
    ],
)
def test_other_ways_in_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="cut a square"):
        picture_spec(config, Path("preprocessor_config.json"))


def test_switches_of_a_processor() -> None:
    file = Path("x")
    plain = picture_spec({"do_resize": False, "do_center_crop": False, "do_normalize": False}, file)
    assert plain == PictureSpec(resize=0, crop=0, mean=(0, 0, 0), std=(1, 1, 1))


def test_bfloat16_models_keep_their_checker_in_float32(folder: Path) -> None:
    checker = Checker.load(folder).to("cpu", torch.bfloat16)
    assert checker.head.concept_embeds.dtype == torch.float32
