"""Stiefel: fleet. Queue, workers, failures, API, disks."""

from helm.dashboards.panels import Dashboard, Panel, Row

_BAD = (("green", None), ("red", 1))
_GOOD = (("red", None), ("green", 1))


def _largest(metric: str) -> str:
    """Every exporter has the same value."""
    return f"max({metric})"


def _number(
    title: str, expression: str, description: str, unit: str = "short", steps: tuple[tuple[str, float | None], ...] = ()
) -> Panel:
    """A number at the top, with its recent past behind it."""
    return Panel(
        title, unit, {"": expression}, description, kind="stat", width=4, height=4, steps=steps or (("blue", None),)
    )


FLEET = Dashboard(
    uid="stiefel-fleet",
    title="Stiefel: fleet",
    description="Whether the service does its work: queue, workers, failures, API, disks; then docs/alerts.md.",
    rows=(
        Row(
            "Now",
            (
                _number(
                    "Database",
                    _largest("stiefel_database_up"),
                    "1: it answers an exporter. 0: everything else of the database is missing.",
                    steps=_GOOD,
                ),
                _number(
                    "Alerts",
                    'count(ALERTS{alertname=~"Stiefel.*", alertstate="firing"}) or vector(0)',
                    "Of Stiefel's that fire. docs/alerts.md has a heading for each.",
                    steps=_BAD,
                ),
                _number("Workers up", _largest("stiefel_workers_up"), "Heard of lately.", steps=_GOOD),
                _number("Running", 'sum(max by (method) (stiefel_jobs{state="running"})) or vector(0)', "Jobs."),
                _number("Queued", _largest("stiefel_queue_depth"), "Jobs that wait for a worker."),
                _number("Tokens per second", "sum(fleet:stiefel_job_tokens:rate5m)", "Of all jobs, over 5 minutes."),
            ),
        ),
        Row(
            "Queue",
            (
                Panel(
                    "Jobs by state",
                    "short",
                    {"{{state}}": "sum by (state) (max by (state, method) (stiefel_jobs))"},
                    "All that are in the database, ended ones too.",
                ),
                Panel(
                    "Waiting jobs",
                    "short",
                    {
                        "queued": _largest("stiefel_queue_depth"),
                        "startable": _largest("stiefel_jobs_startable"),
                        "unschedulable": _largest("stiefel_jobs_unschedulable"),
                    },
                    "Startable: an idle worker could take them now, and should. Unschedulable: no worker that is up"
                    " ever could.",
                    low=0,
                ),
                Panel(
                    "Age of the oldest",
                    "s",
                    {"oldest": _largest("stiefel_queue_oldest_seconds")},
                    "How long the job has waited that has waited longest.",
                    low=0,
                ),
                Panel(
                    "Wait, last 5 minutes",
                    "s",
                    {
                        "half": "max(fleet:stiefel_queue_wait_seconds:p50_5m)",
                        "19 of 20": "max(fleet:stiefel_queue_wait_seconds:p95_5m)",
                    },
                    "From queued to claimed, of the jobs that were claimed in 5 minutes; nothing where none was.",
                    low=0,
                ),
                Panel(
                    "Wait, last hour",
                    "s",
                    {
                        "half": "max(fleet:stiefel_queue_wait_seconds:p50_1h)",
                        "19 of 20": "max(fleet:stiefel_queue_wait_seconds:p95_1h)",
                    },
                    "The same over an hour.",
                    low=0,
                ),
                Panel(
                    "Duration of jobs",
                    "s",
                    {"half": "max(fleet:stiefel_job_duration_seconds:p50_1d)"},
                    "From the first claim to the end, of the jobs that ended within a day.",
                    low=0,
                ),
            ),
        ),
        Row(
            "Workers",
            (
                Panel(
                    "Device slots",
                    "short",
                    {"{{device}} {{state}}": "max by (device, state) (stiefel_device_slots)"},
                    "GPUs, and CPU slots, of the workers that are up.",
                    stacked=True,
                    low=0,
                ),
                Panel(
                    "Busy slots",
                    "percentunit",
                    {"{{device}}": "max by (device) (device:stiefel_device_slots:busy_ratio)"},
                    "Busy ones, of all of a kind. A worker is busy with all its devices or with none.",
                    low=0,
                    high=1,
                ),
                Panel(
                    "Workers",
                    "short",
                    {
                        "up": _largest("stiefel_workers_up"),
                        "busy": _largest("stiefel_workers_busy"),
                        "drained": _largest("stiefel_workers_drained"),
                    },
                    "Drained ones take no new job.",
                    low=0,
                ),
                Panel(
                    "Tokens per second by method",
                    "short",
                    {"{{method}}": "sum by (method) (method:stiefel_job_tokens:rate5m)"},
                    "Over 5 minutes, repeated steps included.",
                    stacked=True,
                    low=0,
                ),
                Panel(
                    "Projection's share by method",
                    "percentunit",
                    {"{{method}}": "max by (method) (method:stiefel_job_step_seconds:projection_ratio5m)"},
                    "Of the time spent on steps, what went into choosing subspaces.",
                    low=0,
                ),
                Panel(
                    "Free disk",
                    "percentunit",
                    {
                        "{{worker}}": "max by (worker) (stiefel_worker_storage_free_bytes)"
                        " / max by (worker) (stiefel_worker_storage_size_bytes)"
                    },
                    "Of the file system with a worker's run directories. Workers may have one in common.",
                    low=0,
                    high=1,
                    steps=(("red", None), ("yellow", 0.05), ("green", 0.2)),
                ),
            ),
        ),
        Row(
            "Outcomes",
            (
                Panel(
                    "Failed attempts in an hour",
                    "short",
                    {"{{reason}}": "max by (reason) (reason:stiefel_attempt_failures:increase1h) > 0.5"},
                    "By class of failure; docs/guarantees.md says which are tried again.",
                    low=0,
                ),
                Panel(
                    "Jobs that ended in an hour",
                    "short",
                    {"{{state}}": "max by (state) (state:stiefel_jobs_finished:increase1h)"},
                    "By how they ended.",
                    low=0,
                ),
                Panel(
                    "Lost workers in an hour",
                    "short",
                    {"leases expired": "max(fleet:stiefel_leases_expired:increase1h)"},
                    "Whose lease ran out in the middle of a job. The job is queued again.",
                    low=0,
                    steps=(("green", None), ("red", 1)),
                ),
            ),
        ),
        Row(
            "API",
            (
                Panel(
                    "Requests",
                    "reqps",
                    {"{{method}} {{route}}": "sum by (method, route) (route:stiefel_http_requests:rate5m)"},
                    "Of all API processes, by route, over 5 minutes.",
                    low=0,
                ),
                Panel(
                    "Slowest of twenty",
                    "s",
                    {"{{method}} {{route}}": "max by (method, route) (route:stiefel_http_request_seconds:p95_5m)"},
                    "95 of 100 answers take less. /readyz waits up to 2 s for a silent broker.",
                    low=0,
                    steps=(("green", None), ("red", 1)),
                ),
                Panel(
                    "Errors of its own",
                    "percentunit",
                    {"users' requests": "max(fleet:stiefel_http_requests:error_ratio5m)"},
                    "Share of the answers that are 5xx, those to probes left out.",
                    low=0,
                    steps=(("green", None), ("red", 0.05)),
                ),
            ),
        ),
        Row(
            "Upkeep",
            (
                Panel(
                    "Since the last good round",
                    "s",
                    {"reaper": "time() - max(stiefel_upkeep_last_success_timestamp_seconds)"},
                    "Since database and broker last answered the reaper. It looks every few seconds.",
                    low=0,
                    steps=(("green", None), ("red", 120)),
                ),
                Panel(
                    "Announcements waiting",
                    "short",
                    {"due": _largest("stiefel_announcements_waiting")},
                    "Due and not published: the broker is away, or it was a crowd.",
                    low=0,
                ),
                Panel(
                    "Versions",
                    "short",
                    {"{{job}} {{version}}": "count by (job, version) (stiefel_build_info)"},
                    "How many processes answer with which version: two of a kind while an upgrade goes on.",
                    low=0,
                ),
            ),
        ),
    ),
)
