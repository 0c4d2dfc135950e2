"""Requests that nobody would think of, made from the API's own description, on SQLite and on PostgreSQL.

STIEFEL_FUZZ_EXAMPLES sets how many of each route; a longer search than the usual one is worth a night.
"""

import os
import secrets
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis.strategies import booleans
from schemathesis import Case
from schemathesis.checks import CHECKS, not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api.main import create_app
from jobs import keys, submission, webhooks, workers
from jobs.database import Database
from jobs.keys import Quotas, Scope
from jobs.requests import JobRequest
from jobs.settings import Settings
from jobs.webhooks import EVENT_TYPES
from jobs.workers import Card
from tests.conftest import job_body

EXAMPLES = int(os.environ.get("STIEFEL_FUZZ_EXAMPLES", "30"))
# Which model a rank fits, say, is more than JSON Schema can tell: what it allows may be refused, with a 400.
MORE_THAN_A_SCHEMA = [positive_data_acceptance]
# Without a generator, whatever they ask for that is right is answered with 501.
SPEAKING = {"POST /v1/chat/completions", "POST /v1/completions"}


def test_no_request_finds_an_error_of_ours_or_an_answer_that_is_not_documented(
    settings: Settings, database: Database
) -> None:
    asked = settings.model_copy(update={"auth": "on", "requests_per_minute": 10**6, "failed_keys_per_minute": 10**6})
    _, key = keys.create(database, "fuzz", [Scope.ADMIN], Quotas())
    workers.seen(database, Card("w:0", "host", "0", ("0",), 1))
    app = create_app(asked)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.label for operation in operations} >= {"POST /v1/jobs", "POST /v1/workers/{name}/drain"}
    assert "not_a_server_error" in CHECKS.get_all_names()

    def prepare(case: Case) -> None:
        """Something that exists, or nothing behind the path would ever be reached."""
        if "job_id" in case.path_parameters:
            request = JobRequest.model_validate(job_body())
            case.path_parameters["job_id"] = submission.create(database, settings, request).id
        # Its test waits for a reaper, of which there is none here.
        if "webhook_endpoint_id" in case.path_parameters and not case.path.endswith("/test"):
            made = webhooks.create(database, asked, secrets.token_hex(4), "https://example.org/", "fuzz", EVENT_TYPES)
            case.path_parameters["webhook_endpoint_id"] = made.id
        if "name" in case.path_parameters:
            case.path_parameters["name"] = "w:0"

    statuses = {operation.label: _ask(operation, key, prepare) for operation in operations}
    app.state.services.database.close()
    # It has been in all the rooms.
    assert {200, 404} <= statuses["GET /v1/jobs/{job_id}"]
    assert {200, 404} <= statuses["POST /v1/jobs/{job_id}/cancel"]
    assert 400 in statuses["POST /v1/jobs"]
    assert {200, 404} <= statuses["POST /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret"]
    assert all(statuses[label] <= {400, 404, 501} for label in SPEAKING)


def _ask(operation: Any, key: str, prepare: Callable[[Case], None]) -> set[int]:
    """Statuses of the answers, each of which was as the description says."""
    statuses = set()

    @hypothesis_settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), real=booleans())
    def ask(case: Case, real: bool) -> None:
        if real:
            prepare(case)
        headers = {"Authorization": f"Bearer {key}"}
        excluded = [*MORE_THAN_A_SCHEMA, not_a_server_error] if operation.label in SPEAKING else MORE_THAN_A_SCHEMA
        statuses.add(case.call_and_validate(headers=headers, excluded_checks=excluded).status_code)

    ask()
    return statuses
