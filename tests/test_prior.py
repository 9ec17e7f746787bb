"""The learned prior and GDN: what densities are, what they learn, and the tables they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.codecs import rans
from pipeline.codecs.gdn import GDN, lower_bound
from pipeline.codecs.prior import FactorizedPrior
from pipeline.codecs.tables import TOTAL


@pytest.fixture(scope="module")
def trained() -> tuple[FactorizedPrior, list[np.ndarray]]:
    """A prior of two channels, a Laplacian and a mixture of two."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    laplace = draw.laplace(0.3, 2.0, 20_000)
    mixture = np.where(
        draw.random(20_000) < 0.3, draw.normal(-6, 0.7, 20_000), draw.normal(4, 1.5, 20_000)
    )
    data = torch.tensor(np.stack([laplace, mixture]), dtype=torch.float32)
    prior = FactorizedPrior(2)
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(1200):
        rows = torch.randint(0, data.shape[1], (1024,))
        noisy = data[:, rows] + torch.rand(2, 1024) - 0.5
        loss = -prior.likelihood(noisy).log2().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior, [laplace, mixture]


def test_the_cumulative_distribution_rises_and_sums_to_one():
    torch.manual_seed(1)
    prior = FactorizedPrior(3).double()
    for gate in prior.gates:
        torch.nn.init.uniform_(gate, -2, 2)
    x = torch.linspace(-300, 300, 4001, dtype=torch.float64).expand(3, -1)
    logits = prior.logits(x)
    assert (logits.diff() > 0).all()
    whole = torch.arange(-5000, 5001, dtype=torch.float64).expand(3, -1)
    upper, lower = prior.logits(whole + 0.5), prior.logits(whole - 0.5)
    total = (upper.sigmoid() - lower.sigmoid()).sum(1).detach().numpy()
    assert total == pytest.approx(np.ones(3), abs=1e-6)


def test_gradients_are_those_of_differences():
    torch.manual_seed(2)
    prior = FactorizedPrior(2).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior.likelihood, (x,))


def test_far_in_the_tail_there_is_a_gradient_back():
    torch.manual_seed(0)
    prior = FactorizedPrior(1)
    x = torch.tensor([[4000.0]], requires_grad=True)
    (-prior.likelihood(x).log2()).sum().backward()
    assert torch.isfinite(x.grad).all()
    bounded = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
    (lower_bound(bounded, 0.0) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    assert bounded.grad.tolist() == [0.0, -1.0, 1.0]


def test_it_learns_what_the_numbers_are(trained):
    prior, data = trained
    tables = prior.tables()
    for channel, values in enumerate(data):
        symbols = np.rint(values).astype(np.int64)
        _, counts = np.unique(symbols, return_counts=True)
        share = counts / counts.sum()
        entropy = -(share * np.log2(share)).sum()
        cost = tables.bits(symbols[:, None], np.array([channel])) / len(symbols)
        assert cost < entropy + 0.03


def test_tables_are_those_of_the_density(trained):
    prior, data = trained
    tables = prior.tables()
    symbols = np.stack([np.rint(v).astype(np.int64) for v in data], 1)
    pattern = np.arange(2)
    with torch.no_grad():
        ideal = -prior.likelihood(torch.tensor(symbols.T, dtype=torch.float32)).log2().sum()
    assert tables.bits(symbols, pattern) == pytest.approx(float(ideal), rel=2e-3)
    data_bytes = rans.encode(symbols.ravel(), np.tile(pattern, len(symbols)), tables)
    assert len(data_bytes) <= 1.001 * tables.bits(symbols, pattern) / 8 + 8
    assert tables.lengths.max() < 60


def test_a_heavy_tail_does_not_make_a_long_table():
    torch.manual_seed(0)
    prior = FactorizedPrior(1)
    with torch.no_grad():
        prior.matrices[0] -= 6
    tables = prior.tables(most=64)
    assert tables.lengths[0] == 64
    assert tables.frequencies[-1] > 0.01 * TOTAL
    middle = tables.offsets[0] + tables.lengths[0] / 2
    assert abs(float(prior.logits(torch.tensor([[float(middle)]])).detach())) < 1


def test_divisive_normalisation_is_its_formula():
    torch.manual_seed(0)
    layer, inverse = GDN(3).double(), GDN(3, inverse=True).double()
    with torch.no_grad():
        layer.gamma.uniform_(0, 1)
        layer.beta.uniform_(0.5, 2)
    inverse.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    beta, gamma = layer.beta**2, layer.gamma**2
    norm = beta[None, :, None, None] + torch.einsum("ij,njhw->nihw", gamma, x.abs())
    torch.testing.assert_close(layer(x), x / norm)
    torch.testing.assert_close(inverse(x), x * norm)


def test_it_begins_near_the_identity():
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(GDN(4)(x), x / (1 + 0.1 * x.abs()), rtol=1e-4, atol=1e-5)
