"""Pipes and compressed archives: the same answers without a plain file, in bounded memory."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gc
import gzip
import lzma
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import Archive, Device
from tests.damage import damages, good, good_archive
from tests.support import (
    Answer,
    Argument,
    ToolTest,
    call_tool,
    golden,
    manifest,
    require_program,
    run_measured,
    run_tool,
    sha256,
    small_file_system,
    snapshot,
    tool_command,
    unmeasured,
)

MIB = 1 << 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# name, program, Debian package, how it compresses, how Python does (None: it does not)
COMPRESSIONS: tuple[tuple[str, str, list[str], Callable[[bytes], bytes] | None], ...] = (
    ("zstd", "zstd", ["-q", "-1"], None),
    ("lzop", "lzop", ["-1"], None),
    ("gzip", "gzip", ["-1"], functools.partial(gzip.compress, compresslevel=1)),
    ("xz", "xz-utils", ["-0"], functools.partial(lzma.compress, preset=0)),
    ("bzip2", "bzip2", ["-1"], functools.partial(bz2.compress, compresslevel=1)),
)


def compress(name: str, data: bytes) -> bytes:
    """Compress with the real program."""
    _, package, options, _ = next(entry for entry in COMPRESSIONS if entry[0] == name)
    program = require_program(name, package)
    command = [program, *options, "-c"]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def hidden_programs() -> contextlib.AbstractContextManager[object]:
    """Return a context in which the machine has no program at all."""
    return mock.patch.dict(os.environ, PATH="/nowhere")


def both_ways() -> Iterator[tuple[str, contextlib.AbstractContextManager[object]]]:
    """Yield a context with the decompressors' programs, and one without."""
    yield "program", contextlib.nullcontext()
    yield "module", hidden_programs()


@functools.cache
def large() -> bytes:
    """Return an archive of 4 MiB that does not compress: more than any pipe holds."""
    archive = Archive([Device(1, "drive-scsi0", archives.disk(random.Random(1), 4 * MIB, "full"))])
    return archives.build(archive, archives.in_order(archive))


