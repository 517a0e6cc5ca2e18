#!/bin/sh
# Prints the path of a uv that works: the one on PATH, else one of the project's own, which is fetched when absent.
set -u
home=.cache/uv

for candidate in uv "$home/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done

if ! python3 --version >/dev/null 2>&1; then
    echo "python3 is missing: run 'apt-get install python3 python3-venv' as root, then try again" >&2
    exit 1
fi
mkdir -p .cache
rm -rf "$home"
echo "uv is not on PATH: fetching it into $home" >&2
# Neither way touches the system's Python, which may be externally managed (PEP 668).
if python3 -m venv "$home" >.cache/uv.log 2>&1; then
    "$home/bin/python" -m pip install --quiet uv >>.cache/uv.log 2>&1
else
    rm -rf "$home"
    if python3 -m pip --version >/dev/null 2>&1; then
        python3 -m pip install --quiet --target "$home" uv >>.cache/uv.log 2>&1
    else
        echo "python3-venv is missing: run 'apt-get install python3-venv' as root, then try again" >&2
        exit 1
    fi
fi
if ! "$home/bin/uv" --version >/dev/null 2>&1; then
    echo "uv could not be fetched ($(tail -n 1 .cache/uv.log)): install it by hand, 'pipx install uv', then try again" >&2
    exit 1
fi
echo "$home/bin/uv"
