"""A slip on the command line costs no archive: the same file twice, odd names, wrong targets."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import MIB
from tests.damage import good
from tests.faults import WrongBit
from tests.support import (
    Argument,
    ToolTest,
    call_tool,
    golden,
    loop_device,
    manifest,
    require_program,
    run_tool,
    sha256,
    snapshot,
)

WANT = manifest()["live-order"]["optimized_sha256"]["512K"]


@contextlib.contextmanager
def standard_input(path: Path) -> Iterator[None]:
    """Let standard input of this process be a file."""
    saved = os.dup(0)
    try:
        with open(path, "rb") as file:
            os.dup2(file.fileno(), 0)
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


class SameFile(ToolTest):
    """What is read is never written as well, whatever it is called on either side."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.before = snapshot(self.directory)

    def refused_with(self, redirection: str, *args: Argument) -> None:
        """Run the tool with a redirection of the shell; check that it refuses, and why."""
        script = f'exec "$@" {redirection}'
        answer = run_tool(*args, prefix=["sh", "-c", script, "sh"], cwd=self.directory)
        self.check_error(answer, "is read here, and cannot be written as well")
        self.assertEqual(snapshot(self.directory), self.before)

    def test_redirected(self) -> None:
        disk = ["extract", "-d", "drive-scsi0", "-o"]
        for redirection, args in (
            ("<a.vma", [*disk, "a.vma", "-"]),
            ("1<>a.vma", [*disk, "-", "a.vma"]),
            (">>a.vma", ["optimize", "a.vma", "-"]),
            ("<a.vma >>a.vma", ["optimize", "-", "-"]),
        ):
            with self.subTest(redirection, args=args):
                self.refused_with(redirection, *args)

    def test_mapped(self) -> None:
        for device in manifest()["live-order"]["devices"]:
            lines = [f"skip={d['name']}" for d in manifest()["live-order"]["devices"]]
            lines.append(f"1:{device['name']}=a.vma")
            self.file("map", "\n".join(lines).encode())
            self.before = snapshot(self.directory)
            with self.subTest(device["name"]):
                self.refused_with("<a.vma", "extract", "-r", "map", "-", "out")

    def test_in_place_by_standard_input(self) -> None:
        """It is checked like any archive that is replaced, also a compressed one."""
        path = self.file("b.vma", golden("live-order"))
        last = len(archives.canonical(archives.parse(golden("live-order")).archive)) - 1
        for wrong in (last, -1):
            with (
                standard_input(path),
                mock.patch.object(vma_tool, "os", WrongBit(wrong)),
                contextlib.redirect_stderr(None),
            ):
                status = vma_tool.main(["optimize", "-q", "-", str(path)])
            self.assertEqual(status != 0, wrong > 0)
            self.assertEqual(sha256(path), manifest()["live-order"]["sha256"] if status else WANT)
        program = require_program("zstd", "zstd")
        subprocess.run([program, "-q", self.source, "-o", self.directory / "c.zst"], check=True)
        with open(self.directory / "c.zst", "rb") as file:
            answer = run_tool("optimize", "-q", "-", self.directory / "c.zst", stdin=file)
        self.check_ok(answer)
        plain = subprocess.run(
            [program, "-dc", self.directory / "c.zst"], stdout=subprocess.PIPE, check=True
        )
        self.assertEqual(sha256(plain.stdout), WANT)

    def test_unpacked_over_itself(self) -> None:
        """unpack --force would replace an archive that is called like what it holds."""
        for name in ("drive-scsi0", "qemu-server.conf", "vma.json"):
            directory = self.directory / f"in {name}"
            directory.mkdir()
            path = directory / name
            path.write_bytes(golden("live-order"))
            before = snapshot(directory)
            with self.subTest(name):
                says = [str(path), "is read here"]
                self.refused("unpack", "--force", path, directory, says=says)
                with open(path, "rb") as file:
                    answer = run_tool("unpack", "--force", "-", directory, stdin=file)
                self.check_error(answer, *says)
                self.assertEqual(snapshot(directory), before)

    def test_device_node_of_another_name(self) -> None:
        device = loop_device(self, self.file("disk", good()))
        node = self.directory / "node"
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        try:
            node.open("rb").close()
        except PermissionError:
            self.skipTest("device nodes are of no use here")
        before = sha256(device)
        says = ["is read here"]
        self.refused("extract", "-d", "drive-scsi0", "-o", node, device, says=says)
        self.assertEqual(sha256(device), before)


