"""Between a decoded picture and whoever asked for it: looks, and acts on what was found.

The safety checker scores, :mod:`safelight.safety` decides, this acts. Nothing leaves without
having passed: previews neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image, ImageFilter

from safelight.errors import InvalidRequest
from safelight.model import Model
from safelight.request import GenerateRequest, Outcome
from safelight.safety import DEFAULT, Moderation, decide
from safelight.verdict import Moderated, Policy, Verdict

_MOSAIC = 8  # cells along the longer side that a blurred picture keeps: colours, no shapes

_DONE = {
    "none": "the picture is as it was made",
    "blurred": "the picture is blurred",
    "blackened": "the picture is black",
    "removed": "the picture was removed",
}


@dataclass(frozen=True)
class Shown:
    """What a caller gets to see of a picture, and why."""

    image: Image.Image | None
    outcome: Outcome
    message: str
    safety: Verdict | None = None
    moderation: tuple[Moderated, ...] = ()


def check(model: Model, request: GenerateRequest) -> None:
    """Refuse a policy that could not be kept.

    Raises:
        InvalidRequest: it asks for a checker that is not there.
    """
    if model.checker is None and request.safety not in (None, "off"):
        raise InvalidRequest(
            "safety",
            f"{request.safety} needs a safety checker, and {model.spec.name} has none.",
            "Attach one: --safety-checker PATH, or load(..., safety_checker=PATH).",
        )


def policy(model: Model, request: GenerateRequest) -> Policy | None:
    """What holds for a request; None where there is no checker to ask."""
    if model.checker is None:
        return request.safety
    return request.safety or DEFAULT


def unseen(model: Model, request: GenerateRequest) -> Verdict | None:
    """The record of a picture that nobody looked at."""
    found = policy(model, request)
    return None if found is None else Verdict(policy=found)


def look(model: Model, request: GenerateRequest, image: Image.Image) -> Verdict | None:
    """Ask the safety checker, and say what is to be done."""
    found = policy(model, request)
    if model.checker is None or found is None or found == "off":
        return unseen(model, request)
    (verdict,) = decide(model.checker, model.checker.scores([image]), found)
    action = {"flag": "none", "blur": "blurred", "black": "blackened", "reject": "removed"}
    return verdict.replace(action=action[found]) if verdict.nsfw else verdict


def act(image: Image.Image, verdict: Verdict | None) -> Image.Image | None:
    """The picture after the verdict's action; None where it was removed."""
    match "none" if verdict is None else verdict.action:
        case "blurred":
            return blurred(image)
        case "blackened":
            return Image.new("RGB", image.size)
        case "removed":
            return None
    return image


def blurred(image: Image.Image) -> Image.Image:
    """A picture of which colours remain. A blur alone could be undone; what is left out cannot."""
    scale = _MOSAIC / max(image.size)
    cells = [max(1, round(side * scale)) for side in image.size]
    small = image.resize((cells[0], cells[1]), Image.Resampling.BOX)
    large = small.resize(image.size, Image.Resampling.BICUBIC)
    return large.filter(ImageFilter.GaussianBlur(max(image.size) / _MOSAIC / 2))


def show(
    model: Model, request: GenerateRequest, shown: Shown, moderation: Moderation | None
) -> Shown:
    """A developed picture, looked at by the checker and then by the moderator."""
    image, said = shown.image, shown.moderation
    if image is None:
        return replace(shown, safety=unseen(model, request))
    verdict = look(model, request, image)
    if moderation is not None and moderation.pictures and _leaves(verdict):
        # The picture as it was made: a blurred one would tell the moderator nothing.
        said = (*said, moderation.of_picture(image))
        if said[-1].removed:
            return Shown(None, Outcome.rejected, said[-1].reason, verdict, said)
    if verdict is None or not verdict.nsfw:
        return replace(shown, safety=verdict, moderation=said)
    told = f"flagged by the safety checker ({verdict.reason}): {_DONE[verdict.action]}"
    outcome = Outcome.rejected if verdict.action == "removed" else Outcome.nsfw
    message = "; ".join(filter(None, [shown.message, told]))
    return Shown(act(image, verdict), outcome, message, verdict, said)


def preview(
    model: Model, request: GenerateRequest, image: Image.Image, moderation: Moderation | None
) -> Image.Image | None:
    """A preview as far as it may be seen. The moderator is not asked at every step: with one,
    there are none."""
    if moderation is not None and moderation.pictures:
        return None
    return act(image, look(model, request, image))


def _leaves(verdict: Verdict | None) -> bool:
    """Whether anything of the picture can be seen."""
    return verdict is None or verdict.action in ("none", "blurred")
