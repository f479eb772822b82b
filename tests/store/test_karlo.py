"""Karlo's prior and unCLIP's statistics: original files, and what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer
from torch import Tensor

from safelight import presets
from safelight.convert import convert
from safelight.errors import InvalidRequest, WeightsError
from safelight.nets.prior import Prior
from safelight.store.clip_stats import read_clip_stats
from safelight.store.components import read_json
from safelight.store.karlo import read_karlo_prior
from safelight.store.single_file import read_single_file, write_single_file
from safelight.store.weights import load_into, read_weights, save_safetensors
from store.original_files import original_file
from store.test_single_file import assert_same, micro

HEADS, WIDTH = 2, 64


def peer() -> PriorTransformer:
    torch.manual_seed(0)
    net = PriorTransformer(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        num_layers=2,
        embedding_dim=12,
        num_embeddings=5,
    ).eval()
    torch.nn.init.normal_(net.positional_embedding)
    torch.nn.init.normal_(net.prd_embedding)
    return net


def original(net: PriorTransformer) -> dict[str, Tensor]:
    """The names and the stacking that Karlo's file has, written by hand."""
    state = net.state_dict()
    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "proj_in": "clip_img_proj",
        "embedding_proj": "text_emb_proj",
        "encoder_hidden_states_proj": "text_enc_proj",
        "norm_out": "final_ln",
        "proj_to_clip_embeddings": "out_proj",
    }
    out = {
        "positional_embedding": state["positional_embedding"],
        "prd_emb": state["prd_embedding"],
    }
    for new, old in plain.items():
        out |= {f"{old}.{p}": state[f"{new}.{p}"] for p in ("weight", "bias")}
    inside = {
        "norm1": "ln_1",
        "norm3": "ln_2",
        "attn1.to_out.0": "attn.c_proj",
        "ff.net.0.proj": "mlp.c_fc",
        "ff.net.2": "mlp.c_proj",
    }
    for k in range(2):
        new, old = f"transformer_blocks.{k}", f"transformer.resblocks.{k}"
        for part in ("weight", "bias"):
            for a, b in inside.items():
                out[f"{old}.{b}.{part}"] = state[f"{new}.{a}.{part}"]
            rows = []
            for head in range(HEADS):  # one head after another: its query, its key, its value
                for x in "qkv":
                    whole = state[f"{new}.attn1.to_{x}.{part}"]
                    rows.append(whole[head * WIDTH : (head + 1) * WIDTH])
            out[f"{old}.attn.c_qkv.{part}"] = torch.cat(rows)
    return {f"model.{name}": tensor for name, tensor in out.items()}


def statistics(width: int, path: Path) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pair = (torch.randn(width, generator=generator), torch.rand(width, generator=generator) + 0.5)
    torch.save(pair, path)
    return pair


def test_the_original_prior_s_answers_are_diffusers(tmp_path: Path) -> None:
    net = peer()
    torch.save({"state_dict": original(net)}, tmp_path / "prior.ckpt")
    mean, std = statistics(12, tmp_path / "stats.th")
    with pytest.raises(InvalidRequest, match=r"clip_stats.*ViT-L-14_stats\.th"):
        read_karlo_prior(tmp_path / "prior.ckpt", None)
    spec, state = read_karlo_prior(tmp_path / "prior.ckpt", tmp_path / "stats.th")
    assert (spec.heads, spec.layers, spec.embedding_width, spec.text_tokens) == (HEADS, 2, 12, 5)
    ours = Prior(spec)
    load_into(ours, state)
    generator = torch.Generator().manual_seed(2)
    x, text, states = (
        torch.randn(shape, generator=generator) for shape in ((3, 12), (3, 12), (3, 5, 12))
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
    t = torch.tensor([3, 500, 999])
    with torch.no_grad():
        expected = net(x, t, text, states, mask.bool()).predicted_image_embedding
        assert torch.allclose(ours(x, t, text, states, mask), expected, atol=1e-5)
        assert torch.allclose(ours.to_embedding(x), x * std + mean)


def test_conversion_of_the_prior_both_ways(tmp_path: Path) -> None:
    net = peer()
    torch.save({"state_dict": original(net)}, tmp_path / "prior.ckpt")
    mean, _ = statistics(12, tmp_path / "stats.th")
    done = convert(tmp_path / "prior.ckpt", tmp_path / "p", clip_stats=tmp_path / "stats.th")
    assert done["family"] == "prior"
    again = PriorTransformer.from_pretrained(tmp_path / "p" / "prior")
    state = net.state_dict() | {"clip_mean": mean[None]}
    found = again.state_dict()
    for name in set(state) - {"clip_std"}:
        assert torch.equal(found[name], state[name]), name
    convert(tmp_path / "p", tmp_path / "back.safetensors")
    back = dict(read_weights(tmp_path / "back.safetensors"))
    for name, tensor in original(net).items():
        assert torch.equal(back[name], tensor), name
    spec, state = read_karlo_prior(tmp_path / "back.safetensors", None)
    assert torch.equal(state["clip_mean"], mean[None])
    assert read_json(tmp_path / "p" / "prior" / "config.json")["num_layers"] == spec.layers


def test_a_prior_with_other_tensors_is_refused(tmp_path: Path) -> None:
    tensors = original(peer()) | {"model.extra.weight": torch.ones(1)}
    save_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"model\.extra\.weight"):
        read_karlo_prior(tmp_path / "x.safetensors", None)


