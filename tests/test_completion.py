"""completion: what bash and zsh offer, in the shells themselves."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests import archives
from tests.damage import good, good_archive
from tests.support import (
    COMMANDS,
    ToolTest,
    call_tool,
    options_of,
    require_program,
    tool_command,
)


class Completion(ToolTest):
    """Shell completion, in the shells themselves."""

    def script(self, shell: str) -> Path:
        return self.file(f"_{shell}", self.ok("completion", shell).encode())

    def environment(self) -> Mapping[str, str]:
        """Return an environment in which vma-tool can be run, and home is the directory."""
        program = self.file(
            "vma-tool", f'#!/bin/sh\nexec {shlex.join(tool_command())} "$@"\n'.encode()
        )
        program.chmod(0o755)
        path = f"{self.directory}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "HOME": str(self.directory)}

    def bash(self, *words: str) -> list[str]:
        """Return what bash would offer for the last word."""
        script = """
            source "$1"; shift
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            complete -p vma-tool >/dev/null
            _vma_tool
            printf '%s\\n' "${COMPREPLY[@]}"
        """
        answer = subprocess.run(
            [require_program("bash", "bash"), "--norc", "-uc", script, "bash",
             self.script("bash"), "vma-tool", *words],
            capture_output=True, text=True, check=False, timeout=20,
            cwd=self.directory, env=self.environment(),
        )  # fmt: skip
        self.assertEqual((answer.returncode, answer.stderr), (0, ""))
        return answer.stdout.split()

    def test_bash(self) -> None:
        """Commands, a command's options, and the values of an option; else files."""
        aligns = list(archives.ALIGNS)
        for words, want in (
            ([""], list(COMMANDS)),
            (["op"], ["optimize"]),
            (["ver"], ["verify"]),
            (["nothing"], []),
            (["optimize", "--al"], ["--align"]),
            (["optimize", "--align", ""], aligns),
            (["optimize", "--align", "1"], ["128K", "1M"]),
            (["optimize", "--align", "="], aligns),  # as bash cuts --align= into words
            (["optimize", "--align", "=", "1"], ["128K", "1M"]),
            (["optimize", "--align=1"], ["--align=128K", "--align=1M"]),  # without = among breaks
            (["optimize", "--align=9"], []),
            (["create", "--align", "6"], ["64K"]),
            (["optimize", ""], []),
            (["optimize", "arch"], []),
            (["list", "--p"], ["--partitions"]),
            (["list", "archive.vma", "--j"], ["--json"]),
            (["verify", "--a"], ["--against"]),
        ):
            with self.subTest(words=words):
                self.assertEqual(sorted(self.bash(*words)), sorted(want))
        for command in COMMANDS:
            self.assertIn("--help", self.bash(command, "--"))

    def test_names_from_the_archive(self) -> None:
        """Of devices after -d and configs after -c, where an archive is on the line."""
        path = self.file("a file.vma", good())
        self.file("home.vma", good())
        self.file("x.vma.gz", gzip.compress(good()))
        devices = ["drive-efidisk0", "drive-scsi0", "vmstate"]
        for words, want in (
            (["extract", str(path), "-d", ""], devices),
            (["extract", "~/home.vma", "-d", "drive-s"], ["drive-scsi0"]),
            (["extract", "x.vma.gz", "disks/", "-d", "v"], ["vmstate"]),
            (["extract", "home.vma", "-d", "vmstate,drive-s"], ["vmstate,drive-scsi0"]),
            (["extract", "home.vma", "-d", "nope"], []),
            (["extract", "-d", ""], []),
            (["extract", "no/such.vma", "-d", ""], []),
            (["extract", "vma-tool", "-d", ""], []),  # no archive
            (["config", "home.vma", "-c", ""], [name for name, _ in good_archive().configs]),
            (["create", "new.vma", "home.vma", "-c", ""], []),  # a file
            (["create", "new.vma", "home.vma", "-d", ""], []),
        ):
            with self.subTest(words=words):
                self.assertEqual(sorted(self.bash(*words)), sorted(want))

    def test_hostile_names(self) -> None:
        """A name that the shell would expand is not offered, and not expanded."""
        names = "$(touch${IFS}hit)", "`touch hit`", "drive-scsi0", "$HOME"
        devices = [
            archives.Device(dev_id, name, bytes(archives.CLUSTER))
            for dev_id, name in enumerate(names, 1)
        ]
        self.file("a.vma", archives.canonical(archives.Archive(devices)))
        self.assertEqual(self.bash("extract", "a.vma", "-d", ""), ["drive-scsi0"])
        self.assertFalse((self.directory / "hit").exists())

    def test_bash_is_made_from_the_parser(self) -> None:
        """Every option that --help shows is offered."""
        for command in COMMANDS:
            with self.subTest(command=command):
                shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options_of(command)))
                self.assertEqual(set(self.bash(command, "-")), shown)

    def test_bash_falls_back_to_files(self) -> None:
        answer = subprocess.run(
            ["bash", "--norc", "-c", 'source "$1"; complete -p vma-tool', "bash",
             self.script("bash")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.assertIn("-o default", answer.stdout)

    def test_zsh_loads(self) -> None:
        """It is sound, and zsh knows it when it was sourced after compinit."""
        zsh = require_program("zsh", "zsh")
        path = self.script("zsh")
        subprocess.run([zsh, "-n", path], check=True)
        script = "autoload -Uz compinit; compinit -u -D; source $1; print -r -- $_comps[vma-tool]"
        answer = subprocess.run(
            [zsh, "-f", "-c", script, "zsh", path],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        self.assertEqual((answer.returncode, answer.stderr), (0, ""))
        self.assertIn("_vma_tool", answer.stdout)

    def zsh(self, *keys: str) -> str:
        """Return what an interactive zsh shows when these keys are typed."""
        self.script("zsh")
        (self.directory / "archive.vma").touch()
        self.file("good.vma", good())
        script = """
            zmodload zsh/zpty
            zpty -b shell TERM=dumb PS1= ZDOTDIR=$1 zsh -f -i
            expect() { local text=; while zpty -r -m shell text "*$1*"; do
                [[ $text == *$1* ]] && { print -r -- $text; return; }; sleep 0.05; done }
            zpty -w shell "cd $1; autoload -Uz compinit; compinit -u -D; source $1/_zsh"
            zpty -w shell "zstyle ':completion:*' list-prompt ''; LISTMAX=1000; print re''ady"
            expect ready >/dev/null
            shift
            for keys; do zpty -w -n shell $keys; sleep 0.1; done
            zpty -w -n shell $'\\C-a: \\C-e \\n'
            zpty -w shell "print e''nd"
            expect end
            zpty -d shell
        """
        answer = subprocess.run(
            [require_program("zsh", "zsh"), "-f", "-c", script, "zsh", self.directory, *keys],
            capture_output=True, text=True, check=False, timeout=30,
            env=self.environment(),
        )  # fmt: skip
        return answer.stdout

    def test_zsh_completes(self) -> None:
        """With the first key, in a shell that has just been started."""
        for keys, want in (
            ("vma-tool opt\t", "vma-tool optimize"),
            ("vma-tool optimize --mem\t", "--memory"),
            ("vma-tool list arch\t", "archive.vma"),
            ("vma-tool optimize --align=1M\t", "--align=1M"),
            ("vma-tool extract good.vma -d drive-s\t", "drive-scsi0"),
        ):
            with self.subTest(keys=keys):
                self.assertIn(want, self.zsh(keys))

    def test_wrong_shell(self) -> None:
        for args in ([], ["fish"]):
            answer = call_tool("completion", *args)
            self.assertEqual((answer.returncode, answer.stdout), (2, b""))
