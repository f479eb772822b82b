"""LoRA and textual inversion through generate, against diffusers with the same files."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from micro_models import toy_model
from safelight.adapters import Adapters, derive, read_lora
from safelight.cli.adapters import scaled, worded
from safelight.cli.main import main
from safelight.errors import InvalidRequest, WeightsError
from safelight.generate import Generator
from safelight.model import Model
from safelight.nets import lora, lora_keys
from safelight.nets.lora import Adapter, Pair
from safelight.request import GenerateRequest, ImageResult
from safelight.store.adapter_files import read_embedding_file
from safelight.store.registry import Registry
from store.store_micro import make_pipeline

PROMPT = "a cat"
STEPS, SCALE, SEED = 3, 4.0, 11
EVERY_KIND = (
    *lora.UNET_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv",
)  # fmt: skip
TEXT = (*lora.TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro model as diffusers writes it."""
    place = tmp_path_factory.mktemp("adapters") / "micro"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    make_pipeline(scheduler).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator(Model.load(folder, device="cpu"))


@pytest.fixture
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


def ours(generator: Generator, prompt: str = PROMPT, **arguments: Any) -> np.ndarray:
    return pixels(made(generator, prompt, **arguments))


def made(generator: Generator, prompt: str = PROMPT, **arguments: Any) -> ImageResult:
    (result,) = generator.generate(
        prompt, seed=SEED, steps=STEPS, guidance_scale=SCALE, **arguments
    )
    return result


def pixels(result: ImageResult) -> np.ndarray:
    assert result.image is not None, result.message
    return np.asarray(result.image, dtype=float)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 0.51)  # one of the two is rounded


