"""What /v1/files answers with: OpenAI's file object, and what we know of its contents besides."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from jobs.tables import StoredFile


class FileView(BaseModel):
    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = Field(description="uploaded, processed, error")
    status_details: str | None = Field(description="with error: the first lines that are wrong, and how many more")
    expires_at: int | None
    sha256: str
    columns: dict[str, Any] = Field(description="what its fields are called, where that is not their own name")
    format: str | None = Field(description="chat, prompt, text, labelled; null until it is known")
    examples: int | None
    statistics: dict[str, Any] = Field(
        description="characters in all and per example; messages by role; labels; tokens, with the name of the "
        "tokeniser that has counted them: the installation's, or that of the latest job"
    )

    @staticmethod
    def of(stored: StoredFile) -> "FileView":
        return FileView(
            id=stored.id,
            bytes=stored.bytes,
            created_at=int(stored.created_at),
            filename=stored.filename,
            purpose=stored.purpose,
            status=stored.status,
            status_details=stored.status_details,
            expires_at=None if stored.expires_at is None else int(stored.expires_at),
            sha256=stored.sha256,
            columns=stored.columns,
            format=stored.format,
            examples=stored.examples,
            statistics=stored.statistics,
        )


class Deleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True
