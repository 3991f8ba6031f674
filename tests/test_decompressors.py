"""Programs that decompress: without a temporary file, with warnings, and in plain words."""

from __future__ import annotations

import errno
import os
import re
import shlex
import struct
import subprocess
import tempfile
from typing import Any

from tests.archives import CLUSTER, EXTENT_HEADER, Device
from tests.checks import ALL_READ, MIB, CheckedTest, built, command, mounted, one_disk
from tests.support import (
    Answer,
    Argument,
    call_tool,
    golden,
    manifest,
    require_program,
    require_root,
    run_tool,
    sha256,
    skip,
    small_file_system,
    unmeasured,
)

PACKAGES = {
    "zstd": "zstd",
    "lzop": "lzop",
    "gzip": "gzip",
    "xz": "xz-utils",
    "bzip2": "bzip2",
}
CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]
# what a user can do nothing with
JARGON = ("Read error (39)", "Inappropriate ioctl", "/*stdin*", "(stdin)", "<stdin>")
CUT = "cut|truncated|ends too early|ends early|incomplete|ended before"


def compress(program: str, data: bytes) -> bytes:
    path = require_program(program, PACKAGES[program])
    return subprocess.run([path, "-1c"], input=data, stdout=subprocess.PIPE, check=True).stdout


def zstd_frame(data: bytes, window_log: int) -> bytes:
    """Return a zstd frame of stored blocks (RFC 8878) that asks for a window of this size.

    Compressing with `zstd --long=31` takes gigabytes; its frames look like this to a decompressor.
    """
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3)
    pieces = [data[at : at + (1 << 17)] for at in range(0, len(data), 1 << 17)]
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        frame += struct.pack("<I", len(piece) << 3 | last)[:3] + piece
    return frame


class DecompressorTest(CheckedTest):
    def setUp(self) -> None:
        super().setUp()
        self.bin = self.directory / "bin"
        self.bin.mkdir()

    def wrap(self, program: str, script: str) -> None:
        """Put a script in front of a program; in it, "$REAL" is the program."""
        real = require_program(program, PACKAGES[program])
        path = self.bin / program
        path.write_text(f"#!/bin/sh\nREAL={shlex.quote(real)}\n{script}\n", "utf-8")
        path.chmod(0o755)

    def run_wrapped(self, *args: Argument, **kw: Any) -> Answer[bytes]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return run_tool(*args, env={**os.environ, "PATH": path}, **kw)


class NoTemporaryFile(DecompressorTest):
    """A rescue system may have no directory that can be written to."""

    # Each is made read-only for the tool alone; "$@" begins with the directories, then "--".
    READ_ONLY = """
        set -e
        while [ "$1" != -- ]; do
            mount --bind "$1" "$1"
            mount -o remount,bind,ro "$1"
            shift
        done
        shift
        ! touch "$TMPDIR/probe" 2>/dev/null
        cd /proc
        exec "$@"
    """

    def test_read_only_system(self) -> None:
        require_root()
        unshare = require_program("unshare", "util-linux")
        temporary = tempfile.gettempdir()
        usual = {temporary, "/tmp", "/var/tmp", "/usr/tmp"}
        places = sorted(path for path in usual if os.path.isdir(path))
        probe = subprocess.run([unshare, "-m", "true"], capture_output=True, check=False)
        if probe.returncode:
            skip(f"unshare -m: {probe.stderr.decode().strip()}")
        prefix = [unshare, "-m", "sh", "-c", self.READ_ONLY, "sh", *places, "--"]
        environment = {**unmeasured(), "TMPDIR": temporary}
        for program in PACKAGES:
            packed = self.file(f"a.vma.{program}", compress(program, golden("live-order")))
            with self.subTest(program):
                self.check_ok(run_tool("verify", packed, prefix=prefix, env=environment))
            with self.subTest(program, to="a pipe"):
                answer = run_tool("optimize", packed, "-", prefix=prefix, env=environment)
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), CANONICAL)
            with self.subTest(program, cut=True):
                cut = self.file("cut.vma", packed.read_bytes()[:-20])
                answer = run_tool("verify", cut, prefix=prefix, env=environment)
                self.failed(answer, 3, str(cut))

    def test_messages_of_any_length(self) -> None:
        """A program that says a lot neither blocks nor is quoted at length."""
        packed = self.file("a.vma.gz", compress("gzip", golden("live-order")))
        self.wrap("gzip", 'yes "a message" | head -c 1000000 >&2\nexec "$REAL" "$@"')
        self.check_words(self.run_wrapped("verify", packed, timeout=20))
        self.wrap("gzip", '"$REAL" "$@"\nyes "a message" | head -c 1000000 >&2\nexit 1')
        line = self.failed(self.run_wrapped("verify", packed, timeout=20), 3)
        self.assertIn("a message", line)
        self.assertLess(len(line), 2000)

    def check_words(self, answer: Answer[bytes]) -> None:
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertLess(len(answer.stderr), 1000)


