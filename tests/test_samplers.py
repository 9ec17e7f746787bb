"""Samplers that choose anew in every epoch: what is seen, how often, and after a resume."""

from __future__ import annotations

import io
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pipeline.errors import UsageError
from pipeline.pruning.distributed import all_ranks
from pipeline.pruning.draws import draw, shuffled
from pipeline.pruning.dynamic_random import DynamicRandom
from pipeline.pruning.infobatch import InfoBatch
from pipeline.pruning.sampler import DynamicSampler, active_epochs
from pipeline.pruning.seta import SeTa

N = 4000
METHODS: dict[str, Callable[..., DynamicSampler]] = {
    "SeTa": lambda n=N, epochs=12, **options: SeTa(n, epochs, window=0.6, **options),
    "InfoBatch": lambda n=N, epochs=12, **options: InfoBatch(n, epochs, **options),
    "DynamicRandom": lambda n=N, epochs=12, **options: DynamicRandom(n, epochs, **options),
}


def losses_of(rows: Any, epoch: int = 0) -> Any:
    """A loss for each row that falls from epoch to epoch, skewed to the right."""
    fixed = np.random.default_rng(5).gamma(1.0, size=2**16)
    return (fixed[np.asarray(rows) % 2**16] / (1 + 0.1 * epoch)).astype(np.float32)


def run(
    sampler: DynamicSampler, epochs: int, loss: Callable[[Any, int], Any] = losses_of
) -> list[Any]:
    """The rows of each epoch; all are updated with their losses."""
    seen = []
    for epoch in range(epochs):
        rows = np.fromiter(sampler, np.int64)
        sampler.update(rows, loss(rows, epoch))
        seen.append(rows)
    return seen


# Draws.


def test_every_row_is_drawn_as_often_and_so_is_every_pair() -> None:
    counts, pairs = np.zeros(6), np.zeros((6, 6))
    for seed in range(6000):
        flags = np.ones(6, np.bool_)
        draw(flags, 3, seed * 7919 + 1)
        assert flags.sum() == 3
        counts += flags
        pairs += np.outer(flags, flags)
    np.testing.assert_allclose(counts / 6000, 0.5, atol=0.03)
    np.testing.assert_allclose(pairs[~np.eye(6, dtype=bool)] / 6000, 0.2, atol=0.03)


def test_every_order_is_as_likely() -> None:
    flags = np.array([1, 0, 1, 1], np.bool_)
    orders = [tuple(shuffled(flags, seed * 104_729).tolist()) for seed in range(6000)]
    assert set(map(frozenset, orders)) == {frozenset({0, 2, 3})}
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    np.testing.assert_allclose(counts / 6000, 1 / 6, atol=0.02)


# What is seen.


def test_infobatch_sees_high_losses_always_and_low_ones_half_the_time() -> None:
    sampler, loss = InfoBatch(N, 40, prune=0.5), losses_of(np.arange(N))
    seen = np.zeros(N)
    for rows in run(sampler, 35, lambda rows, _: loss[rows]):
        assert len(set(rows.tolist())) == len(rows)
        seen[rows] += 1
    high = loss >= loss.astype(np.float64).mean()
    assert (seen[high] == 35).all()
    # The first epoch sees all; each later one half of the low ones.
    assert abs(seen[~high].mean() - (1 + 34 * 0.5)) < 0.05
    assert seen[~high].min() >= 6


def test_infobatch_weights_add_up_to_the_number_of_samples() -> None:
    sampler = InfoBatch(N, 40, prune=0.5)
    run(sampler, 1)
    sampler.next_epoch()
    rows = np.flatnonzero(sampler.keeps(np.arange(N)))
    weights = sampler.weights(rows)
    loss = losses_of(np.arange(N))
    low = loss < loss.astype(np.float64).mean()
    assert abs(float(weights.sum()) - N) < 1e-3 * N
    kept = int(low[rows].sum())
    assert kept == low.sum() // 2
    np.testing.assert_allclose(weights[low[rows]], low.sum() / kept, rtol=1e-6)
    assert (weights[~low[rows]] == 1).all()


