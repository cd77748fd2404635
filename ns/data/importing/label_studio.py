"""Label Studio, both ways: tasks with the picture, what a model predicts of it, and what people chose.

Its exports are JSON, JSON-MIN, CSV and TSV. The last three have a row for each annotation, and CSV and TSV the same columns as JSON-MIN.
"""

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from ns.core.errors import DataError
from ns.data.class_names import shorten_names
from ns.storage.documents import decode_json

KEY_FIELD = "key"
"""Field of a task's data with the key of its image, in the tasks that we write."""
CLASS_FIELD, IMAGE_FIELD = "class", "image"
"""Names of the control and of the object in the labeling interface that we write."""

TABLE_COLUMNS = {"annotation_id", "annotator", "lead_time"}
"""Columns by which a table is known for an export."""

UPLOADS = "/data/upload/"
UPLOAD_PREFIX_LENGTH = 9
ID_LENGTH = 40
"""Characters of a task's number in messages."""


class TaskLabel(NamedTuple):
    """The class of one task's image."""

    key: str
    """Key of the image; of tasks that we did not write, the path in its address."""
    path: str
    """Path of the image's file, from its address; empty for a picture that stands in the task itself."""
    class_name: str | None
    """None if no person chose a class and no model predicted one."""
    confidence: float
    """1 where a person chose."""
    annotated: bool
    """Whether a person chose."""


def parse_tasks(data: bytes, uri: str) -> list[dict[str, Any]]:
    """The tasks of an export in JSON or JSON-MIN. Raises DataError for what is no export."""
    try:
        tasks = decode_json(data)
    except ValueError as error:
        raise DataError(f"{uri}: not JSON: {error}; export the project as JSON again") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{uri}: must be a list of tasks, as Label Studio exports it in the form JSON")
    return tasks


def read_task_labels(tasks: Iterable[Mapping[str, Any]], uri: str) -> Iterator[TaskLabel]:
    """The label of each task of an export: the newest annotation that was not cancelled, else the newest prediction.

    `tasks`: objects of JSON or JSON-MIN, or rows of a table. Raises DataError, naming the task and its field, for several classes of one
    task, and scores outside 0 … 1.
    """
    newest: dict[str, Mapping[str, Any]] = {}
    for number, task in enumerate(tasks, 1):
        # A task that two people annotated has two rows, except in JSON, where it has two annotations.
        identity = str(task.get("id") or f"task {number}")[:ID_LENGTH]
        if identity not in newest or str(task.get("updated_at")) > str(newest[identity].get("updated_at")):
            newest[identity] = task
    for identity, task in newest.items():
        yield _read_task(task, f"{uri}: task {identity.removeprefix('task ')}")


def _read_task(task: Mapping[str, Any], where: str) -> TaskLabel:
    fields = task.get("data", task)
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: data: must be an object with the image")
    path = _find_image_path(fields)
    key = fields.get(KEY_FIELD) or (_split_address(path).path.lstrip("/") if "://" in path else path)
    if not isinstance(key, str) or not key:
        raise DataError(
            f"{where}: data: has neither {KEY_FIELD!r} nor the address of an image; its fields are {shorten_names(list(fields))}"
        )
    if "data" not in task:
        class_name = _read_choice(task.get(CLASS_FIELD, task.get("choice")), where)
        return TaskLabel(key, path, class_name, 1.0, class_name is not None)
    annotations = _list_objects(task, "annotations", where)
    for annotation in sorted(annotations, key=lambda annotation: str(annotation.get("updated_at", "")), reverse=True):
        if not annotation.get("was_cancelled") and (class_name := _find_choice(annotation, where)) is not None:
            return TaskLabel(key, path, class_name, 1.0, True)
    # Its own exports have the numbers of predictions alone; those by its API or SDK have predictions.
    for prediction in reversed(_list_objects(task, "predictions", where, or_numbers=True)):
        if (class_name := _find_choice(prediction, where)) is not None:
            return TaskLabel(key, path, class_name, _read_score(prediction.get("score"), where), False)
    return TaskLabel(key, path, None, 0.0, False)


def _list_objects(task: Mapping[str, Any], field: str, where: str, *, or_numbers: bool = False) -> list[dict[str, Any]]:
    values = task.get(field) or []
    if or_numbers and isinstance(values, list) and all(isinstance(value, int) for value in values):
        return []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{where}: {field}: must be a list of objects")
    return values


def _find_choice(answer: Mapping[str, Any], where: str) -> str | None:
    for result in _list_objects(answer, "result", where):
        value = result.get("value")
        if isinstance(value, dict) and "choices" in value:
            return _read_choice(value["choices"], where)
    return None


def _read_choice(value: Any, where: str) -> str | None:
    if isinstance(value, str) and value.startswith('{"choices"'):  # several, in a cell of a table
        try:
            value = decode_json(value.encode())
        except ValueError as error:
            raise DataError(f"{where}: has choices that are no JSON ({error}); export the project again") from error
    if isinstance(value, dict):
        value = value.get("choices")
    choices = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if len(choices) > 1:
        raise DataError(
            f"{where}: has the classes {shorten_names([str(choice) for choice in choices])}; an image has one class here: choose one"
        )
    return str(choices[0]) if choices else None


def _read_score(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"{where}: score: {value!r:.20}: must be a number from 0 to 1")
    return float(value)


def _find_image_path(fields: Mapping[str, Any]) -> str:
    """The path in the first address of a file. Local files have it in their parameter `d`, uploaded ones behind eight letters and -."""
    addresses = [fields[IMAGE_FIELD]] if IMAGE_FIELD in fields else list(fields.values())
    for address in addresses:
        if not isinstance(address, str) or address.startswith("data:"):
            continue
        parts = _split_address(address)
        path, query = unquote(parts.path), parts.query
        if local := parse_qs(query).get("d"):
            return local[0]
        if path.startswith(UPLOADS):
            return posixpath.basename(path)[UPLOAD_PREFIX_LENGTH:]
        if posixpath.splitext(path)[1]:
            return address if "://" in address else path.lstrip("/")
    return ""


def _split_address(address: str) -> SplitResult:
    """The parts of an address; none of what is no address, as of `http://[`."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def build_interface(classes: tuple[str, ...]) -> str:
    """The labeling interface of a project: the picture, and one choice of the classes."""
    from xml.sax.saxutils import quoteattr

    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in classes)
    return (
        f'<View>\n  <Image name="{IMAGE_FIELD}" value="${IMAGE_FIELD}" zoom="true"/>\n'
        f'  <Choices name="{CLASS_FIELD}" toName="{IMAGE_FIELD}" choice="single" showInLine="true">\n{choices}\n  </Choices>\n</View>\n'
    )


def build_task(key: str, image: str, class_name: str, confidence: float, model: str) -> dict[str, Any]:
    """A task with a prediction. `image`: address of the picture. `model`: shown as the prediction's version."""
    choice = {
        "from_name": CLASS_FIELD,
        "to_name": IMAGE_FIELD,
        "type": "choices",
        "value": {"choices": [class_name]},
    }
    return {
        "data": {IMAGE_FIELD: image, KEY_FIELD: key},
        "predictions": [{"model_version": model, "score": round(confidence, 4), "result": [choice]}],
    }
