"""Writes the generated files, or with --check lists those that are not current: docs/openapi.json, docs/settings.md,
docs/metrics.md, and the chart's schema, README and dashboards.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from backcast.api.app import create_app
from backcast.ledger.connection import Ledger
from backcast.process.metrics import PROCESSES, Definition
from backcast.settings import PREFIX, Api, Settings
from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from tests.support import chart, dashboards

DOCS = Path(__file__).parents[2] / "docs"


def openapi() -> str:
    app = create_app(Ledger("postgresql://nowhere/none"), open_store(StoreSettings()), Api())
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


def _rows(model: type[BaseModel], prefix: str, defaults: Any) -> list[str]:
    rows: list[str] = []
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        kind = field.annotation
        default = getattr(defaults, name) if defaults is not None else field.get_default()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _rows(kind, f"{variable}__", default)
            continue
        shown = "" if default in (None, PydanticUndefined) else f"`{default}`"
        if name == "cache":
            shown = "`~/.cache/backcast`"
        elif name == "url" and "DATABASE" in prefix:
            shown = "`postgresql://localhost/backcast`"
        elif hasattr(default, "total_seconds"):
            shown = f"`{default.total_seconds():g}` s"
        rows.append(f"| `{variable}` | {shown} | {' '.join((field.description or '').split())} |")
    return rows


def settings() -> str:
    head = [
        "# Settings",
        "",
        "Generated from `src/backcast/settings.py` by `make gen`. Environment variables, or the same tree as YAML",
        "in the file that `BACKCAST_CONFIG` names. Durations are seconds or ISO 8601 (`PT15S`). An empty variable is",
        "not set, `none` means none where that is allowed, and unknown names are refused. The command line reads two",
        "more: `BACKCAST_URL`, the address of the service, and `BACKCAST_API_KEY`, the key that it shows to the API.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    return "\n".join(head + _rows(Settings, PREFIX, Settings())) + "\n"


def metrics() -> str:
    head = [
        "# Metrics",
        "",
        "Generated from `src/backcast/process/metrics.py` by `make gen`. Each process serves its own, at `/metrics` of",
        "a port that only Prometheus should reach: the API on `api.metrics_port` (8084), workers on `worker.port`",
        "(8081), stewards on `steward.port` (8082). Beside these there are `process_cpu_seconds_total` and its like.",
        "Gauges about pools, tasks, lanes and the database are figures of the whole ledger: only the leading steward",
        "shows them, so a sum over all pods is right. Of tasks the first 100 have names of their own, those that are",
        "served before others; the rest shares `other`. No label has an owner, an id of a run, or an error's text.",
        "",
        "| metric | type | labels | process | meaning |",
        "|---|---|---|---|---|",
    ]
    served = dict[str, tuple[Definition, list[str]]]()
    for process in PROCESSES:
        for each in process().definitions:
            served.setdefault(each.name, (each, []))[1].append(process.process)
    rows = list[str]()
    for name, (each, by) in sorted(served.items()):
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{name}` | {each.kind} | {labels} | {', '.join(by)} | {each.text} |")
    return "\n".join(head + rows) + "\n"


def main(check: bool) -> int:
    stale = 0
    texts = {
        DOCS / "openapi.json": openapi(),
        DOCS / "settings.md": settings(),
        DOCS / "metrics.md": metrics(),
        **chart.files(),
        **dashboards.files(),
    }
    for path, text in texts.items():
        if check and (not path.exists() or path.read_text() != text):
            print(f"{path.relative_to(DOCS.parent)} is not current: run `make gen` and commit it.", file=sys.stderr)
            stale += 1
        elif not check:
            path.write_text(text)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
