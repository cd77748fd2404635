#!/bin/sh
# install.sh VENV EXTRAS: makes the virtual environment VENV, and installs the project with EXTRAS as constraints.txt says.
# Safe to interrupt and to run again.
set -eu
venv=$1 extras=$2
log=$venv/install.log

newest_python() {
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    found=$(python3 --version 2>&1 || true)
    echo "error: Python 3.11 or newer is needed, found: ${found:-none}; install one, e.g. apt-get install python3" >&2
    exit 1
}

make_venv() {
    "$1" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian and Ubuntu keep ensurepip in a package of its own.
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    install="apt-get install -y python$version-venv"
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }; then
        echo "Installing python$version-venv, which Debian keeps apart …" >&2
        $sudo apt-get update -qq >/dev/null 2>&1 || true
        DEBIAN_FRONTEND=noninteractive $sudo $install >/dev/null 2>&1 || true
    fi
    rm -rf "$venv"
    "$1" -m venv "$venv" && return
    echo "error: $1 cannot make virtual environments; run: sudo $install" >&2
    exit 1
}

# A virtual environment whose pip does not answer was interrupted, or its Python is gone.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    make_venv "$(newest_python)"
fi
echo "Installing into $venv (once; some minutes, most of it for torch) …" >&2
if ! "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: the installation failed; all of its output is in $log; make takes it up again" >&2
    exit 1
fi
