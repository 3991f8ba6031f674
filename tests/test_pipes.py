"""Pipes, FIFOs, standard streams: where an archive comes from and goes to without a file."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pty
import random
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import MIB
from tests.damage import good, good_archive
from tests.faults import AnyFileIO
from tests.support import (
    ALL,
    BAD,
    Answer,
    Argument,
    OsProxy,
    ProcessTest,
    ToolTest,
    call_tool,
    compress,
    golden,
    manifest,
    require_program,
    run_tool,
    sha256,
    tool_command,
)


class StandardInput(ProcessTest):
    """Where a stream comes from."""

    def test_golden_archives(self) -> None:
        """optimize - -: every digest."""
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
                self.ok("optimize", "--force", "-", output, input=golden(name))
                self.assertEqual(sha256(output), want["optimized_sha256"]["512K"])
                self.assertEqual(os.listdir(self.directory), ["out.vma"])

    def test_other_streams(self) -> None:
        """/dev/stdin and a process substitution do as well as -."""
        want = manifest()["live-order"]["optimized_sha256"]["512K"]
        data = golden("live-order")
        output = self.directory / "out.vma"
        for command in ("verify", "list", "optimize"):
            args: list[Argument] = ["--force", output] if command == "optimize" else []
            with self.subTest(command, stream="/dev/stdin"):
                self.ok(command, "/dev/stdin", *args, input=data)
            with self.subTest(command, stream="process substitution"):
                source = self.file("a.vma", data)
                script = f'"$@" <(cat {source})' + (f" --force {output}" if args else "")
                prefix = [require_program("bash", "bash"), "-c", script, "bash"]
                self.check_ok(run_tool(command, prefix=prefix))
            if args:
                self.assertEqual(sha256(output), want)

    def test_file_as_standard_input(self) -> None:
        """A file there is read at any place; one that somebody began to read, in its order."""
        want = manifest()["live-order"]["optimized_sha256"]["512K"]
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
        self.assertEqual(sha256(path), manifest()["live-order"]["optimized_sha256"]["512K"])

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
        want = manifest()["interleaved"]["optimized_sha256"]["512K"]

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
        self.assertEqual(answer.returncode, BAD)
        self.assertIn(b"standard input: OK", answer.stdout)
        self.assertIn(b"empty file", answer.stderr)


class Outputs(ProcessTest):
    """Where a stream goes to."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.want = manifest()["live-order"]["optimized_sha256"]["512K"]

    def test_pack(self) -> None:
        target = self.directory / "dir"
        self.ok("unpack", self.source, target)
        answer = call_tool("pack", "-q", target, "-")
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
        answer = self.closed("<&- >&- 2>&-", "optimize", "-q", self.source, target)
        self.assertEqual((answer.returncode, sha256(target)), (0, self.want))

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
        zst = self.file("large.zst", compress("zstd", archives.incompressible()))
        gz = self.file("large.gz", compress("gzip", archives.incompressible()))
        plain = self.file("large.vma", archives.incompressible())
        target = self.directory / "dir"
        self.ok("unpack", plain, target)
        cases: list[tuple[str, list[Argument], bytes | None]] = [
            ("a file", ["optimize", plain, "-"], None),
            ("zstd", ["optimize", zst, "-"], None),
            ("gzip", ["optimize", gz, "-"], None),
            ("a pipe", ["optimize", "-", "-"], archives.incompressible()),
            ("zstd in a pipe", ["optimize", "-", "-"], zst.read_bytes()),
            ("pack", ["pack", "-q", target, "-"], None),
        ]
        for what, args, data in cases:
            for size in (0, 1, 100000)[:: 1 if ALL else 2]:
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

    def test_standard_output_cannot_be_taken_back(self) -> None:
        """The error says that what has gone to standard output is no archive."""
        path = self.directory / "a.vma"
        archives.write_large(path, size=32 * MIB, data_bytes=24 * MIB, order="in-order")
        data = path.read_bytes()
        for what, bad in (("cut", data[:-1]), ("longer", data + b"x")):
            with self.subTest(what):
                answer = call_tool("optimize", "-", "-", input=bad)
                self.assertNotEqual(answer.stdout, b"")
                self.check_error(answer, "standard output", status=BAD)

    def test_full_output(self) -> None:
        self.refused("optimize", "-", "/dev/full", input=good(), says=["/dev/full", "No space"])
        with open("/dev/full", "wb") as full:
            answer = run_tool("optimize", "-", "-", input=good(), stdout=full)
        self.check_error(answer, "standard output", "No space left on device")


