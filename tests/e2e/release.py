"""One release of the chart: helm installs, changes and removes it as a user does, requests reach it by the Ingress, and
plain SQL and S3 calls read its data without the product's code.
"""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from backcast.client import AsyncClient
from tests.e2e.cluster import INGRESS, Cluster, is_ready
from tests.e2e.images import CHART, NOW
from tests.e2e.programs import Done, run, run_aloud
from tests.support.runs import Runs
from tests.support.waiting import until

Values = Mapping[str, Any]

LEASE = 5
"""Seconds until a lost worker's runs are given to others: short, so that its tests are short."""


def merged(*values: Values) -> dict[str, Any]:
    """As helm merges files: mappings are merged, the rest is replaced."""
    result: dict[str, Any] = {}
    for each in values:
        for name, value in each.items():
            old = result.get(name)
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def small(host: str, model: str, tag: str = NOW) -> dict[str, Any]:
    """The least that works: one pod of each part, the tests' tasks, and a model that answers by script."""
    return {
        "image": {"tag": tag},
        "config": {"lease": f"PT{LEASE}S"},
        "auth": {"enabled": True},
        "api": {"replicas": 1},
        "workers": {"pools": {"default": {"replicas": 1, "slots": 4, "tasks": ["e2e_tasks"]}}},
        "steward": {"replicas": 1},
        "llm": {"mode": "off"},
        "model": {"backend": "openai", "name": "scripted", "baseUrl": model, "apiKey": "any"},
        "ingress": {"host": host},
    }