class Warnings(DecompressorTest):
    """What a program says with exit status 0 does not make an archive bad."""

    def test_status_0(self) -> None:
        data = golden("live-order")
        for program in PACKAGES:
            packed = self.file("a.vma", compress(program, data))
            self.wrap(program, f'echo "{program}: warning: an old option" >&2\nexec "$REAL" "$@"')
            with self.subTest(program):
                answer = self.run_wrapped("verify", packed)
                self.assertEqual(answer.returncode, 0, answer.stderr)
                self.assertIn(ALL_READ.encode(), answer.stdout)
                new = self.directory / f"{program}.vma"
                answer = self.run_wrapped("optimize", packed, new)
                self.assertEqual(answer.returncode, 0, answer.stderr)
                self.assertEqual(sha256(new), CANONICAL)

    def test_any_other_status(self) -> None:
        """A program that fails behind all data has found something."""
        for program in PACKAGES:
            packed = self.file("a.vma", compress(program, golden("live-order")))
            self.wrap(program, '"$REAL" "$@"\necho "checksum error" >&2\nexit 1')
            with self.subTest(program):
                self.failed(self.run_wrapped("verify", packed), 3, str(packed), "checksum error")

    def test_killed(self) -> None:
        """As by the kernel when memory is short."""
        packed = self.file("a.vma.zst", compress("zstd", golden("live-order")))
        self.wrap("zstd", '"$REAL" "$@" | head -c 100000\nkill -9 $$')
        answer = self.run_wrapped("verify", packed)
        self.assertIn(answer.returncode, (1, 3))
        self.assertIn(b"SIGKILL", answer.stderr)

    def test_trailing_garbage(self) -> None:
        """What stands behind the compressed end is damage. bzip2 only warns of it, with status 0;
        lzop and gzip fail with status 2, zstd and xz with 1."""
        data = golden("live-order")
        for program in PACKAGES:
            packed = self.file("a.vma", compress(program, data) + b"garbage garbage garbage")
            with self.subTest(program):
                self.fails(3, "verify", packed, says=[str(packed)])
                self.fails(3, "optimize", packed, self.directory / "new.vma")
                self.assertFalse((self.directory / "new.vma").exists())

    def test_bzip2_reports_garbage_by_a_warning_only(self) -> None:
        """The reason for which its warnings are looked at."""
        packed = compress("bzip2", b"text") + b"garbage"
        program = require_program("bzip2", "bzip2")
        answer = subprocess.run([program, "-dc"], input=packed, capture_output=True, check=False)
        self.assertEqual((answer.returncode, answer.stdout), (0, b"text"))
        self.assertIn(b"trailing garbage", answer.stderr)


