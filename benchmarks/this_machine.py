"""Where and with what a benchmark ran: the first columns of every file in benchmarks/results."""

import csv
import datetime
import io
import time

import torch
import transformers

from minipeft import pick_device


def this_machine():
    """{column: value} of the date, the device, its threads and the versions."""
    device = pick_device()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def all_rows(path):
    """The rows of a CSV as dicts of strings; none if there is no such file yet."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_so_far(path):
    """The rows of a CSV that were measured on this device: what another did is not done here."""
    device = this_machine()["device"]
    return [row for row in all_rows(path) if row["device"] == device]


def seconds(work, device):
    """Wall time of a function, until the device has done all of it, and nothing else."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    if wait:
        wait()
    start = time.perf_counter()
    work()
    if wait:
        wait()
    return time.perf_counter() - start


class InTime:
    """Hands out items to work on, until the next one might not be done `seconds` from the start.

    Judged by the item that took longest so far.
    """

    def __init__(self, seconds):
        self.end, self.longest = time.monotonic() + seconds, 0.0

    def __call__(self, items):
        for item in items:
            begin = time.monotonic()
            if begin + 1.2 * self.longest > self.end:
                return
            yield item
            self.longest = max(self.longest, time.monotonic() - begin)


def append_rows(path, columns, rows):
    """Append rows, dicts whose missing columns stay empty, to a CSV; a new file gets its header.

    All of it is written at once. Raises ValueError if the file has other columns.
    """
    path.parent.mkdir(exist_ok=True)
    stored = all_columns(path)
    if stored and stored != list(columns):
        raise ValueError(f"{path} has other columns than these rows; move it away to begin anew.")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    if not stored:
        writer.writeheader()
    writer.writerows(rows)
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())


def replace_rows(path, columns, rows):
    """Write rows in place of those that this device has in a CSV; rows of other devices stay."""
    device, new = this_machine()["device"], path.with_suffix(".new")
    others = [row for row in all_rows(path) if row["device"] != device]
    new.unlink(missing_ok=True)
    append_rows(new, columns, [*others, *rows])
    new.replace(path)


def all_columns(path):
    """The columns of a CSV; none if there is no such file, or nothing in it."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
