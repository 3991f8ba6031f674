"""The codecs: header, blobs, names, extents, masks, and the numbers of the canonical layout."""

from __future__ import annotations

import struct
import unittest
from dataclasses import replace

import vma_tool
from tests import archives
from tests.archives import BLOCK, CLUSTER
from tests.damage import Damage, damages, extents, good_archive, header_damages
from tests.support import ToolTest, golden, manifest
from vma_tool import Config, Device, FormatError, Header, VmaError

UUID = bytes(range(16))


def header_of(data: bytes) -> Header:
    """Return the header at the beginning of an archive."""
    return vma_tool.parse_header(data[: vma_tool.parse_header_size(data)])


class HeaderCodec(unittest.TestCase):
    """parse_header and pack_header."""

    def test_sizes(self) -> None:
        """The structs are as long as the specification says."""
        structs = (vma_tool.HEADER, vma_tool.CONFIG_TABLE, vma_tool.DEV_INFO, vma_tool.EXTENT)
        self.assertEqual([each.size for each in structs], [60, 1024, 32, 512])

    def test_golden_headers(self) -> None:
        """What is in the manifest is what is read."""
        for name, want in manifest().items():
            with self.subTest(archive=name):
                header = header_of(golden(name))
                self.assertEqual(header.uuid.hex(), want["uuid"])
                self.assertEqual(header.ctime, want["ctime"])
                self.assertEqual([c.name for c in header.configs], list(want["configs"]))
                self.assertEqual(
                    [tuple(device) for device in header.devices],
                    [(d["dev_id"], d["name"], d["size"]) for d in want["devices"]],
                )

    def test_packs_as_proxmox_does(self) -> None:
        """A header that Proxmox wrote is packed into the same bytes again."""
        for name, want in manifest().items():
            if want["written_by"].startswith("proxmox"):
                with self.subTest(archive=name):
                    header = header_of(golden(name))
                    self.assertEqual(vma_tool.pack_header(header), golden(name)[: header.size])

    def test_round_trip(self) -> None:
        """pack_header writes what the independent builder writes; parse_header reads it again."""
        binary = bytes(range(256)) * 16
        disks = [archives.Device(n, f"drive-scsi{n}", b"", n * 512) for n in range(1, 255)]
        for what, archive in {
            "nothing": archives.Archive(),
            "configs": archives.Archive(configs=[("a.conf", b"x: 1\n"), ("b.fw", binary)]),
            "empty config": archives.Archive(configs=[("a.conf", b"")]),
            "config of 65535 bytes": archives.Archive(configs=[("a.conf", b"#" * 65535)]),
            "256 configs": archives.Archive(configs=[(f"{n}.conf", b"%d" % n) for n in range(256)]),
            "254 devices": archives.Archive(disks),
            "devices 1 and 254": archives.Archive([disks[0], disks[-1]]),
            "device of 2^64 - 512 bytes": archives.Archive(
                [replace(disks[0], size=(1 << 64) - 512)]
            ),
            "first ctime": archives.Archive(ctime=-(1 << 63)),
            "last ctime": archives.Archive(ctime=(1 << 63) - 1),
            "name of UTF-8": archives.Archive(configs=[("müll.conf", b"")]),
        }.items():
            for header_size in (None, 1 << 15 if len(archive.configs) < 2 else 1 << 17):
                if header_size and header_size < len(archives.header_bytes(archive)):
                    continue
                with self.subTest(what, header_size=header_size):
                    data = archives.header_bytes(archive, header_size)
                    header = vma_tool.parse_header(data)
                    self.assertEqual(vma_tool.pack_header(header), data)
                    self.assertEqual([tuple(c) for c in header.configs], archive.configs)
                    self.assertEqual(
                        [tuple(device) for device in header.devices],
                        [(d.dev_id, d.name, d.stated_size) for d in archive.devices],
                    )
                    self.assertEqual((header.uuid, header.ctime), (archive.uuid, archive.ctime))
                    self.assertEqual((header.size, header.md5), (len(data), data[32:48]))

    def test_config_slots(self) -> None:
        """A slot counts only if both of its offsets are set; the order is that of the slots."""
        configs: list[archives.Config] = [("a.conf", b"1"), ("b.conf", b"2"), ("c.conf", b"3")]
        data = archives.header_bytes(archives.Archive(configs=configs, config_slots=[255, 0, 7]))
        names = [config.name for config in vma_tool.parse_header(data).configs]
        self.assertEqual(names, ["b.conf", "c.conf", "a.conf"])
        for table in (2044, 3068):
            with self.subTest(table=table):
                half = archives.edit(data, table + 4 * 7, bytes(4))
                names = [config.name for config in vma_tool.parse_header(half).configs]
                self.assertEqual(names, ["b.conf", "a.conf"])

    def test_devices_that_do_not_count(self) -> None:
        """As for Proxmox: size 0, no readable name, dev_id 0 and 255."""
        disk = archives.Device(1, "drive-scsi0", b"", 512)
        data = archives.header_bytes(archives.Archive([disk]))
        (name_offset,) = struct.unpack_from(">I", data, 4096 + 32)
        unterminated = archives.HEADER + name_offset + 2 + len("drive-scsi0")
        other = struct.pack(">IIQ", name_offset, 0, 512)
        for what, edited, ids in (
            ("size 0", archives.edit(data, 4096 + 32 + 8, bytes(8)), []),
            ("name offset 0", archives.edit(data, 4096 + 32, bytes(4)), []),
            ("name behind the buffer", archives.edit(data, 4096 + 32, b"\xff" * 4), []),
            ("name without NUL", archives.edit(data, unterminated, b"x"), []),
            ("dev_id 0", archives.edit(data, 4096, other), [1]),
            ("dev_id 255", archives.edit(data, 4096 + 32 * 255, other), [1]),
            ("dev_id 254", archives.edit(data, 4096 + 32 * 254, other), [1, 254]),
        ):
            with self.subTest(what):
                devices = vma_tool.parse_header(edited).devices
                self.assertEqual([device.dev_id for device in devices], ids)

    def test_header_sizes(self) -> None:
        """A header may be larger than its blobs need, and no multiple of 512."""
        exact = len(archives.header_bytes(good_archive()))
        for size in (exact - 100, exact, exact + 1, 16384, 20000, 1 << 20, 17 << 20):
            with self.subTest(size=size):
                data = archives.header_bytes(good_archive(), size)
                header = vma_tool.parse_header(data)
                self.assertEqual(header.size, size)
                self.assertEqual(vma_tool.pack_header(header), data)

    def test_too_large_a_blob(self) -> None:
        header = Header(UUID, 0, (Config("a.conf", bytes(65536)),), (), 1 << 17)
        with self.assertRaisesRegex(VmaError, "65536 bytes of configuration"):
            vma_tool.pack_header(header)


