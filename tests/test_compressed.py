"""Compressed archives: recognised by their first bytes, read by a program or a module."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import MIB
from tests.damage import damages, good, good_archive
from tests.support import (
    BAD,
    COMPRESSIONS,
    FEW,
    ProcessTest,
    both_ways,
    call_tool,
    compress,
    golden,
    hidden_programs,
    manifest,
    run_measured,
    sha256,
    snapshot,
)

# What users set for their own compressing
OPTIONS = ("GZIP", "LZOP", "XZ_OPT", "XZ_DEFAULTS", "BZIP", "BZIP2", "ZSTD_CLEVEL")


class Compressed(ProcessTest):
    """zstd, lzop, gzip, xz and bzip2, recognised by their first bytes."""

    def ways(self) -> Iterator[tuple[str, str, contextlib.AbstractContextManager[object]]]:
        """Yield each compression by its program, then, where Python has it, without one."""
        for name, _, _, module in COMPRESSIONS:
            yield name, "program", contextlib.nullcontext()
            if module:
                yield name, "module", hidden_programs()

    def test_every_command(self) -> None:
        """From a file of any name and from standard input: the same as from the plain archive."""
        data = golden("live-order")
        want = manifest()["live-order"]
        output, target = self.directory / "out.vma", self.directory / "out"
        plain = json.loads(self.ok("list", "--json", "--scan", self.file("plain", data)))
        for name, way, context in self.ways():
            compressed = compress(name, data)
            path = self.file("archive.of.any.name", compressed)
            for source in (str(path), "-"):
                kw: dict[str, Any] = {"input": compressed} if source == "-" else {}
                with self.subTest(name, way=way, source=source[-1]), context:
                    self.assertIn(": OK, 3 devices", self.ok("verify", source, **kw))
                    found = json.loads(self.ok("list", "--json", "--scan", source, **kw))
                    size = None if source == "-" else len(compressed)
                    told = {"compression": name, "compressed_size": size, "seekable": False}
                    self.assertEqual(found, {**plain, **told})
                    self.ok("list", source, **kw)
                    self.ok("optimize", "--force", source, output, **kw)
                    self.assertEqual(sha256(output), want["optimized_sha256"]["512K"])
                    self.ok("unpack", "--force", source, target, **kw)
                    for device in want["devices"]:
                        self.assertEqual(sha256(target / device["name"]), device["sha256"])
                self.no_children()

    def test_by_python(self) -> None:
        """What Python's own modules compress is read with and without the programs."""
        want = manifest()["odd-size"]["optimized_sha256"]["512K"]
        for name, _, _, module in COMPRESSIONS:
            if module:
                compressed = module(golden("odd-size"))
                for way, context in both_ways():
                    with self.subTest(name, way=way), context:
                        answer = call_tool("optimize", "-", "-", input=compressed)
                        self.check_ok(answer)
                        self.assertEqual(sha256(answer.stdout), want)

    def test_several_members(self) -> None:
        """Files that were compressed in pieces and put together are one archive."""
        data = golden("live-order")
        want = manifest()["live-order"]["optimized_sha256"]["512K"]
        for name, way, context in self.ways():
            if name == "lzop":
                continue  # its program does not
            parts = [compress(name, part) for part in (data[:100000], data[100000:])]
            with self.subTest(name, way=way), context:
                answer = call_tool("optimize", "-", "-", input=b"".join(parts))
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), want)
        for first in (0x50, 0x51, 0x5F):
            skippable = bytes([first]) + b"\x2a\x4d\x18\x04\x00\x00\x00abcd"
            self.ok("verify", "-", input=skippable + compress("zstd", data))

    def test_cut(self) -> None:
        """A compressed file that lacks its end is an error, even if no more than its checksum."""
        data = golden("three-disks")
        for name, way, context in self.ways():
            compressed = compress(name, data)
            for size in (20, len(compressed) // 2, len(compressed) - 5, len(compressed) - 1):
                with self.subTest(name, way=way, size=size), context:
                    self.check_bad(compressed[:size], name)

    def test_damaged(self) -> None:
        """A changed byte is an error."""
        data = golden("three-disks")
        for name, way, context in self.ways():
            compressed = compress(name, data)
            for at in (len(compressed) // 3, len(compressed) // 2, len(compressed) - 3000):
                changed = bytearray(compressed)
                changed[at] ^= 0x55
                with self.subTest(name, way=way, at=at), context:
                    self.check_bad(bytes(changed), None)

    def check_bad(self, data: bytes, says: str | None) -> None:
        """Check that nothing takes a damaged file for an archive, and nothing is left."""
        path = self.file("bad.vma.x", data)
        before = snapshot(self.directory)
        for args in (["verify"], ["list", "--scan"], ["optimize"], ["unpack"]):
            more = [self.directory / "out"] if args[0] in ("optimize", "unpack") else []
            for source in (str(path), "-"):
                line = self.bad(*args, source, *more, input=data if source == "-" else None)
                self.assertIn("standard input: " if source == "-" else f"{path}: ", line)
                if says:
                    self.assertIn(says, line.replace("lbzip2", "bzip2"))
                self.assertEqual(snapshot(self.directory), before)
        self.no_children()

    def test_behind_the_end(self) -> None:
        """What is behind the compressed archive is an error, also where a program ignores it."""
        data = golden("three-disks")
        for name, _, _, _ in COMPRESSIONS:
            with self.subTest(name):
                self.check_bad(compress(name, data) + b"junk of some length", name)

    def test_options_from_the_environment(self) -> None:
        """They are for the user's own compressing; gzip warns of them, others print more."""
        compressed = {name: compress(name, golden("three-disks")) for name, *_ in COMPRESSIONS}
        with mock.patch.dict(os.environ, dict.fromkeys(OPTIONS, "-v")):
            for name, data in compressed.items():
                with self.subTest(name):
                    self.ok("verify", "-", input=data)

    def test_damaged_archives(self) -> None:
        """A bad archive in a sound compressed file has the message of the plain one."""
        for damage in damages()[::FEW]:
            if not damage.data:
                continue
            compressed = compress("gzip", damage.data) if len(damage.data) < 20000 else b""
            data = compressed or gzip.compress(damage.data, 0)
            with self.subTest(damage.name):
                self.assertRegex(self.bad("verify", "-", input=data), damage.says)

    def test_missing_program(self) -> None:
        """One line names the package, and the pipe to use instead."""
        for name, package in (("zstd", "zstd"), ("lzop", "lzop")):
            data = compress(name, good())
            path = self.file("a.vma.x", data)
            before = snapshot(self.directory)
            for command in ("verify", "list", "optimize", "unpack"):
                more = [self.directory / "out"] if command in ("optimize", "unpack") else []
                no_library = mock.patch.object(vma_tool.Zstd, "load", lambda: None)
                with self.subTest(name, command=command), hidden_programs(), no_library:
                    says = [f"package {package}", f"{name} -dc ", "| vma-tool "]
                    self.refused(command, path, *more, says=[str(path), *says])
                    self.refused(command, "-", *more, input=data, says=says)
                    self.assertEqual(snapshot(self.directory), before)

    def test_zstd_without_its_program(self) -> None:
        """The system's library reads what vzdump writes, in one frame or many, and its damage."""
        if type(vma_tool.Zstd.load()) is not vma_tool.Zstd:
            self.skipTest("no zstd library")
        plain = good()
        wanted = self.directory / "wanted.vma"
        self.ok("optimize", self.file("a.vma", plain), wanted)
        one = compress("zstd", plain)
        pieces = [plain[:70000], plain[70000:70001], plain[70001:]]
        many = b"".join(compress("zstd", piece) for piece in pieces)
        for number, data in enumerate((one, many)):
            path = self.file(f"a{number}.vma.zst", data)
            with self.subTest(number), hidden_programs():
                self.ok("verify", path)
                self.ok("verify", "-", input=data)
                output = self.directory / f"b{number}.vma"
                self.ok("optimize", path, output)
                self.assertEqual(sha256(output), sha256(wanted))
        for what, data, says in (
            ("cut", one[:-20], "cut short"),
            ("garbage", one + b"garbage", "zstd"),
            ("a byte", one[:-2] + bytes([one[-2] ^ 1]) + one[-1:], "zstd"),
        ):
            path = self.file("bad.vma.zst", data)
            with self.subTest(what), hidden_programs():
                self.assertIn(says, self.bad("verify", path))

    def test_in_place(self) -> None:
        """A compressed archive is not replaced by a plain one; the error shows the command."""
        for name, suggestion in (
            ("x.vma.zst", "vma-tool optimize {} {}/x.vma\n"),
            ("x.vma", "vma-tool optimize {} {}/x.vma.new\n"),
        ):
            path = self.file(name, compress("zstd", good()))
            before = snapshot(self.directory)
            for args in ([path], [path, path]):
                with self.subTest(name, args=len(args)):
                    line = self.refused("optimize", "--compress", "none", *args)
                    self.assertIn(suggestion.format(path, self.directory), line)
                    self.assertEqual(snapshot(self.directory), before)
            self.no_children()

    def test_header_alone(self) -> None:
        """list ends the decompressor when it has read the header, and is content with that."""
        plain = self.file("plain", archives.incompressible())
        want = json.loads(self.ok("list", "--json", plain))
        for name, way, context in self.ways():
            compressed = compress(name, archives.incompressible())
            path = self.file("a.x", compressed)
            cut = self.file("cut.x", compressed[: len(compressed) - 100])
            with self.subTest(name, way=way), context:
                for source in (path, cut, "-"):
                    data = compressed if source == "-" else None
                    found = json.loads(self.ok("list", "--json", source, input=data))
                    size = len(Path(source).read_bytes()) if source != "-" else None
                    told = {"compression": name, "compressed_size": size, "seekable": False}
                    self.assertEqual(found, {**want, **told})
                    self.no_children()

    def test_header_alone_from_a_slow_pipe(self) -> None:
        """list does not wait for the rest, whoever holds the pipe open."""
        for name in ("zstd", "gzip"):
            with self.subTest(name):
                process = self.start("list", "-", stdin=subprocess.PIPE)
                assert process.stdin
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(compress(name, archives.incompressible())[: 2 * MIB])
                    process.stdin.flush()
                self.check_ok(self.answer(process))

    def test_bomb(self) -> None:
        """A file that decompresses without end costs no memory."""
        bomb = compress("zstd", bytes(300 * MIB))
        header = archives.header_bytes(good_archive())
        for what, data in (
            ("zeros", bomb),
            ("header, then zeros", compress("zstd", header) + bomb),
        ):
            with self.subTest(what):
                answer, peak = run_measured("verify", "-", input=data)
                self.check_error(answer, status=BAD)
                self.assertLess(peak, 64 * MIB)

    def test_what_to_call_the_plain_archive(self) -> None:
        """The command that the error shows never has the compressed archive as its output."""
        (self.directory / "d.x").mkdir()
        data = gzip.compress(golden("live-order"))
        for name, other in (("c.vma.gz", "c.vma.zst"), ("b", "b.new.zst"),
                            ("d.x/b", "d.x/b.new.zst"), ("c.vma", "c.vma.new.zst")):  # fmt: skip
            path = self.file(name, data)
            line = self.refused("optimize", path)
            self.assertTrue(line.rstrip().endswith(f"{path} {self.directory / other}"), line)


class CleaningUp(ProcessTest):
    """Nothing is left of a decompressor, whether it went well or not."""

    def test_nothing_stays_open(self) -> None:
        """No file descriptor, thread or child is left, whether it went well or not."""
        zst = self.file("a.zst", compress("zstd", good()))
        bad = self.file("bad.zst", compress("zstd", good()[:-4096]))
        fds = Path("/proc/self/fd")
        if not fds.exists():
            self.skipTest("no /proc/self/fd here")
        target = self.directory / "out"

        def everything() -> None:
            for source in (zst, bad, "-"):
                data = zst.read_bytes() if source == "-" else None
                for command in ("verify", "list", "optimize", "unpack"):
                    more = [target] if command in ("optimize", "unpack") else []
                    call_tool(command, source, *more, input=data)
                    if target.is_dir():
                        shutil.rmtree(target)
                    target.unlink(missing_ok=True)

        everything()
        before = len(os.listdir(fds))
        for way, context in both_ways():
            with self.subTest(way), context:
                everything()
                gc.collect()
                self.assertEqual(len(os.listdir(fds)), before)
                self.no_children()
                self.wait_for(lambda: threading.active_count() == 1)

    def test_nothing_is_closed_twice(self) -> None:
        """A file descriptor that is closed may be somebody else's the next moment."""
        for name in ("zstd", "gzip", "xz"):
            path = self.file("a.x", compress(name, good()))
            for command in ("list", "verify"):
                with self.subTest(name, command=command):
                    with hidden_programs():
                        call_tool(command, path)
                    files = [open(path, "rb") for _ in range(10)]  # noqa: SIM115 - closed below
                    gc.collect()
                    for file in files:
                        os.fstat(file.fileno())
                        file.close()

    def test_files_are_closed_by_who_opened_them(self) -> None:
        """Nothing is left to the garbage collector, which says so."""
        for name in ("zstd", "gzip", "xz", "bzip2"):
            path = self.file("a.x", compress(name, good()))
            for way, context in both_ways():
                with self.subTest(name, way=way), context:
                    gc.collect()
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        with mock.patch("warnings.simplefilter"):
                            call_tool("verify", path)
                        gc.collect()
                    self.assertEqual([str(warning.message) for warning in caught], [])
