"""An archive that comes in a pipe is put in order in one pass, in bounded memory."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from typing import Any
from unittest import mock

from tests import archives
from tests.archives import MIB, Archive, Device
from tests.support import (
    ALL,
    FEW,
    ProcessTest,
    call_tool,
    run_measured,
    run_tool,
    sha256,
    small_file_system,
)


class OnePass(ProcessTest):
    """The one-pass reorderer: the same bytes in bounded memory."""

    def orders(self) -> dict[str, tuple[Archive, archives.Order]]:
        """Return the six orders in which a stream may come, each with its archive."""
        rng = random.Random(17)
        guest = archives.three_disks(rng, vmstate=True)
        disks = [Device(n, f"drive-scsi{n}", archives.disk(rng, 3 * MIB + n * 512)) for n in (1, 2)]
        two = Archive(disks, [("a.conf", b"text")])
        return {
            "in order": (guest, archives.in_order(guest)),
            "live": (guest, archives.live_order(guest, rng)),
            "interleaved": (two, archives.interleaved(two)),
            "random": (guest, archives.shuffled(guest, rng)),
            "reversed": (guest, archives.reversed_order(guest)),
            "vmstate first": (guest, archives.vmstate_first(guest)),
        }

    def test_same_bytes(self) -> None:
        """Whatever the order, and however little may wait in memory."""
        for what, (archive, order) in self.orders().items():
            data = archives.build(archive, order)
            for align in ("4K", "512K", "1M", "128K")[:: 1 if ALL else 2]:
                want = sha256(archives.canonical(archive, archives.ALIGNS[align]))
                for memory in ("0", "64K", "1M", "256M")[:: 1 if ALL else 2]:
                    with self.subTest(what, align=align, memory=memory):
                        options = ["--align", align, "--memory", memory]
                        answer = call_tool("optimize", *options, "-", "-", input=data)
                        self.check_ok(answer)
                        self.assertEqual(sha256(answer.stdout), want)

    def test_random_archives(self) -> None:
        """Zero blocks that are stored, empty extents and slots, extents of any length."""
        for seed in range(0, 15, FEW):
            rng = random.Random(seed)
            archive = archives.three_disks(rng, vmstate=rng.random() < 0.5)
            stored = archives.masks_with_zeros(archive, rng, rng.choice([0, 0.1]))
            data = archives.build(
                archive,
                archives.shuffled(archive, rng),
                slots=rng.choice([1, 30, 59]),
                store_zero_blocks=stored,
                empty_extents=rng.random() < 0.5,
                empty_slots=rng.random() < 0.5,
            )
            memory = rng.choice(["0", "100K", "600K"])
            with self.subTest(seed=seed, memory=memory):
                answer = call_tool("optimize", "--memory", memory, "-", "-", input=data)
                self.check_ok(answer)
                want = archives.canonical(archive, stored=stored)
                self.assertEqual(sha256(answer.stdout), sha256(want))

    def test_no_temporary_file(self) -> None:
        """An archive in live order needs none; one that needs it says where it cannot be."""
        nowhere = {**os.environ, "TMPDIR": str(self.directory / "nowhere")}
        path = self.directory / "a.vma"
        output = self.directory / "out.vma"
        for order, needed in (("in-order", False), ("live", False), ("reversed", True)):
            archives.write_large(path, size=96 * MIB, data_bytes=48 * MIB, order=order)
            with (
                self.subTest(order),
                open(path, "rb") as file,
                subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat,
            ):
                answer = run_tool(
                    "optimize", "--memory", "16M", "-", output, env=nowhere, stdin=cat.stdout
                )
                if needed:
                    self.check_error(answer, nowhere["TMPDIR"], "No such file or directory")
                    self.assertEqual(os.listdir(self.directory), ["a.vma"])
                else:
                    self.check_ok(answer)
                    output.unlink()

    def test_place_of_the_temporary_file(self) -> None:
        """It is in $TMPDIR, else beside the output, and has no name that could be left."""
        data = archives.build(*self.orders()["interleaved"])
        places: list[str] = []
        real = tempfile.TemporaryFile

        def note(*args: Any, **kw: Any) -> Any:
            if "dir" in kw:  # the test's own have none
                places.append(kw["dir"])
            return real(*args, **kw)

        for name in ("tmp", "out"):
            (self.directory / name).mkdir()
        output = self.directory / "out" / "out.vma"
        for environment, place in (
            ({"TMPDIR": str(self.directory / "tmp")}, self.directory / "tmp"),
            ({}, output.parent),
        ):
            places.clear()
            with mock.patch("tempfile.TemporaryFile", note), mock.patch.dict(os.environ):
                os.environ.pop("TMPDIR", None)
                os.environ.update(environment)
                self.ok("optimize", "--force", "--memory", "64K", "-", output, input=data)
            self.assertEqual([os.path.realpath(p) for p in places], [os.path.realpath(place)])
            self.assertEqual(os.listdir(self.directory / "tmp"), [])
            self.assertEqual(os.listdir(output.parent), ["out.vma"])

    def test_full_temporary_directory(self) -> None:
        """One clear line that says which directory is full; nothing is left."""
        tmp = small_file_system(self, MIB)
        data = archives.build(*self.orders()["interleaved"])
        output = self.directory / "out.vma"
        environment = {**os.environ, "TMPDIR": str(tmp)}
        answer = run_tool("optimize", "--memory", "64K", "-", output, input=data, env=environment)
        self.check_error(answer, str(tmp), "No space left on device")
        self.assertEqual(os.listdir(self.directory), [])
        self.assertEqual(os.listdir(tmp), [])

    def test_size_of_the_temporary_file(self) -> None:
        """Of two disks that alternate, at most the second one waits: here 16 of 32 MiB."""
        rng = random.Random(3)
        disks = [Device(n, f"drive-scsi{n}", archives.disk(rng, 16 * MIB, "full")) for n in (1, 2)]
        archive = Archive(disks)
        tmp = small_file_system(self, 16 * MIB + 4096)
        answer = run_tool(
            "optimize", "--align", "4K", "--memory", "12M", "-", "-",
            input=archives.build(archive, archives.interleaved(archive)),
            env={**os.environ, "TMPDIR": str(tmp)},
        )  # fmt: skip
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), sha256(archives.canonical(archive, 4096)))

    def test_memory(self) -> None:
        """The peak stays within --memory and 64 MiB, whatever the order of 120 MiB."""
        path = self.directory / "a.vma"
        for order in archives.LARGE_ORDERS[:: 1 if ALL else 2]:
            archives.write_large(path, size=192 * MIB, data_bytes=96 * MIB, order=order)
            with self.subTest(order), open(path, "rb") as file:
                cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
                answer, peak = run_measured(
                    "optimize", "--memory", "8M", "-", "/dev/null", stdin=cat.stdout
                )
                assert cat.stdout
                cat.stdout.close()
                cat.wait()
                self.check_ok(answer)
                self.assertLess(peak, (8 + 64) * MIB)

    def test_output_that_is_no_file(self) -> None:
        """What has to wait does not wait in /dev or /proc."""
        archive = Archive([Device(1, "drive-scsi0", b"x" * (40 << 16))])
        data = archives.build(archive, archives.reversed_order(archive))
        answer = run_tool("optimize", "--memory", "0", "-", "/dev/stdout", input=data)
        self.check_ok(answer)
        self.assertEqual(answer.stdout, archives.canonical(archive))