class HeaderDamage(unittest.TestCase):
    """Each fault of a header has its message and its offset."""

    def test_table(self) -> None:
        for damage in header_damages():
            with (
                self.subTest(damage.name),
                self.assertRaisesRegex(FormatError, damage.says) as caught,
            ):
                header_of(damage.data)
            self.assertEqual(caught.exception.offset, damage.offset)


class Blobs(unittest.TestCase):
    """A blob is a little-endian length and its data; a walk from offset 1 comes past each."""

    def test_walk(self) -> None:
        buffer = b"\0" + b"\3\0abc" + b"\0\0" + b"\2\1" + b"x" * 258 + b"\1\0"
        found = vma_tool.find_blobs(memoryview(buffer), range(len(buffer) + 2))
        self.assertEqual(found, {1: b"abc", 6: b"", 8: b"x" * 258})
        # Where another walk would find something, there is nothing.
        self.assertEqual(vma_tool.find_blobs(memoryview(buffer), {2, 3, 9, 1 << 32}), {})
        # A blob that ends behind the buffer does not count, the walk goes on behind it.
        self.assertEqual(vma_tool.find_blobs(memoryview(b"\0\xff\xffabc"), {1, 4}), {})

    def test_names(self) -> None:
        for blob, name in (
            (None, None), (b"", None), (b"\0", ""), (b"drive-scsi0\0", "drive-scsi0"),
            (b"drive-scsi0", None), (b"a\0b\0", "a"), (b"a\0\0\0", "a"), ("ü\0".encode(), "ü"),
            (b"\xff\xc3\0", "\udcff\udcc3"),
        ):  # fmt: skip
            with self.subTest(blob=blob):
                self.assertEqual(vma_tool.parse_name(blob), name)
                if blob and name:
                    self.assertEqual(vma_tool.encode_name(name), blob.split(b"\0")[0])


