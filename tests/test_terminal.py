"""The progress line as a terminal shows it, and one line of status for whoever asks by a signal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checks import MIB, CheckedTest, Child, large_archive, one_disk, wait_for
from tests.support import Answer, Argument, golden, manifest, sha256, skip

CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]
SHORTENED = re.compile(r"\.\.\.|…")  # what stands for the middle of a name


class Screen:
    """What a terminal of some columns shows of what is written to it.

    `drawn` has the text of the last line each time before it is drawn anew, `wrapped` says whether
    a line was ever too long for the width, `scrolled` how many line feeds there were.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.drawn: list[str] = []
        self.wrapped = False
        self.scrolled = 0
        self._column = 0

    def write(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", text, re.DOTALL):
            self._token(token)

    def _token(self, token: str) -> None:
        line = self.lines[-1]
        if token == "\r":
            if line and (not self.drawn or self.drawn[-1] != line):
                self.drawn.append(line)
            self._column = 0
        elif token == "\n":
            self.scrolled += 1
            self.lines.append("")  # the driver's carriage return came before it
            self._column = 0
        elif token in ("\x1b[K", "\x1b[0K"):
            self.lines[-1] = line[: self._column]
        elif token == "\x1b[2K":
            self.lines[-1] = ""
        elif token == "\b":
            self._column = max(0, self._column - 1)
        elif token.startswith("\x1b"):
            raise AssertionError(f"not known here: {token!r}")
        else:
            # in the last column already, the next character goes to the next line
            self.wrapped = self.wrapped or self._column >= self.columns
            padded = line.ljust(self._column)
            self.lines[-1] = padded[: self._column] + token + padded[self._column + 1 :]
            self._column += 1


class Terminal:
    """A pseudo-terminal of some columns, whose other end is the tool's standard error."""

    def __init__(self, columns: int) -> None:
        self.leader, self.follower = os.openpty()
        self.screen = Screen(columns)
        self.resize(columns)
        self.bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)

    def resize(self, columns: int) -> None:
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.follower, termios.TIOCSWINSZ, size)

    def begin(self) -> None:
        """Begin to read; the child has the other end now, which is not needed here any more."""
        os.close(self.follower)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while data := os.read(self.leader, 65536):
                self.bytes += data

    def end(self) -> Screen:
        """Return what the screen shows when the child has gone."""
        self._reader.join(20)
        os.close(self.leader)
        self.screen.write(self.bytes.decode())
        return self.screen


class SlowMotion:
    """Lets a process run for some milliseconds, then stops it for a tenth of a second.

    So short work is redrawn often: the progress line is drawn at most ten times a second.
    `done_later` counts the bytes that were read and written after "100 %" was shown.
    """

    def __init__(self, child: Child, terminal: Terminal) -> None:
        self.done_later = 0
        first = None
        while child.running():
            time.sleep(0.005)
            child.send(signal.SIGSTOP)
            time.sleep(0.105)
            done = child.transferred("rchar") + child.transferred("wchar")
            if first is None and b"100 %" in terminal.bytes:
                first = done
            self.done_later = max(self.done_later, done - first if first is not None else 0)
            child.send(signal.SIGCONT)


class TerminalTest(CheckedTest):
    def on_terminal(
        self,
        columns: int,
        *args: Argument,
        act: Callable[[Child, Terminal], object] = lambda child, terminal: None,
        both: bool = False,
        **kw: Any,
    ) -> tuple[Screen, Answer[bytes]]:
        """Run the tool with a terminal for standard error; `act` on it meanwhile.

        With `both`, it is standard output too.
        """
        terminal = Terminal(columns)
        if both:
            kw["stdout"] = terminal.follower
        child = self.start(*args, stderr=terminal.follower, **kw)
        terminal.begin()
        act(child, terminal)
        answer = child.answer()
        return terminal.end(), answer

    @staticmethod
    def feed(child: Child, data: bytes, pieces: int = 5, pause: float = 0.12) -> None:
        """Write into the child's standard input, slowly."""
        pipe = child.process.stdin
        assert pipe
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            pipe.write(data[at : at + size])
            pipe.flush()
            time.sleep(pause)
        pipe.close()
        child.process.stdin = None

    def slowly(self, columns: int, *args: Argument) -> tuple[Screen, Answer[bytes]]:
        data = golden("live-order")
        return self.on_terminal(
            columns, *args, stdin=subprocess.PIPE, act=lambda child, _: self.feed(child, data)
        )


