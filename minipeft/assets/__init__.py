"""Base models and data sets: fetched once, kept in a cache, loaded."""

from minipeft.assets.fetch import AssetError, fetch_all, fetch_base_model

__all__ = ["AssetError", "fetch_all", "fetch_base_model"]
