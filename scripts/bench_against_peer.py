#!/usr/bin/env python3
"""Measure sinter and llama.cpp side by side, taking turns, and print how they compare.

Needs: Python 3, a built sinter, and the llama-bench of a built llama.cpp
Usage: scripts/bench_against_peer.py --peer PATH/llama-bench MODEL.gguf... -p 512 -n 128 -d 0 -t 2 --pairs 5

A pair is one run of each, right after one another, so that what else happens on the machine happens to both; who goes
first changes from pair to pair. The ratio is sinter's speed over the peer's within a pair. Of speeds and ratios the median
is printed, of ratios also the range. A share is what a decode step must read (sinter's bytes_per_step) times steps per
second over the machine's read bandwidth (as sinter bench measures it); a model that fits the caches can exceed 100 %.
The peer always copies its logits, so its figure stands beside sinter's with and without.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys


class Failure(Exception):
    """What went wrong, in words for the user."""


def arguments():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model files (GGUF)")
    parser.add_argument("--peer", required=True, metavar="PATH", help="llama-bench of llama.cpp")
    parser.add_argument("--sinter", default="target/release/sinter", metavar="PATH", help="default: %(default)s")
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N,…", help="default: %(default)s")
    parser.add_argument("-n", "--n-gen", default="128", metavar="N,…", help="default: %(default)s")
    parser.add_argument("-d", "--n-depth", default="0", metavar="N,…", help="default: %(default)s")
    parser.add_argument("-r", "--repetitions", type=at_least_one, default=1, metavar="N",
                        help="repetitions within a run; default: %(default)s")
    parser.add_argument("-t", "--threads", type=at_least_one, default=os.cpu_count() or 1, metavar="N",
                        help="default: all cores")
    parser.add_argument("--pairs", type=at_least_one, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--peer-args", type=shlex.split, default=[], metavar="ARGS",
                        help="more arguments for the peer, as in --peer-args='-ngl 99 -fa 1'")
    parser.add_argument("--sinter-args", type=shlex.split, default=[], metavar="ARGS", help="the same for sinter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args()


def at_least_one(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def executable(path):
    found = shutil.which(path)
    if not found:
        raise Failure(f"{path} is not a program that can be run; is it built?")
    return found


def run(command):
    """The results that a benchmark prints."""
    shown = shlex.join(command)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        code = done.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise Failure(f"{shown} {how}" + (f":\n{done.stderr.strip()}" if done.stderr.strip() else ""))
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise Failure(f"{shown} printed no JSON: {error}") from error


def key(result):
    return result["n_prompt"], result["n_gen"], result["n_depth"]


def compare(model, args):
    """Runs the pairs of one model and gathers, test by test, what they say."""
    common = ["-m", model, "-p", args.n_prompt, "-n", args.n_gen, "-d", args.n_depth,
              "-r", str(args.repetitions), "-t", str(args.threads), "-o", "json"]
    commands = {"peer": [args.peer, *common, *args.peer_args],
                "sinter": [args.sinter, "bench", *common, *args.sinter_args]}
    tests, bandwidths = {}, []
    for pair in range(args.pairs):
        order = ["peer", "sinter"] if pair % 2 == 0 else ["sinter", "peer"]
        results = {}
        for engine in order:
            print(f"{model}: pair {pair + 1} of {args.pairs}, {engine}", file=sys.stderr)
            results[engine] = run(commands[engine])
        speeds = {key(result): result["avg_ts"] for result in results["peer"]}
        for result in results["sinter"]:
            if key(result) not in speeds:
                raise Failure(f"{model}: the peer did not measure {result['test']}")
            test = tests.setdefault(result["test"], {"bytes_per_step": result["bytes_per_step"],
                                                     "peer_ts": [], "sinter_ts": []})
            test["peer_ts"].append(speeds[key(result)])
            test["sinter_ts"].append(result["avg_ts"])
            if result["read_bandwidth_gbs"] is not None:
                bandwidths.append(result["read_bandwidth_gbs"])
    bandwidth = statistics.median(bandwidths) if bandwidths else None
    return {"model": model, "read_bandwidth_gbs": bandwidth,
            "tests": [summary(name, test, bandwidth) for name, test in tests.items()]}


def summary(name, test, bandwidth):
    ratios = [sinter / peer for sinter, peer in zip(test["sinter_ts"], test["peer_ts"])]
    row = {"test": name, **test, "ratios": ratios, "ratio": statistics.median(ratios)}
    for engine in "peer", "sinter":
        speed = statistics.median(test[f"{engine}_ts"])
        row[f"{engine}_median_ts"] = speed
        known = test["bytes_per_step"] is not None and bandwidth
        row[f"{engine}_bandwidth_share"] = test["bytes_per_step"] * speed / (bandwidth * 1e9) if known else None
    return row


def table(comparison, args):
    bandwidth = comparison["read_bandwidth_gbs"]
    measured = f", read bandwidth {bandwidth:.1f} GB/s" if bandwidth else ""
    yield f"{comparison['model']}: {args.pairs} pairs, {args.threads} threads{measured}"
    yield ""
    cells = [("test", "peer t/s", "sinter t/s", "sinter/peer", "min..max", "peer share", "sinter share")]
    for row in comparison["tests"]:
        shares = [row[f"{engine}_bandwidth_share"] for engine in ("peer", "sinter")]
        cells.append((row["test"], f"{row['peer_median_ts']:.2f}", f"{row['sinter_median_ts']:.2f}",
                      f"{row['ratio']:.3f}", f"{min(row['ratios']):.3f}..{max(row['ratios']):.3f}",
                      *("" if share is None else f"{share:.0%}" for share in shares)))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("-" * (width - 1) + ":" for width in widths))
    for line in cells:
        yield "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |"


def main():
    args = arguments()
    try:
        args.peer, args.sinter = executable(args.peer), executable(args.sinter)
        for model in args.models:
            if not os.path.isfile(model):
                raise Failure(f"there is no model file {model}")
        comparisons = []
        for model in args.models:
            comparisons.append(compare(model, args))
            if not args.json:
                print(*table(comparisons[-1], args), "", sep="\n", flush=True)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    if args.json:
        settings = {name: getattr(args, name) for name in
                    ("peer", "sinter", "peer_args", "sinter_args", "repetitions", "threads", "pairs")}
        print(json.dumps({**settings, "models": comparisons}, indent=2))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
