"""One HTML page of what `python -m bench.tables` wrote: tables, figures, what is missing and what failed.

    python -m bench.report out/vtab                      # out/vtab/report.html
    python -m bench.report out/vtab --out page.html

The page holds all that it shows and fetches nothing. The same folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report.page import build
from bench.tables import files
from fastpeft._serve import serve


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a folder of which no page can be made."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of python -m bench.tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")
    parser.add_argument("--title", default="Results", help="heading of the page [Results]")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    path = options.out or options.folder / "report.html"
    text = build(options.folder, options.title)
    files.write(path, text)
    print(f"{path}: {len(text.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