def test_infobatch_is_unbiased() -> None:
    """The mean over draws of the weighted sum is the sum over all samples."""
    loss, gradients = losses_of(np.arange(200)), np.random.default_rng(0).normal(size=200)
    sums = []
    for seed in range(400):
        sampler = InfoBatch(200, 10, prune=0.7, seed=seed)
        run(sampler, 1, lambda rows, _: loss[rows])
        sampler.next_epoch()
        rows = np.flatnonzero(sampler.keeps(np.arange(200)))
        sums.append(float((gradients[rows] * sampler.weights(rows)).sum()))
    error = np.std(sums) / 20
    assert abs(np.mean(sums) - gradients.sum()) < 3 * error


@pytest.mark.parametrize("value", [3.0, 0.1])
def test_infobatch_leaves_nothing_out_while_losses_are_equal(value: float) -> None:
    sampler = InfoBatch(999, 10)
    assert len(sampler) == 999
    for rows in run(sampler, 3, lambda rows, _: np.full(len(rows), value, np.float32)):
        assert len(rows) == 999
        assert (sampler.weights(rows) == 1).all()


@pytest.mark.parametrize(
    ("groups", "window", "starts", "width"),
    [
        (5, 0.9, [1, 0, 1, 0, 1], 4),
        (5, 0.6, [1, 2, 0, 1, 2], 3),
        (10, 0.5, [1, 2, 3, 4, 5, 0, 1], 5),
        (5, 0.5, [1, 2, 3, 0, 1], 2),
    ],
)
def test_seta_slides_its_window_over_groups(
    groups: int, window: float, starts: list[int], width: int
) -> None:
    """Groups that are plain to see: which of them an epoch has."""
    group = np.arange(N) % groups
    sampler = SeTa(N, 100, prune=0.0, groups=groups, window=window)
    seen = run(sampler, len(starts) + 1, lambda rows, _: group[rows].astype(np.float32) * 10)
    assert len(seen[0]) == N
    for start, rows in zip(starts, seen[1:], strict=True):
        assert set(group[rows].tolist()) == set(range(start, start + width))
        assert len(rows) == N // groups * width


def test_the_mean_loss_of_seta_is_a_saw_tooth_and_that_of_random_is_flat() -> None:
    loss = losses_of(np.arange(N))

    def means(sampler: DynamicSampler) -> Any:
        return [loss[rows].mean() for rows in run(sampler, 13, lambda rows, _: loss[rows])[1:]]

    teeth = np.array(means(SeTa(N, 100, groups=5, window=0.6))[2:11]).reshape(3, 3)  # period s + 1
    assert (np.diff(teeth, axis=1) > 0.2).all()
    np.testing.assert_allclose(teeth[0], teeth[1], rtol=0.1)
    flat = np.array(means(DynamicRandom(N, 100, saving=0.5)))
    assert np.ptp(flat) < 0.15


def test_seta_sees_each_group_as_often_as_windows_hold_it() -> None:
    group = np.arange(N) % 5
    seen = np.zeros(N)
    epochs = run(SeTa(N, 200, groups=5, window=0.6), 100, lambda r, _: group[r].astype(np.float32))
    for rows in epochs[1:]:
        seen[rows] += 1
    # 33 cycles of windows 0-2, 1-3, 2-4, of 0.9 of the samples.
    wanted = 33 * 0.9 * np.array([1, 2, 3, 2, 1])
    np.testing.assert_allclose([seen[group == g].mean() for g in range(5)], wanted, rtol=0.02)


