"""`python -m tests.fuzz TARGET|all --seconds N`: feed parsers and devices whatever can be thought up.

With atheris, which scripts/fuzz installs, guided by coverage; without it by hypothesis, from the same seeds.
What was found to reach something new stays in build/fuzz/TARGET for the next time; an input that breaks a
promise is left there too, as `crash-…`, and belongs into tests/fuzz/corpus/TARGET with its repair.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.targets import NAMES

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "fuzz"
LAST_WORDS = 40  # lines of a child that found something
MEMORY_MB = 2048
GRACE_S = 60  # beyond its time, to start and to end in
FIGURES = {  # libFuzzer's own words
    "runs": re.compile(r"^Done (\d+) runs", re.MULTILINE),
    "coverage": re.compile(r"^#\d+\s+\w+\s+cov: (\d+)", re.MULTILINE),
    "corpus": re.compile(r"^#\d+\s.* corp: (\d+)", re.MULTILINE),
}


@dataclass(frozen=True)
class Outcome:
    """What one target's run came to; `coverage` counts edges, and is 0 where nobody looked."""

    target: str
    engine: str
    seconds: float
    runs: int
    coverage: int
    corpus: int
    failed: bool


def fuzz(target: str, seconds: int, engine: str) -> Outcome:
    """One target, in a process of its own. One that does not come to an end in time has failed."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz.child", engine, target, str(seconds), str(WORK / target)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        try:
            said, _ = child.communicate(timeout=seconds + GRACE_S)
            failed = child.returncode != 0
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
            said += f"{target}: still running {GRACE_S} s after its time; killed\n".encode()
            failed = True
    text = said.decode(errors="replace")
    figures = {name: (pattern.findall(text) or ["0"])[-1] for name, pattern in FIGURES.items()}
    if failed:
        sys.stderr.write("\n".join([*text.splitlines()[-LAST_WORDS:], ""]))
    return Outcome(
        target=target,
        engine=engine,
        seconds=round(time.monotonic() - start, 1),
        runs=int(figures["runs"]),
        coverage=int(figures["coverage"]),
        corpus=int(figures["corpus"]),
        failed=failed,
    )


def main() -> int:
    """1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=(*NAMES, "all"))
    parser.add_argument(
        "--seconds", type=int, default=60, help="in all, shared among the targets (default 60)"
    )
    parser.add_argument(
        "--engine", choices=("atheris", "hypothesis"), help="default: atheris where it is installed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    engine = arguments.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if engine == "hypothesis" and not arguments.engine:
        sys.stderr.write(
            "scripts/fuzz: no atheris here (pip install atheris): hypothesis instead, blind to coverage\n"
        )
    targets = NAMES if arguments.target == "all" else (arguments.target,)
    outcomes = []
    for target in targets:
        outcomes.append(fuzz(target, max(arguments.seconds // len(targets), 1), engine))
        if not arguments.json:
            sys.stdout.write(line(outcomes[-1]))
            sys.stdout.flush()
    if arguments.json:
        sys.stdout.write(json.dumps({"targets": [asdict(outcome) for outcome in outcomes]}) + "\n")
    return int(any(outcome.failed for outcome in outcomes))


def line(outcome: Outcome) -> str:
    """An outcome for people."""
    rate = outcome.runs / outcome.seconds
    found = f"FAILED, see {WORK / outcome.target}" if outcome.failed else "nothing found"
    return (
        f"{outcome.target:8} {outcome.engine}: {outcome.runs} inputs in {outcome.seconds:.0f} s "
        f"({rate:.0f}/s), {outcome.coverage} edges, {outcome.corpus} kept: {found}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
