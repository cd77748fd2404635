#!/usr/bin/env bash
# kfp 2.17.0: after a local run whose tasks overlapped, the process's own print indents every line.
#
# kfp.local indents what a task prints by replacing builtins.print until the task has ended. A ParallelFor runs its items in threads: when
# the item that began first also ends first, the one that ends last puts the first one's replacement back, and it stays. Nothing of KFP
# runs any more, and yet a program that prints a table or JSON for another program writes four spaces before each line, and twice as many
# and four more after each further run.
#
# Seen with: Python 3.11, kfp 2.17.0:
#   |before|
#   |    after one run|
#   |            after two|
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kfp==2.17.0

cat >"$folder/print_after.py" <<'PY'
import contextlib
import io

from kfp import dsl, local


@dsl.component(base_image="python:3.11")
def wait(seconds: float):
    import time

    time.sleep(seconds)


@dsl.pipeline
def pipeline():
    # The longer waits begin later, and end much later.
    with dsl.ParallelFor([2.0, 8.0]) as seconds:
        wait(seconds=seconds)


def say(text):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        print(text)
    print_directly("|" + said.getvalue().rstrip("\n") + "|")


print_directly = print
local.init(local.SubprocessRunner(use_venv=False))
say("before")
for title in ("after one run", "after two"):
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline()
    say(title)
PY

seen=$(cd "$folder" && PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" print_after.py 2>/dev/null)
printf '%s\n' "$seen"
[ "$seen" = "|before|
|    after one run|
|            after two|" ]
