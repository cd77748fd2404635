"""As many classes as ImageNet-21k has: evaluation and report stay small."""

import os
import subprocess
import sys

import pytest

CLASSES = 21_841
IMAGES = 3_000
MIB = 1 << 20

CODE = f"""
import re, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.evaluation.accuracy import evaluate_accuracy
from ns.evaluation.result import Evaluation
from ns.reporting.artifacts import read_confusion
from ns.reporting.context import gather_context
from ns.reporting.markdown import render_markdown
from ns.reporting.page import render_report
from ns.storage import LocalStore


def read_peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


# What torch and timm map into memory differs between processors.
imported = read_peak_kib()
root, names = LocalStore(Path(sys.argv[1])), tuple(f"n{{number:08d}}" for number in range({CLASSES}))
with ShardWriter(root.at("many"), max_samples=2_000, max_bytes=1 << 24) as writer:
    for row in range({IMAGES}):
        writer.add_image(f"image-{{row}}", "png", b"image", 7 * row)
data = Dataset(name="many", role="evaluation", classes=names, shards=writer.shards)
data.save(root.at("many"))


class Guesses:
    batch, mode, scored_classes = 256, "float32", None
    manifest = SimpleNamespace(classes=names, digest="m")

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def predict_groups(self, groups, progress):
        for group in groups:
            yield self.rng.random((len(group), {CLASSES}), np.float32)


for generation in ("00", "01"):
    # The first manifest of a folder stays.
    root.delete(f"store/evaluations/{{generation}}/evaluation.json")
    evaluate_accuracy(Guesses(int(generation)), root.at("many"), data, root.at(f"store/evaluations/{{generation}}"))
evaluation = Evaluation.load(root.at("store/evaluations/01"))
assert evaluation.images == {IMAGES} == sum(evaluation.class_images) == sum(evaluation.class_predicted)
assert len(evaluation.confusions) == 1_000
assert evaluation.confusions_left_out > 1_900
shown, matrix = read_confusion(root, "made-up", 1)
assert np.shape(matrix) == (50, 50) and np.sum(matrix) == {IMAGES}
context = gather_context(root, "made-up", pictures=0)
assert "never predicts" in render_report(context)
assert "balanced accuracy" in render_markdown(context)
print(read_peak_kib() - imported)
"""


@pytest.mark.integration
def test_evaluation_and_report_of_many_classes(made_up):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CODE, str(made_up.root)], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) << 10 < 384 * MIB
    assert made_up.path("store/evaluations/01/evaluation.json").stat().st_size < 2 * MIB
