"""Names of classes: one identity however they are written, one order, and which class of a list a label means."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from ns.core.errors import DataError

ClassLabel = str | int
"""A class name, or a class index if the source has no names."""
NUMBER = re.compile(r"[0-9]{1,18}")
"""A class index, or a name that is ordered by its value; Python refuses to read numbers of thousands of digits."""
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "holdout"))
"""Folders of these names alone are the splits of a collection, and not its classes."""


def normalize_name(text: str) -> str:
    """A name as it is compared and kept: composed (NFC; macOS writes names decomposed), without blanks or a BOM at its ends."""
    return unicodedata.normalize("NFC", text).strip("\ufeff \t\r\n\v\f\xa0")


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Numbers by their value, so that the class 10 has the index 10 if all of 0 to 10 are there; then all other names as text."""
    return sorted(names, key=lambda name: (0, int(name), name) if NUMBER.fullmatch(name) else (1, 0, name))


def find_case_variants(names: Collection[str]) -> list[str]:
    """Names that differ from another one in upper and lower case alone."""
    first_spelling: dict[str, str] = {}
    variants: list[str] = []
    for name in sorted(names):
        first = first_spelling.setdefault(name.casefold(), name)
        if first != name:
            variants += [first, name]
    return variants


def match_names(names: Iterable[str], classes: Sequence[str]) -> tuple[dict[ClassLabel, int], list[str]]:
    """Name → index of the class that it means, and the names that mean none, in order.

    A name that is no class means the class that differs from it in upper and lower case alone, if there is exactly one.
    """
    by_name = {normalize_name(class_name): class_id for class_id, class_name in enumerate(classes)}
    folded: dict[str, list[int]] = {}
    for name, class_id in by_name.items():
        folded.setdefault(name.casefold(), []).append(class_id)
    matched: dict[ClassLabel, int] = {}
    unknown: list[str] = []
    for name in sorted(names):
        similar = folded.get(name.casefold(), [])
        if name in by_name:
            matched[name] = by_name[name]
        elif len(similar) == 1:
            matched[name] = similar[0]
        else:
            unknown.append(name)
    return matched, unknown


def match_indices(source: str, indices: Collection[int], classes: Sequence[str]) -> dict[ClassLabel, int]:
    """Class index of a source → index in `classes`.

    An index is a position in `classes`. If these are named by numbers, as 1 to 10, it may also be a name; the reading that fits all
    indices counts. Raises DataError if none fits, or if both fit and differ.
    """
    by_position: dict[ClassLabel, int] | None = None
    if max(indices, default=0) < len(classes):
        by_position = {index: index for index in indices}
    numbers = {int(name): class_id for class_id, name in enumerate(classes) if NUMBER.fullmatch(name)}
    by_number: dict[ClassLabel, int] | None = None
    if len(numbers) == len(classes) and all(index in numbers for index in indices):
        by_number = {index: numbers[index] for index in indices}
    if by_position is None and by_number is None:
        raise DataError(
            f"{source}: class index {max(indices)}: there are {len(classes)} labeled classes {shorten_names(classes)}"
        )
    if by_position is not None and by_number is not None and by_position != by_number:
        index = next(index for index in sorted(indices) if by_position[index] != by_number[index])
        raise DataError(
            f"{source}: class index {index}: may be the class {classes[index]!r}, at position {index} from 0 on, or the class "
            f"'{index}'; give labels as names that are no numbers, or number the labeled classes from 0 on"
        )
    return by_number if by_position is None and by_number is not None else by_position or {}


def shorten_names(names: Sequence[str], shown: int = 10) -> str:
    """`(cat, dog, …)`"""
    return f"({', '.join(names[:shown])}{', …' if len(names) > shown else ''})"
