"""Captions that both bundled models draw well: some to profile with, others to judge the result by."""

__all__ = ["HELD_OUT_PROMPTS", "PROFILING_PROMPTS"]

PROFILING_PROMPTS = (
    "red apple", "a banana", "watermelon", "an emoji of grapes", "fox", "a picture of a panda", "penguin",
    "octopus", "a small drawing of a frog", "butterfly", "rocket", "a car", "sailboat", "an emoji of a house",
    "cactus", "sunflower", "ghost", "a picture of a crown", "guitar", "hamburger", "doughnut", "snowman",
    "red heart", "soccer ball",
)  # fmt: skip

HELD_OUT_PROMPTS = (
    "green apple", "a lemon", "strawberry", "an emoji of cherries", "pineapple", "a carrot", "tomato",
    "a picture of pizza", "lion", "a tiger", "koala", "a small drawing of a pig", "mouse", "an emoji of a whale",
    "turtle", "a snail", "ladybug", "duck", "a picture of an owl", "tulip", "palm tree", "a rainbow", "helicopter",
    "fire engine", "a tractor", "bicycle", "alien", "robot", "an emoji of a pumpkin", "blue heart", "basketball",
    "umbrella",
)  # fmt: skip
