"""Prompts around a class name: the named sets, and what a configuration's `network.template` stands for. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

# The 16 prompts of ActionCLIP (Wang et al., 2021), which Text4Vis was built upon.
_ACTIONCLIP = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)

# CLIP's 28 prompts for Kinetics (Radford et al., 2021, data/prompts.md): each medium with each phrase.
_KINETICS = tuple(
    f"a {medium} of {phrase}."
    for medium in ("photo", "video", "example", "demonstration")
    for phrase in (
        "{}",
        "a person {}",
        *(f"a person {verb} {{}}" for verb in ("using", "doing", "during", "performing", "practicing")),
    )
)

TEMPLATE_SETS = {"actionclip-16": _ACTIONCLIP, "kinetics-28": _KINETICS}


def prompts(template: str | Sequence[str]) -> tuple[str, ...]:
    """The prompts, each with one `{}`: a single one, those listed, or those of a named set."""
    if not isinstance(template, str):
        return tuple(template)
    return TEMPLATE_SETS.get(template, (template,))
