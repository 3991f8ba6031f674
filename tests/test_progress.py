"""What -v prints, and the progress line on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

from tests import archives
from tests.archives import BLOCK
from tests.support import (
    ProcessTest,
    ToolTest,
    call_tool,
    golden,
    manifest,
    run_tool,
    sha256,
)


class Verbose(ToolTest):
    """-v prints what Proxmox's own program prints: progress, and the zeros at the end."""

    def test_summary(self) -> None:
        """Of verify, extract and unpack: all bytes of the disks, and those that are not stored."""
        for name in ("three-disks", "live-order", "odd-size", "interleaved"):
            parsed = archives.parse(golden(name))
            total = sum(len(device.data) for device in parsed.archive.devices)
            zero = 0
            for device in parsed.archive.devices:
                masks = [parsed.masks[device.dev_id, n] for n in range(device.cluster_count)]
                zero += len(device.data) - sum(bin(m).count("1") for m in masks) * BLOCK
            want = f"total bytes {total}, zero bytes {zero} ({zero * 100 / total:.3g}%)"
            path = self.file("a.vma", golden(name))
            lines: list[list[str | Path]] = [
                ["verify", "-v", path],
                ["extract", "-v", path, self.directory / f"{name}.extracted"],
                ["unpack", "-v", path, self.directory / f"{name}.unpacked"],
            ]
            for args in lines:
                with self.subTest(archive=name, command=args[0]):
                    answer = call_tool(*args)
                    self.assertEqual(answer.returncode, 0)
                    self.assertEqual(answer.stdout.decode().splitlines()[-1], want)

    def test_progress(self) -> None:
        """A line for each percent that is reached, ascending, the last one all of it."""
        for args in (
            ["verify", "-v"], ["verify", "-v", "--digest"], ["unpack", "-v"], ["extract", "-v"],
            ["optimize", "-v"],
            ["extract", "-v", "-d", manifest()["interleaved"]["devices"][0]["name"]],
        ):  # fmt: skip
            with self.subTest(args=args):
                path = self.file("a.vma", golden("interleaved"))
                writes = args[0] in ("unpack", "extract")
                target = [self.directory / str(len(args))] if writes else []
                shutil.rmtree(self.directory / "2", ignore_errors=True)
                lines = call_tool(*args, path, *target).stderr.decode().splitlines()
                form = re.compile(r"(\w+) ([0-9]+)% \(read [0-9]+ bytes, duration [0-9]+ sec\)")
                stages: dict[str, list[int]] = {}
                for line in lines:
                    match = form.fullmatch(line)
                    assert match, line
                    stages.setdefault(match[1], []).append(int(match[2]))
                self.assertEqual(
                    list(stages),
                    ["progress", "comparing"] if args[0] == "optimize" else ["progress"],
                )
                for percents in stages.values():
                    self.assertEqual(percents, sorted(set(percents)))
                    self.assertEqual(percents[-1], 100)

    def test_not_without(self) -> None:
        """Without -v there is neither; -q leaves out the line of verify and optimize too."""
        path = self.file("a.vma", golden("three-disks"))
        self.assertNotIn("bytes", self.ok("verify", path))
        self.assertEqual(self.ok("verify", "-q", path), "")
        self.assertEqual(self.ok("extract", path, self.directory / "out"), "")
        self.assertEqual(self.ok("optimize", "-q", path, self.directory / "o.vma"), "")

    def test_options_before_the_command(self) -> None:
        """-q and -v mean the same in front of the command as behind it."""
        path = self.file("a.vma", golden("three-disks"))
        self.assertEqual(self.ok("-q", "verify", path), "")
        self.assertEqual(self.ok("--quiet", "optimize", path, self.directory / "o.vma"), "")
        answer = call_tool("-v", "verify", path)
        self.assertIn(b"total bytes", answer.stdout)
        self.assertIn(b"progress 100%", answer.stderr)


class Terminal(ProcessTest):
    """The line that is drawn again and again."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))
        self.want = manifest()["live-order"]["optimized_sha256"]["512K"]

    def test_progress(self) -> None:
        """On a terminal a line shows how far it is, at most ten times a second, and is erased."""
        leader, follower = pty.openpty()
        output = self.directory / "out.vma"
        process = self.start("optimize", "-", output, stdin=subprocess.PIPE, stderr=follower)
        os.close(follower)
        assert process.stdin
        archive = archives.parse(golden("live-order")).archive
        data = archives.build(archive, slots=2)
        start = time.monotonic()
        for at in range(0, len(data), 20000):
            process.stdin.write(data[at : at + 20000])
            process.stdin.flush()
            time.sleep(0.03)
        process.stdin.close()
        self.assertEqual(process.wait(20), 0)
        self.assertEqual(sha256(output), self.want)
        seconds = time.monotonic() - start
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while data := os.read(leader, 10000):
                shown += data
        os.close(leader)
        lines = shown.split(b"\r")
        self.assertGreater(len(lines), 3)
        self.assertLess(len(lines), 10 * seconds + 5)
        drawn = [line for line in lines if line.startswith(b"standard input: reading, ")]
        self.assertGreater(len(drawn), 1)
        self.assertIn(b"KiB/s", drawn[-1])
        self.assertTrue(shown.endswith(b"\r\x1b[K"))
        self.assertNotIn(b"\n", shown)

    def test_no_progress(self) -> None:
        """None with -q, and none where standard error is no terminal (as in all other tests)."""
        leader, follower = pty.openpty()
        self.addCleanup(os.close, leader)
        answer = run_tool("optimize", "-q", self.source, "-", stderr=follower)
        os.close(follower)
        self.assertEqual(answer.returncode, 0)
        self.assertEqual(sha256(answer.stdout), self.want)
        self.assertEqual(select.select([leader], [], [], 0)[0], [leader])
        with self.assertRaises(OSError):
            os.read(leader, 100)
