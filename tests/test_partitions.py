"""list --partitions: what the disks hold, on disks made by the programs that people use.

What the tables and superblocks say is compared with what sfdisk and blkid say of the same disks.
"""

from __future__ import annotations

import binascii
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from tests import archives
from tests.archives import BLOCK, CLUSTER, KIB, MIB, Archive, Device
from tests.support import FEW, ToolTest, loop_device, require_program, require_root

SECTOR = 512
Content = Union[bytes, Path]


def run(*command: str | Path, input: str | None = None) -> str:
    """Run a program of a system directory, which must succeed; return its standard output."""
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    answer = subprocess.run(
        command, input=input, env=env, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise AssertionError(f"{command}: {answer.returncode}: {answer.stderr}")
    return answer.stdout


def require(*programs: tuple[str, str]) -> None:
    """Skip unless these programs are there, also in the directories of the administrator."""
    for name, package in programs:
        if not shutil.which(name, path="/usr/sbin:/sbin"):
            require_program(name, package)


SFDISK, SGDISK = ("sfdisk", "fdisk"), ("sgdisk", "gdisk")
MKE2FS, XFS = ("mke2fs", "e2fsprogs"), ("mkfs.xfs", "xfsprogs")
BTRFS, VFAT = ("mkfs.btrfs", "btrfs-progs"), ("mkfs.vfat", "dosfstools")
MKSWAP, BLKID = ("mkswap", "util-linux"), ("blkid", "util-linux")

# name of the file system -> how it is made in a file, its size, its label
MADE = {
    "ext2": (MKE2FS, ["mke2fs", "-q", "-F", "-t", "ext2", "-L", "two"], 4 * MIB, "two"),
    "ext3": (MKE2FS, ["mke2fs", "-q", "-F", "-t", "ext3", "-L", "three"], 8 * MIB, "three"),
    "ext4": (MKE2FS, ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "sixteen bytes xx"], 8 * MIB,
             "sixteen bytes xx"),
    "xfs": (XFS, ["mkfs.xfs", "-q", "-L", "twelve bytes"], 320 * MIB, "twelve bytes"),
    "btrfs": (BTRFS, ["mkfs.btrfs", "-q", "-L", "b-tree"], 128 * MIB, "b-tree"),
    "FAT12": (VFAT, ["mkfs.vfat", "-F", "12", "-n", "TWELVE"], 2 * MIB, "TWELVE"),
    "FAT16": (VFAT, ["mkfs.vfat", "-F", "16", "-n", "SIXTEEN"], 16 * MIB, "SIXTEEN"),
    "FAT32": (VFAT, ["mkfs.vfat", "-F", "32", "-n", "EFI SYSTEM"], 40 * MIB, "EFI SYSTEM"),
    "swap": (MKSWAP, ["mkswap", "-q", "-L", "pages"], MIB, "pages"),
}  # fmt: skip
BLKID_NAMES = {"FAT12": "vfat", "FAT16": "vfat", "FAT32": "vfat"}
JOURNAL = {
    "ext3": "noload,", "ext4": "noload,", "xfs": "norecovery,", "btrfs": "rescue=nologreplay,",
}  # fmt: skip
MOUNTABLE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "FAT12", "FAT16", "FAT32", "NTFS", "exFAT"}

OPENED = {"LUKS", "LVM", "RAID"}  # what is in them comes to light with a command of theirs


def boot_sector(jump: bytes) -> bytes:
    return jump.ljust(510, b"\0") + b"\x55\xaa"


# What no program here makes; magic numbers as their documentation has them.
HAND_MADE = {
    "LUKS": b"LUKS\xba\xbe\0\2".ljust(16 * KIB, b"\0"),
    "LVM": bytes(512) + b"LABELONE" + struct.pack("<QII8s", 1, 0, 32, b"LVM2 001") + bytes(8192),
    "RAID": bytes(4096) + struct.pack("<II", 0xA92B4EFC, 1) + bytes(8192),
    "NTFS": boot_sector(b"\xeb\x52\x90NTFS    ") + bytes(8192),
    "exFAT": boot_sector(b"\xeb\x76\x90EXFAT   ") + bytes(8192),
}


class PartitionsTest(ToolTest):
    """Disks in files, archives of them, and what list --partitions says."""

    def disk(self, name: str, size: int) -> Path:
        """Make a file of so many bytes, all of it a hole."""
        path = self.file(name, b"")
        os.truncate(path, size)
        return path

    def made(self, name: str) -> Path:
        """Make a file system with the program that does."""
        package, command, size, _ = MADE[name]
        require(package)
        path = self.disk(f"{name}.img", size)
        run(*command, path)
        return path

    def listing(self, disk: Content, name: str = "drive-scsi0") -> dict[str, Any]:
        """Return what --json says of an archive's only disk; text and JSON must agree."""
        path = self.directory / "a.vma"
        write_archive(path, {name: disk})
        return self.listed(path)

    def listed(self, archive: Path) -> dict[str, Any]:
        (device,) = self.devices(archive)
        check(self, device, self.ok("list", "--partitions", archive))
        return device

    def devices(self, archive: Path) -> list[dict[str, Any]]:
        text = self.ok("list", "--partitions", "--json", archive)
        return list(json.loads(text)["devices"])


