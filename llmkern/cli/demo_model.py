"""The demo's model, written once for any namespace that looks like ``torch.nn``.

Embedding(10000, 256) → LSTM(256, 128) encoder → LSTM(128, 128) decoder stage → Linear(128, 10000): a language model
that predicts every next word. The softmax is most of its work, 2·128·10000 multiply-adds for every word and pass.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .demo_data import VOCABULARY

EMBEDDING = 256
HIDDEN = 128


def build(nn: ModuleType, seed: int) -> torch.nn.Module:
    """The model from ``nn``'s classes; the same seed gives the same parameters whichever ``nn`` it is."""

    class LanguageModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
            self.encoder = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
            self.decoder = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
            self.head = nn.Linear(HIDDEN, VOCABULARY)

        def forward(self, words: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
            """``(B, T)`` words → ``(B, T, V)`` logits of each next word, and the state to go on from."""
            encoder_state, decoder_state = state or (None, None)
            hidden, encoder_state = self.encoder(self.embedding(words), encoder_state)
            hidden, decoder_state = self.decoder(hidden, decoder_state)
            return self.head(hidden), (encoder_state, decoder_state)

    torch.manual_seed(seed)
    return LanguageModel()


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: list[int],
    count: int,
    generator: torch.Generator,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """``count`` words after ``prompt``, drawn from the ``top_k`` likeliest, never ``<unk>``."""
    model.eval()
    logits, state = model(torch.tensor([prompt], device=device))
    words: list[int] = []
    for _ in range(count):
        scores = logits[0, -1].float().cpu() / temperature
        scores[0] = -torch.inf
        values, choices = scores.topk(top_k)
        words.append(int(choices[torch.multinomial(values.softmax(0), 1, generator=generator)]))
        logits, state = model(torch.tensor([[words[-1]]], device=device), state)
    return words
