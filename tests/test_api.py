"""The API for Python: open an archive, read any bytes of its disks, take it part by part."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import threading
from collections.abc import Iterable
from typing import Any

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

    def open_stream(self, data: bytes) -> vma_tool.Input:
        """Return a pipe from which these bytes come, open until the test has ended."""
        fifo = self.directory / f"fifo{len(os.listdir(self.directory))}"
        os.mkfifo(fifo)  # one for each: of two readers of one, either may get the bytes

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError):
                fifo.write_bytes(data)

        writer = threading.Thread(target=feed)
        writer.start()
        stack = contextlib.ExitStack()
        source = stack.enter_context(vma_tool.open_input(str(fifo)))
        self.addCleanup(writer.join)
        self.addCleanup(stack.close)
        return source


class Ranges(ApiTest):
    """Contents.read_range: any byte of any device."""

    def contents(self, data: bytes) -> Any:
        contents = vma_tool.Contents(self.open(data))
        contents.complete()
        return contents

    def test_whole_disks(self) -> None:
        for name, want in manifest().items():
            with self.subTest(archive=name):
                contents = self.contents(golden(name))
                for device in want["devices"]:
                    data = contents.read_range(device["dev_id"], 0, device["size"])
                    self.assertEqual(sha256(data), device["sha256"])

    def test_any_range(self) -> None:
        """A range is as in a Python slice of the disk, across blocks, clusters and the end."""
        rng = random.Random(9)
        guest = archives.three_disks(rng, vmstate=True)
        contents = self.contents(archives.build(guest, archives.shuffled(guest, rng)))
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
                    found = contents.read_range(device.dev_id, start, length)
                    self.assertEqual(sha256(found), sha256(device.data[start : start + length]))

    def test_stored_zero_blocks(self) -> None:
        guest = good_archive()
        masks = archives.masks_with_zeros(guest, random.Random(1), 1)
        data = archives.build(guest, archives.reversed_order(guest), store_zero_blocks=masks)
        contents = self.contents(data)
        for device in guest.devices:
            found = contents.read_range(device.dev_id, 0, len(device.data))
            self.assertEqual(sha256(found), sha256(device.data))

    def test_several_threads(self) -> None:
        """Threads may share an archive, also where the system lacks preadv."""
        disk = good_archive().devices[1].data
        contents = self.contents(good())
        wrong: list[int] = []

        def read(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                start = rng.randrange(len(disk))
                if contents.read_range(2, start, 9000) != disk[start : start + 9000]:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_errors(self) -> None:
        """A bad archive is a FormatError that knows archive and offset."""
        for damage in damages():
            if damage.offset is not None:
                with self.subTest(damage.name):
                    source = self.open(damage.data)
                    with self.assertRaises(vma_tool.FormatError) as caught:
                        vma_tool.Contents(source).complete()
                    self.assertEqual(caught.exception.offset, damage.offset)
                    self.assertEqual(caught.exception.archive, source.name)
                    self.assertIsInstance(caught.exception, vma_tool.VmaError)

    def test_cut_after_it_was_opened(self) -> None:
        """A file that becomes shorter is an error for who reads what is gone."""
        source = self.open(good())
        contents = vma_tool.Contents(source)
        contents.complete()
        os.truncate(self.directory / "a.vma", archives.extent_offsets(good())[1])
        with self.assertRaisesRegex(vma_tool.VmaError, "became shorter"):
            contents.read_range(2, 0, len(good_archive().devices[1].data))
        with self.assertRaisesRegex(vma_tool.VmaError, "changed while it was read"):
            source.check_unchanged()

    def test_no_such_file(self) -> None:
        missing = vma_tool.open_input(str(self.directory / "missing"))
        with self.assertRaisesRegex(vma_tool.VmaError, "No such file"), missing:
            pass


class Index(ApiTest):
    """Contents.index: where each cluster is."""

    def test_entries(self) -> None:
        """An entry is the offset of a cluster's first stored block, and its mask."""
        contents = vma_tool.Contents(self.open(good()))
        contents.complete()
        want: dict[tuple[int, int], int] = {}
        for at in archives.extent_offsets(good()):
            position = at + 512
            for slot in archives.slots(good(), at):
                if slot.dev_id:
                    want[slot.dev_id, slot.cluster_num] = position << 16 | slot.mask
                    position += bin(slot.mask).count("1") * BLOCK
        for device in good_archive().devices:
            index = contents.index.devices[device.dev_id]
            self.assertEqual(index.disk_size, len(device.data))
            stored = sum(bin(mask & 0xFFFF).count("1") for (dev_id, _), mask in want.items()
                         if dev_id == device.dev_id)  # fmt: skip
            self.assertEqual(index.stored_size, stored * BLOCK)
            for num in range(device.cluster_count):
                entry, expected = index.entries[num], want[device.dev_id, num]
                self.assertEqual(entry & 0xFFFF, expected & 0xFFFF)
                if entry & 0xFFFF:
                    self.assertEqual(entry, expected)
                self.assertNotEqual(entry, 0)


def used_buffer() -> memoryview:
    """Return a buffer that was used before: what it holds must not get into a disk."""
    return memoryview(bytearray(b"\xff" * vma_tool.BUFFER_SIZE))


