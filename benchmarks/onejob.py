"""One job of a stack, waited for."""

import time

import httpx

_PATIENCE_SECONDS = 1800


def until_succeeded(client: httpx.Client, job: str) -> None:
    """Raises SystemExit where the job ends otherwise, or takes half an hour."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while (found := client.get(f"/v1/jobs/{job}").raise_for_status().json())["state"] != "succeeded":
        if found["state"] in ("failed", "cancelled"):
            raise SystemExit(f"the job {found['state']}: {found['error']}")
        if time.monotonic() > end:
            raise SystemExit(f"the job is {found['state']} after {_PATIENCE_SECONDS} s")
        time.sleep(2)  # who looks takes the machine's time too
