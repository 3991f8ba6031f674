"""Archives and directories made to do harm: what is planted, named, announced or compressed.

Nothing is written but where it was asked for, nothing acts on a terminal, and nothing that is only
announced takes memory or time.
"""

from __future__ import annotations

import array
import bz2
import errno
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import stat
import struct
import subprocess
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests import archives, frames
from tests.archives import BLOCK, CLUSTER, EXTENT_HEADER, MIB, Archive, Device
from tests.faults import ROADS, Nth, Road, Workshop, has_child, open_files
from tests.support import (
    ALL,
    BAD,
    FEW,
    STEP,
    Answer,
    Argument,
    ToolTest,
    call_tool,
    golden,
    require_program,
    run_measured,
    run_tool,
    sha256,
    snapshot,
    temporary_directory,
)

SOMEBODY = b"somebody else's"
Plant = Callable[[Path], None]
SEED = 20251120


WRITING = ("pwritev", "ftruncate", "posix_fallocate")


class Planted(ToolTest):
    """Somebody who may write into the target directory puts things there while the tool works.

    At each of its calls to the system something appears under a name that it is about to write, or
    the directory itself is exchanged. Wherever that leads, nothing there is followed.
    """

    def setUp(self) -> None:
        super().setUp()
        self.workshop = Workshop(self.directory)
        self.outside = temporary_directory(self)
        (self.outside / "victim").write_bytes(b"not to be written")
        os.chmod(self.outside / "victim", 0o666)
        self.files: list[Plant] = [
            self.symbolic_link, self.dangling_link, self.hard_link, self.fifo, self.regular_file,
        ]  # fmt: skip
        self.kinds = [*self.files, self.device, self.link_to_directory, self.subdirectory]

    def symbolic_link(self, path: Path) -> None:
        path.symlink_to(self.outside / "victim")

    def dangling_link(self, path: Path) -> None:
        path.symlink_to(self.outside / "new")

    def link_to_directory(self, path: Path) -> None:
        path.symlink_to(self.outside)

    def hard_link(self, path: Path) -> None:
        os.link(self.outside / "victim", path)

    def fifo(self, path: Path) -> None:
        os.mkfifo(path)

    def device(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 200))

    def subdirectory(self, path: Path) -> None:
        path.mkdir()

    def regular_file(self, path: Path) -> None:
        path.write_bytes(SOMEBODY)

    def go_planted(self, road: Road, kinds: Iterator[Plant]) -> int:
        """Go a road with another thing planted ahead of each call; return how many there are."""
        wanted = self.workshop.wanted(road)
        names = [name for name in road.makes if wanted[name]]
        before, files = snapshot(self.outside), open_files()
        # What is there before the tool looks for the first time may be what its user means.
        calls = Nth(0, lambda _: None)
        self.workshop.go(road, calls)
        self.workshop.undo(road)
        first = 1
        if len(names) == 1:
            begin = min(calls.names.index(name) for name in WRITING if name in calls.names)
            first = max(i for i, name in enumerate(calls.names[:begin]) if name == "stat") + 2
        for number in itertools.count(first, STEP):
            kind = next(kinds)
            nth = Nth(number, functools.partial(self.plant, names, kind))
            with self.subTest(road.name, call=number, kind=kind.__name__):
                answer = self.workshop.go(road, nth)
                self.assertEqual(snapshot(self.outside), before)
                self.assertEqual(open_files(), files)
                self.assertFalse(has_child())
                self.assertEqual([path.name for path in self.directory.rglob("*.partial")], [])
                if answer.returncode:
                    self.check_error(answer)
                for path in (self.directory / name for name in names):
                    if path.is_file() and not path.is_symlink():
                        # ours, or what was planted, but nothing written through another name
                        planted = path.stat().st_nlink > 1 or path.read_bytes() == SOMEBODY
                        name = str(path.relative_to(self.directory))
                        self.assertTrue(planted or sha256(path) == wanted[name], name)
            self.workshop.undo(road)
            if not nth.name:
                return number - first
        return 0

    def plant(self, names: Iterable[str], kind: Plant, _call: str = "") -> None:
        """Put something under each of these names that is free."""
        for path in (self.directory / name for name in names):
            if path.parent.is_dir() and not os.path.lexists(path):
                kind(path)

    def test_under_the_final_names(self) -> None:
        for name in ("unpack", "unpack into a directory", "extract into a directory",
                     "extract a stream", "optimize", "pack"):  # fmt: skip
            self.assertGreater(self.go_planted(ROADS[name], itertools.cycle(self.kinds)), 20)

    def test_under_the_temporary_name(self) -> None:
        """A name that could be guessed is not opened if it is there."""
        for kind in self.files:
            for name in ("unpack into a directory", "optimize", "pack"):
                road = ROADS[name]
                directory = (self.directory / road.makes[0]).parent
                path = directory / "vma-tool-000000000000.partial"
                before = snapshot(self.outside)
                with self.subTest(name, kind=kind.__name__):
                    kind(path)
                    planted = snapshot(self.directory)
                    with mock.patch("os.urandom", bytes):
                        answer = self.workshop.go(road)
                    self.check_error(answer, os.strerror(errno.EEXIST))
                    self.assertEqual(snapshot(self.directory), planted)
                    self.assertEqual(snapshot(self.outside), before)
                self.workshop.undo(road)

    def test_before(self) -> None:
        """What is there from the beginning is refused, or replaced, but not followed."""
        for kind in self.files:
            for name, config in (("unpack", "drive-scsi0"), ("unpack", "qemu-server.conf")):
                target = self.directory / "empty"
                for force in ([], ["--force"]):
                    with self.subTest(kind=kind.__name__, force=force, config=config):
                        kind(target / config)
                        before = snapshot(self.outside)
                        answer = call_tool(name, *force, self.directory / "in.vma", target)
                        self.assertEqual(snapshot(self.outside), before)
                        if force:
                            self.check_ok(answer)
                            state = (target / config).lstat()
                            self.assertTrue(stat.S_ISREG(state.st_mode))
                            self.assertEqual(state.st_nlink, 1)
                        else:
                            self.check_error(answer, os.strerror(errno.EEXIST))
                            self.assertEqual(os.listdir(target), [config])
                    for path in target.iterdir():
                        path.unlink()

    def test_another_directory(self) -> None:
        """The target directory is exchanged for a link to another one."""
        away = self.directory / "away"
        for name in ("unpack", "unpack into a directory", "extract", "extract a stream"):
            road = ROADS[name]
            directory = self.directory / road.args[-1]
            before = snapshot(self.outside)

            def exchange(_name: str, directory: Path = directory) -> None:
                if directory.is_dir():
                    directory.rename(away)
                    directory.symlink_to(self.outside)

            nth = Nth(0, exchange)
            for number in itertools.count(1):
                existed = directory.is_dir()
                nth = Nth(number, exchange)
                self.workshop.go(road, nth)
                # What exists before the tool begins may be a link that somebody means.
                early = existed and "mkdir" not in nth.names[: max(number - 2, 0)]
                with self.subTest(name, call=number, before=nth.name):
                    if not early:
                        self.assertEqual(snapshot(self.outside), before)
                for path in self.outside.iterdir():
                    if path.name != "victim":
                        path.unlink()
                before = snapshot(self.outside)
                if directory.is_symlink():
                    directory.unlink()
                    for path in away.iterdir():
                        path.unlink()
                    away.rename(directory) if existed else away.rmdir()
                elif existed:
                    for path in directory.iterdir():
                        path.unlink()
                if not nth.name:
                    break
                self.workshop.undo(road)
            self.workshop.undo(road)


