"""What tokens cost: an hour's price and a machine's watts, from a small table that its user edits. Free of torch.

The shipped table holds examples with their sources; nobody's bill follows from it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress import content
from compress.errors import UserError
from compress.evaluation.costs.record import PriceRecord, Timed, TokenPrice
from compress.recipe_problems import describe

NAME = "prices.toml"
FORMULA = (
    "hours per million tokens = 1e6 / tokens_per_second / 3600; "
    "money = hours * price_per_hour; kWh = hours * watts / 1000; energy money = kWh * price_per_kwh"
)

Amount = Annotated[float, Field(ge=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Section):
    """One machine. `device` is what runs the model on it; `source` says where its numbers come from, and when."""

    name: str = Field(min_length=1)
    device: Literal["cpu", "cuda"]
    price_per_hour: Amount
    watts: Amount
    source: str = Field(min_length=1)


class PriceTable(_Section):
    """A whole table. `origin` and `sha256` are those of the file it was read from."""

    version: Literal[1]
    currency: str = Field(min_length=1)
    price_per_kwh: Amount | None = None
    machine: list[Machine] = Field(min_length=1)
    origin: str = ""
    sha256: str = ""

    @model_validator(mode="after")
    def _names_differ(self) -> PriceTable:
        names = [machine.name for machine in self.machine]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the machine `{twice[0]}` occurs twice")
        return self

    def choose(self, device: str, name: str | None = None) -> Machine:
        """The machine called `name`, else the first for this kind of device (`cpu`, `cuda` or `cuda:N`).

        Raises:
            UserError: there is none.
        """
        known = ", ".join(f"{machine.name} ({machine.device})" for machine in self.machine)
        kind = device.partition(":")[0]
        for machine in self.machine:
            if machine.name == name or (name is None and machine.device == kind):
                return machine
        wanted = f"called {name!r}" if name is not None else f"for device {kind!r}"
        raise UserError(f"the price table {self.origin} has no machine {wanted}", f"it has {known}; add yours")


def default_prices() -> Path:
    """The example table that ships with the package."""
    return content.eval_dir() / NAME


def load_prices(path: str | Path | None = None) -> PriceTable:
    """Reads a price table, the shipped one if None.

    Raises:
        UserError: a missing file, bad TOML, an unknown key, or a value out of range.
    """
    path = default_prices() if path is None else Path(path)
    hint = f"see {NAME} in eval/ for a commented example"
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the price table {path}: {error.strerror}", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the price table {path} is not TOML: {error}", hint) from error
    if named := sorted({"origin", "sha256"} & set(values)):
        raise UserError(f"price table {path}: unknown key {named[0]}", hint)
    try:
        table = PriceTable.model_validate(values)
    except ValidationError as error:
        raise UserError(f"price table {path}: {'; '.join(describe(error, PriceTable))}", hint) from None
    return table.model_copy(update={"origin": path.name, "sha256": hashlib.sha256(data).hexdigest()})


def price(table: PriceTable, machine: Machine, speeds: Sequence[tuple[Timed, int, float]]) -> PriceRecord:
    """Money and energy per million tokens at each of `speeds`: what was timed, its batch, tokens per second."""
    return PriceRecord(
        table=table.origin,
        table_sha256=table.sha256,
        machine=machine.name,
        currency=table.currency,
        price_per_hour=machine.price_per_hour,
        watts=machine.watts,
        price_per_kwh=table.price_per_kwh,
        formula=FORMULA,
        tokens=[_token_price(table, machine, what, batch, rate) for what, batch, rate in speeds],
    )


def _token_price(table: PriceTable, machine: Machine, what: Timed, batch: int, rate: float) -> TokenPrice:
    hours = 1e6 / rate / 3600
    energy = hours * machine.watts / 1000
    return TokenPrice(
        what=what,
        batch=batch,
        tokens_per_second=rate,
        money_per_million=hours * machine.price_per_hour,
        kwh_per_million=energy,
        energy_money_per_million=None if table.price_per_kwh is None else energy * table.price_per_kwh,
    )
