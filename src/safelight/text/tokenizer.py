"""CLIP's byte-level byte-pair encoding, both padding conventions, and tiny vocabularies.

Radford et al. 2021 (2103.00020), section 2.4; byte pairs are those of Sennrich et al. 2016
(1508.07909). The text pipeline (compose, collapse whitespace, lower-case, split, bytes) is the
one that the published ``CLIPTokenizer`` folders run today, without ``ftfy``.
"""

from __future__ import annotations

import copy
import gzip
import json
import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from safelight.errors import WeightsError
from safelight.text import windows

log = logging.getLogger(__name__)

T = TypeVar("T")

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# Contractions, runs of letters, single digits, runs of anything else that is not space.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


# The published file lists more merges than CLIP was trained with, and unpacks to 3 MB.
_CLIP_MERGES = 49152 - 256 - 2
_MAX_MERGES_BYTES = 16 * 2**20


class Chunk(NamedTuple):
    """One context window of a prompt."""

    ids: list[int]
    """``context_length`` ids: start, content, end, padding."""
    weights: list[float]
    """One weight an id; 1 for start, end and padding."""
    sources: list[int]
    """Which fragment an id is from; -1 for start, end and padding."""


class Tokenizer:
    """Text to CLIP token ids.

    Built by :meth:`from_folder` or :meth:`from_vocab`. Equal, id by id, to transformers'
    ``CLIPTokenizer`` of the same files, its treatment of special tokens included: where the
    padding token is ``!`` (SD 2), every ``!`` of a prompt becomes the padding id 0.

    Attributes:
        context_length: ids in one window of the text tower (77 for the published models).
        bos_id, eos_id, pad_id: start, end and padding. SD 1 pads with the end token, SD 2 with
            id 0; the choice changes pictures, because padding feeds cross-attention.
        vocab_size: rows that the text tower's embedding needs.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        context_length: int,
        pad: str,
        added: Sequence[str] = (),
    ) -> None:
        for special in (BOS, EOS, pad):
            if special not in vocab:
                raise ValueError(f"the vocabulary lacks the token {special!r}")
        if context_length < 3:
            raise ValueError(f"context_length = {context_length} leaves no room for a token")
        self.vocab, self.merges = dict(vocab), list(merges)
        self.context_length, self.added = context_length, tuple(added)
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], vocab[pad]
        self._pad = pad

        backend = Backend(
            models.BPE(
                vocab=self.vocab,
                merges=self.merges,
                end_of_word_suffix=END_OF_WORD,
                unk_token=EOS,
                fuse_unk=False,
            )
        )
        backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        # Specials are found in a prompt's text too. A padding token other than the end token
        # is matched before normalisation, as the published SD 2 configs ask.
        backend.add_special_tokens([AddedToken(t, normalized=True) for t in (BOS, EOS)])
        if pad not in (BOS, EOS):
            backend.add_special_tokens([AddedToken(pad, normalized=False)])
        backend.add_tokens([AddedToken(t, normalized=False) for t in self.added])
        self._backend = backend
        self._rows: dict[int, list[int]] = {}
        self.vocab_size = max(backend.get_vocab().values()) + 1

    @classmethod
    def from_vocab(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        context_length: int = 77,
        pad_id: int | None = None,
    ) -> Tokenizer:
        """A tokenizer from tables, such as :func:`learn_vocabulary` gives.

        Args:
            vocab: token to id, both specials included.
            merges: pairs in the order in which they apply.
            context_length: ids in one window.
            pad_id: id of the padding token; None pads with the end token (SD 1).
        """
        pad = EOS if pad_id is None else _at(vocab, pad_id)
        return cls(vocab, merges, context_length=context_length, pad=pad)

    @classmethod
    def from_folder(cls, folder: str | Path, *, pad_id: int | None = None) -> Tokenizer:
        """Read a published ``tokenizer/`` folder.

        Reads ``vocab.json`` and ``merges.txt``, or the single ``tokenizer.json`` that
        transformers 5 writes; padding and window length from ``tokenizer_config.json`` and
        ``special_tokens_map.json`` (defaults: end token, 77).

        Args:
            folder: the folder.
            pad_id: padding to use instead of the folder's own, where a vocabulary serves a
                model of the other convention.

        Raises:
            WeightsError: a file is missing or is not what its name says.
        """
        folder = Path(folder)
        config = {
            **_read_json(folder / "special_tokens_map.json", {}),
            **_read_json(folder / "tokenizer_config.json", {}),
        }
        single = folder / "tokenizer.json"
        extra: dict[str, int] = _read_json(folder / "added_tokens.json", {})
        try:
            for id_, token in config.get("added_tokens_decoder", {}).items():
                extra[_content(token)] = int(id_)
            if (folder / "vocab.json").is_file():
                vocab = _read_json(folder / "vocab.json")
                merges = _read_merges(folder / "merges.txt")
            elif single.is_file():
                content = _read_json(single)
                vocab = content["model"]["vocab"]
                merges = [_pair(m) for m in content["model"]["merges"]]
                for token in content.get("added_tokens", ()):
                    extra[token["content"]] = token["id"]
            else:
                raise WeightsError(folder, "holds neither vocab.json nor tokenizer.json.")
            added = _in_order({t: i for t, i in extra.items() if t not in vocab}, len(vocab))
            length = int(config.get("model_max_length") or 77)
            pad = _content(config.get("pad_token") or EOS)
            if pad_id is not None:
                pad = _at(vocab, pad_id)
            return cls(
                vocab,
                merges,
                # Old files say 1e30 where they mean "not known".
                context_length=length if length <= 4096 else 77,
                pad=pad,
                added=added,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise WeightsError(folder, f"is not a CLIP tokenizer: {error!r}.") from error

    @classmethod
    def from_bpe(cls, file: str | Path, *, pad_id: int | None = None) -> Tokenizer:
        """CLIP's tokenizer from ``bpe_simple_vocab_16e6.txt.gz``, the merges alone.

        The vocabulary follows from them: byte symbols, the same ending a word, one token a merge,
        the two specials.

        Raises:
            WeightsError: the file is something else.
        """
        file = Path(file)
        try:
            with gzip.open(file, "rb") as packed:
                text = packed.read(_MAX_MERGES_BYTES).decode("utf-8")
            lines = text.split("\n")[1 : _CLIP_MERGES + 1]
            merges = [_pair(line) for line in lines if line.strip()]
            symbols = byte_symbols()
            tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *(a + b for a, b in merges)]
            if len({*tokens}) != len(tokens):
                raise ValueError("a merge comes twice")
            vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
            return cls.from_vocab(vocab, merges, pad_id=pad_id)
        except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
            raise WeightsError(file, f"is no list of CLIP's merges: {error}.") from error

    def with_words(self, rows: Mapping[str, Sequence[int]]) -> Tokenizer:
        """A second tokenizer that knows new words too (textual inversion).

        Args:
            rows: by word, the rows of the text tower's table that stand for it, in order. A word
                is found anywhere in a prompt, in any case, as transformers finds added tokens.
        """
        twin = copy.copy(self)
        twin._backend = Backend.from_str(self._backend.to_str())
        twin._backend.add_tokens([AddedToken(word, normalized=True) for word in rows])
        ids = twin._backend.get_vocab()
        twin._rows = {**self._rows, **{ids[word]: [*rows[word]] for word in rows}}
        return twin

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without start, end and padding, of any length."""
        # A lone surrogate is not text; the backend would raise on it.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._backend.encode(clean, add_special_tokens=False).ids
        return [row for i in ids for row in self._rows.get(i, (i,))] if self._rows else ids

    def count(self, text: str) -> int:
        """How many ids ``text`` has; a window holds ``context_length - 2``."""
        return len(self.encode(text))

    def tokens(self, texts: Iterable[str]) -> list[list[int]]:
        """One window a text: start, content, end, padding.

        Content beyond the window is dropped, and a warning is logged that says how much; for
        prompts that must not be cut use :meth:`chunks`.

        Returns:
            one list of ``context_length`` ids a text.
        """
        rows = []
        for text in texts:
            ids = self.encode(text)
            room = self.context_length - 2
            if len(ids) > room:
                log.warning("prompt of %d tokens cut to %d", len(ids), room)
            rows.append(self._window(ids[:room]))
        return rows

    def chunks(self, text: str) -> list[list[int]]:
        """As many windows as ``text`` needs, at least one; nothing is cut.

        Returns:
            lists of ``context_length`` ids, each with its own start, end and padding.
        """
        return [chunk.ids for chunk in self.weighted_chunks([(text, 1.0)])]

    def weighted_chunks(
        self, fragments: Iterable[tuple[str, float]], manner: windows.Manner = "hard"
    ) -> list[Chunk]:
        """Windows of a weighted prompt (:mod:`safelight.text.prompt`).

        Fragments are encoded one by one and joined, so a weight inside a word splits it.

        Args:
            manner: where a prompt of several windows is cut; see :func:`windows.lengths`.
        """
        ids: list[int] = []
        weights: list[float] = []
        sources: list[int] = []
        for index, (text, weight) in enumerate(fragments):
            piece = self.encode(text)
            ids += piece
            weights += [weight] * len(piece)
            sources += [index] * len(piece)
        chunks, at = [], 0
        for length in windows.lengths(self.spell(ids), self.context_length - 2, manner):
            here = slice(at, at + length)
            spread = self._spread(weights[here], 1.0), self._spread(sources[here], -1)
            chunks.append(Chunk(self._window(ids[here]), *spread))
            at += length
        return chunks

    def spell(self, ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them, ``</w>`` at the end of words."""
        return [self._backend.id_to_token(i) or "" for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` without specials; words come back lower-cased, split by spaces."""
        text = self._backend.decode(list(ids), skip_special_tokens=True)
        return text.replace(END_OF_WORD, " ").strip()

    def save(self, folder: str | Path) -> None:
        """Write the four files that transformers' ``CLIPTokenizer`` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "vocab.json", self.vocab, indent=None)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self._pad}
        _write_json(folder / "special_tokens_map.json", named)
        config: dict[str, Any] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **named,
        }
        _write_json(folder / "tokenizer_config.json", config)
        if self.added:
            first = len(self.vocab)
            _write_json(
                folder / "added_tokens.json", {t: first + i for i, t in enumerate(self.added)}
            )

    def _window(self, content: list[int]) -> list[int]:
        ids = [self.bos_id, *content, self.eos_id]
        return ids + [self.pad_id] * (self.context_length - len(ids))

    def _spread(self, values: list[T], other: T) -> list[T]:
        return [other, *values] + [other] * (self.context_length - 1 - len(values))


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's (GPT-2's) vocabulary order.

    Printable Latin-1 bytes stand for themselves and come first; the others follow, moved up
    to code points from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(moved))]


def learn_vocabulary(
    captions: Iterable[str], merges: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP vocabulary of the captions' own words, in CLIP's order.

    The 512 byte symbols (256, then the same ending a word), one token a merge, then the start
    and the end token. Merges are the most frequent neighbours at each step, ties by symbol, so
    that the same captions in any order give the same vocabulary.

    Args:
        captions: a corpus; read once.
        merges: how many merges at most; learning ends early when every word is one token.

    Returns:
        ``(vocab, merges)`` for :meth:`Tokenizer.from_vocab`.
    """
    words = _count_words(captions)
    symbols = byte_symbols()
    tokens = dict.fromkeys(symbols + [s + END_OF_WORD for s in symbols])
    learned: list[tuple[str, str]] = []

    counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    splits = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    weights = list(words.values())
    for i, split in enumerate(splits):
        for pair in pairwise(split):
            counts[pair] += weights[i]
            where[pair].add(i)

    while len(learned) < merges:
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] <= 0:
            break
        learned.append(best)
        tokens[best[0] + best[1]] = None
        for i in where.pop(best):
            old = splits[i]
            splits[i] = new = _merge(old, best)
            for pair in pairwise(old):
                counts[pair] -= weights[i]
            for pair in pairwise(new):
                counts[pair] += weights[i]
                where[pair].add(i)
        del counts[best]
        counts = +counts  # pairs that no longer occur
    vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    return vocab, learned


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """Byte-symbol words and how often each occurs."""
    normalizer, pre_tokenizer = _normalizer(), _pre_tokenizer()
    words: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)):
            words[word] += times
    return words


