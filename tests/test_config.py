"""config: one config of an archive, byte for byte."""

from __future__ import annotations

import gzip
import os

from tests import archives
from tests.archives import Archive
from tests.damage import good, good_archive
from tests.support import (
    ToolTest,
    call_tool,
    golden,
    manifest,
    run_tool,
    sha256,
)


class Config(ToolTest):
    """One config to standard output, byte for byte."""

    def test_golden_archives(self) -> None:
        """Each config of each archive: from files, streams and compressed files."""
        for name, want in manifest().items():
            path = self.file("a.vma", golden(name))
            packed = self.file("a.vma.gz", gzip.compress(golden(name), 1))
            for config, digest in want["configs"].items():
                with self.subTest(archive=name, config=config):
                    for archive in (path, packed):
                        answer = call_tool("config", "-c", config, archive)
                        self.assertEqual(answer.stderr, b"")
                        self.assertEqual(sha256(answer.stdout), digest)
                    answer = call_tool("config", "-c", config, "-", input=golden(name))
                    self.assertEqual((answer.stderr, sha256(answer.stdout)), (b"", digest))
            if "qemu-server.conf" in want["configs"]:
                answer = call_tool("config", path)
                self.assertEqual(sha256(answer.stdout), want["configs"]["qemu-server.conf"])

    def test_any_bytes(self) -> None:
        """No byte is translated, none added; an empty config is nothing at all."""
        everything = bytes(range(256)) * 200 + b"\r\n\r\n"
        configs: list[archives.Config] = [
            ("qemu-server.conf", everything), ("empty", b""), ("full", b"x" * 65535),
        ]  # fmt: skip
        path = self.file("a.vma", archives.canonical(Archive([], configs)))
        for name, data in configs:
            assert isinstance(name, str)
            for answer in (
                call_tool("config", "-c", name, path),
                run_tool("config", path, "-c", name),
            ):
                self.assertEqual((answer.returncode, answer.stderr, answer.stdout), (0, b"", data))

    def test_the_rest_is_not_read(self) -> None:
        """A pipe that stays open behind the header does not keep anybody waiting."""
        data = golden("three-disks")
        (header_size,) = (int.from_bytes(data[56:60], "big"),)
        for sent in (data[:header_size], data[: header_size + 100]):
            for command in (["config", "-"], ["config", "/dev/stdin"]):
                with self.subTest(sent=len(sent), command=command):
                    reading, writing = os.pipe()
                    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb") as other:
                        other.write(sent)
                        other.flush()
                        answer = run_tool(*command, stdin=pipe, timeout=30)
                    want = archives.parse(data).configs["qemu-server.conf"]
                    self.assertEqual(
                        (answer.returncode, answer.stderr, answer.stdout), (0, b"", want)
                    )

    def test_damage_behind_the_header(self) -> None:
        """What is asked for is in the header, so a config can be saved from half an archive."""
        data = golden("three-disks")[:20000]
        want = archives.parse(golden("three-disks")).configs["qemu-server.conf"]
        answer = call_tool("config", self.file("a.vma", data))
        self.assertEqual((answer.stderr, answer.stdout), (b"", want))

    def test_not_there(self) -> None:
        """The error names those that are; their names cannot act on a terminal."""
        path = self.file("a.vma", good())
        line = self.refused("config", "-c", "nope.conf", path, says=["no config 'nope.conf'"])
        self.assertIn("'qemu-server.conf', 'qemu-server.fw'", line)
        evil = Archive([], [("a\x1b[31m\u202e", b"")])
        path = self.file("evil.vma", archives.canonical(evil))
        self.refused("config", path, says=[r"'a\x1b[31m\u202e'"])
        path = self.file("none.vma", archives.canonical(Archive([good_archive().devices[0]])))
        self.refused("config", path, says=["there are none"])
        self.bad("config", self.file("text", b"hello"), says=["not a VMA archive"])
