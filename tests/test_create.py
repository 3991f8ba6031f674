"""create: an archive from files that are named one by one."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from unittest import mock

from tests import archives
from tests.archives import BLOCK, MIB, Archive, Device
from tests.support import (
    ToolTest,
    call_tool,
    loop_device,
    sha256,
    snapshot,
)

NOW = 1763612345


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
        quiet = [] if notice else ["-q"]
        self.ok("create", *quiet, "--force", *args, notice=notice)
        return self.output.read_bytes()

    def test_same_bytes_as_optimize(self) -> None:
        """The canonical layout, with each --align, and on standard output."""
        configs, specs = self.write(guest())
        options = [part for config in configs for part in ("-c", config)]
        for align, size in archives.ALIGNS.items():
            with self.subTest(align=align):
                found = self.created("--align", align, *options, "new.vma", *specs)
                self.assertEqual(sha256(found), sha256(archives.canonical(guest(), size)))
        answer = call_tool("create", "-q", *options, "-", *specs)
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
            [*disks, *options, "--align=512k", "new.vma"],
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
                text = f"{size} bytes, rounded up to {rounded}, as disks have whole sectors"
                notice = f"vma-tool: odd: {text}\n"
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
