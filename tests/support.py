"""What every test file needs: the tool as a child process, the golden archives, outside programs.

Nothing here imports vma_tool or knows the format.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypedDict, Union, cast

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "vma_tool.py"
DATA = ROOT / "tests" / "data"

Argument = Union[str, "os.PathLike[str]"]


class GoldenDevice(TypedDict):
    """One disk of a golden archive; sha256 is that of the whole disk, holes read as zeros."""

    dev_id: int
    name: str
    size: int
    sha256: str


class Golden(TypedDict):
    """What manifest.json says of one golden archive; every digest is a SHA-256 in hex.

    uuid has no dashes; configs maps names to digests, optimized_sha256 `--align` to the digest
    of the whole canonical archive.
    """

    sha256: str
    size: int
    ctime: int
    uuid: str
    written_by: str
    configs: dict[str, str]
    devices: list[GoldenDevice]
    optimized_sha256: dict[str, str]


# The golden archives


@functools.cache
def manifest() -> dict[str, Golden]:
    """Return the manifest of the golden archives, by their names."""
    return cast("dict[str, Golden]", json.loads((DATA / "manifest.json").read_text("utf-8")))


@functools.cache
def golden(name: str) -> bytes:
    """Return the golden archive of that name, uncompressed and checked against the manifest."""
    data = gzip.decompress((DATA / f"{name}.vma.gz").read_bytes())
    if sha256(data) != manifest()[name]["sha256"]:
        raise AssertionError(f"tests/data/{name}.vma.gz is not the archive of manifest.json")
    return data


def sha256(source: bytes | os.PathLike[str]) -> str:
    """Return the SHA-256 in hex of bytes, or of the file at a path."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# The tool, and where it works


def run_tool(
    *args: Argument, input: bytes | None = None, **kw: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run vma_tool.py with the Python that runs the tests, and return what it answered.

    Standard input is `input`, or empty; output and errors are captured as bytes. Further keywords
    go to subprocess.run and replace these settings; the tool has 60 s unless `timeout` says more.
    """
    settings: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "timeout": 60,
    }
    if input is not None:
        settings["input"] = input
    elif "stdin" not in kw:
        settings["stdin"] = subprocess.DEVNULL
    settings.update(kw)
    command = [sys.executable, str(TOOL), *(os.fspath(argument) for argument in args)]
    return subprocess.run(command, check=False, **settings)


def temporary_directory(test: unittest.TestCase) -> Path:
    """Return a new directory that goes away, with all that is in it, when the test has ended."""
    path = Path(tempfile.mkdtemp(prefix="vma-tool-test-"))
    test.addCleanup(shutil.rmtree, path, ignore_errors=True)
    return path


# What a machine may lack. In CI (VMA_TOOL_CI=1) nothing may be lacking: a skipped test proves
# nothing, and there it would go unnoticed.


def skip(reason: str) -> NoReturn:
    """Skip the running test and print why; under VMA_TOOL_CI=1 fail it instead."""
    if os.environ.get("VMA_TOOL_CI") == "1":
        raise AssertionError(f"{reason}; with VMA_TOOL_CI=1 that is a failure")
    _notice(f"skipped: {reason}")
    raise unittest.SkipTest(reason)


@functools.cache
def _notice(line: str) -> None:
    """Print a line on standard error, each line only once a run."""
    print(line, file=sys.stderr, flush=True)


def require_program(name: str, package: str) -> str:
    """Return the path of a program, or skip; `package` is the Debian package that holds it."""
    path = shutil.which(name)
    if path is None:
        skip(f"{name} is not installed (Debian package: {package})")
    return path


def require_module(name: str, distribution: str) -> ModuleType:
    """Return an imported module, or skip; `distribution` is its name on PyPI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        skip(f"Python module {name} is not installed (PyPI: {distribution})")


def require_root() -> None:
    """Skip unless the tests run as root, as mounting a small file system needs."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        skip("needs root")
