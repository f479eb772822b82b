"""The models that all sides read: made once, kept in files, the same numbers for everybody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.compare.cases import MODELS, PICTURE_STEPS

PROMPT = "a red cube on top of a blue sphere"
FORMAT = 1
"""Raised when what is written here changes, so that old files are not taken for new ones."""


def folder(name: str, cache: Path) -> Path:
    """A model in the published layout; made where it is not there yet.

    Full sizes get random weights of unit gain, ``tiny`` is the shipped model.
    """
    place = cache / f"{name}-{FORMAT}"
    done = place / "complete.json"
    if not made(name, cache):
        shutil.rmtree(place, ignore_errors=True)
        if name == "tiny":
            _shipped(place)
        else:
            _random(name, place)
        done.write_text(json.dumps({"model": name, "format": FORMAT}))
    return place


def made(name: str, cache: Path) -> bool:
    """Whether the folder is there, whole."""
    return (cache / f"{name}-{FORMAT}" / "complete.json").is_file()


def single_file(name: str, cache: Path) -> Path:
    """The same model as one original file, for stable-diffusion.cpp."""
    from safelight.convert import convert

    target = cache / f"{name}-{FORMAT}.safetensors"
    if not target.is_file():
        part = target.with_name(f"part-{target.name}")
        part.unlink(missing_ok=True)
        source = folder(name, cache)
        convert(source, part)
        part.rename(target)
    return target


def _shipped(place: Path) -> None:
    from benchmarks import tiny_model

    notes: list[str] = []
    tiny_model.export(tiny_model.tiny(notes), place)
    if notes:
        raise RuntimeError(notes[0])


def _random(name: str, place: Path) -> None:
    import torch

    from safelight.parts import builders
    from safelight.store.folder import write_folder

    spec = MODELS[name]
    spec = spec.replace(
        vision=None, steps=PICTURE_STEPS, schedule=spec.schedule.replace(sampler="dpm++2m")
    )
    generator = torch.Generator().manual_seed(0)
    states = {}
    for part, build in builders(spec).items():
        with torch.device("meta"):
            net = build()
        states[part] = drawn(net, generator).state_dict()
    write_folder(place, spec, states, _tokenizer(spec.text))


def drawn(net: Any, generator: Any) -> Any:
    """Weights of unit gain, several times faster than PyTorch's own initialisation.

    Args:
        net: on the meta device.
    """
    import torch

    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                weight.uniform_(-1, 1, generator=generator).mul_(weight[0].numel() ** -0.5)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
    for name, _buffer in net.named_buffers():
        raise RuntimeError(f"{type(net).__name__} has a buffer {name} that is not set here")
    return net


def _tokenizer(text: Any) -> Any:
    """A vocabulary of still life's words, filled up to the published number of tokens: the
    published one is not at hand offline."""
    from safelight.data import stilllife
    from safelight.text.tokenizer import Tokenizer, learn_vocabulary

    vocab, merges = learn_vocabulary(stilllife.all_captions_corpus(200, 0), 200)
    words = [token for token in vocab if not token.startswith("<|")]
    table = {token: k for k, token in enumerate(words)}
    table |= {f"<|unused-{k}|>": k for k in range(len(words), text.bos_id)}
    table |= {"<|startoftext|>": text.bos_id, "<|endoftext|>": text.eos_id}
    return Tokenizer.from_vocab(
        table, merges, context_length=text.context_length, pad_id=text.pad_id
    )
