"""A tiny model with a tokenizer of bytes, and a token cache of the tests' own."""

import os

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EFFICIENT_LM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def model(drawn):
    from efficient_lm.api import Model
    from efficient_lm.config import load_run_config
    from efficient_lm.training.setup import with_vocabulary

    options = ["tokenizer=bytes", "model.width=16", "model.repeats=1", "mixer.heads=2", "train.sequence_length=64"]
    config = load_run_config([*options, "model.init_std=0.4", "model.embedding_std=1.0", "run.name=tiny"])
    tokenizer = config.tokenizer.build()
    config = with_vocabulary(config, tokenizer)
    return Model(config, drawn(config.model.build()), tokenizer)
