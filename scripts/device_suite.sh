#!/usr/bin/env bash
# Everything that one GPU can tell about this tree, in under eight minutes, without installing:
#   scripts/device_suite.sh [--parts PART,PART] [--cpu] [OUT]
# Where wheels lie in scripts/wheels/, they are unpacked into a temporary folder and used.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/device_suite.py "$@"
