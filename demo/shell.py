"""The demo's shell: the `tagger` command beside the demo's tables and servers, to try things out."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from demo.tables import DATA, TABLES


def open_shell(environment: Mapping[str, str], folder: Path) -> int:
    """Run the user's shell in a folder that has labels for each table, until it ends; return its exit code.

    Without a terminal `sh` runs the commands of standard input, and ends at the first that fails.
    """
    folder.mkdir(exist_ok=True)
    for table in TABLES:
        _write_labels(DATA / f"{table}.gold.csv", folder / f"{table}.labels.csv")
    command = [os.environ.get("SHELL", "/bin/sh")] if sys.stdin.isatty() else ["sh", "-e"]
    return subprocess.run(command, env={**environment}, cwd=folder, check=False).returncode


def _write_labels(gold: Path, labels: Path) -> None:
    """Write the gold tags of a sample table as `tagger evaluate` reads labels."""
    with gold.open(encoding="utf-8", newline="") as lines, labels.open("w", encoding="utf-8", newline="") as file:
        rows = csv.reader(lines)
        next(rows)
        writer = csv.writer(file)
        writer.writerow(["row_id", "tags"])
        writer.writerows((row_id, "; ".join(tags.split("|"))) for row_id, tags in rows)
