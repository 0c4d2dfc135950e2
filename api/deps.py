"""What a route may ask for: the services, and who is calling."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api.generator import Generator
from api.limits import Rates
from jobs.database import Database
from jobs.filecheck import Checker
from jobs.queue import Doorbell
from jobs.settings import Settings


@dataclass(frozen=True)
class Services:
    """Made once by create_app, handed to every request."""

    settings: Settings
    database: Database
    doorbell: Doorbell
    rates: Rates
    generator: Generator
    checker: Checker


async def _services(request: Request) -> Services:
    # Not a plain function: each of those goes through a thread of its own.
    services: Services = request.app.state.services
    return services


Given = Annotated[Services, Depends(_services)]
