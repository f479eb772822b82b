#!/usr/bin/env bash
# Build the wheel that both environments install.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf environment/dist server/dist
python3 -m pip wheel --quiet --no-deps --wheel-dir environment/dist ../..
cp -r environment/dist server/dist
ls environment/dist
