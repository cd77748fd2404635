#!/usr/bin/env bash
# torch 2.14.1: a function compiled for a CPU keeps the interpreter lock while its kernel runs; not compiled, the same operations release it.
#
# Programs that prepare data in threads (decoding images, reading from a store) count on torch to release the lock while a network runs.
# The kernels that torch.compile makes for CPUs are called through a small extension module that keeps the lock, so beside a compiled network
# such threads stand still for as long as each kernel takes, and progress only in between. Operations that stay outside of the fused kernels,
# such as convolutions by oneDNN, still release it.
#
# Measured: another thread sleeps for a millisecond at a time; the longest time between two of its turns, as a share of one call.
# Seen with: Python 3.11, torch 2.14.1, g++ 12, Linux, two cores:
#   eager: other threads run during the call
#   compiled: other threads stand still for nearly all of the call
set -euo pipefail
command -v g++ >/dev/null || { echo "needs g++, which torch.compile calls" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

cat >"$folder/measure.py" <<'PY'
import statistics
import threading
import time

import torch

torch.set_num_threads(1)


def compute(values):
    return (values.sin() * values.cos()).tanh().exp()


def measure_pause(function, values):
    """The longest time for which another thread cannot run, as a share of the call."""
    pauses, done = [], threading.Event()

    def take_turns():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=take_turns)
    thread.start()
    time.sleep(0.05)
    started = time.perf_counter()
    function(values)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    return max(pauses) / seconds


values = torch.rand(20_000_000)
compiled = torch.compile(compute)
with torch.inference_mode():
    for name, function in (("eager", compute), ("compiled", compiled)):
        function(values)
        share = statistics.median(measure_pause(function, values) for _ in range(7))
        what = "stand still for nearly all of the call" if share > 0.7 else "run during the call" if share < 0.4 else f"pause for {share:.2f} of the call"
        print(f"{name}: other threads {what}")
PY

seen=$(TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/venv/bin/python" "$folder/measure.py")
printf '%s\n' "$seen"
[ "$seen" = "eager: other threads run during the call
compiled: other threads stand still for nearly all of the call" ]
