"""Members of every kind are packed from runs, load by name, and make pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import safelight
from safelight import shipped
from safelight.checker import Checker
from safelight.errors import InvalidRequest, WeightsError
from safelight.nets.prior import Prior
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.spec import PriorSpec, ScheduleSpec, TextSpec, UNetSpec, VAESpec
from safelight.train.pack import pack_checker, pack_member, pack_prior

WIDTH = 128  # of the shipped towers
MICRO = UNetSpec(
    sample_size=8,
    channels=(8, 8),
    attention=(True, True),
    heads=(2, 2),
    only_cross_attention=(False, False),
    layers_per_block=1,
    context_width=WIDTH,
    norm_groups=4,
)
X4_VAE = VAESpec(channels=(8, 8, 8), layers_per_block=1, norm_groups=4, sample_size=32)
RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty family with the shipped towers and autoencoder."""
    folder = tmp_path / "family"
    folder.mkdir()
    (folder / "shared").symlink_to(shipped.FAMILY / "shared", target_is_directory=True)
    monkeypatch.setattr(shipped, "FAMILY", folder)
    return folder


def run(folder: Path, task: str, **unet: Any) -> Path:
    """What a training run of this kind leaves."""
    folder.mkdir(parents=True)
    spec = MICRO.replace(**unet)
    settings: dict[str, Any] = {"task": task, "vae": str(shipped.FAMILY / "shared")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(UNet(spec).state_dict(), folder / "unet.safetensors")
        if task == "x4":
            settings["vae"] = str(folder / "vae")
            (folder / "vae").mkdir()
            save_file(VAE(X4_VAE).state_dict(), folder / "vae" / "vae.safetensors")
            (folder / "vae" / "vae.json").write_text(X4_VAE.model_dump_json())
        if task == "unclip":
            spread = {"mean": torch.zeros(1, WIDTH), "std": torch.ones(1, WIDTH)}
            save_file(spread, folder / "normaliser.safetensors")
    (folder / "unet.json").write_text(spec.model_dump_json())
    (folder / "schedule.json").write_text(ScheduleSpec(prediction_type="v").model_dump_json())
    recipe = {"diffusion": settings, "distill": None}
    (folder / "manifest.json").write_text(json.dumps({"recipe": recipe}))
    return folder


VECTOR = {"class_embedding": "projection", "class_embedding_size": 2 * WIDTH}
LABEL = {"class_embedding": "table", "class_embedding_size": 1000}
WISHES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "text": ({}, {"prompt": "a red cube"}, (64, 64)),
    "variations": ({}, {"image": RED}, (64, 64)),
    "unclip": (VECTOR, {"prompt": "a red cube", "image": RED}, (64, 64)),
    "inpaint": (
        {"in_channels": 9},
        {"prompt": "a red cube", "image": RED, "mask": Image.new("L", (64, 64), 255)},
        (64, 64),
    ),
    "depth": (
        {"in_channels": 5},
        {"prompt": "a red cube", "depth": Image.linear_gradient("L").resize((64, 64))},
        (64, 64),
    ),
    "x4": ({"in_channels": 7, **LABEL}, {"prompt": "", "image": RED.resize((8, 8))}, (32, 32)),
}


@pytest.mark.parametrize("task", WISHES)
def test_a_member_of_every_kind_makes_a_picture(family: Path, tmp_path: Path, task: str) -> None:
    unet, wishes, size = WISHES[task]
    spec = pack_member(
        "mine", run(tmp_path / "run", task, **unet), guidance_scale=2.0, family=family
    )
    assert spec.guidance_scale == 2.0
    assert shipped.names() == ["mine"]
    model = safelight.load("mine")
    (picture,) = model.generate(steps=2, seed=1, **wishes)
    assert picture.image is not None
    assert picture.image.size == size
    assert len(list((family / "mine").glob("*.safetensors"))) == {"x4": 2, "unclip": 2}.get(task, 1)


