"""verify: every check that the format allows, on every extent, without reading the payload."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

from tests import archives
from tests.archives import CLUSTER, MIB, Archive, Device
from tests.damage import DISK, cluster_of, damages, extents, good, good_archive
from tests.support import BAD, FAILED, ToolTest, call_tool, golden, manifest


class SoundArchives(ToolTest):
    """What Proxmox accepts, verify accepts."""

    def verified(self, path: Path, data: bytes) -> str:
        """Verify an archive from a file and from standard input; return the line without name."""
        path.write_bytes(data)
        line = self.ok("verify", path).removeprefix(str(path))
        self.assertEqual(self.ok("verify", "-", input=data).removeprefix("standard input"), line)
        return line

    def test_golden_archives(self) -> None:
        """One line: the verdict, devices, sizes, bytes stored, and the layout."""
        path = self.directory / "a.vma"
        for name, line in {
            "three-disks": "3 devices, 10.5 MiB, 324.0 KiB stored",
            "vmstate": "2 devices, 7.1 MiB, 776.0 KiB stored",
            "odd-size": "1 device, 1.0 MiB, 8.0 KiB stored",
            "config-only": "0 devices, 0 B, 0 B stored",
            "no-config": "1 device, 4.0 MiB, 20.0 KiB stored",
            "live-order": "3 devices, 10.5 MiB, 324.0 KiB stored",
            "live-order-day2": "3 devices, 10.5 MiB, 328.0 KiB stored",
            "legal-oddities": "3 devices, 10.5 MiB, 392.0 KiB stored",
            "interleaved": "2 devices, 12.0 MiB, 564.0 KiB stored",
            "full-mask": "3 devices, 10.5 MiB, 384.0 KiB stored",
        }.items():
            with self.subTest(archive=name):
                self.assertEqual(
                    self.verified(path, golden(name)),
                    f": OK, {line}, not canonical, all data read\n",
                )
        self.assertEqual(len(manifest()), 10)

    def test_canonical_archives(self) -> None:
        path = self.directory / "a.vma"
        for align, size in archives.ALIGNS.items():
            with self.subTest(align=align):
                line = self.verified(path, archives.canonical(good_archive(), size))
                self.assertRegex(
                    line, rf": OK, .* stored, canonical \(--align {align}\), all data read\n"
                )

    def test_legal_layouts(self) -> None:
        """Any order, cut and padding that Proxmox's reader accepts."""
        archive = good_archive()
        rng = random.Random(8)
        orders = {
            "in order": archives.in_order(archive),
            "reversed": archives.reversed_order(archive),
            "shuffled": archives.shuffled(archive, rng),
            "interleaved": archives.interleaved(archive),
            "vmstate first": archives.vmstate_first(archive),
        }
        zeros = archives.masks_with_zeros(archive, rng)
        path = self.directory / "a.vma"
        for what, order in orders.items():
            for slots in (1, 58, 59):
                with self.subTest(what, slots=slots):
                    self.verified(path, archives.build(archive, order, slots))
        order = orders["shuffled"]
        for what, data in (
            ("empty extents", archives.build(archive, order, empty_extents=True)),
            ("empty slots", archives.build(archive, order, empty_slots=True)),
            ("zero blocks", archives.build(archive, order, store_zero_blocks=zeros)),
            ("header of 4096s", archives.build(replace(archive, header_size=16384), order)),
            ("header of 1 MiB", archives.build(replace(archive, header_size=MIB), order)),
            ("header of any size", archives.build(replace(archive, header_size=13001), order)),
            ("names first", archives.build(replace(archive, names_first=True), order)),
            ("config slots", archives.build(replace(archive, config_slots=[9, 255]), order)),
        ):
            with self.subTest(what):
                self.verified(path, data)

    def test_vmstate_longer_than_its_size(self) -> None:
        """The size of a vmstate is the least that it must have."""
        for clusters in (1, 2, 60):
            device = Device(1, "vmstate", bytes(clusters * CLUSTER), CLUSTER - 512)
            archive = Archive([device])
            with self.subTest(clusters=clusters):
                data = archives.build(archive)
                self.verified(self.directory / "a.vma", data)

    def test_vmstate_shorter_than_its_size(self) -> None:
        """Proxmox restores a part of it; wherever the extents are cut, that is an error."""
        disk = Device(1, "drive-scsi0", bytes(2 * CLUSTER))
        state = Device(2, "vmstate", b"x" * CLUSTER, 100 * CLUSTER)
        for slots in (1, 2, 3, 58):
            with self.subTest(slots=slots):
                data = archives.build(Archive([disk, state]), slots=slots)
                says = ["'vmstate'", "99 of 100 clusters are missing, the first is 1"]
                self.bad("verify", "-", input=data, says=says)

    def test_payload_has_no_checksum(self) -> None:
        """A flipped byte of payload cannot be seen: the format has nothing that tells."""
        at, slot = cluster_of(DISK, 1)
        self.assertNotEqual(slot.mask, 0)
        data = bytearray(good())
        data[at + 512] ^= 0xFF
        self.verified(self.directory / "a.vma", bytes(data))

    def test_limits(self) -> None:
        """254 devices, 256 configs of 65535 bytes."""
        devices = [Device(n, f"drive-scsi{n}", b"x" * 512) for n in range(1, 255)]
        configs = [(f"{n}.conf", b"#" * 65535) for n in range(256)]
        archive = Archive(devices, list(configs))
        line = self.verified(
            self.directory / "a.vma", archives.build(archive, archives.reversed_order(archive))
        )
        self.assertIn("254 devices, 127.0 KiB, 1016.0 KiB stored", line)

    def test_what_is_read(self) -> None:
        """All of it, or with --quick the headers only: of 370 MB less than a tenth."""
        counter = Path("/proc/self/io")
        if not counter.exists():
            self.skipTest("no /proc/self/io here")
        path = self.directory / "a.vma"
        count = 100
        device = Device(1, "drive-scsi0", b"", count * 58 * CLUSTER)
        archive = Archive([device])
        with open(path, "wb") as file:
            file.write(archives.header_bytes(archive))
            for first in range(0, count * 58, 58):
                infos = [(0xFFFF, 1, num) for num in range(first, first + 58)]
                file.write(archives.extent_bytes(archive.uuid, infos, [b""] * 58 * 16))
                file.seek(58 * CLUSTER, os.SEEK_CUR)
            file.truncate()

        def bytes_read() -> int:
            return int(counter.read_text().split()[1])

        for args, share, says in (([], 1, "all data read"), (["--quick"], 0.1, "headers only")):
            before = bytes_read()
            self.assertIn(f", {says}\n", self.ok("verify", *args, path))
            read = bytes_read() - before
            self.assertEqual(read > path.stat().st_size * 0.9, share == 1)
            self.assertLess(read, path.stat().st_size * share + MIB)


