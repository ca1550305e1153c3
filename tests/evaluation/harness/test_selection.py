"""Which items are chosen: fixed by the seed, in proportion, nested."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from compress.evaluation.harness.selection import item_id, order


@given(st.lists(st.sampled_from("abcd"), max_size=60), st.integers(0, 3))
def test_an_order_holds_every_item_once(strata: list[str], seed: int) -> None:
    assert sorted(order(strata, seed, "task")) == list(range(len(strata)))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=80), st.data())
def test_every_beginning_keeps_the_strata_s_shares(strata: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(strata)))
    chosen = Counter(strata[number] for number in order(strata, 0, "t")[:count])
    for stratum, size in Counter(strata).items():
        assert abs(chosen[stratum] - count * size / len(strata)) < 2


def test_equal_strata_take_turns() -> None:
    strata = [f"s{number // 100}" for number in range(700)]
    first = order(strata, 1234, "blimp")[:7]
    assert len({strata[number] for number in first}) == 7


def test_seed_and_task_decide() -> None:
    strata = [""] * 50
    assert order(strata, 1, "a") == order(strata, 1, "a")
    assert order(strata, 1, "a") != order(strata, 2, "a")
    assert order(strata, 1, "a") != order(strata, 1, "b")


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert order(["a", "b", "a", "b", "b"], 1234, "task") == [4, 0, 1, 2, 3]
    assert sorted(map(item_id, (2, 10, 1))) == ["000001", "000002", "000010"]
