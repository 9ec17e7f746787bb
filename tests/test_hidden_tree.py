"""Hidden trees: conditionals by enumeration, likelihoods that rise, integers alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.codecs import tree_kernels as kernels
from pipeline.codecs.bitstream import compress, decompress
from pipeline.codecs.entropy import StaticModel
from pipeline.codecs.hidden_tree import HiddenTree, Weights, chow_liu
from pipeline.errors import RunError


def chained(count: int = 600, seed: int = 0) -> np.ndarray:
    """Samples (n, 6) with categories 0 to 2, each like its neighbour most of the time."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 3, (count, 6))
    for i in range(1, 6):
        same = draw.random(count) < 0.85
        x[same, i] = x[same, i - 1]
    return x


@pytest.fixture(scope="module")
def tree() -> HiddenTree:
    return HiddenTree.fit(chained(), states=3, epochs=30, batch=100)


def likelihood(tree: HiddenTree, sample: tuple[int, ...], known: int) -> float:
    """That the first ``known`` nodes are as in ``sample``, by summing over all hidden states."""
    weights = [v.astype(np.float64) / 2**16 for v in (tree.root, tree.transition, tree.emission)]
    root, transition, emission = weights
    total = 0.0
    for hidden in itertools.product(range(len(root)), repeat=known):
        value = root[hidden[0]]
        for i in range(known):
            if i:
                value *= transition[i, hidden[tree.parent[i]], hidden[i]]
            value *= emission[i, sample[i], hidden[i]]
        total += value
    return total


def test_conditionals_are_those_of_enumeration(tree):
    symbols = tree.emission.shape[1]
    low, size = (np.empty((1, 6), np.uint32) for _ in range(2))
    for sample in chained(4, seed=3):
        nodes = sample[tree.order]
        for i in range(6):
            sizes = []
            for v in range(symbols):
                asked = nodes.copy()
                asked[i] = v
                kernels.slots(asked[None].astype(np.int32), *tree._arrays, low, size)
                sizes.append(int(size[0, i]))
                assert sum(sizes) == int(low[0, i]) + sizes[-1]
            assert sum(sizes) == 2**kernels.PRECISION
            before = likelihood(tree, tuple(nodes), i) if i else 1.0
            for v in range(symbols):
                exact = likelihood(tree, (*nodes[:i], v), i + 1) / before
                assert sizes[v] / 2**kernels.PRECISION == pytest.approx(exact, abs=1e-6, rel=1e-3)


def test_a_tree_of_many_symbols_is_worth_more_than_tables(tree):
    new = chained(500, seed=1)
    alone = StaticModel.counted(chained(), positions=True)
    assert tree.bits(new) < 0.75 * alone.bits(new)
    data = compress(new.astype(np.uint8), tree)
    assert (decompress(data, tree) == new).all()
    assert 8 * len(data) < 1.002 * tree.bits(new) + 8 * 60


def test_integers_cost_no_more_than_floats():
    x = chained()
    values = x[:, (order := chow_liu(x.astype(np.int32), 4))[0]].astype(np.int32)
    weights = Weights.start(values, 4, 4, np.random.default_rng(0), np.float64)
    for _ in range(30):
        weights.improve(values, order[1], 1.0, 0.01)
    counts = np.zeros_like(weights.transition), np.zeros_like(weights.emission)
    given = weights.root, weights.transition, weights.emission
    ideal = -kernels.expect(values, order[1], *given, *counts) / np.log(2)
    whole = HiddenTree.of(weights, *order, 0, (6,))
    assert whole.bits(x) == pytest.approx(ideal, rel=1e-3)


def test_full_steps_never_lower_the_likelihood():
    x = chained(300)
    order, parent = chow_liu(x.astype(np.int32), 4)
    values = np.ascontiguousarray(x[:, order].astype(np.int32))
    weights = Weights.start(values, 4, 3, np.random.default_rng(0), np.float64)
    found = [weights.improve(values, parent, 1.0, 0.0) for _ in range(40)]
    assert (np.diff(found) > -1e-9 * abs(found[0])).all()
    assert found[-1] > found[0] + 100
    assert weights.transition[1:].sum(2) == pytest.approx(1)
    assert weights.emission.sum(1) == pytest.approx(1)


