"""DreamBooth, LoRA and textual inversion: the reference's losses, gradients and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from personal_micro import CLASS, PROMPT, Engine, recipe, write_model, write_pictures
from safelight.errors import InvalidRequest
from safelight.generate import Generator
from safelight.model import Model
from safelight.train.learners import EMBEDDING_FILE, KOHYA_FILE, LORA_FILE
from safelight.train.loop import Run
from safelight.train.personal import PersonalObjective
from safelight.train.pictures import key

STEPS, SCALE, SEED = 3, 4.0, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("personal") / "micro")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "subject")


@pytest.fixture(scope="module")
def class_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "class", 4, seed=1)


def peer(folder: Path) -> Any:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    (image,) = pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images
    return image * 255


def ours(model: Model | Path, prompt: str = PROMPT, **arguments: Any) -> np.ndarray:
    if isinstance(model, Path):
        model = Model.load(model, device="cpu")
    (result,) = Generator(model).generate(
        prompt, seed=SEED, steps=STEPS, guidance_scale=SCALE, **arguments
    )
    assert result.image is not None, result.message
    return np.asarray(result.image, dtype=float)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 0.51)  # one of the two is rounded


def trained(made: Any, render: Any = None) -> Run:
    run = Run(made, PersonalObjective(made, render))
    run.go()
    return run


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [False, True])
def test_prior_preservation_is_the_reference_s(
    folder: Path, pictures: Path, class_pictures: Path, tmp_path: Path, snr: bool
) -> None:
    """Loss and every gradient, against diffusers' networks and the loss written out by hand."""
    made = recipe(
        tmp_path / "run",
        folder,
        pictures,
        class_prompt=CLASS,
        class_data=class_pictures,
        num_class_images=4,
        prior_loss_weight=0.7,
        train_text_encoder=True,
        weighting="min_snr" if snr else "none",
    )
    mine = PersonalObjective(made)
    batch = mine.batch(4, 2)
    assert (batch.subjects, len(batch.latents)) == (2, 4)
    loss, logged = mine.loss(mine.module, batch)
    loss.backward()

    pipeline = peer(folder)
    unet, text = pipeline.unet.train(), pipeline.text_encoder.train()
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(
        [PROMPT, PROMPT, CLASS, CLASS], padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, batch.ids)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.t)
    said = unet(noisy, batch.t, text(ids)[0]).sample
    (subject, prior), (target, prior_target) = said.chunk(2), batch.noise.chunk(2)
    each = (subject - target).square().mean((1, 2, 3))
    if snr:
        abar = scheduler.alphas_cumprod[batch.t[:2]]
        each = each * (5.0 / (abar / (1 - abar))).clamp(max=1.0)
    expected = each.mean() + 0.7 * (prior - prior_target).square().mean()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert logged["subject"] + 0.7 * logged["prior"] == pytest.approx(float(loss.detach()))
    own = {n.replace("text_model.", ""): p.grad for n, p in mine.module.named_parameters()}
    checked = 0
    for prefix, network in (("unet", unet), ("text", text)):
        for name, weight in network.named_parameters():
            gradient = own[f"{prefix}.{name.replace('text_model.', '')}"]
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=2e-6)
            checked += 1
    assert checked == len(own)
    assert own["text.embeddings.token_embedding.weight"].abs().max() > 1e-6


