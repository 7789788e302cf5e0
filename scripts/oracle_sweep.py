#!/usr/bin/env python3
"""Compare sinter's logits with an independent reference for small models of every shape and format.

Needs: Python 3, numpy, a built sinter, and two programs that are no part of it:
  --generator writes a model:       GENERATOR SHAPE FTYPE OUT.gguf; says with --list what there is ("shapes: …", "ftypes: …")
  --reference computes its logits:  REFERENCE MODEL.gguf OUT.npy TOKEN…
Usage: scripts/oracle_sweep.py --generator make_synthetic_gguf.py --reference reference_logits.py --sinter target/release/sinter

A shape takes part whose name begins with --prefix, in all formats or those of --ftypes. Printed is the largest relative
error |a - b| / |b| of a row of logits in two prompts: exactly, exactly without fusions, and by default. Random weights of
real sizes round more than the bound of the default path, which is for small models: see --default-bound. Formats whose blocks do not divide a shape's rows are skipped: the
generator says so. The exit status is 1 if an error exceeds its bound.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

PROMPTS = [[1, 42, 299, 5, 42, 0, 130, 299, 17, 255, 1, 64], [7, 288, 3, 3, 150, 1, 222, 9]]
# What sinter is told.
PATHS = {"exact": ["--exact"], "exact --no-fuse": ["--exact", "--no-fuse"], "default": []}
# The largest relative error it may make under --exact.
EXACT = 1e-5


def arguments():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, metavar="PATH")
    parser.add_argument("--reference", required=True, metavar="PATH")
    parser.add_argument("--sinter", default="target/release/sinter", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--prefix", default="tiny-", help="default: %(default)s")
    parser.add_argument("--ftypes", metavar="FTYPE,…", help="default: all there are")
    parser.add_argument("--default-bound", type=float, default=4e-2, metavar="X", help="default: %(default)s")
    return parser.parse_args()


def run(*command):
    """What a program prints; its complaint ends the sweep."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def choices(generator, kind):
    """What the generator lists as "kind: a, b, c"."""
    for line in run(sys.executable, generator, "--list").splitlines():
        label, _, names = line.partition(": ")
        if label == kind:
            return names.split(", ")
    sys.exit(f"{generator} --list names no {kind}")


def generate(generator, shape, ftype, path):
    """Writes a model; whether there is one of this shape and format."""
    done = subprocess.run([sys.executable, generator, shape, ftype, path], capture_output=True, text=True)
    if done.returncode and "not a multiple of the block" not in done.stderr:
        sys.exit(f"{generator} {shape} {ftype}: {done.stderr.strip()}")
    return done.returncode == 0


def worst(found, expected):
    """The largest relative error of a row; not a number if anything is none."""
    if found.shape != expected.shape:
        sys.exit(f"logits {found.shape}, but the reference has {expected.shape}")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return np.max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))


def errors(args, folder, model):
    """The error of each path."""
    expected, found = str(folder / "expected.npy"), str(folder / "found.npy")
    result = [0.0] * len(PATHS)
    for prompt in PROMPTS:
        tokens = list(map(str, prompt))
        run(sys.executable, args.reference, model, expected, *tokens)
        for i, flags in enumerate(PATHS.values()):
            run(args.sinter, "logits", model, "--tokens", ",".join(tokens), "--out", found, *flags)
            # Not a number is larger than any.
            result[i] = np.maximum(result[i], worst(np.load(found), np.load(expected)))
    return result


def main():
    args = arguments()
    shapes = [shape for shape in choices(args.generator, "shapes") if shape.startswith(args.prefix)]
    ftypes = choices(args.generator, "ftypes")
    if args.ftypes:
        wanted = args.ftypes.split(",")
        if unknown := sorted(set(wanted) - set(ftypes)):
            sys.exit(f"no format {unknown[0]!r}; there are {', '.join(ftypes)}")
        ftypes = wanted
    bounds = [EXACT if "--exact" in flags else args.default_bound for flags in PATHS.values()]
    rows, failed = {}, 0
    print("| model | " + " | ".join(PATHS) + " |\n|---|" + "---|" * len(PATHS))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = str(folder / "model.gguf")
        for shape in shapes:
            for ftype in ftypes:
                if not generate(args.generator, shape, ftype, model):
                    continue
                row = errors(args, folder, model)
                cells = []
                for error, bound in zip(row, bounds):
                    # Not a number exceeds every bound.
                    exceeds = not error <= bound
                    failed += exceeds
                    cells.append(f"{error:.1e}" + " FAILED" * exceeds)
                print(f"| {shape} {ftype} | " + " | ".join(cells) + " |", flush=True)
                rows[shape, ftype] = row
    if not rows:
        sys.exit(f"no shape begins with {args.prefix!r}")
    largest = np.max(list(rows.values()), axis=0)
    print("| largest | " + " | ".join(f"{error:.1e}" for error in largest) + " |")
    print("| bound | " + " | ".join(f"{bound:.0e}" for bound in bounds) + " |")
    print(f"{len(rows)} models of {len(shapes)} shapes and {len(ftypes)} formats, {failed} errors too large")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
