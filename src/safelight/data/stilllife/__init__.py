"""Still life: a procedural, captioned tabletop with exact ground truth.

    from safelight.data import stilllife
    scenes = [stilllife.scene(seed=0, index=i) for i in range(16)]
    pictures = stilllife.render(scenes, 64)            # uint8 (16, 64, 64, 3)
    words = [stilllife.plain_caption(s) for s in scenes]

`world` says what a scene is and which are held out, `layout` where things stand, `render` (with
`trace` and `shadows`) draws, `captions` speaks and listens, `sheet` prints an overview.
numpy and pillow only.
"""

from safelight.data.stilllife.captions import (
    Wanted,
    WantedThing,
    all_captions_corpus,
    caption,
    parse,
    plain_caption,
    unknown_words,
    vocabulary,
)
from safelight.data.stilllife.curio import curio_scene, render_curios
from safelight.data.stilllife.render import Rendering, render, render_full
from safelight.data.stilllife.sheet import contact_sheet
from safelight.data.stilllife.world import (
    ATTRIBUTES,
    COLOURS,
    FLOORS,
    HELD_OUT_SHARE,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_PAIRS,
    WALLS,
    Arrangement,
    Look,
    Scene,
    Split,
    Thing,
    attribute_array,
    attributes,
    generator,
    has_unseen_pair,
    is_held_out,
    is_held_out_combination,
    mirror,
    scene,
    scene_for,
    scenes,
    split_of,
    variants,
)

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "FLOORS",
    "HELD_OUT_SHARE",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "UNSEEN_PAIRS",
    "WALLS",
    "Arrangement",
    "Look",
    "Rendering",
    "Scene",
    "Split",
    "Thing",
    "Wanted",
    "WantedThing",
    "all_captions_corpus",
    "attribute_array",
    "attributes",
    "caption",
    "contact_sheet",
    "curio_scene",
    "generator",
    "has_unseen_pair",
    "is_held_out",
    "is_held_out_combination",
    "mirror",
    "parse",
    "plain_caption",
    "render",
    "render_curios",
    "render_full",
    "scene",
    "scene_for",
    "scenes",
    "split_of",
    "unknown_words",
    "variants",
    "vocabulary",
]