def test_latents_are_samples_of_the_posterior(folder: Path, pictures: Path, tmp_path: Path) -> None:
    mine = PersonalObjective(recipe(tmp_path / "run", folder, pictures, crop="center"))
    batch, vae = mine.batch(1, 1), peer(folder).vae
    sight = mine.subject.sight(1, 0, 11)
    assert sight.where is None
    whole = Image.open(pictures / mine.subject.names[sight.place])
    pixels = np.asarray(whole.crop((2, 0, 18, 16)), np.float32)  # 20x16, its middle
    seen = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    said = vae.encode(seen).latent_dist
    noise = torch.from_numpy(key(0, 1, 13).standard_normal(said.mean.shape, dtype=np.float32))
    expected = (said.mean + said.std * noise) * vae.config.scaling_factor
    torch.testing.assert_close(batch.latents, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_is_a_function_of_the_index(
    folder: Path, pictures: Path, class_pictures: Path, tmp_path: Path
) -> None:
    settings = {"class_prompt": CLASS, "class_data": class_pictures, "num_class_images": 3}
    made = recipe(
        tmp_path / "run", folder, pictures, flip=True, offset_noise=0.1, seed=5, **settings
    )
    mine = PersonalObjective(made)
    whole, part = mine.batch(0, 6), mine.batch(4, 2)
    assert mine.classes is not None
    assert len(mine.classes) == 3, "no more than were asked for"
    for a, b in zip(whole[:4], part[:4], strict=True):
        assert torch.equal(a[4:6], b[:2])
        assert torch.equal(a[10:12], b[2:])
    seen = {mine.subject.sight(i, 5, 11).place for i in range(3)}
    assert seen == {0, 1, 2}, "an epoch shows every picture"
    assert len({mine.subject.sight(i, 5, 11).mirrored for i in range(20)}) == 2


# -- the three methods --------------------------------------------------------------------------


def test_dreambooth_writes_what_diffusers_loads(
    folder: Path, pictures: Path, class_pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    made = recipe(
        output,
        folder,
        pictures,
        class_prompt=CLASS,
        class_data=class_pictures,
        num_class_images=4,
        train_text_encoder=True,
        lr=0.02,
    )
    engine = Engine()
    run = trained(made, engine)
    picture = ours(output)
    assert np.abs(picture - ours(folder)).max() > 5, "it learned something"
    assert near(picture, theirs(peer(output)))
    in_memory = run._averaged().model()  # type: ignore[operator]
    assert np.array_equal(picture, ours(in_memory))
    assert engine.asked == [(PROMPT, 0), (PROMPT, 1)]
    assert Image.open(output / "samples-00000008.png").size == (32, 16)
    assert Model.load(output, device="cpu").spec.name == "mine"
    # What does not train is bit by bit what it was.
    before = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_frozen_text_tower_stays(folder: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = trained(recipe(output, folder, pictures, half=True))
    assert all(name.startswith("unet.") for name, _ in run.plain.named_parameters())
    text = load_file(output / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in text.values()} == {torch.float16}
    saved = torch.load(next(output.glob("checkpoint-*.pt")), weights_only=True)
    assert all(name.startswith("unet.") for name in saved["module"])


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed_forward", "convolutions")])
def test_lora_is_the_same_everywhere(
    folder: Path, pictures: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    output = tmp_path / "run"
    made = recipe(
        output,
        folder,
        pictures,
        method="lora",
        rank=2,
        alpha=6.0,
        targets=targets,
        train_text_encoder=True,
        lr=0.05,
    )
    run = trained(made)
    learner: Any = run._averaged()
    plain, in_memory = ours(folder), ours(learner.model())
    assert np.abs(in_memory - plain).max() > 5, "it learned something"
    base = Model.load(folder, device="cpu")
    for file in (LORA_FILE, KOHYA_FILE):
        assert near(ours(base, loras=[(output / file, 1.0)]), in_memory), file
        pipeline = peer(folder)
        pipeline.load_lora_weights(output / file)
        assert near(in_memory, theirs(pipeline)), file
    x, t, ids = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randint(0, 500, (2, 16))
    pipeline = peer(folder)
    unet = peft.PeftModel.from_pretrained(pipeline.unet, str(output / "peft" / "unet"))
    text = peft.PeftModel.from_pretrained(
        pipeline.text_encoder, str(output / "peft" / "text_encoder")
    )
    expected = unet(x, t, text(ids)[0]).sample
    torch.testing.assert_close(learner(x, t, ids), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        expected, base.unet(x, t, base.text(ids).states), atol=1e-3  # type: ignore[misc]
    )  # fmt: skip
    # The base's own layers carry no hook, and the next run's start is what it was.
    assert np.array_equal(ours(learner.base), plain)


def test_lora_s_gradients_are_peft_s(folder: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    made = recipe(output, folder, pictures, method="lora", rank=2, alpha=6.0, lr=0.05)
    learner: Any = trained(made)._averaged()
    mine = PersonalObjective(made)
    mine.module.load_state_dict(learner.state_dict())
    batch = mine.batch(0, 2)
    loss, _ = mine.loss(mine.module, batch)
    loss.backward()
    pipeline = peer(folder)
    unet = peft.PeftModel.from_pretrained(
        pipeline.unet, str(output / "peft" / "unet"), is_trainable=True
    )
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.t)
    said = unet(noisy, batch.t, pipeline.text_encoder(batch.ids)[0]).sample
    (said - batch.noise).square().mean().backward()
    own = dict(mine.module.named_parameters())
    theirs_ = {n: w for n, w in unet.named_parameters() if w.requires_grad}
    assert len(own) == len(theirs_)
    for name, weight in theirs_.items():
        path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        end = {"A": "down", "B": "up"}[factor[0]]
        gradient = own[f"unet/{path.replace('.', '/')}/{end}"].grad
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=2e-6)


def test_factors_whose_data_is_replaced_still_act(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """As DistributedDataParallel does when a run is shared by several processes."""
    mine = PersonalObjective(recipe(tmp_path / "run", folder, pictures, method="lora"))
    batch = mine.batch(0, 2)
    with torch.no_grad():
        before = mine.module(batch.latents, batch.t, batch.ids)
    for name, weight in mine.module.named_parameters():
        weight.data = weight.data + (0.5 if name.endswith("up") else 0.0)
    loss, _ = mine.loss(mine.module, batch)
    loss.backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in mine.module.parameters())
    after = mine.module(batch.latents, batch.t, batch.ids)
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_fresh_lora_changes_nothing(folder: Path, pictures: Path, tmp_path: Path) -> None:
    mine = PersonalObjective(recipe(tmp_path / "run", folder, pictures, method="lora"))
    assert np.array_equal(ours(mine.learner.model()), ours(folder))
    numbers = mine.validate(mine.module)
    total = sum(p.numel() for p in mine.module.parameters())
    networks = (mine.base.unet, mine.base.text)
    whole = sum(p.numel() for network in networks for p in network.parameters())  # type: ignore[union-attr]
    assert numbers["trained_percent"] == pytest.approx(100 * total / whole, abs=1e-3)


def test_a_new_word_as_diffusers_reads_it(folder: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    made = recipe(
        output, folder, pictures, method="textual_inversion", vectors=2, lr=0.5, templates=("a {}",)
    )
    mine = PersonalObjective(made)
    start: Any = mine.module
    table = mine.base.text.text_model.embeddings.token_embedding.weight  # type: ignore[union-attr]
    assert torch.equal(start.vectors, table[mine._tokenizer.encode("a")].repeat(2, 1))
    run = Run(made, mine)
    run.go()
    assert [name for name, _ in run.plain.named_parameters()] == ["vectors"]
    saved = load_file(output / EMBEDDING_FILE)
    assert {name: tuple(v.shape) for name, v in saved.items()} == {"<zq>": (2, 12)}
    prompt = "a <zq> on a cat"
    picture = ours(folder, prompt, embeddings=[(str(output / EMBEDDING_FILE), "")])
    assert np.abs(picture - ours(folder, "a a a on a cat")).max() > 2
    learner: Any = run._averaged()
    assert np.array_equal(picture, ours(learner.model(), prompt))
    pipeline = peer(folder)
    pipeline.load_textual_inversion(str(output), weight_name=EMBEDDING_FILE)
    # diffusers spells two vectors as two words, and ours is one word of two rows.
    assert near(picture, theirs(pipeline, prompt))


def test_the_new_word_s_gradient_is_its_row_s(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Against a table that is really longer, all of whose rows have a gradient."""
    made = recipe(
        tmp_path / "run", folder, pictures, method="textual_inversion", templates=("a {} cat",)
    )
    mine = PersonalObjective(made)
    batch = mine.batch(0, 2)
    loss, _ = mine.loss(mine.module, batch)
    loss.backward()
    pipeline = peer(folder)
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    tokenizer.add_tokens("<zq>")
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = text.get_input_embeddings().weight
    rows.data[-1] = rows.data[tokenizer.convert_tokens_to_ids("a</w>")]
    ids = tokenizer(
        ["a <zq> cat"] * 2,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.t)
    said = pipeline.unet(noisy, batch.t, text(ids)[0]).sample
    (said - batch.noise).square().mean().backward()
    vectors: Any = mine.module.vectors
    torch.testing.assert_close(vectors.grad[0], rows.grad[-1], rtol=1e-3, atol=1e-7)
    assert vectors.grad.abs().max() > 1e-6


# -- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dreambooth", "lora", "textual_inversion"])
def test_an_interrupted_run_ends_in_the_same_bits(
    folder: Path, pictures: Path, tmp_path: Path, method: str
) -> None:
    def made(output: Path) -> Any:
        templates = {} if method != "textual_inversion" else {"templates": ("a {}", "{} cat")}
        return recipe(output, folder, pictures, method=method, **templates)

    whole = trained(made(tmp_path / "whole"))

    def stop(seen: int, *_: Any) -> None:
        if seen == 6:
            raise KeyboardInterrupt

    broken = Run(made(tmp_path / "part"), PersonalObjective(made(tmp_path / "part")), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        broken.go()
    resumed = Run(made(tmp_path / "part"), PersonalObjective(made(tmp_path / "part")))
    assert resumed.seen == 4
    resumed.go()
    pairs = whole.plain.state_dict(), resumed.plain.state_dict()
    assert all(torch.equal(value, pairs[1][name]) for name, value in pairs[0].items())
    start = PersonalObjective(made(tmp_path / "other")).module.state_dict()
    assert not all(torch.equal(value, start[name]) for name, value in pairs[0].items())


def test_recomputed_activations_change_nothing(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    runs = []
    for name, forget in (("kept", False), ("again", True)):
        made = recipe(tmp_path / name, folder, pictures, method="lora").replace(
            gradient_checkpointing=forget
        )
        runs.append(trained(made).plain.state_dict())
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name])


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("method", ["dreambooth", "lora", "textual_inversion"])
def test_bfloat16_is_for_the_networks_only(
    folder: Path, pictures: Path, tmp_path: Path, method: str
) -> None:
    more = {"templates": ("a {}",)} if method == "textual_inversion" else {}
    made = recipe(
        tmp_path / "run", folder, pictures, method=method, precision="bfloat16", steps=1, **more
    )
    run = trained(made)
    assert {p.dtype for p in run.plain.parameters()} == {torch.float32}
    start = PersonalObjective(
        recipe(tmp_path / "other", folder, pictures, method=method, **more)
    ).module.state_dict()
    for name, value in run.plain.state_dict().items():
        assert torch.isfinite(value).all(), name
    assert any(not torch.equal(v, start[n]) for n, v in run.plain.state_dict().items())


def test_class_pictures_are_made_once_by_the_model(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    made = recipe(
        tmp_path / "run", folder, pictures, class_prompt=CLASS, num_class_images=10, steps=1
    )
    with pytest.raises(InvalidRequest, match="0 of 10"):
        PersonalObjective(made)
    place = tmp_path / "run" / "class-pictures"

    class Broken(Engine):
        def __call__(self, *asked: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            pictures = super().__call__(*asked)
            return [None if k == 2 else p for k, p in enumerate(pictures)]  # one is withheld

    with pytest.raises(KeyboardInterrupt):
        PersonalObjective(made, Broken())
    assert len(list(place.iterdir())) == 7
    engine = Engine()
    mine = PersonalObjective(made, engine)
    assert engine.asked == [(CLASS, 8), (CLASS, 9), (CLASS, 10)]
    assert mine.classes is not None
    assert len(mine.classes) == 10
    last = np.asarray(Image.open(place / "000010.png"))
    (result,) = Generator(Model.load(folder, device="cpu")).generate(CLASS, seed=10, steps=2)
    assert np.array_equal(last, np.asarray(result.image))
    again = Engine()
    PersonalObjective(made, again)
    assert again.asked == []


def test_several_class_prompts_take_turns(folder: Path, pictures: Path, tmp_path: Path) -> None:
    made = recipe(
        tmp_path / "run", folder, pictures, class_prompt="a cat | a dog", num_class_images=4
    )
    engine = Engine()
    mine = PersonalObjective(made, engine)
    assert engine.asked == [("a cat", 0), ("a dog", 1), ("a cat", 2), ("a dog", 3)]
    assert mine.classes is not None
    batch, tokenizer = mine.batch(0, 4), mine._tokenizer
    for index, ids in enumerate(batch.ids[4:]):
        place = mine.classes.sight(index, 0, 14).place
        assert ids.tolist() == tokenizer.tokens(["a dog" if place % 2 else "a cat"])[0]


# -- errors -------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_named(folder: Path, pictures: Path, tmp_path: Path) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises((InvalidRequest, ValueError), match=match):
            PersonalObjective(recipe(tmp_path / "run", folder, pictures, **settings))

    refused("instance_prompt", instance_prompt=" ")
    refused("class_prompt", class_data=pictures)
    refused("no folder", instance_data=tmp_path / "nowhere")
    refused("resolution", resolution=17)
    refused("instance_prompt.*fewer words", instance_prompt="many words " * 9)
    refused("class_prompt.*fewer words", class_prompt="a cat | " + "many words " * 9)
    refused("templates.*fewer words", method="textual_inversion")
    refused("3 tokens", method="textual_inversion", initializer="cat")
    refused("already", method="textual_inversion", token="!")
    refused("initializer", method="textual_inversion", initializer="")
    refused("belong", method="textual_inversion", class_prompt="a cat")
    refused("holds no picture", instance_data=_empty(tmp_path))
    trained(recipe(tmp_path / "run", folder, pictures, method="lora", steps=1))
    refused("another method", method="dreambooth")
    refused("another rank", method="lora", rank=8)


def _empty(tmp_path: Path) -> Path:
    place = tmp_path / "empty"
    place.mkdir(exist_ok=True)
    (place / "broken.png").write_bytes(b"nothing")
    return place
