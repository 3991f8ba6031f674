"""Pythons that are too old, or lack what others have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.checks import ALL_READ, CheckedTest
from tests.support import ROOT, TOOL, Answer, Argument, golden, manifest, sha256, skip

CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]


def pythons(version: str) -> Iterator[str]:
    """Yield where a Python of this version may be: the path, and pyenv's interpreters."""
    found = shutil.which(f"python{version}")
    if found and "shims" not in Path(found).parts:
        yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted((root / "versions").glob(f"{version}.*/bin/python3")))


class TooOld(CheckedTest):
    """Python 3.8 can parse the file, so it can be told."""

    def test_one_line(self) -> None:
        python = next(pythons("3.8"), None)
        if python is None:
            self.skipTest("there is no Python 3.8, which few systems have any more")
        source = self.file("a.vma", golden("live-order"))
        for args in (["--version"], ["verify", source], ["optimize", source], []):
            answer = subprocess.run(
                [python, TOOL, *args], capture_output=True, check=False, stdin=subprocess.DEVNULL
            )
            line = answer.stderr.decode()
            with self.subTest(args=args):
                self.assertEqual((answer.returncode, answer.stdout), (1, b""), line)
                self.assertRegex(line, r"\Avma-tool: [^\n]*Python 3\.9[^\n]*\n\Z")
                self.assertIn("3.8", line)
        self.assertEqual(sha256(source), manifest()["live-order"]["sha256"])


class Lacking(CheckedTest):
    """What CPython on Linux has, and PyPy, macOS or Windows has not."""

    # The script's arguments: where the tool is, what to take away, then the tool's own
    HIDE = """
import sys
root, hidden = sys.argv[1:3]
for name in hidden.split():
    module, _, attribute = name.partition(".")
    if not attribute:
        sys.modules[module] = None
        continue
    __import__(module)
    if hasattr(sys.modules[module], attribute):
        delattr(sys.modules[module], attribute)
sys.path.insert(0, root)
sys.argv[:] = ["vma-tool", *sys.argv[3:]]
import vma_tool
sys.exit(vma_tool.script() if hasattr(vma_tool, "script") else vma_tool.main())
"""

    def run_without(self, hidden: str, *args: Argument) -> Answer[bytes]:
        command = [sys.executable, "-c", self.HIDE, str(ROOT), hidden]
        arguments = [os.fspath(argument) for argument in args]
        return subprocess.run([*command, *arguments], capture_output=True, check=False, timeout=60)

    def check(self, hidden: str) -> None:
        """Check that the commands do their work all the same."""
        source = self.file("a.vma", golden("live-order"))
        number = len(os.listdir(self.directory))
        with self.subTest(hidden=hidden):
            answer = self.run_without(hidden, "verify", source)
            self.assertIn(ALL_READ, self.check_ok(answer))
            self.check_ok(self.run_without(hidden, "list", "--scan", source))
            for command in ("extract", "unpack"):
                target = self.directory / f"{number}-{command}"
                self.check_ok(self.run_without(hidden, command, source, target))
                prefix, suffix = ("disk-", ".raw") if command == "extract" else ("", "")
                for device in manifest()["live-order"]["devices"]:
                    disk = target / f"{prefix}{device['name']}{suffix}"
                    self.assertEqual(sha256(disk), device["sha256"])
            new = self.directory / f"{number}.vma"
            self.check_ok(self.run_without(hidden, "optimize", "-q", source, new))
            self.assertEqual(sha256(new), CANONICAL)
            self.check_ok(self.run_without(hidden, "optimize", "-q", source))
            self.assertEqual(sha256(source), CANONICAL)

    def test_pypy(self) -> None:
        """It has no gc.freeze."""
        self.check("gc.freeze gc.unfreeze")

    def test_macos(self) -> None:
        """It has no extended attributes in `os`, and others of its own."""
        self.check(
            "os.listxattr os.getxattr os.setxattr os.removexattr os.posix_fallocate "
            "os.posix_fadvise os.copy_file_range os.sched_getaffinity"
        )

    def test_windows(self) -> None:
        """It has neither these modules nor these signals."""
        self.check(
            "fcntl termios resource signal.SIGUSR1 signal.SIGHUP signal.pthread_sigmask "
            "os.listxattr os.getxattr os.setxattr os.fchown os.fchmod os.posix_fallocate"
        )

    def test_too_old_is_checked_first(self) -> None:
        """Before anything that an older Python has not."""
        if not hasattr(os, "fork"):
            skip("needs os.fork")
        code = "import sys; sys.version_info = (3, 8, 18, 'final', 0); " + self.HIDE
        answer = subprocess.run(
            [sys.executable, "-c", code, ROOT, "", "--version"], capture_output=True, check=False
        )
        self.assertRegex(answer.stderr.decode(), r"\Avma-tool: [^\n]*Python 3\.9[^\n]*\n\Z")
        self.assertEqual(answer.returncode, 1)
