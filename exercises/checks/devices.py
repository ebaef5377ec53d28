"""Whether an answer makes its tensors where its inputs are; "meta" stands for another device."""

import torch


def follows_the_device(answer, *inputs):
    """Whether the tensors that an answer makes are on the device of its inputs."""
    try:
        got = answer(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs))
        return all(x.is_meta for x in _tensors(got))
    except (RuntimeError, TypeError) as error:
        if "expected device" in str(error):
            return False
    # It looks at numbers, which meta has not: inputs on the CPU, and new tensors elsewhere.
    try:
        with torch.device("meta"):
            return not any(x.is_meta for x in _tensors(answer(*inputs)))
    except (RuntimeError, TypeError) as error:
        return "expected device" not in str(error)


def _tensors(result):
    """The tensors in a result, which may be a tensor, or lists of them."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [each for part in result for each in _tensors(part)]
