"""A prior's components in a published folder: Karlo's own, or one of unCLIP with a prior in front.

Karlo's pipeline calls them ``prior``, ``text_encoder``, ``tokenizer`` and ``prior_scheduler``; a
``StableUnCLIPPipeline`` has ``prior_text_encoder`` and ``prior_tokenizer`` instead, because its own
decoder reads text too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from safelight.errors import WeightsError
from safelight.spec import PriorSpec, ScheduleSpec
from safelight.store import configs, schedulers
from safelight.store.components import read_component, read_json
from safelight.store.folder import NOTES_FILE, Saves, converted, special_ids, write_json
from safelight.store.weights import StateDict, save_safetensors, sha256

_READ = configs.words(
    "num_attention_heads attention_head_dim num_layers embedding_dim num_embeddings "
    "additional_embeddings dropout"
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "time_embed_act_fn": ("silu",),
    "norm_in_type": (None,),
    "embedding_proj_norm_type": (None,),
    "encoder_hid_proj_type": ("linear",),
    "added_emb_type": ("prd",),
    "time_embed_dim": (None,),
    "embedding_proj_dim": (None,),
    "clip_embed_dim": (None,),
}
_CLIP = 5.0  # of Karlo's scheduler


@dataclass(frozen=True)
class PriorContents:
    """What a folder holds of a prior; no weights have been read yet."""

    spec: PriorSpec
    net: StateDict
    text: StateDict
    tokenizer: Path


def has_prior(folder: str | Path) -> bool:
    """Whether a folder holds one."""
    return (Path(folder) / "prior" / "config.json").is_file()


def read_prior(folder: str | Path, variant: str | None = None) -> PriorContents:
    """Read the prior of a folder in either layout.

    Raises:
        WeightsError: a part is missing, or is not of this family.
    """
    folder = Path(folder)
    own = "prior_" if (folder / "prior_text_encoder").is_dir() else ""
    file = folder / "prior" / "config.json"
    config = read_json(file)
    configs.check(config, file, _READ, _FIXED)
    _, net, _ = read_component(folder / "prior", "prior", variant)
    if net is None:
        raise WeightsError(folder / "prior", "holds no weights.")
    text_spec, text, _ = read_component(folder / f"{own}text_encoder", "text", variant)
    tokenizer = folder / f"{own}tokenizer"
    assert text is not None
    text_spec = text_spec.replace(**special_ids(tokenizer))  # type: ignore[union-attr]
    if not getattr(text_spec, "projection_width", 0):
        raise WeightsError(
            folder / f"{own}text_encoder", "has no projection, which a prior's text tower needs."
        )
    schedule, clip = _schedule(folder / "prior_scheduler" / "scheduler_config.json")
    try:
        spec = PriorSpec(
            heads=config.get("num_attention_heads", 32),
            head_width=config.get("attention_head_dim", 64),
            layers=config.get("num_layers", 20),
            embedding_width=config.get("embedding_dim", 768),
            text_tokens=config.get("num_embeddings", 77),
            extra_tokens=config.get("additional_embeddings", 4),
            text=text_spec,  # type: ignore[arg-type]
            schedule=schedule,
            clip=clip,
            **_own(folder),
        )
    except ValidationError as error:
        raise WeightsError(file, str(error.errors()[0]["msg"])) from error
    return PriorContents(spec, _kept(net), text, tokenizer)


def attach_prior(
    folder: str | Path,
    spec: PriorSpec,
    net: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    tokenizer: Saves,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Put a prior in front of an unCLIP model's folder: ``diffusers`` loads it as a
    ``StableUnCLIPPipeline``, and from pictures still as the other.

    Args:
        folder: as :func:`safelight.store.folder.write_folder` left it.
        net, text: of the prior, and of its own text tower.
        dtype: floating-point tensors are converted to it; None keeps theirs.
    """
    folder = Path(folder)
    reader = folder / "prior_text_encoder"
    write_json(reader / "config.json", configs.text_config(spec.text))
    save_safetensors(reader / "model.safetensors", converted(text, dtype))
    tokenizer.save(folder / "prior_tokenizer")
    write_prior_net(folder / "prior", spec, net, dtype)
    write_json(folder / "prior_scheduler" / "scheduler_config.json", _scheduler_config(spec))

    index, own = read_json(folder / "model_index.json"), read_json(folder / NOTES_FILE)
    index |= {
        "_class_name": "StableUnCLIPPipeline",
        "prior": ["diffusers", "PriorTransformer"],
        "prior_scheduler": ["diffusers", "DDPMScheduler"],
        "prior_text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "prior_tokenizer": ["transformers", "CLIPTokenizer"],
    }
    own["prior"] = {"steps": spec.steps, "guidance_scale": spec.guidance_scale}
    for part in ("prior", "prior_text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            own["sha256"][file.relative_to(folder).as_posix()] = sha256(file)
    write_json(folder / NOTES_FILE, own)
    write_json(folder / "model_index.json", index)


def write_prior_net(
    place: Path, spec: PriorSpec, net: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """A ``PriorTransformer``'s own folder."""
    config = {
        "_class_name": "PriorTransformer",
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.head_width,
        "num_layers": spec.layers,
        "embedding_dim": spec.embedding_width,
        "num_embeddings": spec.text_tokens,
        "additional_embeddings": spec.extra_tokens,
        "dropout": 0.0,
    }
    write_json(place / "config.json", config)
    save_safetensors(place / "diffusion_pytorch_model.safetensors", converted(net, dtype))


def _scheduler_config(spec: PriorSpec) -> dict[str, Any]:
    clip = {} if spec.clip is None else {"clip_sample_range": spec.clip}
    return {
        **schedulers.scheduler_config(spec.schedule),
        "variance_type": "fixed_small_log",
        "clip_sample": spec.clip is not None,
        **clip,
    }


def _own(folder: Path) -> dict[str, Any]:
    """The defaults that :func:`attach_prior` noted; published priors have their card's."""
    notes = read_json(folder / NOTES_FILE) if (folder / NOTES_FILE).is_file() else {}
    own = notes.get("prior")
    known = own if isinstance(own, Mapping) else {}
    return {key: known[key] for key in ("steps", "guidance_scale") if key in known}


def _kept(net: StateDict) -> StateDict:
    """Without the causal mask, which some files store."""
    return net.renamed(lambda name: None if name == "causal_attention_mask" else name)


def _schedule(file: Path) -> tuple[ScheduleSpec, float | None]:
    """The prior's noise schedule. UnCLIPScheduler and DDPMScheduler say the same in other words:
    the decoder's authors sample Karlo's prior with the second."""
    plain = PriorSpec().schedule
    if not file.is_file():
        return plain, _CLIP
    config: Mapping[str, Any] = read_json(file)
    kind = config.get("beta_schedule", "squaredcos_cap_v2")
    prediction = config.get("prediction_type", "sample")
    if kind != "squaredcos_cap_v2" or prediction not in ("sample", "epsilon"):
        raise WeightsError(file, f"beta_schedule {kind!r} with {prediction!r} is not supported.")
    schedule = plain.replace(
        steps=config.get("num_train_timesteps", 1000),
        prediction_type="x0" if prediction == "sample" else "epsilon",
        steps_offset=config.get("steps_offset", 0),
    )
    clip = config.get("clip_sample_range", _CLIP) if config.get("clip_sample", True) else None
    return schedule, clip