class Fifos(ProcessTest):
    """A FIFO is a pipe with a name."""

    def setUp(self) -> None:
        super().setUp()
        self.fifo = self.directory / "fifo"
        os.mkfifo(self.fifo)

    def test_as_input(self) -> None:
        want = manifest()["live-order"]["optimized_sha256"]["512K"]
        output = self.directory / "out.vma"

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError):
                self.fifo.write_bytes(golden("live-order"))

        for command in ("verify", "list", "optimize"):
            with self.subTest(command):
                writer = threading.Thread(target=feed)
                writer.start()
                self.ok(command, self.fifo, *([output] if command == "optimize" else []))
                writer.join()
        self.assertEqual(sha256(output), want)

    def test_as_output(self) -> None:
        """The writer waits for a reader; nothing is put in the FIFO's place."""
        disk = manifest()["live-order"]["devices"][1]
        want = manifest()["live-order"]["optimized_sha256"]["512K"]
        source = self.file("a.vma", golden("live-order"))
        calls: list[tuple[list[Argument], str]] = [
            (["optimize", source, self.fifo], want),
            (["extract", "-d", disk["name"], "-o", self.fifo, source], disk["sha256"]),
        ]
        for args, digest in calls:
            with self.subTest(args=args[:1]):
                process = self.start(*args)
                self.assertEqual(sha256(self.fifo.read_bytes()), digest)
                self.check_ok(self.answer(process))
                self.assertTrue(self.fifo.is_fifo())

    def test_second_writer(self) -> None:
        """A FIFO goes on after its end; an archive that was cut there must not."""
        data = golden("odd-size")
        for what, stream in (("plain", data), ("compressed", gzip.compress(data, 1))):
            half = len(stream) // 2
            more = [stream[half:]]

            def go_on(more: list[bytes] = more) -> None:
                """Write the rest, as soon as somebody has seen the end."""
                with contextlib.suppress(OSError):  # ENXIO: nobody reads any more
                    while more:
                        os.write(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK), more.pop())

            writer = threading.Thread(
                target=self.fifo.write_bytes, args=(stream[:half],), daemon=True
            )
            writer.start()
            with self.subTest(what), ends_seen(go_on):
                self.bad("verify", self.fifo, says=[str(self.fifo)])
            writer.join(10)


@contextlib.contextmanager
def ends_seen(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` when the tool has read the end of something."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            result = function(*args)
            if not result:
                act()
            return result

        return wrapper

    class FileIO(io.FileIO, metaclass=AnyFileIO):
        def readinto(self, buffer: Any, /) -> int:
            count = super().readinto(buffer)
            if not count:
                act()
            return count

    proxy = OsProxy()
    for name in ("read", "readv"):
        setattr(proxy, name, wrapped(getattr(os, name)))
    with mock.patch.object(vma_tool, "os", proxy), mock.patch("io.FileIO", FileIO):
        yield


class Pipes(ToolTest):
    """What comes after the end of a pipe, or not yet."""

    def feed(self, writing: int, pieces: list[bytes]) -> threading.Thread:
        """Write pieces to a pipe, in a thread, each a little later."""

        def write() -> None:
            with open(writing, "wb", buffering=0) as pipe:
                time.sleep(0.1)
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[pipe.write(view) :]
                    time.sleep(0.02)

        thread = threading.Thread(target=write)
        thread.start()
        return thread

    def test_pipe_that_does_not_block(self) -> None:
        """No data yet is not the end: of a pipe that somebody has switched so, it waits."""
        data = good()
        packed = gzip.compress(data)
        cuts = sorted({0, 1, 3, *archives.extent_offsets(data), 20000, 50000, len(data)})
        plain = [data[start:end] for start, end in zip(cuts, cuts[1:])]
        path = self.file("a.vma", data)
        for what, command, pieces in (
            ("unpack", "unpack", plain),
            ("optimize", "optimize", plain),
            ("packed", "optimize", [packed[:2], packed[2:5000], packed[5000:]]),
        ):
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            target = self.directory / what
            with self.subTest(what), open(reading, "rb") as stdin:
                feeder = self.feed(writing, pieces)
                self.check_ok(run_tool(command, "-q", "-", target, stdin=stdin))
                feeder.join()
                if command == "optimize":
                    self.ok("verify", "-q", "--against", path, target)
                    continue
                for device in good_archive().devices:
                    name = device.raw_name.decode()
                    self.assertEqual(sha256(target / name), sha256(device.data))


class Pipelines(ProcessTest):
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
