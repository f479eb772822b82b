"""Original single files: our table against diffusers' converters, both ways, and planted faults."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file

from safelight import presets
from safelight.errors import InvalidRequest, WeightsError
from safelight.spec import ModelSpec, TextSpec, UNetSpec, VAESpec, VisionSpec
from safelight.store import keymaps
from safelight.store.single_file import (
    detect,
    read_single_file,
    read_vae_file,
    write_single_file,
)
from safelight.store.weights import Entry, StateDict, save_safetensors
from store.original_files import meta_states, original_file
from store.store_micro import make_text, make_unet, make_vae, make_vision

SHAPES = {
    "v1": {},
    "deep": {"layers_per_block": 2},
    "v2": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
    "unclip": {
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 24,
    },
    "x4": {
        "use_linear_projection": True,
        "num_class_embeds": 10,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
VAE_SPEC = VAESpec(channels=(8, 16), layers_per_block=1, norm_groups=4, sample_size=16)
TEXT_SPEC = TextSpec(
    vocab_size=514, width=12, layers=2, heads=2, mlp_width=24, context_length=16,
    bos_id=512, eos_id=513, pad_id=513,
)  # fmt: skip
VISION_SPEC = VisionSpec(
    image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=24, projection_width=12
)


def unet_spec(**config) -> UNetSpec:
    channels = config.get("block_out_channels", (8, 16))
    types = config.get("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
    heads = config.get("attention_head_dim", 2)
    label = config.get("projection_class_embeddings_input_dim") or config.get("num_class_embeds")
    kinds = {None: "none", 24: "projection", 10: "table"}
    return UNetSpec(
        sample_size=8,
        channels=channels,
        attention=tuple(t.startswith("Cross") for t in types),
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(channels),
        only_cross_attention=(False,) * len(channels),
        layers_per_block=config.get("layers_per_block", 1),
        context_width=12,
        linear_projection=config.get("use_linear_projection", False),
        class_embedding=kinds[label],
        class_embedding_size=label or 0,
        norm_groups=4,
    )


def micro(kind: str) -> tuple[ModelSpec, dict[str, dict[str, torch.Tensor]]]:
    """A micro model's spec and its states under published names."""
    spec = ModelSpec(name="micro", unet=unet_spec(**SHAPES[kind]), vae=VAE_SPEC, text=TEXT_SPEC)
    states = {
        "unet": make_unet(**SHAPES[kind]).state_dict(),
        "vae": make_vae().state_dict(),
        "text": {f"text_model.{k}": t for k, t in make_text().state_dict().items()},
    }
    if kind == "unclip":
        spec = spec.replace(vision=VISION_SPEC, family="unclip")
        states["vision"] = make_vision().state_dict()
    return spec, states


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", SHAPES)
def test_round_trip(kind, tmp_path):
    spec, states = micro(kind)
    path = tmp_path / "model.safetensors"
    write_single_file(path, spec, states)
    contents = read_single_file(path)  # which says itself what it is
    assert contents.spec == spec
    assert set(contents.tensors) - {"image_normalizer"} == set(states)
    for part, state in states.items():
        assert_same(contents.tensors[part], state)


@pytest.mark.parametrize("kind", SHAPES)
def test_diffusers_converts_what_we_write(kind, tmp_path):
    spec, states = micro(kind)
    write_single_file(tmp_path / "x.safetensors", spec, states)
    original = load_file(tmp_path / "x.safetensors")
    config = dict(make_unet(**SHAPES[kind]).config)
    assert_same(convert_ldm_unet_checkpoint(dict(original), config), states["unet"])
    vae = convert_ldm_vae_checkpoint(dict(original), dict(make_vae().config))
    assert_same(vae, states["vae"])
    if spec.unet.linear_projection:
        text = convert_open_clip_checkpoint(make_text(), dict(original))
        # diffusers' list of layers to ignore is for full size: layer 23.
        unused = ".layers.2."
        text = {k: t for k, t in text.items() if unused not in k and "position_ids" not in k}
        text = {k: t for k, t in text.items() if not k.startswith("text_projection")}
        named = {
            k if k.startswith("text_model.") else f"text_model.{k}": t for k, t in text.items()
        }
        assert_same(named, states["text"])


