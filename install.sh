#!/bin/sh
# install.sh VENV EXTRAS: makes the virtual environment VENV, and installs the project with EXTRAS as constraints.txt says.
# Safe to interrupt, to run again, and to start twice at once.
set -eu
venv=$1 extras=$2
log=$venv/install.log
under_way=$venv/.installing

suits() { # suits PYTHON [MODULE]: of a version that torch has wheels for, and with MODULE
    "$1" -c "import sys${2:+, $2}; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" 2>/dev/null
}

newest_python() {
    # Debian and Ubuntu keep ensurepip in a package of its own: a Python that has it comes before a newer one without.
    for module in ensurepip ''; do
        for name in python3.14 python3.13 python3.12 python3.11 python3; do
            if suits "$name" "$module"; then
                command -v "$name"
                return
            fi
        done
    done
    found=$(python3 --version 2>/dev/null || true)
    echo "error: Python 3.11 to 3.14 is needed, found: ${found:-none}; install one, e.g. apt-get install python3" >&2
    exit 1
}

install_ensurepip() { # install_ensurepip PYTHON
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
        echo "Installing $package, which Debian keeps apart …" >&2
        $sudo apt-get update -qq >/dev/null 2>&1 || true
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null 2>&1 || true
    fi
    suits "$1" ensurepip && return
    echo "error: $1 cannot make virtual environments; run: sudo apt-get install -y $package" >&2
    exit 1
}

# One at a time: a second make waits here, and then finds most of its work done.
exec 9<pyproject.toml
if command -v flock >/dev/null; then flock 9; fi

# If it was killed, packages may be incomplete: such an environment is made again, and so is one whose Python is gone.
if [ -e "$under_way" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    python=$(newest_python)
    suits "$python" ensurepip || install_ensurepip "$python"
    "$python" -m venv "$venv"
fi
echo "Installing into $venv (once; some minutes, most of it for torch) …" >&2
trap 'exit 130' INT
touch "$under_way"
code=0
"$venv/bin/python" install_packages.py "$venv/bin/python" -c constraints.txt -e ".[$extras]" >"$log" 2>&1 || code=$?
# Above 128 a signal ended it; below, it ended by itself and in order.
[ "$code" -gt 128 ] || rm -f "$under_way"
if [ "$code" -ne 0 ]; then
    tail -n 15 "$log" >&2
    echo "error: the installation failed; all of its output is in $log; make takes it up again" >&2
    exit 1
fi
# On all cores, and without tests of packages, a sixth of all. Some files that packages have for other Pythons do not compile, which is
# no fault.
"$venv/bin/python" -m compileall -qq -j 0 -x '/tests/' "$venv/lib" >>"$log" 2>&1 || true
