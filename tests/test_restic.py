"""What restic stores of a guest's second day: an optimized archive costs less than its raw disk.

restic ends a chunk behind 64 bytes of zeros, if it has 512 KiB by then, as in each header of an
extent with data; elsewhere it does so by chance, about once in a megabyte.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
from typing import Any

from tests import archives
from tests.archives import BLOCK, EXTENT_HEADER, KIB, MIB, Archive, Device
from tests.support import ToolTest, require_program

SIZE = 144 * MIB  # of the disk
DATA_RUN = 1024  # blocks, on average, that lie together, and as many behind them do not
CHANGES = 24  # places that the second day writes to
MOST = 0.9  # of what the raw disks cost
EXTENT = EXTENT_HEADER + 512 * KIB
USED_SLOTS_END = 40 + 8 * 8  # in the header of a whole extent
SMALLEST, WINDOW = 512 * KIB, 64  # of a chunk of restic's, and of what it looks at to end one


def file_content(rng: random.Random, size: int) -> bytes:
    """Return what does not compress, or text that compresses by half."""
    if rng.random() < 0.5:
        return rng.randbytes(size)
    return rng.randbytes(size // 2).hex().encode()


@functools.cache
def disks() -> tuple[bytes, bytes]:
    """Return a disk, half of it data in runs, and the same one a day later."""
    rng = random.Random(20)
    disk = bytearray(SIZE)
    used: list[int] = []
    at = 0
    while at < SIZE // BLOCK:
        count = min(1 + int(rng.expovariate(1 / DATA_RUN)), SIZE // BLOCK - at)
        disk[at * BLOCK : (at + count) * BLOCK] = file_content(rng, count * BLOCK)
        used += range(at, at + count)
        at += count + 1 + int(rng.expovariate(1 / DATA_RUN))
    before = bytes(disk)
    for _ in range(CHANGES):  # within files, and now and then behind their end
        at, count = rng.choice(used), rng.choice([1, 1, 2, 4, 16])
        count = min(count, SIZE // BLOCK - at)
        disk[at * BLOCK : (at + count) * BLOCK] = file_content(rng, count * BLOCK)
    at = rng.choice(used)
    disk[at * BLOCK : (at + 8) * BLOCK] = bytes(8 * BLOCK)  # a file that is gone
    return before, bytes(disk[:SIZE])


def expected_chunk(data: bytes, start: int) -> int:
    """Return where a chunk that begins at `start` ends if nothing but zeros ends it."""
    zeros = data.find(bytes(WINDOW), start + SMALLEST - WINDOW)
    return len(data) if zeros < 0 else zeros + WINDOW


class Restic(ToolTest):
    def setUp(self) -> None:
        # It takes longest in restic: a run under one version of Python is enough.
        if os.environ.get("VMA_TOOL_RECIPES") == "no":
            self.skipTest("what restic stores is looked at under another Python")
        super().setUp()
        self.program = require_program("restic", "restic")
        self.env = {
            **os.environ,
            "RESTIC_PASSWORD": "secret",
            "RESTIC_CACHE_DIR": str(self.directory / "cache"),
            "HOME": str(self.directory),
        }

    def restic(self, repository: str, *args: str) -> Any:
        """Run restic in the test's directory; return what it prints, parsed if it is JSON."""
        command = [self.program, "-q", "-r", repository, *args]
        done = subprocess.run(
            command, cwd=self.directory, env=self.env, capture_output=True, check=True
        )
        text = done.stdout.decode()
        return json.loads(text) if text.startswith(("{", "[")) else text.split()

    def stored(self, repository: str) -> int:
        """Return the size of all that a repository holds."""
        files = (path for path in (self.directory / repository).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def archive(self, day: int, disk: bytes) -> bytes:
        """Optimize a live backup of the disk; return the archive."""
        rng = random.Random(day)
        guest = Archive(
            [Device(1, "drive-scsi0", disk)],
            [("qemu-server.conf", b"cores: 2\nscsi0: local:100/disk,size=144M\n")],
            uuid=rng.randbytes(16),
            ctime=1763600000 + 86400 * day,
        )
        source, output = self.directory / "source.vma", self.directory / "a.vma"
        with open(source, "wb") as file:
            file.writelines(archives.build_parts(guest, archives.live_order(guest, rng)))
        self.ok("optimize", "-q", "--force", source, output)
        source.unlink()
        return output.read_bytes()

    def chunks(self, repository: str, name: str) -> list[int]:
        """Return the lengths of a file's chunks, in the only snapshot of a repository."""
        (snapshot,) = self.restic(repository, "snapshots", "--json")
        nodes = self.restic(repository, "cat", "blob", snapshot["tree"])["nodes"]
        (content,) = (node["content"] for node in nodes if node["name"] == name)
        lengths = {}
        for number in self.restic(repository, "list", "index"):
            for pack in self.restic(repository, "cat", "index", number)["packs"]:
                for blob in pack["blobs"]:
                    # 32 bytes are the nonce and the MAC; older repositories compress nothing.
                    plain = blob.get("uncompressed_length") or blob["length"] - 32
                    lengths[blob["id"]] = plain
        return [lengths[number] for number in content]

    def check_chunks(self, data: bytes, lengths: list[int]) -> None:
        """Check that the chunks of an archive are its extents.

        From one header to the next: but not where an extent ends in zeros, as these end a chunk.
        """
        self.assertEqual(sum(lengths), len(data))
        stores = {
            at
            for at in archives.extent_offsets(data)
            if int.from_bytes(data[at + 6 : at + 8], "big")
        }
        start = chances = whole = 0
        for length in lengths:
            end = expected_chunk(data, start)
            header = start - USED_SLOTS_END - WINDOW
            if header in stores and header + EXTENT in stores:
                tail = data[start + SMALLEST - WINDOW : header + EXTENT]
                if bytes(WINDOW) not in tail:
                    self.assertEqual(end, start + EXTENT)
                    whole += 1
            if start + length != end:
                self.assertLess(start + length, end)
                chances += 1
            start += length
        self.assertLess(chances, len(lengths) // 20)
        self.assertGreater(whole, len(stores) * 0.7)
        self.assertGreater(lengths.count(EXTENT), len(lengths) * 0.7)

    def test_second_day(self) -> None:
        """It adds at most 0.9 x what the raw disk adds, and its chunks are the extents."""
        added = {}
        for repository in ("raw", "optimized"):
            self.restic(repository, "init")
        for day, disk in enumerate(disks()):
            (self.directory / "disk.raw").write_bytes(disk)
            data = self.archive(day, disk)
            for repository, name in (("raw", "disk.raw"), ("optimized", "a.vma")):
                before = self.stored(repository)
                self.restic(repository, "backup", name)
                added[repository] = self.stored(repository) - before
            if day == 0:
                self.assertGreater(added["raw"], 48 * MIB)
                self.check_chunks(data, self.chunks("optimized", "a.vma"))
        self.assertGreater(added["raw"], MIB)
        self.assertLess(added["optimized"], MOST * added["raw"], added)
