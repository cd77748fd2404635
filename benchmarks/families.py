"""Which of timm's families can be used: the smallest network of each is built, trained for a step, labels images, and is exported.

    python -m benchmarks.families [FAMILY ...] [--quick] [--form FORM] [--keep] [--again]

A family is a module of timm.models. One after the other is tried, each in a process of its own, which has 6 GiB of memory, ten minutes of
the processor and half an hour. Two hours; with --quick, the families of QUICK in a minute. --keep writes benchmarks/results/families.json
and docs/families.md after each family; families that are not named stay as they were. What is there of the same versions of timm and torch
is not tried again without --again, so that the same command continues.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import RESULTS, format_markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
RECORD = RESULTS / "families.json"
QUICK = ("resnet", "vision_transformer", "swin_transformer")
CLASSES, IMAGES = 3, 6
SIZES = (64, 96, 128, 160, 224, 256)
"""Sizes of images that are tried, px, and then the network's own."""
SMALL = ("atto", "femto", "pico", "nano", "tiny", "xxs", "_xs", "small", "_s", "_t", "18", "11", "_0", "m0")
"""Parts of names of the smallest networks of their families."""
CANDIDATES = 24
LARGE = 50e6
"""Parameters above which a network is made smaller by the arguments of `SMALLER`, if it takes any of them."""
SMALLER: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": [1, 1, 1, 1]}, {"layers": [1, 1, 1, 1]})
FORMS = ("timm", "onnx")
STEPS = ("build", "train", "label", "export")
CPU_SECONDS, WALL_SECONDS = 600, 1800
MEMORY = 6 << 30
"""Bytes that a process may have written to. Its address space has 3 GiB more, of libraries that are never read."""
_FORK = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="modules of timm.models; all if none is given")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--keep", action="store_true", help="write the record and the page of the documentation")
    parser.add_argument("--again", action="store_true", help="also families that were tried with the same versions")
    parser.add_argument(
        "--form", dest="forms", action="append", choices=FORMS, help="form of the export; repeatable; default: all"
    )
    options = parser.parse_args()
    import timm

    # Once for all processes, which take a copy.
    from ns.training import loop  # noqa: F401

    families = options.families or (QUICK if options.quick else timm.list_modules())
    forms = list(options.forms or FORMS)
    tried = set() if options.again else find_tried_families(forms)
    rows = []
    for family in families:
        if family in tried:
            continue
        rows.append(try_in_process(family, forms) | {"forms": forms} | get_versions())
        print(json.dumps(rows[-1]), flush=True)
        if options.keep:
            keep_rows(rows)
    if options.quick and any(row["failed"] for row in rows):
        sys.exit(1)


def get_versions() -> dict[str, str]:
    return {package: version(package) for package in ("timm", "torch")}


def find_tried_families(forms: Sequence[str]) -> set[str]:
    """Families that the record has of these versions and forms."""
    rows = json.loads(RECORD.read_text())["families"] if RECORD.exists() else []
    versions = get_versions()
    return {row["family"] for row in rows if set(forms) <= set(row["forms"]) and versions.items() <= row.items()}


