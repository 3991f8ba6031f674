"""Helpers for tests that watch the tool from outside: its status, its files, what it reads.

`CheckedTest.fails` checks the exit status and the one line of an error. `Child` is a running tool
that can be stopped while it works. Nothing here knows the tool's inside.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests import archives
from tests.archives import BLOCK, CLUSTER, EXTENT_HEADER, Archive, Device
from tests.support import (
    ROOT,
    Answer,
    Argument,
    ToolTest,
    call_tool,
    require_program,
    require_root,
    run_tool,
    skip,
    tool_command,
    unmeasured,
)

MIB = 1 << 20
NOBODY = 65534

# Words of the tool's reports. A change of wording is followed here, in one place.
ALL_READ = "all data read"
HEADERS_ONLY = "headers only"
CHANGED = "changed while it was read"
NOTICE = re.compile(r"vma-tool: [^\n]+\n")

R = TypeVar("R")


class CheckedTest(ToolTest):
    """A test with its own directory that checks each exit status exactly."""

    def failed(self, answer: Answer[bytes], status: int, *says: str) -> str:
        """Check the exit status and that standard error is one line with `says`; return it."""
        line = answer.stderr.decode(errors="replace")
        self.assertEqual(answer.returncode, status, line)
        self.assertRegex(line, r"\Avma-tool: [^\n]+\n\Z")
        for part in says:
            self.assertIn(part, line)
        return line

    def fails(self, status: int, *args: Argument, says: Iterable[str] = (), **kw: Any) -> str:
        """Call the tool, which must fail with this status; return its line of standard error."""
        answer = call_tool(*args, **kw)
        self.assertEqual(answer.stdout, b"")
        return self.failed(answer, status, *says)

    def noticed(self, *args: Argument, count: int = 1, **kw: Any) -> list[str]:
        """Call the tool, which must succeed with so many notices on standard error."""
        answer = call_tool(*args, **kw)
        text = answer.stderr.decode()
        self.assertEqual(answer.returncode, 0, text)
        self.assertRegex(text, r"\A(vma-tool: [^\n]+\n)*\Z")
        lines = text.splitlines()
        self.assertEqual(len(lines), count, text)
        return lines

    def start(self, *args: Argument, **kw: Any) -> Child:
        """Start the tool; it is killed at the end of the test."""
        child = Child(*args, **kw)
        self.addCleanup(child.end)
        return child

    def partial_files(self) -> list[Path]:
        return sorted(self.directory.rglob("vma-tool-*.partial"))


class Child:
    """The tool as a child process in a session of its own."""

    def __init__(self, *args: Argument, prefix: Iterable[str] = (), **kw: Any) -> None:
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            "env": unmeasured(),  # a child that gets signals is not measured
        }
        settings.update(kw)
        self.process = subprocess.Popen([*prefix, *tool_command(*args)], **settings)
        self.pid = self.process.pid

    def end(self) -> None:
        """Kill the child and what it started, and close the pipes to it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def send(self, number: int) -> None:
        """Send a signal; a child that is gone gets none."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def running(self) -> bool:
        return self.process.poll() is None

    def answer(self, timeout: float = 30) -> Answer[bytes]:
        """Wait for the end and return what was answered; a child that hangs is an error."""
        output, errors = self.process.communicate(timeout=timeout)
        return Answer([], self.process.returncode, output or b"", errors or b"")

    def transferred(self, counter: str) -> int:
        """Return a counter of /proc/PID/io: `rchar` or `wchar`, 0 once the child is gone."""
        with contextlib.suppress(OSError):
            return io_counter(counter, self.pid)
        return 0

    def stop_after(self, counter: str, count: int) -> bool:
        """Stop the child as soon as it has transferred so much; False if it ended before."""
        while self.running():
            if self.transferred(counter) >= count:
                self.send(signal.SIGSTOP)
                wait_for(lambda: self.state() in "TZX")
                return self.state() == "T"
            time.sleep(0.0002)
        return False

    def state(self) -> str:
        """Return the letter of the process state, X once it is gone."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.pid}/stat").read_text("ascii")
            return text.rpartition(")")[2].split()[0]
        return "X"


def io_counter(name: str, pid: int | str) -> int:
    """Return a counter of a process's /proc/PID/io."""
    text = Path(f"/proc/{pid}/io").read_text("ascii")
    return int(text.split(f"{name}: ")[1].split()[0])


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come about")
        time.sleep(0.005)


