"""Batched, padded, shared and truncated requests against one request at a time."""

import jax
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.evaluation.requests import Request, RequestScorer

LONGEST = 100


@pytest.fixture(scope="module")
def requests():
    draw = np.random.default_rng(0)
    made = [
        Request(draw.integers(0, 256, draw.integers(1, 120)).tolist(), draw.integers(0, 256, size).tolist())
        for size in draw.integers(1, 40, 60)
    ]
    question = draw.integers(0, 256, 50).tolist()
    return [*made, *(Request(question, [choice]) for choice in range(90)), Request([7], [])]


def directly(model, request, padding):
    """One request, in float32; with padding behind it, all of them are one shape."""
    context, continuation = request
    read = [*context, *continuation][-LONGEST - 1 : -1]
    ids = np.array([read + [0] * (padding and LONGEST - len(read))])
    logits, targets = model.logits(ids)[0, len(read) - len(continuation) : len(read)], np.array(continuation)
    picked = jax.nn.log_softmax(logits)[np.arange(len(targets)), targets]
    return float(picked.sum()), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize(("tokens", "rows"), [pytest.param(2048, 2048, marks=pytest.mark.slow), (600, 3)])
def test_answers_equal_single_requests(model, requests, tokens, rows):
    requests = requests if rows > 3 else requests[-60:]
    scorer = RequestScorer(model.model, model.params, model.dtype, LONGEST, tokens, rows)
    answers = dict(scorer.answers(requests))
    assert sorted(answers) == list(range(len(requests)))
    for index, request in enumerate(requests[:-1]):
        log_probability, greedy = directly(model, request, padding=index > 3)
        assert answers[index].log_probability == pytest.approx(log_probability, rel=1e-5, abs=1e-5)
        assert answers[index].greedy == greedy
    assert answers[len(requests) - 1] == (0.0, True)
    assert scorer.compiled <= 8


def test_some_answers_are_greedy(model):
    scorer = RequestScorer(model.model, model.params, model.dtype, LONGEST, 2048, 64)
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(model.logits(np.array([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    answers = dict(scorer.answers([Request(ids[:3], ids[3:]), Request(ids[:3], other[3:])]))
    assert answers[0].greedy and not answers[1].greedy


def test_requests_that_read_the_same_share_a_row(model, requests):
    scorer = RequestScorer(model.model, model.params, model.dtype, LONGEST, 2048, 64)
    assert len(scorer._rows(requests[60:150])) == 1


def test_a_continuation_that_cannot_be_read(model):
    scorer = RequestScorer(model.model, model.params, model.dtype, 8, 2048, 64)
    with pytest.raises(ConfigError, match="sequence_length: a continuation has 9 tokens, .* at least 9"):
        list(scorer.answers([Request([1], [2] * 9)]))
