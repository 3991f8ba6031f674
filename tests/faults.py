"""Faults, and the roads on which they are met: what the tests of faults have in common.

A `Road` is a command with all that it needs, in a `Workshop`: a directory with an archive, the same
one compressed, and one unpacked. `intercepted` lets a test interfere with each call that the tool
makes to the system, in its order.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import gzip
import io
import mmap
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import CLUSTER, Archive
from tests.support import (
    Answer,
    OsProxy,
    ToolTest,
    call_tool,
    compress,
    fork_tool,
    sha256,
    snapshot,
)

# ---- what a process has -------------------------------------------------------------------------


def open_files() -> list[str]:
    """Return what the open file descriptors are, where the system tells."""
    found = []
    with contextlib.suppress(OSError):
        for number in sorted(map(int, os.listdir("/proc/self/fd"))):
            with contextlib.suppress(OSError):  # that of the listing itself
                found.append(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def memory_directory() -> str | None:
    """Return a directory that is in memory, which no disk keeps waiting; None if there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def has_child() -> bool:
    """Say whether there is a child process, running or not yet waited for."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a directory, by relative path; "" for a directory."""
    return {
        os.fsdecode(path.relative_to(directory)): "" if path.is_dir() else sha256(path)
        for path in directory.rglob("*")
    }


# ---- calls to the system ------------------------------------------------------------------------

CALLS = (
    "close", "dup", "dup2", "fchmod", "fchown", "fdatasync", "fsync", "fstat", "ftruncate", "link",
    "listdir", "lseek", "lstat", "mkdir", "open", "posix_fadvise", "posix_fallocate", "pread",
    "preadv", "pwrite", "pwritev", "read", "readv", "rename", "replace", "rmdir", "scandir", "stat",
    "unlink", "utime", "write", "writev",
)  # fmt: skip

READ_CLOSE = "close of what is only read"
Before = Callable[[str], None]
R = TypeVar("R")
NOBODY = 65534


class Intercepted(OsProxy):
    """`os` as the tool sees it, with `before(name)` called ahead of each of CALLS."""

    def __init__(self, before: Before) -> None:
        super().__init__(watched=CALLS, before=before)
        self._wrappers["close"] = self._close
        self._before = before

    def _close(self, fd: int) -> None:
        # A close that fails has closed nevertheless; none does of what is only read.
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            self._before("close" if flags & os.O_ACCMODE != os.O_RDONLY else READ_CLOSE)
        finally:
            os.close(fd)