def adapters_for(model: Model, seed: int = 0, rank: int = 3) -> dict[str, Adapter]:
    """A strong adapter of every kind of layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    assert model.text is not None
    for component, net, endings in (
        ("unet", model.unet, EVERY_KIND),
        ("text_encoder", model.text, TEXT),
    ):
        fresh = lora.fresh(net, lora.targets(net, endings), rank=rank, generator=generator)
        found[component] = Adapter(
            {
                path: Pair(pair.down.detach(), torch.randn(pair.up.shape, generator=generator), 2.0)
                for path, pair in fresh.pairs.items()
            }
        )
    return found


def kohya(model: Model, path: Path, **options: Any) -> Path:
    state, metadata = lora_keys.write(adapters_for(model, **options), "kohya")
    save_file(state, path, metadata)
    return path


# -- against diffusers --------------------------------------------------------------------------


def test_kohya_s_file_in_a_picture(generator: Generator, peer: Any, tmp_path: Path) -> None:
    file = kohya(generator.model, tmp_path / "style.safetensors")
    plain = ours(generator)
    assert near(plain, theirs(peer))
    peer.load_lora_weights(file)
    peer.set_adapters(peer.get_active_adapters(), 0.7)
    adapted = ours(generator, loras=[(file, 0.7)])
    assert np.abs(adapted - plain).max() > 20
    assert near(adapted, theirs(peer))
    assert np.array_equal(ours(generator), plain), "nothing stays behind"


def test_several_of_peft_s_at_once(generator: Generator, peer: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    for name, rank in (("one", 2), ("two", 4)):
        config = peft.LoraConfig(
            r=rank, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False
        )
        peer.unet.add_adapter(config, name)
        words = peft.LoraConfig(
            r=rank, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=False
        )
        peer.text_encoder.add_adapter(words, name)
        peer.save_lora_weights(
            tmp_path / name,
            unet_lora_layers=peft.get_peft_model_state_dict(peer.unet, adapter_name=name),
            text_encoder_lora_layers=peft.get_peft_model_state_dict(
                peer.text_encoder, adapter_name=name
            ),
            unet_lora_adapter_metadata=config.to_dict(),
            text_encoder_lora_adapter_metadata=words.to_dict(),
        )
    peer.set_adapters(["one", "two"], [0.8, -0.5])
    plain = ours(generator)
    adapted = ours(generator, loras=[(tmp_path / "one", 0.8), (tmp_path / "two", -0.5)])
    assert np.abs(adapted - plain).max() > 5
    assert near(adapted, theirs(peer))


def test_what_peft_itself_saves(generator: Generator, peer: Any, tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        alpha_pattern={"attn2.to_k": 1},
        use_rslora=True,
        target_modules=["to_q", "to_k", "proj_in", "ff.net.2"],
        init_lora_weights=False,
    )
    wrapped: Any = peft.get_peft_model(peer.unet, config)
    wrapped.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter_config.json").is_file()
    plain = ours(generator)
    result = made(generator, loras=[tmp_path / "mine"])
    assert np.abs(pixels(result) - plain).max() > 5
    assert near(pixels(result), theirs(peer))  # injected in place: the pipeline has it on
    assert result.metadata["adapters"][0]["name"] == "mine"


# -- sharing ------------------------------------------------------------------------------------


def test_requests_of_one_call_have_their_own(generator: Generator, tmp_path: Path) -> None:
    a = kohya(generator.model, tmp_path / "a.safetensors")
    b = kohya(generator.model, tmp_path / "b.safetensors", seed=1)
    one = GenerateRequest(prompt=PROMPT, seed=SEED, steps=STEPS, guidance_scale=SCALE)
    uses = [(), ((str(a), 0.5),), ((str(b), 0.5),), (), ((str(a), 0.5), (str(b), 0.25))]
    before = {name: p.clone() for name, p in generator.model.unet.named_parameters()}
    together = generator.generate(request=[one.replace(loras=each) for each in uses])
    alone = [generator.generate(request=one.replace(loras=each))[0] for each in uses]
    for left, right in zip(together, alone, strict=True):
        assert np.abs(pixels(left) - pixels(right)).max() <= 1
    assert not np.array_equal(pixels(together[1]), pixels(together[2]))
    for name, p in generator.model.unet.named_parameters():
        assert torch.equal(p, before[name])


def test_few_adapted_models_are_kept_and_share_what_they_can(folder: Path, tmp_path: Path) -> None:
    model = Model.load(folder, device="cpu")
    assert model.text is not None
    found = adapters_for(model)
    state, metadata = lora_keys.write({"unet": Adapter(dict([*found["unet"].pairs.items()][:1]))})
    save_file(state, tmp_path / "one.safetensors", metadata)
    adapters = Adapters(model)
    request = GenerateRequest(prompt="x", loras=[(tmp_path / "one.safetensors", 1)])
    twin = adapters.model(adapters.plan(request))
    assert twin is adapters.model(adapters.plan(request))
    old = {p.data_ptr() for p in model.unet.parameters()}
    assert sum(p.data_ptr() not in old for p in twin.unet.parameters()) == 1
    assert twin.text is model.text
    assert twin.vae is model.vae
    assert twin.text_cache is not model.text_cache
    assert twin.runtime._fused_decoder is model.runtime._fused_decoder
    for k in range(20):
        adapters.model(adapters.plan(request.replace(loras=[(tmp_path / "one.safetensors", k)])))
    assert len(adapters._models._items) == 8
    # A file that is written anew is read anew.
    save_file({k: v * 2 for k, v in state.items()}, tmp_path / "one.safetensors", metadata)
    assert adapters.model(adapters.plan(request)) is not twin


def test_a_derived_model_forgets_what_belongs_to_the_first() -> None:
    model = toy_model()
    model.runtime  # noqa: B018
    model.text_cache.put("a", torch.ones(1))
    twin = derive(model, source="twin")
    assert "runtime" not in vars(twin)
    assert twin.text_cache.get("a") is None
    assert model.text_cache.get("a") is not None
    assert (twin.source, model.source) == ("twin", "memory")


# -- names, reports, errors ---------------------------------------------------------------------


def test_names_in_a_folder(folder: Path, generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    file = kohya(generator.model, tmp_path / "people" / "ada.safetensors")
    shutil.copy(file, tmp_path / "style.safetensors")
    named = Generator(Model.load(folder, device="cpu"), lora_dir=tmp_path)
    result = made(named, loras={"people/ada": 0.7})
    assert np.array_equal(pixels(result), ours(generator, loras=[(file, 0.7)]))
    assert np.array_equal(pixels(result), ours(named, loras=[("ada", 0.7)]))
    assert np.array_equal(pixels(result), ours(named, loras=[("style.safetensors", 0.7)]))
    record = result.metadata
    assert record["adapters"][0]["name"] == "ada"
    assert str(tmp_path) not in json.dumps(record)
    with pytest.raises(InvalidRequest, match=r"no LoRA 'nobody'.*Known: people/ada, style"):
        named.generate(PROMPT, loras=["nobody"])
    closed = Registry(tmp_path, paths=False)
    assert closed.find("ada") == file
    with pytest.raises(InvalidRequest, match="Known"):
        closed.find(str(file))
    with pytest.raises(InvalidRequest, match="--lora-dir"):
        Registry().find("ada")
    with pytest.raises(InvalidRequest, match="no folder"):
        Registry(tmp_path / "none")


def test_the_report(generator: Generator, tmp_path: Path) -> None:
    state, _ = lora_keys.write(adapters_for(generator.model), "kohya")
    whole = len(state)
    state["lora_unet_down_blocks_7_resnets_0_conv1.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "x.safetensors")
    found = read_lora(generator.model, tmp_path / "x.safetensors")
    assert (found.matched, found.unmatched) == (
        whole,
        ("lora_unet_down_blocks_7_resnets_0_conv1.alpha",),
    )
    result = made(generator, loras=[tmp_path / "x.safetensors"])
    assert any(f"1 of {whole + 1} keys belong to no layer" in n for n in result.notices)
    save_file({"lora_unet_nowhere.alpha": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsError, match="of no layer here: lora_unet_nowhere"):
        generator.generate(PROMPT, loras=[tmp_path / "y.safetensors"])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("x.dora_scale", "DoRA"),
        ("x.hada_w1_a", "LoHa"),
        ("x.lokr_w1", "LoKr"),
        ("x.oft_blocks", "OFT"),
        ("x.lora_mid.weight", "Tucker"),
    ],
)
def test_other_kinds_are_refused_by_name(
    generator: Generator, tmp_path: Path, key: str, kind: str
) -> None:
    state, _ = lora_keys.write(adapters_for(generator.model), "kohya")
    stem = next(iter(state)).partition(".")[0]
    save_file(state | {key.replace("x", stem): torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=rf"is a.*{kind}"):
        read_lora(generator.model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("loras", "match"),
    [
        ([("a", "b", "c")], "pair"),
        ([("a", "strong")], "number"),
        ([("", 1)], "empty name"),
        ([3], "a name"),
        ([("a", float("nan"))], "loras"),
        ([("a", 1e9)], "at most"),
        (["a"] * 40, "at most 32"),
    ],
)
def test_wrong_requests(loras: Any, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as error:
        GenerateRequest(prompt="x", loras=loras)
    assert error.value.field == "loras"


def test_requests_keep_their_adapters() -> None:
    request = GenerateRequest.from_kwargs(
        prompt="x", lora={"a": 0.5}, embeddings=["cat.pt", ("b.pt", "dog")]
    )
    assert request.loras == (("a", 0.5),)
    assert request.embeddings == (("cat.pt", ""), ("b.pt", "dog"))
    assert GenerateRequest.from_json(request.canonical()) == request


# -- textual inversion --------------------------------------------------------------------------


def vectors(n: int, width: int = 12) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n)) * 2


LAYOUTS = ["diffusers.bin", "diffusers.safetensors", "a1111.pt", "original.pt", "a1111.safetensors"]


def embedding_file(place: Path, layout: str, value: Tensor) -> Path:
    path = place / f"mona.{layout.rpartition('.')[2]}"
    if layout == "diffusers.bin":
        torch.save({"<mona>": value}, path)
    elif layout == "diffusers.safetensors":
        save_file({"<mona>": value}, path)
    elif layout == "a1111.safetensors":
        save_file({"emb_params": value}, path)
    else:
        inner: Any = {"*": value}
        if layout == "original.pt":  # as the first trainer saved it
            inner = torch.nn.ParameterDict({"*": torch.nn.Parameter(value)})
        whole = {"string_to_token": {"*": 265}, "string_to_param": inner, "name": "<mona>"}
        torch.save({**whole, "step": 100, "sd_checkpoint": None}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_textual_inversion(
    generator: Generator, peer: Any, tmp_path: Path, layout: str, count: int
) -> None:
    value = vectors(count)
    path = embedding_file(tmp_path, layout, value)
    word = "mona" if layout == "a1111.safetensors" else "<mona>"
    state = {"string_to_param": {"*": value}, "name": word}
    peer.load_textual_inversion(state if "a1111" in layout else {word: value}, token=word)
    prompt = f"a {word} cat"
    assert near(ours(generator, prompt, embeddings=[path]), theirs(peer, prompt))
    assert not near(ours(generator, prompt), ours(generator, prompt, embeddings=[path]))
    # Another word, beside a LoRA, and the model keeps nothing.
    style = kohya(generator.model, tmp_path / "style.safetensors")
    both = {"loras": [(style, 0.5)], "embeddings": [(path, "zap")]}
    peer.load_lora_weights(style)
    peer.set_adapters(peer.get_active_adapters(), 0.5)
    expected = theirs(peer, prompt)
    result = made(generator, "a zap cat", **both)
    assert near(pixels(result), expected)
    assert result.metadata["adapters"][1]["words"] == ["zap"]
    assert generator.model.tokenizer is not None
    assert generator.model.tokenizer.vocab_size == 514


def test_bare_tensors_and_wrong_files(generator: Generator, tmp_path: Path) -> None:
    torch.save(vectors(2), tmp_path / "bare.pt")
    with pytest.raises(WeightsError, match=r"names no word.*bare\.pt:WORD"):
        generator.generate(PROMPT, embeddings=[tmp_path / "bare.pt"])
    assert read_embedding_file(tmp_path / "bare.pt", "mona")["mona"].shape == (2, 12)
    save_file({"<wide>": vectors(1, 16)}, tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="16 wide, but micro reads words 12 wide"):
        generator.generate(PROMPT, embeddings=[tmp_path / "wide.safetensors"])
    save_file({"a": vectors(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="a word of the model's already"):
        generator.generate(PROMPT, embeddings=[tmp_path / "a.safetensors"])
    bare = str(tmp_path / "bare.pt")
    with pytest.raises(InvalidRequest, match="zap comes twice"):
        generator.generate(PROMPT, embeddings=[(bare, "zap"), (bare, "zap")])
    save_file({"unet.x": torch.ones(2, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no textual inversion"):
        read_embedding_file(tmp_path / "other.safetensors")


def test_a_hostile_embedding_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"string_to_param": {"*": vectors(1)}, "name": Attack()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(WeightsError, match="nothing was run"):
            read_embedding_file(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_peft_s_patterns_cannot_take_for_ever() -> None:
    settings = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}
    alphas = lora_keys._Alphas({lora_keys.METADATA_KEY: json.dumps(settings)}, "x")
    with pytest.raises(WeightsError, match="too involved"):
        alphas("unet", "a" * 40 + "b", 1)


# -- doors --------------------------------------------------------------------------------------


def test_the_command_and_replay(
    folder: Path, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        return int(leaving.value.code or 0)

    file = kohya(generator.model, tmp_path / "style.safetensors")
    cat = embedding_file(tmp_path, "diffusers.bin", vectors(2))
    out = tmp_path / "out.png"
    common = ("-m", folder, "--steps", STEPS, "--cfg-scale", SCALE, "-s", SEED, "--device", "cpu")
    wanted = ("--lora", f"{file}:0.4", "--lora", "style:0.3", "--lora-dir", tmp_path)
    words = ("--embedding", f"{cat}:mona")
    assert run("generate", "a mona", *common, *wanted, *words, "-o", out, "-q") == 0
    expected = ours(
        generator, "a mona", loras=[(file, 0.4), (file, 0.3)], embeddings=[(cat, "mona")]
    )
    assert np.array_equal(np.asarray(Image.open(out), dtype=float), expected)
    capsys.readouterr()
    again = ("-m", folder, "--lora-dir", tmp_path, "--embedding-dir", tmp_path)
    assert run("replay", out, *again, "--json") == 0
    assert json.loads(capsys.readouterr().out)["difference"]["largest"] == 0
    assert run("replay", out, "-m", folder) == 2
    assert "no LoRA 'style'" in capsys.readouterr().err
    assert run("generate", "a", *common, "--lora", "nobody", "--lora-dir", tmp_path) == 2
    assert "Known: mona, style" in capsys.readouterr().err
    assert run("generate", "a", *common, "--lora", f"{file}:strong") == 2


def test_how_the_command_reads_names() -> None:
    assert scaled(["a:0.5", "b", r"C:\x.safetensors", r"C:\x.safetensors:-1"]) == (
        ("a", 0.5),
        ("b", 1.0),
        (r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors", -1.0),
    )
    assert worded(["a.pt", "a.pt:<cat>", r"C:\a.pt"]) == (
        ("a.pt", ""),
        ("a.pt", "<cat>"),
        (r"C:\a.pt", ""),
    )
