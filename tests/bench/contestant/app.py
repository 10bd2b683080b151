"""The product's API with one more route, the benchmark's small contract (`POST /tasks {kind, n, seconds}`)."""

from fastapi import FastAPI
from pydantic import BaseModel

from backcast.api.app import create_app
from backcast.api.deps import Deps
from backcast.api.submit import submit
from backcast.ledger.connection import Ledger
from backcast.models import Submission
from backcast.settings import load
from backcast.store import open_store


class Work(BaseModel):
    kind: str = "noop"
    n: int = 0
    seconds: float = 0.0


def app() -> FastAPI:
    settings = load()
    ledger = Ledger(settings.database.url.get_secret_value(), pool=settings.database.pool, name="backcast-api")
    app = create_app(ledger, open_store(settings.store), settings.api)

    @app.post("/tasks", status_code=202)
    async def accept(work: Work, deps: Deps) -> dict[str, str]:
        given = {"n": work.n} | ({"seconds": work.seconds} if work.kind == "sleep" else {})
        submitted = await submit(deps, work.kind, Submission(input=given), key=None)
        return {"task_run_id": str(submitted.run.id)}

    app.router.routes.insert(0, app.router.routes.pop())  # before the product's own POST /tasks
    return app
