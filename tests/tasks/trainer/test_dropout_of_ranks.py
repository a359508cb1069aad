"""Dropout by rows: the same values are dropped in every layout, cut and order, so on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.tasks.trainer.dropout import RowDropout, _Keys, kept, keys_of_batch, mixed, seed_of, token_keys
from smoltulu.tasks.training.sft import collate_packed

RATE, WIDTH = 0.3, 16


def packed(lengths: dict[int, int]) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": [7] * length, "labels": [7] * length} for length in lengths.values()]
    return {**collate_packed(rows), "row": torch.tensor(list(lengths))}


def padded(lengths: dict[int, int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(len(lengths), max(lengths.values())), "row": torch.tensor(list(lengths))}


def of_rows(batch: dict[str, torch.Tensor], lengths: dict[int, int], step: int = 3) -> dict[int, torch.Tensor]:
    """Row -> what is kept of it."""
    stays = kept(keys_of_batch(5, step, batch), 1, WIDTH, RATE)
    found, start = {}, 0
    for line, (row, length) in enumerate(lengths.items()):
        found[row] = stays[0, start : start + length] if "segments" in batch else stays[line, :length]
        start += length
    return found


@settings(max_examples=25)
@given(st.dictionaries(st.integers(0, 10**9), st.integers(1, 9), min_size=1, max_size=5), st.randoms())
def test_every_cut_among_ranks_drops_the_same_values(lengths: dict[int, int], random: object) -> None:
    whole = of_rows(packed(lengths), lengths)
    order = list(lengths)
    random.shuffle(order)  # type: ignore[attr-defined]
    for rows in (order, order[: len(order) // 2 + 1], order[-1:]):
        some = {row: lengths[row] for row in rows}
        for layout in (packed, padded):
            for row, stays in of_rows(layout(some), some).items():
                assert torch.equal(stays, whole[row])


def test_the_rate_is_kept_and_nothing_repeats() -> None:
    """Of 2**20 values 0.3 are dropped within four standard deviations; rows, steps, seeds, places are independent."""
    positions = torch.arange(1 << 12)
    rows = torch.zeros_like(positions)
    one = kept(token_keys(1, 0, rows, positions), 0, 1 << 8, RATE)
    spread = (RATE * (1 - RATE) / one.numel()) ** 0.5
    assert abs((~one).double().mean().item() - RATE) < 4 * spread
    both = RATE**2 + (1 - RATE) ** 2  # that two independent values are alike
    others = {
        "row": kept(token_keys(1, 0, rows + 1, positions), 0, 1 << 8, RATE),
        "step": kept(token_keys(1, 1, rows, positions), 0, 1 << 8, RATE),
        "seed": kept(token_keys(2, 0, rows, positions), 0, 1 << 8, RATE),
        "place": kept(token_keys(1, 0, rows, positions), 1, 1 << 8, RATE),
        "position": one.roll(1, dims=0),
        "channel": one.roll(1, dims=1),
    }
    for name, other in others.items():
        assert abs((one == other).double().mean().item() - both) < 4 * (both * (1 - both) / one.numel()) ** 0.5, name


def test_the_hash_is_splitmix64() -> None:
    """Against the published finaliser, in Python's whole numbers."""

    def finaliser(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    values = [0, 1, -1, 2**63 - 1, -(2**63), seed_of("any"), seed_of("other", 3)]
    assert [one % 2**64 for one in mixed(torch.tensor(values)).tolist()] == [finaliser(one % 2**64) for one in values]
    assert seed_of(1, 2) != seed_of(12) and seed_of(1, 2) == seed_of(1, 2)


def test_a_module_drops_scales_and_leaves_the_rest_to_torch() -> None:
    keys, lengths = _Keys(), {4: 3, 9: 5}
    module = RowDropout(RATE, 1, keys)
    hidden = torch.ones(1, 8, WIDTH, requires_grad=True)
    keys.now = keys_of_batch(5, 3, packed(lengths))
    stays = torch.cat(list(of_rows(packed(lengths), lengths).values()))[None]
    torch.testing.assert_close(module(hidden), stays / (1 - RATE))
    torch.testing.assert_close(module(hidden[0]), stays[0] / (1 - RATE))  # tokens in one dimension, as experts have
    module(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, stays / (1 - RATE))
    assert torch.equal(module.eval()(hidden), hidden)
    module.train()
    for input, now in ((hidden, None), (torch.ones(1, 2, 8, 8), keys.now)):
        keys.now = now
        torch.manual_seed(0)
        mine = module(input)
        torch.manual_seed(0)
        assert torch.equal(mine, torch.nn.functional.dropout(input, RATE))


@pytest.mark.parametrize("rate", [0.0, 0.999])
def test_rates_at_the_ends(rate: float) -> None:
    stays = kept(token_keys(0, 0, torch.zeros(1000, dtype=torch.int64), torch.arange(1000)), 0, 10, rate)
    assert stays.all() if rate == 0 else 0 < stays.double().mean() < 0.01