def put(path: Path, offset: int, content: Content) -> None:
    """Write content into a file at an offset, but not its zeros."""
    with open(path, "r+b") as file:
        for start, data in pieces(content):
            if data.count(0) != len(data):
                file.seek(offset + start)
                file.write(data)


def pieces(content: Content) -> Iterator[tuple[int, bytes]]:
    """Yield a content in clusters, with their offsets."""
    if isinstance(content, bytes):
        for start in range(0, len(content), CLUSTER):
            yield start, content[start : start + CLUSTER]
        return
    with open(content, "rb") as file:
        start = 0
        while data := file.read(CLUSTER):
            yield start, data
            start += len(data)


def write_archive(path: Path, disks: Mapping[str, Content], seed: int = 1) -> None:
    """Write an archive of disks with their clusters in random order."""
    devices, clusters = [], []
    for dev_id, (name, content) in enumerate(disks.items(), 1):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        devices.append(Device(dev_id, name, b"", size))
        for start, data in pieces(content):
            mask, blocks = 0, []
            if data.count(0) != len(data):
                for bit in range(-(-len(data) // BLOCK)):
                    block = data[bit * BLOCK : (bit + 1) * BLOCK]
                    if block.count(0) != len(block):
                        mask |= 1 << bit
                        blocks.append(block.ljust(BLOCK, b"\0"))
            clusters.append((mask, dev_id, start // CLUSTER, blocks))
    random.Random(seed).shuffle(clusters)
    archive = Archive(devices, [("qemu-server.conf", b"cores: 1\n")])
    with open(path, "wb") as file:
        file.write(archives.header_bytes(archive))
        for at in range(0, len(clusters), 58):
            group = clusters[at : at + 58]
            payload = [block for cluster in group for block in cluster[3]]
            file.write(archives.extent_bytes(archive.uuid, [c[:3] for c in group], payload))


def check_inside(test: ToolTest, device: dict[str, Any]) -> None:
    """Check that no partition is outside its disk."""
    for part in device["partitions"]:
        test.assertGreaterEqual(part["start"], 0)
        test.assertGreaterEqual(part["size"], 0)
        test.assertLessEqual(part["start"] + part["size"], device["size"])


def check(test: ToolTest, device: dict[str, Any], text: str) -> None:
    """Check what must hold for any disk, and that the text says the same."""
    check_inside(test, device)
    for part in device["partitions"]:
        for way in ("extracted", "mounted"):
            test.assertEqual(bool(part[way]), part["file_system"] in MOUNTABLE | OPENED)
            if part[way]:
                test.assertRegex(text, f" {way}: +{re.escape(part[way])}\n")
        if part["mount"]:
            test.assertEqual(part["mount"], part["extracted"])
            want = f"ro,{JOURNAL.get(part['file_system'], '')}loop"
            test.assertEqual(shlex.split(part["mounted"])[:3], ["mount", "-o", want])
            want += f",offset={part['start']},sizelimit={part['size']}"
            test.assertEqual(shlex.split(part["mount"])[:3], ["mount", "-o", want])
        test.assertEqual(bool(part["mount"]), part["file_system"] in MOUNTABLE)
        test.assertIn(f"{part['start']} + ", text)
    for fault in device["faults"]:
        test.assertIn(fault, text)
    test.assertEqual("damaged" in text, bool(device["faults"]))
    if not device["partitions"] and not device["faults"]:
        test.assertIn("no partition table, and no file system", text)
    test.assertTrue(text.replace("\n", "").isprintable())  # nothing that acts on a terminal


class FileSystems(PartitionsTest):
    """A file system on the whole disk, without a table."""

    def test_real_ones(self) -> None:
        """Type and label are those that blkid finds."""
        require(BLKID)
        for name, (_, _, size, label) in MADE.items():
            with self.subTest(file_system=name):
                image = self.made(name)
                found = self.listing(image)
                self.assertEqual((found["table"], found["faults"]), ("none", []))
                (part,) = found["partitions"]
                self.assertEqual((part["number"], part["start"], part["size"]), (0, 0, size))
                self.assertEqual((part["file_system"], part["label"]), (name, label))
                known = dict(
                    line.split("=", 1)
                    for line in run("blkid", "-p", "-o", "export", image).splitlines()
                )
                self.assertEqual(known["TYPE"], BLKID_NAMES.get(name, name))
                self.assertEqual(known["LABEL"].replace("\\", ""), label)

    def test_others(self) -> None:
        for name, start in HAND_MADE.items():
            with self.subTest(file_system=name):
                found = self.listing(start.ljust(MIB, b"\0"))
                (part,) = found["partitions"]
                self.assertEqual((found["table"], part["file_system"]), ("none", name))

    def test_what_is_no_file_system(self) -> None:
        """The commands that go on open the disk read-only, and name the partition's device."""
        for name, words in (
            ("LVM", ["vgchange -ay"]),
            ("RAID", ["mdadm -A -o"]),
            ("LUKS", ["cryptsetup open --readonly"]),
        ):
            disk = bytearray(MIB) + HAND_MADE[name].ljust(16 * KIB, b"\0")
            disk[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 2048, len(disk) // 512 - 2048)
            disk[510:512] = b"\x55\xaa"
            (part,) = self.listing(bytes(disk))["partitions"]
            for way, file in (
                ("extracted", "disk-drive-scsi0.raw"),
                ("mounted", "/mnt/backup/disk-drive-scsi0.raw"),
            ):
                self.assertIn(f"losetup -r -P -f --show {file}", part[way])
                for word in [*words, *([')p1"'] if name != "LVM" else [])]:
                    self.assertIn(word, part[way])

    def test_without_a_label(self) -> None:
        """FAT's NO NAME is none."""
        require(VFAT, MKE2FS)
        for command in (["mkfs.vfat", "-F", "16"], ["mke2fs", "-q", "-F"]):
            image = self.disk("image", 16 * MIB)
            run(*command, image)
            (part,) = self.listing(image)["partitions"]
            self.assertEqual(part["label"], "")

    def test_labels_that_are_not_text(self) -> None:
        """They are shown, but cannot act on a terminal."""
        image = bytearray(self.made("ext4").read_bytes())
        for label in (b"\x1b[31mred\x07", b"\xff\xfe\x80", "a\u202eb".encode(), b"\n\r\t", b"\\x"):
            with self.subTest(label=label):
                image[1144:1160] = label.ljust(16, b"\0")
                (part,) = self.listing(bytes(image))["partitions"]
                self.assertEqual(part["file_system"], "ext4")

    def test_empty_disks(self) -> None:
        """Zeros, or data that is nothing known; any size."""
        noise = b"\1" + random.Random(3).randbytes(2 * CLUSTER)
        for size in (512, 1024, 1536, 3584, 4096, 4608, 5120, CLUSTER, MIB):
            for content in (bytes(size), noise[:size].ljust(size, b"\0")):
                with self.subTest(size=size, zeros=not any(content)):
                    found = self.listing(content)
                    self.assertEqual(
                        (found["table"], found["partitions"], found["faults"]), ("none", [], [])
                    )

    def test_several_disks(self) -> None:
        """Each gets its own; a vmstate is no disk."""
        require(MKE2FS)
        path = self.directory / "a.vma"
        ext4 = self.made("ext4")
        disks: dict[str, Content] = {
            "drive-scsi0": ext4,
            "vmstate": bytes(CLUSTER),
            "drive-scsi1": bytes(MIB),
        }
        write_archive(path, disks)  # the vmstate has one cluster: they would have to ascend
        devices = self.devices(path)
        self.assertEqual(
            [(d["name"], len(d.get("partitions", "-"))) for d in devices],
            [("drive-scsi0", 1), ("vmstate", 1), ("drive-scsi1", 0)],
        )
        self.assertNotIn("table", devices[1])

    def test_streams_are_refused(self) -> None:
        """A pipe or a compressed file cannot be read at any place."""
        path = self.directory / "a.vma"
        write_archive(path, {"drive-scsi0": bytes(MIB)})
        self.refused(
            "list",
            "--partitions",
            "-",
            input=path.read_bytes(),
            says=["vma-tool optimize - FILE.vma.zst"],
        )
        run(require_program("zstd", "zstd"), "-q", path)
        self.refused(
            "list", "--partitions", f"{path}.zst", says=[f"vma-tool optimize {path}.zst {path}"]
        )

    def test_names_in_the_command(self) -> None:
        """A device's name comes from the archive, the command goes into a root shell."""
        image = self.made("ext2")
        for name in (
            "drive a",
            "a'b",
            "$(reboot)",
            "x;reboot",
            "`id`",
            "-o",
            "a&b|c>d",
            'q"q',
            "~",
        ):
            with self.subTest(name=name):
                (part,) = self.listing(image, name)["partitions"]
                self.assertEqual(shlex.split(part["mount"])[3:], [f"disk-{name}.raw", "/mnt"])
                words = run("bash", "-c", f"printf '%s\\0' {part['mount']}").split("\0")
                self.assertEqual(words[3:5], [f"disk-{name}.raw", "/mnt"])


class Tables(PartitionsTest):
    """Partition tables as sfdisk and sgdisk write them."""

    def compare(self, disk: Path, found: Mapping[str, Any], table: Any) -> None:
        """Compare with what sfdisk --json says."""
        sector = table.get("sectorsize", SECTOR)
        want = []
        for entry in table["partitions"]:
            number = int(re.findall("[0-9]+$", entry["node"])[0])
            want.append((number, entry["start"] * sector, entry["size"] * sector))
        parts = [(part["number"], part["start"], part["size"]) for part in found["partitions"]]
        self.assertEqual(parts, want)
        self.assertEqual(found["faults"], [])
        self.assertEqual(found["table"], {"gpt": "GPT", "dos": "MBR"}[table["label"]])

    def sfdisk(self, disk: Path, script: str) -> Any:
        """Write a table; return sfdisk's own view of it."""
        run("sfdisk", "-q", "--wipe", "never", disk, input=script)
        return json.loads(run("sfdisk", "--json", disk))["partitiontable"]

    def test_gpt(self) -> None:
        """Types, names, and a file system of each kind in its partition."""
        require(SFDISK)
        names = [*MADE, *HAND_MADE]
        sizes = {name: MADE[name][2] if name in MADE else MIB for name in names}
        script = ["label: gpt"]
        start = MIB
        contents: dict[int, Content] = {}
        for name in names:
            script.append(f'start={start // SECTOR}, size={sizes[name] // SECTOR}, name="p-{name}"')
            contents[start] = self.made(name) if name in MADE else HAND_MADE[name]
            start += sizes[name]
        disk = self.disk("gpt", start + MIB)
        table = self.sfdisk(disk, "\n".join(script) + "\n")
        for offset, content in contents.items():
            put(disk, offset, content)
        found = self.listing(disk)
        self.compare(disk, found, table)
        for name, part in zip(names, found["partitions"]):
            with self.subTest(file_system=name):
                own = MADE[name][3] if name in MADE else ""
                self.assertEqual(part["type"], "Linux")
                self.assertEqual(part["file_system"], name)
                self.assertEqual(part["label"], f"p-{name} / {own}" if own else f"p-{name}")

    def test_gpt_types(self) -> None:
        """Known types are named, others shown as they are."""
        require(SGDISK, SFDISK)
        disk = self.disk("types", 64 * MIB)
        codes = {
            "ef00": "EFI system", "ef02": "BIOS boot", "8300": "Linux", "8200": "Linux swap",
            "8e00": "Linux LVM", "fd00": "Linux RAID", "0700": "Microsoft basic data",
            "0c01": "Microsoft reserved", "2700": "Windows recovery", "8302": "Linux home",
            "bf01": "ZFS", "a503": "516e7cb6-6ecf-11d6-8ff8-00022d09712b",
        }  # fmt: skip
        words = []
        for number, code in enumerate(codes, 1):
            words += ["-n", f"{number}:0:+2M", "-t", f"{number}:{code}"]
        run("sgdisk", *words, disk)
        found = self.listing(disk)
        self.compare(disk, found, json.loads(run("sfdisk", "--json", disk))["partitiontable"])
        self.assertEqual([part["type"] for part in found["partitions"]], list(codes.values()))

    def test_gpt_gaps_and_names(self) -> None:
        """Numbers are the entries', not counted; names up to 36 characters of UTF-16."""
        require(SGDISK, SFDISK)
        disk = self.disk("gaps", 16 * MIB)
        name = "Ünïcödé, 36 characters 0123456789abc"
        run("sgdisk", "-n", "3:2048:+1M", "-c", f"3:{name}", "-n", "128:8192:+1M", disk)
        found = self.listing(disk)
        self.compare(disk, found, json.loads(run("sfdisk", "--json", disk))["partitiontable"])
        self.assertEqual([part["number"] for part in found["partitions"]], [3, 128])
        self.assertEqual(found["partitions"][0]["label"], name)

    def test_gpt_with_large_sectors(self) -> None:
        """A disk with sectors of 4096 bytes has its table at other places."""
        require_root()
        require(SGDISK, SFDISK)
        disk = self.disk("4kn", 64 * MIB)
        device = loop_device(self, disk, "--sector-size", "4096")
        run("sgdisk", "-n", "1:256:+8M", "-c", "1:first", "-n", "2:0:0", "-t", "2:8200", device)
        table = json.loads(run("sfdisk", "--json", device))["partitiontable"]
        run("sync", disk)
        self.assertEqual(table["sectorsize"], 4096)
        put(disk, MIB, self.made("ext2"))
        found = self.listing(disk)
        self.compare(disk, found, table)
        first, second = found["partitions"]
        self.assertEqual((first["file_system"], first["label"]), ("ext2", "first / two"))
        self.assertEqual(second["type"], "Linux swap")

    def test_mbr(self) -> None:
        """Primary and logical partitions, with their types and file systems."""
        require(SFDISK)
        disk = self.disk("mbr", 128 * MIB)
        table = self.sfdisk(
            disk,
            "label: dos\n"
            "start=2048, size=8M, type=83, bootable\n"
            "size=16M, type=e\n"
            "size=80M, type=5\n"
            "type=7\n"
            "size=8M, type=83\n"
            "size=1M, type=82\n"
            "size=40M, type=c\n"
            "size=4M, type=8e\n",
        )
        starts = [entry["start"] * SECTOR for entry in table["partitions"]]
        contents: dict[int, Content] = {
            0: self.made("ext4"), 1: self.made("FAT16"), 3: HAND_MADE["NTFS"],
            4: self.made("ext3"), 5: self.made("swap"), 6: self.made("FAT32"), 7: HAND_MADE["LVM"],
        }  # fmt: skip
        for number, content in contents.items():
            put(disk, starts[number], content)
        found = self.listing(disk)
        found["partitions"].sort(key=lambda part: part["number"])
        self.compare(disk, found, table)
        self.assertEqual(
            [(part["type"], part["file_system"], part["label"]) for part in found["partitions"]],
            [
                ("Linux", "ext4", "sixteen bytes xx"),
                ("FAT16", "FAT16", "SIXTEEN"),
                ("extended", "", ""),
                ("NTFS or exFAT", "NTFS", ""),
                ("Linux", "ext3", "three"),
                ("Linux swap", "swap", "pages"),
                ("FAT32", "FAT32", "EFI SYSTEM"),
                ("Linux LVM", "LVM", ""),
            ],
        )

    def test_mbr_with_an_unknown_type(self) -> None:
        require(SFDISK)
        disk = self.disk("mbr", 8 * MIB)
        table = self.sfdisk(disk, "label: dos\nsize=1M, type=da\nsize=1M, type=ef\n")
        found = self.listing(disk)
        self.compare(disk, found, table)
        self.assertEqual([p["type"] for p in found["partitions"]], ["type 0xda", "EFI system"])

    def test_tables_without_partitions(self) -> None:
        """An empty table is no damage."""
        require(SFDISK)
        for label in ("dos", "gpt"):
            disk = self.disk("empty", 8 * MIB)
            self.sfdisk(disk, f"label: {label}\n")
            found = self.listing(disk)
            self.assertEqual((found["partitions"], found["faults"]), ([], []))

    def mounted(self, words: Sequence[str | Path], where: Path, file: str) -> str:
        """Mount with a command, in a directory; return a file's text."""
        point = self.directory / "mnt"
        point.mkdir(exist_ok=True)
        subprocess.run([*words, point], cwd=where, check=True, capture_output=True)
        try:
            return (point / file).read_text()
        finally:
            run("umount", point)

    def commands(self, images: Sequence[Path]) -> list[str]:
        """Put file systems on a disk, that into an archive, and extract it.

        Return the commands that list --partitions prints, without the directory at their end.
        """
        sizes = [image.stat().st_size for image in images]
        disk = self.disk("disk", sum(sizes) + 2 * MIB)
        lines = [f"size={size // SECTOR}\n" for size in sizes]
        table = self.sfdisk(disk, "label: gpt\n" + "".join(lines))
        for image, entry in zip(images, table["partitions"]):
            put(disk, entry["start"] * SECTOR, image)
        path = self.directory / "a.vma"
        write_archive(path, {"drive-scsi0": disk})
        self.ok("extract", path, self.directory / "out")
        text = self.ok("list", "--partitions", path)
        return re.findall(r"^ +extracted: (mount .*) /mnt$", text, re.MULTILINE)

    def test_mounts(self) -> None:
        """The printed command opens the file system of an extracted disk."""
        require_root()
        require(SFDISK, MKE2FS, XFS)
        root = self.directory / "root"
        root.mkdir()
        (root / "hostname").write_text("guest\n")
        ext4, xfs = self.disk("ext4.img", 16 * MIB), self.disk("xfs.img", 320 * MIB)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", root, ext4)
        text = f"/\n0 0\nd--755 0 0\nhostname ---644 0 0 {root}/hostname\n$\n"
        prototype = self.file("prototype", text.encode())
        run("mkfs.xfs", "-q", "-p", prototype, xfs)
        commands = self.commands([ext4, xfs])
        self.assertEqual(len(commands), 2)
        for command in commands:
            with self.subTest(command=command):
                words = shlex.split(command)
                found = self.mounted(words, self.directory / "out", "hostname")
                self.assertEqual(found, "guest\n")

    def test_mounts_of_a_running_guest(self) -> None:
        """What was mounted during the backup has a journal to replay, as README says: read-write.

        The loop device would be read-only as well.
        """
        require_root()
        require(SFDISK, MKE2FS, XFS)
        images = []
        point = self.directory / "live"
        point.mkdir()
        for name, make in (("ext4", ["mke2fs", "-q", "-F", "-t", "ext4"]), ("xfs", XFS[:1])):
            image = self.disk(f"{name}.img", MADE[name][2])
            run(*make, image)
            run("mount", "-o", "loop", image, point)
            try:
                (point / "hostname").write_text("guest\n")
                run("sync", "-f", point)
                images.append(self.directory / f"{name}.live")
                run("cp", "--sparse=always", image, images[-1])
            finally:
                run("umount", point)
        commands = self.commands(images)
        self.assertEqual(len(commands), 2)
        for command in commands:
            with self.subTest(command=command):
                words = shlex.split(re.sub("ro,[a-z]+,loop", "loop", command))
                found = self.mounted(words, self.directory / "out", "hostname")
                self.assertEqual(found, "guest\n")


# ---- hand-made tables, for what no program writes ------------------------------------------------


class Entry(NamedTuple):
    """An entry of a GPT: first and last sector."""

    first: int
    last: int
    name: str = ""
    kind: str = "0fc63daf-8483-4772-8e79-3d69d8477de4"


def mbr_sector(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a boot record of up to four (type, first sector, sector count)."""
    table = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(size: int, entries: Sequence[Entry], sector: int = SECTOR, **fields: int) -> bytes:
    """Return a disk with a GPT; `fields` replace those of its header, the CRCs are right.

    `header_crc` and `entries_crc` are what the true CRCs are changed by.
    """
    count = fields.get("count", 128)
    table = bytearray(128 * (count if 0 < count <= 128 else 128))
    for number, entry in enumerate(entries):
        struct.pack_into(
            "<16s16sQQQ72s", table, 128 * number, uuid.UUID(entry.kind).bytes_le,
            bytes([number + 1] * 16), entry.first, entry.last, 0, entry.name.encode("utf-16-le"),
        )  # fmt: skip
    header = bytearray(
        struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, fields.get("header_size", 92), 0, 0, 1,
            size // sector - 1, 34, size // sector - 34, bytes(16), fields.get("lba", 2),
            count, fields.get("entry_size", 128),
            binascii.crc32(table) ^ fields.get("entries_crc", 0),
        )
    )  # fmt: skip
    covered = bytes(header).ljust(min(fields.get("header_size", 92), sector), b"\0")
    struct.pack_into("<I", header, 16, binascii.crc32(covered) ^ fields.get("header_crc", 0))
    disk = bytearray(size)
    disk[:SECTOR] = mbr_sector([(0xEE, 1, size // SECTOR - 1)])
    disk[sector : sector + len(header)] = header
    disk[2 * sector : 2 * sector + len(table)] = table
    return bytes(disk)


def mbr_chain(size: int, chain: Sequence[tuple[int, tuple[int, int, int], int]]) -> bytes:
    """Return a disk with an extended partition from sector 64, and the records of its chain.

    Each of these is (sector, logical partition, sector of the next one behind 64, 0 for none).
    """
    disk = bytearray(size)
    disk[:SECTOR] = mbr_sector([(0x83, 8, 8), (0x05, 64, size // SECTOR - 64)])
    for sector, logical, following in chain:
        link = (0x05, following, 100) if following else (0, 0, 0)
        disk[sector * SECTOR : (sector + 1) * SECTOR] = mbr_sector([logical, link])
    return bytes(disk)


class Damage(PartitionsTest):
    """Tables that contradict themselves are reported, and not believed."""

    SIZE = MIB

    def faulty(self, disk: bytes, *says: str) -> dict[str, Any]:
        found = self.listing(disk)
        self.assertEqual(len(found["faults"]), len(says), found["faults"])
        for fault, words in zip(found["faults"], says):
            self.assertIn(words, fault)
        return found

    def test_sound_ones(self) -> None:
        """What the others are made of has no fault."""
        entries = [Entry(100, 199, "one"), Entry(200, 200)]
        for sector, size in ((512, self.SIZE), (4096, 2 * self.SIZE)):
            found = self.faulty(gpt(size, entries, sector))
            parts = [(p["number"], p["start"], p["size"]) for p in found["partitions"]]
            self.assertEqual(parts, [(1, 100 * sector, 100 * sector), (2, 200 * sector, sector)])
        found = self.faulty(mbr_chain(self.SIZE, [(64, (0x83, 8, 8), 64), (128, (0x83, 8, 8), 0)]))
        starts = [(p["number"], p["start"] // SECTOR) for p in found["partitions"]]
        self.assertEqual(starts, [(1, 8), (2, 64), (5, 72), (6, 136)])

    def test_gpt_checksums(self) -> None:
        """With a wrong CRC nothing of the table is shown."""
        entries = [Entry(100, 199)]
        for sector in (512, 4096):
            for field, says in (("header_crc", "header's CRC"), ("entries_crc", "entries' CRC")):
                for bit in (0, 31):
                    disk = gpt(2 * self.SIZE, entries, sector, **{field: 1 << bit})
                    self.assertEqual(self.faulty(disk, says)["partitions"], [])

    def test_each_bit_of_a_gpt(self) -> None:
        """Any flipped bit of header or entries is found."""
        disk = gpt(self.SIZE, [Entry(100, 199)])
        rng = random.Random(5)
        places = [
            *range(512, 512 + 92),
            *range(1024, 1024 + 128),
            *rng.sample(range(1152, 17408), 20),
        ]
        path = self.directory / "a.vma"
        start = in_one_piece(len(disk))
        for place in places:
            changed = bytearray(disk)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(start + changed)
            with self.subTest(place=place):
                text = self.ok("list", "--partitions", path)
                # not the eight bytes of the magic: then it is a protective MBR without a GPT
                self.assertIn("damaged GPT" if place >= 520 else "damaged", text)

    def test_gpt_fields(self) -> None:
        """Right CRCs over values that cannot be."""
        entries = [Entry(100, 199)]
        for fields, says in (
            ({"header_size": 91}, "header size 91"),
            ({"header_size": 513}, "header size 513"),
            ({"header_size": 1 << 31}, "header size 2147483648"),
            ({"count": 0}, "0 entries"),
            ({"count": 0xFFFFFFFF}, "4294967295 entries"),
            ({"entry_size": 127}, "entries of 127 bytes"),
            ({"entry_size": 0}, "entries of 0 bytes"),
            ({"entry_size": 1 << 30}, "entries of 1073741824 bytes"),
            ({"lba": 0}, "entries' CRC"),
            ({"lba": (1 << 64) - 1}, "entries' CRC"),
            ({"lba": self.SIZE // SECTOR - 1}, "entries' CRC"),
        ):
            with self.subTest(fields=fields):
                found = self.faulty(gpt(self.SIZE, entries, **fields), says)
                self.assertEqual(found["partitions"], [])
        self.faulty(gpt(self.SIZE, entries, header_size=512))
        self.faulty(gpt(self.SIZE, entries, count=4))

    def test_gpt_entries(self) -> None:
        """A partition that is not inside the disk is named, the others are shown."""
        last = self.SIZE // SECTOR - 1
        for bad in (
            Entry(200, 198), Entry(200, last + 1), Entry(last + 1, last + 9),
            Entry(200, (1 << 64) - 1), Entry((1 << 64) - 1, 200), Entry(1 << 63, 1 << 63),
        ):  # fmt: skip
            with self.subTest(entry=bad):
                entries = [Entry(100, 199, "good"), bad, Entry(300, 301, "also good")]
                found = self.faulty(gpt(self.SIZE, entries), "partition 2 ")
                self.assertEqual([p["number"] for p in found["partitions"]], [1, 3])

    def test_truncated_disks(self) -> None:
        """A disk that ends inside its table."""
        disk = gpt(self.SIZE, [Entry(100, 199)])
        for size in (1024, 1536, 16896):
            with self.subTest(size=size):
                found = self.listing(disk[:size])
                self.assertEqual(found["partitions"], [])
                self.assertEqual(len(found["faults"]), 1)
        for size in (512,):  # too short for a GPT: a protective MBR is left
            with self.subTest(size=size):
                self.assertTrue(self.listing(disk[:size])["faults"])
        found = self.faulty(disk[: 150 * SECTOR], "partition 1 ")
        self.assertEqual(found["partitions"], [])
        disk = gpt(2 * self.SIZE, [Entry(100, 199)], 4096)
        for size in (512, 4096):
            with self.subTest(size=size):
                self.assertTrue(self.listing(disk[:size])["faults"])

    def test_protective_mbr_alone(self) -> None:
        disk = mbr_sector([(0xEE, 1, 2047)]).ljust(self.SIZE, b"\0")
        self.faulty(disk, "protective MBR, but no GPT")

    def test_mbr_entries(self) -> None:
        """Partitions that reach behind the end."""
        sectors = self.SIZE // SECTOR
        for bad in (
            (0x83, 100, sectors), (0x83, sectors, 1), (0x83, 0xFFFFFFFF, 0xFFFFFFFF),
            (0x83, sectors - 1, 2),
        ):  # fmt: skip
            with self.subTest(entry=bad):
                disk = mbr_sector([(0x83, 8, 8), bad]).ljust(self.SIZE, b"\0")
                self.faulty(disk, "partition 2 ")

    def test_extended_chains(self) -> None:
        """In a circle, out of the disk, to nowhere, without an end."""
        sectors = self.SIZE // SECTOR
        good = (0x83, 8, 8)
        for says, chain in (
            ("circle", [(64, good, 64), (128, good, 64)]),
            ("circle", [(64, good, 64), (128, good, 128), (192, good, 64)]),
            ("behind the end", [(64, good, sectors)]),
            ("behind the end", [(64, good, 0xFFFFFFFF)]),
            ("no boot record", [(64, good, 100)]),
            ("no boot record", []),
            ("partition 5", [(64, (0x83, sectors, 8), 0)]),
            ("partition 5", [(64, (0x83, 8, 0xFFFFFFFF), 0)]),
            ("partition 5", [(64, (0x83, 0xFFFFFFFF, 1), 0)]),
        ):
            with self.subTest(chain=chain):
                self.faulty(mbr_chain(self.SIZE, chain), says)
        disk = bytearray(mbr_chain(self.SIZE, []))
        disk[446 + 16 + 8 : 446 + 16 + 12] = struct.pack("<I", sectors + 5)
        found = self.listing(bytes(disk))
        self.assertTrue(any("behind" in fault for fault in found["faults"]))

    def test_long_chain(self) -> None:
        """A chain through every sector of a disk takes no time to speak of."""
        sectors = 20000
        chain = [(n, (0x83, 0, 1), n - 63 if n < sectors - 1 else 0) for n in range(64, sectors)]
        path = self.directory / "a.vma"
        write_archive(path, {"drive-scsi0": mbr_chain(sectors * SECTOR, chain)})
        started = time.monotonic()
        self.ok("list", "--partitions", path)
        self.assertLess(time.monotonic() - started, 5)

    def test_random_damage(self) -> None:
        """Whatever the first 128 KiB say: no traceback, and nothing outside the disk."""
        size = 4 * CLUSTER
        rng = random.Random(19)
        ext4 = self.made("ext4").read_bytes()[: 2 * CLUSTER]
        fat = self.made("FAT16").read_bytes()[:CLUSTER]
        bases = [
            gpt(size, [Entry(100, 199, "one"), Entry(256, 300, "two")]),
            gpt(size, [Entry(20, 30), Entry(40, 50)], 4096, count=4),
            mbr_chain(
                size, [(64, (0x83, 8, 8), 64), (128, (0x82, 8, 8), 128), (192, (7, 1, 1), 0)]
            ),
            ext4.ljust(size, b"\0"),
            fat.ljust(size, b"\0"),
        ]
        path = self.directory / "a.vma"
        start = in_one_piece(size)
        for turn in range(0, 400, FEW):
            disk = bytearray(bases[turn % len(bases)])
            for _ in range(rng.choice([1, 1, 2, 4, 16])):
                mutate(disk, rng, tables=rng.random() < 0.7)
            if rng.random() < 0.7:
                fix_gpt(disk)
            path.write_bytes(start + disk)
            with self.subTest(turn=turn):
                (device,) = self.devices(path)
                check_inside(self, device)
                if turn % 7 == 0:
                    self.listed(path)


def in_one_piece(size: int) -> bytes:
    """Return all of an archive but the content of its only disk, up to 58 clusters, in order."""
    guest = Archive([Device(1, "drive-scsi0", bytes(size))])
    everything = {(1, number): 0xFFFF for number in range(size // CLUSTER)}
    data = archives.build(guest, archives.in_order(guest), store_zero_blocks=everything)
    return data[: len(data) - size]


def mutate(disk: bytearray, rng: random.Random, tables: bool) -> None:
    """Change a few bytes: where a table is, or anywhere in the first 128 KiB."""
    areas = [(446, 512), (512, 604), (1024, 1024 + 4 * 128), (4096, 4188), (8192, 8192 + 512)]
    areas += [(64 * 512 + 446, 65 * 512), (128 * 512 + 446, 129 * 512), (1024, 1300)]
    start, end = rng.choice(areas) if tables else (0, 128 * KIB)
    place = rng.randrange(start, end)
    size = rng.choice([1, 1, 2, 4, 8])
    value = rng.choice([0, 1, (1 << 64) - 1, 1 << 63, 1 << 31, rng.getrandbits(64)])
    disk[place : place + size] = struct.pack("<Q", value)[:size]


def fix_gpt(disk: bytearray) -> None:
    """Compute the CRCs again, so that what they cover is looked at."""
    for sector in (512, 4096):
        if disk[sector : sector + 8] == b"EFI PART":
            size, lba, count, entry_size = (
                *struct.unpack_from("<I", disk, sector + 12),
                *struct.unpack_from("<QII", disk, sector + 72),
            )
            table = disk[lba * sector : lba * sector + count * entry_size]
            struct.pack_into("<I", disk, sector + 88, binascii.crc32(table))
            struct.pack_into("<I", disk, sector + 16, 0)
            crc = binascii.crc32(disk[sector : sector + min(size, sector)])
            struct.pack_into("<I", disk, sector + 16, crc)
