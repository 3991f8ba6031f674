"""zstd frames: the codecs of the compressed canonical archive, and the ways to the library."""

from __future__ import annotations

import array
import importlib
import random
import struct
import subprocess
import sys
import threading
import types
import unittest
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import vma_tool
from tests import archives, frames
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import golden, manifest, require_module, require_program, temporary_directory
from vma_tool import (
    FormatError,
    Frame,
    ModuleZstd,
    SeekTable,
    Zstd,
    parse_frame,
    parse_header,
)


def roads() -> Iterator[tuple[str, Zstd]]:
    """Yield each way to the library that this Python has."""
    library = Zstd.load_library()
    if library is not None:
        yield "library", library
    for name in ("compression.zstd", "backports.zstd"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield name, ModuleZstd(module)


def decompress(zstd: Zstd, frame: bytes, size: int) -> bytes:
    data = bytearray(size)
    zstd.decompress_into(frame, memoryview(data))
    return bytes(data)


def program(*options: str, data: bytes, piped: bool = True, test: unittest.TestCase) -> bytes:
    """Return what the zstd program makes of data, from a pipe or a file."""
    command = [require_program("zstd", "zstd"), "-q", "-c", *options]
    if not piped:
        path = temporary_directory(test) / "data"
        path.write_bytes(data)
        return subprocess.run([*command, str(path)], check=True, stdout=subprocess.PIPE).stdout
    return subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout


def some_data(size: int, seed: int = 1) -> bytes:
    """Return data that compresses by half: words in random order, random bytes between them."""
    rng = random.Random(seed)
    words = [rng.getrandbits(64).to_bytes(8, "little") for _ in range(300)]
    data = b"".join(
        rng.choice(words) if rng.random() < 0.7 else rng.getrandbits(64).to_bytes(8, "little")
        for _ in range(size // 8 + 1)
    )
    return data[:size]


class Library(unittest.TestCase):
    """Compressing and decompressing, by every road that there is."""

    def test_round_trip(self) -> None:
        """A frame tells its size, has a checksum, and is read by each road and the program."""
        require_program("zstd", "zstd")
        for size in (0, 1, 512, BLOCK, 65536, 1 << 20, (1 << 20) + 1):
            data = some_data(size)
            for name, zstd in roads():
                with self.subTest(road=name, size=size):
                    frame = zstd.compress(data, 3)
                    self.assertEqual(parse_frame(frame), Frame(len(frame), size, True))
                    answer = program("-d", data=frame, test=self)
                    self.assertEqual(answer, data)
                    for _, other in roads():
                        self.assertEqual(decompress(other, frame, size), data)

    def test_same_bytes(self) -> None:
        """Contexts that have worked before, and other kinds of memory, change nothing."""
        pieces = [some_data(200_000, seed) for seed in range(6)] + [bytes(512), bytes(1 << 20)]
        for name, zstd in roads():
            for level in (1, 3, 6, 9, 19):
                with self.subTest(road=name, level=level):
                    want = [fresh(zstd).compress(piece, level) for piece in pieces]
                    for i in random.Random(level).choices(range(len(pieces)), k=20):
                        for data in (pieces[i], bytearray(pieces[i]), memoryview(pieces[i])):
                            self.assertEqual(zstd.compress(data, level), want[i])
                    self.assertEqual(
                        zstd.compress(memoryview(bytearray(pieces[0])), level), want[0]
                    )

    def test_threads(self) -> None:
        """Threads do not disturb each other."""
        pieces = [some_data(100_000 + seed, seed) for seed in range(8)]
        for name, zstd in roads():
            with self.subTest(road=name):
                want = [zstd.compress(piece, 3) for piece in pieces]
                wrong: list[int] = []

                def work(seed: int, zstd: Zstd = zstd, want: list[bytes] = want) -> None:
                    for i in random.Random(seed).choices(range(len(pieces)), k=60):
                        frame = zstd.compress(pieces[i], 3)
                        if frame != want[i] or decompress(zstd, frame, len(pieces[i])) != pieces[i]:
                            wrong.append(i)  # noqa: B023 - the threads end inside the loop

                threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                self.assertEqual(wrong, [])

    def test_into_a_slice(self) -> None:
        """What lies beside the view stays as it is."""
        data = some_data(70_000)
        for name, zstd in roads():
            with self.subTest(road=name):
                frame = zstd.compress(data, 3)
                memory = bytearray(b"x" * 70_020)
                zstd.decompress_into(memoryview(frame), memoryview(memory)[10:-10])
                self.assertEqual(bytes(memory), b"x" * 10 + data + b"x" * 10)

    def test_bad_frames(self) -> None:
        """Every frame that does not give what is expected is an error, in plain words."""
        data = some_data(300_000)
        for name, zstd in roads():
            frame = zstd.compress(data, 3)
            nameless = program(data=data, test=self)  # from a pipe: no content size
            cases = [
                ("checksum", flipped(frame, -1), len(data), "checksum"),
                ("too short", frame, len(data) + 1, "holds 300000 bytes, not 300001"),
                ("too long", frame, len(data) - 1, "holds 300000 bytes, not 299999"),
                ("too short, size unknown", nameless, len(data) + 1, "expected 300001"),
                ("too long, size unknown", nameless, len(data) - 1, "damaged"),
                ("cut", frame[:-1], len(data), "cut off"),
                ("cut in the header", frame[:5], len(data), "cut off"),
                ("empty", b"", len(data), "cut off"),
                ("followed by a byte", frame + b"x", len(data), f"ends after {len(frame)} of"),
                ("twice", frame + frame, 2 * len(data), f"ends after {len(frame)} of"),
                ("skippable", frames.skippable(0x184D2A50, b"abc"), 3, "holds 0 bytes, not 3"),
                ("no frame", b"VMA\0" * 10, 40, "no zstd frame: magic 0x00414d56"),
            ]
            for what, bad, size, says in cases:
                with self.subTest(what, road=name), self.assertRaisesRegex(FormatError, says):
                    decompress(zstd, bad, size)
            with self.subTest("works after errors", road=name):
                self.assertEqual(decompress(zstd, frame, len(data)), data)

    def test_flipped_bytes(self) -> None:
        """No change of a byte changes the data unnoticed."""
        data = some_data(3000)
        for name, zstd in roads():
            frame = zstd.compress(data, 3)
            for position in range(len(frame)):
                # A few bits decoders ignore, as RFC 3.1.1.1.1.4, Unused_bit.
                with self.subTest(road=name, position=position), suppress(FormatError):
                    self.assertEqual(decompress(zstd, flipped(frame, position), 3000), data)

    def test_choice(self) -> None:
        """Python's own module comes first, then the library; where there is neither, None."""
        self.addCleanup(Zstd.load.cache_clear)
        hidden = mock.patch.dict(sys.modules, {"compression": None, "compression.zstd": None})
        module = types.ModuleType("compression.zstd")
        for what, patches, want in (
            ("module", mock.patch.dict(sys.modules, {"compression.zstd": module}), ModuleZstd),
            ("library", hidden, Zstd),
        ):
            Zstd.load.cache_clear()
            with self.subTest(what), patches:
                if want is Zstd and Zstd.load_library() is None:
                    self.skipTest("no libzstd")
                self.assertIs(type(Zstd.load()), want)
        for what, library in (
            ("missing", OSError("no such file")),
            ("too old", FakeLibrary(10309)),
            ("without a function", types.SimpleNamespace(ZSTD_versionNumber=lambda: 10500)),
        ):
            Zstd.load.cache_clear()
            with self.subTest(what), hidden, mock.patch("ctypes.CDLL", side_effect=[library] * 9):
                self.assertIsNone(Zstd.load())

    def test_few_functions(self) -> None:
        """Nothing else of the library is used than its stable functions."""
        library = FakeLibrary()
        self.assertIs(Zstd(library).library, library)
        with mock.patch("ctypes.CDLL", return_value=library):
            self.assertIsNotNone(Zstd.load_library())
        self.assertEqual(
            library.asked,
            {
                *("ZSTD_createCCtx", "ZSTD_CCtx_setParameter", "ZSTD_compress2"),
                *("ZSTD_compressBound", "ZSTD_createDCtx", "ZSTD_decompressDCtx"),
                *("ZSTD_isError", "ZSTD_getErrorName", "ZSTD_versionNumber"),
            },
        )


def fresh(zstd: Zstd) -> Zstd:
    """Return the same road with new contexts."""
    if isinstance(zstd, ModuleZstd):
        return ModuleZstd(zstd.module)
    return Zstd(zstd.library)


class FakeLibrary:
    """A library whose functions do nothing but tell a version; `asked` are their names."""

    def __init__(self, version: int = 10504) -> None:
        self.version = version
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)

        class Function:
            def __call__(_, *args: object) -> int:  # noqa: N805 - self is the library
                return self.version

        return Function()


def flipped(data: bytes, position: int, bit: int = 0x10) -> bytes:
    changed = bytearray(data)
    changed[position] ^= bit
    return bytes(changed)


class FrameHeaders(unittest.TestCase):
    """parse_frame: a frame's size without decompressing it."""

    def test_frames_of_the_program(self) -> None:
        """Whatever options the program had, the frame ends where it ends."""
        noise = random.Random(5).getrandbits(8 * 300_000).to_bytes(300_000, "little")
        for what, data in (
            ("nothing", b""),
            ("one byte", b"x"),
            ("raw blocks", noise),
            ("RLE blocks", bytes(1_000_000)),
            ("compressed blocks", some_data(1_500_000)),
            ("all kinds", noise + bytes(500_000) + some_data(500_000)),
        ):
            for options in (
                ["-3"],
                ["-19"],
                ["--long"],
                ["--long=27", "--no-check"],
                ["--no-content-size"],
                ["--no-check"],
                ["--rsyncable", "-T2"],
                ["--fast=5"],
            ):
                for piped in (True, False):
                    with self.subTest(what, options=options, piped=piped):
                        frame = program(*options, data=data, piped=piped, test=self)
                        told = not piped and "--no-content-size" not in options
                        found = parse_frame(b"junk" + frame + b"VMAE", 4)
                        self.assertEqual(found.size, len(frame))
                        self.assertIn(found.content_size, (len(data),) if told else (None, 0))
                        self.assertEqual(found.has_checksum, "--no-check" not in options)

    def test_every_cut(self) -> None:
        """A frame that is cut anywhere is an error, never a size."""
        for zstd_frame in (
            frames.raw_frame(b"abc" * 100),
            program(data=some_data(2000), test=self),
        ):
            for end in range(len(zstd_frame)):
                with self.assertRaisesRegex(FormatError, "cut off"):
                    parse_frame(zstd_frame[:end])

    def test_no_frames(self) -> None:
        frame = frames.raw_frame(b"abc")
        for what, data, says in (
            ("another magic", b"\x1f\x8b\x08\0" + bytes(20), "no zstd frame: magic 0x00088b1f"),
            ("reserved bit", flipped(frame, 4, 8), "later format"),
            ("reserved block type", flipped(frame, 9, 6), "damaged: no block after 9 bytes"),
            ("block too large", frame[:9] + b"\xff\xff\xff" + bytes(1 << 21), "damaged"),
            ("skippable, cut off", frames.skippable(0x184D2A53, b"abc")[:-1], "cut off"),
        ):
            with self.subTest(what), self.assertRaisesRegex(FormatError, says):
                parse_frame(data)
        self.assertEqual(parse_frame(frames.skippable(0x184D2A5F, bytes(99))), Frame(107, 0, False))


def seek_table(*sizes: tuple[int, int]) -> bytes:
    return vma_tool.pack_seek_table(array.array("I", [size for pair in sizes for size in pair]))


class SeekTables(unittest.TestCase):
    """pack_seek_table and parse_seek_table."""

    def test_round_trip(self) -> None:
        rng = random.Random(7)
        for count in (1, 2, 1000):
            sizes = [(rng.randint(1, 1 << 20), rng.randint(1, 1 << 20)) for _ in range(count)]
            table = seek_table(*sizes)
            fakes = [bytes(size) for size, _ in sizes]
            self.assertEqual(table, frames.seek_table(fakes, [size for _, size in sizes]))
            self.assertEqual(vma_tool.parse_seek_footer(b"before" + table), len(table))
            found = vma_tool.parse_seek_table(table, 1 << 40)
            self.assertEqual(found.offsets[-1], sum(size for _, size in sizes))
            self.assertEqual(found.compressed_offsets[-1], sum(size for size, _ in sizes))
            self.assertEqual(found.offsets[:2].tolist(), [0, sizes[0][1]])
            self.assertEqual(found.compressed_offsets[:2].tolist(), [0, sizes[0][0]])

    def test_no_table(self) -> None:
        """What ends in something else, or in another program's table, has none."""
        table = seek_table((10, 20))
        for what, tail in (
            ("nothing", b""),
            ("short", table[-8:]),
            ("another magic", flipped(table, -1)),
            ("with checksums", flipped(table, -5, 0x80)),
            ("reserved bits", flipped(table, -5, 4)),
            ("without frames", frames.seek_table([], [])),
        ):
            with self.subTest(what):
                self.assertIsNone(vma_tool.parse_seek_footer(tail))

    def test_lies(self) -> None:
        for what, table, file_size in (
            ("another frame around it", flipped(seek_table((10, 20)), 0), 1000),
            ("its frame's size", flipped(seek_table((10, 20)), 4), 1000),
            ("more than the file", seek_table((10, 20), (500, 20)), 500),
            ("as much as the file", seek_table((10, 20), (490, 20)), 533 - 1),
            ("a large frame", seek_table((10, 20), (10, (8 << 20) + 1)), 1000),
            ("an empty frame", seek_table((10, 20), (10, 0)), 1000),
            ("a frame without bytes", seek_table((0, 20), (10, 20)), 1000),
        ):
            with self.subTest(what), self.assertRaises(FormatError):
                vma_tool.parse_seek_table(table, file_size)
        vma_tool.parse_seek_table(seek_table((10, 20), (490, 8 << 20)), 533)


def archive_of(*disks: bytes | Device, configs: int = 1) -> Archive:
    devices = [
        disk if isinstance(disk, Device) else Device(n, f"drive-scsi{n}", disk)
        for n, disk in enumerate(disks, 1)
    ]
    return Archive(devices, [(f"{n}.conf", b"cores: 2\n" * 50) for n in range(configs)])


def samples() -> Iterator[tuple[str, Archive, int]]:
    """Yield archives, each with an align."""
    rng = random.Random(11)
    for align in (4096, 131072, 524288, 1048576):
        for size in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 55, 56, 57, 112, 113, 150):
            pattern = rng.choice(["mixed", "full", "sparse", "zeros"])
            yield (
                f"{size} clusters {pattern}",
                archive_of(
                    archives.disk(rng, size * CLUSTER - rng.choice((0, 512, 20480)), pattern)
                ),
                align,
            )
        yield (
            "two disks",
            archive_of(
                archives.disk(rng, 70 * CLUSTER), archives.disk(rng, 130 * CLUSTER, "sparse")
            ),
            align,
        )
        ram = Device(2, "vmstate", archives.disk(rng, 60 * CLUSTER, "sparse"), 40 * CLUSTER)
        yield "vmstate", archive_of(archives.disk(rng, 60 * CLUSTER), ram, bytes(CLUSTER)), align
    yield "no device", archive_of(), 524288
    yield (
        "large header",
        Archive(
            [Device(1, "drive-scsi0", bytes(CLUSTER))],
            [(f"{n}.conf", bytes(60_000)) for n in range(40)],
        ),
        524288,
    )


