"""Quality routers: keep a drafted block or let the target write it. Import name `mmspec.routers`.

A router sees a block that a drafter proposed, together with what the core recorded about it, and
decides whether it is good enough to keep. That trades quality for speed, so a router's guarantee
is `lossy` and it runs only when it is asked for by name. Routers import the core and nothing else.
"""

__all__ = ["ROUTERS"]

# Name a user types -> "module:class", the module relative to this package, imported on demand.
ROUTERS: dict[str, str] = {}