class ExtentCodec(unittest.TestCase):
    """parse_extent, pack_extent and iter_slots."""

    def test_round_trip(self) -> None:
        """pack_extent writes what the independent builder writes; parse_extent reads it again."""
        for what, infos in {
            "empty": [],
            "one": [(0x8001, 1, 0)],
            "59 slots": [(0xFFFF, 254, 0xFFFFFFFF - n) for n in range(59)],
            "an empty slot between": [(1, 1, 7), (0, 0, 0), (0, 2, 8)],
        }.items():
            with self.subTest(what):
                blocks = sum(bin(mask).count("1") for mask, _, _ in infos)
                data = archives.extent_bytes(UUID, infos, [bytes(BLOCK)] * blocks)[:512]
                numbers = [mask << 48 | dev_id << 32 | num for mask, dev_id, num in infos]
                self.assertEqual(vma_tool.pack_extent(UUID, blocks, numbers), data)
                extent = vma_tool.parse_extent(data, 0x3200, UUID)
                self.assertEqual(extent.blockinfo, tuple(filter(None, numbers)))
                self.assertEqual((extent.offset, extent.block_count), (0x3200, blocks))
                self.assertEqual((extent.payload_offset, extent.md5), (0x3400, data[24:40]))
                self.assertEqual(extent.payload_size, blocks * BLOCK)

    def test_unused_slots(self) -> None:
        """Of a slot whose dev_id is 0 nothing counts, wherever it stands."""
        infos = [(0x8001, 1, 6), (0xFFFF, 0, 7), (1, 2, 8)]
        for unused in (bytes(8), archives.UNUSED, b"\x00\x01\xff\x00\x00\x00\x00\x00"):
            with self.subTest(unused=unused.hex()):
                data = archives.extent_bytes(UUID, infos, [bytes(BLOCK)] * 3, unused)[:512]
                extent = vma_tool.parse_extent(data, 0, UUID)
                self.assertEqual(extent.block_count, 3)
                self.assertEqual(
                    [(s.mask, s.dev_id, s.cluster_num) for s in vma_tool.iter_slots(extent)],
                    [infos[0], infos[2]],
                )

    def test_reserved_byte_of_a_blockinfo(self) -> None:
        """Proxmox's program does not look at the byte between mask and dev_id."""
        data = archives.extent_bytes(UUID, [(1, 1, 7)], [bytes(BLOCK)])
        extent = bytearray(data[:512])
        extent[42] = 0xFF
        archives.fix_extent_md5(extent, 0)
        slots = list(vma_tool.iter_slots(vma_tool.parse_extent(bytes(extent), 0, UUID)))
        self.assertEqual(slots, [(1, 7, 1, 0, BLOCK)])

    def test_slots(self) -> None:
        """A slot says where its blocks are in the payload; empty ones are passed over."""
        infos = [(0, 1, 4), (0x8001, 2, 9), (0, 0, 0), (0xFFFF, 1, 5), (0x00F0, 1, 3)]
        data = archives.extent_bytes(UUID, infos, [bytes(BLOCK)] * 22)[:512]
        self.assertEqual(
            list(vma_tool.iter_slots(vma_tool.parse_extent(data, 0, UUID))),
            [(1, 4, 0, 0, 0), (2, 9, 0x8001, 0, 8192), (1, 5, 0xFFFF, 8192, 65536),
             (1, 3, 0x00F0, 73728, 16384)],
        )  # fmt: skip


class ExtentDamage(ToolTest):
    """Each fault of an extent has its message and its offset, and names the archive."""

    def test_table(self) -> None:
        tested = 0
        for damage in damages():
            if damage.offset is not None and damage.offset >= extents()[0]:
                tested += 1
                with self.subTest(damage.name):
                    self.check(damage)
        self.assertGreater(tested, 40)

    def check(self, damage: Damage) -> None:
        """Read headers and extents, and compare the error."""
        path = self.file("x.vma", damage.data)
        with vma_tool.open_input(str(path)) as source:
            header = vma_tool.read_header(source)
            index = vma_tool.Index(header, source)
            with self.assertRaisesRegex(FormatError, damage.says) as caught:
                for extent in vma_tool.read_extents(source, header):
                    index.add(extent)
        self.assertEqual(caught.exception.offset, damage.offset)
        self.assertEqual(caught.exception.archive, str(path))
        self.assertTrue(str(caught.exception).startswith(f"{path}: offset 0x{damage.offset:x}: "))


