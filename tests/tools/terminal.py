#!/usr/bin/env python3
"""Draw the README's picture of a terminal: real commands, with what they really print.

Makes a guest as dedup.py does, compresses its backup as vzdump does, runs the commands in a mount
namespace of their own, and writes an SVG.

    python3 tests/tools/terminal.py tests/data/terminal.svg

Needs root, FUSE, and the Debian packages that dedup.py and `zstd` need. Exit status: 1 if a command
failed.
"""

from __future__ import annotations

import argparse
import html
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.tools import dedup

ARCHIVE = "vzdump-qemu-100.vma.zst"
DISK = "disk-drive-scsi0-part1.raw"
COMMANDS = f"""\
vma-tool optimize {ARCHIVE}
vma-tool verify {ARCHIVE}
vma-tool mount {ARCHIVE} /mnt/backup
ls /mnt/backup
mount -o ro,noload,loop /mnt/backup/{DISK} /mnt/disk
cat /mnt/disk/etc/issue
umount /mnt/disk /mnt/backup
"""
# /mnt is there on every system, and empty in here.
SESSION = """
set -eu
mount -t tmpfs tmpfs /mnt
mkdir /mnt/backup /mnt/disk
while IFS= read -r line; do
    printf '$ %s\\n' "$line"
    eval "$line"
done
"""


def record(work: Path) -> list[str]:
    """Run the commands on a guest's backup; return the lines of the terminal."""
    scale = dedup.SCALES["normal"]
    day = work / "day"
    dedup.first_day(day, work, scale, None, random.Random(1))
    dedup.write_archive(day, work / "a.vma", 0)
    dedup.run("zstd", "-q", "--rm", work / "a.vma", "-o", work / ARCHIVE)
    program = work / "bin" / "vma-tool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {dedup.TOOL} "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", SESSION],
        input=COMMANDS.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=work,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"},
        check=False,
    )
    text = done.stdout.decode()
    if done.returncode:
        raise dedup.DedupError(f"exit status {done.returncode}: {text}")
    return [line for line in text.splitlines() if line]


def svg(lines: list[str]) -> str:
    """Draw lines as a dark terminal, which is readable on any background."""
    width = 24 + max(map(len, lines)) * 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {24 + 20 * len(lines)}" '
        'font-family="ui-monospace, monospace" font-size="13">',
        "<style>text { fill: #e6edf3; white-space: pre } .command { fill: #7ee787 }</style>",
        '<rect width="100%" height="100%" rx="8" fill="#161b22"/>',
    ]
    for number, line in enumerate(lines):
        style = ' class="command"' if line.startswith("$ ") else ""
        # Its length is given, as the fonts of systems differ in width.
        out.append(
            f'<text{style} x="12" y="{27 + 20 * number}" textLength="{8 * len(line)}">'
            f"{html.escape(line)}</text>"
        )
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the README's picture of a terminal.")
    parser.add_argument("output", type=Path, metavar="FILE.svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            lines = record(Path(directory))
        except (dedup.DedupError, OSError) as error:
            print(f"terminal.py: {error}", file=sys.stderr)
            return 1
    args.output.write_text(svg(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
