#!/usr/bin/env bash
# Tests, benchmarks and profiles on one GPU in under eight minutes, without an installation:
#   scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]
# Wheels in scripts/wheels/ are unpacked into a temporary folder and used.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/device_suite.py "$@"