FULL = {
    "v1": (presets.SD_V1, 686, 196),
    "small": (presets.SD_SMALL, 442, 196),
    "v2": (presets.SD_V2_768, 686, 372),
    "unclip": (presets.UNCLIP_H, 690, 372),
    "x4": (presets.SD_V2_BASE.replace(unet=presets.X4_UNET, vae=presets.X4_VAE), None, 372),
}


@pytest.mark.parametrize("kind", FULL)
def test_the_table_is_a_bijection_at_full_size(kind, tmp_path):
    spec, unet_count, text_count = FULL[kind]
    states = meta_states(spec)
    rows = keymaps.file_rows(spec)
    original = keymaps.to_original(states, rows, tmp_path)
    if unet_count:
        assert (
            sum(n.startswith(keymaps.UNET) for n in original) == unet_count == len(states["unet"])
        )
    assert len(states["text"]) == text_count
    assert sum(n.startswith(keymaps.VAE) for n in original) == len(states["vae"])
    back = keymaps.to_published(StateDict(original, tmp_path), rows)
    for part, state in states.items():
        shapes = {n: e.shape for n, e in state.entries.items()}
        assert {n: e.shape for n, e in back[part].entries.items()} == shapes


def test_names_that_everybody_knows():
    original = keymaps.to_original(
        meta_states(presets.SD_V1), keymaps.file_rows(presets.SD_V1), "x"
    )
    known = {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    }
    for name, shape in known.items():
        assert original[name].shape == shape, name
    assert keymaps.ema_name("model.diffusion_model.input_blocks.0.0.weight") == (
        "model_ema.diffusion_modelinput_blocks00weight"
    )


@pytest.mark.parametrize(
    ("spec", "step", "prediction", "family", "expected"),
    [
        (presets.SD_V1, 470000, None, "sd-v1", presets.SD_V1),
        (presets.SD_SMALL, None, None, "sd-v1", presets.SD_SMALL),
        (presets.SD_V2_BASE, 875000, None, "sd-v2", presets.SD_V2_BASE),
        (presets.SD_V2_768, 110000, None, "sd-v2", presets.SD_V2_768),
        (presets.SD_V2_768, None, None, "sd-v2", presets.SD_V2_768),
        (presets.SD_V2_BASE, None, "epsilon", "sd-v2", presets.SD_V2_BASE),
        (presets.UNCLIP_H, None, None, "unclip", presets.UNCLIP_H),
    ],
)
def test_detection(spec, step, prediction, family, expected, tmp_path):
    state = original_file(spec, tmp_path, {"global_step": step})
    found, notes = detect(state, prediction)
    assert found == expected.replace(name="file")
    assert found.family == family
    assert bool(notes) == (family == "sd-v2" and step is None and prediction is None)


@pytest.mark.parametrize(
    ("base", "channels", "family"),
    [
        (presets.SD_V1, 9, "inpaint"),
        (presets.SD_V2_BASE, 9, "inpaint"),
        (presets.SD_V2_BASE, 5, "depth"),
    ],
)
def test_detection_of_extra_channels(base, channels, family, tmp_path):
    spec = base.replace(unet=base.unet.replace(in_channels=channels))
    found, notes = detect(original_file(spec, tmp_path))
    assert found == spec.replace(name="file", family=family)
    assert not notes


def test_detection_of_the_upscaler_and_of_variations(tmp_path):
    x4 = presets.SD_V2_BASE.replace(unet=presets.X4_UNET, vae=presets.X4_VAE)
    found, _ = detect(original_file(x4, tmp_path))
    assert (found.family, found.unet, found.vae) == ("x4-upscaler", x4.unet, x4.vae)
    variations = presets.SD_V1.replace(
        family="image-variations", text=None, vision=presets.CLIP_L_VISION
    )
    found, _ = detect(original_file(variations, tmp_path))
    assert found == variations.replace(name="file")


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("conditioner.embedders.0.x", "SDXL"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("lora_unet_down_blocks_0.lora_up.weight", "LoRA"),
        ("something.else", "something.else"),
    ],
)
def test_files_of_other_families_say_what_they_look_like(name, guess, tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {name: torch.ones(1)})
    with pytest.raises(WeightsError, match=guess):
        read_single_file(tmp_path / "x.safetensors")


