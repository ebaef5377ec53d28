"""Fixtures that all tests share; no test may reach for a model hub."""

import os

# Before anything imports transformers or datasets: nothing here may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MINIPEFT_PROGRESS"] = ""  # checks write no progress: the file is the learner's

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    """What `datasets` caches belongs to this test run."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture
def tiny():
    """A random Llama of two layers and its byte-level tokenizer, on the CPU."""
    from minipeft import load_base

    return load_base("tiny", device="cpu")


@pytest.fixture(scope="session")
def base():
    """SmolLM2 from the cache, on the CPU. Read only: it is shared by all tests."""
    from minipeft import load_base

    return load_base(device="cpu")
