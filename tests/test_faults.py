"""Faults: after each of them the source is as it was, and nothing else is there.

Full disks, failing calls, signals, archives that change while they are read, what may not be read
or written. Each fault is really made, where that can be done; the calls to the system that fail, or
are followed by a signal, are each of them in turn.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

# What a child without rights could not import any more.
import bz2, compileall, ctypes, fcntl, gzip, json, lzma, mmap, tempfile  # isort: skip  # noqa: E401, F401

import vma_tool
from tests import archives
from tests.archives import BLOCK, CLUSTER
from tests.faults import (
    READ_CLOSE,
    ROADS,
    WRITING,
    Before,
    Lines,
    Nth,
    Road,
    Workshop,
    digests,
    has_child,
    in_child,
    open_files,
)
from tests.support import (
    TOOL,
    Answer,
    Argument,
    ToolTest,
    call_tool,
    golden,
    make_read_only,
    require_program,
    require_root,
    run_tool,
    sha256,
    small_file_system,
    snapshot,
    temporary_directory,
    tool_command,
)

SEED = 20251120
WAYS_TO_FAIL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RoadTest(ToolTest):
    """A test that goes roads in a workshop, and looks at what is there afterwards."""

    def setUp(self) -> None:
        super().setUp()
        self.workshop = self.make_workshop()

    def make_workshop(self) -> Workshop:
        return Workshop(self.directory)

    def check_failed(self, road: Road, answer: Answer[bytes], before: object) -> None:
        """Check that a road ended in one clear line, and that nothing is left of it."""
        self.check_error(answer)
        self.assertEqual(snapshot(self.directory), before)

    def check_line(self, answer: Answer[bytes]) -> None:
        self.assertRegex(answer.stderr.decode(), r"\Avma-tool: [^\n]+\n\Z")

    def check_done(self, road: Road, answer: Answer[bytes], printed: bytes) -> None:
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.assertEqual(answer.stdout, printed)
        self.assertEqual(digests(self.directory), self.workshop.wanted(road))

    def gone(self, road: Road) -> bytes:
        """Go a road undisturbed, and return what it printed."""
        answer = self.workshop.go(road)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.check_done(road, answer, answer.stdout)
        self.workshop.undo(road)
        return answer.stdout


class EveryCall(RoadTest):
    """Each call to the system, in turn, fails or is interrupted."""

    def each(
        self,
        road: Road,
        act: Before,
        check: Callable[[Nth, Answer[bytes], object], None],
    ) -> int:
        """Go a road again and again, with `act` ahead of one call more each time, until its end.

        `check` gets the call, the answer, and a snapshot of before. Return how many calls there are.
        """
        number = 0
        while True:
            number += 1
            before, files = snapshot(self.directory), open_files()
            nth = Nth(number, act)
            answer = self.workshop.go(road, nth)
            if not nth.name:
                self.workshop.undo(road)
                return number - 1
            with self.subTest(road.name, call=number, name=nth.name):
                self.assertFalse(has_child(), "a child")
                self.assertEqual(open_files(), files, "open files")
                check(nth, answer, before)
            if snapshot(self.directory) != before:
                self.workshop.undo(road)

    def test_failing(self) -> None:
        """A call that fails ends the road in one line that says so, or does not matter."""
        for road in ROADS.values():
            printed = self.gone(road)
            codes = [0]

            def fail(name: str, codes: list[int] = codes) -> None:
                if name == READ_CLOSE:
                    return
                codes.append(WAYS_TO_FAIL[len(codes) % len(WAYS_TO_FAIL)])
                raise OSError(codes[-1], os.strerror(codes[-1]))

            def check(
                nth: Nth,
                answer: Answer[bytes],
                before: object,
                road: Road = road,
                printed: bytes = printed,
                codes: list[int] = codes,
            ) -> None:
                if answer.returncode:
                    if road.replaces and digests(self.directory) == self.workshop.wanted(road):
                        before = snapshot(self.directory)  # too late to take it back
                    self.check_failed(road, answer, before)
                    why = "no memory for" if nth.name == "mmap" else os.strerror(codes[-1])
                    self.assertRegex(answer.stderr.decode(), f"({NAMED}|{self.directory}).*{why}")
                else:
                    self.check_done(road, answer, printed)
                    self.assertIn(nth.name, HARMLESS)

            self.assertGreater(self.each(road, fail, check), 10)

    def test_signals(self) -> None:
        """A signal at a call ends the road; only what was complete by then may have its name."""
        for road in ROADS.values():
            printed = self.gone(road)
            numbers = [signal.SIGINT]

            def interrupt(_name: str, numbers: list[signal.Signals] = numbers) -> None:
                numbers.append(INTERRUPTIONS[len(numbers) % len(INTERRUPTIONS)])
                signal.raise_signal(numbers[-1])

            def check(
                nth: Nth,
                answer: Answer[bytes],
                before: object,
                road: Road = road,
                printed: bytes = printed,
                numbers: list[signal.Signals] = numbers,
            ) -> None:
                if not answer.returncode:
                    self.check_done(road, answer, printed)
                    return
                self.assertEqual(answer.returncode, 128 + numbers[-1])
                self.check_line(answer)
                if digests(self.directory) != self.workshop.wanted(road):
                    self.assertEqual(snapshot(self.directory), before)

            self.assertGreater(self.each(road, interrupt, check), 10)

    def test_signals_between_calls(self) -> None:
        """A signal may come at any line of the tool, not only at a call."""
        for road in WRITING:
            lines = Lines(0)
            self.workshop.go(road, main_thread=lines)
            self.workshop.undo(road)
            critical = [i for i, name in enumerate(lines.names, 1) if name in CRITICAL]
            others = range(1, len(lines.names) + 1)
            rng = random.Random(f"{SEED}:{road.name}")
            for number in sorted({*critical, *rng.sample(others, min(40, len(others)))}):
                before, files = snapshot(self.directory), open_files()
                lines = Lines(number)
                answer = self.workshop.go(road, main_thread=lines)
                with self.subTest(road.name, line=lines.name):
                    self.assertFalse(has_child(), "a child")
                    self.assertEqual(open_files(), files)
                    if digests(self.directory) != self.workshop.wanted(road):
                        self.assertEqual(answer.returncode, 128 + signal.SIGTERM)
                        self.check_line(answer)
                        self.assertEqual(snapshot(self.directory), before)
                self.workshop.undo(road)

    def test_kills(self) -> None:
        """SIGKILL at any call: old files and complete new ones under all names, nothing else."""
        for road in WRITING:
            calls = Nth(0, lambda name: None)
            self.workshop.go(road, calls)
            self.workshop.undo(road)
            # In front of any other call, nothing has changed since the one before.
            changing = [i for i, name in enumerate(calls.names, 1) if name in CHANGING]
            self.assertGreater(len(changing), 4)
            for number in changing:
                with self.subTest(road.name, call=number, name=calls.names[number - 1]):
                    self.assertTrue(self.killed(road, number) or road.reads in ("-", "in.vma.gz"))
                    self.assertEqual(self.workshop.strange(road), [])
                self.workshop.undo(road)

    def killed(self, road: Road, number: int) -> bool:
        """Go a road in a child that kills itself at a call; return whether it came to that."""
        kill = Nth(number, lambda name: os.kill(os.getpid(), signal.SIGKILL))
        status = in_child(lambda: self.workshop.go(road, kill))
        self.assertIn(status, (0, signal.SIGKILL))
        return os.WIFSIGNALED(status)


# What may fail without harm: it only saves time, or there is nothing left to lose.
HARMLESS = ("posix_fadvise", "open()", READ_CLOSE)
# Where something begins to exist that has to go away again.
CRITICAL = (
    "Directory.__init__", "Directory.create", "Directory.commit", "Output.__init__", "Output._open",
    "Output.__enter__", "make_directory", "open_input", "open_output", "cmd_optimize", "cmd_pack",
    "restore", "write_packed", "Directory.__enter__", "ProgramInput.__init__", "ModuleInput.__init__",
    "Reorderer._create",
)  # fmt: skip
CHANGING = (
    "close", "fchmod", "fchown", "fsync", "ftruncate", "link", "mkdir", "open", "pwritev", "replace",
    "rename", "rmdir", "unlink", "utime", "write", "writev",
)  # fmt: skip
# Each message names what it is about.
NAMED = r"\b(in\.vma|\w+\.vma\b|new\b|empty|full|standard (in|out)put|temporary file|device)"


if __name__ == "__main__":
    unittest.main()
