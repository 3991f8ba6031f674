"""Fuzz the tool guided by its coverage, with atheris: the oracle is that of tests/tools/fuzz.py.

Not a part of the unit tests. Needs `pip install atheris` (in a venv, say), then, from the
project's directory:

    mkdir -p corpus found
    python3 tests/tools/fuzz_atheris.py -max_total_time=3600 -artifact_prefix=found/ corpus
    python3 tests/tools/fuzz_atheris.py found/finding-...       # one input again

libFuzzer's mutations know nothing of MD5s, and get no further than the header: `mutate` lets them
at one part of the archive at a time, or takes one of fuzz.py's own, and puts the MD5s right.
A finding does not end the run: its input is kept under -artifact_prefix, its text printed, up to
three of a kind.
"""

from __future__ import annotations

import collections
import os
import random
import re
import sys
import tempfile
import zlib
from pathlib import Path

import atheris  # type: ignore[import-untyped]  # it is only where it was installed for a run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["vma_tool"]):
    import vma_tool  # noqa: F401 - to be instrumented before anybody else imports it

from tests import archives
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.faults import memory_directory
from tests.tools import fuzz

MAX_SIZE = 128 << 10
KEPT_OF_A_KIND = 3
# Python's handlers, and the sandbox's, are to stay; a slow input is the sandbox's finding.
OPTIONS = [
    "-handle_int=0",
    "-handle_term=0",
    "-timeout=0",
    "-rss_limit_mb=0",
    f"-max_len={MAX_SIZE}",
]


def seeds() -> list[bytes]:
    """Return small archives that are all different: the beginning of a corpus."""
    rng = random.Random(1)

    def few_blocks(size: int) -> bytes:
        data = bytearray(size)
        for at in range(0, size, CLUSTER):
            data[at + BLOCK * rng.randrange(3) : at + BLOCK * 4] = b""
            data[at : at + 2] = b"ab"
        return bytes(data.ljust(size, b"\0")[:size])

    made = [Archive(), Archive(configs=[("qemu-server.conf", b"cores: 2\n"), ("a.fw", b"")])]
    for sizes in ([1], [BLOCK + 1], [CLUSTER + 1], [3 * CLUSTER], [CLUSTER, 5, 2 * CLUSTER]):
        for vmstate in (False, True):
            disks = [
                Device(number, f"drive-scsi{number}", few_blocks(size))
                for number, size in enumerate(sizes, 1)
            ]
            if vmstate:
                disks.append(Device(9, "vmstate", bytes(2 * CLUSTER), CLUSTER + 7))
            made.append(Archive(disks, [("qemu-server.conf", b"cores: 2\n")]))
    built = []
    for archive in made:
        order = archives.shuffled(archive, rng)
        slots = rng.choice([1, 2, 58])
        built.append(archives.build(archive, order, slots, empty_extents=rng.random() < 0.3))
        built.append(archives.canonical(archive, 4096))
    return [data for data in built if len(data) <= MAX_SIZE]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Return another archive, its MD5s right; what libFuzzer calls for each new input."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        new = fuzz.mutate(rng, bytes(data), rng.choice([1, 1, 2, 3])).data
    else:
        draft = fuzz.Draft.of(bytes(data))
        what = rng.choice(["header", "slots", "slots", "all"])
        if what == "header":
            draft.header = bytearray(atheris.Mutate(bytes(draft.header), len(draft.header)))
        elif what == "slots" and draft.parts:
            part = rng.choice(draft.parts)
            part.info = bytearray(atheris.Mutate(bytes(part.info), 512).ljust(512, b"\0"))
        else:
            draft = fuzz.Draft.of(atheris.Mutate(bytes(data), max_size))
        new = draft.pack()
    return new if len(new) <= max_size else bytes(data)


class Target:
    """What libFuzzer calls with each input."""

    def __init__(self, sandbox: fuzz.Sandbox, prefix: str) -> None:
        self.sandbox = sandbox
        self.prefix = prefix
        self.kinds: collections.Counter[str] = collections.Counter()

    def __call__(self, data: bytes) -> None:
        # What is run depends on the bytes alone, so that an input shows the same again.
        number = zlib.crc32(data)
        others = random.Random(number).sample(fuzz.Sandbox.COMMANDS, 4)
        try:
            self.sandbox.check(data, ["verify", *others], number)
        except fuzz.FindingError as finding:
            self.keep(data, str(finding))

    def keep(self, data: bytes, text: str) -> None:
        kind = re.sub(r"0x[0-9a-f]+|\d+", "N", text)
        self.kinds[kind] += 1
        if self.kinds[kind] <= KEPT_OF_A_KIND:
            path = Path(f"{self.prefix}finding-{zlib.crc32(data):08x}")
            path.write_bytes(data)
            print(f"FINDING {path}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    # In front, as the last one of two counts.
    arguments = [sys.argv[0], *OPTIONS, *sys.argv[1:]]
    prefixes = [a.partition("=")[2] for a in arguments if a.startswith("-artifact_prefix=")]
    corpora = [Path(a) for a in sys.argv[1:] if os.path.isdir(a)]
    if corpora and not any(corpora[0].iterdir()):
        for number, data in enumerate(seeds()):
            (corpora[0] / f"seed-{number}").write_bytes(data)
    with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
        target = Target(fuzz.Sandbox(Path(directory)), prefixes[-1] if prefixes else "./")
        atheris.Setup(arguments, target, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
