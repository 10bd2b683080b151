"""The processes accept the chart's ConfigMap and environment, which these tests load as the processes do."""

import base64
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prefect.settings import Settings as PrefectSettings
from psycopg.conninfo import conninfo_to_dict

from backcast import database_urls
from backcast.ledger.rights import PROCESSES
from backcast.local.up import PREFECT_SERVER
from backcast.settings import Settings, load
from backcast.variables import CONFIG_VARIABLE
from tests.chart.rendering import SCENARIOS, Object, Pod, Release, Values, render, scenario

SECRETS = {
    "api-read-key": "a-key-that-only-looks",
    "api-key": "an-api-key-of-some-length, another-api-key-of-ours",
    "database-url": "postgresql://backcast:p@db.example.org:6432/backcast",
    "prefect-database-url": "postgresql+asyncpg://prefect:p@db.example.org:6432/prefect",
    "admin-url": "postgresql://postgres:p@db.example.org:6432/postgres",
    "scaler-url": "postgresql://scaler:p@db.example.org:6432/backcast",
    **{f"{part}-database-url": f"postgresql://{part}:p@db.example.org:6432/backcast" for part in PROCESSES},
}
"""The values of Secrets that the chart does not make; any other value is `secret`."""


def environment(release: Release, container: Object) -> dict[str, str]:
    """The environment of a container, as the kubelet makes it."""
    made: dict[str, str] = {}
    kept = {key: value for each in release.of("Secret") for key, value in each["data"].items()}
    for variable in container["env"]:
        if "value" in variable:
            value = re.sub(r"\$\((\w+)\)", lambda found: made.get(found[1], found[0]), variable["value"])
        elif "secretKeyRef" in variable["valueFrom"]:
            key = variable["valueFrom"]["secretKeyRef"]["key"]
            value = base64.b64decode(kept[key]).decode() if key in kept else SECRETS.get(key, "secret")
        else:
            value = "from the pod"
        made[variable["name"]] = value
    return made


