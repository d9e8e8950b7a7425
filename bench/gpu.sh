#!/usr/bin/env bash
# Build, test and measure everything on a machine with an NVIDIA GPU: offline, within ten minutes, in one go.
#
#   bench/gpu.sh                  into $OUT, or bench/results/gpu
#   bench/gpu.sh --skip-build     the package is installed already
#   bench/gpu.sh --cpu            the same script on the processor with small sizes: does it run?
#
# PYTHON (default python3) must hold torch, triton, pytest, pybind11, setuptools and ninja. Peers that are not
# installed are left out of the comparison. A step that fails or outruns its limit does not stop the next one. At most
# eight files are written; `python bench/store.py results.csv` takes the rows over into bench/results.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda build=1
for argument in "$@"; do
  case "$argument" in
    --cpu) device=cpu ;;
    --skip-build) build=0 ;;
    *) echo "unknown option $argument; there are --cpu and --skip-build" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
out=${OUT:-bench/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
results=$out/results.csv
summary=$out/summary.txt
export PYTHONUNBUFFERED=1
: >"$summary"

# step LIMIT LOG COMMAND...: run the command for at most LIMIT seconds, append what it prints to LOG.
step() {
  local limit=$1 log=$out/$2 started=$SECONDS status=0
  shift 2
  local shown="$*"
  printf '\n$ %s\n' "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
  local word=ok
  [ "$status" -eq 0 ] || word="FAILED ($status)"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || word="TOO LONG (over $limit s)"
  # A program given on the command line is shown by its first line.
  printf '%-18s %4d s  %s\n' "$word" $((SECONDS - started)) "${shown%%$'\n'*}" | tee -a "$summary"
  return "$status"
}

rm -f "$results" "$out"/{build,tests,bench,sanitize,profile}.log
step 20 build.log "$python" -c '
import platform, torch
print(platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available(): print(torch.cuda.get_device_properties(0))'

if [ "$device" = cuda ]; then
  export HYPERFAST_CUDA=1 HYPERFAST_REQUIRE_NATIVE=1
  # Only for this machine's GPU: a build for all of them takes several times as long.
  HYPERFAST_CUDA_ARCHS=${HYPERFAST_CUDA_ARCHS:-$("$python" -c '
import torch
print("%d%d" % torch.cuda.get_device_capability())')}
  if [ -n "$HYPERFAST_CUDA_ARCHS" ]; then export HYPERFAST_CUDA_ARCHS; else unset HYPERFAST_CUDA_ARCHS; fi
fi
[ "$build" -eq 0 ] || step 120 build.log "$python" -m pip install -e . --no-build-isolation --no-deps -q

if [ "$device" = cuda ]; then
  step 110 tests.log "$python" -m pytest -m gpu -q --durations=5
  step 170 bench.log "$python" bench/run.py --device cuda --graph --csv "$results" --seconds 5
  step 25 bench.log "$python" bench/run.py --device cuda --kernels
  for tool in memcheck racecheck; do
    step 40 sanitize.log compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/sanitize.py
  done
else
  step 240 bench.log "$python" bench/run.py --quick --no-verify --repeats 3 --csv "$results"
fi

# The operation whose own step takes longest.
slowest=$("$python" - "$results" <<'PYTHON'
import csv, pathlib, sys

path = pathlib.Path(sys.argv[1])
rows = list(csv.DictReader(path.open())) if path.exists() else []
ours = [row for row in rows if row["provider"] == "hyperfast"]
print(max(ours, key=lambda row: float(row["median_ms"]))["op"] if ours else "")
PYTHON
)
if [ -n "$slowest" ]; then
  quick=()
  [ "$device" = cuda ] || quick=(--quick)
  step 30 profile.log "$python" bench/run.py --op "$slowest" --device "$device" --profile "${quick[@]}"
fi

echo
echo "== results"
[ ! -f "$results" ] || "$python" - "$results" <<'PYTHON'
import csv, sys

for row in csv.DictReader(open(sys.argv[1])):
    print(
        f"{row['op']:<19}{row['case'][:34]:<35}{row['provider']:<28}{row['mode']:<6}{row['median_ms']:>9} ms"
        f"{row['percent_copy'] or '-':>7} % copy {row['kernels'] or '-':>4} kernels {row['peak_mib'] or '-':>6} MiB"
    )
PYTHON
echo "== steps, $SECONDS s in all"
cat "$summary"
! grep -qE 'FAILED|TOO LONG' "$summary"
