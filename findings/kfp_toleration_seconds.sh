#!/usr/bin/env bash
# kfp-kubernetes 2.17.0: add_toleration_json passes over Kubernetes' own field tolerationSeconds, and takes it as toleration_seconds.
#
# A toleration that is copied from a pod's specification, with effect NoExecute and tolerationSeconds, tolerates its taint for so many
# seconds: how long a task waits on a node that became unreachable. In the compiled package the seconds are gone, without a word, and a
# toleration without them tolerates for ever. All other fields are spelled as in Kubernetes. add_toleration takes the same seconds as an
# argument, and keeps them.
#
# Seen with: Python 3.11, kfp 2.17.0, kfp-kubernetes 2.17.0:
#   add_toleration_json, tolerationSeconds: {'key': …, 'operator': 'Exists', 'effect': 'NoExecute'}
#   add_toleration_json, toleration_seconds: {'key': …, 'operator': 'Exists', 'effect': 'NoExecute', 'tolerationSeconds': '60'}
#   add_toleration, toleration_seconds: {'key': …, 'operator': 'Exists', 'effect': 'NoExecute', 'tolerationSeconds': '60'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kfp==2.17.0 kfp-kubernetes==2.17.0

cat >"$folder/tolerate.py" <<'PY'
from kfp import dsl, kubernetes

TOLERATION = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}


@dsl.component(base_image="python:3.11")
def work():
    pass


def show(title, tolerate):
    @dsl.pipeline
    def pipeline():
        task = work()
        tolerate(task)
        print(title, *task.platform_config["kubernetes"]["tolerations"])


for field in ("tolerationSeconds", "toleration_seconds"):
    show(f"add_toleration_json, {field}:", lambda task: kubernetes.add_toleration_json(task, [TOLERATION | {field: 60}]))
show("add_toleration, toleration_seconds:", lambda task: kubernetes.add_toleration(task, toleration_seconds=60, **TOLERATION))
PY

seen=$("$folder/venv/bin/python" "$folder/tolerate.py")
printf '%s\n' "$seen"
[ "$(grep -c "'tolerationSeconds': '60'" <<<"$seen")" = 2 ]
grep -qE "^add_toleration_json, tolerationSeconds: .*'NoExecute'}$" <<<"$seen"
