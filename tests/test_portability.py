"""Systems that lack calls: the same bytes by plainer means."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from tests import archives
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import FEW, OsProxy, ToolTest, call_tool, sha256

# What some system in use lacks: an old kernel or C library, macOS, Windows.
CALLS = (
    ["preadv"], ["pwritev"], ["readv"], ["writev"], ["sendfile"], ["posix_fadvise"],
    ["posix_fallocate"], ["SEEK_DATA", "SEEK_HOLE"], ["O_NOFOLLOW"], ["O_CLOEXEC"],
    ["fchown", "fchmod"],
)  # fmt: skip
ALL_CALLS = [name for names in CALLS for name in names]


class NoDirectoryDescriptors(OsProxy):
    """A system on which directories cannot be opened, and files not be named relative to them."""

    def __init__(self) -> None:
        super().__init__([*ALL_CALLS, "O_DIRECTORY"])
        for name in ("supports_dir_fd", "supports_fd", "supports_follow_symlinks"):
            setattr(self, name, set())


class HiddenCalls(ToolTest):
    """Each call hidden alone, and all of them at once."""

    def setUp(self) -> None:
        super().setUp()
        rng = random.Random(13)
        self.archive = archives.three_disks(rng, vmstate=True)
        self.order = archives.shuffled(self.archive, rng)
        self.data = archives.build(self.archive, self.order)
        self.want = sha256(archives.canonical(self.archive))
        self.disks = {d.raw_name.decode(): sha256(d.data) for d in self.archive.devices}

    def variants(self) -> Iterator[tuple[str, contextlib.AbstractContextManager[object]]]:
        """Yield a context for each call that is hidden, and for all of them."""
        import vma_tool

        for hidden in (*CALLS[::FEW], ALL_CALLS):
            yield " ".join(hidden), mock.patch.object(vma_tool, "os", OsProxy(hidden))
        yield "all, and dir_fd", mock.patch.object(vma_tool, "os", NoDirectoryDescriptors())
        yield "fcntl", hidden_modules("fcntl")
        yield "F_SETPIPE_SZ", mock.patch("fcntl.fcntl", side_effect=OSError(errno.EINVAL, "no"))

    def test_every_command(self) -> None:
        """optimize, unpack, extract, pack and verify, from files and from pipes."""
        source = self.directory / "a.vma"
        output = self.directory / "out.vma"
        for number, (what, context) in enumerate(self.variants()):
            source.write_bytes(self.data)
            target = self.directory / f"unpacked-{number}"
            with self.subTest(hidden=what), context:
                self.ok("verify", source)
                self.ok("optimize", "--force", source, output)
                self.assertEqual(sha256(output), self.want)
                for memory in ("256M", "64K"):
                    answer = call_tool("optimize", "--memory", memory, "-", "-", input=self.data)
                    self.check_ok(answer)
                    self.assertEqual(sha256(answer.stdout), self.want)
                self.ok("unpack", source, target)
                self.check_disks(target)
                self.ok("unpack", "--force", "-", target, input=self.data)
                self.check_disks(target)
                self.ok("pack", "-q", "--force", target, output)
                self.assertEqual(sha256(output), self.want)
                answer = call_tool("pack", "-q", target, "-")
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), self.want)
                self.ok("extract", source, self.directory / f"extracted-{number}")
                self.ok("optimize", source)
                self.assertEqual(sha256(source), self.want)
                self.refused("extract", source, target)
                self.refused("unpack", source, target)

    def check_disks(self, target: Path) -> None:
        found = {path.name: sha256(path) for path in target.iterdir()}
        for name, digest in self.disks.items():
            self.assertEqual(found[name], digest)

    def test_several_threads(self) -> None:
        """Without preadv, those who read one file at once do not get in each other's way."""
        import vma_tool
        from tests import test_api

        with mock.patch.object(vma_tool, "os", OsProxy(["preadv"])):
            result = unittest.TestResult()
            test_api.Ranges("test_several_threads").run(result)
        self.assertEqual((result.testsRun, result.failures, result.errors), (1, [], []))