class AnyFileIO(type(io.FileIO)):  # type: ignore[misc]  # known only when it runs
    """The type of a class that stands for io.FileIO, and takes any of those for its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, RealFileIO)


RealFileIO = io.FileIO


@contextlib.contextmanager
def intercepted(before: Before) -> Iterator[None]:
    """Call `before` with its name ahead of each call to the system; it may raise, or do more.

    Those that are not made through `os` are there too: reads of a file object, open, Popen, mmap
    and temporary files.
    """

    class FileIO(io.FileIO, metaclass=AnyFileIO):
        def readinto(self, buffer: Any, /) -> int:
            before("FileIO.readinto")
            return super().readinto(buffer)

    class BufferedReader(io.BufferedReader):
        def readinto(self, buffer: Any, /) -> int:
            before("BufferedReader.readinto")
            return super().readinto(buffer)

    class Io:
        def __getattr__(self, name: str) -> Any:
            own = {"FileIO": FileIO, "BufferedReader": BufferedReader}
            return own.get(name) or getattr(io, name)

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kw: Any) -> Any:
            before(name)
            return function(*args, **kw)

        return wrapper

    with contextlib.ExitStack() as stack:
        patches: list[Any] = [
            mock.patch.object(vma_tool, "os", Intercepted(before)),
            mock.patch.object(vma_tool, "io", Io()),
            mock.patch.object(vma_tool, "open", wrapped("open()", builtins.open), create=True),
            mock.patch("mmap.mmap", wrapped("mmap", mmap.mmap)),
            mock.patch("subprocess.Popen", wrapped("Popen", subprocess.Popen)),
            mock.patch("tempfile.TemporaryFile", wrapped("TemporaryFile", tempfile.TemporaryFile)),
        ]
        for patch in patches:
            stack.enter_context(patch)
        yield


class Short(OsProxy):
    """`os` with reads and writes that do less than they are asked, as all of them may.

    `counts` says how many bytes the next one does at most.
    """

    def __init__(self, counts: Iterator[int]) -> None:
        super().__init__()
        self._counts = counts
        for name in ("preadv", "readv", "pwritev", "writev"):
            if hasattr(os, name):
                self._wrappers[name] = self._vector(getattr(os, name))
        self._wrappers["read"] = lambda fd, size: os.read(fd, min(size, next(counts)))
        self._wrappers["write"] = lambda fd, data: os.write(fd, data[: next(counts)])

    def _vector(self, function: Callable[..., int]) -> Callable[..., int]:
        def wrapper(fd: int, buffers: Sequence[Any], *offset: int) -> int:
            first = next(buffer for buffer in buffers if len(buffer))
            return function(fd, [memoryview(first)[: next(self._counts)]], *offset)

        return wrapper


class WrongBit(OsProxy):
    """`os` that writes one bit of any file wrongly: of the byte at this offset in it."""

    def __init__(self, at: int) -> None:
        super().__init__(hidden=("copy_file_range", "sendfile", "splice"))
        self.at = at

    def _wrong(self, data: bytes, offset: int) -> bytes:
        if not offset <= self.at < offset + len(data):
            return data
        changed = bytearray(data)
        changed[self.at - offset] ^= 1 << self.at % 8
        return bytes(changed)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.pwrite(fd, self._wrong(b"".join(buffers), offset), offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return os.pwrite(fd, self._wrong(bytes(data), offset), offset)

    def writev(self, fd: int, buffers: Sequence[Any]) -> int:
        return self.write(fd, b"".join(buffers))

    def write(self, fd: int, data: Any) -> int:
        try:
            offset = os.lseek(fd, 0, os.SEEK_CUR)
        except OSError:  # a pipe
            return os.write(fd, data)
        return os.write(fd, self._wrong(bytes(data), offset))


class ShortFile(OsProxy):
    """`os` that loses the last bytes of any file that is given its size."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self.lost = lost

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, max(size - self.lost, 0))


class Nth:
    """Does something ahead of the N-th call of a run, of which it gets the name, and nothing else.

    `name` is that of the call, "" as long as there were not so many.
    """

    def __init__(self, number: int, act: Before) -> None:
        self.number = number
        self.act = act
        self.name = ""
        self.clean = False  # said by whoever has looked that nothing is left of the run
        self.names: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            now = len(self.names) == self.number
        if now:
            self.name = name
            self.act(name)


