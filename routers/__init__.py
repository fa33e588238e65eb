"""Quality routers: keep a drafted block or let the target write it. Import name `mmspec.routers`.

A router sees a block that a drafter proposed, together with what the core recorded about it, and
decides whether it is good enough to keep. That trades quality for speed, so a router's guarantee
is `lossy` and it runs only when it is asked for by name. Routers import the core and nothing else.
"""

from importlib import import_module
from typing import Any

from mmspec.block_records import BlockRouter
from mmspec.checks import require, require_known

__all__ = ["ROUTERS", "build_router"]

# Name a user types -> "module:class", the module relative to this package, imported on demand.
ROUTERS: dict[str, str] = {
    "always": ".fixed:AlwaysRouter",
    "first-block": ".fixed:FirstBlockRouter",
    "never": ".fixed:NeverRouter",
}


def build_router(spec: str | BlockRouter) -> BlockRouter:
    """Makes a router of what a user passes as ``router=``.

    Args:
        spec: A name, with an argument behind a colon where the router takes one, or a router.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones), the argument is bad,
            or it is neither a string nor a router.
    """
    if not isinstance(spec, str):
        is_router = hasattr(spec, "wants_draft") and hasattr(spec, "judge")
        require(is_router, "router", "a name or an object with wants_draft and judge", spec)
        return spec
    name, colon, argument = spec.partition(":")
    require_known("router", name, sorted(ROUTERS))
    module, _, attribute = ROUTERS[name].partition(":")
    router_class: Any = getattr(import_module(module, __name__), attribute)
    return router_class.from_argument(argument if colon else None)
