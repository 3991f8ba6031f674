"""What holds for any archive, tried on many, against the independent builder.

With x an archive of any devices in any order, written by tests/archives.py:
unpack(x) gives the disks, optimize(x) the canonical bytes; unpack(optimize(x)) == unpack(x);
optimize(optimize(x)) == optimize(x); pack(unpack(optimize(x))) == optimize(x) unless x stores
blocks of zeros; `verify --against` and `--digest` say so, and say where one changed bit is.
"""

from __future__ import annotations

import json
import random
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import archives
from tests.archives import ALIGNS, BLOCK, CLUSTER, EXTENT_HEADER, SECTOR, Archive, Device
from tests.support import ALL, BAD, Argument, ToolTest, call_tool, sha256, snapshot

SEED = 20251120
ROUNDS = 30
FLIPS = 45


@dataclass
class Sample:
    """An archive of the builder: what it holds, which blocks it stores, its bytes."""

    archive: Archive
    masks: archives.Masks
    data: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """What unpack has to write, apart from vma.json."""
        configs = {str(name): data for name, data in self.archive.configs}
        return {**configs, **{d.raw_name.decode(): d.data for d in self.archive.devices}}


def any_archive(rng: random.Random) -> Archive:
    """Make an archive of 0 to 254 devices of any sizes, perhaps with RAM state."""
    count = rng.choice([0, 1, 1, 2, 3, 4, 7, rng.randint(8, 60), 254])
    largest = {0: 0, 1: 60, 2: 30, 3: 30, 4: 20}.get(count, 3) * CLUSTER
    devices = []
    for dev_id in sorted(rng.sample(range(1, 255), count)):
        near = rng.choice([BLOCK, CLUSTER, 2 * CLUSTER, 58 * CLUSTER])
        any_size = rng.randrange(SECTOR, largest + 1, SECTOR)
        size = rng.choice([SECTOR, near - SECTOR, near, near + SECTOR, any_size])
        pattern = rng.choice(["mixed", "full", "sparse", "zeros"])
        data = archives.disk(rng, min(size, largest), pattern)
        devices.append(Device(dev_id, f"drive-scsi{dev_id}", data))
    if devices and rng.random() < 0.4:
        stated = rng.randrange(SECTOR, 3 * CLUSTER + 1, SECTOR)
        more = rng.choice([0, 0, 1, 60])
        data = archives.disk(rng, (-(-stated // CLUSTER) + more) * CLUSTER, "sparse")
        victim = rng.randrange(len(devices))
        devices[victim] = Device(devices[victim].dev_id, "vmstate", data, stated)
    configs: list[archives.Config] = [
        (f"{number}.conf", rng.randbytes(rng.choice([0, 1, 700, 65535])))
        for number in range(rng.choice([0, 1, 2, 5]))
    ]
    return Archive(
        devices,
        configs,
        uuid=rng.randbytes(16),
        ctime=rng.getrandbits(40) - (1 << 39),
        names_first=rng.random() < 0.3,
        config_slots=sorted(rng.sample(range(256), len(configs))),
    )


def any_sample(rng: random.Random, zero_blocks: bool) -> Sample:
    """Make an archive in any order, with few or many clusters an extent."""
    archive = any_archive(rng)
    order = rng.choice(
        [
            archives.in_order(archive),
            archives.reversed_order(archive),
            archives.interleaved(archive),
            archives.vmstate_first(archive),
            archives.shuffled(archive, rng),
            archives.live_order(archive, rng),
        ]
    )
    if zero_blocks:
        masks = archives.masks_with_zeros(archive, rng, rng.choice([0.02, 0.5, 1.0]))
    else:
        masks = archives.data_masks(archive)
    empty_extents, empty_slots = rng.random() < 0.2, rng.random() < 0.2
    slots = rng.choice([1, 7, 58, 59])
    data = archives.build(archive, order, slots, masks, empty_extents, empty_slots)
    return Sample(archive, masks, data)


def samples(count: int = ROUNDS) -> Iterator[tuple[int, random.Random, Sample]]:
    """Yield so many archives, every second one with stored blocks of zeros."""
    for number in range(count):
        rng = random.Random(f"{SEED}:{number}")
        yield number, rng, any_sample(rng, zero_blocks=number % 2 == 1)


class RoundTrips(ToolTest):
    """Each road gives the same bytes."""

    def path(self, name: str) -> Path:
        return self.directory / name

    def test_roads(self) -> None:
        for number, rng, sample in samples(ROUNDS if ALL else 6):
            with self.subTest(sample=number, devices=len(sample.archive.devices)):
                self.check_roads(rng, sample, zero_blocks=number % 2 == 1)
                for path in self.directory.rglob("*"):
                    if path.is_file():
                        path.unlink()

    def check_roads(self, rng: random.Random, sample: Sample, zero_blocks: bool) -> None:
        align = rng.choice(sorted(ALIGNS))
        source, once, twice = self.path("x.vma"), self.path("once.vma"), self.path("twice.vma")
        source.write_bytes(sample.data)
        wanted = sha256(archives.canonical(sample.archive, ALIGNS[align], sample.masks))

        self.ok("optimize", "-q", "--align", align, source, once)
        self.assertEqual(sha256(once), wanted, "optimize")
        memory = rng.choice(["0", "100K", "256M"])
        arguments = ["optimize", "-q", "--align", align, "--memory", memory]
        self.ok(*arguments, "-", self.path("stream.vma"), input=sample.data)
        self.assertEqual(sha256(self.path("stream.vma")), wanted, "optimize from a stream")
        self.ok("optimize", "-q", "--align", align, once, twice)
        self.assertEqual(sha256(twice), wanted, "optimize twice")
        before = snapshot(self.directory)
        self.ok("optimize", "--align", align, "-q", once)
        self.assertEqual(snapshot(self.directory), before, "optimize in place, twice")

        for name, archive, data in (
            ("of x", source, None),
            ("of x, a stream", "-", sample.data),
            ("of optimize(x)", once, None),
        ):
            directory = self.path(f"unpack {name}")
            self.ok("unpack", "-q", archive, directory, input=data)
            found = {path.name: path.read_bytes() for path in directory.iterdir()}
            description = json.loads(found.pop("vma.json"))
            self.assertEqual(description["ctime"], sample.archive.ctime)
            self.assertEqual(found.keys(), sample.files.keys())
            for file, content in sample.files.items():
                self.assertEqual(sha256(found[file]), sha256(content), f"unpack {name}: {file}")

        packed = self.path("packed.vma")
        self.ok("pack", "-q", "--align", align, self.path("unpack of optimize(x)"), packed)
        if not zero_blocks:
            self.assertEqual(sha256(packed), wanted, "pack(unpack(optimize(x)))")
        for one, other in ((source, once), (once, source), (source, packed), (packed, once)):
            self.ok("verify", "-q", one, "--against", other)
        self.ok("verify", "-q", "-", "--against", once, input=sample.data)
        self.ok("verify", "-q", once, "--against", "-", input=sample.data)

    def test_digests(self) -> None:
        """verify --digest is what sha256sum says of the restored files, in any order."""
        for number, _, sample in samples(20):
            with self.subTest(sample=number):
                source = self.file("x.vma", sample.data)
                wanted = {name: sha256(data) for name, data in sample.files.items()}
                for archive, data in ((source, None), ("-", sample.data)):
                    lines = self.ok("verify", "--digest", archive, input=data).splitlines()
                    found = [line.partition("  ") for line in lines]
                    self.assertEqual({name: digest for digest, _, name in found}, wanted)


@dataclass
class Stored:
    """A stored block: where in the archive, of which device, where on its disk."""

    offset: int
    device: Device
    disk_offset: int

    @property
    def size(self) -> int:
        """How many of its bytes are restored."""
        if self.device.is_vmstate:
            return BLOCK
        return min(BLOCK, self.device.stated_size - self.disk_offset)


def stored_blocks(sample: Sample) -> list[Stored]:
    devices = {device.dev_id: device for device in sample.archive.devices}
    found = []
    for at in archives.extent_offsets(sample.data):
        position = at + EXTENT_HEADER
        for slot in archives.slots(sample.data, at):
            for bit in range(16) if slot.dev_id else ():
                if slot.mask >> bit & 1:
                    disk_offset = slot.cluster_num * CLUSTER + bit * BLOCK
                    found.append(Stored(position, devices[slot.dev_id], disk_offset))
                    position += BLOCK
    return found


class ChangedBits(ToolTest):
    """verify --against finds every changed bit of a disk, and says where it is."""

    def test_one_to_four_bits(self) -> None:
        done = 0
        for number, rng, sample in samples(ROUNDS if ALL else 6):
            blocks = stored_blocks(sample)
            if not blocks:
                continue
            good = self.file("good.vma", sample.data)
            for _ in range(3):
                with self.subTest(sample=number):
                    self.check_flips(rng, sample, blocks, good)
                    done += 1
        self.assertGreater(done, FLIPS if ALL else 10)

    def check_flips(
        self, rng: random.Random, sample: Sample, blocks: list[Stored], good: Path
    ) -> None:
        data = bytearray(sample.data)
        changed: dict[str, list[int]] = {}
        for block in rng.sample(blocks, min(len(blocks), rng.choice([1, 1, 2, 4]))):
            at = rng.choice([0, block.size - 1, rng.randrange(block.size)])
            data[block.offset + at] ^= 1 << rng.randrange(8)
            changed.setdefault(block.device.raw_name.decode(), []).append(block.disk_offset + at)
        bad = self.file("bad.vma", bytes(data))
        self.ok("verify", "-q", bad)  # the format has no checksum over the disks
        tries: list[tuple[list[Argument], bytes | None]] = [
            ([good, "--against", bad], None),
            ([bad, "--against", good], None),
            (["-", "--against", good], bytes(data)),
        ]
        for args, stream in tries:
            answer = call_tool("verify", "--json", *args, input=stream)
            self.assertEqual(answer.returncode, BAD, answer.stderr)
            differences = json.loads(answer.stdout)["differences"]
            self.assertEqual(len(differences), len(changed), differences)
            for name, offsets in changed.items():
                clusters = len({offset // CLUSTER for offset in offsets})
                (line,) = (text for text in differences if f"'{name}'" in text)
                self.assertRegex(line, rf"\b{clusters} clusters? differ")
                self.assertRegex(line, rf"\b{min(offsets)}\b")

    def test_behind_the_end(self) -> None:
        """What the last block holds behind the device's end is restored by nobody."""
        rng = random.Random(SEED)
        archive = Archive([Device(1, "drive-scsi0", archives.disk(rng, CLUSTER + 5120, "full"))])
        data = archives.build(archive)
        good = self.file("good.vma", data)
        for at, same in ((-1, True), (-(2 * BLOCK - 5120), True), (-(2 * BLOCK - 5119), False)):
            changed = bytearray(data)
            changed[at] ^= 1
            bad = self.file("bad.vma", bytes(changed))
            with self.subTest(at=at):
                answer = call_tool("verify", "-q", bad, "--against", good)
                self.assertEqual(answer.returncode, 0 if same else BAD)

    def test_other_headers(self) -> None:
        """A config, a name, a size, a dev_id or the time that differs is found too."""
        rng = random.Random(SEED)
        disk = archives.disk(rng, 3 * CLUSTER)

        def variant(
            dev_id: int = 1, name: str = "drive-scsi0", size: int = 3 * CLUSTER, **kw: Any
        ) -> Path:
            settings: dict[str, Any] = {"configs": [("a.conf", b"x")], **kw}
            archive = Archive([Device(dev_id, name, disk[:size], size)], **settings)
            data = archives.build(archive, archives.shuffled(archive, rng))
            return self.file(f"{rng.getrandbits(64)}.vma", data)

        one = variant()
        for what, other, same in (
            ("uuid and order", variant(uuid=rng.randbytes(16)), True),
            ("dev_id", variant(dev_id=2), False),
            ("device name", variant(name="drive-scsi1"), False),
            ("device size", variant(size=3 * CLUSTER - SECTOR), False),
            ("config data", variant(configs=[("a.conf", b"y")]), False),
            ("config name", variant(configs=[("b.conf", b"x")]), False),
            ("one config more", variant(configs=[("a.conf", b"x"), ("b.conf", b"x")]), False),
            ("ctime", variant(ctime=7), False),
        ):
            with self.subTest(what):
                for pair in ((one, other), (other, one)):
                    answer = call_tool("verify", "-q", pair[0], "--against", pair[1])
                    self.assertEqual(answer.returncode, 0 if same else BAD)
        self.ok("verify", "-q", "--ignore-ctime", one, "--against", variant(ctime=7))


if __name__ == "__main__":
    unittest.main()
