# The images of backcast: `make image` builds the targets api, worker, prefect-server and llm. compose.yaml and
# skaffold.yaml use `dev`: one of them (--build-arg PART=api) that runs from files which can be changed.
#
# Each environment is a layer below the source, so a change of the source rebuilds in seconds. worker and llm have the
# layer of api below theirs, so a node keeps it once. MB over the base:
#   api 84   worker 180   prefect-server 143   llm 603, of which the model is 491
#
# It works with any BuildKit, that of Docker 20.10 too: no `syntax` line (it names an image that must be pulled), no
# `COPY --link`, no here-documents.

# --build-arg PYTHON=python@sha256:… pins the base.
ARG PYTHON=python:3.13-slim-trixie
ARG PART=api

# --- Build ------------------------------------------------------------------------------------------------------------

FROM ${PYTHON} AS uv
# uv from the package index and not from its own image: where a package index is reachable, a registry often is not.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --disable-pip-version-check --root-user-action=ignore uv==0.13.9
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
ENV UV_LINK_MODE=copy UV_NO_DEV=1 UV_PYTHON=/usr/local/bin/python3 UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=/app/.venv
WORKDIR /build
COPY pyproject.toml uv.lock ./

# The steps below remove debugging symbols of wheels (`strip`, 35 to 60 MB), botocore's descriptions of services other
# than S3 and the ones that give an identity (26 MB), and pages that nothing serves (1 and 16 MB).
FROM uv AS api-env
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --no-install-project --extra api \
 && find /app/.venv -name '*.so*' -type f -exec strip --strip-unneeded {} + \
 && rm /app/.venv/lib/python3*/site-packages/fastapi_offline/static/redoc* \
 && cd /app/.venv/lib/python3*/site-packages/botocore/data \
 && find . -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -r {} +

# /above holds the files that an environment has beyond that of api. The extra names anthropic to hold its version for
# pip's users; nothing here imports it.
FROM api-env AS worker-env
RUN --mount=type=cache,target=/root/.cache/uv \
    find /app/.venv ! -type d | sort >/below \
 && uv sync --frozen --no-install-project --inexact --extra worker --no-install-package anthropic \
 && rm -r /app/.venv/lib/python3*/site-packages/prefect/server/ui* \
 && find /app/.venv ! -type d | sort | comm -13 /below - >/files \
 && grep '\.so' /files | xargs strip --strip-unneeded \
 && mkdir /above && tar -c -T /files -f - | tar -x -C /above -f -

FROM api-env AS llm-env
RUN --mount=type=cache,target=/root/.cache/uv \
    find /app/.venv ! -type d | sort >/below \
 && uv sync --frozen --no-install-project --inexact --extra llm \
 && find /app/.venv ! -type d | sort | comm -13 /below - >/files \
 && grep '\.so' /files | xargs strip --strip-unneeded \
 && mkdir /above && tar -c -T /files -f - | tar -x -C /above -f -

# The product's own way to the file: by its hash, from any source that can be reached. These modules need no other.
FROM api-env AS weights
COPY src/backcast/errors.py /fetch/backcast/
COPY src/backcast/local/lock.py src/backcast/local/weights.py /fetch/backcast/local/
RUN --mount=type=cache,target=/cache PYTHONPATH=/fetch /app/.venv/bin/python -c "import pathlib, shutil; \
    from backcast.local.weights import fetch; \
    shutil.copyfile(fetch(pathlib.Path('/cache'), lambda *_: None), '/app/model.gguf')"

FROM uv AS prefect-server-env
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --frozen --only-group prefect-server \
 && find /app/.venv -name '*.so*' -type f -exec strip --strip-unneeded {} +

FROM uv AS reload-env
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --only-group reload

FROM uv AS package
COPY README.md LICENSE ./
COPY src src
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /app/.venv && uv pip install --python /app/.venv --no-deps --compile-bytecode . \
 && mkdir /package && cd /app/.venv && cp -a --parents bin/backcast lib/python3*/site-packages/backcast* /package

# --- Run --------------------------------------------------------------------------------------------------------------