# (cluster_num, mask, offset of the first stored block) of every cluster that stores one
STORED: dict[tuple[str, int], list[tuple[int, int, int]]] = {
    ("three-disks", 1): [(0, 0x001D, 0x3400), (2, 0x0002, 0x9400), (8, 0x0008, 0xA400)],
    ("three-disks", 2): [
        (0, 0x0001, 0x7400), (16, 0xFFFF, 0xF400), (17, 0xFFFF, 0x1F400),
        (18, 0xFFFF, 0x2F400), (19, 0xFFFF, 0x3F400), (20, 0x0001, 0x4F400),
        (48, 0x0003, 0x50600), (50, 0x0020, 0x52800), (95, 0x8000, 0x53800),
    ],
    ("three-disks", 3): [(0, 0x0001, 0x8400), (16, 0x000F, 0xB400)],
    ("vmstate", 1): [
        (0, 0x0001, 0x3400), (16, 0xFFFF, 0x6B400), (17, 0xFFFF, 0x8B400),
        (18, 0xFFFF, 0xA0400), (19, 0xFFFF, 0xB0400), (20, 0x0001, 0xC0400),
        (48, 0x0003, 0xC1600), (50, 0x0020, 0xC3600), (95, 0x8000, 0xC4600),
    ],
    ("vmstate", 2): [
        (0, 0xFFFF, 0x4400), (1, 0xFFFF, 0x14400), (2, 0xFFFF, 0x24400), (3, 0x0001, 0x34400),
        (10, 0xFC00, 0x35400), (11, 0xFFFF, 0x3B400), (12, 0xFFFF, 0x4B400),
        (13, 0xFFFF, 0x5B400), (14, 0xFFFF, 0x7B400), (15, 0x001F, 0x9B400),
    ],
    ("full-mask", 1): [(0, 0x001D, 0x3400), (2, 0x0002, 0x9400), (8, 0xFFFF, 0xA400)],
    ("full-mask", 2): [
        (0, 0x0001, 0x7400), (16, 0xFFFF, 0x1E400), (17, 0xFFFF, 0x2E400),
        (18, 0xFFFF, 0x3E400), (19, 0xFFFF, 0x4E400), (20, 0x0001, 0x5E400),
        (48, 0x0003, 0x5F600), (50, 0x0020, 0x61800), (95, 0x8000, 0x62800),
    ],
    ("full-mask", 3): [(0, 0x0001, 0x8400), (16, 0x000F, 0x1A400)],
    ("odd-size", 1): [(0, 0x0001, 0x3400), (16, 0x0001, 0x4400)],
    ("no-config", 1): [(0, 0x0001, 0x3400), (16, 0x000F, 0x4400)],
    ("live-order", 1): [(0, 0x001D, 0x4400), (2, 0x0002, 0x3400), (8, 0x0008, 0x8400)],
    ("live-order", 2): [
        (0, 0x0001, 0x2A400), (16, 0xFFFF, 0x3E600), (17, 0xFFFF, 0x9400),
        (18, 0xFFFF, 0x19400), (19, 0xFFFF, 0x2C600), (20, 0x0001, 0x29400),
        (48, 0x0003, 0x3C600), (50, 0x0020, 0x2B600), (95, 0x8000, 0x4E600),
    ],
    ("live-order", 3): [(0, 0x0001, 0x4F600), (16, 0x000F, 0x50800)],
    ("live-order-day2", 1): [(0, 0x001D, 0x5400), (2, 0x0002, 0x3400), (8, 0x0008, 0x4400)],
    ("live-order-day2", 2): [
        (0, 0x0001, 0x9400), (16, 0xFFFF, 0x2B400), (17, 0xFFFF, 0x3B400), (18, 0xFFFF, 0xA400),
        (19, 0xFFFF, 0x1B400), (20, 0x0001, 0x1A400), (48, 0x0003, 0x4C600),
        (50, 0x0020, 0x4B400), (64, 0x0001, 0x4E600), (95, 0x8000, 0x4F600),
    ],
    ("live-order-day2", 3): [(0, 0x0001, 0x50800), (16, 0x000F, 0x51800)],
    ("legal-oddities", 1): [(0, 0x001D, 0x4200), (2, 0x0002, 0x8200), (8, 0x0008, 0x9200)],
    ("legal-oddities", 2): [
        (0, 0x0001, 0xA200), (16, 0xFFFF, 0xB200), (17, 0xFFFF, 0x1B200), (18, 0xFFFF, 0x2B200),
        (19, 0xFFFF, 0x3B200), (20, 0x0001, 0x4B200), (40, 0xFFFF, 0x4C200),
        (48, 0x8003, 0x5C800), (50, 0x0020, 0x5F800), (95, 0x8000, 0x60A00),
    ],
    ("legal-oddities", 3): [(0, 0x0001, 0x61A00), (16, 0x000F, 0x62A00)],
    ("interleaved", 1): [
        (0, 0x0001, 0x4400), (16, 0xFFFF, 0x15400), (17, 0xFFFF, 0x35400),
        (18, 0xFFFF, 0x55400), (19, 0xFFFF, 0x75400), (20, 0x0001, 0x86400),
        (48, 0x0003, 0x89600), (50, 0x0020, 0x8C600), (95, 0x8000, 0x8FA00),
    ],
    ("interleaved", 2): [
        (0, 0x0001, 0x3400), (16, 0xFFFF, 0x5400), (17, 0xFFFF, 0x25400), (18, 0xFFFF, 0x45400),
        (19, 0xFFFF, 0x65400), (20, 0x0001, 0x85400), (48, 0x0003, 0x87600),
        (50, 0x0020, 0x8B600), (64, 0x0001, 0x8D800), (95, 0x8000, 0x8EA00),
    ],
}  # fmt: skip


