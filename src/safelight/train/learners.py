"""What a personalisation trains, one class a method: from noisy latents and token ids to the
network's prediction.

A learner's parameters are what trains and nothing else, so checkpoints and averages hold just
that. Networks that stay as they are hang beside it, shared and unregistered, and a copy of a
learner shares them too.

* DreamBooth (Ruiz et al. 2023, 2208.12242): the UNet itself, and the text tower on request.
* LoRA (Hu et al. 2021, 2106.09685): factors beside the layers of both.
* Textual inversion (Gal et al. 2022, 2208.01618, section 3): the vectors of one new word.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.adapters import Adaptation, Embedding, LoRA, adapt, derive
from safelight.convert import write_model
from safelight.model import Model
from safelight.nets import lora, lora_keys
from safelight.nets.clip import TextTower
from safelight.nets.lora import Adapter, Pair
from safelight.nets.unet import UNet
from safelight.store.weights import StateDict, save_safetensors
from safelight.train.personal_recipe import PersonalRecipe

UNET_TARGETS = {
    "attention": lora.UNET_ATTENTION,
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolutions": (
        *("conv1", "conv2", "conv_shortcut"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
TEXT_TARGETS = {
    "attention": lora.TEXT_ATTENTION,
    "feed_forward": ("mlp.fc1", "mlp.fc2"),
    "convolutions": (),
}
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"


class Learner(nn.Module):
    """See the file's head. ``base`` is the model as it was; learners never change its weights."""

    base: Model

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        """Networks of this learner's own over shared weights that stay as they are."""
        return ()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predict.

        Args:
            x: ``(N, C, h, w)`` noisy latents; ``t`` ``(N,)`` timesteps.
            ids: ``(N, L)`` token ids.
        """
        raise NotImplementedError

    def model(self) -> Model:
        """The trained model as everybody else uses it: plain networks, nothing that trains."""
        raise NotImplementedError

    def write(self, folder: Path) -> list[Path]:
        """Write what was trained; returns what to hand to ``safelight generate``."""
        raise NotImplementedError


class DreamBooth(Learner):
    """The UNet's own weights, and the text tower's on request.

    Args:
        name: of the model that comes out.
        words: of its prompts, for models that list the words they know.
    """

    text: TextTower

    def __init__(
        self, base: Model, settings: PersonalRecipe, name: str, words: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        assert base.text is not None
        self.__dict__["base"] = base
        self.settings, self.name, self.words = settings, name, words
        self.unet = copy.deepcopy(base.unet).train().requires_grad_(True)
        self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.train_text_encoder:
            self.text = copy.deepcopy(base.text).train().requires_grad_(True)
            if self.text.text_projection is not None:
                self.text.text_projection.requires_grad_(False)  # cross-attention reads states
        else:
            self.__dict__["text"] = base.text

    def __deepcopy__(self, memo: dict[int, Any]) -> DreamBooth:
        twin = DreamBooth(self.base, self.settings, self.name, self.words)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids).states)

    def model(self) -> Model:
        base = self.base
        spec = base.spec.replace(name=self.name)
        if spec.words:
            spec = spec.replace(words=tuple(sorted({*spec.words, *self.words})))
        changes: dict[str, Any] = {"unet": _plain(UNet, base.spec.unet, self.unet), "spec": spec}
        if self.settings.train_text_encoder:
            changes["text"] = _plain(TextTower, base.spec.text, self.text)
        return derive(base, **changes, source="memory", digest="")

    def write(self, folder: Path) -> list[Path]:
        write_model(self.model(), folder, dtype="float16" if self.settings.half else "float32")
        return [folder]


class LowRank(Learner):
    """LoRA's factors, for the UNet's layers and on request the text tower's."""

    networks: dict[str, nn.Module]

    def __init__(self, base: Model, settings: PersonalRecipe, seed: int = 0) -> None:
        super().__init__()
        assert base.text is not None
        self.__dict__["base"] = base
        self.settings, self.seed = settings, seed
        networks: dict[str, nn.Module] = {"unet": lora.view(base.unet)}
        endings = {"unet": UNET_TARGETS}
        if settings.train_text_encoder:
            networks["text_encoder"] = lora.view(base.text)
            endings["text_encoder"] = TEXT_TARGETS
        generator, self.adapters = torch.Generator().manual_seed(seed), dict[str, Adapter]()
        for component, network in networks.items():
            chosen = [e for target in settings.targets for e in endings[component][target]]
            fresh = lora.fresh(
                network,
                lora.targets(network, chosen),
                rank=settings.rank,
                alpha=settings.alpha,
                generator=generator,
            )
            pairs = {}
            for path, pair in fresh.pairs.items():
                down, up = nn.Parameter(pair.down.detach()), nn.Parameter(pair.up.detach())
                stem = f"{component}.{path}".replace(".", "/")
                self.register_parameter(f"{stem}/down", down)
                self.register_parameter(f"{stem}/up", up)
                pairs[path] = Pair(down, up, pair.alpha)
            self.adapters[component] = Adapter(pairs)
            # By hooks that last: activations may be computed again on the way back.
            lora.attach(network, [(self.adapters[component], 1.0)])
        self.__dict__["networks"] = networks

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRank:
        twin = LowRank(self.base, self.settings, self.seed)
        twin.load_state_dict(self.state_dict())
        return twin

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return tuple(self.networks.values())

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        text: Any = self.networks.get("text_encoder", self.base.text)
        return self.networks["unet"](x, t, text(ids).states)

    def _detached(self) -> dict[str, Adapter]:
        return {
            component: Adapter(
                {p: Pair(d.detach(), u.detach(), a) for p, (d, u, a) in adapter.pairs.items()}
            )
            for component, adapter in self.adapters.items()
        }

    def model(self) -> Model:
        adapters = self._detached()
        trained = LoRA("trained", "", adapters, matched=len(self.state_dict()))
        return adapt(self.base, Adaptation(loras=((trained, 1.0),)))

    def write(self, folder: Path) -> list[Path]:
        """diffusers' file (PEFT's keys and settings), kohya's, and a folder that PEFT itself
        loads for each network."""
        adapters = {c: a.to("cpu") for c, a in self._detached().items()}
        alpha = self.settings.alpha or self.settings.rank
        for layout, name in (("peft", LORA_FILE), ("kohya", KOHYA_FILE)):
            state, metadata = lora_keys.write(adapters, layout)  # type: ignore[arg-type]
            if layout == "kohya":
                metadata = {
                    "ss_network_module": "networks.lora",
                    "ss_network_dim": str(self.settings.rank),
                    "ss_network_alpha": f"{alpha:g}",
                }
            save_safetensors(folder / name, state, metadata)
        for component, adapter in adapters.items():
            _write_peft(folder / "peft" / component, adapter, self.settings.rank, alpha)
        return [folder / LORA_FILE, folder / KOHYA_FILE]


