"""What changed between two compilations of the pipelines, in words: `python -m pipelines.diff BEFORE AFTER`, two folders of their YAML.

Prints Markdown for a pull request. A reviewer of `noisy_student.yaml` sees hundreds of lines move; this says which inputs, steps and
settings they mean.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines import load_yaml_documents

LIMIT = 200_000
"""Bytes of a compiled pipeline: Kubernetes keeps it as one object, and what is added to it at run time with it."""
CHANNEL = "pipelinechannel--"
"""What KFP's compiler puts before the name of a value that is handed down."""
WIDTH = 160
CODE_LINES = 200
Spec = Mapping[str, Any]


def differences(before: Spec, after: Spec, platform_before: Spec, platform_after: Spec) -> tuple[list[str], list[str]]:
    """Lines about inputs, steps and settings, and the changed lines of programs, as a unified diff."""
    lines = [*_inputs(before["root"], after["root"])]
    graphs = [{"pipeline": spec["root"], **_without(spec.get("components", {}), "comp-")} for spec in (before, after)]
    for name, graph, changed in _pairs(*graphs):
        where = "" if name == "pipeline" else f" of `{name}`"
        lines += _graph(where, graph.get("dag", {}), changed.get("dag", {}))
    found, code = _programs(before, after, platform_before, platform_after)
    lines += found
    old, new = ({key: spec.get(key) for key in ("pipelineInfo", "sdkVersion", "schemaVersion")} for spec in (before, after))
    lines += [f"{path}: {change}" for path, change in _changes(old, new)]
    return lines, code


def markdown(before: Path, after: Path) -> str:
    """Compares the compiled pipelines (`*.yaml`) in two folders."""
    made = ["### The compiled pipelines", ""]
    names = sorted({file.name for folder in (before, after) for file in folder.glob("*.yaml")})
    for name in names:
        old, new = before / name, after / name
        if not old.exists() or not new.exists():
            made += [f"**{name}** is {'new' if new.exists() else 'gone'}.", ""]
            continue
        lines, code = differences(*_specs(old, new))
        size = f"{old.stat().st_size:,} → {new.stat().st_size:,} bytes"
        if old.read_bytes() == new.read_bytes():
            made += [f"**{name}**: no change.", ""]
            continue
        made += [f"**{name}**, {size}" + (f", **more than {LIMIT:,}**" if new.stat().st_size > LIMIT else ""), ""]
        made += [f"- {line}" for line in lines or (["programs of steps only"] if code else ["nothing that runs otherwise"])]
        made += [""]
        if code:
            # Longer than any in the programs themselves.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", "\n".join(code))), default=0))
            more = [f"… {len(code) - CODE_LINES:,} lines more"] if len(code) > CODE_LINES else []
            body = [*code[:CODE_LINES], *more]
            made += ["<details><summary>Programs of steps</summary>", "", f"{fence}diff", *body, fence, "", "</details>", ""]
    return "\n".join(made if names else [*made, "There are none."])


def _specs(*files: Path) -> tuple[Spec, Spec, Spec, Spec]:
    specs, platforms = [], []
    for file in files:
        spec, *rest = load_yaml_documents(file.read_text())
        specs.append(spec)
        platform = rest[0] if rest else {}
        platforms.append(platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {}))
    return specs[0], specs[1], platforms[0], platforms[1]


def _inputs(before: Spec, after: Spec) -> Iterator[str]:
    known = [root.get("inputDefinitions", {}).get("parameters", {}) for root in (before, after)]
    for name, old, new in _pairs(*known):
        if not old:
            default = f"default {_shown(new['defaultValue'])}" if "defaultValue" in new else "must be given"
            yield f"new input `{name}` ({new['parameterType'].lower()}, {default})"
        elif not new:
            yield f"input `{name}` is gone: clones of earlier runs that give it will be refused"
        else:
            yield from (f"input `{name}`: {path} {change}" for path, change in _changes(old, new))


