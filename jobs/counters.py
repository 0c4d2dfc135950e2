"""Totals and histograms that are kept in the database, so that they survive every process."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from jobs.database import Database
from jobs.tables import Counter

SUM = "sum"


@dataclass(frozen=True)
class Histogram:
    """Upper bounds in seconds; the last bucket is open."""

    name: str
    bounds: tuple[float, ...]

    def labels(self) -> list[str]:
        return [*(f"{bound:g}" for bound in self.bounds), "+Inf"]

    def label_of(self, value: float) -> str:
        return next((f"{bound:g}" for bound in self.bounds if value <= bound), "+Inf")


QUEUE_WAIT = Histogram("queue_wait_seconds", (1, 5, 15, 60, 300, 900, 3600, 14400, 86400))
DURATION = Histogram("job_duration_seconds", (60, 300, 900, 3600, 14400, 86400, 259200, 604800))


def add(database: Database, session: Session, name: str, label: str, amount: float) -> None:
    """Add to a total, whoever else does so at the same moment."""
    statement = database.insert(Counter).values(name=name, label=label, value=amount)
    total = {"value": Counter.value + statement.excluded.value}
    session.execute(statement.on_conflict_do_update(index_elements=["name", "label"], set_=total))


def observe(database: Database, session: Session, histogram: Histogram, value: float) -> None:
    add(database, session, histogram.name, histogram.label_of(value), 1)
    add(database, session, histogram.name, SUM, value)