class Inversion(Learner):
    """The vectors of one new word, which start as those of a known one."""

    networks: tuple[nn.Module, nn.Module]

    def __init__(self, base: Model, settings: PersonalRecipe, start: int) -> None:
        """``start``: the id of the known word."""
        super().__init__()
        assert base.text is not None
        self.__dict__["base"] = base
        self.settings, self.start = settings, start
        table = base.text.text_model.embeddings.token_embedding.weight
        self.vectors = nn.Parameter(table[start].detach().repeat(settings.vectors, 1))
        text, unet = lora.view(base.text), lora.view(base.unet)
        assert isinstance(text, TextTower)
        longer = _Lengthened(table.detach(), self.vectors)
        text.text_model.embeddings.token_embedding = longer  # type: ignore[assignment]
        self.__dict__["networks"] = (unet, text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inversion:
        twin = Inversion(self.base, self.settings, self.start)
        twin.load_state_dict(self.state_dict())
        return twin

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return self.networks

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        unet, text = self.networks
        return unet(x, t, text(ids).states)

    def _word(self) -> dict[str, Tensor]:
        return {self.settings.token: self.vectors.detach().cpu()}

    def model(self) -> Model:
        words = dict(StateDict.of(self._word()).entries)
        return adapt(self.base, Adaptation(embeddings=(Embedding("trained", "", words),)))

    def write(self, folder: Path) -> list[Path]:
        """diffusers' layout: the word, and its vectors ``(n, width)``."""
        save_safetensors(folder / EMBEDDING_FILE, self._word())
        return [folder / EMBEDDING_FILE]


class _Lengthened(nn.Module):
    """A table of embeddings that stays, and rows behind it that train."""

    table: Tensor
    vectors: nn.Parameter

    def __init__(self, table: Tensor, vectors: nn.Parameter) -> None:
        super().__init__()
        self.__dict__["table"], self.__dict__["vectors"] = table, vectors

    def forward(self, ids: Tensor) -> Tensor:
        rows = len(self.table)
        known = F.embedding(ids.clamp(max=rows - 1), self.table)
        new = F.embedding((ids - rows).clamp(min=0), self.vectors)
        return torch.where((ids >= rows)[..., None], new, known)


def _plain(kind: Any, spec: Any, trained: nn.Module) -> Any:
    """A network of its own with a trained one's weights, without what training did to its calls."""
    with torch.device("meta"):
        network = kind(spec)
    state = {name: value.detach().contiguous() for name, value in trained.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _write_peft(folder: Path, adapter: Adapter, rank: int, alpha: float) -> None:
    """One network's adapter as ``peft`` saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    # transformers 5 drops this part of a text tower's names.
    pairs = {path.removeprefix("text_model."): pair for path, pair in adapter.pairs.items()}
    for path, pair in pairs.items():
        stem = f"base_model.model.{path}"
        state |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
    save_safetensors(folder / "adapter_model.safetensors", state)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
