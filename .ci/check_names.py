"""Holds the vocabulary of docs/glossary.md: `make lint` runs it. Prints what is wrong, then four figures."""

import argparse
import ast
import itertools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
PRODUCT = ("ns", "components", "pipelines", "k8s", "images", "benchmarks")

SHARED = {
    "main": "each program's entry",
    "report": "a component is named as its stage; so is the command",
    "start_generation": "likewise",
    "label": "likewise",
}
"""Public names that several modules may define, with the reason. At most ten."""

FIELD_WORDS = set(
    # The field and the command line.
    "main train evaluate predict label select gate report prepare save load forward backward step stage parse resize decode encode "
    "digest short autocast fgsm pgd trace purge commit promote rollback export submit trigger watch upload doctor diagnose plan run "
    "resume resolve describe explain show diff compare audit verify gc markdown compile deploy undeploy status ui cluster validate "
    "build launch barrier broadcast "
    # The pipeline's stages that go through several of these.
    "start teacher student "
    # Protocols: stores, files, credentials, samplers, progress, executors.
    "get put list exists delete move size version open close read write readinto readable writable seek urlopen retrieve update at "
    "path set create apply advance entries collect positions prefetch shutdown".split()
)
"""Functions and methods of one word that say enough: words of the field, of protocols and of the command line."""

RETIRED_WORDS = (
    r"whoever|anew|somebody|meanwhile|labell(?:ed|ing)|unlabell(?:ed|ing)"
    r"|colour\w*|normalis\w+|optimis\w+|behaviour|neighbour\w*|noisy_student\.md"
)
"""Words that the prose does without, and British spellings."""
RETIRED_NAMES = set(
    "place places course guard guards chosen located once watch one found made known own facts asked wanted".split()
)
"""Identifiers that said nothing, or too many things."""


def list_files(*suffixes: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return [path for name in names.stdout.splitlines() if (path := CHECKOUT / name).suffix in suffixes and path.is_file()]


def split_words(name: str) -> list[str]:
    return [word for word in name.strip("_").split("_") if word]


def iter_bound_names(tree: ast.AST) -> "itertools.chain[tuple[str, int]]":
    """Names that a module binds: functions, classes, parameters, variables, fields."""
    nodes = list(ast.walk(tree))
    definitions = ((n.name, n.lineno) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))
    variables = ((n.id, n.lineno) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    parameters = ((n.arg, n.lineno) for n in nodes if isinstance(n, ast.arg))
    return itertools.chain(definitions, variables, parameters)


def check_code(paths: list[Path]) -> tuple[list[str], dict[str, float]]:
    """What is wrong with the names in the product, and the figures."""
    problems, word_counts, lines = [], [], 0
    modules_by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name, text = path.relative_to(CHECKOUT).as_posix(), path.read_text()
        tree = ast.parse(text)
        lines += text.count("\n")
        functions = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and not n.name.startswith("__")
        ]
        word_counts += [len(split_words(function.name)) for function in functions]
        for function in functions:
            is_property = any("property" in ast.unparse(decorator) for decorator in function.decorator_list)
            if (
                not function.name.startswith("_")
                and "_" not in function.name
                and not is_property
                and function.name not in FIELD_WORDS
            ):
                problems.append(
                    f"{name}:{function.lineno}: {function.name}: one word does not say what it does; use verb and noun"
                )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules_by_name[node.name].append(name)
        problems += [f"{name}:{line}: {word}: retired name" for word, line in iter_bound_names(tree) if word in RETIRED_NAMES]
    shared = {word: modules for word, modules in modules_by_name.items() if len(modules) > 1}
    problems += [
        f"{', '.join(modules)}: {word}: one name, several meanings" for word, modules in shared.items() if word not in SHARED
    ]
    loose = [path for path in (CHECKOUT / "ns").glob("*.py") if path.name != "__init__.py"]
    figures = {
        "names_mean_words": round(sum(word_counts) / len(word_counts), 2),
        "names_shared": len(shared),
        "loose_modules": len(loose),
        "product_lines": lines,
    }
    if len(SHARED) > 10:
        problems.append(f"SHARED: {len(SHARED)} names; at most ten may be shared")
    return problems, figures


def check_prose(paths: list[Path]) -> list[str]:
    """Retired words, in text and code."""
    return [
        f"{path.relative_to(CHECKOUT).as_posix()}:{number}: {word}: retired word"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in re.findall(rf"\b(?:{RETIRED_WORDS})\b", line, re.IGNORECASE)
    ]


def check_documents(paths: list[Path]) -> list[str]:
    """Files and make targets that the documents name and that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    # What make makes may be under way.
    tops = "|".join(re.escape(path.name) for path in CHECKOUT.iterdir() if path.is_dir() and path.name not in ("runs", "site"))
    problems = []
    for path in paths:
        name, text = path.relative_to(CHECKOUT).as_posix(), path.read_text()
        files = re.findall(rf"`((?:{tops})/[\w./-]+)`", text)
        problems += [f"{name}: {file}: no such file" for file in files if not (CHECKOUT / file).exists()]
        named_targets = re.findall(r"`make ([a-z-]+)", text)
        problems += [f"{name}: make {target}: no such target" for target in named_targets if target not in targets]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="folders to list problems of; all if not given")
    only = [path.resolve() for path in parser.parse_args().paths]
    code = [path for path in list_files(".py") if path.relative_to(CHECKOUT).parts[0] in PRODUCT]
    documents = [path for path in list_files(".md") if "results" not in path.parts]
    problems, figures = check_code(code)
    prose = [
        path
        for path in list_files(".py", ".md", ".yaml", ".j2", ".sh")
        if path != Path(__file__) and "schemas" not in path.parts
    ]
    problems += check_prose([path for path in prose if path.name != "glossary.md"]) + check_documents(documents)
    if only:
        problems = [problem for problem in problems if any(str(CHECKOUT / problem).startswith(str(path)) for path in only)]
    print(*problems, *(f"{name} {value}" for name, value in figures.items()), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