def plains() -> Iterator[tuple[str, bytes]]:
    """Yield canonical archives."""
    for name, archive, align in samples():
        yield f"{name}, align {align}", archives.canonical(archive, align)
    for name in manifest():
        if name != "legal-oddities":  # it stores blocks of zeros, which `canonical` is not told of
            yield name, archives.canonical(archives.parse(golden(name)).archive)
    # 1,024 extents that store nothing share a frame: less, as much and more than that
    for count in (1023, 1024, 1025, 2049):
        clusters = 8 * count
        zeros = archive_of(bytes(clusters * CLUSTER))
        masks = dict.fromkeys(((1, n) for n in range(clusters)), 0)
        yield f"{count} extents of zeros", archives.canonical(zeros, stored=masks)
        for number in (0, 60, 1022 * 8, 1023 * 8 + 7, 1024 * 8):
            if number < clusters:
                stored = {**masks, (1, number): 1}
                plain = archives.canonical(zeros, stored=stored)
                yield f"{count} extents, that of cluster {number} stores", plain


def table_of(plain: bytes) -> SeekTable:
    """Return the seek table of a plain archive cut as it must be."""
    data = frames.compress(plain)
    size = vma_tool.parse_seek_footer(data)
    assert size
    return vma_tool.parse_seek_table(data[-size:], len(data))


