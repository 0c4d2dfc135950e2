"""Which model a name means to somebody who wants to hear it, as the generator is told."""

from jobs import access, models
from jobs.database import Database
from jobs.errors import ModelNotFound
from jobs.keys import Caller
from jobs.settings import Settings
from trainer.generation.protocol import Checkpoint, Directory, Hub
from trainer.modelconfig import DirectoryModel, PresetModel


def place_of(database: Database, settings: Settings, caller: Caller, name: str) -> Directory | Checkpoint | Hub:
    """Raises ModelNotFound, and Forbidden for a directory that the rules of access keep closed."""
    found = models.find(database, settings, caller, name)
    if isinstance(found, models.TunedModel):
        if found.job.task == "classify":
            raise ModelNotFound(name, "it classifies and does not speak; export it, and ask it for labels")
        return Checkpoint(run=found.job.run_directory, step=found.step)
    if isinstance(found.spec, PresetModel) or found.spec.weights == "random":
        raise ModelNotFound(name, "its weights are random until a job has trained it")
    if isinstance(found.spec, DirectoryModel):
        if not found.granted:
            access.refuse_directory(settings, "model", found.spec.path)
        return Directory(path=found.spec.path)
    return Hub(name=found.spec.hub, revision=found.spec.revision)
