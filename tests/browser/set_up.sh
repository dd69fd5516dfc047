#!/usr/bin/env bash
# What the browser tests need: Chromium, a driver for it, and axe-core. Prints the place of Chromium.
#
#   tests/browser/set_up.sh VENV
#
# Ends with code 3, and says so, where Chromium is not installed and cannot be.
set -euo pipefail
venv=$1

browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" && return
    done
    return 1
}

install_browser() {
    command -v apt-get >/dev/null || return 1
    local root="env DEBIAN_FRONTEND=noninteractive"
    [ "$(id -u)" = 0 ] || root="sudo -n $root"
    { $root apt-get update --quiet=2 && $root apt-get install --quiet=2 --yes chromium; } >&2
}

if ! browser >/dev/null && ! install_browser; then
    echo "Chromium is not installed, and cannot be installed here; install it, then repeat." >&2
    exit 3
fi
stamp=$venv/browser/.installed
if [ ! "$stamp" -nt constraints.txt ] || [ ! "$stamp" -nt "$0" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        -c constraints.txt playwright >&2
    if command -v npm >/dev/null; then
        npm install --silent --no-save --no-audit --no-fund --prefix "$venv/browser" axe-core@4.14.1 >&2
        touch "$stamp"
    else
        echo "Without npm here: pages are not checked by axe-core." >&2
    fi
fi
browser
