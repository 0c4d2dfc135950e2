"""/v1/workers: who is there to take jobs, and taking one of them out of service."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.answers import documented
from api.auth import Admin, Reader
from api.deps import Given
from api.views import ListView, WorkerView
from jobs import workers
from jobs.errors import WorkerNotFound

router = APIRouter(prefix="/v1/workers", tags=["workers"], responses=documented(401, 403, 413, 429, 503))


@router.get("")
def list_workers(given: Given, caller: Reader) -> ListView[WorkerView]:
    """By name. A worker that is away stays listed for a week. Whose job it trains is shown to administrators."""
    found = [WorkerView.of(seen, caller.sees is None) for seen in workers.list_workers(given.database, given.settings)]
    first, last = (found[0].name, found[-1].name) if found else (None, None)
    return ListView[WorkerView](data=found, has_more=False, first_id=first, last_id=last)


@router.post("/{name}/drain", responses=documented(400, 404))
def drain_worker(
    given: Given,
    _: Admin,
    name: str,
    stop_job: Annotated[bool, Query(description="its job checkpoints and is queued again, for another worker")] = False,
) -> WorkerView:
    """It takes no new job from now on; the one that it trains goes on, unless it is to stop. Twice changes nothing."""
    workers.drain(given.database, name, stop_job)
    return _view(given, name)


@router.post("/{name}/undrain", responses=documented(404))
def undrain_worker(given: Given, _: Admin, name: str) -> WorkerView:
    """It takes jobs again."""
    workers.undrain(given.database, name)
    return _view(given, name)


def _view(given: Given, name: str) -> WorkerView:
    for seen in workers.list_workers(given.database, given.settings):
        if seen.worker.name == name:
            return WorkerView.of(seen, True)
    raise WorkerNotFound(name)