@dataclass
class Release(Runs):
    cluster: Cluster
    name: str
    namespace: str
    http: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=30, trust_env=False))
    every = 0.25

    # -- helm -------------------------------------------------------------------------------------------------------

    async def install(self, values: Values, *, wait: bool = True) -> Done:
        """Install or upgrade to exactly these values; with `wait`, the API can then be called."""
        return await self._helm("upgrade", "--install", values=values, wait=wait)

    async def first_install(self, values: Values, *, wait: bool = True) -> Done:
        return await self._helm("install", values=values, wait=wait)

    async def _helm(self, *verb: str, values: Values, wait: bool) -> Done:
        await self.cluster.make_namespace(self.namespace)
        given = Path(f"/tmp/{self.namespace}-{self.name}.json")
        given.write_text(json.dumps(values))
        files = ("--values", str(given)) if values else ()
        waiting = ("--wait", "--timeout", "5m") if wait else ("--timeout", "2m")
        try:
            done = await run_aloud(
                "helm", *verb, self.name, str(CHART), "-n", self.namespace, *files, *waiting, timeout=330
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self.setup_log()}") from None
        if wait:
            await self.open()
        return done

    async def restore(self, values: Values) -> None:
        """Return to these values and to rest, whatever a test did to it."""
        done = await run("helm", "status", self.name, "-n", self.namespace, "-o", "json", check=False)
        status = json.loads(done.out) if done.code == 0 else {}
        if status.get("info", {}).get("status") == "deployed" and status.get("config", {}) == values:
            with contextlib.suppress(AssertionError):
                await self.settled(timeout=90)
                return await self.open()
        await self.install(values)
        return await self.settled()

    @contextlib.asynccontextmanager
    async def installing(self, values: Values) -> AsyncIterator[None]:
        """An install that is expected to fail; it is removed at the end of the block."""
        helm = asyncio.create_task(self.first_install(values, wait=False))
        try:
            yield
        finally:
            helm.cancel()
            await asyncio.gather(helm, return_exceptions=True)
            await run("helm", "uninstall", self.name, "-n", self.namespace, "--no-hooks", timeout=120, check=False)
            # Helm does not remove hooks, and a failing Job would go on trying.
            await run("kubectl", "delete", "job,pod", "-l", self.selector(), "-n", self.namespace, "--wait=false")

    async def rollback(self) -> None:
        command = ("helm", "rollback", self.name, "-n", self.namespace, "--wait", "--timeout", "5m")
        await run_aloud(*command, timeout=330)

    async def uninstall(self) -> None:
        await run_aloud("helm", "uninstall", self.name, "-n", self.namespace, "--wait", timeout=330)

    async def is_installed(self) -> bool:
        return (await run("helm", "status", self.name, "-n", self.namespace, check=False)).code == 0

    async def notes(self) -> str:
        return (await run("helm", "get", "notes", self.name, "-n", self.namespace)).out

    # -- its parts --------------------------------------------------------------------------------------------------

    def selector(self, component: str = "", pool: str = "") -> str:
        labels = {
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": component,
            "backcast/pool": pool,
        }
        return ",".join(f"{name}={value}" for name, value in labels.items() if value)

    def pods(self, component: str = "", pool: str = "", *, leaving: bool = False) -> list[Any]:
        return self.cluster.pods(self.namespace, self.selector(component, pool), leaving=leaving)

    def pod(self, component: str, pool: str = "") -> str:
        """The name of a pod that is ready."""
        names = [pod.metadata.name for pod in self.pods(component, pool) if is_ready(pod)]
        assert names, f"no pod of {component} is ready"
        return names[0]

    def named(self, component: str, pool: str = "") -> str:
        """The name of the component's only Deployment, StatefulSet or Service."""
        of = {"label_selector": self.selector(component, pool)}
        ask, apps = self.cluster.asking, self.cluster.apps
        found = ask(apps.list_namespaced_deployment, self.namespace, **of).items
        found += ask(apps.list_namespaced_stateful_set, self.namespace, **of).items
        [name] = [workload.metadata.name for workload in found]
        return name

    async def settled(self, *, timeout: float = 240) -> None:
        """Every Deployment and StatefulSet has the pods that it wants, of its present template, and no others."""
        ask, apps, of = self.cluster.asking, self.cluster.apps, {"label_selector": self.selector()}

        async def look() -> list[str]:
            wrong: list[str] = []
            for kind in (apps.list_namespaced_deployment, apps.list_namespaced_stateful_set):
                for workload in ask(kind, self.namespace, **of).items:
                    status, wanted = workload.status, workload.spec.replicas or 0
                    has = (status.replicas or 0, status.updated_replicas or 0, status.ready_replicas or 0)
                    if status.observed_generation != workload.metadata.generation or has != (wanted,) * 3:
                        wrong.append(f"{workload.metadata.name} has {has} of {wanted}")
            return wrong

        await until(look, lambda wrong: not wrong, timeout=timeout, every=0.5)

    async def setup_log(self) -> str:
        """The log of the newest pod of the setup Job."""
        found = self.cluster.asking(
            self.cluster.core.list_namespaced_pod, self.namespace, label_selector=self.selector("setup")
        ).items
        if not found:
            return "(no pod of the setup Job)"
        newest = max(found, key=lambda pod: pod.metadata.creation_timestamp)
        done = await run("kubectl", "logs", "-n", self.namespace, newest.metadata.name, "--tail=40", check=False)
        return done.output

    async def setup_fails(self, *, timeout: float = 300) -> str:
        """The last line in the log of the setup Job's failed pod."""
        core, ask = self.cluster.core, self.cluster.asking

        async def look() -> list[str]:
            pods = ask(core.list_namespaced_pod, self.namespace, label_selector=self.selector("setup")).items
            ends = [
                (pod.metadata.name, state.terminated.exit_code)
                for pod in pods
                for status in pod.status.container_statuses or []
                for state in (status.state, status.last_state)
                if state is not None and state.terminated is not None
            ]
            assert all(code for _, code in ends), f"the setup Job succeeded: {ends}"
            return [name for name, _ in ends]

        [name, *_] = await until(look, timeout=timeout, every=1)
        done = await run("kubectl", "logs", "-n", self.namespace, name)
        return done.out.strip().splitlines()[-1]

    # -- the API, from outside ----------------------------------------------------------------------------------------

    @cached_property
    def secret(self) -> dict[str, str]:
        found = self.cluster.asking(
            self.cluster.core.list_namespaced_secret, self.namespace, label_selector=self.selector()
        ).items
        [data] = [secret.data for secret in found if "api-key" in (secret.data or {})]
        return {name: base64.b64decode(value).decode() for name, value in data.items()}

    async def open(self) -> None:
        """Prepare `http` for calls of the API: the Ingress's host, and the key of the Secret."""
        ingresses = self.cluster.asking(
            self.cluster.network.list_namespaced_ingress, self.namespace, label_selector=self.selector("api")
        ).items
        [ingress] = ingresses
        vars(self).pop("secret", None)
        headers = {"Authorization": f"Bearer {self.secret['api-key']}"}
        if ingress.spec.rules[0].host:
            headers["Host"] = ingress.spec.rules[0].host
        self.http.base_url = httpx.URL(INGRESS)
        self.http.headers.update(headers)

        async def look() -> int:
            return (await self.http.get("/v1/lanes")).status_code

        await until(look, lambda status: status == 200, timeout=60, every=0.25)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """The product's own client."""
        headers = {name: self.http.headers[name] for name in ("Host", "Authorization") if name in self.http.headers}
        async with AsyncClient(INGRESS, headers=headers, patience=60) as client:
            yield client

    async def knows(self, task: str, *, timeout: float = 120) -> None:
        """Wait until a worker has registered the task."""

        async def look() -> int:
            return (await self.http.get(f"/v1/tasks/{task}")).status_code

        await until(look, lambda status: status == 200, timeout=timeout, every=0.5)

    async def submit(self, task: str, **given: Any) -> str:
        await self.knows(task)
        return await super().submit(task, **given)

    async def do(self, task: str, **given: Any) -> Any:
        return await self.result(await self.submit(task, **given))

    # -- past the product ---------------------------------------------------------------------------------------------

    async def sql(self, statement: str, database: str = "backcast") -> list[list[str]]:
        """Run it as the superuser in the bundled server's own pod; returns rows of text."""
        psql = f'psql -X -A -t -q -v ON_ERROR_STOP=1 -U "${{POSTGRES_USER:-postgres}}" -d {database} -c "$0"'
        done = await self.cluster.execute(self.namespace, self.pod("postgres"), "sh", "-c", psql, statement)
        return [line.split("|") for line in done.out.splitlines()]

    async def watch_ends(self) -> None:
        """From here on a trigger records every end of a run, whatever the product does."""
        await self.sql(_WATCH)

    async def stored(self, run_id: str) -> list[str]:
        """The keys of the run's objects in the bucket, listed by a plain S3 client."""
        done = await self.cluster.execute(
            self.namespace, self.pod("api"), "python", "-c", _LIST.format(part=f"/results/{run_id}/")
        )
        return list(json.loads(done.out))


_WATCH = """
create schema if not exists e2e;
create table if not exists e2e.ends (id uuid, state text, fence bigint, result_key text);
create or replace function e2e.note() returns trigger language plpgsql security definer as $$ begin
    insert into e2e.ends values (new.id, new.state, new.fence, new.result_key);
    return null;
end $$;
create or replace trigger e2e_ends after insert or update on backcast.ended for each row execute function e2e.note();
create or replace trigger e2e_late after insert or update on backcast.ended_late for each row
    execute function e2e.note();
"""

_LIST = """
import json
from botocore.session import get_session
from backcast.settings import load

store = load().store
s3 = get_session().create_client(
    "s3", endpoint_url=store.endpoint, region_name=store.region or "us-east-1",
    aws_access_key_id=store.access_key.get_secret_value(), aws_secret_access_key=store.secret_key.get_secret_value())
bucket = store.url.removeprefix("s3://").split("/")[0]
found = [each["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
         for each in page.get("Contents", [])]
print(json.dumps([key for key in found if "{part}" in "/" + key]))
"""