def keep_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Writes the record, and the page that is made of it."""
    import timm

    before = json.loads(RECORD.read_text())["families"] if RECORD.exists() else []
    by_family = {row["family"]: row for row in [*before, *rows]}
    record = {
        "timm": timm.__version__,
        "listed": len(timm.list_modules()),
        "families": [by_family[name] for name in sorted(by_family)],
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(render_families_page(record))


def render_families_page(record: Mapping[str, Any]) -> str:
    rows = record["families"]
    failed = [row for row in rows if row["failed"]]
    parts = [
        "# Families of timm",
        f"A small network of each of {len(rows)} of the {record['listed']} families (modules) of timm {record['timm']} was built, trained "
        "for a step, labeled images, and was exported. `python -m benchmarks.families --keep` makes this page"
        + ("." if len(rows) == record["listed"] else "; others were not tried yet."),
        f"## {len(failed)} that cannot be used in full",
        format_markdown_table(
            ["family", "network", "fails to", "reason"],
            [[f"`{row['family']}`", _name_network(row), row["failed"], _escape_cell(row["reason"])] for row in failed],
        )
        if failed
        else "None.",
        f"## {len(rows) - len(failed)} that can",
        "`px`: the smallest image that was tried and fits. Noise that a family does not have must be 0, which `ns config check` says. "
        "Reduced strides (`model.reduce_stride`) are for families whose stages begin with strided convolutions.",
        format_markdown_table(
            ["family", "network", "parameters", "exported as", "px", "dropout", "stochastic depth", "reduced stride"],
            [
                [
                    f"`{row['family']}`",
                    _name_network(row),
                    f"{row['parameters'] / 1e6:.1f} M",
                    ", ".join("ONNX" if form == "onnx" else form for form in row["forms"]),
                    str(row["resolution"]),
                    *("yes" if row[name] else "no" for name in ("dropout", "stochastic_depth", "reduce_stride")),
                ]
                for row in rows
                if not row["failed"]
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _name_network(row: Mapping[str, Any]) -> str:
    return f"`{row['network']}`" + "".join(f", {name} {value}" for name, value in row.get("args", {}).items())


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def try_in_process(family: str, forms: Sequence[str]) -> dict[str, Any]:
    """`try_family` in a process that may crash, or take too much time or memory, without harm."""
    row = {"family": family, "network": "", "failed": "build", "reason": ""}
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send_row, args=(family, forms, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(WALL_SECONDS):
            row = receiver.recv()
        else:
            row["reason"] = f"takes more than {WALL_SECONDS} s"
            process.kill()
    except EOFError:
        process.join()
        if process.exitcode == 1:
            raise RuntimeError(f"{family}: was not tried; the reason is above") from None
        row["reason"] = f"ended with {process.exitcode}"
        if process.exitcode == -signal.SIGXCPU:
            row["reason"] = f"takes more than {CPU_SECONDS} s of the processor"
    process.join()
    return row


def _send_row(family: str, forms: Sequence[str], sender: Any) -> None:
    # At a soft limit it is ended with SIGXCPU, at a hard one with SIGKILL, as for other reasons.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sender.send(try_family(family, forms))


def find_smallest_network(family: str) -> tuple[str, dict[str, Any]]:
    """Of the networks of a family whose names promise small ones, that with the fewest parameters, and arguments that make it smaller."""
    import timm

    names = sorted(
        timm.list_models(module=family),
        key=lambda name: (not name.startswith("test_"), not any(part in name for part in SMALL), len(name), name),
    )
    sizes = {name: size for name in names[:CANDIDATES] if (size := count_parameters_of(name))}
    if not sizes:
        return names[0], {}
    network = min(sizes, key=lambda name: (sizes[name], name))
    if sizes[network] > LARGE:
        for args in SMALLER:
            if 0 < count_parameters_of(network, **args) < sizes[network]:
                return network, args
    return network, {}


def count_parameters_of(network: str, **args: Any) -> int:
    """On the meta device. 0 if it cannot be built: it is tried only if nothing else can."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(network, **args).parameters())
    except Exception:
        return 0


