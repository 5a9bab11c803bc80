#!/usr/bin/env bash
# Check everything, for people and CI alike: install what is missing, lint, check the format, and run all tests with the
# compiled kernels. Then run the tests that use the kernels once more, in plain torch. Where nvcc is installed, the CUDA
# kernels are compiled too, even without a GPU.
#   bash tests/check.sh            all of it, a file on each of up to four cores
#   bash tests/check.sh -k queue   pass arguments to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

# An active virtual environment is used; otherwise, one is created here.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c 'import torch, torchvision, setuptools, pybind11, ninja, pytest, matplotlib, ruff' 2>/dev/null || {
  echo "installing requirements.txt (several gigabytes, some minutes) ..."
  python -m pip install -q -r requirements.txt
}
echo "python $(python -V | cut -d' ' -f2), torch $(python -c 'import torch; print(torch.__version__)')"

ruff check .
ruff format --check .

echo "compiling sinkhorn_ext (minutes, the first time) ..."
SINKHORN_EXT_BUILD=strict python -m pip install -q --no-build-isolation --no-deps -e .
python -m sinkhorn_ext

if [ $# -gt 0 ]; then
  python -m pytest -q "$@"
  echo "in plain torch: $*"
  SINKHORN_EXT=torch python -m pytest -q "$@"
else
  python tests/parallel.py
  echo "in plain torch:"
  SINKHORN_EXT=torch python tests/parallel.py tests/test_{sinkhorn,parity,loss}.py \
    tests/test_run.py::test_a_run_reads_no_more_values_of_tensors_for_more_steps \
    tests/test_bench.py::test_{tables_and_figures_of_tiny_sizes,all_candidates_compute_the_same}
fi