@contextlib.contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Let modules be as if they were not there."""
    hidden: dict[str, ModuleType | None] = dict.fromkeys(names)
    with mock.patch.dict("sys.modules", hidden):
        yield


class ShortReadsAndWrites(ToolTest):
    """A system call may do less than it was asked for."""

    def test_every_command(self) -> None:
        """Calls that read or write a part only, of any size, are called again."""
        import vma_tool

        rng = random.Random(14)
        archive = archives.three_disks(rng, vmstate=True)
        data = archives.build(archive, archives.live_order(archive, rng))
        want = sha256(archives.canonical(archive))
        source = self.file("a.vma", data)
        output, target = self.directory / "out.vma", self.directory / "out"
        with mock.patch.object(vma_tool, "os", ShortCalls(rng)):
            self.ok("optimize", source, output)
            self.assertEqual(sha256(output), want)
            answer = call_tool("optimize", "--memory", "64K", "-", "-", input=data)
            self.check_ok(answer)
            self.assertEqual(sha256(answer.stdout), want)
            self.ok("unpack", source, target)
            self.ok("pack", "-q", "--force", target, output)
            self.assertEqual(sha256(output), want)
            self.ok("unpack", "--force", "-", target, input=data)
        for device in archive.devices:
            self.assertEqual(sha256(target / device.raw_name.decode()), sha256(device.data))


class ShortCalls(OsProxy):
    """Reads and writes that do at most some tens of thousands of bytes."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def _some(self, buffers: Any) -> list[memoryview]:
        first = memoryview(buffers[0])
        return [first[: self._rng.choice([1, 100, 4096, 50000])]]

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, min(size, self._rng.choice([1, 100, 50000])))

    def write(self, fd: int, data: Any) -> int:
        return os.write(fd, self._some([data])[0])

    def readv(self, fd: int, buffers: Any) -> int:
        return os.readv(fd, self._some(buffers))

    def writev(self, fd: int, buffers: Any) -> int:
        return os.writev(fd, self._some(buffers))

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        return os.preadv(fd, self._some(buffers), offset)

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        return os.pwritev(fd, self._some(buffers), offset)


class OtherFileSystems(ToolTest):
    """pack, where holes are not what they are here."""

    def setUp(self) -> None:
        super().setUp()
        content = bytearray(130 * CLUSTER)
        rng = random.Random(15)
        # one byte each, in blocks of their own and next to each other, and a run of clusters
        for offset in (0, 5 * BLOCK + 512, 5 * BLOCK + 1536, 58 * CLUSTER - 1, 60 * CLUSTER + 700):
            content[offset] = 7
        content[70 * CLUSTER : 72 * CLUSTER] = rng.randbytes(2 * CLUSTER)
        self.content = bytes(content)
        self.source = self.directory / "dir"
        self.source.mkdir()
        (self.source / "drive-scsi0").write_bytes(content)

    def check(self, seek: Any) -> None:
        """Pack with another lseek, and compare with the oracle."""
        import vma_tool

        output = self.directory / "out.vma"
        proxy = OsProxy()
        proxy.lseek = seek  # type: ignore[attr-defined]  # taken before __getattr__ is asked
        with mock.patch.object(vma_tool, "os", proxy):
            self.ok("pack", "--force", self.source, output)
        ctime = archives.parse(output.read_bytes()).archive.ctime
        archive = Archive([Device(1, "drive-scsi0", self.content)], ctime=ctime)
        self.assertEqual(sha256(output), sha256(archives.canonical(archive)))

    def test_small_blocks(self) -> None:
        """Data may begin and end inside a block: on file systems whose blocks are smaller."""
        for unit in (512, 1024, 2048):
            with self.subTest(unit=unit):
                used = [
                    any(self.content[at : at + unit]) for at in range(0, len(self.content), unit)
                ]

                def seek(fd: int, offset: int, how: int, unit: int = unit, used: Any = used) -> int:
                    if how not in (os.SEEK_DATA, os.SEEK_HOLE):
                        return os.lseek(fd, offset, how)
                    for number in range(offset // unit, len(used)):
                        if used[number] == (how == os.SEEK_DATA):
                            return max(offset, number * unit)
                    if how == os.SEEK_DATA:
                        raise OSError(errno.ENXIO, "no more data")
                    return len(self.content)

                self.check(seek)

    def test_no_holes(self) -> None:
        """Where the file system knows nothing of holes, all is data, and zeros are found."""

        def refuse(fd: int, offset: int, how: int) -> int:
            if how in (os.SEEK_DATA, os.SEEK_HOLE):
                raise OSError(errno.EINVAL, "not here")
            return os.lseek(fd, offset, how)

        def all_data(fd: int, offset: int, how: int) -> int:
            if how == os.SEEK_HOLE:
                return len(self.content)
            return offset if how == os.SEEK_DATA else os.lseek(fd, offset, how)

        for what, seek in (("an error", refuse), ("all is data", all_data)):
            with self.subTest(what):
                self.check(seek)