def test_a_prior_stands_in_front_of_unclip(family: Path, tmp_path: Path) -> None:
    text = TextSpec.model_validate_json((family / "shared" / "text.json").read_text())
    spec = PriorSpec(
        heads=2, head_width=4, layers=1, embedding_width=WIDTH, text_tokens=text.context_length
    )
    (tmp_path / "prior").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = Prior(spec)
        torch.nn.init.normal_(prior.positional_embedding)
        torch.nn.init.normal_(prior.prd_embedding)
        torch.nn.init.zeros_(prior.clip_mean)
        torch.nn.init.ones_(prior.clip_std)
    save_file(prior.state_dict(), tmp_path / "prior" / "prior.safetensors")
    (tmp_path / "prior" / "prior.json").write_text(spec.model_dump_json())
    pack_prior("ahead", tmp_path / "prior", family)
    made = run(tmp_path / "run", "unclip", **VECTOR)
    pack_member("mine", made, guidance_scale=2.0, family=family, prior="ahead")
    model = safelight.load("mine")
    (one,) = model.generate("a red cube", steps=2, seed=1)
    (two,) = model.generate("a blue cube", steps=2, seed=1)
    assert one.image is not None
    assert two.image is not None
    assert one.image.tobytes() != two.image.tobytes()
    with pytest.raises(InvalidRequest, match="prior"):
        pack_member(
            "x", run(tmp_path / "t", "text"), guidance_scale=2.0, family=family, prior="ahead"
        )


def test_a_consistency_student_takes_few_steps(family: Path, tmp_path: Path) -> None:
    made = run(tmp_path / "run", "text", guidance_embedding_size=8)
    record = json.loads((made / "manifest.json").read_text())
    record["recipe"]["distill"] = {"kind": "consistency"}
    (made / "manifest.json").write_text(json.dumps(record))
    spec = pack_member("fast", made, guidance_scale=3.0, family=family)
    assert (spec.steps, spec.schedule.sampler) == (4, "lcm")
    (picture,) = safelight.load("fast").generate("a red cube", seed=1)
    assert picture.image is not None


def test_a_damaged_member_is_refused(family: Path, tmp_path: Path) -> None:
    pack_member("mine", run(tmp_path / "run", "text"), guidance_scale=2.0, family=family)
    file = family / "mine" / "unet.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(WeightsError, match="SHA-256"):
        safelight.load("mine")
    file.unlink()
    with pytest.raises(WeightsError, match="missing"):
        safelight.load("mine")


def test_a_run_of_something_else_is_refused(family: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no manifest"):
        pack_member("mine", tmp_path, guidance_scale=2.0, family=family)


def test_a_checker_shares_the_familys_tower(family: Path, tmp_path: Path) -> None:
    """Packed from the shipped checker's own export, its cosines are the same; another tower's is
    refused."""
    from safelight.store.checkers import write_checker
    from safety_micro import reference

    (family / "tiny-safety").symlink_to(
        Path(shipped.__file__).parent / "family" / "tiny-safety", target_is_directory=True
    )
    whole = Checker.load("tiny-safety")
    assert whole.source == "shipped:tiny-safety"
    write_checker(tmp_path / "checker", whole.spec, whole.head.state_dict())
    pack_checker("mine", tmp_path / "checker", family)
    again = Checker.load("mine")
    for one, other in zip(whole.cosines([RED]), again.cosines([RED]), strict=True):
        assert torch.equal(one, other)
    assert shipped.checkers() == ["mine", "tiny-safety"]
    assert sum(f.stat().st_size for f in (family / "mine").iterdir()) < 20_000
    reference().save_pretrained(tmp_path / "other")
    with pytest.raises((InvalidRequest, WeightsError)):
        pack_checker("other", tmp_path / "other", family)
    assert "other" not in shipped.checkers()


def test_the_shipped_checker_flags_what_it_forbids() -> None:
    model = safelight.load(safety_checker="tiny-safety")
    words = ["a red cone", "a blue sphere", "a green cone to the left of a white cube"]
    made = model.generate(words, steps=12, seed=5, safety="flag")
    assert [picture.nsfw for picture in made] == [True, False, True]
