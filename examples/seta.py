"""Train on a part of the data that SeTa chooses anew in every epoch, in a plain PyTorch loop.

Run with ``python examples/seta.py``; nothing has to be fetched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from pipeline.backbones import ConvNet
from pipeline.pruning.seta import SeTa

EPOCHS = 30

digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
labels = torch.from_numpy(digits.target)
rows = torch.arange(1300)
train = TensorDataset(images[:1300], labels[:1300], rows)  # a sample comes with its row

torch.manual_seed(0)
model = ConvNet(10, 1, (16, 32, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

sampler = SeTa(len(train), EPOCHS, window=0.6, saving=0.5)
loader = DataLoader(train, batch_size=64, sampler=sampler, drop_last=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
    optimizer, sum(length // 64 for length in sampler.lengths)
)
for _ in range(EPOCHS):
    for x, y, row in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        (losses * sampler.weights(row)).mean().backward()
        optimizer.step()
        schedule.step()
        sampler.update(row, losses)

with torch.inference_mode():
    right = (model.eval()(images[1300:]).argmax(1) == labels[1300:]).float().mean()
print(f"accuracy {100 * right:.1f}%, {sampler.saved} of {EPOCHS * 1300} samples saved")
