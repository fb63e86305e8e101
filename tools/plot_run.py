"""Draw the loss curves of one run or several, from their metrics.jsonl.

python tools/plot_run.py runs/a                             # writes runs/a/loss.png
python tools/plot_run.py runs/a runs/b --out compare.png    # both on one plot
"""

from __future__ import annotations

from pathlib import Path

from megagpt.errors import ArgumentParser, run_cli
from megagpt.train.plot import plot_runs


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a metrics.jsonl")
    parser.add_argument("--out", type=Path, help="picture to write; default RUN/loss.png, or loss.png for several")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="what the x axis counts")
    parser.add_argument("--log-x", action="store_true", help="logarithmic x axis")
    args = parser.parse_args()
    single = len(args.runs) == 1 and args.runs[0].is_dir()
    out = args.out or (args.runs[0] / "loss.png" if single else Path("loss.png"))
    plot_runs(args.runs, out, x_axis=args.x, log_x=args.log_x)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_cli(main)
