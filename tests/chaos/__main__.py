"""Starts the world, runs load and faults against it, and reports the runs that were lost, if any."""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos import checks
from tests.chaos.faults import Storm
from tests.chaos.load import Load
from tests.chaos.readers import Readers
from tests.chaos.waves import Waves
from tests.chaos.world import World, world


async def chaos(it: World, *, seconds: float, seed: int, rate: float, settle: float) -> dict[str, Any]:
    """The report; its `violations` are empty when everything holds."""
    readers = Readers(it)
    load = Load(it, seed, rate, readers)
    waves = Waves(load, readers)
    storm = Storm(it, seed, seconds, calm=1.0 if seconds < 300 else 4.0)
    watching = [asyncio.create_task(watch) for watch in (it.watch(), load.watch())]
    over = asyncio.Event()
    flowing = asyncio.gather(load.flow(over), waves.flow(over))
    await storm.rage()
    over.set()
    _log(f"{len(storm.log)} faults in {it.now:.0f} s, {len(load.cases)} runs asked for; all is healed now")
    await it.up()
    await flowing
    wrong = {
        "everything comes to an end": await checks.settled(it, timeout=settle),
        "streams come to an end": await readers.ended(timeout=settle),
    }
    for watch in watching:
        watch.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    _log(f"settled after {it.now:.0f} s; checking")
    ledger, bucket = await checks.rows(it), checks.Bucket(it)
    load.cases += waves.cases(ledger)
    wrong |= {
        "accepted runs are in the ledger": checks.accepted(load, ledger),
        "outcomes are right": checks.outcomes(load.cases, ledger),
        "one outcome each": await checks.audited(it),
        "attempts are bounded": checks.bounded(ledger),
        "slots are a bound": checks.slots(it),
        "limits of lanes hold": await checks.lanes(it),
        "nothing that is paused begins": await checks.paused(it),
        "retries and cancels of many lose and repeat nothing": waves.wrong(ledger),
        "streams show each state once and in order": readers.saw(ledger),
        "values are right": await checks.values(it, load.cases, ledger),
        "objects are right": await checks.stored(bucket, load.cases, ledger),
        "no object without a run": await checks.swept(bucket, ledger, timeout=settle),
        "Prefect agrees": await checks.shown(it, ledger, timeout=settle),
        "nobody ends unasked": it.died,
    }
    reports = {name: await checks.explained(it, ledger, found) for name, found in wrong.items() if found}
    return {
        "seed": seed,
        "seconds": {"storm": seconds, "in all": round(it.now)},
        "versions": await it.versions(),
        "runs": len(load.cases),
        "runs by outcome": dict(Counter(row["state"] for row in ledger.values())),
        "executions": checks.executions(it, load.cases, ledger),
        "requests repeated": load.repeated,
        "retries": {
            "by themselves": sum(case.retry_of is not None for case in load.cases),
            "many": sum(wave.operation.get("done", 0) for wave in waves.all if wave.kind != "cancel"),
        },
        "streams": {
            "readers": len(readers.all),
            "connections": sum(reader.connections for reader in readers.all),
            "events": sum(len(reader.seen) for reader in readers.all),
        },
        "longest gap without progress, seconds": round(load.longest_gap, 1),
        "checks": {name: len(found) for name, found in wrong.items()},
        "violations": {name: lines for name, lines in reports.items() if name not in checks.KNOWN_MISSING},
        "known to be missing": {name: lines for name, lines in reports.items() if name in checks.KNOWN_MISSING},
        "faults by kind": dict(Counter(str(entry["kind"]) for entry in storm.log)),
        "faults": storm.log,
    }


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def main(arguments: argparse.Namespace) -> int:
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # if we are root, PostgreSQL runs as another user
    began = time.monotonic()
    _log(f"seed {arguments.seed}, {arguments.minutes:g} minutes, in {folder}")
    async with world(folder) as it:
        _log(f"everything is up after {time.monotonic() - began:.0f} s")
        report = await chaos(
            it,
            seconds=arguments.minutes * 60,
            seed=arguments.seed,
            rate=arguments.rate,
            settle=arguments.settle,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")
    for name in ("violations", "known to be missing"):
        for check, lines in report.pop(name).items():
            print(f"\n{name}: {check} ({report['checks'][check]})", *lines, sep="\n  ")
    faults = report.pop("faults")
    print(json.dumps(report, indent=2, ensure_ascii=False, default=str))
    failed = any(count for check, count in report["checks"].items() if check not in checks.KNOWN_MISSING)
    if failed:
        print("faults:", *[json.dumps(fault) for fault in faults], sep="\n  ")
        print(f"Not everything holds. All logs are in {folder}.")
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="how long load and faults go on")
    parser.add_argument("--seed", type=int, default=1, help="chooses faults and work")
    parser.add_argument("--rate", type=float, default=25, help="runs per second, at most")
    parser.add_argument("--settle", type=float, default=300, help="seconds for runs to end, and then for Prefect")
    parser.add_argument("--folder", type=Path, help="where to keep logs and data; a new temporary one unless given")
    parser.add_argument("--out", type=Path, help="write the report to this file, as JSON")
    sys.exit(asyncio.run(main(parser.parse_args())))
