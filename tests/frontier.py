# SPDX-License-Identifier: MIT
"""Draw scores against KL, and compare architectures where they cost the LM the same.

    pip install matplotlib
    python eval.py runs/gpt2-layer6 --json gpt2.json   # of a run with several --k
    python tests/frontier.py gpt2.json --out frontier.svg

Several files, of runs with another k or another seed, make one picture. The coders of an
architecture are the points of a curve, one for each k; those with the same k are averaged.
"""

import argparse
import json
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

CHANCE = {"intruder": 0.2, "one_word": 0.2, "detection": 0.5}
CHANCE |= {"intruder_token": 0.2, "detection_lookup": 0.5}  # these two know the token alone
MEASURES = {"kl": np.log, "fvu": np.log, "ce_increase": np.array}  # the last may be negative
LOOKS = {  # colour, marker, and where k is written: points to the right of the marker, and up
    "sae": ("#d55e00", "o", (-12, -12)),
    "transcoder": ("#0080c6", "s", (3, -12)),
    "skip_transcoder": ("#009e73", "^", (-8, 6)),
}
OTHER = "#a64d79", "D", (-8, 6)  # an architecture of a fork


def nan_for_null(record):
    return {key: np.nan if value is None else value for key, value in record.items()}


def read(paths, scores):
    """Return the curve of each architecture, and the baselines of the first file.

    A curve holds arrays over k: of k itself, of each measure, of each score and its error.
    """
    reports = [json.loads(path.read_text(), object_hook=nan_for_null) for path in paths]
    if len({report["run"]["hookpoint"] for report in reports}) > 1:
        sys.exit("error: these files are of different MLPs")
    groups = defaultdict(list)  # coders by architecture and k
    for report in reports:
        for row in report["coders"].values():
            groups[row["arch"], row["k"]].append(row)

    curves = {arch: defaultdict(list) for arch, _ in groups}
    for arch, k in sorted(groups):
        rows, curve = groups[arch, k], curves[arch]
        for key in ("k", *MEASURES, *scores):
            curve[key].append(np.mean([row[key] for row in rows]))
        for score in scores:
            # The error of the mean comes from the errors of the runs, or from the differences
            # between the runs if these are larger.
            of_runs = np.linalg.norm([row[f"{score}_se"] for row in rows]) / len(rows)
            between = np.std([row[score] for row in rows]) / max(1, len(rows) - 1) ** 0.5
            curve[f"{score}_se"].append(max(of_runs, between))
    for curve in curves.values():
        curve.update({key: np.array(numbers) for key, numbers in curve.items()})
    return curves, reports[0]["baselines"]


def mean_between(low, high, curve, measure, score):
    """Return the mean of a curve from low to high on a measure, and its variance.

    The curve is linear between its points. So its mean is a weighted sum of their scores: the
    weight of a point is the mean of the curve that has 1 there and 0 at all other points. The
    variance is that of the scores, as if the measure were exact.
    """
    order = curve[measure].argsort()
    scale = MEASURES[measure]
    x = scale(curve[measure][order])
    at = np.linspace(scale(low), scale(high), 101)
    weights = np.array([np.interp(at, x, one).mean() for one in np.eye(len(x))])
    errors = curve[f"{score}_se"][order]
    return weights @ curve[score][order], weights**2 @ errors**2


def difference(curve, other, measure, score):
    """Say how much higher a curve is than another, on average over where both exist."""
    low = max(curve[measure].min(), other[measure].min())
    high = min(curve[measure].max(), other[measure].max())
    if low >= high:
        return "no overlap"
    mean, variance = mean_between(low, high, curve, measure, score)
    mean_other, variance_other = mean_between(low, high, other, measure, score)
    return f"{mean - mean_other:+.3f}±{(variance + variance_other) ** 0.5:.3f}"


def compare(curves, scores):
    """Print the differences between each two architectures at equal KL, FVU and CE increase."""
    for measure in MEASURES:
        header = [f"at equal {measure}".ljust(32), *scores]
        print("", " ".join(cell.rjust(14) for cell in header), sep="\n")
        for other, arch in combinations(curves, 2):
            cells = [f"{arch} - {other}".ljust(32)]
            for score in scores:
                cells.append(difference(curves[arch], curves[other], measure, score))
            print(" ".join(cell.rjust(14) for cell in cells))


def draw(axes, curves, baselines, score):
    """Draw the curves of one score against KL, with error bars of two standard errors."""
    for arch, curve in curves.items():
        color, marker, offset = LOOKS.get(arch, OTHER)
        x, y, bars = curve["kl"], curve[score], 2 * curve[f"{score}_se"]
        axes.errorbar(x, y, bars, color=color, marker=marker, markersize=5, label=arch)
        for k, *at in zip(curve["k"], x, y):
            axes.annotate(f"{k:g}", at, offset, textcoords="offset points", color=color)
    levels = {name: baselines[name][score] for name in ("neurons", "untrained")}
    levels["chance"] = CHANCE[score]
    for (name, level), style in zip(levels.items(), ("--", "-.", ":")):
        axes.axhline(level, color="#666", linewidth=1, linestyle=style, label=name)
    axes.set_title(f"{score.replace('_', ' ')} (↑ better)")
    axes.set_xlabel("KL, nats/token (← better)")
    axes.set_xscale("log")
    axes.margins(0.12)
    # Mark round numbers. (By default there may be none, on an axis of less than a decade.)
    low, high = axes.get_xlim()
    digits = (1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, help="files that eval.py --json wrote, of one MLP")
    flag("--out", type=Path, default="frontier.svg", help="picture (default: %(default)s)")
    flag("--scores", nargs="+", choices=CHANCE, default=list(CHANCE)[:3], help="a panel for each")
    args = parser.parse_args()
    curves, baselines = read(args.files, args.scores)
    compare(curves, args.scores)

    matplotlib.rcParams |= {"font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "skipcoder"  # the same file from the same numbers
    figure = Figure(figsize=(7.5, 3), layout="constrained")  # 720 px wide, as a README on GitHub
    panels = figure.subplots(1, len(args.scores), squeeze=False)[0]
    for axes, score in zip(panels, args.scores):
        draw(axes, curves, baselines, score)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
