"""JSON documents from outside: manifests, records, ledger entries. Strict in what is read, readable in what is written."""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ns.core.digest import digest
from ns.core.errors import DataError
from ns.storage import Store


class Document(BaseModel):
    """A frozen JSON object with known fields, kept as one file in a store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, folder: Store, key: str) -> Self:
        """Raises DataError naming the file, the field and the value, StoreError if the file cannot be read."""
        return cls.parse(folder.get(key), f"{folder.uri}/{key}")

    @classmethod
    def parse(cls, data: bytes, place: str) -> Self:
        return cls.check(parse_object(data, place), place)

    @classmethod
    def check(cls, fields: Mapping[str, Any], place: str) -> Self:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "document"
            raise DataError(f"{place}: {field}: {first['msg']} (got {first['input']!r:.80})") from error

    def write(self, folder: Store, key: str) -> None:
        folder.put(key, pretty(self.model_dump(mode="json")))


class Identified(Document):
    """A document with an identity, which is written beside its fields and checked when it is read."""

    def identity(self) -> Any:
        """The JSON value that the digest is taken of: what the document says, without names and places."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        return digest(self.identity())

    @classmethod
    def check(cls, fields: Mapping[str, Any], place: str) -> Self:
        own = dict(fields)
        recorded = own.pop("digest", None)
        document = super().check(own, place)
        if recorded != document.digest:
            raise DataError(
                f"{place}: digest: {recorded!r} is not that of the content, {document.digest!r}: "
                "the file was edited or damaged; make it again"
            )
        return document

    def write(self, folder: Store, key: str) -> None:
        folder.put(key, pretty({**self.model_dump(mode="json"), "digest": self.digest}))


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """A JSON object. Raises DataError naming the place."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, got {type(value).__name__}")
    return value


def pretty(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
