#!/usr/bin/env bash
# The two commands of a fresh machine: `bash run.sh demo` and `bash run.sh test`.
# Each makes .venv, installs what requirement.txt lists, and runs; a second call goes on where the first stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
started=$SECONDS

usage() {
    echo "usage: bash run.sh demo   train and test on the embedded data, about 5 minutes on one core
       bash run.sh test   run the tests; what follows goes to pytest, such as: -m slow"
}

install() {
    # A shim of pyenv may exist and not run: so each is tried.
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: found no Python 3.10 or newer ($(python3 --version 2>&1 | head -n 1)); install one, for example" \
             "with apt install python3 python3-venv, and start again" >&2
        exit 1
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "error: $python has no venv or no pip; install them, for example with apt install" \
             "$python-venv, and start again" >&2
        exit 1
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # Installed once, and again when the list changes.
    if ! cmp -s requirement.txt .venv/installed.txt; then
        echo "installing requirement.txt into .venv (about 5 GB, 2 to 5 minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirement.txt
        cp requirement.txt .venv/installed.txt
    fi
    # On a CPU, several torch threads beside each other are slower than one for networks of this size.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

demo() {
    for preset in paper best; do
        echo "--- GTR, preset $preset"
        .venv/bin/python train_GTR.py --what LIDC_demo --preset "$preset"
    done
    echo "--- the flow, preset paper"
    .venv/bin/python train_prior_LIDC.py --what LIDC_demo
    echo "--- test"
    .venv/bin/python test_prior_LIDC.py --what LIDC_demo --methods act-gtr atfm act-gtr-best
    echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s; open runs/LIDC_demo/test/report.html"
}

case "${1:-}" in
    demo) install; demo ;;
    test) shift; install; .venv/bin/python -m pytest -q "$@" ;;
    *) usage; exit 2 ;;
esac
