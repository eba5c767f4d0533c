#!/usr/bin/env bash
# Runs tests, benchmarks and profiles on one GPU in under eight minutes, without installing:
#   scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]
# Wheels in scripts/wheels/ are unpacked into a temporary folder and used.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/device_suite.py "$@"
