"""The model that is in memory, and the tasks that it answers. Belongs to one thread. No torch until it is needed."""

import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from trainer import errors
from trainer.exporting import MOST_BYTES, Export, ExportFailed, exported
from trainer.generation.protocol import Began, Checkpoint, Directory, Ended, Failed, Hub, Line, Piece, Refused, Task
from trainer.generation.turns import Turn
from trainer.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from trainer.generation.loaded import Loaded

log = logging.getLogger("stiefel.generator")


class Speaker:
    def __init__(self, device: Literal["any", "gpu", "cpu"], exports_bytes: int = MOST_BYTES) -> None:
        self._device, self._exports_bytes = device, exports_bytes
        self._place: Directory | Hub | None = None
        self._loaded: Loaded | None = None
        self._export: Export | None = None  # that it was loaded from
        self._used = time.monotonic()

    @property
    def holds(self) -> str | None:
        place = self._place
        return place.name if isinstance(place, Hub) else place.path if place else None

    def answer(self, task: Task, turn: Turn, say: Callable[[Line], None]) -> None:
        """Says all lines of the protocol, whatever happens."""
        # A process that nobody asks stays as small as a web server.
        from trainer.generation.loaded import Unanswerable

        try:
            self._answer(task, turn, say)
        except Unanswerable as error:
            say(Refused(message=str(error), param=error.param, code=error.code))
        except ExportFailed as error:
            log.error("a model cannot be exported: %s\n%s", error, error.tail)
            say(Failed(message=f"{error.name}: {error}"))
        except Exception as error:  # noqa: BLE001  # one request must not end the others
            leaf = errors.classify(error)
            log.exception("a task failed", exc_info=error)
            if isinstance(leaf, errors.OutOfMemoryError):
                self.forget()
            say(Failed(message=f"{leaf.name}: {leaf}"))
        self._used = time.monotonic()

    def forget_if_idle(self, seconds: float) -> None:
        if self._loaded is not None and time.monotonic() - self._used > seconds:
            log.info("nobody has asked %s for %g s: its memory is given back", self.holds, seconds)
            self.forget()

    def forget(self) -> None:
        self._place = self._loaded = None
        gc.collect()
        if self._export is not None:
            self._export.close()
            self._export = None
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answer(self, task: Task, turn: Turn, say: Callable[[Line], None]) -> None:
        from trainer.generation.generate import generate
        from trainer.generation.loaded import prompts_of

        loaded = self._model(task, turn)
        if loaded is None:
            log.info("the client has gone while its model was exported")
            return
        prompts = prompts_of(task, loaded)
        say(Began(prompt_tokens=sum(map(len, prompts))))
        until = time.monotonic() + task.seconds
        for index in range(len(prompts) * task.choices):
            sampling = task.sampling
            if sampling.seed is not None:
                # Else all choices would be the same.
                sampling = sampling.model_copy(update={"seed": sampling.seed + index})
            prompt = prompts[index // task.choices]
            give = partial(_give, say, index)
            continues = task.messages is None
            reason, tokens = generate(loaded, prompt, sampling, give, turn.gone, continues, until)
            if turn.gone.is_set():
                log.info("the client has gone after %d tokens", tokens)
                return
            say(Ended(index=index, finish_reason=reason, tokens=tokens))

    def _model(self, task: Task, turn: Turn) -> "Loaded | None":
        if not isinstance(task.model, Checkpoint):
            return self._at(task.model, None)
        run = RunDir(task.model.run)
        export = exported(run, task.model.step, turn.gone, self._exports_bytes)
        return None if export is None else self._at(Directory(path=str(export.path)), export)

    def _at(self, place: Directory | Hub, export: Export | None) -> "Loaded":
        from trainer.generation.loaded import load

        if self._loaded is None or self._place != place:
            # Before the next is loaded: there may be no room for two.
            self.forget()
            self._export = export
            began = time.monotonic()
            self._loaded, self._place = load(place, _torch_device(self._device)), place
            log.info("%s is loaded, in %.1f s", self.holds, time.monotonic() - began)
        elif export is not None:
            # It is held already.
            export.close()
        return self._loaded


def _give(say: Callable[[Line], None], index: int, text: str) -> None:
    say(Piece(index=index, text=text))


def _torch_device(wanted: str) -> "torch.device":
    import torch

    if wanted == "gpu" and not torch.cuda.is_available():
        raise errors.SpecError("--device: 'gpu' is asked for, and torch finds none here; use 'any' or 'cpu'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
