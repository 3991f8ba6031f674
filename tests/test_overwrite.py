"""Nothing is overwritten unasked: no existing file, no mounted device, no newer backup."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path
from unittest import mock

from tests import archives
from tests.archives import BLOCK, CLUSTER
from tests.checks import (
    CHANGED,
    MIB,
    CheckedTest,
    Child,
    change_payload,
    command,
    large_archive,
    mounted,
    one_disk,
    wait_for,
)
from tests.support import (
    Answer,
    Argument,
    call_tool,
    golden,
    loop_device,
    manifest,
    require_root,
    run_tool,
    sha256,
    snapshot,
)

OLDER = b"yesterday's backup"
CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]
SLACK = 4 * MIB  # how much larger than the disk a device may be
DISK = 8 * MIB


class Force(CheckedTest):
    """An OUTPUT that exists is replaced with --force, never without."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.existing = self.file("b.vma", OLDER)
        self.packed = self.directory / "dir"
        self.ok("unpack", self.source, self.packed)
        disk = self.packed / "drive-scsi0"
        # each command up to OUTPUT, its options first
        self.commands: dict[str, list[Argument]] = {
            "optimize": ["optimize", self.source, self.existing],
            "pack": ["pack", self.packed, self.existing],
            "create": ["create", self.existing, f"drive-scsi0={disk}"],
            "extract": ["extract", "-d", "drive-scsi0", "-o", self.existing, self.source],
        }

    def test_refused_without(self) -> None:
        before = snapshot(self.directory)
        for name, args in self.commands.items():
            with self.subTest(name):
                self.fails(1, *args, says=[str(self.existing), "--force"])
                self.assertEqual(snapshot(self.directory), before)

    def test_refused_for_a_stream(self) -> None:
        """Before the stream is read: whoever sends it need not wait for the answer."""
        before = snapshot(self.directory)
        for args in (["optimize", "-"], ["extract", "-d", "drive-scsi0", "-o"]):
            child = self.start(
                *args, self.existing, *(["-"] if args[0] == "extract" else []),
                stdin=subprocess.PIPE,
            )  # fmt: skip
            with self.subTest(args[0]):
                # its standard input stays open, and sends nothing
                self.failed(self.ended(child), 1, "--force")
        self.assertEqual(snapshot(self.directory), before)

    def ended(self, child: Child) -> Answer[bytes]:
        """Return the answer of a child that ends by itself, with its input still open."""
        wait_for(lambda: not child.running(), 10)
        return child.answer()

    @mock.patch("time.time", return_value=1_700_000_000.0)  # which `create` writes down
    def test_with(self, _: mock.Mock) -> None:
        for name, args in self.commands.items():
            with self.subTest(name):
                self.existing.write_bytes(OLDER)
                self.ok(args[0], "--force", "-q", *args[1:])
                digest = sha256(self.existing)
                self.existing.unlink()
                self.ok(args[0], "-q", *args[1:])
                self.assertEqual(sha256(self.existing), digest)

    def test_several_archives(self) -> None:
        """Seen: `optimize *.vma` in a folder of two backups wrote yesterday's over today's."""
        one, two = self.directory / "1.vma", self.directory / "2.vma"
        one.write_bytes(golden("live-order"))
        two.write_bytes(golden("live-order-day2"))
        before = snapshot(self.directory)
        line = self.fails(1, "optimize", one, two, says=["--force", "several archives in place"])
        self.assertRegex(line, "once for each|one at a time|for f in")
        three = call_tool("optimize", one, two, self.source)
        self.assertNotEqual(three.returncode, 0)
        self.assertEqual(snapshot(self.directory), before)

    def test_same_file(self) -> None:
        """OUTPUT that is the archive itself is in place, which needs no --force."""
        link = self.directory / "link.vma"
        link.symlink_to(self.source)
        self.ok("optimize", "-q", self.source, link)
        self.assertEqual(sha256(self.source), CANONICAL)
        self.assertTrue(link.is_symlink())

    def test_link_to_another_file(self) -> None:
        """A symbolic link counts as the file that it leads to."""
        link = self.directory / "link.vma"
        link.symlink_to(self.existing)
        self.fails(1, "optimize", self.source, link, says=["--force"])
        self.assertEqual(self.existing.read_bytes(), OLDER)

    def test_what_is_no_file(self) -> None:
        """A FIFO and a character device hold nothing that could be lost."""
        self.ok("optimize", "-q", self.source, os.devnull)
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        child = self.start("optimize", "-q", self.source, fifo)
        self.assertEqual(sha256(fifo.read_bytes()), CANONICAL)
        self.assertEqual(child.answer().returncode, 0)

    def test_file_that_appears_meanwhile(self) -> None:
        """A file that somebody else makes under OUTPUT's name while the tool works stays."""
        data = golden("live-order")
        new = self.directory / "new"
        cases: tuple[list[Argument], ...] = (
            ["optimize", "-", new],
            ["extract", "-d", "drive-scsi0", "-o", new, "-"],
        )
        for args in cases:
            with self.subTest(args[0]):
                child = self.start(*args, stdin=subprocess.PIPE)
                pipe = child.process.stdin
                assert pipe
                pipe.write(data[:-CLUSTER])
                pipe.flush()
                wait_for(self.partial_files)
                new.write_bytes(OLDER)
                answer = self.fed(child, data[-CLUSTER:])
                self.failed(answer, 1, str(new))
                self.assertEqual(new.read_bytes(), OLDER)
                self.assertEqual(self.partial_files(), [])
                new.unlink()

    def fed(self, child: Child, rest: bytes) -> Answer[bytes]:
        """Give the child the rest of its input, and return its answer."""
        assert child.process.stdin
        child.process.stdin.write(rest)
        child.process.stdin.close()
        child.process.stdin = None
        return child.answer()


