"""Train a network on a distilled set, in a plain PyTorch loop that can be stopped.

Run with ``python examples/distilled.py``; nothing has to be fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import pipeline
from pipeline.backbones import ConvNet

EPOCHS = 60
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs") / "example-distilled"
state = out / "training.pt"
if not (out / "manifest.json").exists():
    few = {"recover": {"iterations": 100}, "relabel": {"views": EPOCHS}}
    few |= {"student": {"train": {"epochs": 5}}, "arms": ["distilled-soft"], "seeds": 1}
    teacher = {"train": {"epochs": 10}}
    pipeline.run("distill", "digits", ipc=10, out=out, teacher=teacher, **few)

distilled = pipeline.open(out)
loader = distilled.to_torch().loader(batch_size=20)

torch.manual_seed(0)
model = ConvNet(len(distilled.classes), 1, (32, 64, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": loader}
if state.exists():  # goes on in the middle of an epoch, with the batch that comes next
    found = torch.load(state, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(found[name])

model.train()
while loader.epoch < EPOCHS:  # each shows another stored view of every image
    for images, logits, _ in loader:
        ours, theirs = model(images).log_softmax(1), logits.log_softmax(1)
        loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if loader.epoch % 10 == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, state)

real = pipeline.open("digits").to_torch(size=16).loader(256, shuffle=False)
with torch.inference_mode():
    right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y, _ in real)
print(
    f"{len(distilled)} images; accuracy on all real ones {100 * right / len(real.stream.data):.1f}%"
)
