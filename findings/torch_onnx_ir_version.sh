#!/usr/bin/env bash
# torch 2.14.1: torch.onnx.export writes IR version 10 whatever opset is asked for, so runtimes that know the opset refuse the file.
#
# opset_version=18 promises a file for runtimes from 2023 on: opset 18 came with ONNX 1.13, whose IR version is 8. The exporter writes
# IR version 10 into every file, which came with ONNX 1.16 in 2024. onnxruntime 1.15 knows opsets up to 19, and does not read the file:
# "Unsupported model IR version: 10, max supported IR version: 9". With ir_version set to 8 and nothing else changed, it reads the file,
# and its answers are torch's. This matters for servers that are older than the program that exports, such as the Triton 23.05 that
# KServe 0.20 starts by default.
#
# Seen with: Python 3.11, torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2; onnxruntime 1.15.1:
#   opset 18: ir_version 10
#   opset 20: ir_version 10
#   as written: Unsupported model IR version: 10
#   with ir_version 8: largest difference below 1e-5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/torch"
"$folder/torch/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
# No wheel of it is for numpy 2.
python3 -m venv "$folder/runtime"
"$folder/runtime/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.15.1 numpy==1.26.4

cat >"$folder/export.py" <<'PY'
import sys

import numpy as np
import onnx
import torch

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()).eval()
images = torch.rand(2, 3, 8, 8)
folder = sys.argv[1]
for opset in (20, 18):
    torch.onnx.export(network, (images,), f"{folder}/10.onnx", dynamo=True, external_data=False, opset_version=opset, verbose=False)
    model = onnx.load(f"{folder}/10.onnx")
    print(f"opset {model.opset_import[0].version}: ir_version {model.ir_version}")
model.ir_version = 8
onnx.checker.check_model(model, full_check=True)
onnx.save(model, f"{folder}/8.onnx")
np.savez(f"{folder}/expected.npz", images=images.numpy(), outputs=network(images).detach().numpy())
PY
cat >"$folder/read.py" <<'PY'
import sys

import numpy as np
import onnxruntime

folder = sys.argv[1]
expected = np.load(f"{folder}/expected.npz")
for name, version in (("as written", 10), ("with ir_version 8", 8)):
    try:
        session = onnxruntime.InferenceSession(f"{folder}/{version}.onnx", providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {session.get_inputs()[0].name: expected["images"]})
        small = np.abs(outputs - expected["outputs"]).max() < 1e-5
        print(f"{name}: largest difference {'below' if small else 'above'} 1e-5")
    except Exception as error:
        print(f"{name}:", str(error)[str(error).index("Unsupported") :].partition(",")[0])
PY

seen=$("$folder/torch/bin/python" "$folder/export.py" "$folder" 2>/dev/null | grep '^opset' | sort; "$folder/runtime/bin/python" "$folder/read.py" "$folder")
printf '%s\n' "$seen"
grep -q "opset 18: ir_version 10" <<<"$seen"
grep -q "opset 20: ir_version 10" <<<"$seen"
grep -q "as written: Unsupported model IR version: 10" <<<"$seen"
grep -q "with ir_version 8: largest difference below 1e-5" <<<"$seen"