# Runs the tool in a child and appends a line "rchar N wchar N" to its standard error.
COUNTING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import vma_tool
status = vma_tool.main(sys.argv[1:])
words = open("/proc/self/io").read().split()
sys.stdout.flush()
sys.stderr.write(f"rchar {words[1]} wchar {words[3]}\\n")
sys.exit(status)
"""


class Counted(NamedTuple):
    """An answer, and the bytes that the process itself read and wrote."""

    answer: Answer[bytes]
    read: int
    written: int


def run_counted(*args: Argument, prefix: Iterable[str] = (), **kw: Any) -> Counted:
    """Run the tool and count the bytes that it reads and writes with its own calls."""
    if not os.path.exists("/proc/self/io"):
        skip("needs /proc/self/io")
    command = [*prefix, sys.executable, "-c", COUNTING, str(ROOT), *texts(args)]
    settings: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "timeout": 60,
        **kw,
    }
    answer: Answer[bytes] = subprocess.run(command, check=False, **settings)
    errors, _, counts = answer.stderr.rpartition(b"rchar ")
    words = counts.split()
    if len(words) != 3:  # it did not come to its end
        return Counted(answer, 0, 0)
    answer.stderr = errors
    return Counted(answer, int(words[0]), int(words[2]))


def texts(args: Iterable[Argument]) -> list[str]:
    return [os.fspath(argument) for argument in args]


def run_shell(script: str, *args: Argument, **kw: Any) -> Answer[bytes]:
    """Run the tool as "$@" of a shell script, as in `exec "$@" >&-`."""
    return run_tool(*args, prefix=["sh", "-c", script, "sh"], **kw)


def as_nobody(function: Callable[[], R]) -> R:
    """Return what the function returns in a forked child without any rights."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            os.close(reading)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with open(writing, "wb") as pipe:
                pickle.dump(function(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise ChildProcessError(status, f"the child ended with {status}")
    result: R = pickle.loads(answer)
    return result


# ---- archives -----------------------------------------------------------------------------------


def built(*devices: Device, configs: Iterable[archives.Config] = (), **kw: Any) -> bytes:
    """Return an archive of these devices and configs, clusters in order; `kw` are build's."""
    archive = Archive(list(devices), list(configs))
    return archives.build(archive, archives.in_order(archive), **kw)


def one_disk(size: int, seed: int = 1, name: str = "drive-scsi0") -> bytes:
    """Return an archive of one disk of random data, clusters in order."""
    return built(Device(1, name, archives.disk(random.Random(seed), size, "full")))


def sparse_archive(*devices: Device) -> bytes:
    """Return an archive in which a device without content is a disk of zeros, of any size."""
    archive = Archive(list(devices))
    pieces = [archives.header_bytes(archive)]
    for device in devices:
        for first in range(0, -(-device.stated_size // CLUSTER), 58):
            blockinfos, payload = [], []
            for number in range(first, min(first + 58, -(-device.stated_size // CLUSTER))):
                mask = device.mask(number) if device.data else 0
                blockinfos.append((mask, device.dev_id, number))
                bits = [bit for bit in range(16) if mask >> bit & 1]
                payload += [device.block(number * 16 + bit) for bit in bits]
            pieces.append(archives.extent_bytes(archive.uuid, blockinfos, payload))
    return b"".join(pieces)


def large_archive(path: Path, size: int = 192 * MIB, order: str = "live") -> None:
    """Write an archive that takes the tool some tenths of a second, with data that is not zeros."""
    archives.write_large(path, size=size, data_bytes=size, order=order)


def payload_offsets(path: Path) -> list[int]:
    """Return where the payload of each extent with data begins."""
    found = []
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(56)
        at = int.from_bytes(file.read(4), "big")
        while at < end:
            file.seek(at + 6)
            block_count = int.from_bytes(file.read(2), "big")
            if block_count:
                found.append(at + EXTENT_HEADER)
            at += EXTENT_HEADER + block_count * BLOCK
    return found


def change_payload(path: Path) -> None:
    """Change a byte of the first and of the last extent's payload, and put the mtime back."""
    before = path.stat()
    offsets = payload_offsets(path)
    with open(path, "r+b", buffering=0) as file:
        for at in (offsets[0], offsets[-1]):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- file systems and devices -------------------------------------------------------------------


def command(name: str, package: str, *args: Argument) -> bytes:
    """Run an outside program, which must succeed; skip where it is not installed."""
    program = require_program(name, package)
    return subprocess.run(
        [program, *texts(args)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout


@contextlib.contextmanager
def mounted(where: Path, *options: Argument) -> Iterator[Path]:
    """Mount something on a directory or file for a while; skip where that is forbidden."""
    require_root()
    program = require_program("mount", "mount")
    arguments = [program, *texts(options), str(where)]
    answer = subprocess.run(arguments, capture_output=True, check=False)
    if answer.returncode:
        skip(f"mount {' '.join(map(str, options))}: {answer.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def mode(path: Path) -> int:
    """Return a file's permission bits."""
    return stat.S_IMODE(path.stat().st_mode)