class Lines:
    """Sends SIGTERM to this process ahead of the N-th line of the tool, or of argparse.

    Of the main thread. `names` are those of the lines that were run, function and number.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: list[str] = []

    def last(self) -> list[int]:
        """Return the number at which each line was run for the last time, ascending."""
        return sorted({name: number for number, name in enumerate(self.names, 1)}.values())

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._enter_function)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter_function(self, frame: FrameType, _event: str, _arg: object) -> Any:
        ours = frame.f_code.co_filename in (vma_tool.__file__, argparse.__file__)
        return self._line if ours else None

    def _line(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            self.names.append(f"{frame.f_code.co_name} {frame.f_lineno}")
            if len(self.names) == self.number:
                os.kill(os.getpid(), signal.SIGTERM)
        return self._line


# ---- roads --------------------------------------------------------------------------------------


class Road(NamedTuple):
    """A command, what its standard input is, and which files of what content it makes.

    `makes` are paths below the workshop; `reads` is what of the workshop it reads, "-" or "-.gz"
    for a stream. `hidden` are programs that are to be missing.
    """

    name: str
    args: tuple[str, ...]
    makes: tuple[str, ...] = ()
    reads: str = "in.vma"
    hidden: bool = False

    @property
    def in_place(self) -> bool:
        return self.reads in self.makes

    @property
    def replaces(self) -> bool:
        """Say whether what it makes had been something else."""
        return self.makes in (("in.vma",), ("old.vma",), ("one.vma.zst",))


OPTIMIZED, PACKED, COMPRESSED = ("out.vma",), ("out.vma",), ("out.vma.zst",)
UNPACKED = ("new", "new/qemu-server.conf", "new/qemu-server.fw", "new/drive-efidisk0",
            "new/drive-scsi0", "new/drive-tpmstate0-backup", "new/vma.json")  # fmt: skip
EXTRACTED = ("new", "new/qemu-server.conf", "new/qemu-server.fw", "new/disk-drive-efidisk0.raw",
             "new/disk-drive-scsi0.raw", "new/disk-drive-tpmstate0-backup.raw")  # fmt: skip
CONFIGS = EXTRACTED[:3]
RESCUED = (*EXTRACTED, "new/rescue.json")


def there(files: tuple[str, ...], directory: str) -> tuple[str, ...]:
    """Return the files as they are called in a directory that exists already."""
    return tuple(file.replace("new/", f"{directory}/") for file in files if file != "new")


WRITING = (
    Road("optimize", ("optimize", "in.vma", "out.vma"), OPTIMIZED),
    Road("optimize --check", ("optimize", "--check", "in.vma", "out.vma"), OPTIMIZED),
    Road("optimize over another", ("optimize", "--force", "in.vma", "old.vma"), ("old.vma",)),
    Road("optimize in place", ("optimize", "in.vma"), ("in.vma",)),
    Road("optimize in place unchecked", ("optimize", "--no-check", "in.vma"), ("in.vma",)),
    Road("optimize a stream", ("optimize", "--memory=0", "-", "out.vma"), OPTIMIZED, "-"),
    Road("optimize gzip", ("optimize", "in.vma.gz", "out.vma"), OPTIMIZED, "in.vma.gz"),
    Road("optimize gzip by a module", ("optimize", "in.vma.gz", "out.vma"), OPTIMIZED,
         "in.vma.gz", hidden=True),
    Road("optimize a gzip stream", ("optimize", "-", "out.vma"), OPTIMIZED, "-.gz"),
    Road("optimize to zstd", ("optimize", "in.vma", "out.vma.zst"), COMPRESSED),
    Road("optimize zstd in place", ("optimize", "one.vma.zst"), ("one.vma.zst",), "one.vma.zst"),
    Road("optimize frames", ("optimize", "frames.vma.zst", "out.vma"), OPTIMIZED,
         "frames.vma.zst"),
    Road("pack", ("pack", "full", "out.vma"), PACKED, "full/drive-scsi0"),
    Road("pack to zstd", ("pack", "full", "out.vma.zst"), COMPRESSED, "full/drive-scsi0"),
    Road("unpack", ("unpack", "in.vma", "new"), UNPACKED),
    Road("unpack a stream", ("unpack", "-", "new"), UNPACKED, "-"),
    Road("unpack into a directory", ("unpack", "in.vma", "empty"), there(UNPACKED, "empty")),
    Road("extract", ("extract", "in.vma", "new"), EXTRACTED),
    Road("extract a stream", ("extract", "-", "new"), EXTRACTED, "-"),
    Road("extract frames", ("extract", "frames.vma.zst", "new"), EXTRACTED, "frames.vma.zst"),
    Road("extract into a directory", ("extract", "in.vma", "empty"), there(EXTRACTED, "empty")),
    Road("rescue", ("rescue", "in.vma", "new"), RESCUED),
    Road("rescue a stream", ("rescue", "-", "new"), RESCUED, "-"),
    Road("rescue frames", ("rescue", "frames.vma.zst", "new"), RESCUED, "frames.vma.zst"),
    Road("diff", ("diff", "base.vma", "in.vma", "out.vmad"), ("out.vmad",)),
    Road("optimize a difference", ("optimize", "--base", "base.vma", "in.vmad", "out.vma"),
         OPTIMIZED, "in.vmad"),
    Road("extract a difference", ("extract", "--base", "base.vma", "in.vmad", "new"), EXTRACTED,
         "in.vmad"),
)  # fmt: skip
PRINTING = (
    Road("optimize to a pipe", ("optimize", "in.vma", "-")),
    Road("optimize to zstd in a pipe", ("optimize", "--compress=zstd", "in.vma", "-")),
    Road("pack to a pipe", ("pack", "full", "-"), (), "full/drive-scsi0"),
    Road("list", ("list", "--scan", "in.vma")),
    Road("list frames", ("list", "--scan", "frames.vma.zst"), (), "frames.vma.zst"),
    Road("verify", ("verify", "in.vma")),
    Road("verify frames", ("verify", "frames.vma.zst"), (), "frames.vma.zst"),
    Road("verify a stream", ("verify", "-"), (), "-"),
    Road("verify --digest", ("verify", "--digest", "in.vma")),
    Road("verify --digest a stream", ("verify", "--digest", "-"), (), "-"),
    Road("verify --against", ("verify", "in.vma", "--against", "same.vma")),
    Road("diff to a pipe", ("diff", "--compress", "none", "base.vma", "in.vma", "-")),
    Road("verify a difference", ("verify", "--base", "base.vma", "in.vmad"), (), "in.vmad"),
)
# Its disks go where they cannot be taken back, so this one has none.
MAPPED = Road("extract by a map", ("extract", "-r", "map", "in.vma", "new"), CONFIGS)
ROADS = {road.name: road for road in (*WRITING, *PRINTING, MAPPED)}


@functools.cache
def small_archive() -> bytes:
    """Return an archive of three disks in a live backup's order, some hundred kilobytes."""
    rng = random.Random(7)
    disks = [
        archives.Device(1, "drive-efidisk0", archives.disk(rng, CLUSTER + 16384, "sparse")),
        archives.Device(2, "drive-scsi0", archives.disk(rng, 6 * CLUSTER)),
        archives.Device(3, "drive-tpmstate0-backup", archives.disk(rng, CLUSTER, "sparse")),
    ]
    configs: list[archives.Config] = [("qemu-server.conf", b"cores: 2\n"), ("qemu-server.fw", b"")]
    archive = Archive(disks, configs, uuid=rng.randbytes(16))
    return archives.build(archive, archives.live_order(archive, rng, window=4), slots=4)