class GoldenClusters(ToolTest):
    """Where the golden archives store which blocks."""

    def test_stored_clusters(self) -> None:
        for name in manifest():
            stored: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
            path = self.file("a.vma", golden(name))
            with vma_tool.open_input(str(path)) as source:
                for extent in vma_tool.read_extents(source, vma_tool.read_header(source)):
                    for slot in vma_tool.iter_slots(extent):
                        if slot.mask:
                            stored.setdefault((name, slot.dev_id), []).append(
                                (slot.cluster_num, slot.mask, extent.payload_offset + slot.start)
                            )
            with self.subTest(archive=name):
                found = {key: sorted(clusters) for key, clusters in stored.items()}
                want = {key: value for key, value in STORED.items() if key[0] == name}
                self.assertEqual(found, want)


class Masks(unittest.TestCase):
    """Masks of stored blocks."""

    def test_block_runs(self) -> None:
        for mask, runs in (
            (0, []), (0x0001, [(0, 1)]), (0x8000, [(15, 1)]), (0xFFFF, [(0, 16)]),
            (0x8001, [(0, 1), (15, 1)]), (0x00FF, [(0, 8)]), (0xFF00, [(8, 8)]),
            (0x7FFE, [(1, 14)]), (0x0DB6, [(1, 2), (4, 2), (7, 2), (10, 2)]),
            (0x5555, [(first, 1) for first in range(0, 16, 2)]),
        ):  # fmt: skip
            with self.subTest(mask=hex(mask)):
                want = [(first * BLOCK, count * BLOCK) for first, count in runs]
                self.assertEqual(list(vma_tool.block_runs(mask)), want)

    def test_every_mask(self) -> None:
        """The runs of all 65536 masks ascend, do not touch, and are the mask's bits."""
        for mask in range(1 << 16):
            bits, end = 0, -1
            for offset, size in vma_tool.block_runs(mask):
                first, count = offset // BLOCK, size // BLOCK
                if first <= end or count < 1 or offset % BLOCK or size % BLOCK:
                    self.fail(f"mask {mask:#x}: run at {first}")
                end = first + count
                bits |= (1 << end) - (1 << first)
            if bits != mask:
                self.fail(f"mask {mask:#x}: its runs are {bits:#x}")

    def test_device_ends(self) -> None:
        """block_mask has the blocks that begin inside the device; a vmstate has all."""
        for size, clusters, mask in (
            (1, 1, 0x0001), (BLOCK, 1, 0x0001), (BLOCK + 1, 1, 0x0003), (CLUSTER - 1, 1, 0xFFFF),
            (CLUSTER, 1, 0xFFFF), (CLUSTER + 512, 2, 0x0001), (540672, 9, 0x000F),
            (1050112, 17, 0x0001), (1 << 48, 1 << 32, 0xFFFF),
        ):  # fmt: skip
            with self.subTest(size=size):
                device = Device(1, "drive-scsi0", size)
                self.assertEqual(device.cluster_count, clusters)
                self.assertEqual(device.block_mask(clusters - 1), mask)
                self.assertEqual(device.block_mask(0), mask if clusters == 1 else 0xFFFF)
                self.assertEqual(Device(1, "vmstate", size).block_mask(clusters - 1), 0xFFFF)


