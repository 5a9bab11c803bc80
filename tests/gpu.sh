#!/usr/bin/env bash
# Show everything that only a GPU can show, in at most eight minutes, for machines that are rented by the minute.
# It installs nothing and needs no network. tests/gpu.sh --help explains it.
#
# To add a part: write a function part_NAME below and add one line to the table PARTS. The limits should add up to
# at most 480 seconds; a part that takes longer belongs to BY_NAME.
set -euo pipefail
cd "$(dirname "$0")/.."

# name, limit in seconds, what it does; in order of importance
PARTS='
build        110   compile the extension in place, strictly; the other parts need it
cuda_tests   100   run the tests that need a GPU
kernels      120   time Sinkhorn and the loss beside the original forms, as they are and compiled
step          90   time a ResNet-50 training step, the original loop and ours (not compiled)
images_per_s  45   train a ResNet-50 on JPEG files: images/s and data wait
'
# these run only if they are named
BY_NAME='
imagenette    360   train a ResNet-18 on IMAGENETTE as long as fits and evaluate it as lightly does
faults        300   out of memory; SIGTERM in the middle of an epoch; two processes on one GPU, resumed as one
step_compiled 260  the part step with torch.compile for ours, which takes minutes at the first step
photos         60   train on the photographs in PHOTOS and evaluate the features
fused         200   the same kernels in plain torch, fused by torch.compile, with their tests
memory        400   memory and time of --accumulate and --checkpoint_activations; their losses, compiled or not
profile        60   time each kernel of the codes and the loss, and read the counters of the slowest one by ncu
'

usage() {
  cat <<END
usage: tests/gpu.sh [PART ...]        (default: all of the first table, in this order)

parts, each with the seconds that it takes at most ($(awk '{ sum += $2 } END { print sum }' <<<"$PARTS") in all):
$PARTS
only if named, after build:
$BY_NAME
Environment variables:
  OUT=DIR             write the results here: a log for each part, and summary.txt (default: gpu_results)
  PHOTOS=DIR          photographs for the part photos; with train/ and val/ (a folder per class) it evaluates too
  PHOTOS_EPOCHS=N     epochs on them (default: 20); when time ends before, the last complete epoch counts
  IMAGENETTE=DIR      Imagenette for the part imagenette, with train/ and val/. A copy of 128 pixels, some 50 MB:
                      python -c "from bench.sets import *; dataset_options('imagenette128', Path('sets'), Path('DIR'))"
                      writes sets/imagenette128, where DIR/imagenette has train/ and val/
  IMAGENETTE_EPOCHS=N epochs on it (default: as many as fit into the limit)
  LIMIT=N             seconds for each part, in place of those above
  PYTHON=PATH         the Python to use (default: python3)
  GPU_SH_DEVICE=cpu   try the script with tiny sizes on a CPU

Exit code: 0 if no part failed, 1 if one did, 2 without a GPU or for a wrong name.
END
}

# From here on, everything is exported: each part runs in a bash of its own, under a time limit.
set -a
SKIPPED=77 # exit code of a part that cannot run here
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_results}
PYTHONUNBUFFERED=1 # so that the logs hold every line when a part is stopped
device=${GPU_SH_DEVICE:-cuda}
network='' run='' step='' kernels='--nmb_prototypes 3000 --repetitions 5' codes='64 256 1024 4096' crops='64 256' memory='--repetitions 2' files=64 links=150
if [ "$device" = cpu ]; then
  network='--arch resnet18 --width 8 --blocks 1 1 1 1 --hidden_mlp 16 --feat_dim 8 --nmb_prototypes 10'
  run='--batch_size 8 --size_crops 32 16 --workers 1'
  step='--batch_size 4 --size_crops 32 16 --nmb_crops 2 1 --images 4 --workers 1 --steps 2'
  kernels='--nmb_prototypes 30 --repetitions 2' codes=16 crops=16
  memory='--batch_size 4 --size_crops 32 16 --nmb_crops 2 1 --nmb_prototypes 10 --repetitions 2'
  files=4 links=4
