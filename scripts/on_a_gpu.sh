#!/usr/bin/env bash
# Tests and measures on a machine with a GPU, where nothing need be built.
#
#   scripts/on_a_gpu.sh pack FOLDER            builds the program and the tests that run kernels, and copies them there
#   scripts/on_a_gpu.sh run FOLDER [MODEL...]  runs those tests, then measures each model, and prints one table last
#
# Tests read the checkout that they were built in, by its path: where they run it must lie at the same. What they print is kept in FOLDER.
# SANITIZE=SECONDS lets compute-sanitizer look at some of them for so long each, those of many formats in eight parts at once; DEVICE is where models are measured (hip unless told).
set -euo pipefail
cd "$(dirname "$0")/.."
tests=(hip oracle sequences states differential)

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }

pack() {
  local folder=$1 test built
  mkdir -p "$folder"
  cargo build --release
  install target/release/sinter "$folder"
  for test in "${tests[@]}"; do
    built=$(cargo test --release --no-run --test "$test" 2>&1 | sed -n "s/^ *Executable tests\/$test.rs (\(.*\))$/\1/p")
    install "$built" "$folder/$test"
  done
  (cd "$folder" && strip sinter "${tests[@]}")
  du -sh "$folder"
}

# A line of the table: a name, what came of it, and the seconds that it took.
rows=()
row() { rows+=("$(printf '%-58s %-28s %5ss' "$1" "$2" "$3")"); }

# Runs a command for a row; $2 finds what to say of its output. What fails, does not come to its end or finds no GPU is told at the end.
bad=()
timed() {
  local name=$1 said=$2 log words start=$SECONDS
  shift 2
  log=$folder/${name//[^a-z0-9_.-]/_}.log
  "$@" >"$log" 2>&1 || bad+=("$name")
  words=$(sed -nE "$said" "$log" | tail -1 | cut -c1-28 | grep . || echo 'see its log')
  if grep -q 'skipped on GPUs' "$log"; then
    bad+=("$name") words='ran on no GPU'
  fi
  row "$name" "$words" $((SECONDS - start))
}

# One of the tests under a tool of compute-sanitizer; it must have run.
sanitized() {
  local tool=$1 test=$2 parts=1 part waits=()
  case $test in *formats* | *tiles* | *depths*) parts=8 ;; esac
  for ((part = 0; part < parts; part++)); do
    SINTER_TEST_PART=$part/$parts timeout "$SANITIZE" compute-sanitizer --error-exitcode 9 --tool "$tool" \
      "$folder/${test% *}" --exact "${test#* }" --test-threads 1 >"$folder/part-$part.log" 2>&1 &
    waits+=($!)
  done
  local failed=0
  for ((part = 0; part < parts; part++)); do
    wait "${waits[part]}" && grep -q ' 1 passed' "$folder/part-$part.log" || { failed=1; echo "part $part of $test did not pass"; }
    cat "$folder/part-$part.log"
  done
  return $failed
}

run() {
  folder=$(realpath "$1")
  shift
  local device=${DEVICE:-hip} test model sinter=$folder/sinter
  local passed='s/^test result: (.*); [0-9]+ ignored.*/\1/p'
  # Where the tests look for the program.
  mkdir -p target/release
  [[ -e target/release/sinter ]] || ln -s "$sinter" target/release/sinter
  "$sinter" devices
  for test in "${tests[@]}"; do
    timed "test $test" "$passed" "$folder/$test" --test-threads 4
  done
  if [[ -n ${SANITIZE:-} ]]; then
    export SINTER_TEST_ON=gpu SINTER_TEST_CASES=1
    for test in 'hip several_streams_on_a_gpu_compute_what_one_does' 'hip kernels_on_a_gpu_compute_what_their_bodies_say' \
      'hip steps_of_some_sizes_of_all_formats_on_a_gpu' 'hip large_tiles_on_a_gpu' 'hip warps_that_share_rows_on_a_gpu' \
      'hip heads_of_128_at_all_depths_on_a_gpu' 'oracle every_kernel_computes_its_body' \
      'oracle every_subset_of_the_fusions_computes_the_same' 'sequences scheduled_texts_are_those_of_sessions'; do
      for tool in memcheck racecheck; do
        timed "$tool $test" 's/^=+ ((ERROR|RACECHECK) SUMMARY: .*)/\1/p' sanitized $tool "$test"
      done
    done
  fi
  for model in "$@"; do
    for what in '-p 512 -n 0' '-p 0 -n 128' '-p 0 -n 128 -d 4096' '-p 0 -n 128 -d 16384' '-p 0 -n 64 -b 8'; do
      # shellcheck disable=SC2086
      timed "bench $(basename "$model") $what" 's/.*"median_ts": ?([0-9]+\.?[0-9]?).*/\1 t\/s/p' "$sinter" bench "$model" --device "$device" -r 3 -o jsonl $what
    done
  done
  printf '%s\n' "${rows[@]}"
  [[ ${#bad[@]} -eq 0 ]] || { printf 'not as it should be: %s\n' "${bad[@]}"; exit 1; }
}

case ${1:-} in
  pack) [[ $# -eq 2 ]] || usage; pack "$2" ;;
  run) [[ $# -ge 2 ]] || usage; shift; run "$@" ;;
  *) usage ;;
esac
