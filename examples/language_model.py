"""A word-level language model: the only line that names llmkern is the import.

Run it with ``python examples/language_model.py``; put ``import torch.nn as nn`` back and it prints the same losses.
"""

import torch

import llmkern
import llmkern.nn as nn

VOCABULARY, EMBEDDING, HIDDEN = 5_000, 128, 128


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embedding(words))
        return self.head(hidden)


def main() -> None:
    torch.manual_seed(0)
    model, criterion = LanguageModel(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    # Text that can be learned: every word is the one before it, plus a step of its line.
    lines = (torch.randint(VOCABULARY, (32, 1)) + torch.arange(25) * torch.randint(1, 4, (32, 1))) % VOCABULARY
    words, targets = lines[:, :-1], lines[:, 1:]
    for step in range(20):
        optimizer.zero_grad()
        loss = criterion(model(words).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1:2}: loss {loss.item():.4f}")

    print("\nWhat ran, and why:")
    print(llmkern.explain(lambda: criterion(model(words).flatten(0, 1), targets.flatten())))


if __name__ == "__main__":
    main()