class Devices(CheckedTest):
    """Block devices are opened with O_EXCL, and may not be much larger than the disk."""

    def setUp(self) -> None:
        super().setUp()
        require_root()
        self.source = self.file("a.vma", one_disk(DISK))
        self.disk = archives.disk(random.Random(1), DISK, "full")
        self.before = b"\xee" * BLOCK

    def image(self, size: int) -> Path:
        path = self.directory / f"image{size}"
        with open(path, "wb") as file:
            file.write(self.before)
            file.truncate(size)
        return path

    def roads(self, device: Path) -> list[list[Argument]]:
        """Return the command lines that write to a device."""
        lines = self.file("map", f"1:drive-scsi0={device}\ndone\n".encode())
        shutil.rmtree(self.directory / "configs", ignore_errors=True)
        return [
            ["extract", "-d", "drive-scsi0", "-o", device, self.source],
            ["extract", "--force", "-d", "drive-scsi0", "-o", device, self.source],
            ["extract", "-r", lines, self.source, self.directory / "configs"],
        ]

    def refused_road(self, args: list[Argument], device: Path) -> str:
        answer = call_tool(*args)
        line = answer.stderr.decode()
        self.assertEqual(answer.returncode, 1, line)
        self.assertRegex(line, r"\Avma-tool: [^\n]+\n\Z")
        self.assertIn(str(device), line)
        return line

    def test_mounted(self) -> None:
        """Seen: a mounted file system destroyed, exit status 0."""
        image = self.directory / "image"
        with open(image, "wb") as file:
            file.truncate(DISK)
        command("mke2fs", "e2fsprogs", "-q", "-F", "-t", "ext4", image)
        device = loop_device(self, image)
        where = self.directory / "mnt"
        where.mkdir()
        with mounted(where, device):
            (where / "letter").write_bytes(b"dear all" * 1000)
            os.sync()
            for args in self.roads(device):
                with self.subTest(args=args):
                    line = self.refused_road(args, device)
                    self.assertRegex(line, "in use|mounted|busy")
        check = subprocess.run(["e2fsck", "-fn", device], capture_output=True, check=False)
        self.assertEqual(check.returncode, 0, check.stdout)
        with mounted(where, "-o", "ro", device):
            self.assertEqual((where / "letter").read_bytes(), b"dear all" * 1000)

    def test_held_by_another(self) -> None:
        """As LVM, RAID, device mapper and swap hold what they are made of."""
        device = loop_device(self, self.image(DISK))
        holder = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            for args in self.roads(device):
                with self.subTest(args=args):
                    self.refused_road(args, device)
            self.assertEqual(os.pread(holder, BLOCK, 0), self.before)
        finally:
            os.close(holder)

    def test_free(self) -> None:
        """Where nobody has it, it is written."""
        device = loop_device(self, self.image(DISK + SLACK))
        for args in self.roads(device):
            with self.subTest(args=args), open(device, "r+b") as file:
                file.write(bytes(DISK))
            self.ok(*args)
            self.assertEqual(self.content(device), sha256(self.disk))

    def content(self, device: Path) -> str:
        # a reader of its own: what another one still holds in memory is older
        with open(device, "rb") as file:
            return sha256(file.read(DISK))

    def test_upper_bound(self) -> None:
        """A device that is more than 4 MiB larger than the disk is somebody else's, or a typo."""
        device = loop_device(self, self.image(DISK + SLACK + 512))
        plain, forced, _ = self.roads(device)
        line = self.refused_road(plain, device)
        self.assertIn("--force", line)
        with open(device, "rb") as file:
            self.assertEqual(file.read(BLOCK), self.before)
        self.ok(*forced)
        self.assertEqual(self.content(device), sha256(self.disk))

    def test_lower_bound(self) -> None:
        """A device that is smaller than the disk can never be right."""
        device = loop_device(self, self.image(DISK - 512))
        for args in self.roads(device):
            with self.subTest(args=args):
                self.refused_road(args, device)
        with open(device, "rb") as file:
            self.assertEqual(file.read(BLOCK), self.before)


