"""Train a tail on features that a device sends in a few bytes.

Run with ``python examples/features.py``; nothing has to be fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pipeline

EPOCHS = 10
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs") / "example-features"
if not (out / "manifest.json").exists():
    epochs = {part: {"epochs": 5} for part in ("mimic", "tail")}
    teacher = {"train": {"epochs": 5}}
    pipeline.run(
        "compress-features", "digits", out=out, beta=0.5, teacher=teacher, baselines=[], **epochs
    )

encoder, decoder = pipeline.load_codec(str(out))
train, test = (pipeline.open(out, split=split) for split in ("train", "test"))

torch.manual_seed(0)
tail = nn.Sequential(
    nn.LazyConv2d(64, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.LazyLinear(len(train.classes)),
)
loader = train.to_torch().loader(batch_size=64)
tail(decoder.features(next(iter(loader)).latents))  # now it knows its shapes
optimizer = torch.optim.AdamW(tail.parameters(), lr=3e-3)
for _ in range(EPOCHS):
    for latents, labels, _ in loader:
        features = decoder.features(latents).clone()  # on the device of the decoder
        optimizer.zero_grad()
        F.cross_entropy(tail(features), labels).backward()
        optimizer.step()

with torch.inference_mode():
    right = sum(
        int((tail(decoder.features(latents)).argmax(1) == labels).sum())
        for latents, labels, _ in test.to_torch().loader(256, shuffle=False)
    )
records = test.to_arrow()["features"].to_pylist()
mean = sum(map(len, records)) / len(records)
print(f"{mean:.1f} bytes an image; accuracy {100 * right / len(test):.1f}%")
