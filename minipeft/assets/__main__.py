"""python -m minipeft.assets: fetch everything; --verify compares the hashes of all cached files."""

import sys

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import fetch_all


def main(arguments: list[str]) -> str | None:
    """Fetch everything. Returns an error message, or None."""
    if set(arguments) - {"--verify"}:
        return f"Error: {' '.join(arguments)} is not understood; give nothing, or --verify."
    try:
        fetch_all(verify="--verify" in arguments)
    except AssetError as error:
        return f"Error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