class BadArchives(ToolTest):
    """Each fault has its message: archive, offset, device, cluster."""

    def test_table(self) -> None:
        """The whole table of damages, from a file and from standard input."""
        for damage in damages():
            path = self.file("bad.vma", damage.data)
            for name, answer in (
                (str(path), call_tool("verify", path)),
                ("standard input", call_tool("verify", "-", input=damage.data)),
            ):
                with self.subTest(damage.name, archive=name):
                    offset = "" if damage.offset is None else f": offset 0x{damage.offset:x}: "
                    line = self.check_error(answer, f"vma-tool: {name}: ", offset, status=BAD)
                    self.assertRegex(line, damage.says)
                    self.assertEqual(answer.stdout, b"")

    def test_cut_anywhere(self) -> None:
        """An archive that lacks its end is an error wherever it was cut."""
        rng = random.Random(2)
        cuts = {extent + n for extent in extents() for n in (-1, 0, 1, 511, 512, 513)}
        cuts |= {rng.randrange(len(good())) for _ in range(50)}
        for size in sorted(cuts):
            with self.subTest(size=size):
                self.bad("verify", "-", input=good()[:size])

    def test_any_flipped_byte_of_a_header(self) -> None:
        """The MD5s cover every byte of every header."""
        rng = random.Random(6)
        offsets = rng.sample(range(extents()[0]), 100)
        offsets += [rng.choice(extents()) + rng.randrange(512) for _ in range(100)]
        for offset in offsets:
            with self.subTest(offset=offset):
                flipped = bytes([good()[offset] ^ 1 << rng.randrange(8)])
                bad = archives.edit(good(), offset, flipped, fix_md5=False)
                self.bad("verify", "-", input=bad)

    def test_names(self) -> None:
        """Names that do not restore are an error."""
        for name in (b"../x", b"/x", b"a/b", b"evil\n\x1b[31mX", b"", b"x" * 256):
            for archive in (
                Archive(configs=[(name, b"")]),
                Archive([Device(1, name, bytes(512))]),
            ):
                with self.subTest(name=name, archive=archive):
                    data = archives.build(archive)
                    path = self.file("bad.vma", data)
                    line = self.bad("verify", path, says=[f"{path}: ", " name '"])
                    self.assertTrue(line.rstrip("\n").isprintable())

    def test_names_twice(self) -> None:
        disk = Device(1, "drive-scsi0", bytes(512))
        for what, archive in (
            ("device", Archive([disk, replace(disk, dev_id=2)])),
            ("config", Archive(configs=[("a.conf", b"1"), ("a.conf", b"2")])),
        ):
            with self.subTest(what):
                data = archives.build(archive)
                says = [f"{what} name ", " occurs twice"]
                self.bad("verify", self.file("bad.vma", data), says=says)


