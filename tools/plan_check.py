"""Hold the cost model against measured runs: errors by source, order of layouts, failures; and fit its constants.

python tools/plan_check.py --rows FILE [FILE …]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megagpt.console import console_here, show
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.plan.check import fit, is_seen, summary
from megagpt.plan.check_report import (
    error_table,
    memory_table,
    page_part,
    plot,
    sensitivity_table,
    skipped_table,
    tau_table,
    worst_table,
    write_page,
)
from megagpt.plan.machine import write_constants
from megagpt.plan.recommended import read_recommended
from megagpt.plan.rows.row import Row, Skipped
from megagpt.plan.rows.tables import is_table, read_table

FOLDER = "MEGAGPT_FACTS"
DESCRIPTION = f"""Predicted against measured step times and memories, by source.

Rows are those of --rows, else of each table under the folder that --facts or ${FOLDER} names. The last line is JSON: of
--rows it speaks of all rows, else of those that the constants were not fitted on."""


def main() -> int:
    """Read, predict, show; the last line of standard output is JSON."""
    args = _flags().parse_args()
    read = [row for path in _tables(args.rows, args.facts) for row in read_table(path)]
    rows, skipped = [r for r in read if isinstance(r, Row)], [r for r in read if isinstance(r, Skipped)]
    if args.fit:
        write_constants(fit(rows, lambda line: print(line, file=sys.stderr, flush=True)))
        print("constants are written; run this again without --fit")
        return 0
    console = console_here()
    unseen = rows if args.rows else [row for row in rows if not is_seen(row)]
    for table in (error_table(rows), tau_table(unseen), memory_table(unseen)):
        show(console, table)
    show(console, worst_table(unseen, args.worst))
    show(console, skipped_table(skipped))
    if args.sensitivity:
        show(console, sensitivity_table(rows))
    if args.plot:
        written = plot(rows, args.plot)
        console.print(f"{len(written)} plots are in {args.plot}")
    if args.page:
        write_page(args.page, page_part(rows, read_recommended(args.recommended) if args.recommended else []))
    print(json.dumps(summary(unseen)))
    return 0


def _tables(rows: list[Path], facts: Path | None) -> list[Path]:
    """The files to read.  Raises: UserError where none is named, or the folder has none."""
    if rows:
        return rows
    named = facts or (Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)
    if named is None:
        raise UserError(f"got no rows, wanted measured runs; give --rows FILE, or --facts or ${FOLDER} a folder")
    found = [path for path in sorted(named.rglob("*.csv")) if is_table(path)]
    if not found:
        raise UserError(f"{named} has no table of measured runs; give --rows FILE, or another folder")
    return found


def _flags() -> ArgumentParser:
    parser = ArgumentParser(prog="tools/plan_check.py", description=DESCRIPTION)
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="tables of measured runs")
    parser.add_argument("--facts", type=Path, help=f"folder with tables of measured runs; default ${FOLDER}")
    parser.add_argument("--fit", action="store_true", help="fit the constants on half of the rows, and write them")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write scatter plots there")
    parser.add_argument("--worst", type=int, default=15, help="rows furthest off to show (default 15)")
    parser.add_argument("--sensitivity", action="store_true", help="show how much each constant matters")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write the tables between the marks of a page")
    parser.add_argument("--recommended", type=Path, metavar="FILE", help="for --page: NVIDIA's recommended layouts")
    return parser


if __name__ == "__main__":
    run_cli(main)