class StreamTest(ToolTest):
    """A test that also starts the tool and lets it run."""

    def start(self, *args: Argument, **kw: Any) -> subprocess.Popen[bytes]:
        """Start the tool in a session of its own; the test's end ends it."""
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            "env": unmeasured(),
        }
        settings.update(kw)
        process = subprocess.Popen(tool_command(*args), **settings)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                # what stdin still buffers for a reader that is gone
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def answer(self, process: subprocess.Popen[bytes], timeout: float = 20) -> Answer[bytes]:
        """Wait for a tool that was started; nothing that it started itself may be left."""
        assert process.stderr
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end(process)
            self.fail(f"it hangs: {process.args!r}")
        with self.assertRaises(ProcessLookupError, msg="a child process is left"):
            os.killpg(process.pid, 0)
        output = process.stdout.read() if process.stdout and not process.stdout.closed else b""
        return Answer([], status, output, process.stderr.read())

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something has come about."""
        deadline = time.monotonic() + 20
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not come about")
            time.sleep(0.01)

    def no_children(self) -> None:
        """Check that calls in this process left no child."""
        with self.assertRaises(ChildProcessError, msg="a child process is left"):
            os.waitpid(-1, os.WNOHANG)


class StandardInput(StreamTest):
    """Where a stream comes from."""

    def test_golden_archives(self) -> None:
        """optimize - -: all 36 digests."""
        for name, want in manifest().items():
            for align, digest in want["optimized_sha256"].items():
                with self.subTest(archive=name, align=align):
                    answer = call_tool("optimize", "--align", align, "-", "-", input=golden(name))
                    self.check_ok(answer)
                    self.assertEqual(sha256(answer.stdout), digest)

    def test_to_a_file(self) -> None:
        output = self.directory / "out.vma"
        for name, want in manifest().items():
            with self.subTest(archive=name):
                self.ok("optimize", "-", output, input=golden(name))
                self.assertEqual(sha256(output), want["optimized_sha256"]["128K"])
                self.assertEqual(os.listdir(self.directory), ["out.vma"])

    def test_other_streams(self) -> None:
        """A FIFO, /dev/stdin and a process substitution do as well as -."""
        want = manifest()["live-order"]["optimized_sha256"]["128K"]
        data = golden("live-order")
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        output = self.directory / "out.vma"
        for command in ("verify", "list", "optimize"):
            args = [output] if command == "optimize" else []
            with self.subTest(command, stream="FIFO"):

                def feed() -> None:
                    with contextlib.suppress(BrokenPipeError):
                        fifo.write_bytes(data)

                writer = threading.Thread(target=feed)
                writer.start()
                self.ok(command, fifo, *args)
                writer.join()
            with self.subTest(command, stream="/dev/stdin"):
                self.ok(command, "/dev/stdin", *args, input=data)
            with self.subTest(command, stream="process substitution"):
                source = self.file("a.vma", data)
                script = f'"$@" <(cat {source})' + (f" {output}" if args else "")
                prefix = [require_program("bash", "bash"), "-c", script, "bash"]
                self.check_ok(run_tool(command, prefix=prefix))
            if args:
                self.assertEqual(sha256(output), want)

    def test_file_as_standard_input(self) -> None:
        """A file there is read at any place; one that somebody began to read, in its order."""
        want = manifest()["live-order"]["optimized_sha256"]["128K"]
        path = self.file("a.vma", b"#!preamble\n" + golden("live-order"))
        for start in (0, 11):
            if not start:
                path.write_bytes(golden("live-order"))
            else:
                path.write_bytes(b"#!preamble\n" + golden("live-order"))
            with self.subTest(start=start), open(path, "rb", buffering=0) as file:
                file.seek(start)
                answer = run_tool("optimize", "-", "-", stdin=file)
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), want)

    def test_replaced_by_its_own_output(self) -> None:
        """`optimize - a.vma < a.vma` reads all of the old file before the new one is there."""
        path = self.file("a.vma", golden("live-order"))
        with open(path, "rb") as file:
            self.check_ok(run_tool("optimize", "-", path, stdin=file))
        self.assertEqual(sha256(path), manifest()["live-order"]["optimized_sha256"]["128K"])

    def test_one_byte_at_a_time(self) -> None:
        """However short the reads are."""
        data = golden("odd-size")
        want = manifest()["odd-size"]["optimized_sha256"]["4K"]
        pieces = (data[i : i + 1] for i in range(len(data)))
        answer = call_tool("optimize", "--align", "4K", "-", "-", input=pieces)
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), want)
        compressed = compress("zstd", data)
        pieces = (compressed[i : i + 1] for i in range(len(compressed)))
        answer = call_tool("optimize", "--align", "4K", "-", "-", input=pieces)
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), want)

    def test_pieces_of_any_size(self) -> None:
        rng = random.Random(2)
        data = golden("interleaved")
        want = manifest()["interleaved"]["optimized_sha256"]["128K"]

        def pieces() -> Iterator[bytes]:
            at = 0
            while at < len(data):
                size = rng.choice([1, 2, 511, 513, 4096, 70000])
                yield data[at : at + size]
                at += size

        for _ in range(5):
            answer = call_tool("optimize", "-", "-", input=pieces())
            self.check_ok(answer)
            self.assertEqual(sha256(answer.stdout), want)

    def test_without_an_output(self) -> None:
        """A stream cannot be replaced; nothing is written, also if standard input is a file."""
        for data in (good(), archives.canonical(good_archive())):
            for source in ("-", "/dev/stdin"):
                with self.subTest(source):
                    self.check_no_output(call_tool("optimize", source, input=data))

    def check_no_output(self, answer: Answer[bytes]) -> None:
        """Check that the lack of an OUTPUT is what is wrong."""
        self.assertIn(answer.returncode, (1, 2))
        self.assertEqual(answer.stdout, b"")
        self.assertIn(b"name an OUTPUT", answer.stderr.splitlines()[-1])

    def test_file_as_standard_input_without_an_output(self) -> None:
        """A file there has no name that could be taken: that is refused as well."""
        for data in (good(), archives.canonical(good_archive())):
            with open(self.file("a.vma", data), "rb") as file:
                self.check_no_output(run_tool("optimize", "-", stdin=file))

    def test_closed_standard_input(self) -> None:
        for command in (["verify", "-"], ["optimize", "-", "-"]):
            with self.subTest(command[0]):
                prefix = ["sh", "-c", 'exec "$@" <&-', "sh"]
                self.check_error(run_tool(*command, prefix=prefix), "standard input")

    def test_two_streams(self) -> None:
        """verify goes through standard input once."""
        answer = call_tool("verify", "-", "-", input=good())
        self.assertEqual(answer.returncode, 1)
        self.assertIn(b"standard input: OK", answer.stdout)
        self.assertIn(b"empty file", answer.stderr)


class Outputs(StreamTest):
    """Where a stream goes to."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.want = manifest()["live-order"]["optimized_sha256"]["128K"]

    def test_pack(self) -> None:
        target = self.directory / "dir"
        self.ok("unpack", self.source, target)
        answer = call_tool("pack", target, "-")
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), self.want)

    def closed(self, streams: str, *args: Argument) -> Answer[bytes]:
        """Run the tool with some of its standard streams closed, not only empty."""
        return run_tool(*args, prefix=["sh", "-c", f'exec "$@" {streams}', "sh"])

    def test_closed_standard_error(self) -> None:
        """What is meant for it does not get into an archive on standard output."""
        answer = self.closed("2>&-", "optimize", "-v", self.source, "-")
        self.assertEqual((answer.returncode, sha256(answer.stdout)), (0, self.want))
        for args, status in ((["optimize", "missing", "-"], 1), (["optimize", "--wrong"], 2)):
            answer = self.closed("2>&-", *args)
            self.assertEqual((answer.returncode, answer.stdout), (status, b""))

    def test_closed_standard_output(self) -> None:
        """An archive does not go into a file that happened to get its number."""
        answer = self.closed(">&-", "optimize", self.source, "-")
        self.check_error(answer, "standard output")
        self.assertEqual(sha256(self.source), manifest()["live-order"]["sha256"])

    def test_closed_standard_streams(self) -> None:
        target = self.directory / "b.vma"
        answer = self.closed("<&- >&- 2>&-", "optimize", "-v", self.source, target)
        self.assertEqual((answer.returncode, sha256(target)), (0, self.want))

    def test_fifo(self) -> None:
        """The writer waits for a reader; nothing is put in the FIFO's place."""
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        process = self.start("optimize", self.source, fifo)
        self.assertEqual(sha256(fifo.read_bytes()), self.want)
        self.check_ok(self.answer(process))
        self.assertTrue(fifo.is_fifo())

    def test_standard_output_by_its_path(self) -> None:
        """/dev/stdout does as well as -, and nothing but the archive is written to it."""
        for target in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
            with self.subTest(target):
                answer = run_tool("optimize", self.source, target)
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), self.want)

    def test_process_substitution(self) -> None:
        copy = self.directory / "copy.vma"
        script = f'"$@" >(cat > {copy}; echo done >> {copy}.done)'
        prefix = [require_program("bash", "bash"), "-c", script, "bash"]
        self.check_ok(run_tool("optimize", self.source, prefix=prefix))
        self.wait_for((self.directory / "copy.vma.done").exists)
        self.assertEqual(sha256(copy), self.want)

    def test_reader_that_goes_away(self) -> None:
        """Status 141, not a word, and no child is left."""
        zst = self.file("large.zst", compress("zstd", large()))
        gz = self.file("large.gz", compress("gzip", large()))
        plain = self.file("large.vma", large())
        target = self.directory / "dir"
        self.ok("unpack", plain, target)
        cases: list[tuple[str, list[Argument], bytes | None]] = [
            ("a file", ["optimize", plain, "-"], None),
            ("zstd", ["optimize", zst, "-"], None),
            ("gzip", ["optimize", gz, "-"], None),
            ("a pipe", ["optimize", "-", "-"], large()),
            ("zstd in a pipe", ["optimize", "-", "-"], zst.read_bytes()),
            ("pack", ["pack", target, "-"], None),
        ]
        for what, args, data in cases:
            for size in (0, 1, 100000):
                with self.subTest(what, size=size):
                    answer = self.read_a_little(args, data, size)
                    self.assertEqual((answer.returncode, answer.stderr), (141, b""))

    def read_a_little(self, args: list[Argument], data: bytes | None, size: int) -> Answer[bytes]:
        """Run the tool, read so many bytes of its output, and go away."""
        process = self.start(*args, stdin=subprocess.PIPE)
        assert process.stdin and process.stdout
        stdin = process.stdin

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError), stdin:
                stdin.write(data or b"")

        feeder = threading.Thread(target=feed)
        feeder.start()
        self.assertEqual(len(process.stdout.read(size)), size)
        process.stdout.close()
        answer = self.answer(process)
        feeder.join()
        return answer

    def test_closed_pipe_for_text(self) -> None:
        """What prints text is as quiet when its reader goes away."""
        for command in ("list", "verify"):
            with self.subTest(command):
                process = self.start(command, self.source)
                assert process.stdout
                process.stdout.close()
                answer = self.answer(process)
                self.assertEqual((answer.returncode, answer.stderr), (141, b""))

    def test_terminals(self) -> None:
        """An archive is not read from a terminal, nor written to one."""
        leader, follower = pty.openpty()
        self.addCleanup(os.close, leader)
        self.addCleanup(os.close, follower)
        target = self.directory / "dir"
        self.ok("unpack", self.source, target)
        for args in (["verify", "-"], ["list", "-"], ["optimize", "-", "-"]):
            with self.subTest(args=args):
                answer = run_tool(*args, stdin=follower, timeout=10)
                self.check_error(answer, "standard input is a terminal")
        for command, source in (("optimize", self.source), ("pack", target)):
            with self.subTest(command):
                answer = run_tool(command, source, "-", stdout=follower, timeout=10)
                self.check_error(answer, "standard output is a terminal")
        self.assertEqual(select.select([leader], [], [], 0)[0], [])

    def test_progress(self) -> None:
        """On a terminal a line shows how far it is, at most ten times a second, and is finished."""
        leader, follower = pty.openpty()
        process = self.start("optimize", "-", "-", stdin=subprocess.PIPE, stderr=follower)
        os.close(follower)
        assert process.stdin and process.stdout
        data = golden("live-order")
        start = time.monotonic()
        for at in range(0, len(data), 20000):
            process.stdin.write(data[at : at + 20000])
            process.stdin.flush()
            time.sleep(0.03)
        process.stdin.close()
        self.assertEqual(sha256(process.stdout.read()), self.want)
        self.assertEqual(process.wait(20), 0)
        seconds = time.monotonic() - start
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while data := os.read(leader, 10000):
                shown += data
        os.close(leader)
        lines = shown.split(b"\r")
        self.assertGreater(len(lines), 3)
        self.assertLess(len(lines), 10 * seconds + 5)
        self.assertIn(b"standard input: ", lines[-2])
        self.assertIn(b"KiB/s", lines[-2])
        self.assertTrue(shown.endswith(b"\r\n"))

    def test_no_progress(self) -> None:
        """None with -q, and none where standard error is no terminal (as in all other tests)."""
        leader, follower = pty.openpty()
        self.addCleanup(os.close, leader)
        answer = run_tool("optimize", "-q", self.source, "-", stderr=follower)
        os.close(follower)
        self.assertEqual(answer.returncode, 0)
        self.assertEqual(sha256(answer.stdout), self.want)
        self.assertEqual(select.select([leader], [], [], 0)[0], [leader])
        with self.assertRaises(OSError):
            os.read(leader, 100)


