"""Training that is killed, finds the disk full and its checkpoints damaged, and ends at the weights of a quiet run.

    python -m tests.chaos.training --kills 20 --seed 0 sft
    python -m tests.chaos.training --kills 20 --seed 0 --json docs/results/chaos_training.json sft rl

Each attempt is a command ``flr sft`` or ``flr rl`` in a process of its own, which goes on where the last one was cut.
It is killed after a random time, or before or inside a random operation on files; or its files may grow to a random
size only, which is what a full disk is to it; and between attempts a bit of a checkpoint is flipped now and then.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flr.cli import main as flr
from flr.train.run_folder import checkpoints, newest_whole
from tests.helpers.kills import bound_files, in_child, kill_at

from .figures import keep

COMMANDS = ("sft", "rl")
_DATA = ["--planted_items", "60", "--planted_users", "150", "--use_cpu", "true", "--report_to", "none",
         "--disable_tqdm", "true", "--per_device_train_batch_size", "32", "--learning_rate", "3e-3",
         "--per_device_eval_batch_size", "256"]  # fmt: skip
_MODEL = ["--hidden_size", "32", "--intermediate_size", "32", "--anchor", "last"]
#: What has a state to lose: dropout, augmentation, groups that are used twice, a best checkpoint that is not the last.
OPTIONS = {
    "sft": [*_DATA, *_MODEL, "--max_steps", "40", "--dropout", "0.2", "--embedding_dropout", "0.2",
            "--augment_drop_item", "0.3"],
    "rl": [*_DATA, "--max_steps", "24", "--num_iterations", "2", "--kl_weight", "0.01", "--group_size", "4"],
}  # fmt: skip
SAVES = {"sft": "8", "rl": "6"}
_SAID = 1 << 20  # bytes that a command may say
_OPERATIONS = 150  # a kill falls on one of the first


class Chaos:
    """Attempts on one command until it has been cut often enough.

    Attributes:
        counts: what happened, by name.
        faults: what should not have, a line each.
    """

    def __init__(self, command: str, root: Path, seed: int) -> None:
        self.command, self.root, self.random = command, root, random.Random(f"{command} {seed}")
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.said = ""
        self.options = list(OPTIONS[command])
        if command == "rl":
            base = str(root / "base")
            self._quietly([*OPTIONS["sft"], "--output_dir", base, "--eval_strategy", "no", "--save_strategy", "no",
                           "--load_best_model_at_end", "false"], "sft")  # fmt: skip
            self.options += ["--model", base]
        for when in ("eval", "save"):
            self.options += [f"--{when}_strategy", "steps", f"--{when}_steps", SAVES[command]]
        started = time.monotonic()
        self._quietly([*self.options, "--output_dir", str(root / "quiet")], command)
        self.seconds = time.monotonic() - started
        self.wanted = load_file(root / "quiet" / "model.safetensors")

    def _quietly(self, options: list[str], command: str) -> None:
        status = self.attempt(options, command)
        if status != 0:
            raise RuntimeError(f"{command}: expected status 0 undisturbed, got {status}: {self.said[-2000:]}")

    def attempt(
        self,
        options: list[str],
        command: str,
        before: Callable[[], Any] = lambda: None,
        kill_after: float = 0.0,
    ) -> int:
        """The exit status of the command in a process of its own, or minus the signal that ended it."""
        read, write = os.pipe()  # a file would be bounded, too
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _SAID)

        def run() -> int:
            for stream in (1, 2):
                os.dup2(write, stream)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))  # not files of pytest's
            torch.set_num_threads(1)
            before()
            return flr([command, *options])

        def kill(child: int) -> None:
            end = time.monotonic() + kill_after
            while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)

        status = in_child(run, kill if kill_after else None)
        os.close(write)
        with os.fdopen(read, errors="replace") as file:
            self.said = file.read()
        return status

    def cut(self, folder: Path) -> int:
        """One attempt that may be cut; its status."""
        options = [*self.options, "--output_dir", str(folder)]
        kind = self.random.choice(("time", "operation", "operation", "disk"))
        if kind == "time":
            status = self.attempt(options, self.command, kill_after=self.random.uniform(0.01, 1.1 * self.seconds))
        elif kind == "operation":
            number = self.random.randint(1, _OPERATIONS)
            status = self.attempt(options, self.command, lambda: kill_at(number, folder))
        else:
            size = int(10 ** self.random.uniform(2.5, 5.3))
            status = self.attempt(options, self.command, lambda: bound_files(size))
        self._judge(kind, status, folder)
        return status

    def _judge(self, kind: str, status: int, folder: Path) -> None:
        text = self.said
        self.counts["attempts"] += 1
        self.counts["continued"] += "continuing from" in text
        self.counts["checkpoints left out"] += text.count("is left out")
        if kind == "disk" and status == 1:
            self.counts["full disks"] += 1
            if f"flr {self.command}: {folder}" not in text.strip().split("\n")[-1]:
                self.faults.append(f"full disk: expected one line that names {folder}, got {text[-1500:]!r}")
        elif status == -signal.SIGKILL:
            self.counts[f"kills by {kind}"] += 1
        elif status != 0:
            self.faults.append(f"{kind}: expected status 0 or a kill, got {status}: {text[-500:]!r}")
        if "Traceback" in text:
            self.faults.append(f"{kind}: expected no traceback, got {text[-500:]!r}")

    def flip(self, folder: Path) -> None:
        """Flip a bit of a file in a checkpoint, if there is one."""
        files = [path for place in checkpoints(folder) for path in sorted(place.rglob("*")) if path.stat().st_size]
        if not files:
            return
        file = self.random.choice(files)
        content = bytearray(file.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)
        self.counts["bits flipped"] += 1

    def compare(self, folder: Path) -> None:
        """Whether the end of a run is that of the quiet one, bit by bit."""
        got = load_file(folder / "model.safetensors")
        same = got.keys() == self.wanted.keys() and all(torch.equal(got[name], self.wanted[name]) for name in got)
        self.counts["runs ended"] += 1
        self.counts["bit-equal"] += same
        if not same:
            self.faults.append(f"{folder.name}: expected the weights of the quiet run, got others")

    def kills(self) -> int:
        return self.counts["kills by time"] + self.counts["kills by operation"]

    def run(self, kills: int) -> dict[str, Any]:
        """Kill ``kills`` times, and fill the disk now and then, in as many runs as that takes; the last one ends."""
        number = 0
        while self.kills() < kills and not self.faults:
            number += 1
            folder = self.root / f"run-{number}"
            while self.kills() < kills and self.cut(folder) != 0 and not self.faults:
                if self.random.random() < 0.25:
                    self.flip(folder)
                elif faults := [f for f in newest_whole(folder)[1] if not self.counts["bits flipped"]]:
                    self.faults.append(f"a kill: expected whole checkpoints, got {faults}")
            if not self.faults:
                self._quietly([*self.options, "--output_dir", str(folder)], self.command)
                self._judge("end", 0, folder)
                self.compare(folder)
        return {name: self.counts[name] for name in sorted(self.counts)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=COMMANDS, help="sft, rl; both by default")
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to which the figures are added")
    options = parser.parse_args(argv)
    results: dict[str, Any] = {}
    status = 0
    for command in options.commands:
        root = Path(tempfile.mkdtemp(prefix=f"chaos-{command}-"))
        started = time.monotonic()
        try:
            chaos = Chaos(command, root, options.seed)
            counts = chaos.run(options.kills)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        results[command] = {**counts, "kills": chaos.kills(), "faults": len(chaos.faults), "seed": options.seed,
                            "seconds": round(time.monotonic() - started)}  # fmt: skip
        print(f"{command}: {results[command]}")
        print("".join(f"  {fault}\n" for fault in chaos.faults), file=sys.stderr, end="")
        status = status or int(bool(chaos.faults))
    keep(options.json, results)
    return status


if __name__ == "__main__":
    sys.exit(main())
