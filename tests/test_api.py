"""The API for Python: open an archive, read any bytes of its disks, lay out a canonical one."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import threading
from collections.abc import Iterator

import vma_tool
from tests import archives
from tests.archives import BLOCK, CLUSTER
from tests.damage import damages, good, good_archive
from tests.support import ToolTest, golden, manifest, sha256


class ApiTest(ToolTest):
    def open(self, data: bytes) -> vma_tool.FileInput:
        """Return a file with these bytes, open until the test has ended."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        source = stack.enter_context(vma_tool.open_input(str(self.file("a.vma", data))))
        assert isinstance(source, vma_tool.FileInput)
        return source


class Reading(ApiTest):
    """Archive: any byte of any device."""

    def test_whole_disks(self) -> None:
        for name, want in manifest().items():
            with self.subTest(archive=name):
                archive = vma_tool.Archive(self.open(golden(name)))
                for device in want["devices"]:
                    data = archive.read(device["dev_id"], 0, device["size"])
                    self.assertEqual(sha256(data), device["sha256"])

    def test_any_range(self) -> None:
        """A range is as in a Python slice of the disk, across blocks, clusters and the end."""
        rng = random.Random(9)
        guest = archives.three_disks(rng, vmstate=True)
        data = archives.build(guest, archives.shuffled(guest, rng))
        archive = vma_tool.Archive(self.open(data))
        for device in guest.devices:
            size = len(device.data)
            edges = [0, 1, BLOCK - 1, BLOCK, CLUSTER - 1, CLUSTER, size - BLOCK, size - 1, size]
            ranges = [(start, length) for start in edges for length in (0, 1, BLOCK + 1, CLUSTER)]
            ranges += [(size + 1, 5), (size + 10 * CLUSTER, CLUSTER), (0, 2 * size)]
            ranges += [
                (rng.randrange(size), rng.choice([100, 3 * BLOCK, 5 * CLUSTER])) for _ in range(50)
            ]
            for start, length in ranges:
                with self.subTest(device=device.name, start=start, length=length):
                    found = archive.read(device.dev_id, start, length)
                    self.assertEqual(found, device.data[start : start + length])

    def test_reading_a_stored_zero_block(self) -> None:
        guest = good_archive()
        masks = archives.masks_with_zeros(guest, random.Random(1), 1)
        data = archives.build(guest, archives.reversed_order(guest), store_zero_blocks=masks)
        archive = vma_tool.Archive(self.open(data))
        for device in guest.devices:
            self.assertEqual(archive.read(device.dev_id, 0, len(device.data)), device.data)

    def test_several_threads(self) -> None:
        """Threads may share an archive, also where the system lacks preadv."""
        guest = good_archive()
        disk = guest.devices[1].data
        archive = vma_tool.Archive(self.open(good()))
        wrong: list[int] = []

        def read(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                start = rng.randrange(len(disk))
                if archive.read(2, start, 9000) != disk[start : start + 9000]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_index(self) -> None:
        """An entry is the offset of a cluster's first stored block, and its mask."""
        archive = vma_tool.Archive(self.open(good()))
        want: dict[tuple[int, int], int] = {}
        for at in archives.extent_offsets(good()):
            position = at + 512
            for slot in archives.slots(good(), at):
                if slot.dev_id:
                    want[slot.dev_id, slot.cluster_num] = position << 16 | slot.mask
                    position += bin(slot.mask).count("1") * BLOCK
        for device in archive.header.devices:
            index = archive.index.devices[device.dev_id]
            count = max(num for dev_id, num in want if dev_id == device.dev_id) + 1
            self.assertEqual(index.seen, count)
            for num, entry in enumerate(index.slice(0, count)):
                expected = want[device.dev_id, num]
                self.assertEqual(entry & 0xFFFF, expected & 0xFFFF)
                if entry & 0xFFFF:
                    self.assertEqual(entry, expected)
                self.assertNotEqual(entry, 0)

    def test_errors(self) -> None:
        """A bad archive is a FormatError that knows archive and offset."""
        for damage in damages():
            if damage.offset is not None:
                with self.subTest(damage.name):
                    source = self.open(damage.data)
                    with self.assertRaises(vma_tool.FormatError) as caught:
                        vma_tool.Archive(source)
                    self.assertEqual(caught.exception.offset, damage.offset)
                    self.assertEqual(caught.exception.archive, source.name)
                    self.assertIsInstance(caught.exception, vma_tool.VmaError)

    def test_cut_after_it_was_opened(self) -> None:
        """A file that becomes shorter is an error for who reads what is gone."""
        source = self.open(good())
        archive = vma_tool.Archive(source)
        os.truncate(self.directory / "a.vma", archives.extent_offsets(good())[1])
        with self.assertRaisesRegex(vma_tool.VmaError, "became shorter"):
            archive.read(2, 0, len(good_archive().devices[1].data))
        with self.assertRaisesRegex(vma_tool.VmaError, "changed while it was read"):
            source.check_unchanged()

    def test_no_such_file(self) -> None:
        missing = vma_tool.open_input(str(self.directory / "missing"))
        with self.assertRaisesRegex(vma_tool.VmaError, "No such file"), missing:
            pass


class Extents(ApiTest):
    """read_extents: each extent in the order of the file."""

    def rebuild(self, source: vma_tool.Input, every: int) -> dict[int, bytearray]:
        """Return the disks from the payload of each extent, of which only every n-th is read."""
        header = vma_tool.read_header(source)
        disks = {device.dev_id: bytearray(device.size + CLUSTER) for device in header.devices}
        buffer = memoryview(bytearray(vma_tool.EXTENT_MAX_BLOCKS * BLOCK))
        for number, extent in enumerate(vma_tool.read_extents(source, header)):
            self.assertEqual(source.offset, extent.payload_offset)
            if number % every:
                continue
            payload = vma_tool.read_payload(source, extent, buffer)
            self.assertEqual(len(payload), extent.payload_size)
            for slot in vma_tool.iter_slots(extent):
                stored = bytes(payload[slot.start : slot.start + slot.size])
                start = slot.cluster_num * CLUSTER
                disks[slot.dev_id][start : start + CLUSTER] = vma_tool.expand(stored, slot.mask)
        return disks

    def test_payload(self) -> None:
        for name in manifest():
            if name != "vmstate":
                with self.subTest(archive=name):
                    disks = self.rebuild(self.open(golden(name)), 1)
                    for device in archives.parse(golden(name)).archive.devices:
                        found = disks[device.dev_id][: len(device.data)]
                        self.assertEqual(sha256(bytes(found)), sha256(device.data))

    def test_payload_that_is_not_read(self) -> None:
        """What is left is passed over, in a file and in a pipe."""
        offsets = archives.extent_offsets(good())
        source = self.open(good())
        found = [e.offset for e in vma_tool.read_extents(source, vma_tool.read_header(source))]
        self.assertEqual(found, offsets)
        self.rebuild(self.open(good()), 3)
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        for every in (1, 2, 1000):
            writer = threading.Thread(target=fifo.write_bytes, args=(good(),))
            writer.start()
            with vma_tool.open_input(str(fifo)) as stream:
                self.assertIsNone(stream.size)
                self.rebuild(stream, every)
            writer.join()


class Writing(ApiTest):
    """Layout: the canonical archive, piece by piece."""

    def joined(self, pieces: Iterator[vma_tool.Piece], source: bytes = b"") -> bytes:
        """Return the bytes that pieces stand for."""
        return b"".join(
            source[piece.offset : piece.offset + piece.size]
            if isinstance(piece, vma_tool.Range)
            else bytes(piece)
            for piece in pieces
        )

    def test_from_an_archive(self) -> None:
        """An archive's own spans give what optimize writes."""
        for align, size in archives.ALIGNS.items():
            with self.subTest(align=align):
                archive = vma_tool.Archive(self.open(good()))
                layout = vma_tool.Layout(archive.header, size)
                data = self.joined(layout.pieces(archive.spans(layout.cluster_count)), good())
                self.assertEqual(sha256(data), sha256(archives.canonical(good_archive(), size)))
                written = vma_tool.Archive(self.open(data))
                self.assertTrue(vma_tool.is_canonical(written, size))
                self.assertEqual(layout.digest.digest(), written.index.digest.digest())
                self.assertFalse(vma_tool.is_canonical(archive, size))

    def test_from_nothing(self) -> None:
        """Spans may come from anywhere: here from disks in memory."""
        guest = archives.three_disks(random.Random(4), vmstate=True)
        masks = archives.data_masks(guest)
        header = vma_tool.Header(
            b"any uuid at all!",
            guest.ctime,
            tuple(vma_tool.Config(str(name), data) for name, data in guest.configs),
            tuple(
                vma_tool.Device(d.dev_id, d.raw_name.decode(), len(d.data)) for d in guest.devices
            ),
        )

        def spans(clusters: int) -> Iterator[vma_tool.Span]:
            for device, disk in zip(header.devices, guest.devices):
                for first in range(0, device.cluster_count, clusters):
                    end = min(first + clusters, device.cluster_count)
                    numbers = range(first, end)
                    payload = [
                        b"".join(
                            disk.block(num * 16 + bit)
                            for bit in range(16)
                            if masks[device.dev_id, num] >> bit & 1
                        )
                        for num in numbers
                    ]
                    yield vma_tool.Span(
                        device, first, [masks[device.dev_id, num] for num in numbers], payload
                    )

        layout = vma_tool.Layout(header, vma_tool.ALIGNS["128K"])
        data = self.joined(layout.pieces(spans(layout.cluster_count)))
        self.assertEqual(sha256(data), sha256(archives.canonical(guest)))

    def test_empty_archive(self) -> None:
        """Without devices there is one extent without blocks."""
        header = vma_tool.Header(b"", 7, (vma_tool.Config("a.conf", b"text"),), ())
        layout = vma_tool.Layout(header, 4096)
        want = archives.canonical(archives.Archive(configs=[("a.conf", b"text")], ctime=7), 4096)
        self.assertEqual(self.joined(layout.pieces(())), want)


class Documentation(ToolTest):
    """What a Python caller sees."""

    def test_docstrings_and_types(self) -> None:
        """Each part of the API says what it does, and which types it takes and returns."""
        for item in (
            vma_tool.open_input, vma_tool.read_header, vma_tool.read_extents,
            vma_tool.read_payload, vma_tool.iter_slots, vma_tool.Archive, vma_tool.Archive.read,
            vma_tool.Archive.spans, vma_tool.Layout, vma_tool.Layout.pieces,
            vma_tool.is_canonical, vma_tool.Header, vma_tool.Device, vma_tool.Config,
            vma_tool.Extent, vma_tool.Slot, vma_tool.Span, vma_tool.FormatError, vma_tool.main,
        ):  # fmt: skip
            with self.subTest(item.__qualname__):
                self.assertTrue(inspect.getdoc(item))
                if inspect.isfunction(item):
                    parameters = inspect.signature(item).parameters.keys() - {"self"}
                    self.assertEqual(item.__annotations__.keys(), parameters | {"return"})
