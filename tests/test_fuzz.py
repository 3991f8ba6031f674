"""The structural fuzzer's own tests, a bounded run of it, and what fuzzing has found so far."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import BLOCK, HEADER, Archive, Device
from tests.damage import damages, good
from tests.faults import memory_directory
from tests.support import ALL, FEW, STEP, ToolTest, golden, manifest, require_program, sha256
from tests.tools import fuzz
from tests.tools.fuzz import Draft, FindingError, Sandbox, bytes_of, judge

CASES = 2000 // STEP
SEED = 20251120


def sandbox_in_memory(test: unittest.TestCase) -> Sandbox:
    directory = tempfile.mkdtemp(prefix="vma-tool-test-", dir=memory_directory())
    test.addCleanup(shutil.rmtree, directory, ignore_errors=True)
    return Sandbox(Path(directory))


class Judge(unittest.TestCase):
    """What the tool is measured against has to be right itself."""

    def test_golden_archives(self) -> None:
        """They restore to what the manifest says."""
        for golden_name, want in manifest().items():
            with self.subTest(archive=golden_name):
                contents = judge(golden(golden_name)).contents
                assert contents is not None
                archive = contents.archive
                self.assertEqual((archive.uuid.hex(), archive.ctime), (want["uuid"], want["ctime"]))
                self.assertEqual(
                    {bytes_of(name).decode(): sha256(data) for name, data in archive.configs},
                    want["configs"],
                )
                self.assertEqual(
                    [
                        (d.dev_id, d.raw_name.decode(), d.size, sha256(d.data))
                        for d in archive.devices
                    ],
                    [(d["dev_id"], d["name"], d["size"], d["sha256"]) for d in want["devices"]],
                )

    def test_damages(self) -> None:
        """Each damaged archive of the table is refused, the sound one is not."""
        self.assertIsNotNone(judge(good()).contents)
        for damage in damages():
            with self.subTest(damage.name):
                self.assertIsNone(judge(damage.data).contents)

    def test_taken_apart(self) -> None:
        """A draft without a mutation is the archive that it was made of."""
        for name in manifest():
            draft = Draft.of(golden(name))
            self.assertEqual(draft.pack(), golden(name))
            for part in draft.parts:
                fuzz.put_cells(part, fuzz.cells_of(part))
            self.assertEqual(draft.pack(), golden(name))


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([data[-1] ^ 1]))


class SandboxFinds(ToolTest):
    """The sandbox sees what it is there for; each fault is put into the tool on purpose."""

    def found(self, data: bytes, command: str, fault: Callable[[], object]) -> str:
        """Return what is found if `fault` is called in the tool in the middle of a command."""
        real = vma_tool.read_header

        def read_header(*args: Any, **kw: Any) -> vma_tool.Header:
            fault()
            return real(*args, **kw)

        with (
            mock.patch.object(vma_tool, "read_header", read_header),
            mock.patch.object(fuzz, "CLOSE_LIMIT", 0.5),
            self.assertRaises(FindingError) as caught,
        ):
            Sandbox(self.directory).check(data, [command])
        return str(caught.exception)

    def test_faults(self) -> None:
        outside = self.directory / "outside"
        kept: list[object] = []

        def fail() -> None:
            raise ValueError("a traceback")

        for what, says, fault in (
            ("an exception", "ValueError: a traceback", fail),
            ("a file outside", "there is .*'outside'", lambda: outside.write_text("x")),
            ("the source changed", "changed", lambda: flip(self.directory / "in.vma")),
            ("a file left open", "left open: ", lambda: kept.append(os.dup(0))),
            ("memory", "took 1.. MiB", lambda: kept.append(b"x" * (100 << 20))),
            ("a line more", "standard error", lambda: vma_tool.print_error("x")),
        ):  # type: tuple[str, str, Callable[[], object]]
            with self.subTest(what):
                if what == "memory" and not any(fuzz.Memory.read()):
                    self.skipTest("the system does not tell its peak")
                self.assertRegex(self.found(golden("odd-size"), "scan", fault), says)
                for fd in kept:
                    if isinstance(fd, int):
                        os.close(fd)
                kept.clear()

    def test_wrong_verdict(self) -> None:
        """A damaged archive that passes, or a good one that does not, is a finding."""
        cut = golden("odd-size")[: -BLOCK - 512]
        sandbox = Sandbox(self.directory)
        no_extents = mock.patch.object(vma_tool, "read_extents", lambda source, header: iter(()))
        nothing_missing = mock.patch.object(vma_tool.Index, "finish", lambda self: None)
        passes = self.assertRaisesRegex(FindingError, "cut inside an extent; the tool says: ")
        with no_extents, nothing_missing, passes:
            sandbox.check(cut, ["verify"])
        fails = self.assertRaisesRegex(FindingError, "restores completely; the tool says: vma")
        with no_extents, fails:
            sandbox.check(golden("odd-size"), ["verify stream"])


def behind_the_end(data: bytes) -> bytes:
    """Return an archive whose last block holds something behind the end of its device."""
    return data[:-1] + b"x"


def odd_size() -> archives.Archive:
    return archives.parse(golden("odd-size")).archive


def one_sector_less(name: str, dev_id: int) -> bytes:
    """Return a golden archive with a device that ends a sector earlier, inside a stored block."""
    data = golden(name)
    at = 4096 + 32 * dev_id + 8
    (size,) = struct.unpack_from(">Q", data, at)
    return archives.edit(data, at, struct.pack(">Q", size - 512))


class Regressions(ToolTest):
    """What fuzzing has found, by hand or guided by coverage; each with all commands."""

    FOUND: tuple[tuple[str, Callable[[], bytes]], ...] = (
        # optimize copied what is behind the device's end, pack wrote zeros: not the same bytes
        ("a byte behind the end", lambda: behind_the_end(golden("odd-size"))),
        ("a device one sector shorter", lambda: one_sector_less("live-order-day2", 2)),
        ("another one", lambda: one_sector_less("interleaved", 1)),
        # whether such an archive is canonical already was read from a closed file, or a pipe
        ("canonical", lambda: archives.canonical(odd_size(), 4096)),
        (
            "canonical but for a byte behind the end",
            lambda: behind_the_end(archives.canonical(odd_size(), 4096)),
        ),
        (
            "canonical, one byte",
            lambda: archives.canonical(Archive([Device(1, "drive-scsi1", b"a" * 512)]), 4096),
        ),
        # names that look like options
        ("a dash", lambda: named(b"-rf")),
        ("dashes", lambda: named(b"--quiet")),
        ("a comma", lambda: named(b"a,b")),
    )

    def test_all_commands(self) -> None:
        sandbox = sandbox_in_memory(self)
        for name, build in self.FOUND:
            for number in range(3 if ALL else 1):  # draws other options
                with self.subTest(name, number=number):
                    sandbox.check(build(), rng_seed=number)


def named(name: bytes) -> bytes:
    """Return an archive whose device and config have that name."""
    archive = Archive([Device(1, name, b"x" * 5120)], [(name + b"-", b"y")])
    return archives.build(archive)


class Fuzzing(ToolTest):
    def test_bounded_run(self) -> None:
        """A few thousand archives: whether each restores is what the format says."""
        sandbox = sandbox_in_memory(self)
        others = [command for command in sandbox.COMMANDS if not command.startswith("verify")]
        good = 0
        for number in range(CASES):
            case = fuzz.draw(SEED, number)
            commands = ["verify", "verify stream", random.Random(number).choice(others)]
            try:
                sandbox.check(case.data, commands, number)
            except FindingError as finding:
                again = f"python3 tests/tools/fuzz.py --case {SEED}:{number}"
                self.fail(f"{again} ({case.what}): {finding}")
            good += sandbox.judgement.contents is not None
        # A fuzzer that makes only good archives, or only bad ones, shows little.
        self.assertGreater(good, CASES // 4)
        self.assertLess(good, CASES * 3 // 4)

    def test_frames(self) -> None:
        """Compressed archives, with frames, seek tables and indexes that lie."""
        require_program("zstd", "zstd")
        sandbox = sandbox_in_memory(self)
        good = 0
        for number in range(CASES // 2):
            case = fuzz.draw_frames(SEED, number)
            commands = ["verify", *random.Random(number).sample(sandbox.COMMANDS, 2)]
            try:
                sandbox.check(case.data, commands, number)
            except FindingError as finding:
                again = f"python3 tests/tools/fuzz.py --frames --case {SEED}:{number}"
                self.fail(f"{again} ({case.what}): {finding}")
            good += sandbox.judgement.contents is not None
        self.assertGreater(good, CASES // 8)
        self.assertLess(good, CASES * 3 // 8)

    def test_random_bytes(self) -> None:
        """Not an archive at all, or one of which a part is noise."""
        rng = random.Random(SEED)
        sandbox = sandbox_in_memory(self)
        data = golden("odd-size")
        for number in range(0, 150, FEW):
            noise = rng.randbytes(rng.choice([0, 1, 3, 4, 60, 511, 512, 4096, 12288, 20000]))
            at = rng.choice([0, 4, HEADER, len(data) - 512, rng.randrange(len(data))])
            for new in (noise, data[:at] + noise, data[:at] + noise + data[at + len(noise) :]):
                if new[:4] in (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18") or new[:2] == b"\x1f\x8b":
                    continue  # compressed: another program's faults
                sandbox.check(new, rng.sample(sandbox.COMMANDS, 2), number)


if __name__ == "__main__":
    unittest.main()