class SeveralArchives(ToolTest):
    """verify goes on after a bad archive, and remembers it."""

    def test_bad_one_between(self) -> None:
        """A line for each good one, an error for each bad one, and the worse status."""
        (self.directory / "dir").mkdir()
        paths = [
            self.file("1.vma", golden("three-disks")),
            self.file("2.vma", golden("three-disks")[:-1]),
            self.directory / "missing.vma",
            self.directory / "dir",
            self.file("5.vma", b""),
            self.file("6.vma", golden("vmstate")),
        ]
        answer = call_tool("verify", *paths)
        self.assertEqual(answer.returncode, BAD)
        good_ones = [line.split(":")[0] for line in answer.stdout.decode().splitlines()]
        bad_ones = [line.split(":")[1].strip() for line in answer.stderr.decode().splitlines()]
        self.assertEqual(good_ones, [str(paths[0]), str(paths[-1])])
        self.assertEqual(bad_ones, [str(path) for path in paths[1:5]])
        self.assertEqual(call_tool("verify", paths[0], paths[-1]).returncode, 0)
        self.assertEqual(call_tool("verify", paths[0], paths[2]).returncode, FAILED)

    def test_quiet(self) -> None:
        """-q says nothing of good archives."""
        path = self.file("a.vma", good())
        bad = self.file("bad.vma", good()[:-1])
        self.assertEqual(self.ok("verify", "-q", path), "")
        self.bad("verify", "-q", path, bad, says=[str(bad)])

    def test_quiet_before_the_command(self) -> None:
        """The options common to all commands may stand on either side of the command."""
        self.assertEqual(self.ok("-q", "verify", self.file("a.vma", good())), "")

    def test_verbose(self) -> None:
        """-v says more, and the same to begin with."""
        path = self.file("a.vma", good())
        plain = self.ok("verify", path)
        answer = call_tool("verify", "-v", path)
        self.assertEqual(answer.returncode, 0)
        self.assertTrue(answer.stdout.decode().startswith(plain))
        self.assertGreater(len(answer.stdout), len(plain))

    def test_usage(self) -> None:
        self.assertEqual(call_tool("verify").returncode, 2)
