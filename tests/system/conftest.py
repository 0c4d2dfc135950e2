"""What files that break a service have in common. Each has a module fixture `service`, and its job in JOB."""

import json
from collections.abc import Iterator

import pytest

from tests.system.service import Service
from tests.system.watch import Watch

Curve = list[tuple[int, float]]
# By specification: the curve is the same on every service.
_CURVES: dict[str, Curve] = {}


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, service: Service) -> Curve:
    """Losses of JOB, left alone."""
    job = request.module.JOB
    key = json.dumps(job, sort_keys=True)
    if key not in _CURVES:
        job_id = service.submit(**job)
        service.wait(job_id, "succeeded")
        _CURVES[key] = service.curve(job_id)
    return _CURVES[key]


@pytest.fixture
def paused(request: pytest.FixtureRequest, service: Service) -> str:
    """A job like JOB that has two checkpoints or more."""
    job = request.module.JOB
    job_id = service.submit(**job)
    service.wait_for_step(job_id, 2 * job["checkpoints"]["every"] + 5)
    service.http.post(f"/v1/jobs/{job_id}/pause")
    service.wait(job_id, "paused")
    return job_id


@pytest.fixture
def watch(service: Service) -> Iterator[Watch]:
    """Sees to it that there was always one trainer at most."""
    with Watch(service.stack.home / "runs") as started:
        yield started
    assert started.busy > 20
    assert started.overlaps == []
