"""The training loop, loop.py, and what stands beside it, each in a file of its own."""
