"""`ns export` of a real run, and the programs of docs/export.md, which know nothing of this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "ns", "export", "promoting", "--root", str(finished), "--out", str(folder / "export")]
    done = subprocess.run([*command, "--form=timm", "--form=onnx", "--form=torch"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_export_command_checks_every_form(exported):
    found = json.loads((exported / "export" / "export.json").read_text())
    assert [check["form"] for check in found["checks"]] == ["timm", "onnx", "torch"]
    for check in found["checks"]:
        assert check["images"] == 64
        assert check["same_top1"] == 1.0
        assert check["largest_difference"] < 1e-4 * check["largest_logit"]


def test_model_card_of_a_run(exported):
    card = (exported / "export" / "README.md").read_text()
    assert re.search(r"\| held out, top-1 \| \d+\.\d % \[\d", card)
    assert "mCE, % of the first teacher's" in card
    assert "student of generation 2" in card
    assert re.search(r"\| label set \| `[0-9a-f]{64}` \|", card)
    assert "## Limits" in card


def test_programs_in_docs_run_without_this_package(exported, finished):
    from PIL import Image

    from ns.data.loading.shard_reader import ImageSource
    from ns.runs.lookup import read_prepared_data
    from ns.storage import LocalStore

    root = LocalStore(finished)
    folder, dataset = read_prepared_data(root, "promoting").heldout.open_dataset(root)
    source = ImageSource(folder, dataset)
    # As phones store it: lying on its side, with a note that says so.
    turned = Image.fromarray(source.read_pixels(0, 0)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(exported / "image.png", exif=exif)
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 4
    # The second one goes on from the first.
    without = "import sys\nsys.modules['ns'] = None\n"
    said = []
    for program in (programs[0], "\n".join(programs[:2]), *programs[2:]):
        command = [sys.executable, "-I", "-c", without + program]
        done = subprocess.run(command, cwd=exported, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    label = dataset.classes[int(source.read_class_ids(0, len(dataset.classes))[0])]
    assert [words[0] for words in said] == [label] * 4
