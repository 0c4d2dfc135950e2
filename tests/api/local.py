"""Clients of an API in this process: from this machine, or with a key."""

from collections.abc import Sequence

from fastapi.testclient import TestClient

from api.main import create_app
from jobs import keys
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.settings import Settings

NONE = Quotas()


def local_client(settings: Settings) -> TestClient:
    """As from this machine."""
    return TestClient(
        create_app(settings),
        base_url="http://127.0.0.1:8000",
        client=("127.0.0.1", 50000),
        raise_server_exceptions=False,
    )


class Office:
    """An installation with API keys, and its clients, who come from elsewhere."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings, self.database = settings.model_copy(update={"auth": "on"}), database
        self.app = create_app(self.settings)

    def __enter__(self) -> "Office":
        return self

    def __exit__(self, *_: object) -> None:
        self.app.state.services.database.close()

    def client(self, *scopes: Scope, quotas: Quotas = NONE) -> TestClient:
        """Of a new key."""
        return self.with_key(self.key(scopes or [Scope.WRITE], quotas)[1])

    def key(self, scopes: Sequence[Scope] = (Scope.WRITE,), quotas: Quotas = NONE) -> tuple[str, str]:
        """(its id, the key)"""
        row, key = keys.create(self.database, "somebody", scopes, quotas)
        return row.id, key

    def with_key(self, key: str | None) -> TestClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return TestClient(self.app, base_url="http://service", headers=headers, raise_server_exceptions=False)
