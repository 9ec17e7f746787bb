"""Train a classifier on tokens of images, as many tokens as each image needs.

Run with ``python examples/tokens.py``; nothing has to be fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pipeline

EPOCHS = 15
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
tokenizer, tokens = out / "example-tokenizer", out / "example-tokens"
if not (tokens / "manifest.json").exists():
    side = {"width": 64, "depth": 2}
    small = {"size": 8, "patch": 2, "tokens": 8, "quantizer": {"bits": 8}}
    small |= {"encoder": side, "decoder": side}
    training = {"train": {"epochs": 8, "batch_size": 64, "lr": 2e-3}}
    pipeline.run("train-tokenizer", "digits", out=tokenizer, tokenizer=small, training=training)
    pipeline.run("tokenize", "digits", out=tokens, tokenizer=str(tokenizer), mean_bytes=6.0)

store = pipeline.open(tokens)
keys = store.keys
train = store.subset(keys[:1300]).to_torch(ragged=True).loader(64)
test = store.subset(keys[1300:]).to_torch(ragged=True).loader(256, shuffle=False)

torch.manual_seed(0)
bits = store.form.bits
places = nn.EmbeddingBag(2 * bits * store.form.max_tokens, 64, mode="sum")
model = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(store.classes)))


def answers(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Logits of images whose tokens come one after the other, from the bits at their places."""
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(values)) - starts.repeat_interleave(lengths)
    ids = 2 * (place[:, None] * bits + torch.arange(bits)) + values
    return model(places(ids.flatten(), starts * bits))


optimizer = torch.optim.AdamW([*places.parameters(), *model.parameters()], lr=5e-3)
for _ in range(EPOCHS):
    for values, lengths, labels, _ in train:
        optimizer.zero_grad()
        F.cross_entropy(answers(values, lengths), labels).backward()
        optimizer.step()

with torch.inference_mode():
    right = sum(int((answers(v, n).argmax(1) == y).sum()) for v, n, y, _ in test)
mean = float(store.lengths.float().mean())
print(f"{mean:.1f} tokens an image; accuracy {100 * right / len(keys[1300:]):.1f}%")
