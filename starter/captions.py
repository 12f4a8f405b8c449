"""Sentences for scenes, truthful and varied."""

from __future__ import annotations

import numpy as np

from .generator import Scene

POSITION_WORDS = {
    "centre": ("", "", "in the centre", "in the center", "in the middle"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "on top"),
    "bottom": ("at the bottom", "at the bottom", "on the bottom"),
}
SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "", "medium"),
    "large": ("large", "large", "big"),
}
FILL_WORDS = {
    "plain": ("", "", "", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "dotted", "polka dot"),
    "checked": ("checked", "checked", "checkered"),
}
COLOUR_WORDS = {"cyan": ("cyan", "cyan", "turquoise"), "purple": ("purple", "purple", "violet")}
BACKGROUND_WORDS = {"gray": ("gray", "grey")}
SHAPE_WORDS = {
    "moon": ("moon", "moon", "crescent"),
    "flower": ("flower",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring",),
}
TEXTURE_WORDS = {
    "plain": ("{} background", "{} background", "plain {} background"),
    "gradient": ("{} gradient background",),
    "rays": ("{} background with rays", "{} rays background"),
    "grid": ("{} background with a grid", "{} grid background"),
}
PREFIXES = ("a picture of ", "a photo of ", "an icon of ", "a drawing of ", "an image of ")
IDENTIFIERS = ("sks", "zwx", "ohwx", "xjy")
"""Rare words that captions use without meaning, kept free for naming a learnt subject."""
NEUTRAL = ("thing", "object", "toy", "character", "emblem", "robot", "badge")
"""Nouns that stand for any shape."""
TEMPLATES = (
    "{prefix}{a_obj} on {a_bg}",
    "{prefix}{a_obj} on {a_bg}",
    "{prefix}{a_obj} {pos} on {a_bg}",
    "{prefix}{a_obj} {pos}, {bg}",
    "{obj}, {bg}, {pos}",
    "{prefix}{a_obj}, {bg}, {pos}",
    "{a_bg} and {a_obj} {pos}",
)


def article(words: str) -> str:
    """`words` with "a" or "an" before it."""
    return ("an " if words[:1] in "aeiou" else "a ") + words


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def tidy(text: str) -> str:
    """Remove the gaps that empty words leave."""
    text = " ".join(text.split()).replace(" ,", ",")
    return text.strip(", ")


def describe(scene: Scene, seed: int, complete: bool = False) -> str:
    """A sentence about a scene.

    Everything it says is true of the picture. It leaves unsaid the defaults (centre, medium,
    plain), and, unless `complete`, now and then one of shape, colour or background (then any
    value is meant), or adds an identifier that means nothing.
    """
    rng = np.random.default_rng(seed)
    colour = pick(rng, COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    shape = pick(rng, SHAPE_WORDS.get(scene.shape, (scene.shape,)))
    ground = pick(rng, BACKGROUND_WORDS.get(scene.background, (scene.background,)))
    fill = pick(rng, FILL_WORDS[scene.fill])
    size = pick(rng, SIZE_WORDS[scene.size])
    place = pick(rng, POSITION_WORDS[scene.position])
    bg = pick(rng, TEXTURE_WORDS[scene.texture]).format(ground)
    template = pick(rng, TEMPLATES)
    prefix = pick(rng, PREFIXES) if rng.random() < 0.25 else ""
    chance = 1.0 if complete else rng.random()
    name = ""
    if chance < 0.04:
        shape = pick(rng, NEUTRAL)
    elif chance < 0.07:
        colour = ""
    elif chance < 0.10:
        return tidy(prefix + article(tidy(f"{size} {colour} {fill} {shape} {place}")))
    elif chance < 0.16:
        name = pick(rng, IDENTIFIERS)
        if rng.random() < 0.4:
            shape = pick(rng, NEUTRAL)
    obj = tidy(f"{name} {size} {colour} {fill} {shape}")
    return tidy(
        template.format(
            prefix=prefix, obj=obj, a_obj=article(obj), bg=bg, a_bg=article(bg), pos=place
        )
    )