fi

part_build() {
  # For this GPU only, which is quicker.
  if [ "$device" = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$($PYTHON -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  fi
  SINKHORN_EXT_BUILD=strict $PYTHON setup.py build_ext --inplace
  $PYTHON -m sinkhorn_ext
  [ "$device" = cpu ] || $PYTHON -c 'import sinkhorn_ext; assert sinkhorn_ext.backend("cuda") == "cuda"'
}

part_cuda_tests() {
  has_module pytest || { echo "skipped: pytest is not installed"; return $SKIPPED; }
  # The tests that need a GPU, and no others: those with the mark needs_gpu of conftest.py.
  cat >"$temporary/gpu_tests_only.py" <<'END'
def pytest_collection_modifyitems(items):
    import sinkhorn_ext

    sinkhorn_ext.fused.devices = ()  # float64 has no CUDA kernels, and to compile its tests takes minutes: part fused
    items[:] = [item for item in items if any(m.kwargs.get("reason") == "no GPU" for m in item.iter_markers("skipif"))]
END
  # -v writes a line when a test ends. A test file that cannot be imported does not stop the others.
  local parallel=''
  if has_module xdist; then parallel='-n 4'; fi
  PYTHONPATH="$temporary:${PYTHONPATH:-}" $PYTHON -m pytest -v --tb=short --durations=5 -p no:cacheprovider \
    -p gpu_tests_only --continue-on-collection-errors $parallel $(grep -lE 'needs_gpu|DEVICES' tests/test_*.py)
}

part_step() {
  # The steps of a turn have to be a multiple of the workers: their batches arrive in bursts.
  $PYTHON -m bench step --device "$device" --repetitions 2 --steps 10 --workers 10 --compile "${1:-off}" \
    --json "$temporary/step.json" $step
}

part_step_compiled() {
  part_step on
}

part_kernels() {
  $PYTHON -m bench sinkhorn --device "$device" --batch_size $codes $kernels --json "$temporary/sinkhorn.json"
  $PYTHON -m bench loss --device "$device" --batch_size $crops $kernels --json "$temporary/loss.json"
}

part_fused() {
  # In these tables `fallback` and `ours` are the fused form. It should not be slower than `published`.
  SINKHORN_EXT=fused $PYTHON -m bench sinkhorn loss --device "$device" --batch_size $crops $kernels 2>&1 | tee "$temporary/fused.txt"
  if grep "does not work here" "$temporary/fused.txt"; then return 1; fi
  has_module pytest || return 0
  SINKHORN_EXT=fused $PYTHON -m pytest -q -p no:cacheprovider tests/test_sinkhorn.py \
    -k "$device and (any_number or gradcheck or two_calls or autocast or replaying)"
}

part_memory() {
  $PYTHON -m bench memory --device "$device" $memory
  local common="--dataset shapes --arch resnet18 --device $device --seed 1 --epochs 1 --log_freq 20 $network"
  local parts='--accumulate 4 --checkpoint_activations' batch=64
  if [ "$device" = cpu ]; then common="${common/--dataset shapes/--data_path $temporary/noise}" batch=8; write_noise "$temporary/noise"; fi
  $PYTHON train.py $common --batch_size $batch $parts --compile off --dump_path "$temporary/eager"
  $PYTHON train.py $common --batch_size $batch $parts --compile on --dump_path "$temporary/compiled"
  $PYTHON - "$temporary/eager" "$temporary/compiled" <<'END'
import json, sys
from pathlib import Path
rows = [[json.loads(line) for line in (Path(run) / "metrics.jsonl").open()] for run in sys.argv[1:]]
eager, compiled = ([row["epoch_loss"] for row in run if "epoch_loss" in row] for run in rows)
print("epoch losses: eager", eager, "compiled", compiled)
assert eager and all(abs(a - b) < 0.02 * a for a, b in zip(eager, compiled, strict=True))
END
}

write_noise() { # 80 images of 32 pixels into a new folder
  $PYTHON -c "import sys; from pathlib import Path; import numpy as np; from PIL import Image; folder = Path(sys.argv[1])
folder.mkdir(); [Image.fromarray(np.random.randint(0, 256, (32, 32, 3), np.uint8)).save(folder / f'{i}.png') for i in range(80)]" "$1"
}

part_photos() {
  if [ -z "${PHOTOS:-}" ]; then
    echo "skipped: set PHOTOS to a folder of photographs"
    return $SKIPPED
  fi
  local code=0 checkpoint=$temporary/photos/checkpoint.pth
  # The evaluation gets the last 30 seconds. 124: training reached its limit, which is no failure.
  timeout --foreground --signal=INT --kill-after=5 $((limit - 30)) \
    $PYTHON train.py --data_path "$PHOTOS" --arch resnet18 --epochs "${PHOTOS_EPOCHS:-20}" --log_freq 20 \
    --device "$device" --dump_path "$temporary/photos" $network || code=$?
  [ $code = 0 ] || [ $code = 124 ] || return $code
  [ -e "$checkpoint" ] || { echo "no epoch was completed in $((limit - 30)) s: raise LIMIT"; return 1; }
  if [ -d "$PHOTOS/train" ] && [ -d "$PHOTOS/val" ]; then
    $PYTHON eval_linear.py "$checkpoint" --cached --data_path "$PHOTOS" --device "$device"
  else
    echo "not evaluated: $PHOTOS has no train/ and val/"
  fi
}

part_imagenette() {
  if [ -z "${IMAGENETTE:-}" ]; then
    echo "skipped: set IMAGENETTE to its folder"
    return $SKIPPED
  fi
  local started=$SECONDS common="--data_path $IMAGENETTE --arch resnet18 --compile off --device $device --seed 1 $network"
  local code=0 epochs=${IMAGENETTE_EPOCHS:-} whole=$temporary/imagenette checkpoint=$temporary/imagenette/checkpoint.pth
  if [ -z "$epochs" ]; then
    # The second of two epochs tells how many fit. The evaluation gets 45 seconds.
    $PYTHON train.py $common --epochs 2 --dump_path "$temporary/two_epochs"
    epochs=$($PYTHON - "$temporary/two_epochs/metrics.jsonl" $((limit - 45 - (SECONDS - started))) <<'END'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
seconds = [row["epoch_seconds"] for row in rows if "epoch_seconds" in row][-1]
print(max(1, int(0.9 * float(sys.argv[2]) / seconds)))
END
    )
    echo "$epochs epochs fit into the $limit seconds"
  fi
  # 124: training reached its limit, which is no failure; then the last complete epoch counts.
  timeout --foreground --signal=INT --kill-after=5 $((limit - 45 - (SECONDS - started))) \
    $PYTHON train.py $common --epochs "$epochs" --checkpoint_freq 1000 --dump_path "$whole" || code=$?
  [ $code = 0 ] || [ $code = 124 ] || return $code
  # lightly's protocol; it publishes the best of all epochs, this is the last one.
  $PYTHON eval_linear.py "$checkpoint" --cached --data_path "$IMAGENETTE" --device "$device" \
    --size 128 --resize 128 --knn_k 200 --knn_temperature 0.1
  tail -n 2 "$whole/metrics.jsonl" # with images/s and memory
}

part_faults() {
  local data='--dataset shapes' pid code common
  if [ "$device" = cpu ]; then # 80 images of 32 pixels
    data="--data_path $temporary/noise --batch_size 8"
    write_noise "$temporary/noise"
  fi
  common="$data --arch resnet18 --device $device --seed 1 --log_freq 5 --epochs 3 $network"
  if [ "$device" = cuda ]; then
    if $PYTHON train.py $common --width 1024 --batch_size 1000 --dump_path "$temporary/memory" >"$temporary/memory.txt" 2>&1; then
      echo "expected: out of memory"
      return 1
    fi
    tail -n 1 "$temporary/memory.txt"
    grep -q '^error: the GPU is out of memory; lower --batch_size' "$temporary/memory.txt"
    if grep -q Traceback "$temporary/memory.txt"; then return 1; fi
  fi
  # A run that SIGTERM stops in its second epoch, and resumed, has the losses of one that runs through, within noise.
  [ "$device" = cpu ] || common="$common --width 16 --blocks 1 1 1 1 --hidden_mlp 256"
  $PYTHON train.py $common --dump_path "$temporary/through"
  $PYTHON train.py $common --dump_path "$temporary/stopped" >"$temporary/stopped.txt" &
  pid=$!
  while ! grep -q '^epoch 2/3  step' "$temporary/stopped.txt"; do sleep 0.2; done
  kill -TERM $pid
  code=0
  wait $pid || code=$?
  [ $code = 143 ] || { echo "expected exit code 143 after SIGTERM, got $code"; return 1; }
  $PYTHON train.py $common --dump_path "$temporary/stopped"
  # Two processes that share the GPU, over gloo, with BatchNorm over both; then the same run as one process.
  $PYTHON train.py $common --dump_path "$temporary/two" --epochs 1 >/dev/null # one process, to compare with
  local batch=32
  [ "$device" = cuda ] || batch=4
  SWAV_BACKEND=gloo $PYTHON -m torch.distributed.run --standalone --nproc_per_node=2 train.py $common --epochs 1 \
    --batch_size $batch --checkpoint_minutes 0.02 --dump_path "$temporary/shared"
  $PYTHON train.py $common --epochs 2 --dump_path "$temporary/shared"
  $PYTHON - "$temporary" <<'END'
import json, sys
from pathlib import Path

def losses(run, key="epoch_loss"):
    rows = map(json.loads, (Path(sys.argv[1]) / run / "metrics.jsonl").open())
    return [row[key] for row in rows if key in row]

through, stopped, one, two = map(losses, ("through", "stopped", "two", "shared"))
print("epoch losses: through", through, "stopped", stopped, "one process", one, "two, then one", two)
assert len(stopped) == 3 and all(abs(a - b) < 0.02 * a for a, b in zip(through, stopped))
assert len(two) == 2 and abs(one[0] - two[0]) < 0.02 * one[0] and two[1] < two[0]
rows = map(json.loads, (Path(sys.argv[1]) / "stopped" / "metrics.jsonl").open())
steps = [row["step"] for row in rows if "loss" in row]
assert len(steps) == len(set(steps)), "a step was logged twice"
END
}

part_profile() {
  cat >"$temporary/kernels.py" <<'END'
"""Codes of 4096 x 3000 and the loss of 8 x 256 x 3000, twenty times. With a file name: write the slowest kernel there."""
import sys
sys.path.insert(0, "")
import torch
from torch.profiler import ProfilerActivity, profile
from bench.sinkhorn import random_scores
from sinkhorn_ext import sinkhorn, sinkhorn_potentials, swav_loss

device = torch.device(sys.argv[1])
rows, columns = (4096, 3000) if device.type == "cuda" else (64, 30)
scores, crops = random_scores(1, rows, columns, device)[0], random_scores(8, rows // 16, columns, device)
crops.requires_grad_()
out = torch.empty_like(scores)

def work():
    sinkhorn(scores, out=out)
    potentials = sinkhorn_potentials(crops.detach()[:2])
    swav_loss(crops, potentials).backward()

work()  # the first call loads the kernels
kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
with profile(activities=[kind]) as profiler:
    for _ in range(20):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
events = profiler.key_averages()
total = "device_time_total" if device.type == "cuda" else "self_cpu_time_total"
print(events.table(sort_by=total, row_limit=12, max_name_column_width=70), flush=True)
if len(sys.argv) > 2:
    ours = [event for event in events if "at::" not in event.key and "elementwise" not in event.key]
    open(sys.argv[2], "w").write(max(ours, key=lambda event: getattr(event, total)).key)
END
  $PYTHON "$temporary/kernels.py" "$device" "$temporary/slowest"
  command -v ncu >/dev/null || { echo "no counters: ncu is not installed"; return 0; }
  # The name without its return type, template and arguments. The third launch, when caches are warm.
  local name
  name=$(sed 's/(anonymous namespace):://g; s/[<(].*//; s/.*[ :]//' "$temporary/slowest")
  ncu --kernel-name "regex:$name" --launch-skip 2 --launch-count 1 --section SpeedOfLight --section Occupancy \
    --section MemoryWorkloadAnalysis --section WarpStateStats $PYTHON "$temporary/kernels.py" "$device" \
    >"$temporary/ncu.txt" 2>&1 || true
  if grep -q ERR_NVGPUCTRPERM "$temporary/ncu.txt"; then echo "no counters: they cannot be read here"; return 0; fi
  grep -v '^ *$' "$temporary/ncu.txt"
}

part_images_per_s() {
  $PYTHON - "$temporary/jpeg" "$files" "$links" <<'END'
import os, sys
from pathlib import Path
sys.path.insert(0, "")
from bench.pipeline import PHOTO, write_photos
folder, files, links = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
size = write_photos(folder, files, *PHOTO)
for path in list(folder.iterdir()):
    for i in range(1, links):
        os.link(path, path.with_name(f"{path.stem}-{i}.jpg"))
print(f"{files} JPEG files of {PHOTO[0]}x{PHOTO[1]} pixels, {size / 1e3:.0f} KB, {links} names each", flush=True)
END
  $PYTHON train.py @recipes/200ep_bs256.args --batch_size 256 --data_path "$temporary/jpeg" --epochs 1 --cache off \
    --log_freq 10 --compile off --device "$device" --dump_path "$temporary/images_per_s" $network $run
  # The log lines of the run, in full.
  cat "$temporary/images_per_s/metrics.jsonl"
}

has_module() {
  $PYTHON -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}
set +a

# What to run

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
names=$(awk 'NF { print $1 }' <<<"$PARTS")
for name in "$@"; do
  awk 'NF { print $1 }' <<<"$PARTS$BY_NAME" | grep -qx -- "$name" || {
    echo "error: no part is named $name; the parts are:" $(awk 'NF { print $1 }' <<<"$PARTS$BY_NAME") >&2
    exit 2
  }
done
if [ "$device" != cpu ] && ! $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: no GPU here; GPU_SH_DEVICE=cpu tries the parts with tiny sizes" >&2
  exit 2
fi

mkdir -p "$OUT"
export temporary=$(mktemp -d)
part_pid=''
clean_up() {
  if [ -n "$part_pid" ]; then kill -KILL -- "-$part_pid" 2>/dev/null || true; fi
  rm -rf "$temporary"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

{
  date -u '+%F %T UTC'
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  $PYTHON -c 'import platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")'
  echo 'part, seconds, exit code (0: passed, 77: skipped, 124 or 137: stopped by its time limit)'
} | tee "$OUT/summary.txt"

failed=0
set -m # each part gets a process group of its own, so that nothing of it is left when the next one starts
for name in ${@:-$names}; do
  read -r limit text <<<"$(awk -v name="$name" '$1 == name { $1 = ""; print }' <<<"$PARTS$BY_NAME")"
  export limit=${LIMIT:-$limit}
  started=$SECONDS code=0
  echo "== $name, at most $limit s: $text" | tee "$OUT/$name.log"
  # SIGINT lets Python print what it has. tee is not waited for: a process that outlives its part would keep it open.
  timeout --signal=INT --kill-after=10 "$limit" bash -euo pipefail -c "part_$name" > >(tee -a "$OUT/$name.log") 2>&1 &
  part_pid=$!
  wait "$part_pid" || code=$?
  kill -KILL -- "-$part_pid" 2>/dev/null || true
  part_pid=''
  sleep 0.2 # for tee's last lines
  echo "$name $((SECONDS - started)) $code" | tee -a "$OUT/summary.txt"
  if [ $code != 0 ] && [ $code != $SKIPPED ]; then failed=1; fi
done
echo "results: $OUT/summary.txt and a log for each part"
exit $failed