class CanonicalNumbers(unittest.TestCase):
    """The numbers of the canonical layout."""

    def test_aligns(self) -> None:
        """Clusters an extent: 512 KiB, or as many as a larger alignment needs."""
        found = {name: vma_tool.clusters_per_extent(n) for name, n in vma_tool.ALIGNS.items()}
        want = {"4K": 8, "64K": 8, "128K": 8, "256K": 8, "512K": 8, "1M": 16}
        self.assertEqual(found, want)
        self.assertEqual(vma_tool.ALIGNS, archives.ALIGNS)

    def test_fill_up(self) -> None:
        """Zero blocks are stored from the extent's end: highest cluster, highest bit first."""
        disk = Device(1, "drive-scsi0", 3 * CLUSTER)
        odd = disk._replace(size=2 * CLUSTER + 2 * BLOCK + 1)
        long = disk._replace(size=60 * CLUSTER + 1)
        short = disk._replace(size=8 * CLUSTER + 2 * BLOCK + 1)
        vmstate = Device(1, "vmstate", 1)
        for what, device, first, masks, unit, filled in (
            ("no block", disk, 0, [0, 0, 0], 32, [0, 0, 0]),
            ("any number will do", disk, 0, [1, 0, 0], 1, [1, 0, 0]),
            ("a multiple", disk, 0, [0xFFFF, 0xFFFF, 0], 32, [0xFFFF, 0xFFFF, 0]),
            ("31 more", disk, 0, [1, 0, 0], 32, [1, 0xFFFE, 0xFFFF]),
            ("one more", disk, 0, [0x7FFF, 0, 0], 16, [0x7FFF, 0, 0x8000]),
            ("14 more", disk, 0, [0x8001, 0, 0], 16, [0x8001, 0, 0xFFFC]),
            ("the last is full", disk, 0, [0, 1, 0xFFFF], 32, [0, 0xFFFF, 0xFFFF]),
            ("between blocks", disk, 0, [0, 0, 0x5555], 16, [0, 0, 0xFFFF]),
            ("an odd end", odd, 0, [1, 0, 0], 32, [0xFFF1, 0xFFFF, 0x0007]),
            ("no more blocks", short, 8, [1], 32, [0x0007]),
            ("a later extent", long, 56, [1, 0, 0, 1, 0], 16, [1, 0, 0, 0xFFF9, 1]),
            ("all of 512K", long, 0, [0, 0, 0, 2, 0, 0, 0, 0], 128, [0xFFFF] * 8),
            ("all of 1M", long, 16, [0] * 15 + [0x8000], 256, [0xFFFF] * 16),
            ("fewer than 512K", disk, 0, [1, 0, 0], 128, [0xFFFF] * 3),
            ("fewer than 1M", disk, 0, [1, 0, 0], 256, [0xFFFF] * 3),
            ("a vmstate stays as it is", vmstate, 7, [1], 16, [1]),
        ):
            with self.subTest(what):
                found = vma_tool.fill_up(device, first, masks, unit * BLOCK)
                self.assertEqual([hex(m) for m in found], [hex(m) for m in filled])
                blocks = sum(bin(mask).count("1") for mask in filled)
                infos = [(mask, 1, number) for number, mask in enumerate(filled, first)]
                unused = bytes(8) if blocks else archives.UNUSED
                payload = [b""] * blocks
                want = archives.extent_bytes(vma_tool.CANONICAL_UUID, infos, payload, unused)
                laid_out = list(vma_tool.lay_out_extents(device, first, masks, unit * BLOCK))
                self.assertEqual(b"".join(data for data, _ in laid_out), want)
                self.assertEqual([m for _, stored in laid_out for m in stored], filled)

    def test_header_is_rounded_up(self) -> None:
        """The header is a multiple of the alignment, however little is over."""
        # The blobs have one byte, eleven more for each config, and its data.
        for align, config_sizes, size in (
            ("4K", [4084], 16384), ("4K", [4085], 20480),
            ("64K", [53236], 65536), ("64K", [53237], 131072),
            ("128K", [65535, 53226], 131072), ("128K", [65535, 53227], 262144),
            ("256K", [1], 262144), ("512K", [1], 524288), ("1M", [1], 1048576), ("1M", [], 1048576),
        ):  # fmt: skip
            with self.subTest(align=align, config_sizes=config_sizes):
                configs = [(f"{n}.conf", b"x" * size) for n, size in enumerate(config_sizes)]
                header = Header(UUID, 7, tuple(Config(*config) for config in configs), ())
                data = vma_tool.lay_out_header(header, vma_tool.ALIGNS[align])
                self.assertEqual(len(data), size)
                archive = archives.Archive(configs=list(configs), ctime=7)
                self.assertEqual(data, archives.canonical(archive, archives.ALIGNS[align])[:size])

    def test_order_of_devices(self) -> None:
        """By dev_id, a vmstate last."""
        devices = [
            Device(n, name, 512) for n, name in ((9, "c"), (1, "vmstate"), (254, "a"), (2, "b"))
        ]
        found = [device.dev_id for device in vma_tool.canonical_order(devices)]
        self.assertEqual(found, [2, 9, 254, 1])


