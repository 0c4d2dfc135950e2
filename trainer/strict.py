"""What every part of a spec is: closed, unchangeable, and clear about what is wrong. Imports no torch."""

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    # No infinity: a spec travels as JSON, which has none.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def refuse(field: str, message: str) -> PydanticCustomError:
    """An error about a combination of fields, to be raised in a validator; `field` is the one to change."""
    return PydanticCustomError("refused", "{message}", {"field": field, "message": message})
