"""Optimized archives as an independent reader of the format sees them: dissect.archive."""

from __future__ import annotations

import os
import unittest
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.support import (
    FEW,
    Golden,
    golden,
    manifest,
    require_module,
    run_tool,
    sha256,
    temporary_directory,
)

CANONICAL_UUID = UUID("12345678-aabb-ccdd-eeff-aabbccddeeff")
EXTENT_HEADER_SIZE = 512


class DissectReadsOptimized(unittest.TestCase):
    """Each golden archive, optimized with each `--align` that the manifest knows.

    The reader checks the MD5 of the header and of each extent header; it finds names and configs
    by walking the blob buffer from its start, so a gap between two blobs would show as well.
    """

    def setUp(self) -> None:
        self.reader = require_module("dissect.archive.vma", "dissect.archive")
        self.directory = temporary_directory(self)

    def test_every_golden_archive(self) -> None:
        self.assertTrue(manifest())
        for number, (name, want) in enumerate(manifest().items()):
            source = self.directory / f"{name}.vma"
            source.write_bytes(golden(name))
            for align in [*want["optimized_sha256"]][number % FEW :: FEW]:
                with self.subTest(archive=name, align=align):
                    output = self.directory / f"{name}-{align}.vma"
                    result = run_tool("optimize", "--align", align, source, output)
                    self.assertEqual(result.returncode, 0, result.stderr.decode())
                    self.check(output, want)

    def check(self, path: Path, want: Golden) -> None:
        """Compare what the reader finds in the archive at `path` with the manifest."""
        with open(path, "rb") as file:
            archive = self.reader.VMA(file)
            self.assertEqual(archive.uuid, CANONICAL_UUID)
            self.assertEqual(archive.creation_time.timestamp(), want["ctime"])
            configs = {name: sha256(data) for name, data in archive.configs().items()}
            self.assertEqual(configs, want["configs"])
            devices = [self.describe(device) for device in archive.devices()]
            self.assertEqual(devices, want["devices"])
            self.check_extents(archive, os.path.getsize(path))

    @staticmethod
    def describe(device: Any) -> dict[str, object]:
        """Return a device of the reader in the manifest's form, with its whole content's digest."""
        return {
            "dev_id": device.id,
            "name": device.name,
            "size": device.size,
            "sha256": sha256(device.open().read()),
        }

    def check_extents(self, archive: Any, archive_size: int) -> None:
        """Check that extents follow each other without a gap to the archive's last byte."""
        end = archive.header.header_size
        for extent in archive.extents():
            self.assertEqual(extent.offset, end)
            self.assertEqual(extent.uuid, CANONICAL_UUID)
            end += EXTENT_HEADER_SIZE + extent.size
        self.assertEqual(end, archive_size)
