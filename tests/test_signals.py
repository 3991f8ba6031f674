"""Signals: the tool ends at once, says so, and leaves nothing half.

The tool runs in a process of its own, as a signal ends that without a return; judged are its exit
status, what is there afterwards, and that nothing that it started goes on.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from unittest import mock

from tests import archives
from tests.damage import good, good_archive
from tests.faults import ROADS, WRITING, Lines, Nth, Road, RoadTest, digests
from tests.support import (
    ALL,
    BAD,
    FEW,
    STEP,
    Answer,
    Argument,
    ProcessTest,
    ToolTest,
    call_tool,
    compress,
    require_program,
    sha256,
    small_file_system,
    snapshot,
    tool_command,
    unmeasured,
    wait_for_group,
)

SEED = 20251120
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Ahead of any other call, nothing has changed since the one before.
CHANGING = (
    "close", "fchmod", "fchown", "fsync", "ftruncate", "link", "mkdir", "open", "pwritev",
    "rename", "replace", "rmdir", "unlink", "utime", "write", "writev",
)  # fmt: skip


def ended_by(number: signal.Signals) -> tuple[int, bytes]:
    """Return the exit status and the one line of a tool that a signal ended."""
    return 128 + number, f"vma-tool: ended by {number.name}\n".encode()


def send(number: signal.Signals, _call: str = "") -> None:
    """Send a signal to this process, from wherever in it."""
    os.kill(os.getpid(), number)


class EveryMoment(RoadTest):
    """A signal comes at each call to the system in turn, or at each line of the tool."""

    # Those that make no call that another one does not make as well are left out.
    ROADS = tuple(
        road
        for name, road in ROADS.items()
        if name not in ("optimize", "optimize in place unchecked", "extract", "list")
    )

    def calls(self, road: Road) -> list[str]:
        """Return the calls of a road, which is gone undisturbed."""
        calls = Nth(0, lambda name: None)
        self.workshop.go(road, calls)
        self.workshop.undo(road)
        return calls.names

    def check_ended(
        self, road: Road, answer: Answer[bytes], number: signal.Signals, before: object
    ) -> None:
        """Check that a signal ended a road, which is gone to its end or has left nothing."""
        self.assertEqual((answer.returncode, answer.stderr), ended_by(number))
        if snapshot(self.directory) != before:
            self.assertEqual(digests(self.directory), self.workshop.wanted(road))

    def test_each_call(self) -> None:
        for road in self.ROADS:
            printed = self.gone(road)
            names = self.calls(road)
            self.assertGreater(len(names), 10)
            for turn, number in enumerate(range(1, len(names) + 1, STEP)):
                signum = SIGNALS[turn % len(SIGNALS)]
                before = snapshot(self.directory)
                with self.subTest(road.name, call=number, name=names[number - 1], signal=signum):
                    nth = Nth(number, functools.partial(send, signum))
                    answer = self.workshop.go(road, nth, child=True)
                    if answer.returncode:
                        self.check_ended(road, answer, signum, before)
                    else:  # threads, and what waits for them, do not call in one order
                        self.check_done(road, answer, printed)
                self.workshop.undo(road)

    def test_each_line(self) -> None:
        """Between two calls, and while the command line is parsed."""
        for name in ("optimize in place", "optimize a stream", "optimize gzip", "pack",
                     "unpack", "extract by a map"):  # fmt: skip
            road = ROADS[name]
            lines = Lines(0)
            self.workshop.go(road, within=lines)
            self.workshop.undo(road)
            cases = lines.last()[:: 1 if ALL else 61]
            ended = 0
            self.assertGreater(len(lines.last()), 200)
            for number in cases:
                before = snapshot(self.directory)
                with self.subTest(road.name, line=lines.names[number - 1], number=number):
                    answer = self.workshop.go(road, within=Lines(number), child=True)
                    if answer.returncode:
                        self.check_ended(road, answer, signal.SIGTERM, before)
                        ended += 1
                    else:  # threads: this time there were not so many lines
                        self.assertEqual(digests(self.directory), self.workshop.wanted(road))
                self.workshop.undo(road)
            self.assertGreater(ended, len(cases) * 3 // 4)

    def test_around_an_error(self) -> None:
        """The error's line, the signal's, or one after the other; never a traceback."""
        for args in (("list", "nothing.vma"), ("list", "old.vma")):
            road = Road("wrong", args)
            lines = Lines(0)
            status = self.workshop.go(road, within=lines).returncode
            for number in lines.last()[:: 1 if ALL else 61]:
                with self.subTest(args, number=number, line=lines.names[number - 1]):
                    answer = self.workshop.go(road, within=Lines(number), child=True)
                    self.assertIn(answer.returncode, (status, 128 + signal.SIGTERM))
                    self.assertRegex(answer.stderr, rb"\A(vma-tool: [^\n]+\n){1,2}\Z")

    def test_in_a_callback(self) -> None:
        """Python drops the exceptions of callbacks; the signal counts all the same."""

        def drop(_name: str) -> None:
            thing: set[int] = set()
            reference = weakref.ref(thing, lambda _: send(signal.SIGTERM))
            del thing
            self.assertIsNone(reference())

        road, before = ROADS["optimize"], snapshot(self.directory)
        answer = self.workshop.go(road, Nth(len(self.calls(road)) // 2, drop), child=True)
        self.check_ended(road, answer, signal.SIGTERM, before)

    def test_kills(self) -> None:
        """SIGKILL at any call: old files and complete new ones under all names, nothing else."""
        kill = functools.partial(send, signal.SIGKILL)
        for road in WRITING:
            names = self.calls(road)
            changing = [i for i, name in enumerate(names, 1) if name in CHANGING]
            self.assertGreater(len(changing), 4)
            for number in changing[::STEP]:
                with self.subTest(road.name, call=number, name=names[number - 1]):
                    answer = self.workshop.go(road, Nth(number, kill), child=True)
                    threads = road.reads in ("-", "-.gz", "in.vma.gz")
                    self.assertIn(answer.returncode, (-signal.SIGKILL, 0 if threads else 1 << 20))
                    self.assertEqual(self.workshop.strange(road), [])
                self.workshop.undo(road)


class Waiting(ProcessTest):
    """A tool that waits for somebody else can be ended."""

    def test_while_waiting_for_input(self) -> None:
        """Whoever waits for a slow producer can be ended, before its first byte and after."""
        cases: list[tuple[str, signal.Signals, int, Path, subprocess.Popen[bytes]]] = []
        compressed = compress("zstd", archives.incompressible())[:100000]
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
        self.assertEqual((answer.returncode, answer.stderr), ended_by(signum))

    def test_while_waiting_for_a_fifo(self) -> None:
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

    def test_while_writing(self) -> None:
        """A reader that does not read does not hold the tool either."""
        plain = self.file("large.vma", archives.incompressible())
        for source in (str(plain), "-"):
            with self.subTest(source[-1]):
                process = self.start("optimize", source, "-", stdin=subprocess.PIPE)
                stdin = process.stdin
                assert stdin

                def feed(stdin: Any = stdin) -> None:
                    with contextlib.suppress(BrokenPipeError), stdin:
                        stdin.write(archives.incompressible())

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
        self.wait_until_ready(process, signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        output, errors = process.communicate(good()[20000:], timeout=20)
        self.assertEqual((process.returncode, errors), (0, b""))
        self.assertEqual(sha256(output), sha256(archives.canonical(good_archive())))

    def test_nobody_opens_the_fifo_of_a_map(self) -> None:
        """No process and no target is left."""
        os.mkfifo(self.directory / "fifo")
        target = self.directory / "configs"
        process = self.start(
            "extract", "-r", self.directory / "fifo", self.file("a.vma", good()), target
        )
        assert process.stdout
        while not process.stdout.readline().startswith((b"CTIME", b"DEV: dev_id=3")):
            pass
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        self.check_ended(self.answer(process), signal.SIGTERM)
        self.assertFalse((target / "vmstate.bin").exists())


class Decompressors(ToolTest):
    """The program that decompresses ends with the tool, whatever it is waiting for."""

    def setUp(self) -> None:
        super().setUp()
        require_program("gzip", "gzip")
        # does not compress, so that what is sent is not kept back in some buffer on the way
        disk = random.Random(SEED).randbytes(8 << 20)
        archive = archives.Archive([archives.Device(1, "drive-scsi0", disk)])
        self.data = archives.build(archive)

    @contextmanager
    def started(self, data: bytes, *args: Argument) -> Iterator[subprocess.Popen[bytes]]:
        """Run the tool in a process group of its own, and send it data in a pipe that stays open.

        When the block is left the tool must have ended, and left nobody of its group behind.
        """
        tool = subprocess.Popen(
            tool_command(*args),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=unmeasured(),
        )
        assert tool.stdin is not None and tool.stderr is not None

        def feed(pipe: IO[bytes]) -> None:
            with suppress(BrokenPipeError):
                pipe.write(data)
                pipe.flush()

        sender = threading.Thread(target=feed, args=(tool.stdin,))
        sender.start()
        try:
            yield tool
            wait_for_group(tool.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(tool.pid, signal.SIGKILL)
            tool.wait()
            sender.join()
            tool.stderr.close()
            with suppress(BrokenPipeError):
                tool.stdin.close()

    def check_ended(self, tool: subprocess.Popen[bytes], status: int, says: bytes) -> None:
        assert tool.stderr is not None
        self.assertEqual(tool.wait(timeout=60), status)
        self.assertRegex(tool.stderr.read(), rb"\Avma-tool: [^\n]*" + says + rb"[^\n]*\n\Z")

    def test_bad_archive_in_an_open_pipe(self) -> None:
        """What comes is no archive, and the pipe is not closed: the decompressor waits for more."""
        data = gzip.compress(self.data[::-1], 1)
        commands: list[list[Argument]] = [["verify", "-"], ["unpack", "-", self.directory / "new"]]
        for command in commands:
            with self.started(data, *command) as tool:
                self.check_ended(tool, BAD, b"not a VMA archive")
            self.assertEqual(os.listdir(self.directory), [])

    def test_bad_archive_with_more_to_come(self) -> None:
        """What is wrong is at the beginning of a large file: the decompressor still writes."""
        first = archives.extent_offsets(self.data)[0]
        path = self.file("a.vma.gz", gzip.compress(archives.edit(self.data, first + 4, b"\0\1"), 1))
        commands: list[list[Argument]] = [["verify", path], ["optimize", path, "out.vma"]]
        for command in commands:
            with self.started(b"", *command) as tool:
                self.check_ended(tool, BAD, b"reserved")
            self.assertEqual(os.listdir(self.directory), ["a.vma.gz"])

    def test_signal_while_a_decompressor_ends(self) -> None:
        """It has written everything, and does not end: the tool does, and ends it."""
        programs = self.directory / "bin"
        programs.mkdir()
        (programs / "gzip").write_text('#!/bin/sh\n"$GZIP_ITSELF" "$@"\nexec sleep 60 >&- 2>&-\n')
        (programs / "gzip").chmod(0o755)
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "GZIP_ITSELF": require_program("gzip", "gzip"),
        }
        path = self.file("a.vma.gz", gzip.compress(good(), 1))
        with mock.patch.dict(os.environ, environment), self.started(b"", "verify", path) as tool:
            time.sleep(1)
            self.assertIsNone(tool.poll())
            tool.send_signal(signal.SIGTERM)
            self.check_ended(tool, 128 + signal.SIGTERM, b"SIGTERM")

    def test_signal_in_an_open_pipe(self) -> None:
        data = gzip.compress(self.data, 1)
        for number in SIGNALS:
            target = self.directory / "new"
            with self.started(data[: len(data) * 3 // 4], "unpack", "-", target) as tool:
                while not target.exists() or not os.listdir(target):
                    self.assertIsNone(tool.poll())
                    time.sleep(0.002)
                tool.send_signal(number)
                self.check_ended(tool, 128 + number, number.name.encode())
            self.assertFalse(target.exists())


class RandomMoments(RoadTest, ProcessTest):
    """Signals at random moments, from outside, to a tool that is at work on a larger archive."""

    SIZE = 48 << 20

    def prepare(self, directory: Path) -> None:
        if os.geteuid() == 0:  # memory, not a disk that others keep busy
            directory = small_file_system(self, 512 << 20)
        self.directory = directory / "work"
        self.directory.mkdir()
        archive = self.directory / "in.vma"
        archives.write_large(archive, size=self.SIZE, data_bytes=32 << 20, seed=SEED)
        (self.directory / "old.vma").write_bytes(b"an older archive")
        call_tool("unpack", self.directory / "in.vma", self.directory / "full")
        self.before = digests(self.directory)

    ROADS = (
        ("optimize", "in.vma", "out.vma"),
        ("optimize", "in.vma"),
        ("optimize", "--force", "-", "old.vma"),
        ("pack", "full", "out.vma"),
        ("unpack", "in.vma", "new"),
        ("extract", "-", "new"),
    )

    def set_off(self, args: tuple[str, ...]) -> subprocess.Popen[bytes]:
        command, *rest = args
        with open(self.directory / "in.vma", "rb") as archive:
            cat = subprocess.Popen(["cat"], stdin=archive, stdout=subprocess.PIPE)
        assert cat.stdout is not None
        tool = subprocess.Popen(
            tool_command(command, "-q", *rest),
            stdin=cat.stdout,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            env=unmeasured(),
        )
        cat.stdout.close()
        self.addCleanup(cat.wait)
        return tool

    def undo(self) -> None:
        for path in self.directory.iterdir():
            if path.name not in self.before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def test_signals(self) -> None:
        if not os.path.exists("/proc/self/status"):
            self.skipTest("needs /proc to know when the tool is at work")
        rng = random.Random(SEED)
        source = (self.directory / "in.vma").read_bytes()
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] + [signal.SIGKILL] * (
            3 if ALL else 1
        )
        for args in self.ROADS[::FEW]:
            tool = self.set_off(args)
            self.wait_until_ready(tool)
            ready = time.monotonic()
            self.assertEqual(tool.communicate(timeout=60)[1], b"")
            duration = time.monotonic() - ready
            done = digests(self.directory)
            for number in numbers:
                self.undo()
                (self.directory / "in.vma").write_bytes(source)
                (self.directory / "old.vma").write_bytes(b"an older archive")
                moment = rng.uniform(0, duration)
                with self.subTest(args=args, signal=number.name, moment=moment):
                    tool = self.set_off(args)
                    self.wait_until_ready(tool)
                    time.sleep(moment)
                    tool.send_signal(number)
                    errors = tool.communicate(timeout=60)[1].decode()
                    self.check_ended(tool.returncode, number, errors, done)
            self.undo()
            (self.directory / "in.vma").write_bytes(source)
            (self.directory / "old.vma").write_bytes(b"an older archive")

    def check_ended(
        self, status: int, number: signal.Signals, errors: str, done: dict[str, str]
    ) -> None:
        found = digests(self.directory)
        if number == signal.SIGKILL:
            self.assertIn(status, (0, -signal.SIGKILL))
            self.assertEqual(errors, "")
            self.assertLessEqual(self.before.keys(), found.keys())
            for name, digest in found.items():
                if digest not in (self.before.get(name), done.get(name)):
                    self.assertRegex(name, r"\A(new/)?vma-tool-\w+\.partial\Z")
        elif found == done:
            # The signal came when all was done; even then it may be what ended the tool.
            self.assertIn(status, (0, 128 + number, -number))
        else:
            self.assertEqual(found, self.before)
            self.assertEqual(status, 128 + number, errors)
            self.assertEqual(errors, ended_by(number)[1].decode())