def with_ema(tmp_path):
    spec, states = micro("v1")
    write_single_file(tmp_path / "x.safetensors", spec, states)
    original = load_file(tmp_path / "x.safetensors")
    averages = {
        keymaps.ema_name(name): tensor + 1
        for name, tensor in original.items()
        if name.startswith(keymaps.UNET)
    }
    extra = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1),
        "alphas_cumprod": torch.ones(1000),
        "first_stage_model.loss.logvar": torch.ones(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    return spec, states, {**original, **averages, **extra}


@pytest.mark.parametrize("ema", [None, True, False])
def test_moving_averages(tmp_path, ema):
    spec, states, original = with_ema(tmp_path)
    torch.save({"state_dict": original, "global_step": 5}, tmp_path / "x.ckpt")
    contents = read_single_file(tmp_path / "x.ckpt", spec=spec, ema=ema)
    shift = 0 if ema is False else 1
    assert_same(contents.tensors["unet"], {n: t + shift for n, t in states["unet"].items()})
    assert_same(contents.tensors["vae"], states["vae"])
    assert_same(contents.tensors["text"], states["text"])
    assert any("moving average" in note for note in contents.notes) == (ema is not False)


def test_a_missing_average_is_an_error(tmp_path):
    spec, _, original = with_ema(tmp_path)
    del original["model_ema.diffusion_modelout2bias"]
    save_safetensors(tmp_path / "x.safetensors", original)
    with pytest.raises(WeightsError, match=r"model_ema\.diffusion_modelout2bias"):
        read_single_file(tmp_path / "x.safetensors", spec=spec)
    plain = {n: t for n, t in original.items() if not n.startswith("model_ema.")}
    save_safetensors(tmp_path / "y.safetensors", plain)
    with pytest.raises(InvalidRequest, match="no moving average"):
        read_single_file(tmp_path / "y.safetensors", spec=spec, ema=True)


@pytest.mark.parametrize("spelling", ["flat text", "vae."])
def test_community_spellings(tmp_path, spelling):
    spec, states = micro("v1")
    write_single_file(tmp_path / "x.safetensors", spec, states)
    original = load_file(tmp_path / "x.safetensors")
    old, new = {
        "flat text": ("transformer.text_model.", "transformer."),
        "vae.": ("first_stage_model.", "vae."),
    }[spelling]
    renamed = {name.replace(old, new): tensor for name, tensor in original.items()}
    save_safetensors(tmp_path / "y.safetensors", renamed)
    contents = read_single_file(tmp_path / "y.safetensors", spec=spec)
    for part, state in states.items():
        assert_same(contents.tensors[part], state)


def test_an_unknown_tensor_is_listed(tmp_path):
    spec, states = micro("v1")
    write_single_file(tmp_path / "x.safetensors", spec, states)
    original = load_file(tmp_path / "x.safetensors")
    original["model.diffusion_model.input_blocks.1.0.extra.weight"] = torch.ones(1)
    save_safetensors(tmp_path / "x.safetensors", original)
    with pytest.raises(WeightsError, match=r"input_blocks\.1\.0\.extra\.weight"):
        read_single_file(tmp_path / "x.safetensors", spec=spec)
    states["unet"] = {**states["unet"], "up_blocks.9.x": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"up_blocks\.9\.x"):
        write_single_file(tmp_path / "y.safetensors", spec, states)


@pytest.mark.parametrize("layout", ["original", "bare", "published", "old"])
def test_separate_autoencoders(tmp_path, layout):
    spec, states = micro("v1")
    rows = {"vae": keymaps.vae_rows(spec.vae)}
    entries: dict[str, Entry] = keymaps.to_original(
        {"vae": StateDict.of(states["vae"])}, rows, tmp_path
    )
    tensors = {
        "original": {f"first_stage_model.{n}": e.read() for n, e in entries.items()},
        "bare": {**{n: e.read() for n, e in entries.items()}, "loss.logvar": torch.ones(1)},
        "published": states["vae"],
        "old": {n.replace(".to_q.", ".query."): t for n, t in states["vae"].items()},
    }[layout]
    save_safetensors(tmp_path / "vae.safetensors", tensors)
    assert_same(read_vae_file(tmp_path / "vae.safetensors", spec), states["vae"])


def test_half_precision(tmp_path):
    spec, states = micro("v2")
    write_single_file(tmp_path / "x.safetensors", spec, states, dtype=torch.float16)
    contents = read_single_file(tmp_path / "x.safetensors", spec=spec)
    assert {e.dtype for s in contents.tensors.values() for e in s.entries.values()} == {
        torch.float16
    }
