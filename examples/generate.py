r"""Generate images from tokens: bit by bit, or id by id in any order.

Run with ``python examples/generate.py``: it trains a small tokenizer of digits, stores their
tokens, trains both generators on the store and draws ``generated.png``. Of your own tokens:

    python examples/generate.py --tokenizer runs/train-tokenizer-cifar10 \
        --tokens runs/tokenize-cifar10

Small and honest: it shows what a generator has to know of the tokens, and is no product.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipeline
from pipeline.report import contact_sheet
from pipeline.token_samples import TokenSamples
from pipeline.tokenizers.network import Block
from pipeline.tokenizers.tokens import TokenForm, Tokens


class Generator(nn.Module):
    """A transformer over a class and tokens.

    With bits it is causal and gives a logit for each bit of the next token: there is no vocabulary.
    With ids it sees all places and gives logits of those that are hidden.

    Args:
        form: what a token is.
        classes: number of classes.
        masked: whether ids are predicted in any order rather than bits one token after the other.
        width: of the vectors.
        depth: blocks.
    """

    def __init__(
        self, form: TokenForm, classes: int, *, masked: bool, width: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        self.form, self.masked = form, masked
        self.label = nn.Embedding(classes, width)
        self.place = nn.Parameter(torch.randn(form.max_tokens, width))
        vocabulary = form.vocabulary or 0
        outputs = vocabulary if masked else form.bits
        # The id behind the vocabulary stands for a hidden token.
        self.token = nn.Embedding(vocabulary + 1, width) if masked else nn.Linear(form.bits, width)
        self.blocks = nn.ModuleList(Block(width, 4, causal=not masked) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Logits (n, N, outputs) from bits (n, N, B), or from ids (n, N), some of them hidden."""
        start = self.label(labels)[:, None]
        seen = self.token(values if self.masked else values.float()) + self.place
        x = torch.cat([start, seen if self.masked else seen[:, :-1]], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 1:] if self.masked else x)


def losses(model: Generator, values: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that count: what lies behind an image's length says nothing."""
    counts = torch.arange(values.shape[1]) < lengths[:, None]
    if not model.masked:
        each = F.binary_cross_entropy_with_logits(
            model(values, labels), values.float(), reduction="none"
        ).sum(-1)
        return each[counts].mean()
    share = torch.cos(torch.rand(len(values), 1) * math.pi / 2)  # as MaskGIT hides
    hidden = torch.rand(values.shape) < share.clamp_min(1 / values.shape[1])
    logits = model(values.masked_fill(hidden, model.form.vocabulary), labels)
    each = F.cross_entropy(logits.transpose(1, 2), values, reduction="none")
    return each[counts & hidden].mean()


@torch.inference_mode()
def sample(model: Generator, labels: Tensor, steps: int = 12) -> Tensor:
    """Values of all tokens of images of these classes."""
    form, count = model.form, len(labels)
    if not model.masked:
        bits = torch.zeros(count, form.max_tokens, form.bits, dtype=torch.uint8)
        for place in range(form.max_tokens):
            bits[:, place] = torch.bernoulli(model(bits, labels)[:, place].sigmoid()).byte()
        return bits
    hidden_id = form.vocabulary or 0
    ids = torch.full((count, form.max_tokens), hidden_id)
    for step in range(1, steps + 1):
        logits = model(ids, labels)
        drawn = torch.distributions.Categorical(logits=logits).sample()
        sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        sure[ids != hidden_id] = math.inf  # what was decided stays
        proposed = torch.where(ids == hidden_id, drawn, ids)
        left = int(form.max_tokens * math.cos(math.pi / 2 * step / steps))
        kept = sure.argsort(1, descending=True)[:, : form.max_tokens - left]
        ids = torch.full_like(ids, hidden_id).scatter(1, kept, proposed.gather(1, kept))
    return ids


def train(store: TokenSamples, *, masked: bool, epochs: int) -> Generator:
    """A generator that has seen the store ``epochs`` times."""
    torch.manual_seed(0)
    model = Generator(store.form, len(store.classes), masked=masked)
    loader = store.to_torch().loader(64, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * len(loader))
    total = 0.0
    for _ in range(epochs):  # each shows another of the stored views
        for values, lengths, labels, _ in loader:
            given = ids_of(values, store.form) if masked else values
            loss = losses(model, given, lengths, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total = float(loss.detach())
    told = "ids, hidden ones" if masked else "bits of the next token"
    print(f"{told}: {total:.3f} nats a token at the end")
    return model.eval()


def ids_of(values: Tensor, form: TokenForm) -> Tensor:
    """Tokens as ids: bit j of a token has the value 2^j."""
    if form.kind == "ids":
        return values
    return (values.long() << torch.arange(form.bits)).sum(-1)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/example-tokenizer"))
    parser.add_argument("--tokens", type=Path, default=Path("runs/example-tokens"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("generated.png"))
    options = parser.parse_args()
    if not options.tokens.exists():
        side = {"width": 64, "depth": 2}
        small = {"size": 8, "patch": 2, "tokens": 8, "quantizer": {"bits": 8}}
        small |= {"encoder": side, "decoder": side}
        training = {"train": {"epochs": 40, "batch_size": 64, "lr": 2e-3}}
        config = {"tokenizer": small, "training": training}
        pipeline.run("train-tokenizer", "digits", out=options.tokenizer, config=config)
        chosen = {"tokenizer": str(options.tokenizer)}
        pipeline.run("tokenize", "digits", out=options.tokens, config=chosen)
    store = pipeline.open(options.tokens)
    tokenizer = pipeline.load_tokenizer(options.tokenizer)
    store.check(tokenizer)  # tokens of another tokenizer would be noise
    labels = torch.arange(len(store.classes)).repeat(4)
    most = torch.full((len(labels),), store.form.max_tokens)
    rows = []
    for masked in (False, True):
        model = train(store, masked=masked, epochs=options.epochs)
        drawn = sample(model, labels)
        if masked and store.form.kind == "bits":
            drawn = (drawn[..., None] >> torch.arange(store.form.bits) & 1).byte()
        images = tokenizer.decode(Tokens(drawn, most, store.form))
        rows += list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    options.out.write_bytes(contact_sheet(rows, columns=len(store.classes)))
    print(f"{options.out}: four rows bit by bit, and four rows id by id")


if __name__ == "__main__":
    main()