FROM ${PYTHON} AS runtime
# The kernel drops a signal to PID 1 that has no handler for it yet. tini has them at once, and passes signals on; it also
# collects processes that outlive their parents.
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
# A name for the id, because some libraries look up the user's name.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin backcast
# The processes write only to /tmp: mount something there, and the root can be read-only.
ENV HOME=/tmp PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
LABEL org.opencontainers.image.source="https://github.com/backcast/backcast" \
      org.opencontainers.image.licenses="Apache-2.0"

# A read-only root can't keep bytecode, so it is made here, by importing the modules that the processes import. That
# includes the standard library, whose bytecode the official image lacks. Bytecode of all modules would be three times
# as much. The imports also prove that no removed file is needed.
FROM runtime AS common
COPY --from=api-env /app/.venv /app/.venv
RUN --mount=type=tmpfs,target=/tmp python -c 'import anyio._backends._asyncio, asyncpg, fastapi, httpcore, httpx, \
    jsonschema, prometheus_client, psycopg, pydantic.v1, pydantic_settings.main, rich.progress, rich.table, s3fs, typer, \
    uvicorn.lifespan.on, uvicorn.loops.uvloop, uvicorn.protocols.http.auto, uvicorn.protocols.websockets.auto, yaml'

# The API; with other arguments the steward, setup, check and the command line.
FROM common AS api
COPY --from=package /package /app/.venv
USER 10001:10001
ENTRYPOINT ["tini", "--", "backcast"]
CMD ["api"]
EXPOSE 8000 8082 8084
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="backcast api" org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# For tasks of your own, put modules into /app, and install their packages with `USER root` and
# `pip --python /app/.venv install …`. For other services of AWS than S3, reinstall botocore.
FROM common AS worker
COPY --from=worker-env /above/app/.venv /app/.venv
RUN --mount=type=tmpfs,target=/tmp python -c 'import genai_prices.data, httpcore2, jiter, marvin, \
    openai.lib.streaming.chat, openai.resources.chat, prefect.main, prefect.task_engine, pydantic_ai.models.openai'
COPY --from=package /package /app/.venv
USER 10001:10001
ENV PYTHONPATH=/app
ENTRYPOINT ["tini", "--", "backcast"]
CMD ["worker"]
EXPOSE 8081
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="backcast worker" org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# The embedded model's server, with the model inside: demo quality.
FROM common AS llm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=weights /app/model.gguf /app/model.gguf
COPY --from=llm-env /above/app/.venv /app/.venv
RUN --mount=type=tmpfs,target=/tmp python -c 'import xllamacpp'
COPY --from=package /package /app/.venv
USER 10001:10001
ENV BACKCAST_MODEL__WEIGHTS=/app/model.gguf
ENTRYPOINT ["tini", "--", "backcast"]
CMD ["model"]
EXPOSE 8083
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="backcast llm" org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Stock Prefect, in the version that backcast is tested with.
FROM runtime AS prefect-server
COPY --from=prefect-server-env /app/.venv /app/.venv
RUN --mount=type=tmpfs,target=/tmp python -c 'import alembic.command, anyio._backends._asyncio, asyncpg, burner_redis, \
    prefect.cli.server, prefect.flows, prefect.server.api.server, prefect.server.events.services.actions, \
    uvicorn.lifespan.on, uvicorn.protocols.http.auto, uvicorn.protocols.websockets.auto' \
 && python -m compileall -q /app/.venv/lib/python3*/site-packages/prefect/server/database/_migrations
USER 10001:10001
# By default it writes its pages into its own package's folder, and reports its use.
ENV PREFECT_HOME=/tmp/prefect PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/prefect/ui PREFECT_SERVER_ANALYTICS_ENABLED=false
ENTRYPOINT ["tini", "--", "prefect"]
CMD ["server", "start", "--host", "0.0.0.0", "--port", "4200"]
EXPOSE 4200
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="backcast prefect-server" org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# --- Develop ----------------------------------------------------------------------------------------------------------

# Put changed files below /tmp/live: sources in src, your tasks in tasks.
FROM ${PART} AS dev
COPY --from=reload-env /app/.venv /app/.venv
COPY docker/live /usr/local/bin/live
COPY src /app/live/src
COPY examples /app/live/tasks
ENV PYTHONPATH=/tmp/live/src:/tmp/live/tasks
ENTRYPOINT ["tini", "--", "live"]