def try_family(family: str, forms: Sequence[Any]) -> dict[str, Any]:
    """What works with the smallest network of a family: a row of the record."""
    import torch

    from ns.config.schema import ImportConfig, LabelingConfig, NoiseConfig, RoleConfig
    from ns.core import log
    from ns.data.dataset import Dataset
    from ns.data.importing.ingest import import_images
    from ns.data.loading.stream import LabeledImages
    from ns.export import export_model
    from ns.labeling.label_set import find_label_shard
    from ns.labeling.predict import label_pool_shards
    from ns.modeling.factory import build_model, count_parameters, save_model
    from ns.modeling.manifest import Lineage
    from ns.modeling.predictor import Predictor
    from ns.storage import LocalStore
    from ns.training.loop import train_model
    from ns.training.plan import plan_training

    log.configure_logging(quiet=True)
    torch.manual_seed(0)
    network, args = find_smallest_network(family)
    row: dict[str, Any] = {"family": family, "network": network, "args": args, "failed": None, "reason": ""}
    step = STEPS[0]
    try:
        row |= find_noise(network, args)
        noise = NoiseConfig(**{name: 0.1 * row[name] for name in ("dropout", "stochastic_depth")}, randaugment_layers=0)
        model = find_resolution(network, args, noise)
        row |= {"resolution": model.resolution, "reduce_stride": can_reduce_stride(model)}
        role = RoleConfig.model_validate(
            {
                "model": model,
                "noise": noise,
                "train": {
                    "labeled_batch": IMAGES,
                    "epochs": 1,
                    "loader_workers": 0,
                    "precision": "float32",
                    "optimizer": {"name": "adamw", "lr": 0.01, "warmup_epochs": 0},
                },
            }
        )
        built = build_model(role.model, role.noise, CLASSES)
        row["parameters"] = count_parameters(built)
        with tempfile.TemporaryDirectory() as folder:
            root = LocalStore(Path(folder))
            _write_images(Path(folder) / "images")
            import_images(f"{folder}/images", root.at("data"), name="data", role="labeled", config=ImportConfig(), workers=1)
            data = root.at("data"), Dataset.load(root.at("data"))
            step = "train"
            labeled = LabeledImages(*data)
            trained = train_model(
                built, plan_training(role, IMAGES), labeled, None, classes=CLASSES, seed=0, checkpoints=root.at("checkpoints")
            )
            fields = {
                "generation": 0,
                "model": role.model,
                "noise": role.noise,
                "classes": data[1].classes,
                "steps": trained.steps,
            }
            lineage = Lineage(config="0", labeled=data[1].digest)
            save_model(root.at("model"), trained.weights, fields | {"parameters": row["parameters"], "lineage": lineage}, [])
            step = "label"
            predictor = Predictor(root.at("model"), batch=4)
            label_pool_shards([predictor], *data, root.at("labels"), range(1), LabelingConfig())
            label_shard = find_label_shard(root.at("labels"), data[1].shards[0])
            if label_shard is None or label_shard.unreadable:
                raise RuntimeError("the images have no labels")
            step = "export"
            export_model(root.at("model"), Path(folder) / "out", list(forms), data, count=IMAGES)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        short_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        reason = f"needs more than {MEMORY >> 30} GiB of memory" if short_of_memory else text[0][:240]
        row |= {"failed": step, "reason": reason}
    return row


def find_noise(network: str, args: dict[str, Any]) -> dict[str, bool]:
    """Kinds of noise that a network has."""
    import torch

    from ns.config.schema import ModelConfig, NoiseConfig
    from ns.core.errors import ConfigError
    from ns.modeling.factory import build_model
    from ns.modeling.network_noise import find_missing_noise

    kinds: dict[str, bool] = {}
    for name in ("dropout", "stochastic_depth"):
        noise = NoiseConfig.model_validate({"dropout": 0, "stochastic_depth": 0, name: 0.1})
        try:
            with torch.device("meta"):
                built = build_model(ModelConfig(arch=network, args=args), noise, CLASSES)
            kinds[name] = not find_missing_noise(built, noise)
        except ConfigError as error:
            if f"noise.{name}" not in str(error):
                raise
            kinds[name] = False
    return kinds


def find_resolution(network: str, args: dict[str, Any], noise: Any) -> Any:
    """The model at the smallest size of images that the network takes."""
    import timm
    import torch

    from ns.config.schema import ModelConfig
    from ns.core.errors import ConfigError
    from ns.modeling.factory import build_model, count_multiply_adds, get_total_stride

    settings = timm.models.get_pretrained_cfg(network)
    last: Exception | None = None
    for size in (*SIZES, *([settings.input_size[-1]] if settings else [])):
        model = ModelConfig(arch=network, args=args, resolution=size, test_margin_px=8, inference_precision="float32")
        try:
            with torch.device("meta"):
                built = build_model(model, noise, CLASSES)
            # Two px at the end, so that a batch norm there has something to normalize.
            if size >= 2 * get_total_stride(built):
                count_multiply_adds(built, size)
                return model
        except ConfigError as error:
            last = error
    raise last or ConfigError(f"takes no images of {SIZES[-1]} px")


def can_reduce_stride(model: Any) -> bool:
    import torch

    from ns.config.schema import NoiseConfig
    from ns.core.errors import ConfigError
    from ns.modeling.factory import build_model

    try:
        with torch.device("meta"):
            build_model(model.model_copy(update={"reduce_stride": 2}), NoiseConfig(dropout=0, stochastic_depth=0), CLASSES)
    except ConfigError:
        return False
    return True


def _write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / f"class{number % CLASSES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 72, 3), np.uint8)).save(path)


if __name__ == "__main__":
    main()