class Outputs(ToolTest):
    """Where nothing, or not all, would be written."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))

    def test_block_device(self) -> None:
        """An archive there would be followed by what the device held, and not restore."""
        device = loop_device(self, self.file("disk", b"\xaa" * (8 * MIB)))
        directory = self.directory / "dir"
        self.ok("unpack", self.source, directory)
        raw = self.file("raw", b"x" * 512)
        before = sha256(device)
        calls: list[list[Argument]] = [
            ["optimize", self.source, device],
            ["pack", directory, device],
            ["create", device, f"drive-scsi0={raw}"],
            ["create", "--force", device, f"drive-scsi0={raw}"],
        ]
        for args in calls:
            with self.subTest(args=args):
                self.refused(*args, says=[f"{device}: ", "block device"])
                self.assertEqual(sha256(device), before)

    def test_no_name(self) -> None:
        """An unset variable is no output; nothing is written beside the directory either."""
        raw = self.file("raw", b"x" * 512)
        before = snapshot(self.directory)
        for args in (
            ["optimize", self.source, ""],
            ["extract", "-d", "drive-scsi0", "-o", "", self.source],
            ["create", "", f"drive-scsi0={raw}"],
        ):
            with self.subTest(args=args):
                self.refused(*args, says=["'': No such file or directory"])
                self.assertEqual(snapshot(self.directory), before)

    def check_optimized(self, output: Path) -> None:
        """Check that the work was done, and undo it."""
        self.assertEqual(sha256(output), WANT)
        output.unlink()
        self.source.write_bytes(golden("live-order"))

    def test_report_that_cannot_be_printed(self) -> None:
        """Status 1, though the archive has its name by then."""
        for output in (self.source, self.directory / "b.vma"):
            with self.subTest(output=output.name), open("/dev/full", "wb") as full:
                answer = run_tool("optimize", self.source, output, stdout=full)
                self.check_error(answer, "No space left on device")
                self.check_optimized(output)

    def test_report_that_nobody_reads(self) -> None:
        for output in (self.source, self.directory / "b.vma"):
            reading, writing = os.pipe()
            os.close(reading)
            with self.subTest(output=output.name), open(writing, "wb") as pipe:
                answer = run_tool("optimize", self.source, output, stdout=pipe)
                self.assertEqual((answer.returncode, answer.stderr), (141, b""))
                self.check_optimized(output)

    def test_report_that_has_nowhere_to_go(self) -> None:
        """Where standard output is closed, nothing is done."""
        before = snapshot(self.directory)
        for command in ("optimize", "verify", "list", "config"):
            with self.subTest(command):
                answer = run_tool(command, self.source, prefix=["sh", "-c", 'exec "$@" >&-', "sh"])
                self.check_error(answer, "standard output is closed")
                self.assertEqual(snapshot(self.directory), before)


class Arguments(ToolTest):
    """Options given twice, and names that look like options."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))

    def test_options_that_take_one_value(self) -> None:
        for args in (
            ["verify", "--against", "b.vma", "--against", "c.vma", "a.vma"],
            ["extract", "-d", "drive-scsi0", "-o", "one", "-o", "two", "a.vma"],
            ["extract", "-r", "one", "-r", "two", "a.vma", "out"],
        ):
            with self.subTest(args=args):
                answer = call_tool(*args)
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
                self.assertIn(b"may be given only once", answer.stderr)

    def test_names_that_look_like_options(self) -> None:
        """What stands behind `--` is a name."""
        name = self.directory / "--no-check"
        name.write_bytes(golden("live-order"))

        def run(*args: str) -> bytes:
            answer = run_tool(*args, cwd=self.directory)
            self.check_ok(answer)
            return answer.stdout

        for command in ("verify", "list", "config"):
            self.assertEqual(run(command, "--", "--no-check"), run(command, "./--no-check"))
        self.assertIn(b": OK", run("verify", "--", "--no-check", "a.vma"))
        run("unpack", "--", "--no-check", "-q")
        run("pack", "-q", "--", "-q", "-v")
        self.assertEqual(sha256(self.directory / "-v"), WANT)
        run("optimize", "-q", "--", "--no-check")
        self.assertEqual(sha256(name), WANT)
        with open(name, "rb") as file:
            self.check_ok(run_tool("verify", "--", "-", stdin=file))

    def test_option_without_use(self) -> None:
        answer = call_tool("verify", "--ignore-ctime", self.source)
        self.assertEqual(answer.returncode, 2)
        self.assertIn(b"--against", answer.stderr)
