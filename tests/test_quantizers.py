"""Quantizers against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import build
from pipeline.errors import UsageError
from pipeline.tokenizers.config import LatentConfig
from pipeline.tokenizers.quantizers import (
    FSQ,
    VQ,
    Quantizer,
    Shape,
    Sign,
    build_quantizer,
    decorrelation,
)

SHAPE = Shape(tokens=5, inputs=8, outputs=6)
KINDS = [
    {"kind": "bernoulli", "bits": 7},
    {"kind": "bsq", "bits": 7},
    {"kind": "lfq", "bits": 7},
    {"kind": "fsq", "levels": (8, 5, 3)},
    {"kind": "vq", "vocabulary": 20, "width": 4},
    {"kind": "vq", "vocabulary": 20, "width": 4, "codes": "projected", "features": 9},
    {"kind": "vq", "vocabulary": 20, "width": 4, "codes": "ema", "metric": "euclidean"},
    {"kind": "vq", "vocabulary": 20, "width": 4, "metric": "euclidean", "standardize": False},
]


def quantizer(settings: dict[str, object]) -> Quantizer:
    torch.manual_seed(0)
    config = build(LatentConfig, {"quantizer": settings}).quantizer
    return build_quantizer(config, SHAPE)


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def fitted(request: pytest.FixtureRequest) -> tuple[Quantizer, Tensor]:
    """A quantizer that has seen a few batches, and vectors."""
    made = quantizer(request.param)
    hidden = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        made(hidden)
    return made.eval(), hidden


def test_tokens_stand_for_the_vectors_that_the_decoder_was_given(
    fitted: tuple[Quantizer, Tensor],
) -> None:
    made, hidden = fitted
    found = made(hidden)
    torch.testing.assert_close(made.vectors(found.values), found.vectors, atol=1e-5, rtol=1e-5)
    assert torch.equal(made.values(hidden), found.values)


def test_tokens_are_of_their_form(fitted: tuple[Quantizer, Tensor]) -> None:
    made, hidden = fitted
    values, form = made.values(hidden), made.form(5)
    if form.kind == "bits":
        assert values.shape == (64, 5, form.bits)
        assert set(values.unique().tolist()) == {0, 1}
    else:
        assert values.shape == (64, 5)
        assert values.dtype == torch.int64
        assert 0 <= int(values.min()) <= int(values.max()) < (form.vocabulary or 0)


def test_the_gradient_passes_to_the_encoder(fitted: tuple[Quantizer, Tensor]) -> None:
    made, hidden = fitted
    hidden = hidden.clone().requires_grad_()
    made(hidden).vectors.square().mean().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad.abs().sum((0, 2)) > 0).all())


def test_from_the_first_step_bits_are_one_for_about_half_of_the_images() -> None:
    made = quantizer({"kind": "bsq", "bits": 7})
    # Vectors of different images hardly differ, as those of an encoder that has learnt nothing.
    hidden = torch.randn(1, 5, 8) + 0.01 * torch.randn(400, 5, 8)
    share = made(hidden).values.float().mean(0)
    assert 0.35 < float(share.min()) <= float(share.max()) < 0.65


def test_bernoulli_draws_in_training_and_decides_after() -> None:
    made = quantizer({"kind": "bernoulli", "bits": 7, "temperature": 1.0})
    hidden = torch.randn(200, 5, 8)
    made(hidden)
    assert not torch.equal(made(hidden).values, made(hidden).values)
    made.eval()
    assert torch.equal(made(hidden).values, made(hidden).values)


def test_bernoulli_gradient_is_that_of_the_probability() -> None:
    made = quantizer({"kind": "bernoulli", "bits": 7}).eval()
    logits = torch.randn(3, 5, 7, requires_grad=True)
    made.numbers = lambda _: logits  # type: ignore[method-assign]
    weight = torch.randn(3, 5, 6)
    (made(torch.zeros(3, 5, 8)).vectors * weight).sum().backward()
    share = torch.sigmoid(logits.detach())
    wanted = (weight @ made.widen.weight) * share * (1 - share)
    torch.testing.assert_close(logits.grad, wanted)


@pytest.mark.parametrize("kind", ["bsq", "lfq"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_entropy_is_that_of_the_softmax_over_all_codes(kind: str, group: int) -> None:
    """In float64, by listing the codes."""
    settings = {"kind": kind, "bits": 3, "entropy_weight": 1.0, "group": group}
    made = quantizer(settings).double()
    assert isinstance(made, Sign)
    inner = torch.randn(4, 5, 3, dtype=torch.float64)
    made.numbers = lambda _: inner  # type: ignore[method-assign]
    unit = F.normalize(inner, dim=-1) if kind == "bsq" else inner
    codes = torch.tensor(list(itertools.product([-1, 1], repeat=3)), dtype=torch.float64)
    codes = codes * made.scale
    logits = 2 * unit @ codes.T
    shares = logits.softmax(-1)
    own = -(shares * shares.log2()).sum(-1).mean()
    mean = shares.mean((0, 1))
    if group == 3:
        batch = -(mean * mean.log2()).sum()
        found = made(torch.zeros(4, 5, 8)).losses["entropy"]
        torch.testing.assert_close(found, own - batch, atol=1e-6, rtol=1e-6)
    elif group == 1:
        ones = [mean[codes[:, bit] > 0].sum() for bit in range(3)]
        batch = sum(-(p * p.log2() + (1 - p) * (1 - p).log2()) for p in ones)
        found = made(torch.zeros(4, 5, 8)).losses["entropy"]
        torch.testing.assert_close(found, own - batch, atol=1e-5, rtol=1e-5)
    else:
        assert math.isfinite(float(made(torch.zeros(4, 5, 8)).losses["entropy"].detach()))


def test_fsq_ids_are_mixed_radix_numbers_of_all_levels() -> None:
    made = quantizer({"kind": "fsq", "levels": (8, 5, 3)})
    assert isinstance(made, FSQ)
    every = torch.arange(120).view(24, 5)
    levels = made.levels(every)
    # Levels by coordinate: 8 from -4/4 to 3/4, 5 from -1 to 1, 3 from -1 to 1.
    for place, (count, middle) in enumerate([(8, 4), (5, 2), (3, 1)]):
        wanted = {(n - middle) / middle for n in range(count)}
        assert set(levels[..., place].unique().tolist()) == wanted
    made.numbers = lambda _: 20 * (torch.rand(24, 5, 3) - 0.5)  # type: ignore[method-assign]
    found = made(torch.zeros(24, 5, 8)).values
    assert 0 <= int(found.min()) <= int(found.max()) < 120
    made.numbers = lambda _: torch.zeros(1, 5, 3)  # type: ignore[method-assign]
    assert made.levels(made(torch.zeros(1, 5, 8)).values).abs().max() == 0


def test_the_guard_against_copies_sees_copies_and_opposites_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    soft = torch.rand(500, 2, 6, generator=generator) * 2 - 1
    assert float(decorrelation(soft)) < 1e-6
    copied = soft.clone()
    copied[:, 1, 0], copied[:, 0, 3] = soft[:, 0, 0], -soft[:, 1, 2]
    # Two pairs of 12 bits, of 132 in both directions, exceed a quarter by three quarters.
    assert float(decorrelation(copied)) == pytest.approx(4 * 0.75 / 132, rel=1e-3)


def codebook(**settings: object) -> VQ:
    made = quantizer({"kind": "vq", "vocabulary": 20, "width": 4, **settings})
    assert isinstance(made, VQ)
    return made


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_projected_code_moves_with_a_step_and_what_is_frozen_does_not(metric: str) -> None:
    made = codebook(codes="projected", features=9, metric=metric)
    generator = torch.Generator().manual_seed(1)
    made.freeze(torch.randn(20, 9, generator=generator) * 3 + 5)
    frozen, before = made.frozen.clone(), made.codes().detach().clone()
    hidden = torch.randn(2, 5, 8, generator=generator)  # fewer vectors than codes
    found = made(hidden)
    assert len(found.values.unique()) < 20
    sum(found.losses.values()).backward()
    torch.optim.SGD(made.parameters(), 0.1).step()
    assert torch.equal(made.frozen, frozen)
    assert bool((made.codes() != before).any(1).all())


def test_the_codes_of_a_codebook_begin_spread_evenly_in_all_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(3000, 3, generator=generator) @ torch.randn(3, 9, generator=generator)
    codes = 100 * mixed + torch.randn(3000, 9, generator=generator) + 7
    made = codebook(codes="projected", features=9, vocabulary=3000, metric="euclidean")
    made.freeze(codes)
    torch.testing.assert_close(made.frozen.mean(0), torch.zeros(9), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.frozen.std(0), torch.ones(9), atol=1e-3, rtol=0)
    spread = torch.cov(made.codes().detach()[:, :3].T)
    torch.testing.assert_close(spread, torch.eye(3), atol=1e-2, rtol=0)


def test_another_size_of_codebook_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        codebook(codes="projected", features=9).freeze(torch.randn(20, 8))
    assert caught.value.code == "other-codebook"


def test_the_moving_average_is_that_of_its_definition() -> None:
    made = codebook(codes="ema", metric="euclidean", standardize=False, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    share, sums = (t.double().numpy().copy() for t in (made.share, made.sums))
    for _ in range(3):
        hidden = torch.randn(6, 5, 8, generator=generator)
        vectors = made.narrow(hidden).detach().double().reshape(-1, 4).numpy()
        codes = sums / share[:, None]
        ids = ((vectors[:, None] - codes) ** 2).sum(-1).argmin(1)
        assert made(hidden).values.flatten().tolist() == ids.tolist()
        for code in range(20):
            mine = vectors[ids == code]
            share[code] = 0.9 * share[code] + 0.1 * len(mine) / len(vectors)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0) / len(vectors)
        torch.testing.assert_close(
            made.codes().double().numpy(), sums / share[:, None], rtol=1e-4, atol=1e-5
        )


def test_a_code_that_nothing_chooses_for_long_stays_where_it_is() -> None:
    made = codebook(codes="ema", metric="euclidean", standardize=False, decay=0.5)
    before = made.codes().clone()
    hidden = torch.zeros(6, 5, 8)  # all of which choose one code
    for _ in range(400):
        chosen = int(made(hidden).values[0, 0])
    others = [code for code in range(20) if code != chosen]
    torch.testing.assert_close(made.codes()[others], before[others], rtol=1e-3, atol=1e-4)


def test_codes_are_made_once_for_all_that_is_evaluated_and_anew_after_training() -> None:
    made = codebook(codes="projected", features=9).eval()
    with torch.no_grad():
        first = made.codes()
        assert made.codes() is first
        made.train()
        made.project.weight.mul_(-1)
        made.eval()
        assert torch.equal(made.codes(), -first)


def test_the_losses_of_a_codebook_are_means_over_all_numbers() -> None:
    made = codebook(width=4, commitment_weight=0.3, codebook_weight=0.5)
    hidden = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    found = made(hidden)
    inner = F.normalize(made.numbers(hidden), dim=-1)
    far = (made.codes()[found.values] - inner).square().sum() / inner.numel()
    torch.testing.assert_close(found.losses["codebook"], 0.8 * far)