NAMES = (
    "\x1b[2J\x1b]0;title\x07",
    "\u202egpj.exe",
    "zero\u200bwidth",
    "line\u2028separator",
    b"\xff\xfe\x80",
    b"\xc2\x9b31m",
    "bell\x07",
    "carriage\rreturn",
    "new\nline",
    "tab\t",
    "back\\slash",
    "quote' \"$(reboot) `reboot`;reboot",
    "-rf",
    "n" * 255,
    "\U0001f4be" * 63,
    "caf\u00e9",
)


class Names(ToolTest):
    """Names that would act on a terminal, hide, or be taken for something else."""

    def check_printable(self, answer: Answer[bytes]) -> None:
        self.assertIn(answer.returncode, (0, 1, 3))
        text = (answer.stdout + answer.stderr).decode()  # UTF-8, so no byte of another kind
        for line in text.split("\n"):
            self.assertTrue(line.isprintable(), f"{line!r}")

    def archive(self, name: str | bytes, kind: str) -> Archive:
        disk = archives.disk(random.Random(SEED), 3 * CLUSTER, "sparse")
        if kind == "device":
            return Archive([Device(1, name, disk)], [("qemu-server.conf", b"")])
        return Archive([Device(1, "drive-scsi0", disk)], [(name, b"")])

    def commands(self, source: Path, data: bytes) -> Iterator[tuple[list[Argument], bytes | None]]:
        """Yield command lines that have something to say of an archive."""
        other = self.file("other.vma", golden("odd-size"))
        new = self.directory / "new"
        out = self.directory / "out.vma"
        plain: list[list[Argument]] = [
            ["list", source], ["list", "--json", source], ["list", "--scan", source],
            ["list", "--partitions", source], ["verify", source], ["verify", "--json", source],
            ["verify", "--digest", source], ["verify", "--digest", "--json", source],
            ["verify", source, "--against", other], ["verify", other, "--against", source],
            ["verify", "--json", source, "--against", other], ["optimize", source, out],
            ["optimize", source], ["unpack", source, new], ["unpack", source, new],
            ["pack", new, out], ["extract", source, self.directory / "disks"],
            ["extract", "-d", "none", source, new], ["extract", "-d", "none", "-o", out, source],
            ["config", source], ["config", "-c", "none", source],
        ]  # fmt: skip
        yield from ((command, None) for command in plain)
        yield ["verify", "-"], data
        yield ["unpack", "-", self.directory / "stream"], data

    def test_in_archives(self) -> None:
        """Each command prints them escaped, whether it takes the archive or not."""
        for name in NAMES[:: 1 if ALL else 2]:
            disk, config = self.archive(name, "device"), self.archive(name, "config")
            order = archives.in_order(disk)
            for what, data in (
                ("device", archives.build(disk, order)),
                ("config", archives.build(config, order)),
                ("device, cut", archives.build(disk, order[:-1])),
                ("device, twice", archives.build(disk, [*order, (1, 0)])),
            ):
                source = self.file("a.vma", data)
                sound = "," not in what
                for command, stream in self.commands(source, data) if sound else (
                    (["verify", source], None), (["unpack", "-", self.directory / "new"], data)
                ):  # fmt: skip
                    with self.subTest(name=name, what=what, command=command[:2]):
                        self.check_printable(call_tool(*command, input=stream))
                for path in self.directory.iterdir():
                    self.remove(path)

    def remove(self, path: Path) -> None:
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()

    def test_of_files(self) -> None:
        """The names that the user gives are printed escaped as well."""
        for name in ("\x1b[2J.vma", "\u202egpj", os.fsdecode(b"\xff.vma"), "new\nline.vma"):
            path = self.directory / name
            for data in (golden("odd-size"), b"text", golden("odd-size")[:-1]):
                path.write_bytes(data)
                commands: list[list[Argument]] = [
                    ["list", path], ["list", "--json", path], ["verify", path],
                    ["verify", "--json", path], ["verify", "--digest", path],
                    ["optimize", path], ["optimize", path], ["unpack", path, path],
                    ["extract", path, path], ["unpack", path, self.directory / ("d" + name)],
                    ["pack", self.directory / ("d" + name), path], ["pack", path, path],
                    ["verify", path, "--against", path], ["config", "-c", name, path],
                    ["extract", "-d", name, path, self.directory / "none"],
                ]  # fmt: skip
                for command in commands:
                    with self.subTest(name=name, command=command[:2]):
                        self.check_printable(call_tool(*command))

    def test_in_other_locales(self) -> None:
        """Where the terminal does not take all letters, they are escaped as well."""
        archive = self.archive("caf\u00e9\U0001f4be", "device")
        archive.configs = [(b"\xff.conf", b"")]
        source = self.file("a.vma", archives.build(archive))
        for setting in (
            {"PYTHONIOENCODING": "ascii"},
            {"PYTHONIOENCODING": "latin-1"},
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        ):
            environment = {**os.environ, **setting}
            for command in (["list", "--scan"], ["verify", "--digest"], ["verify", "--json"]):
                with self.subTest(setting, command=command):
                    answer = run_tool(*command, source, env=environment)
                    self.check_ok(answer)
                    self.assertTrue(answer.stdout.isascii() or "latin-1" in setting.values())

    def test_what_can_be_a_file_is_one(self) -> None:
        """A strange name that a file system takes comes back as it was, byte for byte."""
        for name in NAMES:
            raw = name if isinstance(name, bytes) else name.encode()
            archive = self.archive(raw, "device")
            source = self.file("a.vma", archives.build(archive))
            new, out = self.directory / "new", self.directory / "out.vma"
            with self.subTest(name=name):
                answer = call_tool("unpack", source, new)
                if answer.returncode:
                    self.check_error(answer, "device name", status=BAD)
                    self.assertFalse(new.exists())
                    text = raw.decode("utf-8", "replace")
                    self.assertTrue(len(raw) > 242 or re.search("[\0-\x1f\x7f-\x9f\\\\]", text))
                    continue
                self.assertIn(raw, os.listdir(os.fsencode(new)))
                self.ok("pack", "-q", new, out)
                self.assertEqual(sha256(out), sha256(archives.canonical(archive)))
                for path in (new, out):
                    self.remove(path)

    def test_commands_to_paste(self) -> None:
        """What is printed to be run by a shell, has the name as one word."""
        name = "x;reboot $(reboot) `reboot` 'y"
        # a file system is found on the disk, so that list says how to mount it
        disk = bytearray(2 * CLUSTER)
        disk[:4] = b"XFSB"
        archive = Archive([Device(1, name, bytes(disk))])
        source = self.file("a.vma", archives.build(archive))
        listed = json.loads(self.ok("list", "--json", "--partitions", source))
        (device,) = listed["devices"]
        commands = [partition["mount"] for partition in device["partitions"]]
        text = self.ok("list", "--partitions", source)
        commands += re.findall("^ +(?:extracted|mounted): +(mount .*)$", text, re.M)
        self.assertEqual(len(commands), 3)
        for command in commands:
            script = f'mount() {{ printf "%s\\n" "$@"; }}; reboot() {{ echo BAD; }}; {command}'
            answer = subprocess.run(
                ["sh", "-c", script], capture_output=True, text=True, check=True
            )
            files = [line.rpartition("/mnt/backup/")[2] for line in answer.stdout.splitlines()]
            self.assertIn(f"disk-{name}.raw", files)