def canonical_devices(plain: bytes) -> tuple[int, list[vma_tool.Device]]:
    header = parse_header(plain[: struct.unpack_from(">I", plain, 56)[0]])
    return header.size, sorted(header.devices, key=lambda device: (device.is_vmstate, device))


def masks_of(plain: bytes) -> array.array[int]:
    return array.array(
        "H", struct.unpack(f"<{len(frames.masks(plain)) // 2}H", frames.masks(plain))
    )


class IndexFrames(unittest.TestCase):
    """The index: its frame, and what follows from it."""

    def test_round_trip(self) -> None:
        rng = random.Random(13)
        for name, zstd in roads():
            for count in (0, 1, 1000, 100_000):
                with self.subTest(road=name, count=count):
                    masks = array.array("H", [rng.choice((0, 0xFFFF, 7)) for _ in range(count)])
                    data = vma_tool.pack_index(zstd, masks, 3)
                    self.assertEqual(data[:4], struct.pack("<I", 0x184D2A5D))
                    self.assertEqual(data[8:16], b"VMAINDEX")
                    want = struct.pack(f"<{count}H", *masks)
                    self.assertEqual(decompress(zstd, data[16:], 2 * count), want)
                    self.assertEqual(vma_tool.parse_index(zstd, data, count), masks)

    def test_lies(self) -> None:
        for name, zstd in roads():
            good = vma_tool.pack_index(zstd, array.array("H", range(100)), 3)
            odd = zstd.compress(bytes(199), 3)
            nameless = program(data=bytes(200), test=self)
            for what, data in (
                ("another magic", flipped(good, 0)),
                ("another size", flipped(good, 4)),
                ("another name", flipped(good, 8)),
                ("short", good[:15]),
                ("cut", good[:-1]),
                ("damaged", flipped(good, -1)),
                (
                    "more masks than clusters",
                    vma_tool.pack_index(zstd, array.array("H", bytes(202)), 3),
                ),
                ("half a mask", frames.skippable(0x184D2A5D, b"VMAINDEX" + odd)),
                ("no content size", frames.skippable(0x184D2A5D, b"VMAINDEX" + nameless)),
            ):
                with self.subTest(what, road=name), self.assertRaises(FormatError):
                    vma_tool.parse_index(zstd, data, 100)

    def test_entries(self) -> None:
        """Every cluster is where a simple reader finds it."""
        for name, plain in plains():
            with self.subTest(name):
                header_size, devices = canonical_devices(plain)
                index = vma_tool.index_archive(
                    header_size, devices, masks_of(plain), table_of(plain)
                )
                want: dict[int, list[int]] = {device.dev_id: [] for device in devices}
                for offset in archives.extent_offsets(plain):
                    at = offset + 512
                    for slot in archives.slots(plain, offset):
                        if slot.dev_id:
                            want[slot.dev_id].append(at << 16 | slot.mask)
                            at += BLOCK * bin(slot.mask).count("1")
                self.assertEqual({n: e.tolist() for n, e in index.entries.items()}, want)

    def test_contradictions(self) -> None:
        """Masks that are not those of the frames are found out by the cuts."""
        disk = bytearray(archives.disk(random.Random(3), 130 * CLUSTER))
        disk[24 * CLUSTER : 48 * CLUSTER] = bytes(24 * CLUSTER)
        for align in (4096, 524288, 1048576):
            self.check_contradictions(archives.canonical(archive_of(bytes(disk)), align))
        behind = archives.canonical(archive_of(bytes(CLUSTER) + b"x" * BLOCK))
        with self.assertRaisesRegex(FormatError, "behind the end of device 'drive-scsi1'"):
            header_size, devices = canonical_devices(behind)
            masks = array.array("H", [0, 2])
            vma_tool.index_archive(header_size, devices, masks, table_of(behind))

    def check_contradictions(self, plain: bytes) -> None:
        """Check that masks are refused where the cuts of a plain archive are not theirs."""
        header_size, devices = canonical_devices(plain)
        table = table_of(plain)
        good = masks_of(plain)
        vma_tool.index_archive(header_size, devices, good, table)
        more, fewer, shifted = good[:], good[:], good[:]
        more[good.index(0)] = 1
        fewer[good.index(0xFFFF)] = 0x7FFF
        i, k = good.index(0), len(good) - 1 - good[::-1].index(0xFFFF)
        shifted[i], shifted[k] = good[k], good[i]
        for what, masks in (
            ("a block more", more),
            ("a block less", fewer),
            ("a cluster in another group", shifted),
            ("a cluster less", good[:-1]),
            ("a cluster more", good + array.array("H", [0])),
            ("none", array.array("H")),
        ):
            with self.subTest(what, header=header_size), self.assertRaises(FormatError):
                vma_tool.index_archive(header_size, devices, masks, table)


class Backports(unittest.TestCase):
    """The road through Python's own module, by the package that backports it."""

    def test_there(self) -> None:
        if sys.version_info < (3, 14):
            require_module("backports.zstd", "backports.zstd")
        self.assertIn(ModuleZstd, [type(zstd) for _, zstd in roads()])


if __name__ == "__main__":
    unittest.main()
