"""``safelight info FILE``: what any file is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.cli.main import main
from safelight.store.identify import identify
from safelight.store.single_file import write_single_file
from store.test_single_file import micro, with_ema

DOWN = torch.ones(4, 768)


def kohya(key: str = "lora_down.weight") -> dict[str, torch.Tensor]:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {
        f"{stem}.{key}": DOWN,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(()),
    }


@pytest.mark.parametrize(
    ("tensors", "kind", "words"),
    [
        (kohya(), "lora", ["a LoRA in kohya layout", "unet and text_encoder of v1", "rank 4"]),
        (kohya("hada_w1_a"), "lora", ["a LoHa in kohya"]),
        (kohya("dora_scale"), "lora", ["a DoRA in kohya"]),
        ({"unet.mid.attn2.to_k.lora_A.weight": torch.ones(2, 1024)}, "lora", ["PEFT", "of v2"]),
        ({"unet.mid.attn2.processor.to_k_lora.down.weight": DOWN}, "lora", ["diffusers layout"]),
        ({"<cat>": torch.ones(3, 768)}, "embedding", ["<cat> (3), 768 wide (v1)"]),
        ({"emb_params": torch.ones(1, 1024)}, "embedding", ["x (1), 1024 wide (v2)"]),
        ({"mean": torch.ones(1, 8), "std": torch.ones(1, 8)}, "clip_stats", ["statistics"]),
        ({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}, "component", ["autoencoder"]),
        ({"concept_embeds": torch.ones(17, 8)}, "component", ["safety checker"]),
        ({"conditioner.x": torch.ones(2, 2, 2)}, "unknown", ["SDXL"]),
        ({"double_blocks.0": torch.ones(2, 2, 2)}, "unknown", ["Flux"]),
    ],
)
def test_adapters_and_parts(
    tensors: dict[str, torch.Tensor], kind: str, words: list[str], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_dim": "4"})
    found = identify(tmp_path / "x.safetensors")
    assert found["kind"] == kind
    for each in words:
        assert each in found["what"]
    assert found["metadata"] == {"ss_network_dim": "4"}
    assert found["tensors"] == len(tensors)


def test_checkpoints(tmp_path: Path) -> None:
    spec, states = micro("v1")
    write_single_file(tmp_path / "x.safetensors", spec, states)
    found = identify(tmp_path / "x.safetensors")
    assert (found["kind"], found["family"], found["ema"]) == ("checkpoint", "sd-v1", False)
    assert found["parameters"] == sum(t.numel() for s in states.values() for t in s.values())
    _, _, original = with_ema(tmp_path)
    torch.save({"state_dict": original}, tmp_path / "x.ckpt")
    assert identify(tmp_path / "x.ckpt")["kind"] == "unknown"  # no model has so narrow a context


def test_pickles(tmp_path: Path) -> None:
    torch.save((torch.ones(8), torch.ones(8)), tmp_path / "a.th")
    assert identify(tmp_path / "a.th")["what"].endswith("8 wide")
    torch.save(torch.ones(2, 768), tmp_path / "b.pt")
    assert "bare tensor" in identify(tmp_path / "b.pt")["what"]
    torch.save({"string_to_param": {"*": torch.ones(2, 768)}, "name": "cat"}, tmp_path / "c.pt")
    assert "cat (2), 768 wide" in identify(tmp_path / "c.pt")["what"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        return int(leaving.value.code or 0)

    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(kohya(), folder / "pytorch_lora_weights.safetensors", {"note": "\x1b[31mred\nline"})
    assert run("info", folder) == 0
    out = capsys.readouterr().out
    assert "a LoRA in kohya layout" in out
    assert "\x1b" not in out
    assert "note:  [31mred line" in out
    save_file(kohya("lokr_w1"), folder / "k.safetensors")
    assert run("info", folder / "k.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["supported"] is False
    (folder / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert run("info", folder / "broken.safetensors") == 4
