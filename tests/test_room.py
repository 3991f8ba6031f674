"""A target that cannot hold a disk is found out before anything is copied."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

from tests import archives
from tests.archives import CLUSTER, Device
from tests.checks import MIB, CheckedTest, command, mounted, run_counted, sparse_archive
from tests.support import Argument, require_program, run_tool, sha256, snapshot

GIB = 1 << 30
LIMIT = GIB  # of a file's size, for a process
LARGE = 20 * GIB  # ext3 with blocks of 1 KiB holds files of up to 16 GiB
TOO_LARGE = "too large|too big|cannot hold|does not hold"


@functools.cache
def small_disk() -> bytes:
    return archives.disk(random.Random(1), 8 * MIB, "full")


@functools.cache
def two_disks() -> bytes:
    """Return an archive of a disk that fits, and of one of zeros that is too large."""
    large = Device(2, "drive-scsi1", b"", LARGE)
    return sparse_archive(Device(1, "drive-scsi0", small_disk()), large)


class TooLarge(CheckedTest):
    """EFBIG: an old file system, a limit of the process."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", two_disks())
        self.new = self.directory / "new"

    def roads(self, target: Path) -> list[list[Argument]]:
        return [
            ["extract", self.source, target],
            ["unpack", self.source, target],
            ["extract", "-d", "drive-scsi1", "-o", target, self.source],
            ["extract", "-d", "drive-scsi0,drive-scsi1", self.source, target],
        ]

    def test_limit_of_a_process(self) -> None:
        """Nothing is copied of the other disk either, which would fit."""
        prefix = [require_program("prlimit", "util-linux"), f"--fsize={LIMIT}"]
        before = snapshot(self.directory)
        for args in self.roads(self.new):
            with self.subTest(args=args):
                counted = run_counted(*args, prefix=prefix)
                # the disk by its name, or the file that was to hold it
                line = self.failed(counted.answer, 1)
                self.assertTrue("drive-scsi1" in line or str(self.new) in line, line)
                self.assertRegex(line, TOO_LARGE)
                self.assertLess(counted.written, MIB)
                self.assertEqual(snapshot(self.directory), before)

    def test_stream(self) -> None:
        """The header says how large the disks are."""
        prefix = [require_program("prlimit", "util-linux"), f"--fsize={LIMIT}"]
        before = snapshot(self.directory)
        for command_name in ("extract", "unpack"):
            with self.subTest(command_name), open(self.source, "rb") as stdin:
                counted = run_counted(command_name, "-", self.new, prefix=prefix, stdin=stdin)
                line = self.failed(counted.answer, 1)
                self.assertRegex(line, TOO_LARGE)
                self.assertLess(counted.written, MIB)
                self.assertEqual(snapshot(self.directory), before)

    def test_file_system(self) -> None:
        image, room = self.directory / "image", self.directory / "room"
        room.mkdir()
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        command("mke2fs", "e2fsprogs", "-q", "-F", "-t", "ext3", "-b", "1024", image)
        with mounted(room, "-o", "loop", image):
            before = os.listdir(room)
            for args in self.roads(room / "new"):
                with self.subTest(args=args):
                    counted = run_counted(*args)
                    line = self.failed(counted.answer, 1)
                    self.assertRegex(line, TOO_LARGE)
                    self.assertLess(counted.written, MIB)
                    self.assertEqual(os.listdir(room), before)

    def test_what_fits(self) -> None:
        """The same limits, a disk that fits."""
        prefix = [require_program("prlimit", "util-linux"), f"--fsize={LIMIT}"]
        answer = run_tool("extract", "-d", "drive-scsi0", self.source, self.new, prefix=prefix)
        self.check_ok(answer)
        self.assertEqual(sha256(self.new / "disk-drive-scsi0.raw"), sha256(small_disk()))

    def test_sparse(self) -> None:
        """Where the file system can hold it, a disk of zeros takes no room."""
        with open(self.source, "rb") as stdin:
            self.check_ok(run_tool("extract", "-d", "drive-scsi1", "-", self.new, stdin=stdin))
        state = (self.new / "disk-drive-scsi1.raw").stat()
        self.assertEqual(state.st_size, LARGE)
        self.assertLess(state.st_blocks * 512, CLUSTER)
