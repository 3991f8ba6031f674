"""What is no VMA archive is named for what it is; and whole directories of archives."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests import archives
from tests.archives import CLUSTER, EXTENT_HEADER, HEADER, Device
from tests.checks import ALL_READ, CheckedTest, built, run_shell
from tests.support import (
    Argument,
    call_tool,
    golden,
    require_program,
    snapshot,
)

SECTOR = 2048  # of an ISO 9660 image
PLAIN_NAME = "a.vma"  # says nothing of what is in it


@functools.cache
def tar(kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a container's backup: a tar with the container's configuration."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name in ("./etc/vzdump/pct.conf", "./etc/hostname"):
            entry = tarfile.TarInfo(name)
            entry.size = 100_000
            archive.addfile(entry, io.BytesIO(b"x" * entry.size))
    return file.getvalue()


@functools.cache
def iso_9660() -> bytes:
    """Return an image with a primary volume descriptor, in its sector 16."""
    image = bytearray(40 * SECTOR)
    descriptor = b"\x01CD001\x01\0" + b"LINUX".ljust(32) + b"INSTALLER".ljust(32)
    image[16 * SECTOR : 16 * SECTOR + len(descriptor)] = descriptor
    image[17 * SECTOR : 17 * SECTOR + 7] = b"\xffCD001\x01"
    return bytes(image)


def backup_server_magic(what: str) -> bytes:
    """Return how a file of Proxmox Backup Server begins: 8 bytes of the SHA-256 of its kind."""
    return hashlib.sha256(f"Proxmox Backup {what} v1.0".encode()).digest()[:8]


def qcow2() -> bytes:
    header = struct.pack(">4sIQIIQ", b"QFI\xfb", 3, 0, 0, 16, 1 << 30)
    return header.ljust(1 << 16, b"\0")


# what is in the file, and the words that name it
FOREIGN: dict[str, tuple[bytes, str]] = {
    "tar": (tar(), r"\btar\b"),
    "tar, PAX": (tar(tarfile.PAX_FORMAT), r"\btar\b"),
    "tar, POSIX": (tar(tarfile.USTAR_FORMAT), r"\btar\b"),
    "ISO 9660": (iso_9660(), "ISO 9660"),
    "qcow2": (qcow2(), "qcow2"),
    **{
        f"Proxmox Backup Server, {what}": (
            backup_server_magic(what) + bytes(5000),
            f"Proxmox Backup Server.*{word}|{word}.*Proxmox Backup Server",
        )
        for what, word in (
            ("uncompressed blob", "blob"),
            ("zstd compressed blob", "blob"),
            ("encrypted blob", "blob"),
            ("zstd compressed encrypted blob", "blob"),
            ("fixed sized chunk index", "index"),
            ("dynamic sized chunk index", "index"),
        )
    },
}


def zstd(data: bytes) -> bytes:
    program = require_program("zstd", "zstd")
    return subprocess.run([program, "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


class Foreign(CheckedTest):
    def test_known_magics(self) -> None:
        """The magic numbers are those that Proxmox Backup Server's sources give as numbers."""
        for what, numbers in (
            ("uncompressed blob", [66, 171, 56, 7, 190, 131, 112, 161]),
            ("zstd compressed blob", [49, 185, 88, 66, 111, 182, 163, 127]),
            ("encrypted blob", [123, 103, 133, 190, 34, 45, 76, 240]),
            ("zstd compressed encrypted blob", [230, 89, 27, 191, 11, 191, 216, 11]),
            ("fixed sized chunk index", [47, 127, 65, 237, 145, 253, 15, 205]),
            ("dynamic sized chunk index", [28, 145, 78, 165, 25, 186, 179, 205]),
        ):
            self.assertEqual(list(backup_server_magic(what)), numbers, what)

    def check(self, data: bytes, words: str) -> None:
        """Check that every command names the file for what it is, from a file and a pipe."""
        source, new = self.file(PLAIN_NAME, data), self.directory / "new"
        cases: tuple[tuple[list[Argument], bytes | None], ...] = (
            (["verify", source], None),
            (["list", source], None),
            (["list", "--partitions", source], None),
            (["config", source], None),
            (["extract", source, new], None),
            (["unpack", source, new], None),
            (["optimize", source, new], None),
            (["verify", "-"], data),
            (["optimize", "-", new], data),
        )
        for args, stream in cases:
            name = "standard input" if stream else str(source)
            line = self.fails(3, *args, input=stream, says=[name]).replace(name, "")
            self.assertRegex(line, words)
        self.assertEqual(list(self.directory.iterdir()), [source])

    def test_plain(self) -> None:
        for what, (data, words) in FOREIGN.items():
            with self.subTest(what):
                self.check(data, words)

    def test_compressed(self) -> None:
        """A container's backup is a tar in zstd or gzip."""
        packers: dict[str, Callable[[bytes], bytes]] = {"zstd": zstd, "gzip": gzip.compress}
        for packer, compress in packers.items():
            with self.subTest(packer):
                source = self.file(PLAIN_NAME, compress(tar()))
                line = self.fails(3, "verify", source, says=[str(source)])
                self.assertRegex(line.replace(str(source), ""), r"\btar\b")
                line = self.fails(3, "extract", "-", self.directory / "new",
                                  input=source.read_bytes())  # fmt: skip
                self.assertRegex(line, r"\btar\b")

    def test_in_place(self) -> None:
        for what, (data, words) in FOREIGN.items():
            with self.subTest(what):
                source = self.file(PLAIN_NAME, data)
                self.assertRegex(self.fails(3, "optimize", source), words)
                self.assertEqual(source.read_bytes(), data)

    def test_short(self) -> None:
        """What is too short to tell is told as before."""
        for data in (b"", b"C", b"QFI", iso_9660()[:1000], tar()[:200], bytes(100_000)):
            line = self.fails(3, "verify", self.file(PLAIN_NAME, data))
            self.assertIn("not a VMA archive", line)
            self.assertIsNone(re.search(r"ISO 9660|\btar\b|qcow2|Proxmox Backup", line))

    def test_archive_with_such_bytes(self) -> None:
        """A VMA archive that has the marks of a tar and of an ISO image is an archive all the same.

        Nobody reads the bytes 60 to 2043 of the header, and a disk may hold anything.
        """
        disk = bytearray(b"\x55" * CLUSTER)
        at = 16 * SECTOR - HEADER - 512 - EXTENT_HEADER  # in the disk
        disk[at : at + 7] = b"\x01CD001\x01"
        data = archives.edit(built(Device(1, "drive-scsi0", bytes(disk))), 257, b"ustar\x0000")
        self.assertEqual(data[16 * SECTOR + 1 : 16 * SECTOR + 6], b"CD001")
        self.assertIn("OK", self.ok("verify", self.file(PLAIN_NAME, data)))

    def test_qemu_img(self) -> None:
        """The real thing, of the real program."""
        program = require_program("qemu-img", "qemu-utils")
        path = self.directory / PLAIN_NAME
        subprocess.run(
            [program, "create", "-q", "-f", "qcow2", path, "1M"], check=True, capture_output=True
        )
        self.fails(3, "verify", path, says=["qcow2"])