class PlainWords(DecompressorTest):
    def test_cut(self) -> None:
        """A file that was cut is said to be cut, whatever its program calls it."""
        data = golden("live-order")
        for program in PACKAGES:
            packed = compress(program, data)
            for kept in (len(packed) - 1, len(packed) - 20, len(packed) // 2):
                source = self.file("a.vma", packed[:kept])
                with self.subTest(program, kept=kept):
                    line = self.fails(3, "verify", source, says=[str(source)])
                    self.assertRegex(line, CUT)
                    for word in JARGON:
                        self.assertNotIn(word, line)
                    line = self.fails(3, "verify", "-", input=packed[:kept])
                    self.assertRegex(line, CUT)

    def test_damaged(self) -> None:
        """No program's own way of naming standard input."""
        data = golden("live-order")
        for program in PACKAGES:
            packed = bytearray(compress(program, data))
            at = len(packed) // 2
            packed[at : at + 64] = bytes(64)
            source = self.file("a.vma", bytes(packed))
            with self.subTest(program):
                line = self.fails(3, "verify", source, says=[str(source)])
                for word in JARGON:
                    self.assertNotIn(word, line)

    def test_large_window(self) -> None:
        """Frames of `zstd --long=31` need the option to be read; the pipe that has it is named."""
        data = golden("live-order")
        source = self.file("a.vma.zst", zstd_frame(data, 31))
        for args in (["verify"], ["extract"], ["optimize"]):
            new = [] if args == ["verify"] else [self.directory / "new"]
            line = self.fails(1, *args, source, *new)
            self.assertIn("zstd -dc --long=31", line)
            self.assertIn(str(source), line)
            for word in JARGON:
                self.assertNotIn(word, line)
        line = self.fails(1, "verify", "-", input=source.read_bytes())
        self.assertIn("zstd -dc --long=31", line)

    def test_large_window_by_the_pipe(self) -> None:
        """The pipe that is named reads it."""
        zstd = require_program("zstd", "zstd")
        data = zstd_frame(golden("live-order"), 31)
        with subprocess.Popen(
            [zstd, "-dc", "--long=31", self.file("a.vma.zst", data)], stdout=subprocess.PIPE
        ) as pipe:
            answer = run_tool("verify", "-", stdin=pipe.stdout)
        self.check_ok(answer)

    def test_usual_window(self) -> None:
        """Up to 128 MiB, which needs no option."""
        source = self.file("a.vma.zst", zstd_frame(golden("live-order"), 27))
        self.assertIn(ALL_READ, self.ok("verify", source))


class Words(CheckedTest):
    """Other messages that annoyed."""

    def test_partitions_of_a_stream(self) -> None:
        """The error says which command makes it possible."""
        data = golden("live-order")
        packed = self.file("a.vma.zst", compress("zstd", data))
        line = self.fails(1, "list", "--partitions", packed, says=["--partitions", str(packed)])
        self.assertIn("vma-tool optimize", line)
        line = self.fails(1, "list", "--partitions", "-", input=data)
        self.assertIn("vma-tool ", line.partition(": ")[2])

    def test_named_command_works(self) -> None:
        """The command that is printed makes a file of which --partitions are listed."""
        packed = self.file("a.vma.zst", compress("zstd", golden("live-order")))
        line = self.fails(1, "list", "--partitions", packed)
        words = re.findall(r"vma-tool optimize (\S+) ([^\s`'\";),]+)", line)
        self.assertEqual(len(words), 1, line)
        source, target = words[0]
        self.assertEqual(source, str(packed))
        self.ok("optimize", "-q", source, target)
        self.ok("list", "--partitions", target)

    def test_reserve(self) -> None:
        """ "cannot take 177.4 MiB" reads as if somebody did not want to have them.

        On ext4, as file systems that are not known to reserve space cheaply are not asked to.
        """
        source = self.file("a.vma", one_disk(8 * MIB))
        image, room = self.directory / "image", self.directory / "room"
        room.mkdir()
        with open(image, "wb") as file:
            file.truncate(4 * MIB)
        command("mke2fs", "e2fsprogs", "-q", "-F", "-t", "ext4", image)
        with mounted(room, "-o", "loop", image):
            before = os.listdir(room)
            line = self.fails(1, "optimize", source, room / "b.vma", says=["cannot reserve"])
            self.assertRegex(line, r"cannot reserve [\d.]+ MiB")
            self.assertIn(os.strerror(errno.ENOSPC), line)
            self.assertEqual(os.listdir(room), before)

    def test_empty_payload_is_no_reason(self) -> None:
        """An archive of zeros fits nearly everywhere."""
        source = self.file("a.vma", built(Device(1, "drive-scsi0", bytes(64 * CLUSTER))))
        room = small_file_system(self, MIB)
        self.ok("optimize", "-q", source, room / "b.vma")
        self.assertLess((room / "b.vma").stat().st_size, 524288 + 9 * EXTENT_HEADER)
        answer = call_tool("verify", room / "b.vma")
        self.assertEqual(answer.returncode, 0)
