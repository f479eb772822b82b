"""The published folder layout, against folders that diffusers and transformers write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from safelight.errors import WeightsError
from safelight.spec import ScheduleSpec
from safelight.store.components import read_component
from safelight.store.folder import read_folder, write_folder
from store.store_micro import make_text, make_tokenizer, make_unet, make_vae, make_vision


class OurTokenizer:
    """What write_folder needs of a tokenizer, without importing text/."""

    def save(self, folder: Path) -> None:
        make_tokenizer().save_pretrained(folder)


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "drop"}))


def assert_holds(found, expected, prefix=""):
    expected = {prefix + name: tensor for name, tensor in expected.items()}
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_reads_a_v1_folder(v1):
    contents = read_folder(v1)
    spec = contents.spec
    assert (spec.family, spec.name, contents.notes) == ("sd-v1", "micro", ())
    assert spec.unet.channels == (8, 16)
    assert spec.unet.heads == (2, 2)
    assert spec.unet.attention == (True, False)
    assert spec.unet.sample_size == 8
    assert (spec.text.bos_id, spec.text.eos_id, spec.text.pad_id) == (512, 513, 513)
    assert spec.text.context_length == 16
    assert spec.vae.sample_size == 16
    assert not spec.vae.force_float32
    assert spec.schedule == ScheduleSpec(spacing="leading")
    assert contents.tokenizer == v1 / "tokenizer"
    assert_holds(contents.tensors["unet"], make_unet().state_dict())
    assert_holds(contents.tensors["vae"], make_vae().state_dict())
    assert_holds(contents.tensors["text"], make_text().state_dict(), "text_model.")


def test_reads_a_v2_folder(v2_template):
    spec = read_folder(v2_template).spec
    assert spec.family == "sd-v2"
    assert spec.unet.heads == (2, 4)
    assert spec.text.pad_id == 0
    assert spec.schedule.prediction_type == "v"
    assert spec.schedule.sampler == "ddim"
    assert (spec.schedule.final_alpha_one, spec.schedule.steps_offset) == (False, 1)


@pytest.mark.parametrize("template", ["v1_template", "v2_template"])
def test_written_folders_load_in_diffusers_and_give_the_same_picture(template, request, tmp_path):
    source = request.getfixturevalue(template)
    contents = read_folder(source)

    class Copy:
        def save(self, folder):
            shutil.copytree(contents.tokenizer, folder)

    write_folder(tmp_path / "copy", contents.spec, contents.tensors, Copy())
    again = read_folder(tmp_path / "copy")
    assert again.spec == contents.spec
    pictures = [
        StableDiffusionPipeline.from_pretrained(folder)(
            "a cube!",
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="pt",
        ).images
        for folder in (source, tmp_path / "copy")
    ]
    assert torch.equal(*pictures)


def test_a_projection_travels_with_the_text_tower(v1, tmp_path):
    contents = read_folder(v1)
    tensors = dict(contents.tensors)
    tensors["text"] = {
        **contents.tensors["text"],
        "text_projection.weight": torch.ones(6, 12),
    }
    tensors["vision"] = make_vision().state_dict()
    vision_folder = tmp_path / "vision"
    make_vision().save_pretrained(vision_folder)
    vision, _, _ = read_component(vision_folder, "vision")
    spec = contents.spec.replace(
        name="tiny",
        text=contents.spec.text.replace(projection_width=6),
        vision=vision,
        steps=25,
        guidance_scale=3.0,
        words=("cube", "red"),
    )
    write_folder(tmp_path / "tiny", spec, tensors, OurTokenizer(), dtype=torch.float16)
    again = read_folder(tmp_path / "tiny")
    assert again.spec == spec
    assert again.tensors["text"]["text_projection.weight"].dtype == torch.float16
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny")
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
    expected = contents.tensors["text"]["text_model.final_layer_norm.weight"]
    assert torch.equal(pipeline.text_encoder.final_layer_norm.weight, expected.half().float())
    assert pipeline.image_encoder is not None


def test_half_precision_variants_fall_back_with_a_note(v1, caplog):
    for name in ("unet", "vae"):
        file = v1 / name / "diffusion_pytorch_model.safetensors"
        half = {k: t.half() for k, t in load_file(file).items()}
        save_file(half, v1 / name / "diffusion_pytorch_model.fp16.safetensors")
    contents = read_folder(v1, "fp16")
    assert contents.tensors["unet"]["conv_in.weight"].dtype == torch.float16
    assert contents.notes == ("text: no fp16 weights, using the plain ones",)
    assert "text: no fp16" in caplog.text
    assert read_folder(v1).tensors["unet"]["conv_in.weight"].dtype == torch.float32
    with pytest.raises(WeightsError, match=r"no variant 'non_ema'\. Variants there: fp16"):
        read_folder(v1, "non_ema")


def test_a_folder_that_has_only_a_variant_is_read_with_a_note(v1):
    file = v1 / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    contents = read_folder(v1)
    assert contents.notes == ("unet: no plain weights, using non_ema",)


@pytest.mark.parametrize("which", ["all", "some", "fp16"])
def test_bin_folders_whole_or_mixed(v1, which):
    expected = {n: dict(s) for n, s in read_folder(v1).tensors.items()}
    expected = {n: {k: t.clone() for k, t in s.items()} for n, s in expected.items()}
    names = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "pytorch_model",
    }
    for name, stem in names.items():
        if which == "some" and name == "unet":
            continue
        (file,) = (v1 / name).glob("*.safetensors")
        infix = ".fp16" if which == "fp16" else ""
        torch.save(load_file(file), v1 / name / f"{stem}{infix}.bin")
        file.unlink()
    contents = read_folder(v1, "fp16" if which == "fp16" else None)
    for name, state in expected.items():
        assert_holds(contents.tensors[name], state)
    assert not contents.notes


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folders(v1, variant):
    expected = {k: t.clone() for k, t in read_folder(v1).tensors["unet"].items()}
    shutil.rmtree(v1 / "unet")
    make_unet().save_pretrained(v1 / "unet", max_shard_size="20KB", variant=variant)
    assert len(list((v1 / "unet").glob("*-of-*"))) > 1
    contents = read_folder(v1, variant)
    assert_holds(contents.tensors["unet"], expected)


def test_old_attention_names_and_ranks(v1):
    file = v1 / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        new = name
        for now, before in old.items():
            new = new.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        square = new != name and name.endswith("weight") and "decoder" in name
        renamed[new] = tensor[:, :, None, None] if square else tensor
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, file)
    assert_holds(read_folder(v1).tensors["vae"], state)


@pytest.mark.parametrize("names", ["flat", "prefixed"])
def test_text_towers_of_both_spellings(v1, names):
    file = v1 / "text_encoder" / "model.safetensors"
    flat = load_file(file)
    prefixed = {f"text_model.{k}": t for k, t in flat.items()}
    state = dict(flat if names == "flat" else prefixed)
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, file, {"format": "pt"})
    assert_holds(read_folder(v1).tensors["text"], prefixed)


def test_a_single_tokenizer_json_is_enough(v1):
    assert [p.name for p in (v1 / "tokenizer").glob("*.json")]
    assert not (v1 / "tokenizer" / "vocab.json").exists(), "transformers 5 writes one file"
    assert read_folder(v1).spec.text.eos_id == 513


def test_old_configs_take_class_defaults_and_their_sample_size_is_repaired(v1):
    file = v1 / "unet" / "config.json"
    keep = (
        "sample_size",
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
        "attention_head_dim",
        "layers_per_block",
        "norm_num_groups",
    )
    config = json.loads(file.read_text())
    old_config = {k: config[k] for k in keep}
    file.write_text(json.dumps(old_config | {"_diffusers_version": "0.3.0"}))
    old = read_folder(v1).spec.unet
    assert old.sample_size == 64
    assert (old.norm_eps, old.linear_projection) == (1e-5, False)
    edit(file, _diffusers_version="0.10.0")
    assert read_folder(v1).spec.unet.sample_size == 8
    edit(v1 / "vae" / "config.json", scaling_factor="drop")
    assert read_folder(v1).spec.vae.scaling_factor == 0.18215


def test_unknown_keys_are_noted(v1, caplog):
    edit(v1 / "unet" / "config.json", sparkle=3)
    read_folder(v1)
    assert "ignored unknown keys: sparkle" in caplog.text
    caplog.clear()
    edit(v1 / "unet" / "config.json", sparkle="drop")
    read_folder(v1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("unet", {"act_fn": "gelu"}),
        ("unet", {"addition_embed_type": "text_time"}),
        ("unet", {"transformer_layers_per_block": [1, 2]}),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}),
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"mid_block_type": None}),
        ("unet", {"cross_attention_dim": [1, 2]}),
        ("unet", {"attention_head_dim": 3}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"latents_mean": [0.0]}),
        ("vae", {"latent_channels": "four"}),
        ("text_encoder", {"hidden_act": "relu"}),
        ("text_encoder", {"use_attention_mask": True}),
        ("scheduler", {"beta_schedule": "sigmoid"}),
        ("scheduler", {"thresholding": True}),
        ("scheduler", {"skip_prk_steps": False}),
        ("scheduler", {"prediction_type": "flow"}),
    ],
)
def test_keys_that_change_the_mathematics_are_errors(v1, component, changes):
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    edit(v1 / component / file, **changes)
    key = {"attention_head_dim": "divisible"}.get(*changes, *changes)
    with pytest.raises(WeightsError, match=key) as error:
        read_folder(v1)
    assert str(v1 / component / file) in str(error.value)


def betas(**more):
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **more}


@pytest.mark.parametrize(
    ("name", "settings", "sampler", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, "pndm", {}),
        ("DDIMScheduler", {}, "ddim", {}),
        ("DPMSolverMultistepScheduler", {}, "dpm++2m", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpm++3m", {}),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            "dpm++2m-sde",
            {"use_karras_sigmas": True},
        ),
        (
            "DPMSolverMultistepScheduler",
            {"solver_type": "heun"},
            "dpm++2m",
            {"solver_type": "heun"},
        ),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler", {}),
        ("EulerAncestralDiscreteScheduler", {}, "euler-a", {}),
        ("HeunDiscreteScheduler", {}, "heun", {}),
        ("LMSDiscreteScheduler", {}, "lms", {}),
        ("UniPCMultistepScheduler", {}, "unipc", {}),
        ("LCMScheduler", {"original_inference_steps": 25}, "lcm", {"original_inference_steps": 25}),
        ("DDPMScheduler", {}, "ddpm", {}),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_schedulers_round_trip(v1, tmp_path, name, settings, sampler, options, prediction):
    made = getattr(diffusers, name)(**betas(steps_offset=1, prediction_type=prediction, **settings))
    made.save_pretrained(v1 / "scheduler")
    contents = read_folder(v1)
    schedule = contents.spec.schedule
    assert schedule.sampler == sampler
    assert schedule.options == options
    assert schedule.prediction_type == {"epsilon": "epsilon", "v_prediction": "v"}[prediction]
    assert not contents.notes
    write_folder(tmp_path / "copy", contents.spec, contents.tensors, OurTokenizer())
    assert read_folder(tmp_path / "copy").spec.schedule == schedule
    again = getattr(diffusers, name).from_pretrained(tmp_path / "copy" / "scheduler")
    for key, value in made.config.items():
        if key != "clip_sample" and not key.startswith("_"):
            assert again.config[key] == value, key


def test_what_the_reference_pipelines_repair_is_repaired(v1):
    config = v1 / "scheduler" / "scheduler_config.json"
    edit(config, steps_offset=0, clip_sample=True)
    contents = read_folder(v1)
    assert contents.spec.schedule.steps_offset == 1
    assert contents.spec.schedule.options == {}
    assert "steps_offset 0 read as 1" in contents.notes[0]
    edit(v1 / "model_index.json", _class_name="StableUnCLIPImg2ImgPipeline")
    contents = read_folder(v1)
    assert contents.spec.schedule.steps_offset == 0
    assert contents.spec.schedule.options == {"clip_sample": True}


def test_missing_scheduler_keys_are_class_defaults(v1):
    config = v1 / "scheduler" / "scheduler_config.json"
    config.write_text('{"_class_name": "DDIMScheduler"}')
    schedule = read_folder(v1).spec.schedule
    assert (schedule.kind, schedule.beta_start, schedule.beta_end) == ("linear", 0.0001, 0.02)
    assert schedule.final_alpha_one
    assert schedule.spacing is None


def test_an_unknown_sampler_is_replaced_with_a_note(v1):
    edit(v1 / "scheduler" / "scheduler_config.json", _class_name="KDPM2DiscreteScheduler")
    contents = read_folder(v1)
    assert contents.spec.schedule.sampler == "dpm++2m"
    assert "KDPM2DiscreteScheduler is unknown" in contents.notes[0]


def test_image_variations_read_a_whole_clip_model(v1):
    vision = make_vision().config.to_dict()
    text = make_text().config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    shutil.rmtree(v1 / "text_encoder")
    shutil.rmtree(v1 / "tokenizer")
    clip.save_pretrained(v1 / "image_encoder")
    edit(
        v1 / "model_index.json",
        _class_name="StableDiffusionImageEmbedPipeline",
        text_encoder="drop",
        tokenizer="drop",
        image_encoder=["transformers", "CLIPModel"],
    )
    contents = read_folder(v1)
    assert contents.spec.family == "image-variations"
    assert contents.spec.text is None
    assert contents.spec.vision.projection_width == 12
    assert set(contents.tensors["vision"]) == set(make_vision().state_dict())


def test_text_encoder_with_projection(v1, tmp_path):
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(make_text(projection_dim=7).config)
    shutil.rmtree(v1 / "text_encoder")
    model.save_pretrained(v1 / "text_encoder")
    contents = read_folder(v1)
    assert contents.spec.text.projection_width == 7
    assert_holds(contents.tensors["text"], model.state_dict())


@pytest.mark.parametrize(
    ("unet", "family"),
    [
        ({"in_channels": 9}, "inpaint"),
        ({"in_channels": 5}, "depth"),
        ({"in_channels": 7, "num_class_embeds": 10}, "x4-upscaler"),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
            "unclip",
        ),
    ],
)
def test_families_are_told_apart_and_written_back(v1, tmp_path, unet, family):
    shutil.rmtree(v1 / "unet")
    make_unet(**unet).save_pretrained(v1 / "unet")
    contents = read_folder(v1)
    assert contents.spec.family == family
    write_folder(tmp_path / "copy", contents.spec, contents.tensors, OurTokenizer())
    again = read_folder(tmp_path / "copy")
    assert again.spec == contents.spec
    written = json.loads((tmp_path / "copy" / "unet" / "config.json").read_text())
    original = make_unet(**unet).config
    for key in written:
        if not key.startswith("_"):
            assert written[key] == _listed(original[key]), key


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"unet": "drop", "transformer": ["diffusers", "SD3Transformer2DModel"]}, "not of the"),
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "not of the"),
        ({"vae": "drop"}, "not of the"),
    ],
)
def test_folders_of_other_families(v1, changes, match):
    edit(v1 / "model_index.json", **changes)
    with pytest.raises(WeightsError, match=match) as error:
        read_folder(v1)
    assert "model_index.json" in str(error.value)


def test_parts_of_different_models(v1):
    shutil.rmtree(v1 / "text_encoder")
    make_text(hidden_size=16).save_pretrained(v1 / "text_encoder")
    with pytest.raises(WeightsError, match="different models"):
        read_folder(v1)


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        ("model_index.json", "model_index.json: cannot be read"),
        ("vae/config.json", "vae/config.json: cannot be read"),
        ("vae/diffusion_pytorch_model.safetensors", "vae: holds no weights"),
        ("tokenizer/tokenizer.json", "tokenizer: holds neither vocab.json nor tokenizer.json"),
    ],
)
def test_missing_files_are_named(v1, gone, match):
    (v1 / gone).unlink()
    with pytest.raises(WeightsError, match=match):
        read_folder(v1)


def test_a_missing_safety_checker_is_noted(v1):
    edit(
        v1 / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
    )
    contents = read_folder(v1)
    assert contents.notes == ("safety_checker is named by model_index.json but is not there",)


def test_digests_are_checked(v1, tmp_path):
    contents = read_folder(v1)
    write_folder(tmp_path / "copy", contents.spec, contents.tensors, OurTokenizer())
    file = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        read_folder(tmp_path / "copy")
    read_folder(tmp_path / "copy", verify=False)


def test_members_of_a_family_share_components(v1, tmp_path):
    contents = read_folder(v1)
    write_folder(tmp_path / "a", contents.spec, contents.tensors, OurTokenizer())
    unet = {"unet": contents.tensors["unet"]}
    shared = {n: f"../a/{n}" for n in ("vae", "tokenizer")}
    shared["text"] = "../a/text_encoder"
    spec = contents.spec.replace(name="b")
    write_folder(tmp_path / "b", spec, unet, shared=shared)
    assert not (tmp_path / "b" / "vae").exists()
    again = read_folder(tmp_path / "b")
    assert again.spec == spec
    assert again.tokenizer == tmp_path / "a" / "tokenizer"
    assert_holds(again.tensors["vae"], contents.tensors["vae"])
    edit(tmp_path / "b" / "safelight.json", shared={"vae": "../../elsewhere"})
    with pytest.raises(WeightsError, match="outside its siblings"):
        read_folder(tmp_path / "b")


def test_writing_needs_the_parts_that_the_spec_names(v1, tmp_path):
    contents = read_folder(v1)
    with pytest.raises(ValueError, match="text, vae"):
        write_folder(tmp_path / "x", contents.spec, {"unet": contents.tensors["unet"]})
    assert not (tmp_path / "x").exists()