class Compressed(StreamTest):
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
        plain = self.ok("list", "--json", "--scan", self.file("plain", data))
        for name, way, context in self.ways():
            compressed = compress(name, data)
            path = self.file("archive.of.any.name", compressed)
            for source in (str(path), "-"):
                kw: dict[str, Any] = {"input": compressed} if source == "-" else {}
                with self.subTest(name, way=way, source=source[-1]), context:
                    self.assertIn(": OK, 3 devices", self.ok("verify", source, **kw))
                    self.assertEqual(self.ok("list", "--json", "--scan", source, **kw), plain)
                    self.ok("list", source, **kw)
                    self.ok("optimize", source, output, **kw)
                    self.assertEqual(sha256(output), want["optimized_sha256"]["128K"])
                    self.ok("unpack", "--force", source, target, **kw)
                    for device in want["devices"]:
                        self.assertEqual(sha256(target / device["name"]), device["sha256"])
                self.no_children()

    def test_by_python(self) -> None:
        """What Python's own modules compress is read with and without the programs."""
        want = manifest()["odd-size"]["optimized_sha256"]["128K"]
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
        want = manifest()["live-order"]["optimized_sha256"]["128K"]
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
                line = self.refused(*args, source, *more, input=data if source == "-" else None)
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
        with mock.patch.dict(os.environ, dict.fromkeys(vma_tool.CODEC_OPTIONS, "-v")):
            for name, data in compressed.items():
                with self.subTest(name):
                    self.ok("verify", "-", input=data)

    def test_changed_while_it_is_read(self) -> None:
        """Also where no checksum tells: the disk of two files is never called one."""
        for name, way, context in self.ways():
            compressed = compress(name, good())
            path = self.file("a.vma.x", compressed)
            finish = vma_tool.Index.finish

            def rewrite(
                index: vma_tool.Index,
                path: Path = path,
                data: bytes = compressed,
                finish: Callable[[vma_tool.Index], None] = finish,
            ) -> None:
                finish(index)
                path.write_bytes(data)

            for command in (["verify"], ["optimize"], ["unpack"], ["list", "--scan"]):
                more = [self.directory / "out"] if command[0] in ("optimize", "unpack") else []
                rewritten = mock.patch.object(vma_tool.Index, "finish", rewrite)
                with self.subTest(name, way=way, command=command), context, rewritten:
                    says = ["changed while it was read"]
                    self.refused(*command, path, *more, says=says)
                    self.assertEqual(os.listdir(self.directory), [path.name])

    def test_damaged_archives(self) -> None:
        """A bad archive in a sound compressed file has the message of the plain one."""
        for damage in damages():
            if not damage.data:
                continue
            compressed = compress("gzip", damage.data) if len(damage.data) < 20000 else b""
            data = compressed or gzip.compress(damage.data, 0)
            with self.subTest(damage.name):
                self.assertRegex(self.refused("verify", "-", input=data), damage.says)

    def test_missing_program(self) -> None:
        """One line names the package, and the pipe to use instead."""
        for name, package in (("zstd", "zstd"), ("lzop", "lzop")):
            data = compress(name, good())
            path = self.file("a.vma.x", data)
            before = snapshot(self.directory)
            for command in ("verify", "list", "optimize", "unpack"):
                more = [self.directory / "out"] if command in ("optimize", "unpack") else []
                with self.subTest(name, command=command), hidden_programs():
                    says = [f"package {package}", f"{name} -dc ", "| vma-tool "]
                    self.refused(command, path, *more, says=[str(path), *says])
                    self.refused(command, "-", *more, input=data, says=says)
                    self.assertEqual(snapshot(self.directory), before)

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
                    line = self.refused("optimize", *args)
                    self.assertIn(suggestion.format(path, self.directory), line)
                    self.assertEqual(snapshot(self.directory), before)
            self.no_children()

    def test_header_alone(self) -> None:
        """list ends the decompressor when it has read the header, and is content with that."""
        want = self.ok("list", "--json", self.file("plain", large()))
        for name, way, context in self.ways():
            compressed = compress(name, large())
            path = self.file("a.x", compressed)
            cut = self.file("cut.x", compressed[: len(compressed) - 100])
            with self.subTest(name, way=way), context:
                for source in (path, cut):
                    self.assertEqual(self.ok("list", "--json", source), want)
                    self.no_children()
                self.assertEqual(self.ok("list", "--json", "-", input=compressed), want)
                self.no_children()

    def test_header_alone_from_a_slow_pipe(self) -> None:
        """list does not wait for the rest, whoever holds the pipe open."""
        for name in ("zstd", "gzip"):
            with self.subTest(name):
                process = self.start("list", "-", stdin=subprocess.PIPE)
                assert process.stdin
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(compress(name, large())[: 2 * MIB])
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
                self.check_error(answer)
                self.assertLess(peak, 64 * MIB)


