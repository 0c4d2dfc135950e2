"""A service with OpenAI's client of it, for tests of what that client drives."""

from typing import Any

import openai
import pytest

from jobs.database import Database
from tests.api.protocol import Served, upload

SMALL = {"name": "galore", "rank": 8}


class Room:
    """A service, its database, and OpenAI's client of it."""

    def __init__(self, service: Served, database: Database) -> None:
        self.service, self.database = service, database
        self.settings, self.client = service.settings, service.client()

    @property
    def jobs(self) -> Any:
        return self.client.fine_tuning.jobs

    def upload(self, **changes: Any) -> str:
        return upload(self.database, self.settings, **changes)

    def create(self, extra: dict[str, Any] | None = None, **given: Any) -> Any:
        given = {"model": "llama-tiny", "training_file": given.pop("file", None) or self.upload()} | given
        return self.jobs.create(**given, extra_body={"optimizer": SMALL} if extra is None else extra)

    def refusal(self, kind: type[openai.APIStatusError], **given: Any) -> openai.APIStatusError:
        """The error of a create, which was asked once."""
        before = len(self.service.asked)
        with pytest.raises(kind) as caught:
            self.create(**given)
        assert len(self.service.asked) == before + 1
        assert caught.value.response.headers["x-should-retry"] == "false"
        return caught.value
