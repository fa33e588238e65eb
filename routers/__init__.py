"""Quality routers: keep a drafted block or let the target write it. Import name `mmspec.routers`.

A router sees a block that a drafter proposed, together with what the core recorded about it, and
decides whether it is good enough to keep. That trades quality for speed, so a router's guarantee
is `lossy` and it runs only when it is asked for by name. Routers import the core and nothing else.
"""

from importlib import import_module
from typing import Any

from mmspec.block_records import BlockRouter
from mmspec.checks import require, require_known
from mmspec.routers.combine import AllRouter

__all__ = ["ROUTERS", "AllRouter", "build_router"]

# Name a user types -> "module:class", the module relative to this package, imported on demand.
# `from_argument` of the class makes the router of what follows the name.
ROUTERS: dict[str, str] = {
    "always": ".fixed:AlwaysRouter",
    "brisque": ".brisque:BrisqueScorer",
    "clip-score": ".clip:ClipScorer",
    "every": ".spacing:EveryRouter",
    "first-block": ".fixed:FirstBlockRouter",
    "hps": ".clip:HpsScorer",
    "image-reward": ".image_reward:ImageRewardScorer",
    "never": ".fixed:NeverRouter",
    "noise": ".sharpness:NoiseScorer",
    "pick-score": ".clip:PickScorer",
    "random": ".spacing:RandomRouter",
    "sharpness": ".sharpness:SharpnessScorer",
    "temporal": ".temporal:TemporalScorer",
}


def build_router(spec: str | BlockRouter) -> BlockRouter:
    """Makes a router of what a user passes as ``router=``.

    A router with weights loads them here: build it once and pass the object to many calls.

    Args:
        spec: A name, with an argument behind a colon where the router takes one; several of them
            with "+" between keep what all of them keep; or a router.

    Raises:
        ValueError: If a name is unknown (the message lists the known ones), an argument is bad,
            weights are missing, or it is neither a string nor a router.
    """
    if not isinstance(spec, str):
        is_router = hasattr(spec, "wants_draft") and hasattr(spec, "judge")
        require(is_router, "router", "a name or an object with wants_draft and judge", spec)
        return spec
    parts = spec.split("+")
    # All names before any weights.
    for part in parts:
        require_known("router", part.partition(":")[0], sorted(ROUTERS))
    routers = tuple(map(_build, parts))
    return routers[0] if len(routers) == 1 else AllRouter(routers)


def _build(part: str) -> BlockRouter:
    name, colon, argument = part.partition(":")
    module, _, attribute = ROUTERS[name].partition(":")
    made_by: Any = getattr(import_module(module, __name__), attribute)
    router: BlockRouter = made_by.from_argument(argument if colon else None)
    return router