@functools.cache
def usual_memory() -> int:
    """Return the memory that the tool needs for nothing much."""
    return run_measured("list", "-", input=golden("odd-size"))[1]


class Large(ToolTest):
    """As much as the format has room for works, in no more memory than it needs."""

    def test_254_devices(self) -> None:
        """Each of them of its own size, and in an order that strictly alternates."""
        rng = random.Random(SEED)
        disks = [
            Device(dev_id, f"drive-scsi{dev_id}".ljust(242, "x"), archives.disk(rng, dev_id * 1024))
            for dev_id in range(1, 255)
        ]
        archive = Archive(disks, [("qemu-server.conf", b"")])
        data = archives.build(archive, archives.interleaved(archive))
        source, out, new = self.file("a.vma", data), self.directory / "b.vma", self.directory / "n"
        self.ok("verify", "-q", source)
        self.ok("optimize", "-q", source, out)
        self.assertEqual(sha256(out), sha256(archives.canonical(archive)))
        self.ok("unpack", source, new)
        for device in disks:
            self.assertEqual((new / str(device.name)).read_bytes(), device.data)
        self.assertEqual(self.ok("list", source).count("\ndevice "), 254)

    def test_256_configs(self) -> None:
        """All slots full of 65535 bytes: a header of 16 MiB."""
        rng = random.Random(SEED)
        configs: list[archives.Config] = [(f"{n}.conf", rng.randbytes(65535)) for n in range(256)]
        archive = Archive([Device(1, "drive-scsi0", rng.randbytes(5120))], configs)
        data = archives.build(archive)
        source, out, new = self.file("a.vma", data), self.directory / "b.vma", self.directory / "n"
        wanted = sha256(archives.canonical(archive))
        tries: list[tuple[list[Argument], bytes | None]] = [
            (["list", source], None),
            (["verify", source], None),
            (["verify", "-"], data),
            (["optimize", "-q", source, out], None),
            (["unpack", source, new], None),
        ]
        for args, stream in tries:
            with self.subTest(args=args[:2]):
                answer, memory = run_measured(*args, input=stream)
                self.assertEqual((answer.returncode, answer.stderr), (0, b""))
                self.assertLess(memory, usual_memory() + len(data) + 64 * MIB)
        self.assertEqual(sha256(out), wanted)
        for name, content in configs:
            self.assertEqual((new / str(name)).read_bytes(), content)
        self.ok("pack", "-q", new, self.directory / "c.vma")
        self.assertEqual(sha256(self.directory / "c.vma"), wanted)