def _graph(where: str, before: Spec, after: Spec) -> Iterator[str]:
    """Steps of one graph, and what they get from whom."""
    changed: list[tuple[str, str]] = []
    for step, old, new in _pairs(before.get("tasks", {}), after.get("tasks", {})):
        if not old:
            behind = ", ".join(f"`{other}`" for other in new.get("dependentTasks", []))
            yield f"new step `{step}`{where}" + (f", after {behind}" if behind else "")
        elif not new:
            yield f"step `{step}`{where} is gone"
        else:
            changed += [(f"step `{step}`{where}", f"{path} {change}") for path, change in _changes(_task(old), _task(new))]
    yield from _together(changed)


def _task(task: Spec) -> Spec:
    """A step with its inputs as `name: where it comes from`."""
    plain = {key: value for key, value in task.items() if key not in ("inputs", "componentRef", "taskInfo")}
    if "dependentTasks" in plain:
        plain = {**plain, "dependentTasks": sorted(plain["dependentTasks"])}
    sources = {
        f"{kind.removesuffix('s')} {name.removeprefix(CHANNEL)}": _source(source)
        for kind in ("parameters", "artifacts")
        for name, source in task.get("inputs", {}).get(kind, {}).items()
    }
    return {"runs": task["componentRef"]["name"].removeprefix("comp-"), **plain, "gets": sources}


def _source(source: Spec) -> Any:
    if len(source) != 1:
        return source
    ((kind, value),) = source.items()
    if kind == "runtimeValue":
        return value.get("constant", value)
    if isinstance(value, dict) and "producerTask" in value:
        return " of ".join(str(part) for key, part in sorted(value.items()))
    return value.removeprefix(CHANNEL) if isinstance(value, str) else value


def _programs(before: Spec, after: Spec, platform_before: Spec, platform_after: Spec) -> tuple[list[str], list[str]]:
    executors = [_without(spec.get("deploymentSpec", {}).get("executors", {}), "exec-") for spec in (before, after)]
    platforms = [_without(platform, "exec-") for platform in (platform_before, platform_after)]
    changed: list[tuple[str, str]] = []
    code: list[str] = []
    for name, old, new in _pairs(*executors):
        if old and new:
            ours = [{key: value for key, value in each.get("container", {}).items() if key != "command"} for each in (old, new)]
            theirs = [platform.get(name, {}) for platform in platforms]
            for pair in (ours, theirs):
                changed += [(f"`{name}`", f"{path} {change}") for path, change in _changes(*pair)]
        was, now = ("\n".join(each.get("container", {}).get("command", [])).splitlines() for each in (old, new))
        if old and was != now:
            code += list(difflib.unified_diff(was, now, f"before/{name}", f"after/{name}", lineterm=""))
    return list(_together(changed)), code


def _together(changed: Iterable[tuple[str, str]]) -> Iterator[str]:
    """`who: what` lines; what changed alike in several is said once."""
    who: dict[str, list[str]] = {}
    for name, what in changed:
        who.setdefault(what, []).append(name)
    yield from (f"{', '.join(names)}: {what}" for what, names in who.items())


def _changes(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and words of each value that is not the same."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(before.keys() | after.keys()):
            yield from _changes(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(after, list) and before != after:
        if len(before) == len(after):
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                yield from _changes(old, new, f"{path}.{index}")
        else:
            gone, come = ([item for item in some if item not in others] for some, others in ((before, after), (after, before)))
            moved = [f"− {_shown(item)}" for item in gone] + [f"+ {_shown(item)}" for item in come]
            yield f"`{path}`", ", ".join(moved) or "repeats items"
    elif before != after:
        yield f"`{path}`", f"{_shown(before)} → {_shown(after)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...").strip()
    # A tick would end the code, a line break the list.
    text = text.replace("`", "'").replace("\n", " ")
    return f"`{text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}`"


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Entries by name, those of `before` in their order first; {} for one that is missing."""
    for name in dict.fromkeys([*before, *after]):
        yield name, before.get(name, {}), after.get(name, {})


def _without(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in named.items()}


def main() -> int:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if len(folders) != 2 or not all(folder.is_dir() for folder in folders):
        sys.stderr.write("usage: python -m pipelines.diff BEFORE AFTER, two folders with compiled pipelines\n")
        return 2
    sys.stdout.write(markdown(*folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