class Directories(CheckedTest):
    """`verify DIRECTORY` is its archives, sorted by name."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = self.directory / "dump"
        self.folder.mkdir()
        self.data = golden("odd-size")

    def compressed(self, program: str, package: str) -> bytes:
        path = require_program(program, package)
        arguments = [path, "-c"]
        return subprocess.run(arguments, input=self.data, stdout=subprocess.PIPE, check=True).stdout

    def fill(self) -> list[str]:
        """Put archives and other files there; return the archives' names, sorted."""
        files = {
            "vzdump-qemu-101-2025_11_20-02_00_00.vma": self.data,
            "vzdump-qemu-100-2025_11_20-02_00_00.vma.gz": gzip.compress(self.data, 1),
            "vzdump-qemu-100-2025_11_21-02_00_00.vma.zst": zstd(self.data),
            "vzdump-qemu-99-2025_11_20-02_00_00.vma.lzo": self.compressed("lzop", "lzop"),
            "vzdump-qemu-102-2025_11_20-02_00_00.vma.bz2": self.compressed("bzip2", "bzip2"),
        }
        others = {
            "vzdump-qemu-100-2025_11_20-02_00_00.log": b"INFO: starting\n",
            "vzdump-qemu-100-2025_11_21-02_00_00.vma.zst.notes": b"a note",
            "vzdump-qemu-100-2025_11_21-02_00_00.vma.zst.protected": b"",
            "vzdump-qemu-103-2025_11_21-02_00_00.vma.dat": self.data[:5000],
            "vzdump-lxc-104-2025_11_21-02_00_00.tar.zst": zstd(tar()),
            "vma-tool-abcdef.partial": b"half an archive",
            "readme": b"text",
        }
        for name, data in {**files, **others}.items():
            (self.folder / name).write_bytes(data)
        below = self.folder / "below"
        below.mkdir()
        (below / "bad.vma").write_bytes(b"not looked at")
        return sorted(files)

    def test_its_archives(self) -> None:
        names = self.fill()
        answer = call_tool("verify", self.folder)
        text = answer.stdout.decode()
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertEqual(
            [line.split(": OK")[0] for line in text.splitlines()],
            [str(self.folder / name) for name in names],
        )
        self.assertEqual(text.count(ALL_READ), len(names))

    def test_with_others(self) -> None:
        """A directory among files stands where it was named; the others are as before."""
        names = self.fill()
        first, last = self.file("z.vma", self.data), self.file("a.vma", self.data)
        text = call_tool("verify", first, self.folder, last).stdout.decode()
        found = [line.split(": OK")[0] for line in text.splitlines()]
        self.assertEqual(
            found, [str(first), *(str(self.folder / name) for name in names), str(last)]
        )

    def test_slash_and_json(self) -> None:
        names = self.fill()
        answer = call_tool("verify", "--json", f"{self.folder}/")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        found = []
        decoder, text = json.JSONDecoder(), answer.stdout.decode().strip()
        while text:
            value, end = decoder.raw_decode(text)
            found.append(os.path.normpath(value["archive"]))
            text = text[end:].strip()
        self.assertEqual(found, [str(self.folder / name) for name in names])

    def test_bad_one(self) -> None:
        """Status 3; the others are looked at all the same."""
        names = self.fill()
        bad = self.folder / names[2]
        bad.write_bytes(bad.read_bytes()[:-30])
        answer = call_tool("verify", self.folder)
        self.assertEqual(answer.returncode, 3, answer.stderr)
        self.assertEqual(answer.stderr.count(b"\n"), 1)
        self.assertIn(str(bad).encode(), answer.stderr)
        self.assertEqual(answer.stdout.count(b": OK"), len(names) - 1)

    def test_none(self) -> None:
        """No archive there is an error: a mistyped path must not look like a good backup."""
        self.fails(1, "verify", self.folder, says=[str(self.folder)])
        (self.folder / "readme").write_bytes(b"text")
        (self.folder / "x.tar.zst").write_bytes(b"text")
        (self.folder / "x.vma.zst.notes").write_bytes(b"text")
        (self.folder / "x.vma").mkdir()
        self.fails(1, "verify", self.folder, says=[str(self.folder)])
        self.fails(1, "verify", self.folder / "missing")

    def test_other_commands(self) -> None:
        """They take one archive."""
        self.fill()
        before = snapshot(self.directory)
        for args in (["list"], ["config"], ["optimize"]):
            self.fails(1, *args, self.folder)
        self.fails(1, "extract", self.folder, self.directory / "new")
        self.assertEqual(snapshot(self.directory), before)

    def test_names(self) -> None:
        """Names that could act on a terminal are escaped."""
        (self.folder / "a\x1b[31m\n.vma").write_bytes(self.data)
        answer = call_tool("verify", self.folder)
        self.assertEqual(answer.returncode, 0)
        self.assertEqual(answer.stdout.count(b"\n"), 1)
        self.assertNotIn(b"\x1b", answer.stdout)


class Several(CheckedTest):
    """Where the shell hands over more than one archive."""

    def test_stream_and_files(self) -> None:
        data = golden("odd-size")
        one = self.file("1.vma", data)
        text = self.ok("verify", one, "-", input=data)
        self.assertEqual(text.count(ALL_READ), 2)

    def test_closed_standard_output(self) -> None:
        """None is looked at where nobody can be told."""
        one = self.file("1.vma", golden("odd-size"))
        missing: Path = self.directory / "missing"
        self.failed(run_shell('exec "$@" >&-', "verify", one, missing), 1, "standard output")
