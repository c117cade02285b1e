"""Makes the tables of README.md and docs/*.md anew from committed runs, model configs and code.

    python scripts/doc_tables.py --write [FILE...]     # put them into the documents
    python scripts/doc_tables.py --check [FILE...]     # exit code 1 where one is out of date
    python scripts/doc_tables.py FILE...               # print the documents as --write would leave them

A table stands between `<!-- table: NAME key=value ... -->` and `<!-- /table -->`, each on a line of its own; the
functions that make them are in scripts/tables/. Without FILE: all documents.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.tables import TABLES, InputError, filled, stale


def documents() -> list[Path]:
    """README.md and every document in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Exit code 0; 1 where --check finds a table out of date; 2 with one sentence where one cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the tables into the documents")
    action.add_argument("--check", action="store_true", help="name the tables that are out of date")
    parser.epilog = f"Tables: {', '.join(sorted(TABLES))}."
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    arguments = parser.parse_args()
    outdated = 0
    for file in arguments.files or documents():
        try:
            text = file.read_text()
            if arguments.check:
                for call in stale(text):
                    print(f"{file}: the table {call} is out of date; --write makes it anew")
                    outdated += 1
            elif arguments.write:
                if (new := filled(text)) != text:
                    file.write_text(new)
                    print(f"written: {file}")
            else:
                print(filled(text), end="")
        except (InputError, OSError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 2
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
