"""Where and with what a benchmark ran: the first columns of every file in benchmarks/results."""

import datetime

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
