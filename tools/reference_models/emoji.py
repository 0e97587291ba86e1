"""Which emoji the models learn, under which captions, and how often each is seen.

Pure functions over the entries of the package's `emoji.json`. The capacity of an 8 M parameter model is spent on things
a stranger can name: text symbols, country flags and gender variants of one and the same picture are left out.
"""

import random

__all__ = ["captions", "is_mirrorable", "sampling_weight"]

_WEIGHT_BY_CATEGORY = {
    "Smileys & Emotion": 0.7,
    "People & Body": 0.4,
    "Animals & Nature": 1.5,
    "Food & Drink": 1.5,
    "Travel & Places": 1.0,
    "Activities": 1.0,
    "Objects": 1.0,
}
_WEIGHT_BY_SUBCATEGORY = {
    "food-fruit": 2.0,
    "heart": 1.0,
    "face-costume": 1.3,
    "place-map": 0.5,
    "transport-ground": 1.2,
    "transport-air": 1.2,
    "geometric": 0.5,  # the only Symbols that are pictures of a nameable thing
    "religion": 0.3,
    "family": 0.0,
    "transport-sign": 0.0,
}
_ALIASES = {
    "automobile": ["car", "red car"],
    "bicycle": ["bike"],
    "black heart": [],
    "black sun with rays": ["sun"],
    "clock face ten oclock": ["clock"],
    "deciduous tree": ["tree"],
    "electric light bulb": ["light bulb"],
    "extraterrestrial alien": ["alien"],
    "gem stone": ["diamond"],
    "heavy black heart": ["red heart"],
    "honeybee": ["bee"],
    "house building": ["house"],
    "jack-o-lantern": ["pumpkin"],
    "lady beetle": ["ladybug"],
    "pile of poo": ["poop"],
    "slice of pizza": ["pizza slice"],
    "smiling face with sunglasses": ["cool face"],
    "steaming bowl": ["bowl of noodles"],
    "white medium star": ["yellow star"],
    "wrapped present": ["present"],
}
_TEMPLATES = ("{}", "{}", "{}", "a {}", "the {}", "an emoji of {}", "a picture of {}", "a small drawing of a {}")
_ONE_SIDED = ("left", "right", "calendar", "clock", "book", "page", "sign", "abc", "back", "musical", "newspaper")


def sampling_weight(entry: dict) -> float:
    """How often to show this emoji, 1 being usual; 0 leaves it out."""
    category, subcategory = entry["category"], entry["subcategory"]
    name, code = (entry["name"] or "").lower(), entry["unified"]
    if not entry["has_img_google"] or not name:
        return 0.0
    if category == "People & Body" and (_is_gendered_variant(code, name) or "facing right" in name):
        return 0.0
    if name.startswith("clock face") and name != "clock face ten oclock":
        return 0.0
    if "moon symbol" in name and "full" not in name:
        return 0.3
    if category == "Flags":
        return 0.5 if subcategory == "flag" else 0.0
    return _WEIGHT_BY_SUBCATEGORY.get(subcategory, _WEIGHT_BY_CATEGORY.get(category, 0.0))


def is_mirrorable(entry: dict) -> bool:
    """False where a mirrored picture would be wrong: lettering, dials, hands that point."""
    name = entry["name"].lower()
    return not (entry["subcategory"].startswith("hand-") or any(word in name for word in _ONE_SIDED))


def captions(entry: dict, count: int, rng: random.Random) -> list[str]:
    """`count` lower-case captions: the names of the emoji, plain and in a few everyday wordings."""
    names = _names(entry)
    plain = (names * count)[: max(len(names), count // 2)]
    varied = [rng.choice(_TEMPLATES).format(rng.choice(names)) for _ in range(count)]
    return (plain + varied)[:count]


def _names(entry: dict) -> list[str]:
    name = entry["name"].lower().replace("’", "")
    found = [name, *_ALIASES.get(name, [])]
    for short in entry["short_names"]:
        if not any(character.isdigit() for character in short) and len(short) > 2:
            found.append(short.lower().replace("_", " "))
    if entry["category"] == "Animals & Nature" or entry["subcategory"] == "face-costume":
        found += [name.removesuffix(" face") for name in found]
    for suffix in (" symbol", " sign"):
        found += [name.removesuffix(suffix) for name in found]
    return list(dict.fromkeys(found))


def _is_gendered_variant(code: str, name: str) -> bool:
    joined = code.split("-200D-")
    if len(joined) == 1:
        return False
    return joined[0].split("-")[0] in ("1F468", "1F469") or any(part[:4] in ("2640", "2642") for part in joined)