@functools.lru_cache(maxsize=4)
def in_frames(data: bytes) -> bytes:
    """Return what optimize makes of an archive with --compress zstd; other tests look at that."""
    answer = call_tool("optimize", "-q", "--compress", "zstd", "-", "-", input=data)
    if answer.returncode:
        raise AssertionError(answer.stderr)
    return answer.stdout


def day_before(archive: Archive) -> Archive:
    """Return an archive from which two clusters of three differ."""
    devices = []
    for device in archive.devices:
        data = bytearray(device.data)
        for at in range(100, len(data), CLUSTER):
            if at % (3 * CLUSTER) > CLUSTER:
                data[at] ^= 1
        devices.append(dataclasses.replace(device, data=bytes(data)))
    return dataclasses.replace(archive, devices=devices, ctime=archive.ctime - 86400)


class Workshop:
    """A directory in which roads are gone: the archive in all forms, and what comes of it."""

    def __init__(self, directory: Path, data: bytes | None = None) -> None:
        self.directory = directory
        self.temporary = directory / "empty"
        self.data = small_archive() if data is None else data
        self.archive: Archive = archives.parse(self.data).archive
        masks = archives.parse(self.data).masks
        self.canonical = archives.canonical(self.archive, stored=masks)
        self.write("in.vma", self.data)
        self.write("same.vma", self.canonical)
        self.write("old.vma", b"an older archive")
        self.write("map", b"".join(b"skip=%b\n" % d.raw_name for d in self.archive.devices))
        self.write("in.vma.gz", gzip.compress(self.data, 1))
        self.one_frame = compress("zstd", self.data)
        self.write("one.vma.zst", self.one_frame)
        self.write("frames.vma.zst", in_frames(self.data))
        (directory / "empty").mkdir()
        call_tool("unpack", directory / "in.vma", directory / "full")
        self.write("base.vma", archives.build(day_before(self.archive)))
        call_tool("diff", directory / "base.vma", directory / "in.vma", directory / "in.vmad")
        self.description = sha256(directory / "full" / "vma.json")
        call_tool("rescue", directory / "in.vma", directory / "rescued")
        self.report = sha256(directory / "rescued" / "rescue.json")
        shutil.rmtree(directory / "rescued")
        for path in directory.rglob("*"):
            os.utime(path, ns=(10**18, 10**18))  # long ago: any change shows
        self.before = digests(directory)

    def write(self, name: str, data: bytes) -> None:
        (self.directory / name).write_bytes(data)

    def wanted(self, road: Road, data: bytes | None = None) -> dict[str, str]:
        """Return the digests of all files after the road was gone to its end.

        `data` is another archive that it may have been gone with.
        """
        parsed = archives.parse(data or self.data)
        disks = {d.raw_name.decode(): d.data for d in parsed.archive.devices}
        files = {str(name): data for name, data in parsed.archive.configs}
        files.update(disks)
        files.update({f"disk-{name}.raw": data for name, data in disks.items()})
        after = dict(self.before)
        for path in road.makes:
            name = Path(path).name
            if name.endswith(".vmad"):
                after[path] = self.before["in.vmad"]
            elif name.endswith(".zst"):
                after[path] = sha256(in_frames(data or self.data))
            elif name.endswith(".vma"):
                after[path] = sha256(archives.canonical(parsed.archive, stored=parsed.masks))
            elif name == "vma.json":
                after[path] = self.description
            elif name == "rescue.json":
                after[path] = self.report
            else:
                after[path] = sha256(files[name]) if name in files else ""
        return after

    def go(
        self,
        road: Road,
        before: Before = lambda name: None,
        within: contextlib.AbstractContextManager[object] | None = None,
        child: bool = False,
    ) -> Answer[bytes]:
        """Run a road's command in this process, with each of its calls intercepted.

        The tool runs `within` a context that its surroundings here are not in. As a `child`, it
        runs in a fork, where it handles signals.
        """
        real_main = vma_tool.main

        def main(argv: Sequence[str] | None = None) -> int:
            with intercepted(before), within or contextlib.nullcontext():
                return real_main(argv)

        here = os.getcwd()
        os.chdir(self.directory)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, TMPDIR=str(self.temporary)))
                if road.hidden:
                    stack.enter_context(mock.patch("shutil.which", lambda name: None))
                # where call_tool keeps what is printed
                stack.enter_context(mock.patch("tempfile.tempdir", memory_directory()))
                stack.enter_context(mock.patch.object(vma_tool, "main", main))
                command, *rest = road.args
                quiet = [] if command in ("list", "verify") else ["-q"]
                stream = self.data if road.reads == "-" else None
                if road.reads == "-.gz":
                    stream = gzip.compress(self.data, 1)
                run = fork_tool if child else call_tool
                return run(command, *quiet, *rest, input=stream)
        finally:
            os.chdir(here)

    def undo(self, road: Road) -> None:
        """Make all as it was before a road was gone."""
        for path in sorted(self.directory.rglob("*"), key=lambda path: -len(path.parts)):
            if os.fsdecode(path.relative_to(self.directory)) not in self.before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in (
            ("in.vma", self.data),
            ("one.vma.zst", self.one_frame),
            ("old.vma", b"an older archive"),
        ):
            if name in road.makes:
                (self.directory / name).unlink(missing_ok=True)
                self.write(name, data)
                os.utime(self.directory / name, ns=(10**18, 10**18))

    def strange(self, road: Road) -> list[str]:
        """Return what a killed run must not leave: all but old files, complete new ones, partial.

        Partial files have names of their own, which no `*.vma*` takes for an archive.
        """
        wanted, found = self.wanted(road), digests(self.directory)
        strange = [f"{name} is gone" for name in self.before if name not in found]
        for name, digest in found.items():
            if digest in (self.before.get(name), wanted.get(name)):
                continue
            if not fnmatch.fnmatch(Path(name).name, "vma-tool-*.partial"):
                strange.append(name)
            if fnmatch.fnmatch(Path(name).name, "*.vma*"):
                strange.append(f"{name} looks like an archive")
        return strange


