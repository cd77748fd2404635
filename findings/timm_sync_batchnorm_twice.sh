#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1: timm.layers.convert_sync_batchnorm, applied to a network a second time, removes its activations.
#
# The first call turns timm's BatchNormAct2d into SyncBatchNormAct, which normalizes and then applies the activation: the network
# computes what it did. SyncBatchNormAct is itself a SyncBatchNorm, for which the second call makes a plain torch SyncBatchNorm.
# The activation stays in it as a child, but its forward pass never calls it. Nothing is raised, the names of all weights stay, and
# the network still trains. torch's own SyncBatchNorm.convert_sync_batchnorm leaves what is converted as it is. It matters for code that
# prepares a network again in the middle of a training, say after layers were unfrozen, and converts it on the way.
#
# Seen with: Python 3.11, torch 2.14.1, torchvision 0.29.1, timm 1.0.31, in evaluation mode on a CPU:
#   once: SyncBatchNormAct, outputs are the same
#   twice: SyncBatchNorm, outputs differ
#   activations that are called: plain 9, once 9, twice 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31

cat >"$folder/convert.py" <<'PY'
import copy

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

torch.manual_seed(0)
plain = timm.create_model("test_efficientnet", num_classes=4).eval()
once = convert_sync_batchnorm(copy.deepcopy(plain)).eval()
twice = convert_sync_batchnorm(copy.deepcopy(once)).eval()
images = torch.rand(2, 3, 64, 64)
calls = 0


def count(*_):
    global calls
    calls += 1


counted = {}
outputs = {}
for name, network in {"plain": plain, "once": once, "twice": twice}.items():
    calls = 0
    for layer in network.modules():
        # The activations of normalizing layers; blocks with squeeze-and-excitation have others.
        if isinstance(layer, (nn.modules.batchnorm._BatchNorm,)) and isinstance(getattr(layer, "act", None), nn.SiLU):
            layer.act.register_forward_hook(count)
    with torch.no_grad():
        outputs[name] = network(images)
    counted[name] = calls
for name, network in {"once": once, "twice": twice}.items():
    same = torch.allclose(outputs[name], outputs["plain"], atol=1e-5)
    print(f"{name}: {type(network.bn1).__name__}, outputs {'are the same' if same else 'differ'}")
print("activations that are called:", ", ".join(f"{name} {number}" for name, number in counted.items()))
assert list(twice.state_dict()) == list(plain.state_dict())
PY

seen=$("$folder/venv/bin/python" "$folder/convert.py" 2>/dev/null)
printf '%s\n' "$seen"
grep -q "once: SyncBatchNormAct, outputs are the same" <<<"$seen"
grep -q "twice: SyncBatchNorm, outputs differ" <<<"$seen"
grep -qE "activations that are called: plain ([1-9][0-9]*), once \1, twice 0" <<<"$seen"
