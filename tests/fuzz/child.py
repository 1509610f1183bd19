"""One fuzzing process: `python -m tests.fuzz.child ENGINE TARGET SECONDS FOLDER`; for `tests.fuzz` to start.

It ends with 0 when the time is over, with another status at the first input that breaks a promise.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.fuzz.targets import committed

LONGEST_INPUT = 1 << 14
SLOWEST_S = 10  # for one input
EXAMPLES = 500  # of hypothesis, between two looks at the clock


def with_atheris(target: str, seconds: int, folder: Path) -> None:
    """Run libFuzzer over instrumented modules; never returns."""
    import atheris

    with atheris.instrument_imports(include=["vmm", "elftools", "tomllib"], enable_loader_override=False):
        module = load(target)
    lay_out(module, target, folder)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST_INPUT}",
            f"-timeout={SLOWEST_S}",
            "-rss_limit_mb=2048",
            f"-artifact_prefix={folder}/",
            str(folder),
        ],
        module.one,
    )
    atheris.Fuzz()


def with_hypothesis(target: str, seconds: int, folder: Path) -> None:
    """Seeds with changes, and any bytes, over and over."""
    from hypothesis import HealthCheck, given, settings

    from tests.fuzz.targets import inputs

    module = load(target)
    lay_out(module, target, folder)
    runs = 0

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def look(data: bytes) -> None:
        nonlocal runs
        runs += 1
        try:
            module.one(data)
        except BaseException:
            (folder / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        look()
    sys.stdout.write(f"Done {runs} runs\n")


def load(target: str) -> ModuleType:
    """The target's module."""
    return importlib.import_module(f"tests.fuzz.targets.{target}")


def lay_out(module: ModuleType, target: str, folder: Path) -> None:
    """Put the seeds and the committed inputs into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in (*module.seeds(), *committed(target)):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


ENGINES: dict[str, Callable[[str, int, Path], None]] = {
    "atheris": with_atheris,
    "hypothesis": with_hypothesis,
}


if __name__ == "__main__":
    logging.disable()
    ENGINES[sys.argv[1]](sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