def _merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    """``split`` with every occurrence of ``pair``, left to right, joined."""
    out: list[str] = []
    i = 0
    while i < len(split):
        joined = i + 1 < len(split) and (split[i], split[i + 1]) == pair
        out.append(split[i] + split[i + 1] if joined else split[i])
        i += 2 if joined else 1
    return out


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            # "removed" and "invert": keep the matches, drop what lies between them.
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            # The pattern above has split already; this only turns bytes into symbols. Its own
            # split is left on because the reference leaves it on.
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _at(vocab: Mapping[str, int], pad_id: int) -> str:
    for token, id_ in vocab.items():
        if id_ == pad_id:
            return token
    raise ValueError(f"pad_id = {pad_id} is not in the vocabulary")


def _content(token: str | Mapping[str, Any]) -> str:
    """A config names a token by its text or by a record of its settings."""
    return token if isinstance(token, str) else token["content"]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _in_order(added: Mapping[str, int], first: int) -> list[str]:
    """Added tokens by id; their ids must go on from ``first``, where the backend puts them."""
    tokens = sorted(added, key=added.__getitem__)
    for i, token in enumerate(tokens, start=first):
        if added[token] != i:
            raise ValueError(f"added token {token!r} has id {added[token]}, expected {i}")
    return tokens


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(path, f"cannot be read: {error}.") from error
    body = lines[1:] if lines and lines[0].startswith("#version") else lines
    return [_pair(line.rstrip("\r")) for line in body if line.strip()]


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(path, f"cannot be read: {error}.") from error


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")
