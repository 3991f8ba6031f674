"""create, config, extract -o and -r, completion: what Proxmox's own program has, and the shell."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import BLOCK, Archive, Device
from tests.damage import damages, good, good_archive
from tests.support import (
    TOOL,
    ToolTest,
    call_tool,
    golden,
    loop_device,
    manifest,
    require_program,
    run_tool,
    sha256,
    snapshot,
    temporary_directory,
    tool_command,
    unmeasured,
)

MIB = 1 << 20
NOW = 1763612345
COMMANDS = (
    "list", "verify", "extract", "unpack", "config", "create", "pack", "optimize", "completion",
)  # fmt: skip


def guest() -> Archive:
    """Return the usual guest, created just now."""
    archive = archives.three_disks(random.Random(5), vmstate=True)
    archive.ctime = NOW
    return archive


class Create(ToolTest):
    """An archive from files that are named one by one."""

    def setUp(self) -> None:
        super().setUp()
        now = mock.patch("time.time", return_value=NOW + 0.9)
        now.start()
        self.addCleanup(now.stop)
        os.chdir(self.directory)
        self.addCleanup(os.chdir, "/")
        self.output = self.directory / "new.vma"

    def write(self, archive: Archive) -> tuple[list[str], list[str]]:
        """Write configs and disks; return the configs' paths, and NAME=PATH of the disks."""
        configs = []
        for name, data in archive.configs:
            assert isinstance(name, str)
            self.file(name, data)
            configs.append(name)
        specs = []
        for device in archive.devices:
            self.file(f"{device.dev_id}.raw", device.data)
            specs.append(f"{device.raw_name.decode()}={device.dev_id}.raw")
        return configs, specs

    def created(self, *args: str | Path, notice: str = "") -> bytes:
        self.ok("create", "--force", *args, notice=notice)
        return self.output.read_bytes()

    def test_same_bytes_as_optimize(self) -> None:
        """The canonical layout, with each --align, and on standard output."""
        configs, specs = self.write(guest())
        options = [part for config in configs for part in ("-c", config)]
        for align, size in archives.ALIGNS.items():
            with self.subTest(align=align):
                found = self.created("--align", align, *options, "new.vma", *specs)
                self.assertEqual(sha256(found), sha256(archives.canonical(guest(), size)))
        answer = call_tool("create", *options, "-", *specs)
        self.assertEqual(sha256(answer.stdout), sha256(archives.canonical(guest())))

    def test_the_order_decides(self) -> None:
        """dev_ids and configs are numbered in the order of the command line, -d first."""
        archive = guest()
        archive.configs.reverse()
        archive.devices = [
            Device(dev_id, device.name, device.data)
            for dev_id, device in enumerate(reversed(archive.devices), 1)
        ]
        (fw, conf), specs = self.write(archive)
        args = ["-c", fw, "-c", conf, "-d", specs[0], "-d", f"format=raw:{specs[1]}", "new.vma"]
        found = self.created(*args, *specs[2:])
        self.assertEqual(sha256(found), sha256(archives.canonical(archive)))

    def test_options_anywhere(self) -> None:
        """Proxmox's program takes the archive's name first, then options, then disks."""
        configs, specs = self.write(guest())
        want = sha256(archives.canonical(guest()))
        options = [part for config in configs for part in ("-c", config)]
        disks = [part for spec in specs for part in ("-d", spec)]
        for args in (
            ["new.vma", *options, *specs],
            ["new.vma", *options, *disks],
            [*options, "new.vma", *disks],
            ["new.vma", *disks[:2], *options, *specs[1:]],
            [*disks, *options, "--align=128k", "new.vma"],
        ):
            with self.subTest(args=args):
                self.output.unlink(missing_ok=True)
                self.assertEqual(sha256(self.created(*args)), want)

    def test_sizes_that_are_no_multiples(self) -> None:
        """A disk has whole sectors; what is added is zeros, and is told."""
        rng = random.Random(6)
        for size in (1, 511, 512, 513, 4095, 4096, 4097, 65024, 65535, 65537, MIB + 1536, MIB - 1):
            with self.subTest(size=size):
                data = b"\1" + rng.randbytes(size - 1)
                self.file("odd", data)
                rounded = -(-size // 512) * 512
                notice = (
                    f"odd: {size} bytes, rounded up to {rounded}, as disks have whole sectors\n"
                )
                found = self.created("new.vma", "a=odd", notice=notice if size % 512 else "")
                device = Device(1, "a", data.ljust(rounded, b"\0"))
                self.assertEqual(found, archives.canonical(Archive([device], ctime=NOW)))
                self.ok("create", "-q", "--force", "new.vma", "a=odd")

    def test_nothing_or_configs_only(self) -> None:
        self.file("a.conf", bytes(range(256)))
        for args, archive in (
            (["new.vma"], Archive(ctime=NOW)),
            (["-c", "a.conf", "new.vma"], Archive([], [("a.conf", bytes(range(256)))], ctime=NOW)),
        ):
            with self.subTest(args=args):
                self.assertEqual(self.created(*args), archives.canonical(archive))

    def test_disks_by_links_and_holes(self) -> None:
        """A symbolic link is followed, a file that is a hole stores nothing."""
        data = archives.disk(random.Random(7), MIB)
        (self.directory / "link").symlink_to(self.file("disk", data))
        self.file("hole", b"")
        os.truncate("hole", 8 * MIB)
        devices = [Device(1, "a", data), Device(2, "b", bytes(8 * MIB))]
        found = self.created("new.vma", "a=link", "b=hole")
        self.assertEqual(found, archives.canonical(Archive(devices, ctime=NOW)))

    def test_block_device(self) -> None:
        data = archives.disk(random.Random(8), 3 * MIB)
        device = loop_device(self, self.file("disk", data))
        found = self.created("new.vma", f"drive-scsi0={device}")
        archive = Archive([Device(1, "drive-scsi0", data)], ctime=NOW)
        self.assertEqual(sha256(found), sha256(archives.canonical(archive)))

    def test_existing_archive(self) -> None:
        """It is not replaced, nor followed if it is a link, unless --force says so."""
        self.file("disk", bytes(BLOCK))
        self.file("new.vma", b"precious")
        (self.directory / "link.vma").symlink_to("new.vma")
        before = snapshot(self.directory)
        for name in ("new.vma", "link.vma"):
            self.refused("create", name, "a=disk", says=["File exists", "--force"])
        self.assertEqual(snapshot(self.directory), before)
        self.output.chmod(0o640)
        self.ok("create", "--force", "link.vma", "a=disk")
        self.assertTrue(Path("link.vma").is_symlink())
        self.assertEqual(stat.S_IMODE(self.output.stat().st_mode), 0o640)
        self.assertEqual(list(archives.parse(self.output.read_bytes()).disks), ["a"])

    def test_an_input_is_no_output(self) -> None:
        """A disk or config that would be replaced by its own archive stays what it is."""
        self.file("disk", b"disk".ljust(BLOCK))
        self.file("a.conf", b"config")
        os.link("disk", "hard")
        (self.directory / "symbolic").symlink_to("disk")
        before = snapshot(self.directory)
        for name in ("disk", "hard", "symbolic", "a.conf"):
            with self.subTest(output=name):
                self.refused("create", "--force", "-c", "a.conf", name, "a=disk", says=[name])
                self.assertEqual(snapshot(self.directory), before)

    def test_other_formats(self) -> None:
        """Only raw disks are read; for others the error shows the command that makes one."""
        self.file("disk.qcow2", b"QFI\xfb")
        for args in (["-d", "format=qcow2:a=disk.qcow2", "new.vma"],
                     ["new.vma", "format=vmdk:a=disk.qcow2"]):  # fmt: skip
            with self.subTest(args=args):
                line = self.refused("create", *args, says=["only raw"])
                command = "qemu-img convert -O raw disk.qcow2 disk.qcow2.raw"
                self.assertIn(command, line)
                self.assertFalse(self.output.exists())

    def test_what_is_refused(self) -> None:
        self.file("disk", b"x" * BLOCK)
        self.file("empty", b"")
        self.file("large.conf", bytes(65536))
        (self.directory / "dir").mkdir()
        os.mkfifo("fifo")
        before = snapshot(self.directory)
        for says, args in (
            ("is not NAME=PATH", ["disk"]),
            ("is not NAME=PATH", ["=disk"]),
            ("is not NAME=PATH", ["a="]),
            ("is not NAME=PATH", ["format=raw:disk"]),
            ("second one", ["a=disk", "a=disk"]),
            ("No such file or directory", ["a=nothing"]),
            ("No such file or directory", ["-c", "nothing"]),
            ("dir: ", ["a=dir"]),
            ("neither a file nor a block device", ["a=fifo"]),
            ("neither a file nor a block device", ["a=/dev/null"]),
            ("empty file", ["a=empty"]),
            ("not a file", ["-c", "fifo"]),
            ("dir: ", ["-c", "dir"]),
            ("65535", ["-c", "large.conf"]),
            ("occurs twice", ["-c", "empty", "-c", "./empty"]),
            ("device name", ["../a=disk"]),
            ("device name", ["a/b=disk"]),
            ("device name", ["..=disk"]),
            ("device name", ["a\nb=disk"]),
            ("device name", ["a" * 256 + "=disk"]),
            ("254", [f"drive-scsi{i}=disk" for i in range(255)]),
            ("256", [f"-c{i}.conf" for i in range(257)]),
        ):
            with self.subTest(args=args[:3]):
                if "256" in says:
                    for i in range(257):
                        self.file(f"{i}.conf", b"")
                    before = snapshot(self.directory)
                options = [arg for arg in args if arg.startswith("-c") or args[0] == "-c"]
                disks = [arg for arg in args if arg not in options]
                self.refused("create", *options, "new.vma", *disks, says=[says])
                self.assertEqual(snapshot(self.directory), before)


class Config(ToolTest):
    """One config to standard output, byte for byte."""

    def test_golden_archives(self) -> None:
        """Each config of each archive: from files, streams and compressed files."""
        for name, want in manifest().items():
            path = self.file("a.vma", golden(name))
            packed = self.file("a.vma.gz", gzip.compress(golden(name), 1))
            for config, digest in want["configs"].items():
                with self.subTest(archive=name, config=config):
                    for archive in (path, packed):
                        answer = call_tool("config", "-c", config, archive)
                        self.assertEqual(answer.stderr, b"")
                        self.assertEqual(sha256(answer.stdout), digest)
                    answer = call_tool("config", "-c", config, "-", input=golden(name))
                    self.assertEqual((answer.stderr, sha256(answer.stdout)), (b"", digest))
            if "qemu-server.conf" in want["configs"]:
                answer = call_tool("config", path)
                self.assertEqual(sha256(answer.stdout), want["configs"]["qemu-server.conf"])

    def test_any_bytes(self) -> None:
        """No byte is translated, none added; an empty config is nothing at all."""
        everything = bytes(range(256)) * 200 + b"\r\n\r\n"
        configs: list[archives.Config] = [
            ("qemu-server.conf", everything), ("empty", b""), ("full", b"x" * 65535),
        ]  # fmt: skip
        path = self.file("a.vma", archives.canonical(Archive([], configs)))
        for name, data in configs:
            assert isinstance(name, str)
            for answer in (
                call_tool("config", "-c", name, path),
                run_tool("config", path, "-c", name),
            ):
                self.assertEqual((answer.returncode, answer.stderr, answer.stdout), (0, b"", data))

    def test_the_rest_is_not_read(self) -> None:
        """A pipe that stays open behind the header does not keep anybody waiting."""
        data = golden("three-disks")
        (header_size,) = (int.from_bytes(data[56:60], "big"),)
        for sent in (data[:header_size], data[: header_size + 100]):
            for command in (["config", "-"], ["config", "/dev/stdin"]):
                with self.subTest(sent=len(sent), command=command):
                    reading, writing = os.pipe()
                    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb") as other:
                        other.write(sent)
                        other.flush()
                        answer = run_tool(*command, stdin=pipe, timeout=30)
                    want = archives.parse(data).configs["qemu-server.conf"]
                    self.assertEqual(
                        (answer.returncode, answer.stderr, answer.stdout), (0, b"", want)
                    )

    def test_damage_behind_the_header(self) -> None:
        """What is asked for is in the header, so a config can be saved from half an archive."""
        data = golden("three-disks")[:20000]
        want = archives.parse(golden("three-disks")).configs["qemu-server.conf"]
        answer = call_tool("config", self.file("a.vma", data))
        self.assertEqual((answer.stderr, answer.stdout), (b"", want))

    def test_not_there(self) -> None:
        """The error names those that are; their names cannot act on a terminal."""
        path = self.file("a.vma", good())
        line = self.refused("config", "-c", "nope.conf", path, says=["no config 'nope.conf'"])
        self.assertIn("'qemu-server.conf', 'qemu-server.fw'", line)
        evil = Archive([], [("a\x1b[31m\u202e", b"")])
        path = self.file("evil.vma", archives.canonical(evil))
        self.refused("config", path, says=[r"'a\x1b[31m\u202e'"])
        path = self.file("none.vma", archives.canonical(Archive([good_archive().devices[0]])))
        self.refused("config", path, says=["there are none"])
        self.refused("config", self.file("text", b"hello"), says=["not a VMA archive"])


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
                        self.ok("extract", "-d", device["name"], "-o", self.output, archive)
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
                self.ok("extract", "-d", name, "-o", self.output, archive, input=stream)
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

    def test_existing_file(self) -> None:
        """It is replaced as cp would, when the new one is complete; its mode and links stay."""
        path = self.file("a.vma", good())
        self.file("disk.raw", b"old").chmod(0o600)
        (self.directory / "link").symlink_to("disk.raw")
        self.ok("extract", "-d", "drive-scsi0", "-o", self.directory / "link", path)
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
        says = ["1048576 bytes, device 'drive-scsi0' needs 1572864"]
        self.refused("extract", "-d", "drive-scsi0", "-o", small, path, says=says)
        self.assertEqual(small.read_bytes(), b"\xff" * MIB)

    def test_fifo(self) -> None:
        """A FIFO gets the disk as standard output would."""
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        found = []
        reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
        reader.start()
        self.ok("extract", "-d", "drive-scsi0", "-o", fifo, self.file("a.vma", good()))
        reader.join(10)
        self.assertEqual(sha256(found[0]), sha256(good_archive().devices[1].data))

    def test_what_is_refused(self) -> None:
        """Nothing appears, and what was there stays."""
        path = self.file("a.vma", good())
        self.file("disk.raw", b"old")
        before = snapshot(self.directory)
        for names, says in (
            ("nope", "no device 'nope', there are 'drive-efidisk0', 'drive-scsi0', 'vmstate'"),
            ("drive-scsi0,drive-efidisk0", "-o writes one disk"),
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
        for damage in damages():
            with self.subTest(damage=damage.name):
                path = self.file("a.vma", damage.data)
                self.refused("extract", "-d", "drive-scsi0", "-o", self.output, path)
                self.refused("extract", "-d", "drive-scsi0", "-o", self.output, "-",
                             input=damage.data)  # fmt: skip
                self.assertEqual(os.listdir(self.directory), ["a.vma"])


class ExtractMap(ToolTest):
    """extract -r MAPFILE: into files and devices that exist."""

    def setUp(self) -> None:
        super().setUp()
        self.archive = archives.three_disks(random.Random(21))
        order = archives.live_order(self.archive, random.Random(22))
        self.data = archives.build(self.archive, order)
        self.path = self.file("a.vma", self.data)
        self.target = self.directory / "configs"

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

    def extract(self, *lines: str, stream: bool = False) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        archive, data = ("-", self.data) if stream else (self.path, None)
        self.ok("extract", "-r", self.map(*lines), archive, self.target, input=data)
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
        """What Proxmox writes in front of a line is understood; a raw file does not mind."""
        paths = self.targets()
        efi, disk, tpm = self.lines()
        self.extract(
            f"format=raw:{efi}",
            f"format=raw:throttling.bps=1048576:throttling.group=restore:cache=writeback:{disk}",
            f"throttling.bps=0:{tpm}",
            "done",
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
                says = [f"target2: {size} bytes", "'drive-scsi0' needs", str(len(disk))]
                self.refused("extract", "-r", self.map(*lines), self.path, self.target, says=says)
                self.assertEqual(path.read_bytes(), b"\xff" * size)
        path.unlink()
        shutil.rmtree(self.target, ignore_errors=True)
        self.refused(
            "extract", "-r", self.map(*lines), self.path, self.target, says=["target2: No such"]
        )
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
                self.refused("extract", "-r", self.map(*lines), self.path, self.target, says=[says])
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
            self.refused("extract", "-r", self.map(*lines), data, self.target, says=[other])
            self.assertEqual(path.read_bytes(), b"\xff" * (2 * MIB))

    def test_the_archive_is_no_target(self) -> None:
        """Not even where its size would do."""
        data = archives.canonical(Archive([Device(1, "a", b"a" * MIB)]))
        path = self.file("self.vma", data)
        os.link(path, self.directory / "hard")
        for name in ("self.vma", "hard"):
            shutil.rmtree(self.target, ignore_errors=True)
            map_file = self.map(f"1:a={self.directory}/{name}")
            self.refused("extract", "-r", map_file, path, self.target, says=[name])
            self.assertEqual(sha256(path), sha256(data))

    def test_names_the_map_file(self) -> None:
        """A map that is not there, and a directory that is not empty."""
        self.refused(
            "extract",
            "-r",
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
        for damage in damages():
            with self.subTest(damage=damage.name):
                for device in good_archive().devices[:2]:
                    self.file(f"target{device.dev_id}", bytes(len(device.data)))
                shutil.rmtree(self.target, ignore_errors=True)
                path = self.file("a.vma", damage.data)
                line = self.refused("extract", "-r", self.map(*lines), path, self.target)
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


def open_to_write(fifo: Path) -> int:
    """Open a FIFO that somebody is about to open to read."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    raise AssertionError(f"nobody reads {fifo}")


class Driver(ToolTest):
    """extract -v -r FIFO as Proxmox's restore drives it: it answers to what it reads."""

    def drive(self, archive: str | Path, stdin: IO[bytes] | None = None) -> list[str]:
        """Restore with a FIFO that is opened only when the configs and devices are known.

        Return all lines of standard output.
        """
        fifo, target = self.directory / "fifo", self.directory / "configs"
        os.mkfifo(fifo)
        lines = []
        devices: dict[str, int] = {}
        with subprocess.Popen(
            tool_command("extract", "-v", "-r", fifo, archive, target),
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

    def test_nobody_opens_the_fifo(self) -> None:
        """A signal ends the waiting; no process and no target is left."""
        os.mkfifo(self.directory / "fifo")
        path, target = self.file("a.vma", good()), self.directory / "configs"
        child = subprocess.Popen(
            tool_command("extract", "-v", "-r", self.directory / "fifo", path, target),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=unmeasured(),
        )  # fmt: skip
        self.addCleanup(child.kill)
        assert child.stdout is not None
        while not child.stdout.readline().startswith(("CTIME", "DEV: dev_id=3")):
            pass
        time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=20)
        self.assertEqual(child.returncode, 143)
        self.assertNotIn("Traceback", errors)
        self.assertFalse((target / "vmstate.bin").exists())


class Verbose(ToolTest):
    """-v prints what Proxmox's own program prints: progress, and the zeros at the end."""

    def test_summary(self) -> None:
        """Of verify, extract and unpack: all bytes of the disks, and those that are not stored."""
        for name in ("three-disks", "live-order", "odd-size", "interleaved"):
            parsed = archives.parse(golden(name))
            total = sum(len(device.data) for device in parsed.archive.devices)
            zero = 0
            for device in parsed.archive.devices:
                masks = [parsed.masks[device.dev_id, n] for n in range(device.cluster_count)]
                zero += len(device.data) - sum(bin(m).count("1") for m in masks) * BLOCK
            want = f"total bytes {total}, zero bytes {zero} ({zero * 100 / total:.3g}%)"
            path = self.file("a.vma", golden(name))
            lines: list[list[str | Path]] = [
                ["verify", "-v", path],
                ["extract", "-v", path, self.directory / f"{name}.extracted"],
                ["unpack", "-v", path, self.directory / f"{name}.unpacked"],
            ]
            for args in lines:
                with self.subTest(archive=name, command=args[0]):
                    answer = call_tool(*args)
                    self.assertEqual(answer.returncode, 0)
                    self.assertEqual(answer.stdout.decode().splitlines()[-1], want)

    def test_progress(self) -> None:
        """A line for each percent that is reached, ascending, the last one all of it."""
        for args in (
            ["verify", "-v"], ["verify", "-v", "--digest"], ["unpack", "-v"], ["extract", "-v"],
            ["optimize", "-v"],
            ["extract", "-v", "-d", manifest()["interleaved"]["devices"][0]["name"]],
        ):  # fmt: skip
            with self.subTest(args=args):
                path = self.file("a.vma", golden("interleaved"))
                writes = args[0] in ("unpack", "extract")
                target = [self.directory / str(len(args))] if writes else []
                shutil.rmtree(self.directory / "2", ignore_errors=True)
                lines = call_tool(*args, path, *target).stderr.decode().splitlines()
                form = re.compile(
                    r"progress ([0-9]+)% \(read ([0-9]+) bytes, duration [0-9]+ sec\)"
                )
                found = [form.fullmatch(line) for line in lines]
                percents = [int(match[1]) for match in found if match]
                self.assertEqual(len(percents), len(lines))
                self.assertEqual(percents, sorted(set(percents)))
                self.assertEqual(percents[-1], 100)

    def test_not_without(self) -> None:
        """Without -v there is neither; -q leaves out the line of verify and optimize too."""
        path = self.file("a.vma", golden("three-disks"))
        self.assertNotIn("bytes", self.ok("verify", path))
        self.assertEqual(self.ok("verify", "-q", path), "")
        self.assertEqual(self.ok("extract", path, self.directory / "out"), "")
        self.assertEqual(self.ok("optimize", "-q", path, self.directory / "o.vma"), "")

    def test_options_before_the_command(self) -> None:
        """-q and -v mean the same in front of the command as behind it."""
        path = self.file("a.vma", golden("three-disks"))
        self.assertEqual(self.ok("-q", "verify", path), "")
        self.assertEqual(self.ok("--quiet", "optimize", path, self.directory / "o.vma"), "")
        answer = call_tool("-v", "verify", path)
        self.assertIn(b"total bytes", answer.stdout)
        self.assertIn(b"progress 100%", answer.stderr)


class Completion(ToolTest):
    """Shell completion, in the shells themselves."""

    def script(self, shell: str) -> Path:
        return self.file(f"_{shell}", self.ok("completion", shell).encode())

    def bash(self, *words: str) -> list[str]:
        """Return what bash would offer for the last word."""
        script = """
            source "$1"; shift
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            complete -p vma-tool >/dev/null
            _vma_tool
            printf '%s\\n' "${COMPREPLY[@]}"
        """
        answer = subprocess.run(
            [require_program("bash", "bash"), "--norc", "-uc", script, "bash",
             self.script("bash"), "vma-tool", *words],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        self.assertEqual((answer.returncode, answer.stderr), (0, ""))
        return answer.stdout.split()

    def test_bash(self) -> None:
        """Commands, a command's options, and the values of an option; else files."""
        aligns = list(archives.ALIGNS)
        for words, want in (
            ([""], list(COMMANDS)),
            (["op"], ["optimize"]),
            (["ver"], ["verify"]),
            (["nothing"], []),
            (["optimize", "--al"], ["--align"]),
            (["optimize", "--align", ""], aligns),
            (["optimize", "--align", "1"], ["128K", "1M"]),
            (["create", "--align", "6"], ["64K"]),
            (["optimize", ""], []),
            (["optimize", "arch"], []),
            (["list", "--p"], ["--partitions"]),
            (["list", "archive.vma", "--j"], ["--json"]),
            (["verify", "--a"], ["--against"]),
        ):
            with self.subTest(words=words):
                self.assertEqual(sorted(self.bash(*words)), sorted(want))
        for command in COMMANDS:
            self.assertIn("--help", self.bash(command, "--"))

    def test_bash_is_made_from_the_parser(self) -> None:
        """Every option that --help shows is offered."""
        for command in COMMANDS:
            with self.subTest(command=command):
                shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options_of(command)))
                self.assertEqual(set(self.bash(command, "-")), shown)

    def test_bash_falls_back_to_files(self) -> None:
        answer = subprocess.run(
            ["bash", "--norc", "-c", 'source "$1"; complete -p vma-tool', "bash",
             self.script("bash")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.assertIn("-o default", answer.stdout)

    def test_zsh_loads(self) -> None:
        """It is sound, and compinit knows it: by `source`, and as _vma-tool in $fpath."""
        zsh = require_program("zsh", "zsh")
        path = self.script("zsh")
        subprocess.run([zsh, "-n", path], check=True)
        self.assertTrue(path.read_text().startswith("#compdef vma-tool"))
        path.rename(self.directory / "_vma-tool")
        for load in (
            "autoload -Uz compinit; compinit -u -D; source $1/_vma-tool",
            "fpath=($1 $fpath); autoload -Uz compinit; compinit -u -D",
        ):
            script = f"{load}; print -r -- $_comps[vma-tool]; whence -w $_comps[vma-tool]"
            answer = subprocess.run(
                [zsh, "-f", "-c", script, "zsh", self.directory],
                capture_output=True, text=True, check=False, timeout=30,
            )  # fmt: skip
            self.assertEqual((answer.returncode, answer.stderr), (0, ""))
            self.assertRegex(answer.stdout, r"^_vma[-_]tool\n_vma[-_]tool: function")

    def zsh(self, *keys: str) -> str:
        """Return what an interactive zsh shows when these keys are typed."""
        self.script("zsh").rename(self.directory / "_vma-tool")
        (self.directory / "archive.vma").touch()
        script = """
            zmodload zsh/zpty
            zpty -b shell TERM=dumb PS1= ZDOTDIR=$1 zsh -f -i
            expect() { local text=; while zpty -r -m shell text "*$1*"; do
                [[ $text == *$1* ]] && { print -r -- $text; return; }; sleep 0.05; done }
            zpty -w shell "cd $1; fpath=($1 \\$fpath); autoload -Uz compinit; compinit -u -D"
            zpty -w shell "zstyle ':completion:*' list-prompt ''; LISTMAX=1000; print re''ady"
            expect ready >/dev/null
            shift
            for keys; do zpty -w -n shell $keys; sleep 0.1; done
            zpty -w -n shell $'\\C-a: \\C-e \\n'
            zpty -w shell "print e''nd"
            expect end
            zpty -d shell
        """
        answer = subprocess.run(
            [require_program("zsh", "zsh"), "-f", "-c", script, "zsh", self.directory, *keys],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return answer.stdout

    def test_zsh_completes(self) -> None:
        """With the first key, in a shell that has just been started."""
        for keys, want in (
            ("vma-tool opt\t", "vma-tool optimize"),
            ("vma-tool optimize --mem\t", "--memory"),
            ("vma-tool list arch\t", "archive.vma"),
        ):
            with self.subTest(keys=keys):
                self.assertIn(want, self.zsh(keys))

    def test_wrong_shell(self) -> None:
        for args in ([], ["fish"]):
            answer = call_tool("completion", *args)
            self.assertEqual((answer.returncode, answer.stdout), (2, b""))


def options_of(command: str) -> str:
    """Return the part of a command's --help that lists its options."""
    text = call_tool(command, "--help").stdout.decode()
    return text.partition("\noptions:\n" if "\noptions:" in text else "\noptional arguments:\n")[
        2
    ].partition("\nexample")[0]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words behind each vma-tool in lines of a shell, without comments and files."""
    for line in text.splitlines():
        for part in re.split(r"\|\||&&|[|;]|  +", line):
            words = shlex.split(re.sub(r" >\S+", "", part), comments=True)
            if words and words[0] == "vma-tool":
                yield words[1:]


class Help(ToolTest):
    """--help, --version, and how wrong usage ends."""

    def help(self, *args: str) -> str:
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            return self.ok(*args, "--help")

    def test_fits_a_terminal(self) -> None:
        for args in ([], *([command] for command in COMMANDS)):
            with self.subTest(args=args):
                for line in self.help(*args).splitlines():
                    self.assertLessEqual(len(line), 80)

    def test_each_command_is_listed(self) -> None:
        text = self.help()
        for command in COMMANDS:
            self.assertRegex(text, rf"(?m)^ +{command} ")

    def test_each_option_is_explained(self) -> None:
        """Each option has a text; sizes name their unit, and a default is said."""
        for command in COMMANDS:
            with self.subTest(command=command):
                entries = re.split(r"\n  (?=-)", "\n" + options_of(command).rstrip())
                self.assertGreater(len(entries), 3)
                for entry in entries[1:]:
                    self.assertRegex(entry, r"(?s)^-\S.*?(  +|\n +)\S")
        for command in ("create", "pack", "optimize"):
            self.assertRegex(options_of(command), r"(?s)--align.*default 128K")
        self.assertRegex(options_of("optimize"), r"(?s)--memory.*default 256M")

    def test_examples_are_valid(self) -> None:
        """There is one for each command, and the parser takes it."""
        for args in ([], *([command] for command in COMMANDS)):
            with self.subTest(args=args):
                examples = list(command_lines(self.help(*args).partition("example")[2]))
                self.assertTrue(examples)
                for words in examples:
                    if args:
                        self.assertEqual(words[0], args[0])
                    with contextlib.redirect_stderr(None):
                        vma_tool.parse_args(words)

    def test_version(self) -> None:
        for args in (["--version"], *([command, "--version"] for command in COMMANDS)):
            self.assertEqual(self.ok(*args), f"vma-tool {vma_tool.__version__}\n")

    def test_wrong_usage(self) -> None:
        """Exit status 2 and the usage, on standard error."""
        for args in (
            [], ["nonsense"], ["list"], ["verify"], ["optimize"], ["config"], ["create"],
            ["pack", "dir"], ["unpack", "a.vma"], ["list", "--nonsense", "a.vma"],
            ["optimize", "--align", "2K", "a.vma"], ["optimize", "--memory", "much", "a.vma"],
            ["pack", "-u", "name", "dir", "a.vma"],
            ["verify", "--digest", "--against", "a", "b"], ["list", "a.vma", "b.vma"],
        ):  # fmt: skip
            with self.subTest(args=args):
                answer = call_tool(*args)
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
                self.assertIn(b"usage: vma-tool", answer.stderr)
                self.assertNotIn(b"Traceback", answer.stderr)

    def test_runs_as_it_is(self) -> None:
        """The file itself can be executed; with Python -I and -S too."""
        directory = temporary_directory(self)
        copy = directory / "vma-tool"
        shutil.copy(TOOL, copy)
        copy.chmod(0o755)
        for command in ([copy], [sys.executable, "-I", "-S", copy]):
            env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            answer = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=True, env=env
            )
            self.assertEqual(answer.stdout, f"vma-tool {vma_tool.__version__}\n")
        self.assertEqual(os.listdir(directory), ["vma-tool"])