def test_the_tree_joins_those_that_depend_on_one_another():
    draw = np.random.default_rng(0)
    x = chained(2000)
    shuffled = draw.permutation(6)
    order, parent = chow_liu(x[:, shuffled].astype(np.int32), 3)
    assert sorted(order) == list(range(6))
    assert all(parent[i] < i for i in range(1, 6))
    edges = {frozenset((shuffled[order[i]], shuffled[order[parent[i]]])) for i in range(1, 6)}
    assert edges == {frozenset((i, i + 1)) for i in range(5)}
    # From the middle of the chain, no node is more than three edges away.
    depth = [0] * 6
    for i in range(1, 6):
        depth[i] = depth[parent[i]] + 1
    assert max(depth) == 3


def test_a_node_may_have_hundreds_of_children():
    draw = np.random.default_rng(0)
    hub = draw.integers(0, 2, (400, 1))
    x = np.concatenate([hub, hub ^ (draw.random((400, 300)) < 0.1)], 1)
    x[:, 200:] = 0  # constant: they hang on any node
    tree = HiddenTree.fit(x, states=16, epochs=3, batch=100)
    assert np.bincount(tree.parent).max() > 99
    assert tree.bits(x) < 0.75 * StaticModel.counted(x, positions=True).bits(x)
    assert (decompress(compress(x.astype(np.uint8), tree), tree) == x).all()


def test_the_result_does_not_depend_on_threads():
    made = [HiddenTree.fit(chained(), states=2, epochs=3, threads=n).digest for n in (1, 2)]
    assert made[0] == made[1]


def test_extremes_come_back_bit_for_bit():
    x = np.random.default_rng(0).integers(0, 40, (200, 4, 4)).astype(np.uint8)
    tree = HiddenTree.fit(x, states=2, epochs=2)
    noise = np.random.default_rng(1).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    for some in (np.zeros_like(noise), np.full_like(noise, 255), noise, x[:5]):
        data = compress(some, tree, group=1)
        assert (decompress(data, tree) == some).all()
        assert len(data) < some.size + len(some) * 8 + 60
    assert tree.escapes(np.full((1, 16), 255)) == 16
    assert tree.escapes(x[:1].reshape(1, -1)) == 0


def test_loops_that_are_not_compiled_give_the_same_bytes(tree, tmp_path):
    script = (
        "import numpy as np, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from pipeline.codecs.hidden_tree import HiddenTree\n"
        "f = np.load(sys.argv[1])\n"
        "t = HiddenTree.from_arrays({n: f[n] for n in f.files if n != 'x'})\n"
        "low, size, _ = t._slots(f['x'])\n"
        "sys.stdout.write(low.tobytes().hex() + size.tobytes().hex())\n"
    )
    x = chained(20, seed=2)
    x[3, 2] = 77
    np.savez(tmp_path / "tree.npz", x=x, **tree.to_arrays())
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    call = [sys.executable, "-c", script, str(tmp_path / "tree.npz")]
    found = subprocess.run(call, check=False, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    low, size, _ = tree._slots(x)
    assert found.stdout == low.tobytes().hex() + size.tobytes().hex()


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("parent", lambda a: a[::-1].copy(), "order of a walk"),
        ("order", np.zeros_like, "a node for each symbol"),
        ("root", lambda a: a + 1, "the sum 65,536"),
        ("transition", np.zeros_like, "the sum 65,536"),
        ("emission", lambda a: a[:, :1], "the sum 65,536"),
        ("emission", lambda a: a[:1], "not of one size"),
        ("about", lambda a: a[:1], "a node for each symbol"),
    ],
)
def test_damaged_trees_are_refused(tree, name, change, why):
    arrays = tree.to_arrays()
    assert HiddenTree.from_arrays(arrays).digest == tree.digest
    with pytest.raises(RunError, match=why):
        HiddenTree.from_arrays({**arrays, name: change(arrays[name])})
    with pytest.raises(RunError, match="This is no tree"):
        HiddenTree.from_arrays({n: v for n, v in arrays.items() if n != name})
