"""Base models and data sets: download once, keep in a cache, load."""

from minipeft.assets.datasets import load_dialogues, load_grades, load_instructions, load_reviews
from minipeft.assets.fetch import AssetError
from minipeft.assets.models import load_base
from minipeft.assets.sources import fetch_all, fetch_base_model

__all__ = [
    "AssetError",
    "fetch_all",
    "fetch_base_model",
    "load_base",
    "load_dialogues",
    "load_grades",
    "load_instructions",
    "load_reviews",
]
