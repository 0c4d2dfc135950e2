"""Events as lines for a person: what `python -m trainer run` prints, and so what ends up in log.txt. No torch."""

import json
import logging
import time

from trainer import events
from trainer.logs import Form

log = logging.getLogger("stiefel.trainer")

# Steps come fast; a line this often is enough for a person and keeps the log small.
_SECONDS_BETWEEN_STEPS = 5.0


class Console:
    """Tells each event as it comes, steps only now and then: printed for a person, or logged for a program."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._last_step_line = 0.0
        self._steps = 0

    def show(self, event: events.Event) -> None:
        if isinstance(event, events.Started):
            self._steps = event.steps
        if isinstance(event, events.Step):
            if time.monotonic() < self._last_step_line + _SECONDS_BETWEEN_STEPS:
                return
            self._last_step_line = time.monotonic()
        words = self._words(event)
        if self._form == "json":
            # By way of JSON, which has no infinities.
            log.info(words, extra={"event": json.loads(event.model_dump_json())})
        else:
            print(f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {words}", flush=True)

    def _words(self, event: events.Event) -> str:
        match event:
            case events.Preparing():
                return event.what + (f": {event.done:,} tokens" if event.done is not None else "")
            case events.Prepared():
                return (
                    f"{event.examples:,} examples of {event.tokens:,} tokens, {event.trained_tokens:,} of them learnt; "
                    f"{event.held_out:,} held out, {event.left_out:,} left out, {event.truncated:,} truncated"
                )
            case events.Sampled():
                return f"step {event.step}: after {event.prompt[-60:]!r} it says {event.text[:200]!r}"
            case events.Started():
                return (
                    f"training from step {event.step} to {event.steps} on {event.processes} × {event.device}: "
                    f"{event.parameters:,} parameters, {event.trained_parameters:,} trained, "
                    f"optimizer state {event.optimizer_state_bytes:,} bytes"
                )
            case events.Step():
                return (
                    f"step {event.step}/{self._steps}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}  "
                    f"{event.tokens_per_second:,.0f} tokens/s"
                )
            case events.Switched():
                kept = "unknown" if event.energy_kept is None else f"{event.energy_kept:.3f}"
                return f"step {event.step}: new subspaces in {event.seconds:.2f} s, energy kept {kept}"
            case events.Evaluated():
                figures = {"accuracy": event.accuracy} if event.accuracy is not None else {}
                more = "".join(f", {name} {value:.3f}" for name, value in (figures | event.metrics).items())
                return f"step {event.step}: held-out loss {event.loss:.4f}, perplexity {event.perplexity:.2f}{more}"
            case events.Checkpointed():
                return f"step {event.step}: checkpoint {event.path} ({event.bytes:,} bytes, {event.seconds:.2f} s)"
            case events.Spiked():
                return (
                    f"step {event.step}: loss {event.loss:.4f} is {event.deviations:.1f} standard deviations above the "
                    f"usual {event.usual:.4f}"
                )
            case events.RolledBack():
                return f"{event.reason}; going back to step {event.step}, at {event.rate_scale:.3g} × the learning rate"
            case events.Stopped():
                return f"step {event.step}: stopped on request; without the stop file, run again to go on"
            case events.Finished():
                return f"step {event.step}: finished after {event.seconds:.1f} s"
            case events.Failed():
                return f"step {event.step}: failed on rank {event.rank}: {event.reason}: {event.message}"
