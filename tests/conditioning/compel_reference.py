"""The ``compel`` package on a micro text tower whose weights hang on no generator.

``python tests/conditioning/compel_reference.py`` writes ``compel_golden.json`` anew, where the
package (2.5.1) can be imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from micro_models import MERGES, MICRO, VOCAB
from safelight.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).with_name("compel_golden.json")
LAYERS = {"last": False, "penultimate": True}
"""What is read of the tower; the second is SD 2's, whose published folders lack the last layer."""
SPEC = MICRO.text
assert SPEC is not None

PROMPTS = [
    "a red cube",
    "a red++ cube",
    "a red cube-- on (top of)1.5 a sphere",
    "(a (blue sphere)0.3)0.5 beside- a cone",
    "a (red)0 cube",
    "a (red).attend(1.3) cube, (blue)+++",
    '("a red cube", "a blue+ sphere").blend(0.7, 0.3)',
    '("a red cube", "a blue sphere on top of a small green cone, beside a cube").blend(1, 1)',
    '("a red cube", "a blue sphere").blend(1.5, -0.2, no_normalize)',
    '("a red cube", "a blue- sphere").and()',
    '("a red cube", "a blue sphere").and(1, 0.4)',
    "a red cube on top of a blue- sphere. a small green cone to the left of a large yellow+ ball",
    "red cube, blue (sphere)0.6, green cone, yellow ball, small cube, large (red cone)1.4, cube",
    r"a \(red\) cube \"hot\" (hot-dog)1.2",
]


def deterministic(tower: nn.Module) -> nn.Module:
    """Fill every parameter with a sine of its own."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(tower.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.37 * k) + k)
            scale = 0.2 if p.ndim > 1 else 0.1
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_((wave.reshape(p.shape) * scale + offset).to(p.dtype))
    return tower


def tower() -> nn.Module:
    """transformers' text model of the micro spec."""
    from transformers import CLIPTextConfig, CLIPTextModel

    assert SPEC is not None
    config = CLIPTextConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.width,
        intermediate_size=SPEC.mlp_width,
        num_hidden_layers=SPEC.layers,
        num_attention_heads=SPEC.heads,
        max_position_embeddings=SPEC.context_length,
        hidden_act=SPEC.activation,
        bos_token_id=SPEC.bos_id,
        eos_token_id=SPEC.eos_id,
        pad_token_id=SPEC.pad_id,
    )
    return deterministic(CLIPTextModel(config).eval())


def compel_states(prompts: list[str], *, penultimate: bool = False) -> list[Tensor]:
    """What the package says: ``(S, width)`` a prompt."""
    from compel import Compel, ReturnedEmbeddingsType
    from transformers import CLIPTokenizer

    assert SPEC is not None
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.from_vocab(VOCAB, MERGES, context_length=SPEC.context_length).save(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    encoder = tower()
    if not hasattr(encoder, "text_model"):  # where the package looks for the final norm
        object.__setattr__(encoder, "text_model", encoder)
    kind = "PENULTIMATE" if penultimate else "LAST"
    compel = Compel(
        tokenizer=tokenizer,
        text_encoder=encoder,
        truncate_long_prompts=False,
        returned_embeddings_type=ReturnedEmbeddingsType[f"{kind}_HIDDEN_STATES_NORMALIZED"],
    )
    with torch.no_grad():
        return [compel.build_conditioning_tensor(prompt)[0] for prompt in prompts]


def digest(states: Tensor) -> list[float]:
    """A number a token: enough to notice any change, little enough to read."""
    basis = torch.cos(torch.arange(states.shape[1], dtype=torch.float64))
    return [round(value, 6) for value in (states.double() @ basis).tolist()]


if __name__ == "__main__":
    blocks = []
    for name, penultimate in LAYERS.items():
        found = zip(PROMPTS, compel_states(PROMPTS, penultimate=penultimate), strict=True)
        lines = ",\n".join(f"{json.dumps(p)}: {json.dumps(digest(s))}" for p, s in found)
        blocks.append(f'"{name}": {{\n{lines}\n}}')
    GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