class Parts(ApiTest):
    """Parts: consecutive clusters, as they lie on the disk."""

    def disks(self, archive: archives.Archive, parts: Iterable[Any]) -> dict[int, str]:
        """Return the digests of the disks that parts make, each of which is checked."""
        disks = {device.dev_id: bytearray() for device in archive.devices}
        devices = {device.dev_id: device for device in archive.devices}
        for dev_id, device in devices.items():
            disks[dev_id] = bytearray(device.cluster_count * CLUSTER)
        for part in parts:
            device = devices[part.device.dev_id]
            self.assertEqual(part.image is None, not any(part.masks))
            whole = part.whole()
            if whole is not None:
                self.assertEqual(len(whole), part.size)
                disks[device.dev_id][part.offset : part.offset + part.size] = whole
            # what lies behind the device's end is not marked
            blocks = device.block_count - part.first * 16
            marked = sum(mask << 16 * i for i, mask in enumerate(part.masks))
            self.assertEqual(marked >> max(blocks, 0), 0)
        return {d.dev_id: sha256(bytes(disks[d.dev_id][: len(d.data)])) for d in archive.devices}

    def both(self, data: bytes) -> tuple[vma_tool.Contents, vma_tool.Contents]:
        """Return an archive in a file, and in a stream of which little may wait in memory."""
        stream = vma_tool.Stream(self.open_stream(data), memory=1 << 16)
        return vma_tool.Contents(self.open(data)), stream

    def test_plans(self) -> None:
        """All parts in canonical order, from a file and from a stream that spills."""
        for name in manifest():
            archive = archives.parse(golden(name)).archive
            want = {device.dev_id: sha256(device.data) for device in archive.devices}
            order = [d.dev_id for d in sorted(archive.devices, key=lambda d: d.is_vmstate)]
            for count in (1, 8, 16, 48, 56, 58):
                for contents in self.both(golden(name)):
                    with self.subTest(archive=name, count=count, kind=type(contents).__name__):
                        parts = []
                        for plan in contents.plans(count):
                            part = contents.read(plan, used_buffer())
                            self.assertEqual((part.device, part.first), (plan.device, plan.first))
                            parts.append(part)
                        seen = list(dict.fromkeys(part.device.dev_id for part in parts))
                        self.assertEqual(seen, order)
                        for part, following in zip(parts, parts[1:]):
                            if part.device.dev_id == following.device.dev_id:
                                self.assertEqual(part.first + len(part.masks), following.first)
                                self.assertEqual(len(part.masks), count)
                        self.assertEqual(self.disks(archive, parts), want)

    def test_chosen(self) -> None:
        for contents in (
            vma_tool.Contents(self.open(good())),
            vma_tool.Stream(self.open_stream(good())),
        ):
            parts = [contents.read(plan, used_buffer()) for plan in contents.plans(16, chosen={2})]
            self.assertEqual({part.device.dev_id for part in parts}, {2})
            archive = archives.Archive([good_archive().devices[1]])
            self.assertEqual(self.disks(archive, parts), {2: sha256(archive.devices[0].data)})

    def test_as_stored(self) -> None:
        """In the archive's own order, from a file and from a stream."""
        archive = good_archive()
        order = archives.parse(good()).order
        for contents in (
            vma_tool.Contents(self.open(good())),
            vma_tool.Stream(self.open_stream(good())),
        ):
            with self.subTest(type(contents).__name__):
                found, copies = [], []
                buffer = used_buffer()
                extents = contents.extents()
                for part in (p for e in extents for p in contents.read_extent(e, buffer)):
                    numbers = range(part.first, part.first + len(part.masks))
                    found += [(part.device.dev_id, number) for number in numbers]
                    # A part may end behind its device's end, and what it does not store is not set.
                    whole = part.whole()
                    image = None if whole is None else memoryview(bytearray(part.image or b""))
                    copies.append(part._replace(image=image))
                self.assertEqual(set(found), set(order))
                self.assertEqual(len(found), len(order))
                want = {device.dev_id: sha256(device.data) for device in archive.devices}
                self.assertEqual(self.disks(archive, copies), want)


class Extents(ApiTest):
    """read_extents: each extent in the order of the file."""

    def test_payload_that_is_not_read(self) -> None:
        """It is passed over, in a file and in a pipe."""
        offsets = archives.extent_offsets(good())
        for source in (self.open(good()), self.open_stream(good())):
            self.assertEqual(source.size is None, not isinstance(source, vma_tool.FileInput))
            header = vma_tool.read_header(source)
            found = [extent.offset for extent in vma_tool.read_extents(source, header)]
            self.assertEqual(found, offsets)


class Documentation(ToolTest):
    """What a Python caller sees."""

    def test_docstrings_and_types(self) -> None:
        """Each part of the API says what it does, and which types it takes and returns."""
        for item in (
            vma_tool.open_input, vma_tool.read_header, vma_tool.read_extents,
            vma_tool.iter_slots, vma_tool.Header, vma_tool.Device, vma_tool.Config,
            vma_tool.Extent, vma_tool.Slot, vma_tool.FormatError, vma_tool.main,
        ):  # fmt: skip
            with self.subTest(item.__qualname__):
                self.assertTrue(inspect.getdoc(item))
                if inspect.isfunction(item):
                    parameters = inspect.signature(item).parameters.keys() - {"self"}
                    self.assertEqual(item.__annotations__.keys(), parameters | {"return"})
