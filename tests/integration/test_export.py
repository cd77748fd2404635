"""`ns export` of a real run, and the programs of docs/export.md and docs/serving.md, which know nothing of this package."""

import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ns.cli.app import run_command_line

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DOCS = Path(__file__).parents[2] / "docs"
WITHOUT = "import sys\nsys.modules['ns'] = None\n"


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """A folder with the pointer that `ns promote` wrote, and the export of the model that it names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    assert run_command_line(["promote", "promoting", "--root", str(finished), "--to", str(folder / "production.yaml")]) == 0
    command = [sys.executable, "-m", "ns", "export", str(folder / "production.yaml"), "--out", str(folder / "export")]
    done = subprocess.run([*command, "--form=timm", "--form=onnx", "--form=torch"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_export_refuses_a_pointer_whose_model_was_replaced(exported, capsys):
    pointer = (exported / "production.yaml").read_text()
    (exported / "other.yaml").write_text(re.sub(r"^digest: \w+", f"digest: {'a' * 64}", pointer, flags=re.MULTILINE))
    assert run_command_line(["export", str(exported / "other.yaml"), "--out", str(exported / "other")]) == 3
    assert "is not the model with the digest that the pointer names" in capsys.readouterr().err
    assert run_command_line(["export", str(exported / "none.yaml")]) == 4
    assert "none.yaml: no such file; `ns promote RUN --to" in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def picture(exported, finished):
    """`image.png` in the folder of the export, as phones store it. Returns the class that the model sees in it once it is upright."""
    from PIL import Image

    from ns.data.loading.shard_reader import ImageSource
    from ns.modeling.predictor import Predictor
    from ns.promotion.promote import read_pointer
    from ns.runs.lookup import read_prepared_data, resolve_model_uri
    from ns.storage import LocalStore, open_store

    root = LocalStore(finished)
    pointer = read_pointer(exported / "production.yaml")
    assert pointer
    predictor = Predictor(open_store(resolve_model_uri(root, pointer.model)), batch=64)
    folder, dataset = read_prepared_data(root, "promoting").heldout.open_dataset(root)
    source = ImageSource(folder, dataset)
    for row in range(dataset.shards[0].samples):
        upright = source.read_pixels(0, row)
        turned = np.ascontiguousarray(np.rot90(upright))
        probabilities, _ = predictor.predict_images([upright, turned])
        seen, seen_turned = probabilities.argmax(1)
        # Of other images, a program that does not turn them would say the same, or the answer could hang on the last digit.
        if seen != seen_turned and probabilities.max(1)[0] > 0.5:
            break
    else:
        pytest.fail("the model sees the same in every image and in the same one turned")
    # Lying on its side, with a note that says so.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(exported / "image.png", exif=exif)
    return dataset.classes[seen]


def run_program(program: str, folder: Path) -> str:
    """The first word that a program prints that runs without this package."""
    command = [sys.executable, "-I", "-c", WITHOUT + program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


def test_programs_in_docs_run_without_this_package(exported, picture):
    programs = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), re.DOTALL)
    assert len(programs) == 4
    # The second one goes on from the first.
    for program in (programs[0], "\n".join(programs[:2]), *programs[2:]):
        assert run_program(program, exported) == picture


def test_onnx_can_be_read_by_runtimes_of_2023(exported):
    import onnx

    model = onnx.load(exported / "export" / "model.onnx")
    assert (model.ir_version, [(opset.domain, opset.version) for opset in model.opset_import]) == (8, [("", 18)])


class OpenInferenceServer(http.server.BaseHTTPRequestHandler):
    """The part of the Open Inference Protocol that the page's client needs, with a repository of models as Triton wants it."""

    repository: Path

    def do_POST(self):
        import onnxruntime

        name = self.path.removeprefix("/v2/models/").removesuffix("/infer")
        (tensor,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("images", "UINT8")
        assert f"dims: {tensor['shape'][1:]}".replace("[", "[ ").replace("]", " ]") in self.read_config(name)
        pixels = np.array(tensor["data"], np.uint8).reshape(tensor["shape"])
        (logits,) = onnxruntime.InferenceSession(self.repository / name / "1" / "model.onnx").run(None, {"images": pixels})
        assert f"dims: [ {logits.shape[1]} ]" in self.read_config(name)
        output = {"name": "logits", "datatype": "FP32", "shape": logits.shape, "data": logits.ravel().tolist()}
        answer = json.dumps({"model_name": name, "outputs": [output]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def read_config(self, name: str) -> str:
        return (self.repository / name / "config.pbtxt").read_text()

    def log_message(self, *_):
        pass


def test_served_model_answers_the_client_in_docs(exported, picture):
    page = (DOCS / "serving.md").read_text()
    for line in re.findall(r"^(?:mkdir|cp) .*$", page, re.MULTILINE):
        subprocess.run(line.split(), cwd=exported, check=True)
    handler = type("Handler", (OpenInferenceServer,), {"repository": exported / "serving"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        assert run_program(program.replace("localhost:8080", f"127.0.0.1:{server.server_port}"), exported) == picture
        server.shutdown()
