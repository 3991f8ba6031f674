"""extract -o, -r and -d: one disk, disks into what exists, as Proxmox restores; see test_unpack."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import vma_tool
from tests import archives
from tests.archives import BLOCK, CLUSTER, MIB, Archive, Device
from tests.damage import damages, good, good_archive
from tests.support import (
    BAD,
    FAILED,
    FEW,
    Argument,
    ToolTest,
    call_tool,
    golden,
    loop_device,
    manifest,
    require_program,
    sha256,
    snapshot,
    tool_command,
)


class ExtractOne(ToolTest):
    """extract -d NAME -o PATH."""

    def setUp(self) -> None:
        super().setUp()
        self.output = self.directory / "disk.raw"

    def test_golden_archives(self) -> None:
        """Each disk, to a file and to standard output, from a file, a pipe and a compressed one."""
        for name, want in manifest().items():
            path = self.file("a.vma", golden(name))
            packed = self.file("a.vma.gz", gzip.compress(golden(name), 1))
            for device in want["devices"]:
                with self.subTest(archive=name, device=device["name"]):
                    digests = set()
                    for archive in (path, packed):
                        self.ok(
                            "extract", "--force", "-d", device["name"], "-o", self.output, archive
                        )
                        digests.add(sha256(self.output))
                        answer = call_tool("extract", "-d", device["name"], "-o", "-", archive)
                        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
                        digests.add(sha256(answer.stdout))
                    answer = call_tool(
                        "extract", "-d", device["name"], "-o", "-", "-", input=golden(name)
                    )
                    self.assertEqual(digests | {sha256(answer.stdout)}, {device["sha256"]})

    def test_from_zstd_to_a_pipe(self) -> None:
        """With real pipes and the real program, in disk order: what dd would write."""
        zstd = require_program("zstd", "zstd")
        path = self.file("a.vma", golden("live-order"))
        subprocess.run([zstd, "-q", path], check=True)
        device = manifest()["live-order"]["devices"][1]
        script = '"$@" | dd of=disk.raw bs=64k 2>dd.log'
        subprocess.run(
            ["bash", "-o", "pipefail", "-c", script, "bash",
             *tool_command("extract", "a.vma.zst", "-d", device["name"], "-o", "-")],
            check=True, cwd=self.directory,
        )  # fmt: skip
        self.assertEqual(sha256(self.output), device["sha256"])

    def test_sparse(self) -> None:
        """A file gets the blocks with data only, and exactly the device's length."""
        size = 64 * MIB + 1536
        data = bytearray(size)
        data[20 * MIB : 20 * MIB + BLOCK] = b"x" * BLOCK
        holes = Archive([Device(1, "a", bytes(data)), Device(2, "b", bytes(16 * MIB))])
        path = self.file("a.vma", archives.canonical(holes, BLOCK))
        for name, want, most in (("a", bytes(data), MIB), ("b", bytes(16 * MIB), 64 << 10)):
            for archive, stream in ((path, None), ("-", path.read_bytes())):
                self.ok("extract", "--force", "-d", name, "-o", self.output, archive, input=stream)
                self.assertEqual(sha256(self.output), sha256(want))
                self.assertLessEqual(self.output.stat().st_blocks * 512, most)

    def test_vmstate(self) -> None:
        """RAM state is as long as its clusters, on each road."""
        vmstate = good_archive().devices[2].data
        path = self.file("a.vma", good())
        self.ok("extract", "-d", "vmstate", "-o", self.output, path)
        self.assertEqual(sha256(self.output), sha256(vmstate))
        for args, data in (([path], None), (["-"], good())):
            answer = call_tool("extract", "-d", "vmstate", "-o", "-", *args, input=data)
            self.assertEqual(sha256(answer.stdout), sha256(vmstate))

    def test_options_anywhere(self) -> None:
        """Proxmox's program takes the archive's name first, then options, then the directory."""
        path = self.file("a.vma", good())
        lines: list[list[str | Path]] = [
            [path, "-d", "drive-scsi0", "-o", self.output],
            ["-d", "drive-scsi0", path, "-o", self.output],
        ]
        for args in lines:
            self.output.unlink(missing_ok=True)
            self.ok("extract", *args)
            self.assertEqual(sha256(self.output), sha256(good_archive().devices[1].data))
        lines = [
            [path, "-d", "drive-scsi0", self.directory / "1"],
            ["-d", "drive-scsi0", path, self.directory / "2"],
            [path, self.directory / "3", "-d", "drive-scsi0"],
        ]
        for args in lines:
            with self.subTest(args=args):
                self.ok("extract", *args)
                (target,) = (arg for arg in args if isinstance(arg, Path) and arg != path)
                disks = [entry.name for entry in target.glob("*.raw")]
                self.assertEqual(disks, ["disk-drive-scsi0.raw"])

    def test_short_names(self) -> None:
        """A part of a name between dashes will do where it fits one device only."""
        path = self.file("a.vma", good())
        self.ok("extract", "-d", "scsi0", "-o", self.output, path)
        self.assertEqual(sha256(self.output), sha256(good_archive().devices[1].data))
        self.ok("extract", "-d", "efidisk0,drive-scsi0,scsi0", path, self.directory / "two")
        disks = sorted(entry.name for entry in (self.directory / "two").glob("*.raw"))
        self.assertEqual(disks, ["disk-drive-efidisk0.raw", "disk-drive-scsi0.raw"])
        with vma_tool.open_input(str(path)) as source:
            header = vma_tool.read_header(source)
        for names, want in (
            (["drive-tpmstate0-backup", "backup"], "tpmstate0"),
            (["a", "a-b"], "a"),  # its whole name counts more than a part of another one
        ):
            devices = tuple(vma_tool.Device(n, name, 512) for n, name in enumerate(names, 1))
            (found,) = vma_tool.choose(header._replace(devices=devices), [want])
            self.assertEqual(found.name, names[0])

    def test_existing_file(self) -> None:
        """With --force, it is replaced when the new one is complete; its mode and links stay."""
        path = self.file("a.vma", good())
        self.file("disk.raw", b"old").chmod(0o600)
        (self.directory / "link").symlink_to("disk.raw")
        args: list[Argument] = ["-d", "drive-scsi0", "-o", self.directory / "link", path]
        self.refused("extract", *args, says=["link: File exists: --force"])
        self.assertEqual(self.output.read_bytes(), b"old")
        self.ok("extract", "--force", *args)
        self.assertTrue((self.directory / "link").is_symlink())
        self.assertEqual(stat.S_IMODE(self.output.stat().st_mode), 0o600)
        self.assertEqual(sha256(self.output), sha256(good_archive().devices[1].data))

    def test_the_archive_is_no_output(self) -> None:
        """An archive is not replaced by its disk, by whatever name it goes."""
        path = self.file("a.vma", good())
        os.link(path, self.directory / "hard")
        (self.directory / "symbolic").symlink_to("a.vma")
        before = snapshot(self.directory)
        for name in ("a.vma", "hard", "symbolic", "./a.vma"):
            with self.subTest(output=name):
                output = f"{self.directory}/{name}"
                self.refused("extract", "-d", "drive-scsi0", "-o", output, path)
                self.assertEqual(snapshot(self.directory), before)

    def test_block_device(self) -> None:
        """It is written from its beginning, zeros and all; what is behind the disk stays."""
        disk = good_archive().devices[1].data
        image = self.file("image", b"\xff" * (len(disk) + MIB))
        target = loop_device(self, image)
        for args, data in (([self.file("a.vma", good())], None), (["-"], good())):
            self.ok("extract", "-d", "drive-scsi0", "-o", target, *args, input=data)
            with open(target, "rb") as device:
                self.assertEqual(sha256(device.read(len(disk))), sha256(disk))
                self.assertEqual(device.read(), b"\xff" * MIB)
        small = loop_device(self, self.file("small", b"\xff" * MIB))
        path = self.file("a.vma", good())
        says = ["1048576 bytes, device 'drive-scsi0' (dev_id 2) needs 1572864"]
        self.refused("extract", "-d", "drive-scsi0", "-o", small, path, says=says)
        self.assertEqual(small.read_bytes(), b"\xff" * MIB)

    def test_what_is_refused(self) -> None:
        """Nothing appears, and what was there stays."""
        path = self.file("a.vma", good())
        before = snapshot(self.directory)
        for names, says in (
            ("nope", "no device 'nope', there are 'drive-efidisk0', 'drive-scsi0', 'vmstate'"),
            ("drive-scsi0,drive-efidisk0", "-o writes one disk"),
            ("drive", "device 'drive' may be 'drive-efidisk0', 'drive-scsi0'"),
            ("scsi", "no device 'scsi', there are 'drive-efidisk0', 'drive-scsi0', 'vmstate'"),
            ("", "no device ''"),
            ("drive-scsi0,", "no device ''"),
        ):
            with self.subTest(names=names):
                self.refused("extract", "-d", names, "-o", self.output, path, says=[says])
        self.refused(
            "extract", "-d", "drive-scsi0", "-o", self.directory, path, says=["Is a directory"]
        )
        self.refused(
            "extract",
            "-d",
            "drive-scsi0",
            "-o",
            self.directory / "no/where",
            path,
            says=["No such"],
        )
        for args in (
            ["-o", self.output, path],
            ["-d", "drive-scsi0", "-o", self.output, path, self.directory / "dir"],
            ["-d", "drive-scsi0", "-o", self.output, "-r", "map", path],
            ["-d", "drive-scsi0", "-r", "map", path, self.directory / "dir"],
            [path],
            [],
        ):
            with self.subTest(args=args):
                answer = call_tool("extract", *args)
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
        self.assertEqual(snapshot(self.directory), before)

    def test_damaged_archives(self) -> None:
        for damage in damages()[::FEW]:
            with self.subTest(damage=damage.name):
                path = self.file("a.vma", damage.data)
                args: list[Argument] = ["extract", "-d", "drive-scsi0", "-o", self.output]
                self.bad(*args, path)
                # Of a stream, what the header lacks is missed before anything else.
                lacking = damage.name.startswith(("device of size 0", "device name"))
                self.refused(*args, "-", input=damage.data, status=FAILED if lacking else BAD)
                self.assertEqual(os.listdir(self.directory), ["a.vma"])

    def test_device_with_a_comma(self) -> None:
        archive = Archive([Device(1, "a,b", b"x" * 512), Device(2, "b", b"y" * 512)])
        source = self.file("a.vma", archives.build(archive))
        self.ok("extract", "-d", "a,b", "-o", self.output, source)
        self.assertEqual(self.output.read_bytes(), b"x" * 512)

    def test_devices_by_several_options(self) -> None:
        source = self.file("a.vma", golden("live-order"))
        target = self.directory / "out"
        names = [device["name"] for device in manifest()["live-order"]["devices"]]
        self.ok("extract", "-d", names[0], "-d", names[1], source, target)
        found = {path.name for path in target.iterdir() if path.name.startswith("disk-")}
        self.assertEqual(found, {f"disk-{name}.raw" for name in names[:2]})