class OnePass(StreamTest):
    """The one-pass reorderer: the same bytes in bounded memory."""

    def orders(self) -> dict[str, tuple[Archive, archives.Order]]:
        """Return the six orders in which a stream may come, each with its archive."""
        rng = random.Random(17)
        guest = archives.three_disks(rng, vmstate=True)
        disks = [Device(n, f"drive-scsi{n}", archives.disk(rng, 3 * MIB + n * 512)) for n in (1, 2)]
        two = Archive(disks, [("a.conf", b"text")])
        return {
            "in order": (guest, archives.in_order(guest)),
            "live": (guest, archives.live_order(guest, rng)),
            "interleaved": (two, archives.interleaved(two)),
            "random": (guest, archives.shuffled(guest, rng)),
            "reversed": (guest, archives.reversed_order(guest)),
            "vmstate first": (guest, archives.vmstate_first(guest)),
        }

    def test_same_bytes(self) -> None:
        """Whatever the order, and however little may wait in memory."""
        for what, (archive, order) in self.orders().items():
            data = archives.build(archive, order)
            for align in ("4K", "128K", "1M"):
                want = sha256(archives.canonical(archive, archives.ALIGNS[align]))
                for memory in ("0", "64K", "1M", "256M"):
                    with self.subTest(what, align=align, memory=memory):
                        options = ["--align", align, "--memory", memory]
                        answer = call_tool("optimize", *options, "-", "-", input=data)
                        self.check_ok(answer)
                        self.assertEqual(sha256(answer.stdout), want)

    def test_random_archives(self) -> None:
        """Zero blocks that are stored, empty extents and slots, extents of any length."""
        for seed in range(15):
            rng = random.Random(seed)
            archive = archives.three_disks(rng, vmstate=rng.random() < 0.5)
            stored = archives.masks_with_zeros(archive, rng, rng.choice([0, 0.1]))
            data = archives.build(
                archive,
                archives.shuffled(archive, rng),
                slots=rng.choice([1, 30, 59]),
                store_zero_blocks=stored,
                empty_extents=rng.random() < 0.5,
                empty_slots=rng.random() < 0.5,
            )
            memory = rng.choice(["0", "100K", "600K"])
            with self.subTest(seed=seed, memory=memory):
                answer = call_tool("optimize", "--memory", memory, "-", "-", input=data)
                self.check_ok(answer)
                want = archives.canonical(archive, 131072, stored)
                self.assertEqual(sha256(answer.stdout), sha256(want))

    def test_no_temporary_file(self) -> None:
        """An archive in live order needs none; one that needs it says where it cannot be."""
        nowhere = {**os.environ, "TMPDIR": str(self.directory / "nowhere")}
        path = self.directory / "a.vma"
        output = self.directory / "out.vma"
        for order, needed in (("in-order", False), ("live", False), ("reversed", True)):
            archives.write_large(path, size=96 * MIB, data_bytes=48 * MIB, order=order)
            with (
                self.subTest(order),
                open(path, "rb") as file,
                subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat,
            ):
                answer = run_tool(
                    "optimize", "--memory", "16M", "-", output, env=nowhere, stdin=cat.stdout
                )
                if needed:
                    self.check_error(answer, nowhere["TMPDIR"], "No such file or directory")
                    self.assertEqual(os.listdir(self.directory), ["a.vma"])
                else:
                    self.check_ok(answer)
                    output.unlink()

    def test_place_of_the_temporary_file(self) -> None:
        """It is in $TMPDIR, else beside the output, and has no name that could be left."""
        data = archives.build(*self.orders()["interleaved"])
        places: list[str] = []
        real = tempfile.TemporaryFile

        def note(*args: Any, **kw: Any) -> Any:
            if "dir" in kw:  # the test's own have none
                places.append(kw["dir"])
            return real(*args, **kw)

        for name in ("tmp", "out"):
            (self.directory / name).mkdir()
        output = self.directory / "out" / "out.vma"
        for environment, place in (
            ({"TMPDIR": str(self.directory / "tmp")}, self.directory / "tmp"),
            ({}, output.parent),
        ):
            places.clear()
            with mock.patch("tempfile.TemporaryFile", note), mock.patch.dict(os.environ):
                os.environ.pop("TMPDIR", None)
                os.environ.update(environment)
                self.ok("optimize", "--memory", "64K", "-", output, input=data)
            self.assertEqual([os.path.realpath(p) for p in places], [os.path.realpath(place)])
            self.assertEqual(os.listdir(self.directory / "tmp"), [])
            self.assertEqual(os.listdir(output.parent), ["out.vma"])

    def test_full_temporary_directory(self) -> None:
        """One clear line that says which directory is full; nothing is left."""
        tmp = small_file_system(self, MIB)
        data = archives.build(*self.orders()["interleaved"])
        output = self.directory / "out.vma"
        environment = {**os.environ, "TMPDIR": str(tmp)}
        answer = run_tool("optimize", "--memory", "64K", "-", output, input=data, env=environment)
        self.check_error(answer, str(tmp), "No space left on device")
        self.assertEqual(os.listdir(self.directory), [])
        self.assertEqual(os.listdir(tmp), [])

    def test_size_of_the_temporary_file(self) -> None:
        """Of two disks that alternate, at most the second one waits: here 16 of 32 MiB."""
        rng = random.Random(3)
        disks = [Device(n, f"drive-scsi{n}", archives.disk(rng, 16 * MIB, "full")) for n in (1, 2)]
        archive = Archive(disks)
        tmp = small_file_system(self, 16 * MIB + 4096)
        answer = run_tool(
            "optimize", "--align", "4K", "--memory", "12M", "-", "-",
            input=archives.build(archive, archives.interleaved(archive)),
            env={**os.environ, "TMPDIR": str(tmp)},
        )  # fmt: skip
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), sha256(archives.canonical(archive, 4096)))

    def test_memory(self) -> None:
        """The peak stays within --memory and 64 MiB, whatever the order of 120 MiB."""
        path = self.directory / "a.vma"
        for order in archives.LARGE_ORDERS:
            archives.write_large(path, size=192 * MIB, data_bytes=96 * MIB, order=order)
            with self.subTest(order), open(path, "rb") as file:
                cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
                answer, peak = run_measured(
                    "optimize", "--memory", "8M", "-", "/dev/null", stdin=cat.stdout
                )
                assert cat.stdout
                cat.stdout.close()
                cat.wait()
                self.check_ok(answer)
                self.assertLess(peak, (8 + 64) * MIB)


