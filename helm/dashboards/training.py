"""Stiefel: training. Each job's curves, speed and memory."""

from helm.dashboards.panels import Dashboard, Panel, Row, Variable

_CHOSEN = 'method=~"$method", job_id=~"$job"'
_OF_JOB = "{{method}} {{job_id}}"


def _each(metric: str) -> dict[str, str]:
    """A gauge of each chosen job. Every exporter has the same value of it."""
    return {_OF_JOB: f"max by (method, job_id) ({metric}{{{_CHOSEN}}})"}


def _rate(metric: str) -> str:
    return f"max by (method, job_id) (rate({metric}{{{_CHOSEN}}}[$__rate_interval]))"


TRAINING = Dashboard(
    uid="stiefel-training",
    title="Stiefel: training",
    description="Running jobs, and those that ended less than ten minutes ago: curves, speed, memory.",
    variables=(
        Variable("method", "Method", "label_values(stiefel_job_info, method)"),
        Variable("job", "Job", 'label_values(stiefel_job_info{method=~"$method"}, job_id)'),
    ),
    rows=(
        Row(
            "Jobs",
            (
                Panel(
                    "Jobs",
                    "none",
                    {"": f"max by (job_id, name, method, model, state) (stiefel_job_info{{{_CHOSEN}}})"},
                    "What each job is. `stiefel show JOB` has every setting.",
                    kind="table",
                    width=10,
                    instant=True,
                    hidden=("Time", "Value"),
                ),
                Panel(
                    "Progress",
                    "percentunit",
                    _each("stiefel_job_progress_ratio"),
                    "Optimizer steps done, of all steps.",
                    kind="bargauge",
                    width=7,
                    instant=True,
                    low=0,
                    high=1,
                    steps=(("blue", None), ("green", 1)),
                ),
                Panel(
                    "Time left",
                    "s",
                    {
                        _OF_JOB: f"(1 - max by (method, job_id) (stiefel_job_progress_ratio{{{_CHOSEN}}}))"
                        f" / (max by (method, job_id) (deriv(stiefel_job_progress_ratio{{{_CHOSEN}}}[10m])) > 0)"
                    },
                    "At the pace of the last ten minutes, evaluations and checkpoints included.",
                    kind="stat",
                    width=7,
                    instant=True,
                ),
            ),
        ),
        Row(
            "Loss",
            (
                Panel("Training loss", "none", _each("stiefel_job_train_loss"), "Mean over the last global batch."),
                Panel(
                    "Held-out loss",
                    "none",
                    _each("stiefel_job_evaluation_loss"),
                    "On sequences that are not trained on, as of the last evaluation.",
                ),
                Panel(
                    "Training loss by method",
                    "none",
                    {"{{method}}": 'max by (method) (method:stiefel_job_train_loss:avg{method=~"$method"})'},
                    "Mean over the running jobs of a method. Jobs with other models or data do not compare.",
                ),
            ),
        ),
        Row(
            "Optimisation",
            (
                Panel(
                    "Gradient norm",
                    "none",
                    _each("stiefel_job_gradient_norm"),
                    "Of the trained parameters, before clipping; logarithmic.",
                    logarithmic=True,
                ),
                Panel("Learning rate", "sci", _each("stiefel_job_learning_rate"), "Of the last step."),
                Panel(
                    "Projection's share of the time",
                    "percentunit",
                    {
                        _OF_JOB: _rate("stiefel_job_projection_seconds_total")
                        + " / "
                        + _rate("stiefel_job_step_seconds_total")
                    },
                    "Of the time spent on steps, what went into choosing subspaces. A longer period makes it smaller.",
                    low=0,
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Panel(
                    "Tokens per second",
                    "short",
                    _each("stiefel_job_tokens_per_second"),
                    "Of the last step, over all ranks.",
                    low=0,
                ),
                Panel(
                    "Model FLOPs utilisation",
                    "percentunit",
                    _each("stiefel_job_mfu_ratio"),
                    "In bf16; nothing on hardware whose peak is not known, CPUs among them.",
                    low=0,
                    high=1,
                ),
                Panel(
                    "Steps per minute",
                    "none",
                    {_OF_JOB: f"max by (method, job_id) (deriv(stiefel_job_step{{{_CHOSEN}}}[10m]) * 60)"},
                    "Over the last ten minutes, evaluations and checkpoints included. Below zero: an attempt has gone"
                    " back to a checkpoint.",
                ),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "Peak of an accelerator",
                    "bytes",
                    _each("stiefel_job_peak_device_memory_bytes"),
                    "Largest allocation of all ranks; nothing without accelerators.",
                    low=0,
                ),
                Panel(
                    "Peak of a rank on the host",
                    "bytes",
                    _each("stiefel_job_peak_host_memory_bytes"),
                    "Largest resident size of all ranks.",
                    low=0,
                ),
                Panel(
                    "Optimizer state",
                    "bytes",
                    _each("stiefel_job_optimizer_state_bytes"),
                    "Moments of all ranks together: what low-rank methods save.",
                    low=0,
                ),
            ),
        ),
    ),
)