def loaded(release: Release, container: Object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    made = environment(release, container)
    for name in [name for name in os.environ if name.startswith("BACKCAST_")]:
        monkeypatch.delenv(name)
    if CONFIG_VARIABLE in made:
        assert made[CONFIG_VARIABLE] == "/etc/backcast/backcast.yaml"
        assert any(mount["mountPath"] == "/etc/backcast" for mount in container["volumeMounts"])
        (folder / "backcast.yaml").write_text(yaml.safe_dump(release.config))
        made[CONFIG_VARIABLE] = str(folder / "backcast.yaml")
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    return load()


OURS = [
    pytest.param(name, pod, container, id=f"{name}-{pod.name}-{container['name']}")
    for name in SCENARIOS
    for pod in scenario(name).pods
    for container in pod.containers
    if any(variable["name"].startswith("BACKCAST_") for variable in container["env"])
]


@pytest.mark.parametrize(("name", "pod", "container"), OURS)
def test_every_process_takes_its_settings(
    name: str, pod: Pod, container: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(scenario(name), container, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_address_leads_to_a_service_or_outside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = scenario(name)
    settings = loaded(release, release.pod("setup").main, tmp_path, monkeypatch)
    services = {
        f"{each['metadata']['name']}:{port['port']}" for each in release.of("Service") for port in each["spec"]["ports"]
    }
    urls = [settings.database.url, settings.setup.prefect_url, settings.setup.admin_url]
    addresses = [url.get_secret_value() for url in urls if url is not None] + [*settings.setup.roles.values()]
    addresses += [each["value"] for pod in release.pods for each in pod.main["env"] if each["name"] == "BACKCAST_URL"]
    addresses += filter(None, [settings.store.endpoint, settings.prefect.api_url, settings.model.base_url])
    found = {urlsplit(address).netloc.rpartition("@")[2] for address in addresses}
    assert {place for place in found if ".example.org" not in place} <= services
    assert found


def of(
    component: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str | None = None
) -> Settings:
    release = render(values)
    return loaded(release, release.pod(component, pool).main, tmp_path, monkeypatch)


def test_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = of("worker", {}, tmp_path, monkeypatch)
    assert (worker.worker.host, worker.worker.pool, worker.worker.slots, worker.builtin_tasks) == (
        "0.0.0.0",
        "default",
        10,
        True,
    )
    assert worker.model.embedded
    assert worker.model.embedded_url == "http://demo-backcast-llm:8083/v1"
    assert (worker.store.url, worker.store.endpoint) == ("s3://backcast", "http://demo-backcast-minio:9000")
    assert worker.prefect.auth_string is not None


def test_a_pool_has_settings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"slots": 3, "grace": 120, "tasks": ["a.b", "c"]}
    settings = of("worker", {"workers": {"pools": {"own": pool}}}, tmp_path, monkeypatch, "own")
    assert (settings.worker.pool, settings.worker.slots, settings.worker.grace.total_seconds()) == ("own", 3, 120)
    assert (settings.tasks, settings.builtin_tasks) == (["a.b", "c"], False)


@pytest.mark.parametrize(
    ("values", "has_key"),
    [
        ({}, False),
        ({"workers": {"pools": {"default": {"submits": True}}}}, True),
        ({"auth": {"enabled": False}}, False),
    ],
)
def test_tasks_find_the_api_and_get_its_key_if_they_may_submit(values: dict[str, Any], has_key: bool) -> None:
    release = render(values)
    made = environment(release, release.pod("worker").main)
    assert made["BACKCAST_URL"] == "http://demo-backcast-api:8000"
    assert ("BACKCAST_API_KEY" in made) is has_key
    if has_key:
        assert made["BACKCAST_API_KEY"] == environment(release, release.pod("api").main)["BACKCAST_API__KEYS"]


def test_config_wins_over_what_the_chart_derives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "store": {"path_style": False, "timeout": 3},
        "prefect": {"history": False},
        "steward": {"keep_runs": None},
        "model": {"slots": 4},
        "api": {"max_waiting": 10_000_000},
    }
    settings = of("api", {"config": config}, tmp_path, monkeypatch)
    assert settings.store.path_style is False
    assert settings.store.timeout.total_seconds() == 3
    assert settings.store.url == "s3://backcast"
    assert settings.prefect.history is False
    assert settings.prefect.api_url == "http://demo-backcast-prefect:4200/api"
    assert settings.steward.keep_runs is None
    assert settings.steward.keep_history == timedelta(days=30)
    assert settings.model.slots == 4
    assert settings.api.max_waiting == 10_000_000


SERVICE = ["demo-backcast-api.team", "demo-backcast-api.team.svc", "demo-backcast-api.team.svc.cluster.local"]


@pytest.mark.parametrize(
    ("values", "hosts"),
    [
        ({}, []),  # the key keeps foreign pages out
        ({"auth": {"enabled": False}}, ["*"]),  # the Ingress has no host
        ({"auth": {"enabled": False}, "ingress": {"host": "a.example.org"}}, [*SERVICE, "a.example.org"]),
        ({"auth": {"enabled": False}, "ingress": {"hosts": ["b.org"]}}, [*SERVICE, "b.org"]),
        ({"auth": {"enabled": False}, "ingress": {"host": "a.org", "hosts": ["b.org"]}}, [*SERVICE, "a.org", "b.org"]),
        ({"auth": {"enabled": False}, "ingress": {"enabled": False}}, SERVICE),
        (
            {"auth": {"enabled": False}, "ingress": {"enabled": False}, "api": {"service": {"type": "LoadBalancer"}}},
            ["*"],
        ),
        ({"auth": {"enabled": False}, "config": {"api": {"allowed_hosts": ["b.org"]}}}, ["b.org"]),
    ],
)
def test_without_keys_the_api_answers_for_the_hosts_that_lead_to_it(
    values: dict[str, Any], hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = render(values)
    made = yaml.safe_load(yaml.safe_dump(release.config))
    assert made["api"]["allowed_hosts"] == hosts
    monkeypatch.setenv("BACKCAST_API__ALLOWED_HOSTS", ",".join(hosts))
    assert load().api.allowed_hosts == hosts


def test_everything_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = scenario("external")
    settings = loaded(release, release.pod("worker").main, tmp_path, monkeypatch)
    store = settings.store
    assert (store.url, store.endpoint) == ("s3://results/backcast", "https://s3.example.org:9443")
    assert (store.region, store.path_style) == ("eu-1", False)
    assert store.public_endpoint == "https://results.example.org"
    assert store.ca_bundle == Path("/etc/backcast-ca/ca.crt")
    assert not settings.model.embedded
    assert settings.model.api_key is not None
    assert settings.steward.keep_history is None, "the Prefect server is somebody else's"
    assert not release.of("StatefulSet")
    assert not release.of("Secret"), "the chart has no secret to keep"
    kept = {pod.component for pod in release.pods}
    assert kept == {"api", "worker", "steward", "setup", "test"}


def test_the_pods_own_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"store": {"mode": "external", "external": {"bucket": "b"}}}
    settings = of("api", values, tmp_path, monkeypatch)
    assert (settings.store.url, settings.store.endpoint, settings.store.access_key) == ("s3://b", None, None)


def test_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = of("worker", {"prefectServer": {"mode": "off"}}, tmp_path, monkeypatch)
    assert (settings.prefect.api_url, settings.prefect.history) == (None, False)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({}, None),
        ({"ingress": {"enabled": True, "host": "p.example.org"}}, "http://p.example.org"),
        ({"ingress": {"enabled": True, "host": "p.example.org", "tls": {"enabled": True}}}, "https://p.example.org"),
        ({"publicUrl": "https://elsewhere.example.org/prefect"}, "https://elsewhere.example.org/prefect"),
        (
            {"publicUrl": "https://front.example.org", "ingress": {"enabled": True, "host": "p.example.org"}},
            "https://front.example.org",
        ),
    ],
)
def test_the_console_links_runs_to_prefects_pages(
    given: Values, address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = of("api", {"prefectServer": given}, tmp_path, monkeypatch)
    assert settings.api.prefect_ui == address


def test_given_urls_become_secrets() -> None:
    """The chart changes the scheme to the one that Prefect needs."""
    external = {"url": "postgresql://b:p@h/b", "prefectUrl": "postgresql://p:p@h/p", "adminUrl": "postgresql://a:p@h/a"}
    release = render({"postgres": {"mode": "external", "external": external}})
    assert not release.of("StatefulSet", "postgres")
    prefect = environment(release, release.pod("prefect-server").main)
    assert prefect["PREFECT_API_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://p:p@h/p"
    setup = environment(release, release.pod("setup").main)
    assert setup["BACKCAST_SETUP__ADMIN_URL"] == "postgresql://a:p@h/a"
    assert setup["BACKCAST_SETUP__PREFECT_URL"] == "postgresql+asyncpg://p:p@h/p"
    assert "p:p@" not in str(release.of("ConfigMap"))
    optional = {
        each["name"]: each["valueFrom"]["secretKeyRef"].get("optional", False)
        for each in release.pod("setup").main["env"]
        if each["name"].startswith("BACKCAST_SETUP__")
    }
    assert optional == {
        "BACKCAST_SETUP__ADMIN_URL": True,
        "BACKCAST_SETUP__SCALER_URL": True,
        "BACKCAST_SETUP__PREFECT_URL": False,
    }


@pytest.mark.parametrize(
    ("given", "prefects"),
    [
        ("postgres://p:p@h/p", "postgresql+asyncpg://p:p@h/p"),
        ("postgresql://p:p&q@h/p?sslmode=require", "postgresql+asyncpg://p:p&q@h/p?ssl=require"),
        ("postgresql+asyncpg://h/p?ssl=require", "postgresql+asyncpg://h/p?ssl=require"),
        (
            "postgresql://h/p?connect_timeout=5&keepalives_idle=9&sslmode=require&channel_binding=require",
            "postgresql+asyncpg://h/p?ssl=require",
        ),
    ],
)
def test_prefect_and_setup_both_take_the_url_of_its_database(given: str, prefects: str) -> None:
    release = render({"postgres": {"mode": "external", "external": {"url": "postgresql://h/b", "prefectUrl": given}}})
    prefect = environment(release, release.pod("prefect-server").main)
    assert prefect["PREFECT_API_DATABASE_CONNECTION_URL"] == prefects
    setup = environment(release, release.pod("setup").main)["BACKCAST_SETUP__PREFECT_URL"]
    in_libpq = conninfo_to_dict(database_urls.for_libpq(database_urls.check(setup)))
    assert in_libpq.get("sslmode") == ("require" if "require" in given else None)


OWNED = {"url": "postgresql://all:p@h/b", "prefectUrl": "postgresql://p:p@h/p"}
ROLES: dict[str, tuple[Values, dict[str, str]]] = {
    "bundled": ({}, {"setup": "backcast", **{part: f"backcast_{part}" for part in PROCESSES}}),
    "in a Secret": (SCENARIOS["external"], {"setup": "backcast", **{part: part for part in PROCESSES}}),
    "in the values": (
        {
            "postgres": {
                "mode": "external",
                "external": OWNED | {f"{part}Url": f"postgresql://my-{part}:p@h/b" for part in PROCESSES},
            }
        },
        {"setup": "all", **{part: f"my-{part}" for part in PROCESSES}},
    ),
    "shared": ({"postgres": {"mode": "external", "external": OWNED}}, dict.fromkeys(["setup", *PROCESSES], "all")),
}
"""The values, and the database role of each pod."""


@pytest.mark.parametrize("case", ROLES)
def test_each_part_has_a_database_role_of_its_own(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setup and the check have that of the owner, and know the others."""
    values, roles = ROLES[case]
    release = render(values)
    [check] = [pod for pod in release.pods if pod.component == "test" and pod.main["args"] == ["check"]]
    pods = {part: release.pod(part) for part in roles} | {"check": check}
    settings = {part: loaded(release, pod.main, tmp_path, monkeypatch) for part, pod in pods.items()}
    urls = {part: it.database.url.get_secret_value() for part, it in settings.items()}
    assert {part: urlsplit(url).username for part, url in urls.items()} == roles | {"check": roles["setup"]}
    assert len({(urlsplit(url).hostname, urlsplit(url).path) for url in urls.values()}) == 1
    for part in ("setup", "check"):
        known = {name: url for name, url in settings[part].setup.roles.items() if name != "scaler"}
        assert known == ({} if case == "shared" else {name: urls[name] for name in PROCESSES}), part


def test_prefect_takes_its_settings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that spare it work are the same as in `backcast up`."""
    release = scenario("defaults")
    variables = environment(release, release.pod("prefect-server").main)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = PrefectSettings().server
    assert server.ui.api_url == "/api", "on the host that serves the pages"
    assert str(server.ui.static_directory).startswith("/tmp/")
    assert server.api.auth_string is not None
    assert server.database.connection_url is not None
    url = server.database.connection_url.get_secret_value()
    assert re.fullmatch(r"postgresql\+asyncpg://prefect:\w+@demo-backcast-postgres:5432/prefect", url)
    assert not any(
        (server.analytics_enabled, server.services.triggers.enabled, server.services.event_persister.enabled)
    )
    assert variables.items() >= PREFECT_SERVER.items()


def test_each_process_gets_no_more_secrets_than_it_needs() -> None:
    secrets = {
        pod.component: {
            each["valueFrom"]["secretKeyRef"]["key"] for each in pod.main["env"] if "secretKeyRef" in str(each)
        }
        for pod in render({"model": {"apiKey": "k"}}).pods
        if pod.component != "test"
    }
    store = {"s3-access-key", "s3-secret-key"}
    roles = {f"{part}-password" for part in PROCESSES}
    assert secrets == {
        "api": store | {"api-key", "api-read-key", "api-password"},  # the second one is optional
        "worker": store | {"prefect-auth-string", "model-api-key", "worker-password"},
        "steward": store | {"prefect-auth-string", "steward-password"},
        "prefect-server": {"prefect-password", "prefect-auth-string"},
        "postgres": {"postgres-password"},
        "store": store,
        "setup": store | roles | {"backcast-password", "postgres-password", "prefect-password", "scaler-password"},
    }