class Failures(StreamTest):
    """What ends in the middle leaves nothing half."""

    def test_damaged_archives(self) -> None:
        """The whole table through each command: the message, no output, no disk, no directory."""
        commands = ("optimize", "unpack", "extract")
        for damage in damages():
            with self.subTest(damage.name):
                for command in commands:
                    line = self.refused(command, "-", self.directory / "out", input=damage.data)
                    self.assertRegex(line, damage.says)
                    self.assertEqual(os.listdir(self.directory), [])

    def test_standard_output_cannot_be_taken_back(self) -> None:
        """The error says that what has gone to standard output is no archive."""
        path = self.directory / "a.vma"
        archives.write_large(path, size=32 * MIB, data_bytes=24 * MIB, order="in-order")
        data = path.read_bytes()
        for what, bad in (("cut", data[:-1]), ("longer", data + b"x")):
            with self.subTest(what):
                answer = call_tool("optimize", "-", "-", input=bad)
                self.assertNotEqual(answer.stdout, b"")
                self.check_error(answer, "standard output")

    def test_full_output(self) -> None:
        self.refused("optimize", "-", "/dev/full", input=good(), says=["/dev/full", "No space"])
        with open("/dev/full", "wb") as full:
            answer = run_tool("optimize", "-", "-", input=good(), stdout=full)
        self.check_error(answer, "standard output", "No space left on device")

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a tool that was started handles signals, and a little longer."""
        status = Path(f"/proc/{process.pid}/status")

        def handles_signals() -> bool:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return bool(int(fields["SigCgt"], 16) >> signal.SIGTERM - 1 & 1)

        if status.exists():
            self.wait_for(lambda: process.poll() is not None or handles_signals())
        time.sleep(0.1 if status.exists() else 1)

    def test_signal_while_waiting_for_input(self) -> None:
        """Whoever waits for a slow producer can be ended, before its first byte and after."""
        cases: list[tuple[str, signal.Signals, int, Path, subprocess.Popen[bytes]]] = []
        compressed = compress("zstd", large())[:100000]
        for command, signals in (
            ("optimize", SIGNALS),
            ("verify", SIGNALS[1:2]),
            ("unpack", SIGNALS[1:2]),
        ):
            for signum in signals:
                for sent in (b"", b"VMA", good()[:20000], compressed):
                    directory = self.directory / str(len(cases))
                    directory.mkdir()
                    more = [directory / "out"] if command != "verify" else []
                    process = self.start(command, "-", *more, stdin=subprocess.PIPE)
                    assert process.stdin
                    process.stdin.write(sent)
                    process.stdin.flush()
                    cases.append((command, signum, len(sent), directory, process))
        for *_, process in cases:
            self.wait_until_ready(process)
        for command, signum, sent_size, directory, process in cases:
            with self.subTest(command, signal=signum.name, sent=sent_size):
                process.send_signal(signum)
                answer = self.answer(process, timeout=5)
                self.check_ended(answer, signum)
                self.assertEqual(os.listdir(directory), [])

    def check_ended(self, answer: Answer[bytes], signum: signal.Signals) -> None:
        """Check that a signal ended the tool, and that it says so."""
        text = answer.stderr.decode()
        want = f"vma-tool: ended by {signum.name}\n"
        self.assertEqual((answer.returncode, text), (128 + signum, want))

    def test_signal_while_waiting_for_a_fifo(self) -> None:
        """A FIFO that nobody opens at its other end does not hold the tool either."""
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        source = self.file("a.vma", good())
        for command, more in (("verify", []), ("optimize", [source])):
            with self.subTest(command):
                process = self.start(command, *more, fifo)
                self.wait_until_ready(process)
                process.send_signal(signal.SIGTERM)
                answer = self.answer(process, timeout=5)
                self.check_ended(answer, signal.SIGTERM)

    def test_signal_while_writing(self) -> None:
        """A reader that does not read does not hold the tool either."""
        plain = self.file("large.vma", large())
        for source in (str(plain), "-"):
            with self.subTest(source[-1]):
                process = self.start("optimize", source, "-", stdin=subprocess.PIPE)
                stdin = process.stdin
                assert stdin

                def feed(stdin: Any = stdin) -> None:
                    with contextlib.suppress(BrokenPipeError), stdin:
                        stdin.write(large())

                feeder = threading.Thread(target=feed)
                feeder.start()
                self.wait_until_ready(process)
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                answer = self.answer(process, timeout=10)
                feeder.join()
                self.check_ended(answer, signal.SIGTERM)

    def test_ignored_signal(self) -> None:
        """What the caller ignores stays ignored: nohup."""
        process = self.start(
            "optimize", "-", "-", stdin=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )  # fmt: skip
        assert process.stdin
        process.stdin.write(good()[:20000])
        process.stdin.flush()
        self.wait_until_ready(process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        output, errors = process.communicate(good()[20000:], timeout=20)
        self.assertEqual((process.returncode, errors), (0, b""))
        self.assertEqual(sha256(output), sha256(archives.canonical(good_archive())))

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


class Pipelines(StreamTest):
    """With the real programs, as the README shows them."""

    def shell(self, script: str, **variables: Argument) -> str:
        """Run a script in which $tool is the tool; each program of a pipe has to succeed."""
        command = ["bash", "-euo", "pipefail", "-c", f'tool() {{ {TOOL_WORDS} "$@"; }}\n{script}']
        answer = subprocess.run(
            command,
            env={**os.environ, **{name: os.fspath(value) for name, value in variables.items()}},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.assertEqual(answer.returncode, 0, answer.stderr)
        return answer.stdout

    def test_restic(self) -> None:
        """An archive goes into a restic repository by standard input, and comes back the same."""
        require_program("restic", "restic")
        require_program("bash", "bash")
        source = self.file("x.vma.zst", compress("zstd", golden("live-order")))
        repository = self.directory / "repository"
        variables: dict[str, Argument] = {
            "RESTIC_REPOSITORY": repository,
            "RESTIC_PASSWORD": "test",
            "RESTIC_CACHE_DIR": self.directory / "cache",
            "source": source,
            "out": self.directory / "restored.vma",
        }
        self.shell(
            "restic init --quiet\n"
            'tool optimize "$source" - | restic backup --quiet --stdin --stdin-filename x.vma\n'
            'restic dump latest x.vma > "$out"',
            **variables,
        )
        restored = self.directory / "restored.vma"
        want = manifest()["live-order"]["optimized_sha256"]["128K"]
        self.assertEqual(sha256(restored), want)
        self.ok("verify", restored)

    def test_zstdcat_unpack(self) -> None:
        """`zstdcat x.vma.zst | vma-tool unpack - dir/`."""
        require_program("zstdcat", "zstd")
        source = self.file("x.vma.zst", compress("zstd", golden("vmstate")))
        target = self.directory / "dir"
        self.shell('zstdcat "$source" | tool unpack - "$target/"', source=source, target=target)
        for device in manifest()["vmstate"]["devices"]:
            self.assertEqual(sha256(target / device["name"]), device["sha256"])

    def test_from_compressed_to_compressed(self) -> None:
        """Through pipes from one program to the next, and back into a verdict."""
        source = self.file("x.vma.lzo", compress("lzop", golden("interleaved")))
        output = self.directory / "y.vma.zst"
        self.shell(
            'tool optimize --align 4K "$source" - | zstd -q -o "$output"\n'
            'zstdcat "$output" | tool verify -\ntool verify "$output"',
            source=source,
            output=output,
        )
        want = manifest()["interleaved"]["optimized_sha256"]["4K"]
        plain = subprocess.run(["zstdcat", str(output)], stdout=subprocess.PIPE, check=True).stdout
        self.assertEqual(sha256(plain), want)

    def test_pipefail(self) -> None:
        """A producer that fails in the middle makes an archive that is cut: that is an error."""
        source = self.file("x.vma", good())
        target = self.directory / "dir"
        script = 'head -c 300000 "$source" | tool unpack - "$target" && exit 1 || exit 0'
        self.shell(script, source=source, target=target)
        self.assertFalse(target.exists())


TOOL_WORDS = " ".join(f"'{word}'" for word in tool_command())
