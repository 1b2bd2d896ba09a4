"""The demo's text: words, vocabulary, windows.

``pydoc_data.topics`` is the Python language reference as every CPython carries it: real English with code in it, about
465,000 characters, nothing to download.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY = 10_000
BATCH = 64
WINDOW = 32
HELD_OUT = 0.1
UNKNOWN = "<unk>"

# A word or a name in code, a number, an empty line, or a mark, repeated or not: joining what was split gives readable
# text back. Other line breaks only wrap the text.
_TOKEN = re.compile(r"[^\W\d]\w*(?:['’][^\W\d_]+)*|\d+|\n\s*\n|([^\w\s])\1*")


class DemoError(Exception):
    """A request that the demo cannot serve; its text is one line for the user."""


@dataclass(frozen=True)
class Corpus:
    """Token ids in reading order, split once: the last tenth is held out."""

    train: torch.Tensor
    held_out: torch.Tensor
    words: list[str]
    name: str

    def encode(self, text: str) -> list[int]:
        index = {word: i for i, word in enumerate(self.words)}
        return [index.get(word, 0) for word in tokenize(text)]

    def decode(self, ids: list[int]) -> str:
        return join([self.words[i] if i < len(self.words) else UNKNOWN for i in ids])

    @property
    def steps_per_epoch(self) -> int:
        return max(1, (len(self.train) - WINDOW) // (WINDOW * BATCH))


def read_text(path: Path | None) -> tuple[str, str]:
    """The text and its name; without a path, CPython's own language reference."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics)), "pydoc_data.topics"
    try:
        return path.read_text(encoding="utf-8", errors="replace"), path.name
    except OSError as error:
        raise DemoError(f"--text: {path} cannot be read: {error.strerror}") from error


def tokenize(text: str) -> list[str]:
    return ["\n" if match[0][0] == "\n" else match[0].lower() for match in _TOKEN.finditer(text)]


def join(words: list[str]) -> str:
    """Text out of tokens: no space before closing marks, none after opening ones; a quote is each in turn."""
    text, quoted, opened = "", False, True
    for word in words:
        glued = opened or word in ".,;:!?)]}’'%\n" or (word == '"' and quoted)
        text += word if glued else " " + word
        if word == '"':
            quoted = not quoted
        opened = word in "([{\n" or (word == '"' and quoted)
    return text


def load_corpus(path: Path | None) -> Corpus:
    """Tokens, the 10,000 most frequent words (row 0 is ``<unk>``), and the split.

    Raises:
        DemoError: if the file cannot be read or is too short to make one batch of each split.
    """
    text, name = read_text(path)
    tokens = tokenize(text)
    need = round(BATCH * (WINDOW + 1) / HELD_OUT)
    if len(tokens) < need:
        raise DemoError(f"the text has {len(tokens):,} words; the demo needs {need:,} or more")
    cut = int(len(tokens) * (1 - HELD_OUT))
    # Ties go by spelling, so that a vocabulary is a function of the text alone.
    ranked = sorted(Counter(tokens[:cut]).items(), key=lambda item: (-item[1], item[0]))
    words = [UNKNOWN, *(word for word, _ in ranked[: VOCABULARY - 1])]
    index = {word: i for i, word in enumerate(words)}
    ids = torch.tensor([index.get(token, 0) for token in tokens])
    return Corpus(ids[:cut], ids[cut:], words, name)


def windows(ids: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and their next words, ``(N, WINDOW)`` each."""
    rows = ids[starts[:, None] + torch.arange(WINDOW + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def batches(ids: torch.Tensor, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches without end. Each epoch cuts the text at another offset."""
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        starts = torch.arange(offset, len(ids) - WINDOW, WINDOW)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for part in starts.split(BATCH):
            if len(part) == BATCH:
                yield windows(ids, part)
