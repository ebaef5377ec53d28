"""python -m minipeft.assets: fetch everything; --verify compares every cached byte."""

import sys

from minipeft.assets.fetch import AssetError
from minipeft.assets.sources import fetch_all


def main(arguments):
    if set(arguments) - {"--verify"}:
        return f"Error: {' '.join(arguments)} is not understood; give nothing, or --verify."
    try:
        fetch_all(verify="--verify" in arguments)
    except AssetError as error:
        return f"Error: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
