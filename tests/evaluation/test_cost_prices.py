"""Money and energy per million tokens against numbers worked out by hand; tables that are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.evaluation.costs.prices import FORMULA, default_prices, load_prices, price

TABLE = """
version = 1
currency = "EUR"
price_per_kwh = 0.3
[[machine]]
name = "desk"
device = "cpu"
price_per_hour = 0.36
watts = 200
source = "by hand"
[[machine]]
name = "card"
device = "cuda"
price_per_hour = 2
watts = 700
source = "by hand"
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TABLE)
    return path


def test_a_million_tokens_by_hand(table: Path) -> None:
    prices = load_prices(table)
    found = price(prices, prices.choose("cpu"), [("decode", 1, 100.0), ("prefill", 1, 2500.0)])
    decode, prefill = found.tokens
    # 1e6 / 100 = 10,000 s = 2.7778 h; at 0.36 an hour 1.00; at 200 W 0.55556 kWh, at 0.3 each 0.16667
    assert decode.money_per_million == pytest.approx(1.0)
    assert decode.kwh_per_million == pytest.approx(5 / 9)
    assert decode.energy_money_per_million == pytest.approx(1 / 6)
    # 25 times as fast: a 25th
    assert prefill.money_per_million == pytest.approx(0.04)
    assert prefill.kwh_per_million == pytest.approx(1 / 45)
    assert (found.machine, found.currency, found.table, found.formula) == ("desk", "EUR", "mine.toml", FORMULA)
    assert found.table_sha256 == hashlib.sha256(table.read_bytes()).hexdigest()


def test_the_formula_says_what_is_computed(table: Path) -> None:
    prices = load_prices(table)
    machine = prices.choose("cuda:1")
    (row,) = price(prices, machine, [("decode", 8, 123.4)]).tokens
    names = {"tokens_per_second": 123.4, "price_per_hour": machine.price_per_hour, "watts": machine.watts}
    names["price_per_kwh"] = prices.price_per_kwh or 0.0
    said = dict(part.strip().split(" = ", 1) for part in FORMULA.split(";"))
    assert list(said) == ["hours per million tokens", "money", "kWh", "energy money"]
    names["hours"] = eval(said["hours per million tokens"], {}, names)
    names["kWh"] = eval(said["kWh"], {}, names)
    assert row.money_per_million == pytest.approx(eval(said["money"], {}, names))
    assert row.kwh_per_million == pytest.approx(names["kWh"])
    assert row.energy_money_per_million == pytest.approx(eval(said["energy money"], {}, names))


def test_without_a_tariff_energy_has_no_price(table: Path) -> None:
    table.write_text(TABLE.replace("price_per_kwh = 0.3\n", ""))
    prices = load_prices(table)
    (row,) = price(prices, prices.choose("cpu"), [("decode", 1, 100.0)]).tokens
    assert row.energy_money_per_million is None
    assert row.kwh_per_million > 0


def test_the_machine_is_the_named_or_the_first_for_the_device(table: Path) -> None:
    prices = load_prices(table)
    assert [prices.choose(d).name for d in ("cpu", "cuda", "cuda:3")] == ["desk", "card", "card"]
    assert prices.choose("cpu", "card").name == "card"
    with pytest.raises(UserError, match="no machine called 'desktop'"):
        prices.choose("cpu", "desktop")
    with pytest.raises(UserError, match="no machine for device 'mps'"):
        prices.choose("mps")


def test_the_shipped_table_is_an_example_with_sources() -> None:
    prices = load_prices()
    assert default_prices().is_file()
    assert all(machine.source.startswith("example: ") for machine in prices.machine)
    assert {machine.device for machine in prices.machine} == {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("watts = 200", "watts = -1"), "watts"),
        (("watts = 200", "wats = 200"), "wats"),
        (("version = 1", "version = 2"), "version"),
        (('"card"', '"desk"'), "occurs twice"),
        (("version = 1", "version = 1\nsha256 = 'x'"), "unknown key sha256"),
        (("version = 1", "version ="), "not TOML"),
        (("price_per_hour = 2", "price_per_hour = nan"), "price_per_hour"),
    ],
)
def test_bad_tables_are_refused(table: Path, change: tuple[str, str], said: str) -> None:
    table.write_text(TABLE.replace(*change, 1))
    with pytest.raises(UserError, match=said):
        load_prices(table)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the price table"):
        load_prices(tmp_path / "none.toml")
