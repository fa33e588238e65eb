"""What drafters with a model of their own are shown of the images in the prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmspec.checks import is_list, require
from mmspec.forward import PromptExtras
from mmspec.rows import TokenRows
from mmspec.visual_tokens import VisualTokens, text_of

#: The drafters that take the option.
SEEING = ("mixed", "model")
#: What a mixed drafter mixes where nothing else is said.
DEFAULT_MEMBERS = ("all", "none")


def sights_of(name: str, options: Mapping[str, Any]) -> list[VisualTokens]:
    """What a drafter is shown, for each time that it reads the prompts.

    Args:
        name: The drafter's.
        options: Its options.

    Raises:
        ValueError: If one is none of the known ones, or they do not go together.
    """
    if name not in SEEING:
        return []
    if name == "model":
        sight = VisualTokens.parse(options.get("visual_tokens", "none"))
        is_own = sight.choice == "self"
        if is_own and "model" in options:
            raise ValueError(
                f"visual_tokens={str(sight)!r} drafts with the target itself; leave 'model' out"
            )
        return [sight]
    members = options.get("members", DEFAULT_MEMBERS)
    is_good = is_list(members, lambda one: isinstance(one, str)) and len(members) > 1
    sights = [VisualTokens.parse(member) for member in members] if is_good else []
    is_good = is_good and all(sight.choice != "self" for sight in sights)
    require(is_good, "members", "two or more visual_tokens other than 'self'", members)
    return sights


def views_of(
    sights: Sequence[VisualTokens], model: Any, target: Any, rows: TokenRows
) -> Callable[[], list[PromptExtras]]:
    """What a model reads of the prompts, for each sight; to be called after the target has read.

    Args:
        sights: The sights.
        model: The drafter's model.
        target: The target adapter.
        rows: The rows.

    Raises:
        ValueError: If it cannot see what it is to be shown.
    """
    extras: PromptExtras = getattr(target, "extras", None) or PromptExtras()
    shown = [sight for sight in sights if sight.choice != "none"]
    if not shown:
        return lambda: [text_of(rows, extras.placeholders) for _ in sights]
    if extras.seen_by is None:
        raise ValueError(
            f"visual_tokens={str(shown[0])!r} needs the pixel_values of images, and none are given"
        )
    return extras.seen_by(model, sights, target.forward)