def test_mislabelled_samples_are_in_the_windows_of_hard_ones() -> None:
    wrong = np.random.default_rng(1).random(N) < 0.05
    loss = np.where(wrong, 8.0, losses_of(np.arange(N))).astype(np.float32)
    seen = run(SeTa(N, 100, groups=5, window=0.6), 10, lambda rows, _: loss[rows])
    # Epoch n has window n mod 3: 0 is the easiest.
    shares = [wrong[rows].mean() for rows in seen[3:9]]
    assert shares[0] == shares[3] == 0
    assert min(shares[2], shares[5]) > 0.15


def test_seta_unbiased_counts_every_sample_alike_over_a_cycle() -> None:
    loss, total, runs = losses_of(np.arange(300)), np.zeros(300), 150
    for seed in range(runs):
        sampler = SeTa(300, 50, groups=5, window=0.6, unbiased=True, seed=seed)
        sampler.next_epoch()
        sampler.update(np.arange(300), loss)  # those that were not drawn too
        for _ in range(3):
            sampler.next_epoch()
            rows = np.flatnonzero(sampler.keeps(np.arange(300)))
            total[rows] += sampler.weights(rows)
    # The same clusters in each run, but for what the random part leaves out of them.
    assert abs(total.mean() / runs - 3) < 0.05
    by_loss = (total / runs)[np.argsort(loss)].reshape(10, 30).mean(1)
    np.testing.assert_allclose(by_loss, 3, atol=0.35)


def test_annealing_sees_all_or_a_fresh_random_part_with_weight_one() -> None:
    assert [active_epochs(e, 0.875) for e in (8, 9, 10, 200)] == [7, 7, 8, 175]
    assert active_epochs(10, 0.7) == 7
    seta, info = SeTa(N, 8, prune=0.25, unbiased=True), InfoBatch(N, 8)
    for sampler, size in ((seta, 3000), (info, N)):
        last = run(sampler, 8)[-1]
        assert len(last) == size
        assert (sampler.weights(last) == 1).all()
    twice = run(SeTa(N, 8, prune=0.25, anneal=0.5), 8)[-2:]
    assert set(twice[0].tolist()) != set(twice[1].tolist())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_counted_to_the_sample(method: str) -> None:
    sampler = METHODS[method]()
    seen = run(sampler, 12)
    assert sampler.saved == 12 * N - sum(map(len, seen)) > 0


# Lengths that are planned.


