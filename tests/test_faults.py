"""Faults: after each of them the source is as it was, and nothing else is there.

Full disks, failing calls, signals, archives that change while they are read, what may not be read
or written. Each fault is really made, where that can be done; the calls to the system that fail, or
are followed by a signal, are each of them in turn.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import gzip
import itertools
import os
import random
import resource
import shutil
import struct
import subprocess
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

# What the tool imports when it needs it: a child that has become nobody may not read it any more.
import fcntl  # noqa: F401  # isort: skip
import json  # noqa: F401  # isort: skip
import tempfile  # noqa: F401  # isort: skip

import vma_tool
from tests import archives
from tests.faults import (
    NOBODY,
    READ_CLOSE,
    ROADS,
    WRITING,
    Before,
    Nth,
    Road,
    RoadTest,
    Short,
    Workshop,
    become_nobody,
    digests,
    forked,
    has_child,
    in_frames,
    open_files,
)
from tests.support import (
    ALL,
    BAD,
    FAILED,
    FEW,
    STEP,
    Answer,
    call_tool,
    golden,
    make_read_only,
    require_program,
    require_root,
    sha256,
    small_file_system,
    snapshot,
    temporary_directory,
)

SEED = 20251120
WAYS_TO_FAIL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


REAL_FSYNC = os.fsync  # ToolTest does without


class EveryCall(RoadTest):
    """Each call to the system, in turn, fails or is interrupted."""

    # Those that make no call that another one does not make as well are left out.
    ROADS = tuple(
        road
        for name, road in ROADS.items()
        if name not in ("optimize", "optimize in place unchecked", "extract", "list")
    )

    def each(
        self,
        road: Road,
        act: Before,
        check: Callable[[Nth, Answer[bytes], object], None],
    ) -> int:
        """Go a road again and again, with `act` ahead of one call more each time, until its end.

        `check` gets the call, the answer, and a snapshot of before. Return how many there are.
        """
        number = 0
        before = snapshot(self.directory)
        while True:
            number += STEP
            files = open_files()
            nth = Nth(number, act)
            answer = self.workshop.go(road, nth)
            if not nth.name:
                self.workshop.undo(road)
                return number - STEP
            with self.subTest(road.name, call=number, name=nth.name):
                self.assertFalse(has_child(), "a child")
                if road.reads.endswith(".gz"):
                    self.wait_for_threads(files)
                self.assertEqual(open_files(), files, "open files")
                check(nth, answer, before)
            if not nth.clean:
                self.workshop.undo(road)
                before = snapshot(self.directory)

    def wait_for_threads(self, files: list[str]) -> None:
        """Wait for those that feed a decompressor, and listen to it: nobody else does."""
        end = time.monotonic() + 10
        while open_files() != files and time.monotonic() < end:
            time.sleep(0.001)

    def test_order(self) -> None:
        """What gets a name is on the disk before, and the name is when the tool has ended."""
        for road in WRITING:
            calls = Nth(0, lambda name: None)
            self.workshop.go(road, calls)
            self.workshop.undo(road)
            # A new name is given by a link, that of another file by replacing it.
            steps = {"fsync": "fsync", "fdatasync": "fsync", "replace": "name", "link": "name"}
            named = [steps[name] for name in calls.names if name in steps]
            files = sum(1 for digest in map(self.workshop.wanted(road).get, road.makes) if digest)
            with self.subTest(road.name):
                self.assertEqual(named, ["fsync"] * files + ["name"] * files + ["fsync"])

    def test_failing(self) -> None:
        """A call that fails ends the road in one line that says so, or does not matter."""
        for road in self.ROADS:
            printed = self.gone(road)
            codes = [0]

            def fail(name: str, codes: list[int] = codes) -> None:
                if name == READ_CLOSE:
                    return
                codes.append(WAYS_TO_FAIL[len(codes) % len(WAYS_TO_FAIL)])
                raise OSError(codes[-1], os.strerror(codes[-1]))

            def check(
                nth: Nth,
                answer: Answer[bytes],
                before: object,
                road: Road = road,
                printed: bytes = printed,
                codes: list[int] = codes,
            ) -> None:
                if answer.returncode:
                    self.check_error(answer, status=BAD if nth.name == "mmap" else FAILED)
                    if not (road.replaces and "replace" in nth.names[: nth.number - 1]):
                        self.check_nothing_left(before)
                        nth.clean = True
                    else:  # too late to take it back
                        self.assertEqual(digests(self.directory), self.workshop.wanted(road))
                    why = "no memory for" if nth.name == "mmap" else os.strerror(codes[-1])
                    self.assertRegex(answer.stderr.decode(), f"({NAMED}|{self.directory}).*{why}")
                else:
                    self.check_done(road, answer, printed)
                    more = [HARMLESS_TO[word] for word in HARMLESS_TO if word in road.name]
                    self.assertIn(nth.name, itertools.chain(HARMLESS, *more))

            self.assertGreater(self.each(road, fail, check), 10)


class FullDisks(RoadTest):
    """The disk is full when the first, a middle, or the last block is written."""

    def fill(self, mount: Path, room: int) -> None:
        """Leave so many bytes free on a file system, whatever it had."""
        filler = mount / "filler"
        filler.unlink(missing_ok=True)
        directory = os.open(mount, os.O_RDONLY)
        REAL_FSYNC(directory)  # only now is there room again where the filler was
        os.close(directory)
        state = os.statvfs(mount)
        size = state.f_bavail * state.f_frsize - room
        with filler.open("wb", buffering=0) as file:
            while size > 0:
                with suppress(OSError):
                    size -= file.write(bytes(min(size, 1 << 16)))
                    continue
                break
            REAL_FSYNC(file.fileno())

    def needed(self, road: Road) -> int:
        """Return how many bytes of disk a road's output takes."""
        self.gone(road)
        self.workshop.go(road)
        paths = [self.directory / name for name in road.makes]
        size = sum(path.stat().st_blocks * 512 for path in paths if path.is_file())
        self.workshop.undo(road)
        return size

    def go_full(self, road: Road, mount: Path, room: int) -> None:
        self.fill(mount, room)
        before, files = snapshot(self.directory), open_files()
        with self.subTest(road.name, room=room):
            with mock.patch("os.fsync", REAL_FSYNC):
                answer = self.workshop.go(road)
            self.check_error(answer, os.strerror(errno.ENOSPC))
            self.assertEqual(snapshot(self.directory), before)
            self.assertEqual(open_files(), files)
        self.workshop.undo(road)

    def test_tmpfs(self) -> None:
        mount = small_file_system(self, 8 << 20)
        (mount / "work").mkdir()
        self.prepare(mount / "work")
        for road in WRITING:
            self.fill(mount, 5 << 20)
            needed = self.needed(road)
            self.assertGreater(needed, 50000)
            for room in (0, needed // 2, needed - 4096):
                self.go_full(road, mount, room)
            if not road.reads.startswith("-"):  # a stream needs room for its temporary file as well
                self.fill(mount, needed)
                self.gone(road)

    def test_ext4(self) -> None:
        """A file system that allocates late, or for the whole file at once."""
        require_root()
        require_program("mke2fs", "e2fsprogs")
        image, mount = self.directory / "image", self.directory / "mount"
        image.touch()
        os.truncate(image, 14 << 20)
        mount.mkdir()
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
        self.addCleanup(subprocess.run, ["umount", "--lazy", str(mount)], check=True)
        (mount / "work").mkdir()
        self.prepare(mount / "work")
        for road in WRITING:
            self.fill(mount, 4 << 20)
            needed = self.needed(road)
            for room in (0, needed // 2, needed - (64 << 10)):
                self.go_full(road, mount, room)

    def test_full_temporary_directory(self) -> None:
        """What of a stream does not fit into memory finds no room."""
        self.workshop.temporary = small_file_system(self, 1 << 20)
        road = ROADS["optimize a stream"]
        for room in (0, 64 << 10):
            self.fill(self.workshop.temporary, room)
            before = snapshot(self.directory)
            answer = self.workshop.go(road)
            self.check_error(answer, "temporary file", os.strerror(errno.ENOSPC))
            self.assertEqual(snapshot(self.directory), before)
            self.assertEqual(os.listdir(self.workshop.temporary), ["filler"])

    def test_limits(self) -> None:
        """No file may become larger than a limit, which needs no root to try."""
        for road in WRITING:
            self.gone(road)
            for limit in (0, 4096, 65536):
                before = snapshot(self.directory)
                with self.subTest(road.name, limit=limit):
                    answer = forked(functools.partial(self.limited, road, limit))
                    self.check_error(answer, os.strerror(errno.EFBIG))
                    self.assertEqual(snapshot(self.directory), before)

    def limited(self, road: Road, limit: int) -> Answer[bytes]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return self.workshop.go(road)


class ChangingArchives(RoadTest):
    """What is read changes meanwhile: an error, or the old archive, but never a mixture."""

    def setUp(self) -> None:
        super().setUp()
        # The same in all that the header says, so that a mixture of both would pass for sound.
        rng = random.Random(SEED)
        disks = [
            dataclasses.replace(disk, data=archives.disk(rng, len(disk.data)))
            for disk in self.workshop.archive.devices
        ]
        self.newer = dataclasses.replace(self.workshop.archive, devices=disks)
        self.newer_data = archives.build(self.newer, archives.live_order(self.newer, rng), slots=5)
        self.newer_disk = disks[1].data

    def truncated(self, path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def emptied(self, path: Path) -> None:
        os.truncate(path, 0)

    def another_beginning(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.write(golden("live-order")[:12800])

    def another_archive(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.write(self.newer_of(path))
            file.truncate()

    def touched(self, path: Path) -> None:
        os.utime(path)

    def longer(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(bytes(512))

    def renamed_over(self, path: Path) -> None:
        path.with_name("newer").write_bytes(self.newer_of(path))
        os.rename(path.with_name("newer"), path)

    def newer_of(self, path: Path) -> bytes:
        return self.newer_data if path.suffix else self.newer_disk

    def now(self, road: Road, path: Path) -> bytes | None:
        """Return the archive that a road would be gone with if it were gone now."""
        with suppress(ValueError, struct.error):
            if path.suffix:
                archives.parse(path.read_bytes())
                return path.read_bytes()
            disks = list(self.workshop.archive.devices)
            disks[1] = dataclasses.replace(disks[1], data=path.read_bytes())
            archive = dataclasses.replace(self.workshop.archive, devices=disks)
            if len(disks[1].data) == len(self.newer_disk):
                return archives.build(archive)
        return None

    def test_at_every_call(self) -> None:
        changes = [self.truncated, self.another_beginning, self.another_archive, self.touched,
                   self.renamed_over, self.emptied, self.longer]  # fmt: skip
        roads = ("optimize", "optimize in place", "pack", "unpack", "extract")
        for name in roads:
            turns = itertools.cycle(changes)
            for _ in range(2):
                next(turns)  # so that another change comes at each call
                self.change_at_every_call(ROADS[name], turns)

    def change_at_every_call(self, road: Road, changes: Iterator[Callable[[Path], None]]) -> None:
        path = self.directory / road.reads
        old, state = path.read_bytes(), path.stat()
        for number in itertools.count(1, FEW):
            change = next(changes)
            changed: dict[str, str] = {}

            def act(_name: str, change: Any = change, changed: dict[str, str] = changed) -> None:
                change(path)
                changed[road.reads] = sha256(path)

            nth = Nth(number, act)
            answer = self.workshop.go(road, nth)
            found = digests(self.directory)
            if not nth.name or (road.in_place and "replace" in nth.names[: number - 1]):
                self.workshop.undo(road)
                return
            with self.subTest(road.name, call=number, name=nth.name, change=change.__name__):
                if answer.returncode:
                    self.check_line(answer)
                    self.assertEqual(found, {**self.workshop.before, **changed})
                elif not road.in_place:
                    now = self.now(road, path)
                    good = [self.workshop.wanted(road), self.workshop.wanted(road, now)]
                    self.assertIn(found, [{**files, **changed} for files in good])
                elif change == self.touched or nth.name in AFTER_THE_LAST_LOOK:
                    self.assertEqual(found, self.workshop.wanted(road))
                else:  # in front of the first look
                    self.assertEqual(found, self.workshop.wanted(road, self.newer_data))
            self.workshop.undo(road)
            path.write_bytes(old)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    def test_while_it_is_read(self) -> None:
        """Whatever is said of an archive is said of one that did not change meanwhile."""
        (self.directory / "same.vma.gz").write_bytes(gzip.compress(self.workshop.canonical, 1))
        (self.directory / "same.vma.zst").write_bytes(in_frames(self.workshop.data))
        commands: list[tuple[str, ...]] = [
            ("optimize", "same.vma"),
            ("list", "--partitions", "same.vma"),
            ("optimize", "same.vma.zst"),
            ("list", "--partitions", "same.vma.zst"),
        ]
        for name in ("same.vma", "same.vma.gz", "same.vma.zst"):
            commands += [("verify", name), ("list", "--scan", name), ("unpack", name, "new"),
                         ("optimize", name, "out.vma")]  # fmt: skip
        roads = [Road(" ".join(args), args) for args in commands]
        self.workshop.before = digests(self.directory)
        changed = 0
        for road in roads:
            path = self.directory / next(name for name in road.args if name.startswith("same"))
            data = path.read_bytes()
            calls = Nth(0, lambda name: None)
            self.workshop.go(road, calls)
            self.workshop.undo(road)
            for number in range(1, len(calls.names) + 1, FEW):

                def append(_call: str, path: Path = path) -> None:
                    with open(path, "ab") as file:
                        file.write(b"junk")

                with self.subTest(road.name, call=number, name=calls.names[number - 1]):
                    answer = self.workshop.go(road, Nth(number, append))
                    if answer.returncode:
                        self.check_line(answer)
                        changed += b"changed while it was read" in answer.stderr
                        self.assertFalse((self.directory / "new").exists())
                        self.assertFalse((self.directory / "out.vma").exists())
                    else:  # behind the last look
                        later = set(calls.names[number - 1 :])
                        self.assertLessEqual(later, {*AFTER_THE_LAST_LOOK, *HARMLESS, *CHANGING})
                self.workshop.undo(road)
                path.write_bytes(data)
        self.assertGreater(changed, 20)


class Permissions(RoadTest):
    """What may not be read or written, or is something else than a file."""

    def as_nobody(self, road: Road) -> Answer[bytes]:
        """Go a road as a user without rights."""

        def go() -> Answer[bytes]:
            become_nobody()
            return self.workshop.go(road)

        return forked(go)

    def belongs_to_nobody(self) -> None:
        if os.geteuid() == 0:
            for path in [self.directory, *self.directory.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)

    def test_denied(self) -> None:
        self.belongs_to_nobody()
        for path, mode, roads in (
            ("in.vma", 0o000, ("optimize", "optimize in place", "unpack", "extract", "verify",
                               "list", "verify --against")),
            ("same.vma", 0o000, ("verify --against",)),
            ("full/drive-scsi0", 0o000, ("pack", "pack to a pipe")),
            ("full/vma.json", 0o000, ("pack",)),
            ("full/qemu-server.fw", 0o000, ("pack",)),
            ("full", 0o000, ("pack",)),
            ("full", 0o444, ("pack",)),
            ("empty", 0o555, ("unpack into a directory", "extract into a directory",
                              "optimize a stream")),
            ("empty", 0o000, ("unpack into a directory", "extract into a directory",
                              "optimize a stream")),
            (".", 0o555, ("optimize", "optimize in place", "optimize over another", "pack",
                          "optimize a stream", "unpack", "unpack a stream", "extract")),
        ):  # fmt: skip
            for name in roads:
                with self.subTest(name, path=path, mode=oct(mode)):
                    before, kept = snapshot(self.directory), (self.directory / path).stat().st_mode
                    os.chmod(self.directory / path, mode)
                    answer = self.as_nobody(ROADS[name])
                    os.chmod(self.directory / path, kept)
                    self.check_error(answer, os.strerror(errno.EACCES))
                    self.assertEqual(snapshot(self.directory), before)

    def test_of_another_owner(self) -> None:
        """In place, an archive keeps its owner, or stays as it is."""
        require_root()
        os.chmod(self.directory, 0o777)
        before = snapshot(self.directory)
        answer = self.as_nobody(ROADS["optimize in place"])
        self.check_error(answer, os.strerror(errno.EPERM))
        self.assertEqual(snapshot(self.directory), before)

    def test_read_only_file_system(self) -> None:
        mount = small_file_system(self, 8 << 20)
        self.prepare(mount)
        make_read_only(self, mount)
        for road in ROADS.values():
            before = snapshot(self.directory)
            with self.subTest(road.name):
                answer = self.workshop.go(road)
                if road.makes:
                    self.check_error(answer, os.strerror(errno.EROFS))
                elif not road.reads.startswith("-"):
                    self.assertEqual(answer.returncode, 0, answer.stderr)
                self.assertEqual(snapshot(self.directory), before)

    def test_no_file(self) -> None:
        long = "n" * 256
        for args, code in (
            (("optimize", "in.vma", "full"), errno.EISDIR),
            (("pack", "full", "empty"), errno.EISDIR),
            (("extract", "-d", "drive-scsi0", "-o", "empty", "in.vma"), errno.EISDIR),
            (("optimize", "full"), errno.EISDIR),
            (("verify", "full"), "no archives here"),
            (("optimize", "none.vma"), errno.ENOENT),
            (("optimize", "none.vma", "out.vma"), errno.ENOENT),
            (("optimize", "in.vma", "none/out.vma"), errno.ENOENT),
            (("pack", "full", "none/out.vma"), errno.ENOENT),
            (("pack", "none", "out.vma"), errno.ENOENT),
            (("unpack", "in.vma", "none/new"), errno.ENOENT),
            (("extract", "in.vma", "none/new"), errno.ENOENT),
            (("optimize", "in.vma", "old.vma/out.vma"), errno.ENOTDIR),
            (("pack", "old.vma", "out.vma"), errno.ENOTDIR),
            (("unpack", "in.vma", "old.vma"), errno.ENOTDIR),
            (("extract", "in.vma", "old.vma"), errno.ENOTDIR),
            (("optimize", "in.vma", long), errno.ENAMETOOLONG),
            (("optimize", "in.vma", long + "/out.vma"), errno.ENAMETOOLONG),
            (("optimize", "in.vma", "a/" * 3000), errno.ENAMETOOLONG),
            (("optimize", long, "out.vma"), errno.ENAMETOOLONG),
            (("pack", "full", long), errno.ENAMETOOLONG),
            (("unpack", "in.vma", long), errno.ENAMETOOLONG),
            (("extract", "in.vma", long), errno.ENAMETOOLONG),
            (("unpack", "in.vma", "full"), errno.EEXIST),
            (("extract", "in.vma", "full"), errno.ENOTEMPTY),
            (("optimize", "in.vma", "loop"), errno.ELOOP),
            (("verify", "loop"), errno.ELOOP),
        ):  # fmt: skip
            (self.directory / "loop").unlink(missing_ok=True)
            (self.directory / "loop").symlink_to("loop")
            before, files = snapshot(self.directory), open_files()
            with self.subTest(args=[arg[:20] for arg in args]):
                says = os.strerror(code) if isinstance(code, int) else code
                self.check_error(self.workshop.go(Road("", args)), says)
                self.assertEqual(snapshot(self.directory), before)
                self.assertEqual(open_files(), files)

    def test_names_for_one_file(self) -> None:
        """Whatever links lead to the archive: it, or a complete new one, is under each name."""
        wanted = {sha256(self.workshop.data), sha256(self.workshop.canonical)}
        here = self.directory
        links: tuple[tuple[str, Callable[[], None]], ...] = (
            ("hard link", lambda: os.link(here / "in.vma", here / "other.vma")),
            ("symbolic link", lambda: os.symlink("in.vma", here / "other.vma")),
            ("symbolic link, another way", lambda: os.symlink(f"../{here.name}/in.vma",
                                                              here / "other.vma")),
        )  # fmt: skip
        for what, make in links:
            for args in (
                ("in.vma", "other.vma"), ("other.vma", "in.vma"), ("other.vma",),
                ("other.vma", "other.vma"), ("in.vma", "./in.vma"),
            ):  # fmt: skip
                with self.subTest(what, args=args):
                    make()
                    answer = self.workshop.go(Road("", ("optimize", *args)))
                    self.assertEqual((answer.returncode, answer.stderr), (0, b""))
                    self.assertEqual(sha256(here / args[-1]), sha256(self.workshop.canonical))
                    self.assertLessEqual({sha256(here / name) for name in args}, wanted)
                    self.assertEqual((here / "other.vma").is_symlink(), "symbolic" in what)
                    self.assertEqual(
                        set(os.listdir(here)) - {"other.vma"},
                        {name for name in self.workshop.before if "/" not in name},
                    )
                (here / "other.vma").unlink(missing_ok=True)
                self.workshop.undo(ROADS["optimize in place"])

    def test_bind_mounts(self) -> None:
        """A file, or its directory, that is mounted at another place too."""
        require_root()
        here = self.directory
        other = temporary_directory(self)
        (other / "file.vma").touch()
        (other / "directory").mkdir()
        for target, path in (("in.vma", "file.vma"), (".", "directory")):
            command = ["mount", "--bind", str(here / target), str(other / path)]
            subprocess.run(command, check=True)
            self.addCleanup(subprocess.run, ["umount", "--lazy", str(other / path)], check=True)
        for name in (str(other / "file.vma"), str(other / "directory" / "in.vma")):
            for args in (("in.vma", name), (name, "in.vma"), (name,)):
                with self.subTest(args=args):
                    answer = self.workshop.go(Road("", ("optimize", "--force", *args)))
                    if answer.returncode:  # nothing can be renamed over a mounted file
                        self.check_error(answer, os.strerror(errno.EBUSY))
                        self.assertEqual(digests(here), self.workshop.before)
                    else:
                        self.assertEqual(
                            digests(here), self.workshop.wanted(ROADS["optimize in place"])
                        )
                    self.assertEqual(sorted(os.listdir(other)), ["directory", "file.vma"])
                    self.workshop.undo(ROADS["optimize in place"])


class ShortCounts(RoadTest):
    """Reads and writes that do a part of what they were asked for."""

    def go_short(self, road: Road, counts: Iterator[int]) -> None:
        printed = self.gone(road)
        with self.subTest(road.name):
            before = open_files()
            # Above what intercepts the calls for other tests, and leaves them alone here.
            short = mock.patch.object(vma_tool, "os", Short(counts))
            answer = self.workshop.go(road, within=short)
            self.check_done(road, answer, printed)
            self.assertEqual(open_files(), before)
            self.workshop.undo(road)

    def test_some_bytes(self) -> None:
        rng = random.Random(SEED)
        counts = (rng.choice([1, 3, 511, 4095, 4096, 10000, 1 << 20]) for _ in itertools.count())
        for road in ROADS.values():
            self.go_short(road, counts)

    def test_one_byte(self) -> None:
        """Each call does a single byte."""
        rng = random.Random(SEED)
        disks = [
            archives.Device(1, "drive-efidisk0", archives.disk(rng, 5120, "full")),
            archives.Device(2, "drive-scsi0", archives.disk(rng, 512, "full")),
            archives.Device(3, "drive-tpmstate0-backup", archives.disk(rng, 4096, "full")),
        ]
        archive = archives.Archive(
            disks, [("qemu-server.conf", b"cores: 2\n"), ("qemu-server.fw", b"")]
        )
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        data = archives.build(archive, archives.reversed_order(archive), slots=2)
        self.workshop = Workshop(self.directory, data)
        names = ("optimize", "optimize a stream", "pack", "unpack", "unpack a stream",
                 "extract a stream", "verify a stream", "verify --digest a stream")  # fmt: skip
        for name in names[:: 1 if ALL else 2]:
            self.go_short(ROADS[name], itertools.repeat(1))

    def test_a_pipe_of_single_bytes(self) -> None:
        """Each byte comes by itself, plain or compressed, as from somebody who types."""
        archive = archives.Archive([archives.Device(1, "drive-scsi0", b"x" * 5120)])
        data = archives.build(archive)
        output = self.directory / "out.vma"
        for stream in (data, gzip.compress(data, 1)):
            pieces = (stream[i : i + 1] for i in range(len(stream)))
            answer = call_tool("optimize", "-q", "-", output, input=pieces)
            self.assertEqual((answer.returncode, answer.stderr), (0, b""))
            self.assertEqual(sha256(output), sha256(archives.canonical(archive)))
            output.unlink()

    def test_nothing_written(self) -> None:
        """A write that does nothing, again and again, is an error and no endless loop."""
        for name in ("optimize", "optimize to a pipe", "pack", "unpack", "extract a stream"):
            road = ROADS[name]
            before = snapshot(self.directory)
            with self.subTest(name):
                idle = mock.patch.object(vma_tool, "os", Idle())
                answer = self.workshop.go(road, within=idle)
                self.check_line(answer)
                self.assertEqual(answer.returncode, 1)
                self.assertEqual(snapshot(self.directory), before)


class Idle(Short):
    """`os` whose writes do nothing."""

    def __init__(self) -> None:
        super().__init__(itertools.repeat(1 << 20))
        for name in ("write", "writev", "pwritev"):
            self._wrappers[name] = lambda *args: 0


# What changes something by itself.
CHANGING = (
    "fchmod", "fchown", "ftruncate", "link", "mkdir", "pwritev", "rename", "rmdir", "unlink",
    "utime", "write", "writev",
)  # fmt: skip
# What may fail without harm: it only saves time, or there is nothing left to lose.
# What does not tell where its holes are has none. Without mmap, buffers are in small pages. What an
# earlier run left behind is only looked for to be mentioned. Where a link cannot be, a rename can.
# What cannot be read, rescue reads again, in smaller pieces; without a seek table, it goes on.
# Where verify cannot tell that /dev/null is one, it reads what the kernel need not copy else.
HARMLESS_TO = {"rescue": ("FileIO.readinto", "read", "pread"), "verify": ("fstat",)}
HARMLESS = ("posix_fadvise", "open()", "lseek", "mmap", "listdir", "open", "link", READ_CLOSE)
# Each message names what it is about.
NAMED = r"\b(in\.vma|\w+\.vmad?\b|new\b|empty|full|map|standard \w+|temporary file|device)"


# In place: what is called between the last look at the archive and its replacement.
AFTER_THE_LAST_LOOK = ("stat", "close", READ_CLOSE, "replace", "fsync")


if __name__ == "__main__":
    unittest.main()
