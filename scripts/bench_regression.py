#!/usr/bin/env python3
"""Tell a CI system whether sinter became slower, by baselines that are kept in a folder.

Needs: Python 3 and a built sinter
Usage: scripts/bench_regression.py --baselines DIR [MODEL.gguf...] [-- OPTIONS OF sinter bench]
       scripts/bench_regression.py --baselines DIR --update [MODEL.gguf...] [-- -p 512 -n 128 -r 10]

The folder holds a baseline for each model, device and processor (or GPU), so that machines of several kinds can share it. A
run is compared with the one of this machine; --update measures and replaces it, whatever it was. What follows -- goes to
sinter bench; without -p, -n, -d or -b there, a comparison runs the tests of the baseline. --history also appends each run to
runs.jsonl in the folder and draws trend.svg.

Exit codes:
  0  no test of any model is slower, or the baselines were updated
  1  something could not be measured or compared: other hardware, another model, a broken file
  2  the command line is wrong
  3  a test is slower by more than the threshold
  4  there is no baseline for this machine: run it with --update, and keep the folder
If several happen, 1 goes before 4, and 4 before 3.
"""
import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys

FINE, FAILED, SLOWER, NO_BASELINE = 0, 1, 3, 4


class Failure(Exception):
    """What went wrong, in words for the user."""


def arguments():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model files (GGUF); default: the embedded model")
    parser.add_argument("--baselines", required=True, metavar="DIR", help="the folder")
    parser.add_argument("--sinter", default="target/release/sinter", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--threshold", default="10", metavar="PER_CENT", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="as sinter bench has it; default: %(default)s")
    parser.add_argument("--update", action="store_true", help="measure and keep the results as the new baseline")
    parser.add_argument("--history", action="store_true", help="append to runs.jsonl and draw trend.svg")
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1:]
    args = parser.parse_args(ours)
    args.options = theirs
    return args


def processor():
    """The processor's model, as sinter finds it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            for line in info:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.machine()


def graphics(args):
    """The name of the GPU that --device means: of the first one listed, or of that number."""
    done = subprocess.run([args.sinter, "devices"], capture_output=True, text=True, check=False)
    gpus = re.findall(r"^(hip:\d+) +(.*?) \(", done.stdout, re.MULTILINE)
    for device, name in gpus:
        if args.device in ("hip", device):
            return name
    raise Failure(f"there is no GPU {args.device}; sinter devices says:\n{(done.stdout + done.stderr).strip()}")


def machine(args):
    if args.device == "cpu":
        return f"{processor()} {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    return f"{graphics(args)} {processor()}"


def place(model, on, args):
    """Where the baseline of a model on this machine is kept."""
    name = os.path.splitext(os.path.basename(model))[0] if model else "embedded"
    words = re.sub(r"[^a-z0-9.]+", "-", f"{name} {args.device} {on}".lower()).strip("-.")
    return os.path.join(args.baselines, f"{words}.json")


def bench(model, path, args):
    """Runs one model; how it went, as an exit code."""
    exists = os.path.isfile(path)
    if not exists and not args.update:
        print(f"error: there is no baseline {path}; --update makes it", file=sys.stderr)
        return NO_BASELINE
    command = [args.sinter, "bench", *([model] if model else []), "--device", args.device]
    command += ["--save", path] if args.update else ["--compare", path, "--threshold", args.threshold]
    if args.history:
        folder = args.baselines
        command += ["--history", os.path.join(folder, "runs.jsonl"), "--trend", os.path.join(folder, "trend.svg")]
    command += args.options
    print("$", shlex.join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    return code if code in (FINE, SLOWER) else FAILED


def main():
    args = arguments()
    try:
        found = shutil.which(args.sinter)
        if not found:
            raise Failure(f"{args.sinter} is not a program that can be run; is it built? --sinter says where it is")
        args.sinter = found
        on = machine(args)
        if args.update:
            os.makedirs(args.baselines, exist_ok=True)
        codes = [bench(model, place(model, on, args), args) for model in args.models or [None]]
    except (Failure, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    return next((code for code in (FAILED, NO_BASELINE, SLOWER) if code in codes), FINE)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
