#!/usr/bin/env bash
# Everything that must hold, for people and CI alike: installs what is missing, then lint, format and all tests with the
# compiled kernels (CUDA's too where nvcc is: their compilation is checked without a GPU), and once more, in plain torch,
# those tests that meet them.
#   bash tests/check.sh            whole
#   bash tests/check.sh -k queue   words after it go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

# A virtual environment of one's own is used as it is; otherwise one is made here.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c 'import torch, torchvision, setuptools, ninja, pytest, ruff' 2>/dev/null || {
  echo "installing requirements.txt (some gigabytes, minutes) ..."
  python -m pip install -q -r requirements.txt
}
echo "python $(python -V | cut -d' ' -f2), torch $(python -c 'import torch; print(torch.__version__)')"

ruff check .
ruff format --check .

echo "compiling sinkhorn_ext (minutes, the first time) ..."
SINKHORN_EXT_BUILD=strict python -m pip install -q --no-build-isolation --no-deps -e .
python -c 'import sinkhorn_ext as s; print("sinkhorn_ext:", s.backend("cpu"), "on CPUs,", s.backend("cuda"), "on GPUs")'
python -m pytest -q "$@"

[ $# -gt 0 ] || set -- tests/test_{bench,loss,parity,sinkhorn}.py \
  tests/test_run.py::test_a_run_reads_no_more_values_of_tensors_for_more_steps
echo "in plain torch: $*"
SINKHORN_EXT=torch python -m pytest -q "$@"
