"""A newcomer's first hour: from a wheel to predictions and an export, on image folders of their own, with the seconds of each step.

    python -m benchmarks.walk [--quick] [--px 64 224] [--hours HOURS] [--json FILE] [--keep]

The images are handwritten digits on noise, JPEGs of 64 and of 224 px, 20 labeled ones of each class in class folders and 1,200 loose ones.
Each digit has a color of its own, so that few steps of training suffice.
Every step is a command of docs/quickstart.md. --quick, for CI: one size, three digits, the libraries of this environment instead of
an installation, and a run of one generation with few epochs. --hours: what `ns init` is given, 0.1.

    walk_64px_minutes, walk_224px_minutes    from `ns init` to the export
    install_minutes                          a virtual environment, and the wheel with all its libraries
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table
from sklearn.datasets import load_digits

from benchmarks.measure import make_parser, write_benchmark

ROOT = Path(__file__).parents[1]
LABELED_PER_CLASS, POOL = 20, 1200
SHORT_CLASSES, SHORT_POOL, SHORT_HOURS = 3, 150, 0.05
"""Of a short walk; in so few hours `ns init` takes a small network, whatever the machine."""
SHORT_RUN = (
    *("generations=1", "teacher.train.epochs=20", "students.0.train.epochs=5", "selection.min_confidence=0.1"),
    *("gate.min_gain=-1", "gate.max_churn=1", "labeling.tasks=1"),
)
"""What a short walk changes in the experiment that `ns init` wrote."""


class Walk:
    """The steps of one walk, each a command with its seconds."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.steps: list[tuple[str, str, float]] = []
        self._folder, self._environment = folder, environment

    def run_step(self, name: str, *words: str, shown: Sequence[str] | None = None) -> str:
        """Runs a command in the walk's folder. Returns its standard output. Ends the walk with the command's own words if it fails."""
        started = time.perf_counter()
        done = subprocess.run(words, cwd=self._folder, env=self._environment, capture_output=True, text=True)
        self.steps.append((name, " ".join(shown or (Path(words[0]).name, *words[1:])), time.perf_counter() - started))
        if done.returncode:
            sys.exit(f"{self.steps[-1][1]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="less than a minute; not with --keep")
    parser.add_argument("--hours", type=float, default=0.1, help="given to ns init")
    parser.add_argument("--px", type=int, nargs="+", default=[64, 224], help="sizes of the images")
    options = parser.parse_args()
    if options.keep and options.quick:
        parser.error("--keep: a quick walk is none that a newcomer goes; leave --quick out")
    table = Table("images", "step", "command", "seconds", title="The first hour")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="walk-") as scratch:
        folder = Path(scratch)
        # No settings of the machine's owner.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("NS_", "AWS_", "PYTHON"))}
        environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"}
        wheel = build_wheel(folder)
        install = Walk(folder, environment)
        install_wheel(install, wheel, folder / ".venv", with_libraries=not options.quick)
        add_rows(table, "", install)
        if not options.quick:
            figures["install_minutes"] = sum_minutes(install)
        for px in options.px[:1] if options.quick else options.px:
            walk = Walk(folder, environment)
            go_first_hour(walk, folder, px, hours=SHORT_HOURS if options.quick else options.hours, is_short=options.quick)
            add_rows(table, f"{px} px", walk)
            figures[f"walk_{px}px_minutes"] = sum_minutes(walk)
    write_benchmark("walk", figures, options, table)


def build_wheel(folder: Path) -> Path:
    """What a release has. A newcomer does not build it, so it is no step."""
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def install_wheel(walk: Walk, wheel: Path, venv: Path, *, with_libraries: bool) -> None:
    """Makes an environment with the wheel; without libraries, those of this environment are seen there."""
    walk.run_step("environment", sys.executable, "-m", "venv", str(venv), shown=("python3", "-m", "venv", ".venv"))
    extras = f"{wheel.name}[pipelines,export]"
    options = ["--quiet", "--disable-pip-version-check"]
    if with_libraries:
        options += ["--constraint", str(ROOT / "constraints.txt")]
    else:
        options += ["--no-deps"]
        (site,) = venv.glob("lib/python*/site-packages")
        # A .pth file puts them behind what is installed here, unlike PYTHONPATH; links to the checkout are not followed from it.
        (site / "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", *options, f"{wheel}[pipelines,export]"]
    walk.run_step("install", *command, shown=("pip", "install", f"'{extras}'"))


def go_first_hour(walk: Walk, folder: Path, px: int, *, hours: float, is_short: bool) -> None:
    """From folders of images to an export."""
    name = f"digits{px}"
    write_images(folder / name, px, *((SHORT_CLASSES, SHORT_POOL) if is_short else (10, POOL)))
    ns, file = str(folder / ".venv" / "bin" / "ns"), f"{name}.yaml"
    walk.run_step("first experiment", ns, "init", name, f"--hours={hours:g}")
    walk.run_step("check", ns, "config", "check", file)
    walk.run_step("estimate", ns, "plan", file, *(["--seconds=2"] if is_short else []))
    walk.run_step("run", ns, "run", file, "--yes", *(f"--set={change}" for change in SHORT_RUN if is_short))
    walk.run_step("report", ns, "report", "latest")
    walk.run_step("predict", ns, "predict", f"{name}/pool/0.jpg")
    walk.run_step("export", ns, "export", "latest", f"--form={'timm' if is_short else 'onnx'}", f"--out=export{px}")


def write_images(folder: Path, px: int, classes: int, pool: int) -> None:
    """Colored digits on noise: `labeled` with class folders, `pool` with loose images."""
    digits, generator = load_digits(), np.random.default_rng(0)
    left = dict.fromkeys(range(classes), LABELED_PER_CLASS)
    count = 0
    for index in generator.permutation(len(digits.target)):
        digit = int(digits.target[index])
        if digit not in left:
            continue
        image = Image.fromarray(draw_digit(digits.images[index], hsv_to_rgb(digit / 10, 0.8, 1), px, generator))
        if left[digit]:
            left[digit] -= 1
            path = folder / "labeled" / str(digit) / f"{index}.jpg"
        elif count < pool:
            path = folder / "pool" / f"{count}.jpg"
            count += 1
        else:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def draw_digit(digit: np.ndarray, color: tuple[float, float, float], px: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [px, px, 3]; `digit`: float [8, 8], 0–16; `color`: RGB, 0–1."""
    pixels = generator.integers(0, 64, (px, px, 3)).astype(np.uint8)
    size = int(generator.integers(px - px // 4, px))
    left, upper = generator.integers(0, px - size, 2)
    ink = np.asarray(Image.fromarray((digit * 15.9).astype(np.uint8)).resize((size, size)))
    part = pixels[upper : upper + size, left : left + size]
    part[:] = np.maximum(part, (ink[..., None] * color).astype(np.uint8))
    return pixels


def add_rows(table: Table, title: str, walk: Walk) -> None:
    for number, (name, command, seconds) in enumerate(walk.steps):
        table.add_row(title if not number else "", name, escape(command), f"{seconds:.1f}")


def sum_minutes(walk: Walk) -> float:
    return round(sum(seconds for *_, seconds in walk.steps) / 60, 1)


if __name__ == "__main__":
    main()
