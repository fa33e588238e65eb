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
from mmspec.routers.scoring import THRESHOLDS, LoadedScorers, Scorer, ScoringRouter

__all__ = ["ROUTERS", "AllRouter", "LoadedScorers", "build_router", "recording_router"]

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


def build_router(spec: str | BlockRouter, loaded: LoadedScorers | None = None) -> BlockRouter:
    """Makes a router of what a user passes as ``router=``.

    A router with weights loads them here, unless they are among the ``loaded``.

    Args:
        spec: A name, with an argument behind a colon where the router takes one; several of them
            with "+" between keep what all of them keep; or a router.
        loaded: Scorers of earlier routers; those of this one are added.

    Raises:
        ValueError: If a name is unknown (the message lists the known ones), an argument is bad,
            weights are missing, or it is neither a string nor a router.
    """
    if not isinstance(spec, str):
        is_router = hasattr(spec, "wants_draft") and hasattr(spec, "judge")
        require(is_router, "router", "a name or an object with wants_draft and judge", spec)
        return spec
    return _combined([_build(part, loaded) for part in _parts(spec)])


def recording_router(spec: str) -> tuple[BlockRouter, str]:
    """A router that scores every draft to the end and keeps it, for a calibration.

    Args:
        spec: As in `build_router`, with one scorer and without its threshold, such as
            "first-block+temporal:see=seam".

    Returns:
        The router, and the name of its score.

    Raises:
        ValueError: As in `build_router`; if not exactly one of the routers is a scorer; if it has a
            threshold already.
    """
    parts = list(_parts(spec))
    scorers = [place for place, part in enumerate(parts) if issubclass(_made_by(part), Scorer)]
    rule = "one scorer, alone or with routers that look at the place only"
    require(len(scorers) == 1, "the router to calibrate", rule, spec)
    name, _, argument = parts[scorers[0]].partition(":")
    settings = argument.split(",") if argument else []
    given = [one for one in settings if "=" not in one or one.partition("=")[0] in THRESHOLDS]
    require(not given, "the router to calibrate", "without a threshold, which is looked for", spec)
    parts[scorers[0]] = f"{name}:{','.join(['-inf', *settings])}"
    routers = [_build(part, None) for part in parts]
    recorder = routers[scorers[0]]
    assert isinstance(recorder, ScoringRouter)
    return _combined(routers), recorder.score_name


def _parts(spec: str) -> list[str]:
    """The routers of a combination; all names are checked before any weights are loaded.

    Raises:
        ValueError: If one is unknown.
    """
    parts = spec.split("+")
    for part in parts:
        require_known("router", part.partition(":")[0], sorted(ROUTERS))
    return parts


def _combined(routers: list[BlockRouter]) -> BlockRouter:
    return routers[0] if len(routers) == 1 else AllRouter(routers)


def _made_by(part: str) -> Any:
    module, _, attribute = ROUTERS[part.partition(":")[0]].partition(":")
    return getattr(import_module(module, __name__), attribute)


def _build(part: str, loaded: LoadedScorers | None) -> BlockRouter:
    made_by = _made_by(part)
    _, colon, text = part.partition(":")
    argument = text if colon else None
    router: BlockRouter
    if issubclass(made_by, Scorer):
        router = made_by.from_argument(argument, loaded)
    else:
        router = made_by.from_argument(argument)
    return router
