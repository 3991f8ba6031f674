"""What the tool says of its work: exit status, `verify`'s line, a report that has nowhere to go."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import vma_tool
from tests import archives
from tests.archives import CLUSTER, Device
from tests.checks import (
    ALL_READ,
    HEADERS_ONLY,
    MIB,
    CheckedTest,
    built,
    command,
    large_archive,
    one_disk,
    run_counted,
    run_shell,
    wait_for,
)
from tests.damage import good
from tests.support import (
    Argument,
    call_tool,
    golden,
    loop_device,
    manifest,
    run_tool,
    sha256,
    small_file_system,
    snapshot,
)

CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]


class Status(CheckedTest):
    """0 success, 1 the operation failed, 2 wrong usage, 3 a bad archive or archives that differ."""

    def setUp(self) -> None:
        super().setUp()
        self.good = self.file("good.vma", golden("live-order"))
        self.other = self.file("other.vma", golden("live-order-day2"))
        self.damaged = self.file("bad.vma", golden("live-order")[:-1])
        self.text = self.file("text.vma", b"hello world\n" * 3000)
        self.missing = self.directory / "missing.vma"
        self.new = self.directory / "new"

    def check(self, status: int, *args: Argument, child: bool = False) -> None:
        """Check the status, and that an error is one line on standard error."""
        with self.subTest(args=args):
            answer = run_tool(*args) if child else call_tool(*args)
            errors = answer.stderr.decode()
            self.assertEqual(answer.returncode, status, errors)
            self.assertNotIn("Traceback", errors)
            if status in (1, 3) and "--json" not in args:
                self.assertRegex(errors, r"\A(vma-tool: [^\n]+\n)+\Z")

    def test_success(self) -> None:
        self.check(0, "verify", self.good)
        self.check(0, "verify", self.good, self.other)
        self.check(0, "verify", self.good, "--against", self.good)
        self.check(0, "list", self.good)
        self.check(0, "--version")

    def test_failed_operation(self) -> None:
        """What has nothing to do with how good an archive is."""
        before = snapshot(self.directory)
        self.check(1, "verify", self.missing)
        self.check(1, "list", self.missing)
        self.check(1, "list", self.directory)
        self.check(1, "extract", self.missing, self.new)
        self.check(1, "extract", self.good, self.directory)  # not empty
        self.check(1, "extract", "-d", "nobody", self.good, self.new)
        self.check(1, "config", "-c", "nothing", self.good)
        self.check(1, "verify", "--against", self.missing, self.good)
        self.check(1, "optimize", self.good, self.missing / "new.vma")
        self.check(1, "pack", self.missing, self.new)
        self.check(1, "create", self.new, f"drive-scsi0={self.missing}")
        self.assertEqual(snapshot(self.directory), before)

    def test_full_disk(self) -> None:
        full = small_file_system(self, 256 << 10)
        self.check(1, "optimize", self.good, full / "new.vma")
        self.check(1, "extract", self.good, full / "new")
        with open("/dev/full", "wb") as output:
            answer = run_tool("optimize", self.good, "-", stdout=output)
        self.failed(answer, 1, os.strerror(errno.ENOSPC))

    def test_missing_program(self) -> None:
        packed = self.file("a.vma.lzo", b"\x89LZO\0\r\n\x1a\n" + bytes(100))
        answer = run_tool("verify", packed, env={**os.environ, "PATH": "/nowhere"})
        self.failed(answer, 1, "lzop")

    def test_unreadable(self) -> None:
        """A folder of which nothing can be read is no bad archive."""
        self.check(1, "verify", "/proc/self/mem")

    def test_wrong_usage(self) -> None:
        for args in (["verify"], ["nonsense"], ["list"], ["optimize", "--align", "3K", self.good]):
            self.check(2, *args)
        answer = run_tool("verify")
        self.assertEqual((answer.returncode, answer.stdout), (2, b""))

    def test_bad_archive(self) -> None:
        before = snapshot(self.directory)
        for path in (self.damaged, self.text):
            self.check(3, "verify", path)
            self.check(3, "list", "--scan", path)
            self.check(3, "extract", path, self.new)
            self.check(3, "unpack", path, self.new)
            self.check(3, "optimize", path, self.new)
            self.check(3, "optimize", path)
            self.check(3, "verify", "--against", path, self.good)
            self.check(3, "verify", "--digest", path)
            self.check(3, "extract", "-d", "drive-scsi0", "-o", self.new, path)
        self.check(3, "list", self.text)
        self.check(3, "config", self.text)
        self.check(0, "list", self.damaged)  # its header is good, and no more is read
        self.check(3, "list", self.file("empty.vma", b""))
        (self.directory / "empty.vma").unlink()
        self.assertEqual(snapshot(self.directory), before)

    def test_bad_stream(self) -> None:
        data = self.damaged.read_bytes()
        self.fails(3, "verify", "-", input=data)
        self.fails(3, "extract", "-", self.new, input=data)
        self.fails(3, "optimize", "-", self.new, input=data)
        self.assertFalse(self.new.exists())

    def test_archives_that_differ(self) -> None:
        self.check(3, "verify", "--against", self.other, self.good)
        self.check(3, "verify", "--json", "--against", self.other, self.good)

    def test_several_archives(self) -> None:
        """3 if any is bad, else 1 if any could not be read; each one is looked at."""
        good, bad, missing = self.good, self.damaged, self.missing
        self.check(3, "verify", bad, good)
        self.check(3, "verify", good, bad)
        self.check(3, "verify", bad, missing)
        self.check(3, "verify", missing, bad)
        self.check(1, "verify", missing, good)
        self.check(1, "verify", good, missing)
        answer = call_tool("verify", missing, bad, good)
        self.assertEqual(answer.returncode, 3)
        self.assertEqual(answer.stderr.count(b"\n"), 2)
        self.assertIn(str(good).encode(), answer.stdout)
        self.check(3, "verify", "--against", good, self.other, good)
        self.check(1, "verify", "--against", good, missing, good)

    def test_json(self) -> None:
        answer = call_tool("verify", "--json", self.damaged)
        self.assertEqual(answer.returncode, 3)
        self.assertFalse(json.loads(answer.stdout)["ok"])

    def test_signal(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child = self.start("verify", "-", stdin=subprocess.PIPE)
            pipe = child.process.stdin
            assert pipe
            pipe.write(self.good.read_bytes()[:CLUSTER])
            pipe.flush()
            wait_for(lambda child=child: child.transferred("rchar") > MIB)  # type: ignore[misc]
            wait_for(lambda child=child: child.state() == "S")  # type: ignore[misc]
            child.send(number)
            answer = child.answer()
            self.assertEqual(answer.returncode, 128 + number, answer.stderr)

    def test_exceptions(self) -> None:
        """Python callers tell a bad archive from a failure by the class."""
        self.assertTrue(issubclass(vma_tool.FormatError, vma_tool.VmaError))
        for path, bad in ((self.missing, False), (self.text, True)):
            try:
                with vma_tool.open_input(str(path)) as source:
                    vma_tool.read_header(source)
                self.fail(f"{path} is no archive")
            except vma_tool.VmaError as error:
                self.assertEqual(isinstance(error, vma_tool.FormatError), bad)


class NowhereToPrint(CheckedTest):
    """With standard output closed, what has something to report fails before it does anything."""

    CLOSED = 'exec "$@" >&-'

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.new = self.directory / "new"

    def test_reports(self) -> None:
        before = snapshot(self.directory)
        lines = self.file("map", b"done\n")
        cases: tuple[list[Argument], ...] = (
            ["verify", self.source],
            ["verify", "--digest", self.source],
            ["verify", "--against", self.source, self.source],
            ["list", self.source],
            ["list", "--json", self.source],
            ["config", self.source],
            ["completion", "bash"],
            ["optimize", self.source],
            ["optimize", self.source, self.new],
            ["optimize", self.source, "-"],
            ["extract", "-r", lines, self.source, self.new],
            ["extract", "-v", self.source, self.new],
        )
        for args in cases:
            with self.subTest(args=args):
                answer = run_shell(self.CLOSED, *args)
                self.failed(answer, 1, "standard output")
        lines.unlink()
        self.assertEqual(snapshot(self.directory), before)

    def test_before_it_reads(self) -> None:
        """Not after hours of it: the archive is not there, and nobody asks for it."""
        for args in (["verify"], ["optimize"], ["list"]):
            answer = run_shell(self.CLOSED, *args, self.directory / "missing")
            self.failed(answer, 1, "standard output")

    def test_nothing_to_report(self) -> None:
        """What prints nothing needs nowhere to print it."""
        for number, args in enumerate((["extract"], ["unpack"])):
            answer = run_shell(self.CLOSED, *args, self.source, self.directory / str(number))
            self.check_ok(answer)
        self.check_ok(run_shell(self.CLOSED, "optimize", "-q", self.source))
        self.assertEqual(sha256(self.source), CANONICAL)

    def test_full(self) -> None:
        """/dev/full is found out when the line is printed."""
        for args in (["verify"], ["list"], ["list", "--json"], ["config"]):
            with self.subTest(args=args), open("/dev/full", "wb") as full:
                answer = run_tool(*args, self.source, stdout=full)
                self.failed(answer, 1, os.strerror(errno.ENOSPC))


class ReadsAll(CheckedTest):
    """`verify` reads every byte, `verify --quick` the headers; the line says which."""

    def read_bytes(self, *args: Argument) -> int:
        counted = run_counted(*args)
        self.assertEqual(counted.answer.returncode, 0, counted.answer.stderr)
        return counted.read

    def test_line(self) -> None:
        source = self.file("a.vma", golden("live-order"))
        text = self.ok("verify", source)
        self.assertIn(ALL_READ, text)
        self.assertNotIn(HEADERS_ONLY, text)
        text = self.ok("verify", "--quick", source)
        self.assertIn(HEADERS_ONLY, text)
        self.assertNotIn(ALL_READ, text)
        self.assertIn(ALL_READ, self.ok("verify", "-", input=golden("live-order")))

    def test_bytes_read(self) -> None:
        source = self.file("a.vma", one_disk(32 * MIB))
        size = source.stat().st_size
        empty = self.file("empty.vma", golden("config-only"))
        start = self.read_bytes("verify", empty)
        whole = self.read_bytes("verify", source)
        quick = self.read_bytes("verify", "--quick", source)
        self.assertGreaterEqual(whole - start + empty.stat().st_size, size)
        self.assertLess(whole - start, 1.1 * size + MIB)
        self.assertLess(quick - start, size // 8)

    def test_optimized(self) -> None:
        """Also of a canonical archive, and of several."""
        source = self.file("a.vma", archives.canonical(archives.parse(one_disk(8 * MIB)).archive))
        size = source.stat().st_size
        quick = self.read_bytes("verify", "--quick", source, source)
        whole = self.read_bytes("verify", source, source)
        self.assertGreater(whole - quick, 1.7 * size)

    def test_unreadable_sector(self) -> None:
        """Seen: an archive with a sector that cannot be read passed.

        A loop device whose file was cut answers EIO where that is missing: within the last payload.
        """
        data = one_disk(8 * MIB)
        backing = self.file("backing", data)
        device = loop_device(self, backing, "--read-only")
        self.assertEqual(os.stat(backing).st_size, len(data))
        self.assertIn(ALL_READ, self.ok("verify", device))
        os.truncate(backing, len(data) - 64 * 1024)
        # what was read when it was whole is still in memory
        command("blockdev", "util-linux", "--flushbufs", device)
        self.assertIn(HEADERS_ONLY, self.ok("verify", "--quick", device))
        line = self.fails(1, "verify", device, says=[str(device), os.strerror(errno.EIO)])
        self.assertRegex(line, r"offset 0x[0-9a-f]+")

    def test_quick_sees_what_it_saw(self) -> None:
        """All that can be wrong with the headers, and an archive that is cut."""
        data = good()
        last = archives.extent_offsets(data)[-1]
        for what, bad in (
            ("one byte short", data[:-1]),
            ("last extent gone", data[:last]),
            ("one byte more", data + b"\0"),
            ("MD5 of an extent", archives.edit(data, last + 41, b"\x77", fix_md5=False)),
        ):
            with self.subTest(what):
                source = self.file("a.vma", bad)
                self.fails(3, "verify", "--quick", source)
                self.fails(3, "verify", source)

    def test_of_zeros(self) -> None:
        """A disk that stores nothing has nothing more to read."""
        source = self.file("a.vma", built(Device(1, "drive-scsi0", bytes(4 * MIB))))
        self.assertIn(ALL_READ, self.ok("verify", source))

    def test_large(self) -> None:
        """Memory does not grow with the archive."""
        source: Path = self.directory / "a.vma"
        large_archive(source, 64 * MIB)
        self.assertIn(ALL_READ, self.ok("verify", source))