class ExtractMap(ToolTest):
    """extract -r MAPFILE: into files and devices that exist."""

    def setUp(self) -> None:
        super().setUp()
        self.archive = archives.three_disks(random.Random(21))
        order = archives.live_order(self.archive, random.Random(22))
        self.data = archives.build(self.archive, order)
        self.path = self.file("a.vma", self.data)
        self.target = self.directory / "configs"

    def refused_map(self, *args: Argument, says: Iterable[str] = ()) -> str:
        """Check that a map is refused, when the configs and devices have been told."""
        answer = call_tool("extract", "-r", *args)
        self.assertRegex(answer.stdout, rb"\A((CFG|DEV|VMSTATE): .*\n)*CTIME: .*\n\Z")
        return self.check_error(answer, *says)

    def targets(self, *extra: int, fill: bytes = b"\xff") -> list[Path]:
        """Make a file for each device, larger by `extra`, of the same byte."""
        return [
            self.file(f"target{d.dev_id}", fill * (len(d.data) + (extra[i] if extra else 0)))
            for i, d in enumerate(self.archive.devices)
        ]

    def map(self, *lines: str) -> Path:
        return self.file("map", "".join(f"{line}\n" for line in lines).encode())

    def lines(self, zeros: str = "111") -> list[str]:
        return [
            f"{zero}:{device.raw_name.decode()}={self.directory}/target{device.dev_id}"
            for zero, device in zip(zeros, self.archive.devices)
        ]

    def extract(self, *lines: str, stream: bool = False, notice: str = "") -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        archive, data = ("-", self.data) if stream else (self.path, None)
        args: list[Argument] = ["extract", "-r", self.map(*lines), archive, self.target]
        self.ok(*args, input=data, notice=notice)
        configs = {path.name: path.read_bytes() for path in self.target.iterdir()}
        self.assertEqual(configs, dict(self.archive.configs))

    def test_zeros(self) -> None:
        """1 writes the whole disk, 0 only what is stored; nothing behind its end is touched."""
        for stream in (False, True):
            for zeros in ("111", "000", "010"):
                with self.subTest(stream=stream, zeros=zeros):
                    paths = self.targets(0, BLOCK + 1, 100)
                    self.extract(*self.lines(zeros), "done", stream=stream)
                    for zero, path, device in zip(zeros, paths, self.archive.devices):
                        want = bytearray(b"\xff" * path.stat().st_size)
                        if zero == "1":
                            want[: len(device.data)] = device.data
                        for number in range(device.block_count):
                            if device.mask(number // 16) >> number % 16 & 1:
                                start = number * BLOCK
                                end = min(start + BLOCK, len(device.data))
                                want[start:end] = device.data[start:end]
                        self.assertEqual(sha256(path), sha256(bytes(want)))

    def test_golden_archives(self) -> None:
        """Each disk of the manifest, from files and streams."""
        for name, wanted in manifest().items():
            for stream in (False, True):
                with self.subTest(archive=name, stream=stream):
                    lines = []
                    disks = [d for d in wanted["devices"] if d["name"] != "vmstate"]
                    for device in disks:
                        path = self.file(device["name"], b"\xff" * device["size"])
                        lines.append(f"1:{device['name']}={path}")
                    shutil.rmtree(self.target, ignore_errors=True)
                    archive = "-" if stream else self.file("g.vma", golden(name))
                    data = golden(name) if stream else None
                    self.ok("extract", "-r", self.map(*lines), archive, self.target, input=data)
                    for device in disks:
                        digest = sha256(self.directory / device["name"])
                        self.assertEqual(digest, device["sha256"])
                    state = {path.name: sha256(path) for path in self.target.iterdir()}
                    want = dict(wanted["configs"])
                    want.update(
                        ("vmstate.bin", d["sha256"])
                        for d in wanted["devices"]
                        if d["name"] == "vmstate"
                    )
                    self.assertEqual(state, want)

    def test_skip(self) -> None:
        paths = self.targets()
        before = [sha256(path) for path in paths]
        lines = self.lines()
        self.extract(lines[0], "skip=drive-scsi0", "skip=drive-tpmstate0-backup", "done")
        self.assertEqual(sha256(paths[0]), sha256(self.archive.devices[0].data))
        self.assertEqual([sha256(path) for path in paths[1:]], before[1:])

    def test_where_the_map_ends(self) -> None:
        """At `done`, at an empty line, or where the file does, with or without a line's end."""
        for end in ("done\nnonsense\n", "\nnonsense\n", "done", "", "\n"):
            with self.subTest(end=end):
                paths = self.targets()
                text = "\n".join(self.lines())
                shutil.rmtree(self.target, ignore_errors=True)
                path = self.file("map", f"{text}\n{end}".encode())
                self.ok("extract", "-r", path, self.path, self.target)
                self.assertEqual(sha256(paths[1]), sha256(self.archive.devices[1].data))

    def test_options_of_a_line(self) -> None:
        """What Proxmox writes in front of a line is understood; what is not applied is told."""
        paths = self.targets()
        efi, disk, tpm = self.lines()
        self.extract(
            f"format=raw:{efi}",
            f"format=raw:throttling.bps=1048576:throttling.group=restore:cache=writeback:{disk}",
            f"throttling.bps=0:{tpm}",
            "done",
            notice=f"vma-tool: {self.directory}/map: not applied here: cache=writeback,"
            " throttling.bps=0, throttling.bps=1048576, throttling.group=restore\n",
        )
        for path, device in zip(paths, self.archive.devices):
            self.assertEqual(sha256(path), sha256(device.data))

    def test_sizes(self) -> None:
        """A target is as large as its disk, or up to 4 MiB larger, as storages round up."""
        disk = self.archive.devices[1].data
        lines = [self.lines()[1], "skip=drive-efidisk0", "skip=drive-tpmstate0-backup"]
        for extra in (0, 1, 4 * MIB):
            with self.subTest(extra=extra):
                path = self.targets(0, extra, 0)[1]
                self.extract(*lines)
                self.assertEqual(path.read_bytes(), disk + b"\xff" * extra)
        for extra in (-1, -512, 4 * MIB + 1):
            with self.subTest(extra=extra):
                path = self.targets(0, extra, 0)[1]
                shutil.rmtree(self.target, ignore_errors=True)
                size = len(disk) + extra
                says = [f"target2: {size} bytes", "'drive-scsi0' (dev_id 2) needs", str(len(disk))]
                self.refused_map(self.map(*lines), self.path, self.target, says=says)
                self.assertEqual(path.read_bytes(), b"\xff" * size)
        path.unlink()
        shutil.rmtree(self.target, ignore_errors=True)
        self.refused_map(self.map(*lines), self.path, self.target, says=["target2: No such"])
        self.assertFalse(path.exists())

    def test_what_is_refused(self) -> None:
        """Nothing is written into any target, not even of lines that are right."""
        paths = self.targets()
        before = [sha256(path) for path in paths]
        efi, disk, tpm = self.lines()
        bad = "neither"
        for says, lines in (
            (bad, [efi, disk, "drive-tpmstate0-backup=/dev/null"]),
            (bad, [efi, disk, f"2:{tpm[2:]}"]),
            (bad, [efi, disk, f"1{tpm[2:]}"]),
            (bad, [efi, disk, "1:drive-tpmstate0-backup"]),
            (bad, [efi, disk, "1:drive-tpmstate0-backup="]),
            (bad, [efi, disk, "1:=target3"]),
            (bad, [efi, disk, f"colour=red:{tpm}"]),
            (bad, [efi, disk, f" {tpm}"]),
            (bad, [efi, disk, "format=raw"]),
            ("only raw", [efi, disk, f"format=qcow2:{tpm}"]),
            ("'drive-tpmstate0-backup'", [efi, disk, "done"]),
            ("'drive-tpmstate0-backup'", [efi, disk, "", tpm]),
            ("'drive-efidisk0'", ["done"]),
            ("neither a file nor a block device",
             [efi, disk, f"1:drive-tpmstate0-backup={self.directory}/fifo"]),
            ("/dev/null: neither", [efi, disk, "1:drive-tpmstate0-backup=/dev/null"]),
            ("Is a directory", [efi, disk, f"1:drive-tpmstate0-backup={self.directory}"]),
            ("No such file", [efi, disk, f"1:drive-tpmstate0-backup={self.directory}/no"]),
        ):  # fmt: skip
            with self.subTest(lines=lines[2:]):
                if not (self.directory / "fifo").exists():
                    os.mkfifo(self.directory / "fifo")
                shutil.rmtree(self.target, ignore_errors=True)
                self.refused_map(self.map(*lines), self.path, self.target, says=[says])
                self.assertEqual([sha256(path) for path in paths], before)
                self.assertEqual(sha256(self.path), sha256(self.data))
                self.assertFalse(self.target.exists())  # so the same can be tried again

    def test_one_file_for_two_disks(self) -> None:
        """The second disk would overwrite the first one."""
        self.targets(0, 0, 0)
        path = self.file("both", b"\xff" * (2 * MIB))
        archive = Archive([Device(1, "a", b"a" * (2 * MIB)), Device(2, "b", b"b" * (2 * MIB))])
        data = self.file("two.vma", archives.canonical(archive))
        os.link(path, self.directory / "same")
        for other in ("both", "same"):
            shutil.rmtree(self.target, ignore_errors=True)
            lines = [f"1:a={path}", f"1:b={self.directory}/{other}"]
            self.refused_map(self.map(*lines), data, self.target, says=[other])
            self.assertEqual(path.read_bytes(), b"\xff" * (2 * MIB))

    def test_the_archive_is_no_target(self) -> None:
        """Not even where its size would do."""
        data = archives.canonical(Archive([Device(1, "a", b"a" * MIB)]))
        path = self.file("self.vma", data)
        os.link(path, self.directory / "hard")
        for name in ("self.vma", "hard"):
            shutil.rmtree(self.target, ignore_errors=True)
            map_file = self.map(f"1:a={self.directory}/{name}")
            self.refused_map(map_file, path, self.target, says=[name])
            self.assertEqual(sha256(path), sha256(data))

    def test_names_the_map_file(self) -> None:
        """A map that is not there, and a directory that is not empty."""
        self.refused_map(
            self.directory / "no",
            self.path,
            self.target,
            says=["no: No such file"],
        )
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir()
        (self.target / "old").touch()
        self.refused(
            "extract", "-r", self.map(*self.lines()), self.path, self.target, says=["not empty"]
        )
        self.assertEqual(os.listdir(self.target), ["old"])

    def test_damaged_archives(self) -> None:
        """The exit status says that the targets are not complete; nothing is beside them."""
        lines = [
            f"1:{device.raw_name.decode()}={self.directory}/target{device.dev_id}"
            for device in good_archive().devices[:2]
        ]
        for damage in damages()[::FEW]:
            with self.subTest(damage=damage.name):
                for device in good_archive().devices[:2]:
                    self.file(f"target{device.dev_id}", bytes(len(device.data)))
                shutil.rmtree(self.target, ignore_errors=True)
                path = self.file("a.vma", damage.data)
                line = self.bad("extract", "-r", self.map(*lines), path, self.target)
                self.assertNotIn("target", line)
                self.assertFalse((self.target / "vmstate.bin").exists())

    def test_block_device(self) -> None:
        """A block device is a target like a file, on both roads."""
        disk = self.archive.devices[1].data
        target = loop_device(self, self.file("image", b"\xff" * (len(disk) + MIB)))
        for stream in (False, True):
            for zero in "10":
                with open(target, "r+b") as device:
                    device.write((b"\xff" if zero == "1" else b"\0") * len(disk))
                lines = [f"format=raw:{zero}:drive-scsi0={target}", "skip=drive-efidisk0"]
                self.extract(*lines, "skip=drive-tpmstate0-backup", "done", stream=stream)
                with open(target, "rb") as device:
                    self.assertEqual(sha256(device.read(len(disk))), sha256(disk))
                    self.assertEqual(device.read(), b"\xff" * MIB)

    def test_two_files_of_one_name(self) -> None:
        """What cannot be is found before a disk is written to."""
        state = Device(3, "vmstate", b"z" * CLUSTER)
        archive = Archive([Device(1, "a", b"x" * MIB), state], [("vmstate.bin", b"")])
        path, disk = self.file("b.vma", archives.build(archive)), self.file("disk", bytes(MIB))
        says = ["two files would be"]
        self.refused("extract", "-r", self.map(f"1:a={disk}"), path, self.target, says=says)
        self.assertEqual(disk.read_bytes(), bytes(MIB))

    def test_map_with_a_nul(self) -> None:
        path = self.file("nul", b"1:drive-scsi0=/x\0y\ndone\n")
        self.refused_map(path, self.path, self.target, says=["\\x00"])


def open_to_write(fifo: Path) -> int:
    """Open a FIFO that somebody is about to open to read."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    raise AssertionError(f"nobody reads {fifo}")


class Driver(ToolTest):
    """extract -r FIFO as Proxmox's restore drives it: it answers to what it reads."""

    def drive(self, archive: str | Path, stdin: IO[bytes] | None = None) -> list[str]:
        """Restore with a FIFO that is opened only when the configs and devices are known.

        Return all lines of standard output.
        """
        fifo, target = self.directory / "fifo", self.directory / "configs"
        os.mkfifo(fifo)
        lines = []
        devices: dict[str, int] = {}
        with subprocess.Popen(
            tool_command("extract", "-r", fifo, archive, target),
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            alarm = threading.Timer(30, child.kill)
            alarm.start()
            self.addCleanup(alarm.cancel)
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                found = re.match(r"DEV: dev_id=([0-9]+) size: ([0-9]+) devname: (\S+)$", line)
                if found:
                    devices[found[3]] = int(found[2])
                if line.startswith("CTIME: "):
                    # now the configs are complete, and each device has been named
                    written = {path.name: path.read_bytes() for path in target.iterdir()}
                    self.assertEqual(written, self.configs)
                    with open(open_to_write(fifo), "w", encoding="utf-8") as answer:
                        for name, size in devices.items():
                            self.file(name, b"\xff" * size)
                            answer.write(f"format=raw:1:{name}={self.directory}/{name}\n")
                            answer.flush()
                            time.sleep(0.02)
                        answer.write("done\n")
            errors = child.stderr.read()
        self.assertEqual(child.returncode, 0, errors)
        return lines

    def check(self, lines: list[str]) -> None:
        want = manifest()["live-order"]
        for device in want["devices"]:
            self.assertEqual(sha256(self.directory / device["name"]), device["sha256"])
        kinds = [line.split(":")[0] for line in lines]
        self.assertEqual(kinds[:6], ["CFG", "CFG", "DEV", "DEV", "DEV", "CTIME"])
        self.assertEqual(lines[0], "CFG: size: 294 name: qemu-server.conf")

    def setUp(self) -> None:
        super().setUp()
        self.configs = archives.parse(golden("live-order")).configs

    def test_from_a_file(self) -> None:
        self.check(self.drive(self.file("a.vma", golden("live-order"))))

    def test_from_a_stream(self) -> None:
        """The FIFO is asked for before the stream is read beyond its header."""
        path = self.file("a.vma", golden("live-order"))
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
            self.check(self.drive("-", cat.stdout))