class Progress(TerminalTest):
    def check(self, screen: Screen, answer: Answer[bytes]) -> None:
        """Check that it was drawn, never too long, never scrolled, and erased at the end."""
        self.assertEqual(answer.returncode, 0)
        self.assertGreater(len(screen.drawn), 1)
        self.assertFalse(screen.wrapped, screen.drawn)
        self.assertEqual(screen.scrolled, 0, screen.lines)
        self.assertEqual(screen.lines[-1].strip(), "")

    def test_fits_the_width(self) -> None:
        for columns in (200, 80, 30):
            with self.subTest(columns=columns):
                screen, answer = self.slowly(columns, "verify", "-")
                self.check(screen, answer)
                self.assertIn(b"OK", answer.stdout)

    def test_hardly_any_width(self) -> None:
        """A terminal that says to have one column, or none, is none to break the work."""
        for columns in (0, 1):
            with self.subTest(columns=columns):
                screen, answer = self.slowly(columns, "verify", "-")
                self.assertEqual(answer.returncode, 0)
                self.assertEqual(screen.scrolled, 0)

    def test_name_is_shortened_in_the_middle(self) -> None:
        """The end of a path is what tells one backup from the next."""
        name = "vzdump-qemu-100-2025_11_20-02_00_00.vma"
        path = self.directory / ("a-long-name-" * 8) / ("another-one-" * 6) / name
        path.parent.mkdir(parents=True)
        os.mkfifo(path)
        for columns, kept in ((100, "2025_11_20-02_00_00.vma"), (60, "00_00.vma")):
            with self.subTest(columns=columns):
                screen, answer = self.on_terminal(
                    columns, "verify", path, act=lambda child, _: self.feed_fifo(path)
                )
                self.check(screen, answer)
                for line in screen.drawn:
                    self.assertRegex(line, SHORTENED)
                    self.assertIn(kept, line)
                    # a piece of the beginning stays as well
                    self.assertTrue(line.strip().startswith(("/", "a")), line)

    def feed_fifo(self, path: Path) -> None:
        data = golden("live-order")
        with open(path, "wb", buffering=0) as fifo:
            for at in range(0, len(data), 80_000):
                fifo.write(data[at : at + 80_000])
                time.sleep(0.12)

    def test_short_name_is_whole(self) -> None:
        screen, answer = self.slowly(80, "verify", "-")
        self.check(screen, answer)
        for line in screen.drawn:
            self.assertIn("standard input", line)
            self.assertNotRegex(line, SHORTENED)

    def test_wide_characters(self) -> None:
        """A name with characters of two columns is not longer than the line."""
        path = self.directory / ("備份" * 20 + ".vma")
        os.mkfifo(path)
        columns = 60
        screen, answer = self.on_terminal(
            columns, "verify", path, act=lambda child, _: self.feed_fifo(path)
        )
        self.assertEqual(answer.returncode, 0)
        for line in screen.drawn:
            width = sum(2 if ord(character) > 0x2E80 else 1 for character in line)
            self.assertLessEqual(width, columns, line)
        self.assertEqual(screen.scrolled, 0)

    def test_erased_before_an_error(self) -> None:
        """The error stands in a line of its own."""
        data = golden("live-order")[:-1]
        screen, answer = self.on_terminal(
            80, "verify", "-", stdin=subprocess.PIPE, act=lambda child, _: self.feed(child, data)
        )
        self.assertEqual(answer.returncode, 3)
        text = [line.strip() for line in screen.lines if line.strip()]
        self.assertTrue(text[0].startswith("vma-tool: "), screen.lines)

    def test_erased_by_a_signal(self) -> None:
        def act(child: Child, _: Terminal) -> None:
            pipe = child.process.stdin
            assert pipe
            data = golden("live-order")
            for at in range(0, 200_000, 50_000):
                pipe.write(data[at : at + 50_000])
                pipe.flush()
                time.sleep(0.12)
            child.send(signal.SIGTERM)

        screen, answer = self.on_terminal(80, "verify", "-", stdin=subprocess.PIPE, act=act)
        self.assertEqual(answer.returncode, 143)
        self.assertGreater(len(screen.drawn), 1)
        self.assertEqual(screen.lines[-1].strip(), "")

    def test_archive_on_standard_output(self) -> None:
        screen, answer = self.slowly(80, "optimize", "-", "-")
        self.check(screen, answer)
        self.assertEqual(sha256(answer.stdout), CANONICAL)

    def test_report_on_the_same_terminal(self) -> None:
        """The report stands in lines of its own, and nothing of the progress is left in them."""
        data = golden("live-order")
        new = self.directory / "new"
        want = b"".join(
            b"skip=%b\n" % d["name"].encode() for d in manifest()["live-order"]["devices"]
        )
        lines = self.file("map", want + b"done\n")
        cases: tuple[tuple[list[Argument], str], ...] = (
            (["verify", "-v", "-"], r"standard input: OK, .*|total bytes .*"),
            (["extract", "-v", "-", new / "1"], r"total bytes .*"),
            (["optimize", "-", new / "3"], r"standard input: optimized .*"),
            (["verify", "--digest", "-"], r"[0-9a-f]{64}  .*"),
            (["extract", "-v", "-r", lines, "-", new / "4"], r"(CFG|DEV|CTIME): .*|total bytes .*"),
        )
        new.mkdir()
        for args, words in cases:
            with self.subTest(args=args):
                screen, answer = self.on_terminal(
                    200, *args, both=True, stdin=subprocess.PIPE,
                    act=lambda child, _: self.feed(child, data, 3),
                )  # fmt: skip
                self.assertEqual(answer.returncode, 0, screen.lines)
                self.assertEqual(screen.lines[-1].strip(), "")
                self.assertGreater(len(screen.lines), 1)
                for line in screen.lines[:-1]:
                    self.assertRegex(line, rf"\A({words})\Z")

    def test_quiet(self) -> None:
        screen, answer = self.slowly(80, "verify", "-q", "-")
        self.assertEqual((answer.returncode, screen.drawn, screen.lines), (0, [], [""]))

    def test_not_complete_while_work_goes_on(self) -> None:
        """Seen: 100 % from the end of the copying on, while disks were compared and flushed."""
        source, new = self.directory / "a.vma", self.directory / "b.vma"
        large_archive(source, 48 * MIB)
        packed = self.directory / "dir"
        self.ok("unpack", source, packed)
        self.ok("optimize", "-q", "--align", "4K", source, new)
        cases: tuple[list[Argument], ...] = (
            ["optimize", source],
            ["pack", "--map", "local", packed, self.directory / "c.vma"],
            ["verify", "--digest", new],
        )
        for args in cases:
            with self.subTest(args=args):
                screen, answer, done_later = self.in_slow_motion(*args)
                self.check(screen, answer)
                stages: dict[str, list[int]] = {}
                for line in screen.drawn:
                    if match := re.search(r"(\d+) ?% (\w*)", line):
                        stages.setdefault(match[2], []).append(int(match[1]))
                self.assertTrue(stages, screen.drawn)
                for stage, percents in stages.items():
                    self.assertEqual(percents, sorted(percents), f"{stage} went backwards")
                self.assertLess(done_later, 8 * MIB, screen.drawn)

    def in_slow_motion(self, *args: Argument) -> tuple[Screen, Answer[bytes], int]:
        """Run the tool slowly; return also how much it did after "100 %" was shown."""
        runs: list[SlowMotion] = []
        screen, answer = self.on_terminal(
            80, *args, act=lambda child, terminal: runs.append(SlowMotion(child, terminal))
        )
        return screen, answer, runs[0].done_later