class Names(unittest.TestCase):
    """Names that cannot be a file's."""

    def test_name_fault(self) -> None:
        for name, fault in (
            ("qemu-server.conf", None), ("drive-scsi0", None), ("ü", None), ("a b", None),
            ("...", None), (".x", None), ("-rf", None), ("x" * 242, None), ("\udcff", None),
            ("", "is not a file name"), (".", "is not a file name"), ("..", "is not a file name"),
            *((name, "holds a slash, a backslash or a control character") for name in (
                "../x", "/x", "a/b", "a/", "..\\x", "C:\\x", "a\nb", "a\0b", "\x1b[31m", "\x7f",
                "\x80", "\x9b31m",
            )),
            ("x" * 243, "is longer than 242 bytes"), ("ü" * 122, "is longer than 242 bytes"),
        ):  # fmt: skip
            with self.subTest(name=name):
                self.assertEqual(vma_tool.name_fault(name, 242), fault)

    def test_twice(self) -> None:
        """A name may occur once among the configs and once among the devices."""
        config, disk = Config("a", b""), Device(1, "a", 512)
        vma_tool.check_names(Header(UUID, 0, (config,), (disk,)))
        for header, message in (
            (Header(UUID, 0, (config, config), ()), "config name 'a' occurs twice"),
            (Header(UUID, 0, (), (disk, disk._replace(dev_id=2))), "device name 'a' occurs twice"),
        ):
            with self.subTest(message), self.assertRaisesRegex(FormatError, message):
                vma_tool.check_names(header)


class Texts(unittest.TestCase):
    """What people read and write."""

    def test_escape(self) -> None:
        for text, escaped in (
            ("drive-scsi0", "drive-scsi0"), ("müll wird's", "müll wird's"), ("a\nb", "a\\nb"),
            ("\x1b[31mX", "\\x1b[31mX"), ("\\n", "\\\\n"), ("\x9b", "\\x9b"), ("\0", "\\x00"),
            ("\u202egpj", "\\u202egpj"), ("\udcff", "\\udcff"), ("\u2028", "\\u2028"),
        ):  # fmt: skip
            with self.subTest(escaped):
                self.assertEqual(vma_tool.escape(text), escaped)

    def test_format_size(self) -> None:
        for size, text in (
            (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
            (8 << 30, "8.0 GiB"), (1 << 50, "1.0 PiB"), ((1 << 64) - 1, "16.0 EiB"),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(vma_tool.format_size(size), text)

    def test_parse_size(self) -> None:
        for text, size in (
            ("0", 0), ("4096", 4096), ("128K", 128 << 10), ("128k", 128 << 10), ("256M", 256 << 20),
            ("1G", 1 << 30), ("2T", 2 << 40),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(vma_tool.parse_size(text), size)
        for text in ("", "K", "x", "1.5G", "1X", "1GB", "12 34"):
            with self.subTest(text), self.assertRaises(ValueError):
                vma_tool.parse_size(text)

    def test_format_uuid(self) -> None:
        text = vma_tool.format_uuid(vma_tool.CANONICAL_UUID)
        self.assertEqual(text, "12345678-aabb-ccdd-eeff-aabbccddeeff")