class RoadTest(ToolTest):
    """A test that goes roads in a workshop, and looks at what is there afterwards."""

    def setUp(self) -> None:
        super().setUp()
        self.prepare(self.directory)

    def prepare(self, directory: Path) -> None:
        self.directory = directory
        self.workshop = Workshop(directory)

    def check_nothing_left(self, before: object) -> None:
        self.assertEqual(snapshot(self.directory), before)

    def check_line(self, answer: Answer[bytes]) -> None:
        self.assertRegex(answer.stderr.decode(), r"\Avma-tool: [^\n]+\n\Z")

    def check_done(self, road: Road, answer: Answer[bytes], printed: bytes) -> None:
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.assertEqual(answer.stdout, printed)
        self.assertEqual(digests(self.directory), self.workshop.wanted(road))

    def gone(self, road: Road) -> bytes:
        """Go a road undisturbed, and return what it printed."""
        answer = self.workshop.go(road)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.check_done(road, answer, answer.stdout)
        self.workshop.undo(road)
        return answer.stdout


def forked(function: Callable[[], R], timeout: int = 60) -> R:
    """Run a function in a forked child, and return what it returned; ChildProcessError if it died.

    What the child does to itself (its user, its limits) does not outlive it.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(timeout)
            os.close(reading)
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


def become_nobody() -> None:
    """Give up all rights, in a child; without root's rights there is nothing to give up."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
