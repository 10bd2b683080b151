"""Values that can't work are refused at the install, with a sentence that names the remedy."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from backcast.settings import Settings
from tests.chart.rendering import Values, refusal, render

EXTERNAL = {"url": "postgresql://b:p@h/b", "prefectUrl": "postgresql://p:p@h/p"}


def external(**more: Any) -> Values:
    return {"postgres": {"mode": "external", "external": more}}


def bucket(**more: Any) -> Values:
    return {"store": {"mode": "external", "external": more}}


def pools(**more: Any) -> Values:
    return {"workers": {"pools": more}}


KEDA = {"mode": "keda"}

# The schema: unknown keys and wrong types, and where they are.
MISTAKES: dict[str, tuple[Values, str]] = {
    "a key": ({"apii": {}}, "additional properties 'apii' not allowed"),
    "a key of a part": ({"api": {"replica": 2}}, "at '/api': additional properties 'replica' not allowed"),
    "a key of a pool": (pools(gpu={"slot": 2}), "at '/workers/pools/gpu': additional properties 'slot' not allowed"),
    "a key of an image": ({"llm": {"image": {"name": "x"}}}, "at '/llm/image': additional properties 'name'"),
    "a setting": ({"config": {"leese": 5}}, "at '/config': additional properties 'leese' not allowed"),
    "a setting inside": ({"config": {"worker": {"slotz": 5}}}, "at '/config/worker': additional properties 'slotz'"),
    "a setting's range": ({"config": {"max_attempts": 0}}, "at '/config/max_attempts'"),
    "a type": ({"api": {"replicas": "many"}}, "at '/api/replicas': got string, want integer"),
    "a number for a text": ({"image": {"tag": 1}}, "at '/image/tag': got number, want string"),
    "a choice": ({"postgres": {"mode": "cloud"}}, "at '/postgres/mode': value must be one of 'bundled', 'external'"),
    "a range": ({"workers": {"defaults": {"slots": 0}}}, "at '/workers/defaults/slots': minimum: got 0, want 1"),
    "a text for a switch": ({"auth": {"enabled": "no"}}, "at '/auth/enabled': got string, want boolean"),
    "a resource": ({"api": {"resources": {"request": {"cpu": 1}}}}, "additional properties 'request' not allowed"),
    "a quantity": ({"llm": {"resources": {"limits": {"memory": "1 GB"}}}}, "at '/llm/resources/limits/memory'"),
    "a size": ({"postgres": {"bundled": {"storage": {"size": "foo"}}}}, "at '/postgres/bundled/storage/size'"),
    "a reference": (
        {"extraEnv": {"X": {"valueFrom": {"secretKeyRef": {"nam": "s", "key": "k"}}}}},
        "additional properties 'nam' not allowed",
    ),
    "a reference in a list": (
        pools(default={"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"nam": "s", "key": "k"}}}]}),
        "additional properties 'nam' not allowed",
    ),
    "a reference without a name": (
        {"extraEnv": [{"name": "X", "valueFrom": {"secretKeyRef": {"key": "k"}}}]},
        "missing property 'name'",
    ),
    "a variable": ({"extraEnv": [{"nam": "X", "value": "1"}]}, "at '/extraEnv/0'"),
    "a value's source": ({"extraEnv": {"X": {"valuesFrom": {}}}}, "at '/extraEnv/X'"),
    "a volume": ({"extraVolumes": [{"name": "v", "configMp": {"name": "c"}}]}, "'configMp' not allowed"),
    "a mount": ({"api": {"extraVolumeMounts": [{"name": "v", "path": "/x"}]}}, "'path' not allowed"),
    "a toleration": ({"tolerations": [{"keys": "spot"}]}, "'keys' not allowed"),
    "an affinity": ({"affinity": {"nodeAfinity": {}}}, "'nodeAfinity' not allowed"),
    "a peer": ({"networkPolicy": {"apiPeers": [{"podSelectr": {}}]}}, "'podSelectr' not allowed"),
    "a URL for a host": ({"ingress": {"host": "https://h.example.org"}}, "at '/ingress/host'"),
    "a port with a host": ({"ingress": {"hosts": ["h.example.org:8080"]}}, "at '/ingress/hosts/0'"),
    "an address for a host": ({"ingress": {"host": "10.0.0.1"}}, "at '/ingress/host'"),
    "a path without a slash": ({"ingress": {"path": "backcast"}}, "at '/ingress/path'"),
    "a host for a URL": ({"model": {"baseUrl": "models.example.org"}}, "at '/model/baseUrl'"),
    "a URL of another database": (external(url="mysql://h/b"), "at '/postgres/external/url'"),
    "one address of many": ({"listen": "10.0.0.1"}, "at '/listen': value must be one of '0.0.0.0', '::'"),
    "a range of addresses": ({"networkPolicy": {"blockedCidrs": ["10.0.0.0"]}}, "at '/networkPolicy/blockedCidrs/0'"),
    "a label": ({"commonLabels": {"team": "a b"}}, "at '/commonLabels/team'"),
    "a digest": ({"api": {"image": {"digest": "abc"}}}, "at '/api/image/digest'"),
    "a pull secret": ({"imagePullSecrets": [{"nam": "s"}]}, "at '/imagePullSecrets/0'"),
}

# The templates: each value is fine by itself, and together they are not.
COMBINATIONS: dict[str, tuple[Values, str]] = {
    "pool settings": (
        {"config": {"worker": {"slots": 3}}},
        "config.worker.slots is set by the chart: use workers.defaults.slots.",
    ),
    "tasks": ({"config": {"tasks": []}}, "config.tasks is set by the chart: use workers.pools.<name>.tasks."),
    "a port": ({"config": {"api": {"port": 80}}}, "config.api.port is set by the chart: leave it out"),
    "a host": ({"config": {"model": {"host": "::"}}}, "config.model.host is set by the chart: use listen."),
    "TLS without a name": (
        {"ingress": {"tls": {"enabled": True}}},
        "ingress.tls.enabled needs ingress.host: a certificate belongs to a host name.",
    ),
    "the API's scaler": (
        {"api": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}},
        "api.autoscaling.minReplicas (5) is more than maxReplicas (2): swap them.",
    ),
    "no pools": (
        pools(default=None),
        "workers.pools is empty, so no worker would run: keep the pool default, or name another one.",
    ),
    "a long name": (
        pools(**{"p" * 21: {}}),
        "has at most 20 characters of a-z, 0-9 and -, and no - at either end: rename it.",
    ),
    "a capital": (pools(GPU={}), "workers.pools.GPU: a pool's name has at most 20 characters of a-z"),
    "a pool without tasks": (
        pools(idle={}),
        "workers.pools.idle serves no task: name modules in workers.pools.idle.tasks, set builtinTasks, or remove the",
    ),
    "two pools for one task": (
        pools(more={"builtinTasks": True}),
        (
            "The pools default, more all serve the built-in tasks, but a task belongs to one pool: set "
            "workers.pools.<name>.builtinTasks to false for all but one."
        ),
    ),
    "HPA to zero": (
        pools(default={"autoscaling": {"mode": "hpa", "minReplicas": 0}}),
        (
            "workers.pools.default: only KEDA can scale to zero: set autoscaling.minReplicas to 1 or more, or "
            "autoscaling.mode to keda."
        ),
    ),
    "a pool's scaler": (
        pools(default={"autoscaling": {**KEDA, "minReplicas": 9}}),
        "workers.pools.default: autoscaling.minReplicas (9) is more than maxReplicas (4): swap them.",
    ),
    "two keys": (
        {"model": {"apiKey": "k", "existingSecret": "s"}},
        "model.apiKey and model.existingSecret both give the provider's key: keep one.",
    ),
    "no model": (
        {"llm": {"mode": "off"}},
        (
            "The pool default serves the built-in task, which has no model: set llm.mode to auto, name a provider in "
            "model, or set builtinTasks to false."
        ),
    ),
    "a model without a client": (
        {"llm": {"mode": "on"}, "model": {"apiKey": "k"}},
        "llm.mode is on, but the workers ask the provider in model: set llm.mode to auto, or model.backend to",
    ),
    "no provider": (
        {"model": {"backend": "openai"}},
        "model.backend is openai, but no provider is named: set model.existingSecret, model.apiKey or model.baseUrl.",
    ),
    "no database": (
        external(),
        "postgres.mode is external: set postgres.external.existingSecret or postgres.external.url.",
    ),
    "two databases": (
        external(**EXTERNAL, existingSecret="s"),
        "postgres.external.existingSecret replaces all URLs: keep the one or the others.",
    ),
    "a role for some parts": (
        external(**EXTERNAL, workerUrl="postgresql://w:p@h/b"),
        "postgres.external.apiUrl, workerUrl and stewardUrl belong together: set all three, or none for parts that",
    ),
    "roles in no Secret": (
        external(**EXTERNAL, rolePerPart=True),
        "postgres.external.rolePerPart is for existingSecret: set apiUrl, workerUrl and stewardUrl instead.",
    ),
    "a port beside URLs": (
        external(**EXTERNAL, port=6432),
        "postgres.external.port (6432) is in none of the URLs: it is for existingSecret; write it into the URLs, or",
    ),
    "no database for Prefect": (
        external(url=EXTERNAL["url"]),
        (
            "The bundled Prefect server needs a database of its own: set postgres.external.prefectUrl, or "
            "prefectServer.mode to external or off."
        ),
    ),
    "no role for KEDA": (
        {**external(**EXTERNAL), **pools(default={"autoscaling": KEDA})},
        "KEDA reads the backlog with a role of its own: set postgres.external.scalerUrl, or autoscaling.mode to",
    ),
    "an external database beside the bundled one": (
        {"postgres": {"external": {"url": EXTERNAL["url"]}}},
        (
            "postgres.external.url is set, but postgres.mode is bundled, so it would be ignored: remove it, or set "
            "postgres.mode to external."
        ),
    ),
    "a bundled database beside the external one": (
        {"postgres": {"mode": "external", "external": EXTERNAL, "bundled": {"storage": {"size": "20Gi"}}}},
        "postgres.bundled.storage.size is set, but postgres.mode is external, so it would be ignored",
    ),
    "an external store beside the bundled one": (
        {"store": {"external": {"bucket": "b"}}},
        "store.external.bucket is set, but store.mode is bundled, so it would be ignored",
    ),
    "a bundled store beside the external one": (
        {"store": {"mode": "external", "external": {"bucket": "b"}, "bundled": {"kind": "seaweedfs"}}},
        "store.bundled.kind is set, but store.mode is external, so it would be ignored",
    ),
    "a fallback that is off": (
        {"store": {"fallback": {"external": {"bucket": "b"}}}},
        "store.fallback.external.bucket is set, but store.fallback.mode is off, so it would be ignored",
    ),
    "an external Prefect beside the bundled one": (
        {"prefectServer": {"external": {"apiUrl": "https://p.example.org/api"}}},
        "prefectServer.external.apiUrl is set, but prefectServer.mode is bundled, so it would be ignored",
    ),
    "a provider beside the embedded model": (
        {"model": {"backend": "embedded", "existingSecret": "s"}},
        "model.existingSecret is set, but model.backend is embedded, so it would be ignored",
    ),
    "an Ingress that is off": (
        {"ingress": {"enabled": False, "host": "a.example.org"}},
        (
            "ingress.host is set, but ingress.enabled is false, so it would be ignored: remove it, or set "
            "ingress.enabled to true."
        ),
    ),
    "a scaler of the API that is off by default": (
        {"api": {"autoscaling": {"maxReplicas": 9}}},
        "api.autoscaling.maxReplicas is set, but api.autoscaling.enabled is false",
    ),
    "HTTPS that is off": (
        {"prefectServer": {"ingress": {"enabled": True, "host": "p.example.org", "tls": {"secretName": "s"}}}},
        "prefectServer.ingress.tls.secretName is set, but prefectServer.ingress.tls.enabled is false",
    ),
    "a scaler that is off": (
        pools(default={"autoscaling": {"maxReplicas": 9}}),
        "workers.pools.default.autoscaling.maxReplicas is set, but its mode is off, so it would be ignored",
    ),
    "a scaler that is off for every pool": (
        {"workers": {"defaults": {"autoscaling": {"maxReplicas": 9}}}},
        "workers.defaults.autoscaling.maxReplicas is set, but the mode of every pool is off, so it would be ignored",
    ),
    "a key of the bundled Prefect beside the external one": (
        {
            "prefectServer": {
                "mode": "external",
                "external": {"apiUrl": "https://p/api"},
                "auth": {"existingSecret": "s"},
            }
        },
        "prefectServer.auth.existingSecret is set, but prefectServer.mode is external, so it would be ignored",
    ),
    "a label that selects": (
        {"commonLabels": {"app.kubernetes.io/name": "x"}},
        "The label app.kubernetes.io/name is the chart's own, by which objects are found: give yours another name.",
    ),
    "a label that selects a pool": (
        pools(default={"podLabels": {"backcast/pool": "x"}}),
        "The label backcast/pool is the chart's own, by which objects are found: give yours another name.",
    ),
    "no bucket": (bucket(), "store.mode is external: set store.external.bucket."),
    "two keys of the store": (
        bucket(bucket="b", accessKey="a", secretKey="s", existingSecret="s"),
        "store.external.existingSecret replaces accessKey and secretKey: keep the one or the others.",
    ),
    "half a key": (
        bucket(bucket="b", accessKey="a"),
        "store.external.accessKey and secretKey belong together: set both, or neither for the pods' own identity.",
    ),
    "a steward without the identity of the other pods": (
        {**bucket(bucket="b"), "serviceAccount": {"create": False, "name": "ours"}},
        "The pods use the account ours and its identity for a store without keys, but the steward has an account of",
    ),
    "a store that is its own fallback": (
        {"store": {"fallback": {"mode": "bundled"}}},
        "store.fallback is the store itself (minio): name the kind that the release had before, or set",
    ),
    "a fallback without a bucket": (
        {"store": {"fallback": {"mode": "external"}}},
        "store.fallback.mode is external: set store.fallback.external.bucket.",
    ),
    "half a key of the fallback": (
        {"store": {"fallback": {"mode": "external", "external": {"bucket": "b", "secretKey": "s"}}}},
        "store.fallback.external.accessKey and secretKey belong together: set both, or neither for the pods' own",
    ),
    "no Prefect": (
        {"prefectServer": {"mode": "external"}},
        "prefectServer.mode is external: set prefectServer.external.apiUrl.",
    ),
    "pages of no server": (
        {"prefectServer": {"mode": "off", "publicUrl": "https://p.example.org"}},
        (
            "prefectServer.publicUrl is set, but prefectServer.mode is off, so it would be ignored: remove it, or set "
            "prefectServer.mode to bundled or external."
        ),
    ),
    "pages without a server": (
        {"prefectServer": {"mode": "off", "ingress": {"enabled": True}}},
        "prefectServer.ingress is for the bundled server: turn it off, or set prefectServer.mode to bundled.",
    ),
    "pages without a host": (
        {"prefectServer": {"ingress": {"enabled": True}}},
        "prefectServer.ingress needs a host of its own: set prefectServer.ingress.host.",
    ),
    "pages on the API's host": (
        {"ingress": {"host": "h"}, "prefectServer": {"ingress": {"enabled": True, "host": "h"}}},
        "prefectServer.ingress.host is also the API's host: Prefect's pages need a host of their own.",
    ),
    "pages for all": (
        {"prefectServer": {"auth": {"enabled": False}, "ingress": {"enabled": True, "host": "h"}}},
        "prefectServer.ingress would show every run to everyone: set prefectServer.auth.enabled.",
    ),
    "a Secret of the same name": (
        {"auth": {"existingSecret": "demo-backcast"}},
        (
            "demo-backcast is the name of the Secret that the chart makes, for api-password, backcast-password, "
            "postgres-password, prefect-auth-string, prefect-password, s3-access-key, s3-secret-key, scaler-password, "
            "steward-password, worker-password: give"
        ),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case: str) -> None:
    values, words = MISTAKES[case]
    sentence = refusal(values)
    assert words in sentence
    assert len(sentence.strip().splitlines()) <= 6, sentence


@pytest.mark.parametrize("case", COMBINATIONS)
def test_a_bad_combination_gets_a_sentence(case: str) -> None:
    values, words = COMBINATIONS[case]
    assert words in refusal(values)


@pytest.mark.parametrize(
    ("path", "given", "key"),
    [
        ("store.url", "s3://mine", "store.bundled.bucket, or store.external.bucket and prefix"),
        ("store.endpoint", "https://s3.example.org", "store.external.endpoint"),
        ("store.public_endpoint", "https://s3.example.org", "store.publicEndpoint"),
        ("store.ca_bundle", "/ca.crt", "store.external.caBundle"),
        ("store.fallback", {"url": "s3://old"}, "store.fallback"),
        ("prefect.api_url", "https://p.example.org/api", "prefectServer.mode and prefectServer.external.apiUrl"),
        ("model.backend", "openai", "model.backend"),
        ("model.base_url", "https://m.example.org/v1", "model.baseUrl"),
        ("model.name", "other", "model.name"),
    ],
)
def test_a_setting_that_other_objects_depend_on_is_refused(path: str, given: object, key: str) -> None:
    """The policies, the servers and their keys follow the chart's key, and would not follow the setting."""
    section, name = path.split(".")
    assert f"config.{path} is set by the chart: use {key}." in refusal({"config": {section: {name: given}}})


def test_keys_below_global_belong_to_the_parent() -> None:
    render({"global": {"someone": {"elses": "key"}}})


def secrets(model: type[BaseModel] = Settings, above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from secrets(field.annotation, f"{above}{name}.")
        elif "SecretStr" in str(field.annotation):
            yield above + name


@pytest.mark.parametrize("path", [*secrets()])
def test_a_secret_in_the_config_is_refused(path: str) -> None:
    values: Any = ["hunter2"] if path.endswith("keys") else "hunter2"
    for name in reversed(path.split(".")):
        values = {name: values}
    sentence = refusal({"config": values})
    assert f"config.{path} is a secret, and the chart writes config into a ConfigMap: use " in sentence
    assert "hunter2" not in sentence