def test_unclip_on_clip_l_needs_its_statistics(tmp_path: Path) -> None:
    spec, states = micro("unclip")
    wide = spec.replace(unet=spec.unet.replace(class_embedding_size=1536))
    states["unet"] = {
        n: torch.zeros(t.shape[0], 1536) if n == "class_embedding.linear_1.weight" else t
        for n, t in states["unet"].items()
    }
    path = tmp_path / "l.safetensors"
    write_single_file(path, wide, states)
    with pytest.raises(InvalidRequest, match=r"clip_stats.*on CLIP L.*--clip-stats"):
        read_single_file(path)
    mean, std = statistics(768, tmp_path / "stats.th")
    contents = read_single_file(path, clip_stats=tmp_path / "stats.th")
    expected = {"mean": mean[None], "std": std[None]}
    assert_same(contents.tensors["image_normalizer"], expected)
    assert_same(contents.tensors["vision"], states["vision"])
    # A file that we wrote with them keeps them.
    write_single_file(path, wide, {**states, "image_normalizer": expected})
    assert_same(read_single_file(path).tensors["image_normalizer"], expected)


def test_unclip_on_openclip_h_has_none(tmp_path: Path) -> None:
    spec, states = micro("unclip")
    write_single_file(tmp_path / "h.safetensors", spec, states)
    found = read_single_file(tmp_path / "h.safetensors").tensors["image_normalizer"]
    assert_same(found, {"mean": torch.zeros(1, 12), "std": torch.ones(1, 12)})


def test_which_unclip_a_file_is(tmp_path: Path) -> None:
    from safelight.store.single_file import detect

    spec = presets.UNCLIP_H.replace(
        unet=presets.UNCLIP_H.unet.replace(class_embedding_size=1536), vision=presets.CLIP_L_VISION
    )
    found, notes = detect(original_file(spec, tmp_path))
    assert found.vision == presets.CLIP_L_VISION
    assert found.unet == spec.unet
    assert not notes


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: (torch.ones(3), torch.ones(4)), "statistics"),
        (lambda: (torch.ones(3), torch.zeros(3)), "usable"),
        (lambda: (torch.ones(3), torch.full((3,), float("nan"))), "usable"),
        (lambda: (torch.ones(3, 3), torch.ones(3, 3)), "not a row"),
        (lambda: (torch.arange(3), torch.arange(3)), "not a row"),
        (lambda: (torch.ones(3),), "tuple"),
        (lambda: {"mean": torch.ones(3)}, "tuple"),
    ],
)
def test_wrong_statistics(content, match: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "stats.th")
    with pytest.raises(WeightsError, match=match):
        read_clip_stats(tmp_path / "stats.th")
    torch.save((torch.ones(3), torch.ones(3)), tmp_path / "stats.th")
    with pytest.raises(WeightsError, match="not of 768"):
        read_clip_stats(tmp_path / "stats.th", 768)