class InPlace(CheckedTest):
    """The last look at the archive is immediately before the rename, and the report is after it."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))

    def full_pipe(self) -> tuple[int, int]:
        """Return the ends of a pipe that takes no byte more."""
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        return reading, writing

    def test_full_pipe(self) -> None:
        """Seen: while the report waited in a full pipe, a newer backup took the name, and was lost.

        Now the archive is replaced before the report is printed, so the newer backup stays.
        """
        reading, writing = self.full_pipe()
        first = self.source.stat().st_ino
        child = self.start("optimize", self.source, stdout=writing)
        os.close(writing)
        with contextlib.suppress(AssertionError):  # where the report comes first, it never is
            wait_for(lambda: self.source.stat().st_ino != first, 5)
        replaced = sha256(self.source)
        newer = self.file("newer", golden("live-order-day2"))
        os.rename(newer, self.source)
        drained = b""
        while child.running():
            drained += os.read(reading, 65536)
        answer = child.answer()
        self.assertEqual(sha256(self.source), manifest()["live-order-day2"]["sha256"])
        self.assertEqual(replaced, CANONICAL)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.assertIn(b"optimized", drained + os.read(reading, 65536))

    def test_report_that_cannot_be_printed(self) -> None:
        """The archive is replaced, and the exit status is 1."""
        with open("/dev/full", "wb") as full:
            answer = run_tool("optimize", self.source, stdout=full)
        self.failed(answer, 1, os.strerror(errno.ENOSPC))
        self.assertEqual(sha256(self.source), CANONICAL)
        self.assertEqual(self.partial_files(), [])

    def test_report_that_nobody_reads(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        answer = run_tool("optimize", self.source, stdout=writing)
        os.close(writing)
        self.assertNotEqual(answer.returncode, 0)
        self.assertEqual(sha256(self.source), CANONICAL)

    def test_rename_that_fails(self) -> None:
        """Nothing says "optimized" before; the error names the archive. Nothing takes the place
        of a file that something is mounted on."""
        with mounted(self.source, "--bind", self.source):
            answer = run_tool("optimize", self.source)
            self.assertEqual(answer.stdout, b"")
            self.failed(answer, 1, str(self.source))
            self.assertEqual(sha256(self.source), manifest()["live-order"]["sha256"])
            self.assertEqual(self.partial_files(), [])

    def test_newer_backup_while_it_is_compared(self) -> None:
        """A backup that took the name at any earlier time stays as well."""
        large_archive(self.source)
        child = self.start("optimize", self.source)
        if not child.stop_after("wchar", 64 * MIB):
            self.fail("it ended too soon")
        newer = self.file("newer", golden("live-order-day2"))
        os.rename(newer, self.source)
        child.send(signal.SIGCONT)
        self.failed(child.answer(), 1, str(self.source), CHANGED)
        self.assertEqual(sha256(self.source), manifest()["live-order-day2"]["sha256"])
        self.assertEqual(self.partial_files(), [])


class ChangeTime(CheckedTest):
    """An archive that was written to is found by its ctime, which nobody can put back.

    Seen: payload rewritten and mtime put back during `optimize a b`: half old, half new, status 0.
    """

    def changed_while(self, args: list[Argument], counter: str, path: Path) -> Answer[bytes]:
        """Run the tool; when it is in the middle, change a file and put its mtime back.

        verify is so fast that on a busy machine it may be done when it is stopped: five attempts.
        """
        for _ in range(5 if args[0] == "verify" else 1):
            answer = self.changed_once(args, counter, path)
            if answer.returncode:
                break
        return answer

    def changed_once(self, args: list[Argument], counter: str, path: Path) -> Answer[bytes]:
        child = self.start(*args)
        if not child.stop_after(counter, 64 * MIB):
            return child.answer()
        before = path.stat()
        if path.suffix == ".vma":
            change_payload(path)
        else:
            with open(path, "r+b") as file:
                file.write(b"changed")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(path.stat().st_mtime_ns, before.st_mtime_ns)
        child.send(signal.SIGCONT)
        return child.answer()

    def test_archive(self) -> None:
        source, new = self.directory / "a.vma", self.directory / "new"
        large_archive(source)
        cases: tuple[tuple[list[Argument], str], ...] = (
            (["optimize", source, new], "wchar"),
            (["optimize", source], "wchar"),
            (["extract", source, new], "wchar"),
            (["unpack", source, new], "wchar"),
            (["extract", "-d", "drive-scsi0", "-o", new, source], "wchar"),
            (["verify", source], "rchar"),
            (["verify", "--digest", source], "rchar"),
        )
        for args, counter in cases:
            with self.subTest(args=args):
                answer = self.changed_while(args, counter, source)
                self.assertEqual(answer.stdout, b"")
                line = self.failed(answer, 1, str(source))
                # in place, the comparison of the disks may find it first
                in_place = args == ["optimize", source]
                self.assertRegex(line, f"{CHANGED}|differs" if in_place else CHANGED)
                self.assertEqual(sorted(self.directory.iterdir()), [source])

    def test_standard_output(self) -> None:
        """What is in the pipe already cannot be taken back, so the exit status must say it."""
        source = self.file("a.vma", one_disk(8 * MIB))
        child = self.start("optimize", source, "-")
        assert child.process.stdout
        child.process.stdout.read(MIB)
        change_payload(source)
        answer = child.answer()
        self.failed(answer, 1, str(source), CHANGED)

    def test_disk(self) -> None:
        """A disk that is packed."""
        disk, target = self.directory / "disk-drive-scsi0.raw", self.directory / "new.vma"
        large_archive(self.directory / "a.vma")
        self.ok("extract", "-d", "drive-scsi0", "-o", disk, self.directory / "a.vma")
        answer = self.changed_while(["create", target, f"drive-scsi0={disk}"], "wchar", disk)
        self.failed(answer, 1, str(disk), CHANGED)
        self.assertFalse(target.exists())