@pytest.mark.parametrize("saving", [0.05, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("method", METHODS)
def test_lengths_follow_from_what_is_to_be_saved(method: str, saving: float) -> None:
    sampler = METHODS[method](N, 20, saving=saving)
    lengths = sampler.lengths
    assert len(lengths) == 20
    assert sum(lengths) == 20 * N - round(saving * 20 * N)
    seen = run(sampler, 20)
    assert [len(rows) for rows in seen] == list(lengths)
    assert all(len(set(rows.tolist())) == len(rows) for rows in seen)
    assert sampler.saved == round(saving * 20 * N)


def test_planned_infobatch_is_unbiased_and_prunes_low_losses_alone() -> None:
    loss = losses_of(np.arange(N))
    sampler = InfoBatch(N, 20, saving=0.6)
    for rows in run(sampler, 15, lambda rows, _: loss[rows])[1:]:
        left_out = np.setdiff1d(np.arange(N), rows)
        # No more than nine tenths of the lowest are left out, and nothing above them.
        assert loss[left_out].max() <= np.sort(loss)[int(len(left_out) / 0.9) + 1]
        assert abs(float(sampler.weights(rows).sum()) - N) < 1e-3 * N


@pytest.mark.parametrize("saving", [0.3, 0.6])
def test_planned_seta_still_slides_from_easy_to_hard(saving: float) -> None:
    loss = losses_of(np.arange(N))
    sampler = SeTa(N, 40, window=0.6, saving=saving)
    seen = run(sampler, 10, lambda rows, _: loss[rows])
    means = np.array([loss[rows].mean() for rows in seen[3:9]]).reshape(2, 3)
    assert (means[:, 1:] > means[:, :1] + 0.3).all()


def test_lengths_that_depend_on_losses_are_not_told() -> None:
    for sampler in (SeTa(N, 10), InfoBatch(N, 10)):
        with pytest.raises(UsageError, match="depends on losses") as caught:
            sampler.lengths  # noqa: B018
        assert caught.value.code == "unplanned-epochs"


def test_a_saving_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(UsageError, match="cannot be saved") as caught:
        InfoBatch(N, 10, saving=0.95, anneal=0.5)
    assert caught.value.code == "saving-out-of-reach"
    most = float(caught.value.hint.rpartition("=")[2].rstrip("."))
    sampler = InfoBatch(N, 10, saving=most, anneal=0.5)
    assert [len(rows) for rows in run(sampler, 10)] == list(sampler.lengths)


# Ranks.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_what_one_alone_would_see(method: str, world: int) -> None:
    alone = METHODS[method]()
    ranks = [METHODS[method](rank=rank, world=world) for rank in range(world)]
    for epoch in range(5):
        order = np.fromiter(alone, np.int64)
        parts = [np.fromiter(sampler, np.int64) for sampler in ranks]
        for rank, part in enumerate(parts):
            assert part.tolist() == order[rank::world].tolist()
        assert sorted(np.concatenate(parts).tolist()) == sorted(order.tolist())
        for sampler in (alone, *ranks):
            sampler.update(order, losses_of(order, epoch))


def test_ranks_are_equally_long_where_that_is_asked_for() -> None:
    ranks = [DynamicRandom(101, 5, saving=0.0, rank=r, world=4, drop_last=True) for r in range(4)]
    parts = [list(sampler) for sampler in ranks]
    assert [len(part) for part in parts] == [25] * 4 == [len(sampler) for sampler in ranks]
    assert len(set().union(*parts)) == 100


def _rank(rank: int, port: int, queue: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    rows = torch.arange(2**24 + rank, 2**24 + 3 + 2 * rank)
    found = all_ranks(rows, (rows.double() - 2**24).half())
    queue.put((rank, found[0].tolist(), found[1].tolist(), str(found[1].dtype)))
    torch.distributed.destroy_process_group()


def test_ranks_tell_one_another_rows_beyond_float32(unused_port: int) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, unused_port, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    told = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    first = 2**24
    rows = [first, first + 1, first + 2, first + 1, first + 2, first + 3, first + 4]
    for _, found, losses, kind in told:
        assert found == rows
        assert losses == [row - first for row in rows]
        assert kind == "torch.float32"


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_without_ranks_rows_and_losses_are_those_given() -> None:
    rows, losses = all_ranks([3, 4], torch.tensor([1.0, 2.0], dtype=torch.float16))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [3, 4]
    assert losses.tolist() == [1, 2]


def test_the_example_learns_with_half_the_samples() -> None:
    example = Path(__file__).parents[1] / "examples" / "seta.py"
    done = subprocess.run([sys.executable, example], check=True, capture_output=True, text=True)
    found = re.fullmatch(r"accuracy ([0-9.]+)%, 19500 of 39000 samples saved\n", done.stdout)
    assert found
    assert float(found[1]) > 90


# Resuming.


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(stop=st.integers(0, 4), share=st.floats(0, 1), world=st.integers(1, 4), saving=st.booleans())
def test_what_is_left_of_an_epoch_and_all_later_ones_are_the_same_after_a_resume(
    method: str, stop: int, share: float, world: int, saving: bool
) -> None:
    options = {"saving": 0.4} if saving else {}
    whole = METHODS[method](500, 8, **options)
    before = METHODS[method](500, 8, **options)
    run(whole, stop)
    run(before, stop)
    order = np.fromiter(whole, np.int64)
    done = round(share * len(order))
    list(before)  # a loader has fetched everything ahead
    for sampler in (whole, before):
        sampler.update(order[:done], losses_of(order[:done], stop))
    state = through_disk(before.state_dict())
    ranks = [METHODS[method](500, 8, rank=r, world=world, **options) for r in range(world)]
    for sampler in ranks:
        sampler.load_state_dict(state)
        assert sampler.epoch == stop + (done == len(order))
    if done < len(order):
        parts = [np.fromiter(sampler, np.int64) for sampler in ranks]
        for rank, part in enumerate(parts):
            assert part.tolist() == order[done:][rank::world].tolist()
    for sampler in (whole, *ranks):
        sampler.update(order[done:], losses_of(order[done:], stop))
    for epoch in range(stop + 1, 8):
        order = np.fromiter(whole, np.int64)
        parts = [np.fromiter(sampler, np.int64) for sampler in ranks]
        for rank, part in enumerate(parts):
            assert part.tolist() == order[rank::world].tolist()
        for sampler in (whole, *ranks):
            sampler.update(order, losses_of(order, epoch))
        assert {sampler.saved for sampler in ranks} == {whole.saved}


def test_a_loader_with_workers_goes_on_exactly() -> None:
    data = TensorDataset(torch.arange(300))
    whole, cut = SeTa(300, 4), SeTa(300, 4)
    for sampler in (whole, cut):
        run(sampler, 1)
    batches = [b[0] for b in DataLoader(data, batch_size=32, sampler=whole, num_workers=2)]
    for number, (batch,) in enumerate(
        DataLoader(data, batch_size=32, sampler=cut, num_workers=2, prefetch_factor=2)
    ):
        cut.update(batch, losses_of(batch, 1))
        if number == 2:
            break
    again = SeTa(300, 4)
    again.load_state_dict(through_disk(cut.state_dict()))
    rest = [b[0] for b in DataLoader(data, batch_size=32, sampler=again, num_workers=2)]
    assert torch.equal(torch.cat(rest), torch.cat(batches[3:]))


def test_the_state_of_another_sampler_is_refused() -> None:
    state = SeTa(100, 5).state_dict()
    others = [SeTa(101, 5), SeTa(100, 6), SeTa(100, 5, prune=0.2), SeTa(100, 5, seed=1)]
    for other in [*others, InfoBatch(100, 5)]:
        with pytest.raises(UsageError, match="another sampler") as caught:
            other.load_state_dict(state)
        assert caught.value.code == "other-sampler"


@pytest.mark.parametrize("method", METHODS)
def test_no_random_numbers_of_others_are_used(method: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    one = run(METHODS[method](), 3)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    two = run(METHODS[method](), 3)
    np.random.set_state(("MT19937", numpy_state, 624))  # noqa: NPY002
    torch.set_rng_state(torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    third = run(METHODS[method](seed=1), 3)
    assert not np.array_equal(one[0], third[0])


# Keys and kinds of input.


def test_keys_of_a_stream_are_known_by_name() -> None:
    names = [f"shard/{row}.jpg" for row in range(50)]
    named, numbered = SeTa(pa.array(names), 5), SeTa(50, 5)
    for epoch in range(4):
        named.next_epoch()
        numbered.next_epoch()
        assert named.keeps(names).tolist() == numbered.keeps(np.arange(50)).tolist()
        rows = np.flatnonzero(numbered.keeps(np.arange(50)))
        numbered.update(rows, losses_of(rows, epoch))
        named.update([names[row] for row in rows], losses_of(rows, epoch))
    assert named.weights(names[:3]).shape == (3,)


def test_tensors_and_arrays_are_the_same() -> None:
    one, two = InfoBatch(64, 5), InfoBatch(64, 5)
    one.next_epoch()
    two.next_epoch()
    loss = losses_of(np.arange(64))
    one.update(torch.arange(64), torch.tensor(loss, dtype=torch.float64, requires_grad=True))
    two.update(list(range(64)), loss.tolist())
    one.next_epoch()
    two.next_epoch()
    weights = one.weights(torch.arange(64))
    assert isinstance(weights, torch.Tensor)
    assert weights.tolist() == two.weights(np.arange(64)).tolist()


def test_rows_beyond_float32_are_told_apart() -> None:
    size = 2**24 + 10
    sampler = DynamicRandom(size, 2, saving=0.99)
    sampler.next_epoch()
    rows = np.array([2**24, 2**24 + 1])
    sampler.update(rows, np.array([1.0, 2.0]))
    assert sampler.state_dict()["losses"][rows].tolist() == [1.0, 2.0]


def test_fewer_distinct_losses_than_groups_are_groups_of_their_own() -> None:
    sampler = SeTa(90, 20, prune=0.0, groups=5, window=0.6)
    value = (np.arange(90) % 2).astype(np.float32)
    seen = run(sampler, 4, lambda rows, _: value[rows])
    # Two groups, of which a window has round(1.2) = 1.
    assert [set(value[rows].tolist()) for rows in seen[1:]] == [{1.0}, {0.0}, {1.0}]
    same = run(SeTa(90, 20, groups=5), 4, lambda rows, _: np.ones(len(rows)))
    assert [len(rows) for rows in same] == [81] * 4


def test_samples_never_seen_count_as_the_hardest() -> None:
    sampler = SeTa(100, 20, prune=0.0, groups=5, window=0.6)
    sampler.next_epoch()
    sampler.update(np.arange(90), np.arange(90))
    seen = []
    for _ in range(3):
        sampler.next_epoch()
        seen.append(set(np.flatnonzero(sampler.keeps(np.arange(100))).tolist()))
    assert [set(range(90, 100)) <= rows for rows in seen] == [False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_bad_updates_are_refused_and_change_nothing(method: str) -> None:
    sampler = METHODS[method](20, 5)
    sampler.next_epoch()
    before = sampler.state_dict()
    cases = [
        ([1, 2], [0.5, float("nan")], "loss-not-finite", "sample 2"),
        ([1], [float("inf")], "loss-not-finite", "epoch 0"),
        ([1, 20], [0.5, 0.5], "unknown-sample", "row 20 of 20"),
        ([-1], [0.5], "unknown-sample", "row -1"),
        (["a"], [0.5], "unknown-sample", "type"),
        ([1, 2], [0.5], "bad-sampler", "losses for"),
    ]
    for keys, losses, code, text in cases:
        with pytest.raises(UsageError, match=text) as caught:
            sampler.update(keys, losses)
        assert caught.value.code == code
    after = sampler.state_dict()
    assert torch.equal(before["losses"].isnan(), after["losses"].isnan())
    assert before["position"] == after["position"]


def test_a_key_that_was_never_named_is_refused() -> None:
    sampler = SeTa(["a", "b"], 5)
    with pytest.raises(UsageError, match="such as 'c'"):
        sampler.update(["a", "c"], [1.0, 1.0])
    with pytest.raises(UsageError, match="more than once"):
        SeTa(["a", "a"], 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SeTa(0, 5),
        lambda: SeTa(5, 0),
        lambda: SeTa(5, 5, prune=1.0),
        lambda: SeTa(5, 5, window=1.5),
        lambda: SeTa(5, 5, groups=0),
        lambda: SeTa(5, 5, unbiased=True, saving=0.5),
        lambda: SeTa(5, 5, rank=2, world=2),
        lambda: InfoBatch(5, 5, prune=0.95),
        lambda: InfoBatch(5, 5, anneal=1.1),
        lambda: DynamicRandom(5, 5, saving=-0.1),
        lambda: DynamicRandom(5, 5, saving=1.0),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.hint


def test_no_epoch_comes_after_the_last() -> None:
    sampler = DynamicRandom(10, 1)
    list(sampler)
    with pytest.raises(UsageError, match="All 1 epochs"):
        list(sampler)
