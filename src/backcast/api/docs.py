"""The pages that document the API. They need no network: their script and style are served from here. Their URLs are
relative, so that a proxy may put a prefix before them.
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.routing import Mount

from backcast.api.prefix import of_links
from backcast.api.routing import Route

router = APIRouter(route_class=Route, include_in_schema=False)
assets = Mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))
"""Swagger UI, from a package that only carries it."""


@router.get("/docs", response_class=Response)
async def docs() -> Response:
    quiet = {"validatorUrl": None}  # no check of the document by a service elsewhere
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="backcast",
        swagger_js_url="docs/static/swagger-ui-bundle.js",
        swagger_css_url="docs/static/swagger-ui.css",
        swagger_favicon_url="docs/static/favicon.png",
        swagger_ui_parameters=quiet,
    )


@router.get("/openapi.json")
async def document(request: Request) -> dict[str, Any]:
    prefix = of_links.get()
    return request.app.openapi() | ({"servers": [{"url": prefix}]} if prefix else {})