class Announced(ToolTest):
    """Sizes and numbers that no archive can hold are refused, and take no memory."""

    def check_refused(self, what: str, data: bytes, pieces: Iterable[bytes] = ()) -> None:
        """Check that an archive is refused as a file and as a stream, in little memory."""
        whole = data + b"".join(pieces)
        source = self.file("a.vma", whole)
        tries: list[tuple[list[Argument], bytes | None]] = [
            (["verify", source], None),
            (["verify", "-"], whole),
            (["verify", self.file("a.vma.gz", gzip.compress(whole, 1))], None),
            (["optimize", source], None),
            (["optimize", "-", self.directory / "b.vma"], whole),
            (["unpack", "-", self.directory / "new"], whole),
        ]
        for args, stream in tries[:: 1 if ALL else 2]:
            with self.subTest(what, args=args[:2], stream=stream is not None):
                answer, memory = run_measured(*args, input=stream)
                self.check_error(answer, status=BAD)
                self.assertLess(memory, usual_memory() + 64 * MIB)
        found = {path.name for path in self.directory.iterdir()}
        self.assertLessEqual(found, {"a.vma", "a.vma.gz"})

    def headers(self) -> Iterator[tuple[str, bytes]]:
        data = golden("odd-size")
        for size in (0xFFFFFFFF, 0xFFFFFE00, 1 << 30):
            changed = bytearray(data)
            struct.pack_into(">I", changed, 56, size)
            yield f"header_size {size}", bytes(changed)
        for size in (4 << 60, (1 << 64) - 512, 1 << 48):
            yield (
                f"device of {size} bytes",
                archives.edit(data, 4096 + 32 + 8, struct.pack(">Q", size)),
            )

    def headers_alone(self) -> Iterator[tuple[str, bytes]]:
        """Yield some kilobytes without a cluster."""
        disks = [Device(n, f"drive-scsi{n}", b"", 1 << 48) for n in range(1, 255)]
        far = Archive(disks[:1])
        last = archives.extent_bytes(far.uuid, [(0, 1, 0xFFFFFFFF)], [])
        yield "device of 256 TiB", archives.header_bytes(far)
        yield "its last cluster only", archives.header_bytes(far) + last
        yield "254 devices of 256 TiB", archives.header_bytes(Archive(disks))
        for name, size in (
            ("drive-scsi0", 1 << 40),
            ("drive-scsi0", 1 << 62),
            ("vmstate", (1 << 64) - 512),
        ):
            archive = Archive([Device(1, name, b"", size)])
            yield f"{name} of {size} bytes", archives.header_bytes(archive)
        data = archives.header_bytes(Archive())
        for size in (0xFFFFFE00, 17 * MIB):
            yield f"header of {size} bytes", data[:56] + struct.pack(">I", size) + data[60:]

    def test_headers_alone(self) -> None:
        """No command trips over them, and nothing is written."""
        for number, (what, data) in enumerate(self.headers_alone()):
            path = self.file("a.vma", data)
            self.assertLess(len(data), 30000)
            for command in ("verify", "extract", "unpack", "optimize"):
                more = [self.directory / "out"] if command != "verify" else []
                with self.subTest(what, command=command):
                    self.bad(command, path, *more)
                    self.bad(command, "-", *more, input=data)
                    self.assertEqual(os.listdir(self.directory), ["a.vma"])
            for args, stream in ((["verify", path], None), (["verify", "-"], data)):
                if ALL or number % 3 == 0:
                    with self.subTest(what, args=args):
                        answer, peak = run_measured(*args, timeout=10, input=stream)
                        self.check_error(answer, status=BAD)
                        self.assertLess(peak, 64 * MIB)

    def test_headers(self) -> None:
        for what, data in list(self.headers())[::FEW]:
            self.check_refused(what, data)

    def test_clusters(self) -> None:
        """Cluster 2^32 - 1, of a device that ends before it, or that has room for it."""
        data = golden("odd-size")
        at = archives.extent_offsets(data)[0]
        slot = next(slot for slot in archives.slots(data, at) if slot.dev_id)
        changed = archives.edit(data, slot.offset + 4, b"\xff\xff\xff\xff")
        self.check_refused("behind the end", changed)
        sized = archives.edit(changed, 4096 + 32 + 8, struct.pack(">Q", 1 << 48))
        self.check_refused("at the end", sized)

    def test_many_large_devices(self) -> None:
        """254 devices of 256 TiB each: 2^40 clusters, none of which is there."""
        disks = [Device(dev_id, f"d{dev_id}", b"", 1 << 48) for dev_id in range(1, 255)]
        archive = Archive(disks)
        self.check_refused("devices", archives.build(archive, [(n, 5) for n in range(1, 255)]))


