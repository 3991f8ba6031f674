"""rescue against the truth: every form of archive under every kind of damage, block by block.

What is not reported must be right, as far as anything can tell: a plain archive has no checksum
over its data, nor has a file that ends before its checksum.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests import archives, frames
from tests.archives import CLUSTER, EXTENT_HEADER, Archive, Cluster, Device
from tests.faults import in_frames
from tests.support import STEP, call_tool
from tests.test_rescue import (
    COMPRESSIONS,
    RescueTest,
    every_cluster,
    program,
    stored_ranges,
    told,
    truth,
)

PAGE = 4096


class Place(NamedTuple):
    """A part of a file, in bytes."""

    start: int
    end: int

    def meets(self, other: Place) -> bool:
        return self.start < other.end and other.start < self.end


@dataclass
class Form:
    """An archive in one form; `pieces` have a checksum each.

    Of each piece: where it is in the file, and where its bytes are in the plain archive.
    """

    name: str
    archive: Archive
    plain: bytes
    data: bytes
    suffix: str
    pieces: list[tuple[Place, Place]]

    @property
    def is_plain(self) -> bool:
        return not self.suffix

    def header_end(self) -> int:
        """Return where damage may begin: behind the archive's header, as far as one can tell."""
        if self.is_plain:
            return archives.extent_offsets(self.plain)[0]
        return self.pieces[0][0].end if len(self.pieces) > 1 else min(13000, len(self.data) // 8)


def content(rng: random.Random, size: int, kind: str) -> bytes:
    if kind == "random":  # what decompressors notice last
        return rng.randbytes(size)
    if kind == "text":
        words = [rng.randbytes(4).hex().encode() for _ in range(300)]
        return b" ".join(rng.choice(words) for _ in range(size // 9 + 1))[:size].ljust(size, b"x")
    return archives.disk(rng, -(-size // CLUSTER) * CLUSTER, kind)[:size]


@functools.cache
def guest(seed: int) -> Archive:
    """Return a guest of some MiB: incompressible, sparse and text, sizes that are odd."""
    rng = random.Random(seed)
    sizes = [
        8 * CLUSTER + 16384,
        rng.randrange(20, 60) * CLUSTER,
        rng.randrange(1, 40) * CLUSTER + rng.randrange(1, 128) * 512,
    ]
    devices = []
    for dev_id, size in enumerate(sizes, 1):
        data = b""
        while len(data) < size:
            part = min(rng.randrange(1, 20) * CLUSTER, size - len(data))
            data += content(rng, part, rng.choice(["random", "text", "sparse", "zeros", "mixed"]))
        devices.append(Device(dev_id, f"drive-scsi{dev_id}", data))
    return Archive(devices, [("qemu-server.conf", b"cores: 2\n")], uuid=rng.randbytes(16))


# What the archive is, and how it is compressed, by the name of the form
FORMS = {
    "as written": ("written", ""),
    "optimized": ("canonical", ""),
    "optimized, 1M": ("canonical 1M", ""),
    "seekable": ("canonical", "seekable"),
    "one frame": ("written", "zst"),
    "frames": ("written", "frames.zst"),
    "pzstd": ("written", "pzstd"),
    "gzip": ("written", "gz"),
    "gzip members": ("written", "members.gz"),
    "lzop": ("written", "lzo"),
    "bzip2": ("written", "bz2"),
    "xz": ("written", "xz"),
    "xz blocks": ("written", "blocks.xz"),
}
GUESTS = 6


@functools.cache
def form(name: str, seed: int) -> Form:
    archive = guest(seed)
    rng = random.Random(seed)
    kind, compression = FORMS[name]
    if kind == "written":
        order = archives.live_order(archive, rng)
        plain = archives.build(archive, order, slots=rng.choice([8, 58, 59]))
    else:
        plain = archives.canonical(archive, 1 << 20 if "1M" in kind else 512 << 10)
    suffix = f".{compression.rpartition('.')[2]}" if compression else ""
    if compression == "seekable":
        data = in_frames(plain)
        parts = frames.split(data)
        stored = [0, *itertools.accumulate(map(len, parts.frames))]
        sizes = [0, *itertools.accumulate(parts.sizes)]
        places = (list(map(Place, ends, ends[1:])) for ends in (stored, sizes))
        return Form(name, archive, plain, data, ".zst", list(zip(*places)))
    if compression == "pzstd":
        data = program("pzstd", "-qc", "-p", "4", data=plain)
        suffix = ".zst"
    else:
        data = COMPRESSIONS[compression](plain) if compression else plain
    whole = Place(0, len(data)), Place(0, len(plain))
    return Form(name, archive, plain, data, suffix, [whole])


@dataclass
class Harm:
    """A damaged file, and where: `hit` are places in the whole file.

    If it `moves`, what follows is not where it was; then only `hit` itself tells where that began.
    With `copies`, bytes of the archive are there again.
    """

    data: bytes
    what: str
    hit: list[Place]
    moves: bool = False
    copies: bool = False


def harmed(target: Form, rng: random.Random) -> Harm:
    """Return the file with one damage."""
    data, size, first = target.data, len(target.data), target.header_end()
    at = rng.randrange(first, size)
    kind = rng.choice(["bit", "bytes", "page", "header", "gone", "added", "swap", "over", "copy"])
    if kind == "bit":
        new = bytes([data[at] ^ 1 << rng.randrange(8)])
        return Harm(data[:at] + new + data[at + 1 :], f"a bit at {at}", [Place(at, at + 1)])
    if kind in ("bytes", "page", "header"):
        count = 512
        if kind == "page":
            at, count = max(at // PAGE, -(-first // PAGE)) * PAGE, PAGE
        elif kind == "header":
            starts = archives.extent_offsets(data) if target.is_plain else []
            starts = starts or [place.start for place, _ in target.pieces[1:-1]] or [at]
            at, count = rng.choice(starts) + rng.randrange(40), rng.choice([1, 3, 16, 100, 512])
        count = max(min(count, size - at), 0)
        new = rng.choice([bytes(count), rng.randbytes(count)])
        changed = data[:at] + new + data[at + count :]
        return Harm(changed, f"{kind}: {count} at {at}", [Place(at, at + count)])
    # The last one is an extent that stores all: behind it, the next header is where it was.
    count = rng.choice([1, 7, 512, 4096, 5000, 65536, 66048, 300000, EXTENT_HEADER + 8 * CLUSTER])
    count = min(count, (size - first) // 3)
    if kind == "gone":
        hit = [Place(at, min(at + count, size))]
        return Harm(data[:at] + data[at + count :], f"{count} gone at {at}", hit, moves=True)
    if kind == "added":
        changed = data[:at] + rng.randbytes(count) + data[at:]
        return Harm(changed, f"{count} added at {at}", [Place(at, at)], moves=True)
    at, other = (rng.randrange(first, size - count) for _ in range(2))
    copied = data[other : other + count]
    if kind == "copy":
        changed, what = data[:at] + copied + data[at:], f"{count} of {other} again at {at}"
        return Harm(changed, what, [Place(at, at)], moves=True, copies=True)
    hit = [Place(at, at + count)]
    changed, what = data[:at] + copied + data[at + count :], f"{count} of {other} over {at}"
    if kind == "swap" and abs(at - other) >= count:
        changed = changed[:other] + data[at : at + count] + changed[other + count :]
        hit.append(Place(other, other + count))
        what = f"{count} of {at} and {other} swapped"
    return Harm(changed, what, hit, copies=True)


class Failing(io.FileIO):
    """A file with pages that cannot be read."""

    bad = Place(0, 0)

    def readinto(self, buffer: Any, /) -> int:
        here = self.tell()
        if self.bad.start <= here < self.bad.end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        room = self.bad.start - here if here < self.bad.start else len(buffer)
        return super().readinto(memoryview(buffer)[:room]) or 0


class AgainstTheTruth(RescueTest):
    """Nothing that is wrong goes unreported, and not much more is reported."""

    def check_one(self, name: str, seed: int) -> None:
        rng = random.Random(f"{name} {seed}")
        target = form(name, rng.randrange(GUESTS))
        how = rng.choice(["file", "file", "pipe", "torn tail", "EIO"])
        harm = harmed(target, rng)
        data, bad = harm.data, Place(0, 0)
        if how == "torn tail":
            data = data[: len(data) - rng.choice([1, 17, 100, PAGE, len(data) // 5])]
        if how == "EIO":
            at = rng.randrange(13, max(len(data) // PAGE, 14)) * PAGE
            bad = Place(at, at + PAGE * rng.choice([1, 1, 3]))
        with self.subTest(form=name, seed=seed, how=how, harm=harm.what, bad=bad, size=len(data)):
            path = self.file(f"a.vma{target.suffix}", data)
            out = self.directory / f"out{self.count}"
            self.count += 1
            with mock.patch.object(Failing, "bad", bad):
                if how == "pipe":
                    answer = call_tool("rescue", "--json", "-", out, input=data)
                else:
                    with mock.patch("io.FileIO", Failing if how == "EIO" else io.FileIO):
                        answer = call_tool("rescue", "--json", path, out)
            self.assertIn(answer.returncode, (0, 3), answer.stderr)
            if b"nothing of one is in it" in answer.stderr:  # the header went with the rest
                return
            report = json.loads(answer.stdout)
            self.check_right(target, report, out, self.unknowable(target, harm, data))
            if how in ("file", "pipe") and not harm.copies:
                self.check_bound(target, harm, told(report, "lost") | told(report, "doubtful"))
            shutil.rmtree(out)

    def unknowable(self, target: Form, harm: Harm, data: bytes) -> set[Cluster]:
        """Return the clusters that may be wrong although nothing can tell."""
        if target.is_plain:
            places = harm.hit
            # Where bytes are missing in the last extent, it looks like a cut.
            at = harm.hit[0].start
            if harm.moves and b"VMAE\0\0" not in data[at:]:
                before = [start for start in archives.extent_offsets(target.plain) if start <= at]
                places = [Place(before[-1], len(target.plain))]
        elif len(data) < len(harm.data) or len(data) == harm.hit[0].start:
            # The file ends before the checksum of the piece that it ends in.
            if len(target.pieces) == 1:
                return every_cluster(target.archive)
            places = [plain for place, plain in target.pieces if place.end > len(data)][:1]
        else:
            places = []
        return {
            cluster
            for cluster, start, end in stored_ranges(target.plain)
            if any(Place(start, end).meets(place) for place in places)
        }

    def check_right(
        self, target: Form, report: dict[str, Any], out: Path, unknowable: set[Cluster]
    ) -> None:
        """Check that all that is not reported is right, and what is lost is zeros."""
        lost, doubtful = told(report, "lost"), told(report, "doubtful")
        files = {
            device["dev_id"]: (out / f"disk-{device['name']}.raw").read_bytes()
            for device in report["devices"]
        }
        has_names = not any("names are missing" in flaw["text"] for flaw in report["damage"])
        for cluster, right in truth(target.archive).items():
            dev_id, number = cluster
            data = files.get(dev_id, b"")[number * CLUSTER : (number + 1) * CLUSTER]
            if not data and not has_names:  # nobody knows how long a disk was
                continue
            data = data.ljust(CLUSTER, b"\0")
            if cluster in lost:
                self.assertTrue(data == bytes(CLUSTER), f"{cluster} is lost, but not zeros")
            elif cluster not in doubtful | unknowable:
                self.assertTrue(data == right, f"{cluster} is wrong, and not reported")

    def check_bound(self, target: Form, harm: Harm, unsure: set[Cluster]) -> None:
        """Check that only extents are reported that the damage has hit, and the one before."""
        places = harm.hit
        if len(target.pieces) > 1:  # frames, and those beside them
            numbers = [
                number
                for number, (place, _) in enumerate(target.pieces)
                if place.meets(Place(places[0].start - 1, places[0].end + 1))
            ]
            if not numbers:
                return
            first, last = max(numbers[0] - 1, 0), min(numbers[-1] + 1, len(target.pieces) - 1)
            places = [Place(target.pieces[first][1].start, target.pieces[last][1].end)]
        elif not target.is_plain:
            return
        starts = archives.extent_offsets(target.plain)
        bounds = list(zip([starts[0], *starts], starts, [*starts[1:], len(target.plain)]))
        allowed = {
            (slot.dev_id, slot.cluster_num)
            for before, start, end in bounds
            if Place(before, end).meets(Place(places[0].start - EXTENT_HEADER, places[0].end + 1))
            or Place(start, end + 1).meets(places[0])
            for slot in archives.slots(target.plain, start)
        }
        self.assertLessEqual(unsure, allowed)

    def test_every_form(self) -> None:
        for name in FORMS:
            for seed in range(0, 40, STEP):
                self.check_one(name, seed)
