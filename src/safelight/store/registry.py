"""Names of adapters to their files: what every door looks names up in. No torch.

A name is a file's path below one of the folders, without its ending: ``style`` or ``people/ada``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from safelight.errors import InvalidRequest

ENDINGS = (".safetensors", ".sft", ".pt", ".bin", ".ckpt", ".pth")
# Folders that PEFT and diffusers write an adapter as.
FOLDER_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_MOST_FILES = 20_000
_SHOWN = 30


class Registry:
    """Files of one kind, by name.

    Args:
        folders: where they are; read again at each look-up, so that new files are found.
        kind: what they are, for messages: ``LoRA``.
        option: the option that names the folder, for messages: ``--lora-dir``.
        paths: whether a path may stand for a name. A server says no: what comes over the network
            must not open any file of the machine.
    """

    def __init__(
        self,
        folders: str | Path | Iterable[str | Path] | None = None,
        *,
        kind: str = "LoRA",
        option: str = "--lora-dir",
        paths: bool = True,
    ) -> None:
        if folders is None:
            folders = ()
        elif isinstance(folders, str | Path):
            folders = (folders,)
        self.folders = tuple(Path(folder).expanduser() for folder in folders)
        self.kind, self.option, self.paths = kind, option, paths
        for folder in self.folders:
            if not folder.is_dir():
                name = option.lstrip("-")
                raise InvalidRequest(name, f"{folder} is no folder.", "Name one that exists.")

    def names(self) -> dict[str, Path]:
        """Every name there is, sorted. The first folder wins."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for count, path in enumerate(sorted(folder.rglob("*"))):
                if count >= _MOST_FILES:
                    break
                if path.suffix.lower() in ENDINGS and path.is_file():
                    place = path.parent if path.name in FOLDER_FILES else path.with_suffix("")
                    if place == folder:
                        place = path.with_suffix("")
                    found.setdefault(place.relative_to(folder).as_posix(), path)
        return dict(sorted(found.items()))

    def find(self, name: str, field: str = "loras") -> Path:
        """The file behind a name, or behind a path where these are allowed.

        Raises:
            InvalidRequest: there is none; lists the names that there are.
        """
        known = self.names()
        for spelling in (name, _without_ending(name)):
            if spelling in known:
                return known[spelling]
        # As A1111: the file's own name will do where only one folder has it.
        short = [n for n in known if n.rpartition("/")[2] == _without_ending(name)]
        if len(short) == 1:
            return known[short[0]]
        if self.paths:
            path = Path(name).expanduser()
            if path.is_file():
                return path
            if path.is_dir():
                for inner in FOLDER_FILES:
                    if (path / inner).is_file():
                        return path / inner
        raise InvalidRequest(field, f"no {self.kind} {name!r}{self._of(short)}.", self._fix(known))

    def _of(self, short: list[str]) -> str:
        return f", or which of {', '.join(short)}" if short else ""

    def _fix(self, known: dict[str, Path]) -> str:
        if not self.folders:
            where = "Give a file that exists, or a" if self.paths else "Start with a"
            return f"{where} folder of them with {self.option}."
        if not known:
            return f"{', '.join(map(str, self.folders))} holds none."
        listed = ", ".join(list(known)[:_SHOWN]) + (" …" if len(known) > _SHOWN else "")
        return f"Known: {listed}."


def _without_ending(name: str) -> str:
    path = Path(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in ENDINGS else name


# -- how people write adapters in one word --------------------------------------------------------


def scaled(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """``FILE``, ``FILE:0.8`` and names, to (name, scale)."""
    return tuple(_scaled(text) for text in texts)


def _scaled(text: str) -> tuple[str, float]:
    name, colon, tail = text.rpartition(":")
    try:
        return (name, float(tail)) if colon else (text, 1.0)
    except ValueError:
        if "\\" in tail or "/" in tail or tail.endswith(ENDINGS):
            return text, 1.0  # C:\\style.safetensors
        raise InvalidRequest("lora", f"{tail!r} is not a number.", "Write FILE:0.8.") from None


def worded(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``FILE``, ``FILE:WORD`` and names, to (name, word)."""
    return tuple(_worded(text) for text in texts)


def _worded(text: str) -> tuple[str, str]:
    name, colon, tail = text.rpartition(":")
    if not colon or "\\" in tail or "/" in tail or tail.endswith(ENDINGS):
        return text, ""
    return name, tail
