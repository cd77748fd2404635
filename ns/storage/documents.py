"""JSON documents in stores: manifests, records, ledger entries. They are validated when read, and indented when written."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ns.core import log
from ns.core.digest import digest_json
from ns.core.errors import DataError, StoreError
from ns.storage import Store
from ns.storage.base import KEY_BYTES, key_parts

SCHEMA_VERSION = 2
"""Part of every digest. Raise it when a default value, or what a value means, changes: digests leave defaults out."""

PART_BYTES = 255
"""As file systems have it."""


def _check_key(key: str) -> str:
    if len(key.encode()) > KEY_BYTES or any(len(part.encode()) > PART_BYTES for part in key.split("/")):
        raise ValueError(f"not a key: at most {PART_BYTES} bytes per part, and {KEY_BYTES} in all")
    try:
        key_parts(key)
    except StoreError as error:
        raise ValueError(str(error)) from error
    return key


# A manifest may come from strangers: what it names is a file beside it, or below its root, and nothing else.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
"""Name of a file in the folder of its manifest."""
BlobKey = Annotated[str, AfterValidator(_check_key)]
"""Key of a file or a folder below a root."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def name_by_content(name: str, sha256: str) -> str:
    """`model.safetensors` → `model-0123456789abcdef.safetensors`: another content has another name, so that two attempts at one piece
    of work never mix their files, whichever manifest comes first."""
    stem, dot, extension = name.partition(".")
    return f"{stem}-{sha256[:16]}{dot}{extension}"


def dump_hashed_fields(model: BaseModel, exclude: Any = None) -> dict[str, Any]:
    """The JSON value that the digest of a model is taken of: the fields that differ from their defaults, and the schema's version.

    `exclude` is pydantic's: the fields that are no part of the identity.
    """
    return {"schema": SCHEMA_VERSION, **model.model_dump(mode="json", exclude_defaults=True, exclude=exclude)}


class JsonDocument(BaseModel):
    """A frozen JSON object, kept as one file in a store. Fields that a newer version has added are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    filename: ClassVar[str]
    """The file of a document that has a folder of its own."""

    @classmethod
    def load(cls, store: Store) -> Self:
        """Reads `filename` in the folder `store`; raises what `load_file` raises."""
        return cls.load_file(store, cls.filename)

    def save(self, store: Store) -> None:
        self.save_file(store, self.filename)

    @classmethod
    def load_file(cls, store: Store, key: str) -> Self:
        """Raises DataError naming the file, the field and the value, StoreError if the file cannot be read."""
        return cls.parse(store.get(key), f"{store.uri}/{key}")

    @classmethod
    def find_file(cls, store: Store, key: str) -> Self | None:
        """The document, or None if there is no such file, or nothing readable in it: then a warning names it."""
        return next(cls.iterate_files(store, [key] if store.exists(key) else []), None)

    @classmethod
    def iterate_files(cls, store: Store, keys: Iterable[str]) -> Iterator[Self]:
        """The documents under these keys. One that cannot be read is left out, with a warning: it must not hide the others."""
        for key in keys:
            try:
                document = cls.load_file(store, key)
            except DataError as error:
                log.get_logger().warning("passed over", file=f"{store.uri}/{key}", reason=str(error))
                continue
            yield document

    @classmethod
    def parse(cls, data: bytes, uri: str) -> Self:
        return cls.validate_fields(parse_json_object(data, uri), uri)

    @classmethod
    def validate_fields(cls, fields: Mapping[str, Any], uri: str) -> Self:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "document"
            raise DataError(f"{uri}: {field}: {first['msg']} (got {first['input']!r:.80})") from error

    def encode(self) -> bytes:
        """The bytes of the file."""
        return encode_json(self.model_dump(mode="json"))

    def commit(self, store: Store) -> Self:
        """Writes the document into the folder `store`, unless another attempt at the same work was first. Returns the one that is there."""
        if store.create(self.filename, self.encode()):
            return self
        first = type(self).find_file(store, self.filename)
        if first is None:
            # What cannot be read is not there.
            self.save(store)
        return first or self

    def save_file(self, store: Store, key: str) -> None:
        store.put(key, self.encode())


class HashedDocument(JsonDocument):
    """A document with a digest, which is written beside its fields and checked when it is read. It has known fields only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def hashed_fields(self) -> Any:
        """The JSON value that the digest is taken of: the content, without names and addresses."""
        return dump_hashed_fields(self)

    @property
    def digest(self) -> str:
        return digest_json(self.hashed_fields())

    @classmethod
    def validate_fields(cls, fields: Mapping[str, Any], uri: str) -> Self:
        content = dict(fields)
        recorded = content.pop("digest", None)
        document = super().validate_fields(content, uri)
        try:
            content_digest = document.digest
        except ValueError as error:
            # A number that is none, an infinite one, half a character.
            raise DataError(f"{uri}: holds a value that JSON has no spelling for ({error}); make it again") from error
        if recorded != content_digest:
            raise DataError(
                f"{uri}: digest: {recorded!r} is not that of the content, {content_digest!r}: "
                "the file was edited or damaged; make it again"
            )
        return document

    def encode(self) -> bytes:
        return encode_json({**self.model_dump(mode="json"), "digest": self.digest})


def decode_json(data: bytes) -> Any:
    """Decodes JSON. Raises ValueError for what is none, is nested too deeply, or holds half a character (`\\ud800`), which cannot be
    written again."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_json_object(data: bytes, uri: str) -> dict[str, Any]:
    """Decodes a JSON object. Raises DataError naming the URI."""
    try:
        value = decode_json(data)
    except ValueError as error:
        raise DataError(f"{uri}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{uri}: must be a JSON object, got {type(value).__name__}")
    return value


def encode_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