def members(compress: Callable[[bytes], bytes], pieces: Iterable[bytes]) -> bytes:
    """Compress pieces as members of one file, each different piece only once."""
    known: dict[bytes, bytes] = {}
    out = []
    for piece in pieces:
        key = hashlib.sha256(piece).digest() if len(piece) > EXTENT_HEADER else piece
        if key not in known:
            known[key] = compress(piece)
        out.append(known[key])
    return b"".join(out)


class Bombs(ToolTest):
    """Small compressed files that become very large ones."""

    def measure(self, *args: Argument, index: int = 0, **kw: Any) -> Answer[bytes]:
        """Run the tool, which must not hold what it reads, but for an index of so many bytes."""
        answer, memory = run_measured(*args, **kw)
        self.assertLess(memory, usual_memory() + index + 64 * MIB, answer.stderr)
        return answer

    def zeros(self, size: int) -> Iterator[bytes]:
        """Yield an archive of a disk of stored zeros: header, extents, payload."""
        archive = Archive([Device(1, "drive-scsi0", b"", size)])
        yield archives.header_bytes(archive)
        payload = [bytes(BLOCK)] * (58 * 16)
        for first in range(0, size // CLUSTER, 58):
            infos = [(0xFFFF, 1, first + i) for i in range(58)]
            extent = archives.extent_bytes(archive.uuid, infos, payload)
            yield extent[:EXTENT_HEADER]
            yield extent[EXTENT_HEADER:]

    def test_stored_zeros(self) -> None:
        """Some hundred megabytes of zeros: a good archive, that is read to its end."""
        size = 58 * CLUSTER * 35
        pieces = list(self.zeros(size))
        for suffix, compress in (
            ("gz", lambda data: gzip.compress(data, 1)),
            ("xz", lambda data: lzma.compress(data, preset=0)),
            ("bz2", lambda data: bz2.compress(data, 1)),
        ):  # type: tuple[str, Callable[[bytes], bytes]]
            with self.subTest(suffix):
                path = self.file(f"a.vma.{suffix}", members(compress, pieces))
                self.assertLess(path.stat().st_size, size // 50)
                self.assertIn(b"drive-scsi0", self.measure("list", path).stdout)
                answer = self.measure("verify", path)
                self.assertEqual((answer.returncode, answer.stderr), (0, b""))

    def test_zstd(self) -> None:
        program = require_program("zstd", "zstd")
        size = 58 * CLUSTER * 35
        path = self.directory / "a.vma.zst"
        with subprocess.Popen(
            [program, "-q", "-1", "-o", str(path)], stdin=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            for piece in self.zeros(size):
                process.stdin.write(piece)
        answer = self.measure("verify", path)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))

    def test_index(self) -> None:
        """An index of some kilobytes that becomes a gigabyte, whether it says so or not."""
        plain, path = self.file("a.vma", golden("live-order")), self.directory / "a.vma.zst"
        self.ok("optimize", plain, path)
        found = frames.split(path.read_bytes())
        size = 1 << 30
        blocks = size // frames.BLOCK_MAX
        for said in (size, len(found.masks), 0):
            header = struct.pack("<IBQ", frames.ZSTD_MAGIC, 0b11100000, said)
            block = frames.BLOCK_MAX << 3 | 1 << 1  # one byte, repeated
            data = b"".join(
                struct.pack("<I", block | (number == blocks - 1))[:3] + b"\1"
                for number in range(blocks)
            )
            path.write_bytes(frames.join(found._replace(masks=header + data)))
            with self.subTest(said=said):
                # The frames themselves are whole: it is read as a stream.
                self.assertEqual(self.measure("verify", path).returncode, 0)
                self.assertEqual(self.measure("list", "--scan", path).returncode, 0)
                self.measure("rescue", path, self.directory / f"rescued-{said}")

    def test_not_an_archive(self) -> None:
        """Of zeros, or of anything else, no more than the beginning is read."""
        for start in (b"", b"VMA\0", golden("odd-size")[:12288]):
            path = self.file("a.vma.gz", members(gzip.compress, [start, *[bytes(16 * MIB)] * 24]))
            for command in ("list", "verify"):
                with self.subTest(start=start[:4], command=command):
                    self.check_error(self.measure(command, path), status=BAD)

    def test_empty_extents_without_end(self) -> None:
        """An archive whose end never comes: what is read is not held."""
        archive = Archive(configs=[("a.conf", b"")])
        empty = archives.extent_bytes(archive.uuid, [], []) * 2048
        start = archives.header_bytes(archive)
        path = self.file("a.vma.gz", members(gzip.compress, [start, *[empty] * 80]))
        self.assertEqual(self.measure("verify", path).returncode, 0)
        self.assertEqual(self.measure("list", path).returncode, 0)

    def test_vmstate_without_end(self) -> None:
        """RAM state has no announced end: each cluster that comes costs 8 bytes, and no more."""
        archive = Archive([Device(1, "vmstate", b"", CLUSTER)])

        def pieces(count: int) -> Iterator[bytes]:
            yield archives.header_bytes(archive)
            start = b"VMAE" + bytes(4) + archive.uuid
            for first in range(1 << 32, (1 << 32) + count, 59):
                infos = array.array("Q", range(first, first + 59))  # dev_id 1, mask 0
                infos.byteswap()
                blockinfo = infos.tobytes()
                yield start + hashlib.md5(start + bytes(16) + blockinfo).digest() + blockinfo

        count = 59 * 25000
        data = gzip.compress(b"".join(pieces(count)), 1)
        path = self.file("a.vma.gz", data)
        self.assertEqual(self.measure("list", path).returncode, 0)
        self.measure("verify", path, index=8 * count)

    def test_scattered_clusters(self) -> None:
        """Clusters far from each other in a huge device: a page of the index for each that comes.

        The index of the whole, which the header announces, would have 8 GiB.
        """
        archive = Archive([Device(1, "drive-scsi0", b"", 1 << 46)])
        count = 59 * 1500

        def pieces() -> Iterator[bytes]:
            yield archives.header_bytes(archive)
            for first in range(0, count, 59):
                infos = [(0, 1, (first + i) * 512) for i in range(59)]
                yield archives.extent_bytes(archive.uuid, infos, [])

        path = self.file("a.vma.gz", gzip.compress(b"".join(pieces()), 1))
        self.check_error(self.measure("verify", path, index=4096 * count), status=BAD)


if __name__ == "__main__":
    unittest.main()