class StatusSignal(TerminalTest):
    """SIGUSR1 (and SIGINFO where there is one) prints one line of status."""

    def setUp(self) -> None:
        super().setUp()
        if not hasattr(signal, "SIGUSR1"):
            skip("this system has no SIGUSR1")

    def half_way(self, *args: Argument, **kw: Any) -> Child:
        """Start the tool with a stream, and give it half of that."""
        child = self.start(*args, stdin=subprocess.PIPE, **kw)
        pipe = child.process.stdin
        assert pipe
        data = golden("live-order")
        pipe.write(data[: len(data) // 2])
        pipe.flush()
        # all of it has been read, and the child waits for more
        wait_for(lambda: self.is_empty(pipe.fileno()))
        wait_for(lambda: child.state() == "S")
        return child

    @staticmethod
    def is_empty(fd: int) -> bool:
        waiting = bytearray(4)
        fcntl.ioctl(fd, termios.FIONREAD, waiting)
        return int.from_bytes(waiting, "little") == 0

    def rest(self, child: Child) -> Answer[bytes]:
        pipe = child.process.stdin
        assert pipe
        data = golden("live-order")
        with contextlib.suppress(BrokenPipeError):
            pipe.write(data[len(data) // 2 :])
            pipe.close()
        child.process.stdin = None
        return child.answer()

    def asked(self, child: Child, number: int) -> str:
        """Send the signal; return the line that came, which is complete."""
        errors = child.process.stderr
        assert errors
        child.send(number)
        ready, _, _ = select.select([errors], [], [], 10)
        self.assertTrue(ready, "no status came")
        line = os.read(errors.fileno(), 65536).decode()
        self.assertRegex(line, r"\A[^\n\r\x1b]+\n\Z")
        return line

    def test_without_a_terminal(self) -> None:
        new = self.directory / "new"
        for args in (["verify", "-"], ["optimize", "-", new], ["extract", "-", new]):
            with self.subTest(args=args):
                child = self.half_way(*args)
                for _ in range(3):
                    line = self.asked(child, signal.SIGUSR1)
                    self.assertIn("standard input", line)
                    self.assertRegex(line, r"\d.* [KM]iB")
                answer = self.rest(child)
                self.assertEqual((answer.returncode, answer.stderr), (0, b""))
                if new.is_file():
                    self.assertEqual(sha256(new), CANONICAL)
                    new.unlink()

    def test_quiet(self) -> None:
        """Whoever asks is answered."""
        child = self.half_way("verify", "-q", "-")
        self.asked(child, signal.SIGUSR1)
        answer = self.rest(child)
        self.assertEqual((answer.returncode, answer.stdout, answer.stderr), (0, b"", b""))

    def test_of_a_file(self) -> None:
        """Also where nothing waits: in the middle of a large read, as often as it is asked."""
        source, new = self.directory / "a.vma", self.directory / "b.vma"
        large_archive(source)
        child = self.start("optimize", source, new)
        self.assertTrue(child.stop_after("wchar", 32 * MIB))
        child.send(signal.SIGUSR1)
        child.send(signal.SIGCONT)
        answer = child.answer()
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertRegex(answer.stderr.decode(), r"\A[^\n]*a\.vma[^\n]*%[^\n]*\n\Z")
        self.assertIn("the same", self.ok("verify", source, "--against", new))

    def test_many(self) -> None:
        """A storm of signals harms nothing."""
        source, new = self.directory / "a.vma", self.directory / "b.vma"
        large_archive(source, 64 * MIB)
        child = self.start("optimize", "-q", source, new)
        wait_for(lambda: child.transferred("wchar") > MIB or not child.running())
        for _ in range(2000):
            child.send(signal.SIGUSR1)
        answer = child.answer()
        self.assertEqual(answer.returncode, 0, answer.stderr)
        for line in answer.stderr.splitlines():
            self.assertIn(b"a.vma", line)
        self.assertIn("the same", self.ok("verify", source, "--against", new))

    def test_with_a_decompressor(self) -> None:
        """The signal is for the tool, not for what it started."""
        data = one_disk(8 * MIB)
        program = "gzip"
        packed = self.file(
            "a.vma.gz",
            subprocess.run([program, "-1c"], input=data, stdout=subprocess.PIPE, check=True).stdout,
        )
        child = self.start("verify", packed)
        self.assertTrue(child.stop_after("rchar", 4 * MIB))
        child.send(signal.SIGUSR1)
        child.send(signal.SIGCONT)
        answer = child.answer()
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertEqual(answer.stderr.count(b"\n"), 1, answer.stderr)

    def test_on_a_terminal(self) -> None:
        """The status has a line of its own; the progress goes on below it."""

        def act(child: Child, _: Terminal) -> None:
            pipe = child.process.stdin
            assert pipe
            data = golden("live-order")
            for at in range(0, len(data), 50_000):
                pipe.write(data[at : at + 50_000])
                pipe.flush()
                time.sleep(0.12)
                if at == 150_000:
                    child.send(signal.SIGUSR1)
                    time.sleep(0.12)
            pipe.close()
            child.process.stdin = None

        screen, answer = self.on_terminal(80, "verify", "-", stdin=subprocess.PIPE, act=act)
        self.assertEqual(answer.returncode, 0)
        self.assertEqual(screen.scrolled, 1, screen.lines)
        self.assertIn("standard input", screen.lines[0])
        self.assertEqual(screen.lines[-1].strip(), "")
        self.assertFalse(screen.wrapped)

    def test_siginfo(self) -> None:
        """Ctrl-T, where a system has it."""
        number = getattr(signal, "SIGINFO", None)
        if number is None:
            self.assertFalse(hasattr(signal, "SIGINFO"))
            return
        child = self.half_way("verify", "-")
        self.asked(child, number)
        self.assertEqual(self.rest(child).returncode, 0)

    def test_ignored_stays_ignored(self) -> None:
        """What the caller ignores does nothing."""
        child = self.half_way("verify", "-", prefix=["sh", "-c", 'trap "" USR1; exec "$@"', "sh"])
        child.send(signal.SIGUSR1)
        self.assertEqual(self.rest(child).returncode, 0)
