"""The command line of scripts that hand overrides to the harness: their own options, `--`, then the overrides."""

from __future__ import annotations

import argparse
import sys


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]] | None:
    """The script's own options, and the overrides; run bare, it prints its help, and None is returned."""
    if len(sys.argv) == 1:
        parser.print_help()
        return None
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
