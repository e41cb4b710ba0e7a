"""lm-eval tasks of our own, offline, and their answers against one request at a time in float32."""

import json
import math

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from efficient_lm.errors import ConfigError, DataError
from efficient_lm.evaluation.lm_eval import LanguageModelHarness, run_tasks

PASSAGES = ["the people of a union", "commerce and peace " * 9, "treaties"]
QUESTIONS = [
    {"question": "peace and", "choices": ["war", "treaties", "the people"], "answer": 1},
    {"question": "the people of a", "choices": ["union", "nation", "x"], "answer": 0},
    {"question": "commerce ", "choices": [" with", "without", "a"], "answer": 2},
]
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
ROLLING = """
task: passages
dataset_path: json
dataset_kwargs: {data_files: {test: PASSAGES}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity}
  - {metric: byte_perplexity, aggregation: weighted_perplexity}
  - {metric: bits_per_byte, aggregation: bits_per_byte}
"""
GENERATE = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {"QUESTIONS": QUESTIONS, "PASSAGES": [{"text": text} for text in PASSAGES]}
    for name, rows in data.items():
        (folder / f"{name.lower()}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choose", CHOICE), ("passages", ROLLING), ("continue", GENERATE)):
        for key in data:
            text = text.replace(key, str(folder / f"{key.lower()}.jsonl"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def harness(model):
    return LanguageModelHarness(model)


def ask(kind, *arguments):
    return [Instance(kind, {}, asked, index) for index, asked in enumerate(arguments)]


def log_probabilities(model, ids):
    """Of every token but the first, after those before it; all of them read at once, in one row."""
    logits = model.logits(np.array([[*ids, *[0] * (256 - len(ids))]]))[0]
    picked = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), np.array(ids[1:])]
    return np.asarray(picked, np.float64)


def test_loglikelihoods(model, harness):
    pairs = [("peace and", " war"), ("", "union"), ("commerce  ", "a"), ("é", "è"), ("a " * 60, "treaty")]
    answers = harness.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (log_probability, greedy) in zip(pairs, answers, strict=True):
        ids = [*(context + continuation).encode()][-65:] if context else [256, *continuation.encode()]
        # Spaces at the end of a context belong to the continuation.
        count = len((context + continuation).encode()) - len(context.rstrip().encode())
        assert log_probability == pytest.approx(log_probabilities(model, ids)[-count:].sum(), rel=1e-5)
        assert greedy is False


def rolling(model, text):
    """Windows of 64 tokens; the last one reads as much as the others, and scores what they left."""
    ids = [256, *text.encode()]
    total, done = 0.0, 0
    for end in [*range(64, len(ids) - 1, 64), len(ids) - 1]:
        total += log_probabilities(model, ids[max(0, end - 64) : end + 1])[-(end - done) :].sum()
        done = end
    return total


def test_rolling_loglikelihoods(model, harness):
    answers = harness.loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in PASSAGES]), True)
    assert answers == pytest.approx([rolling(model, text) for text in PASSAGES], rel=1e-5)


def test_the_begin_token_is_put_in_front_where_the_tokenizer_has_its_own(model, harness, monkeypatch):
    assert harness.tok_encode("ab") == [97, 98] and harness.tok_encode("ab", add_special_tokens=True) == [256, 97, 98]
    monkeypatch.setattr(model.tokenizer, "begin_of_text", 7)
    assert harness.tok_encode("ab") == [7, 97, 98] and harness.tok_encode("ab", add_special_tokens=False) == [97, 98]


def greedy(model, prompt, count):
    ids = [*prompt.encode()][-64 + count :]
    for _ in range(count):
        ids.append(int(model.logits(np.array([ids + [0] * (64 - len(ids))]))[0, len(ids) - 1].argmax()))
        if ids[-1] == 256:
            break
    return model.tokenizer.decode(ids[-count:] if ids[-1] != 256 else ids[len(prompt.encode()[-64 + count :]) :])


@pytest.mark.slow
def test_generations(model, harness):
    prompts = ["peace and", "the people of a union " * 5, "x"]
    asked = [(prompt, {"until": [], "max_gen_toks": 8}) for prompt in prompts]
    answers = harness.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    assert answers == [greedy(model, prompt, 8) for prompt in prompts]
    stop = answers[0][3:5]
    stopped = harness.generate_until(
        ask("generate_until", (prompts[0], {"until": ["never", stop], "max_new_tokens": 8, "temperature": 0.0})), True
    )
    assert stopped == [answers[0][: answers[0].index(stop)]]
    sampling = {"until": "never", "max_gen_toks": 8, "do_sample": True, "temperature": 3.0, "top_p": 0.9}
    sampled = [harness.generate_until(ask("generate_until", (prompts[0], sampling)), True) for _ in range(2)]
    assert sampled[0] == sampled[1] != [answers[0]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"untl": ["x"]}, "generation_kwargs.untl: .*did you mean 'until'"),
        ({"num_beams": 4}, "generation_kwargs.num_beams: generate_until has no such option"),
        ({"max_gen_toks": 64}, "max_gen_toks: 64 new tokens leave no room .*sequence_length=64; valid: 1 to 63"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: "),
    ],
)
def test_generations_that_cannot_be(harness, options, said):
    with pytest.raises(ConfigError, match=said):
        harness.generate_until(ask("generate_until", ("x", options)), disable_tqdm=True)


def test_answers_reach_the_cache(harness, monkeypatch):
    kept = []
    monkeypatch.setattr(harness.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    harness.loglikelihood(ask("loglikelihood", ("peace", " and")), disable_tqdm=True)
    harness.loglikelihood_rolling(ask("loglikelihood_rolling", ("peace",)), disable_tqdm=True)
    harness.generate_until(ask("generate_until", ("x", {"max_gen_toks": 2})), disable_tqdm=True)
    assert [entry[:2] for entry in kept] == [
        ("loglikelihood", ("peace", " and")), ("loglikelihood_rolling", ("peace",)),
        ("generate_until", ("x", {"max_gen_toks": 2})),
    ]  # fmt: skip


def test_a_folder_of_tasks(model, tasks):
    results = run_tasks(model, [str(tasks)])
    assert set(results) == {"choose", "passages", "continue"}
    chosen = 0
    for row in QUESTIONS:
        question = row["question"].rstrip()
        whole = [question + " " * (row["question"] != question) + " " + choice for choice in row["choices"]]
        scores = [log_probabilities(model, [*text.encode()])[len(question) - 1 :].sum() for text in whole]
        chosen += int(np.argmax(scores)) == row["answer"]
    choose = results["choose"]
    assert choose["metrics"]["acc"]["value"] == pytest.approx(chosen / 3)
    assert (choose["examples"], choose["fewshot"], choose["version"]) == (3, 0, 2.0)
    bits = -sum(rolling(model, text) for text in PASSAGES) / math.log(2) / sum(map(len, PASSAGES))
    assert results["passages"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert results["continue"]["metrics"]["exact_match"]["value"] == 0.0


def test_one_file_and_a_limit(model, tasks):
    results = run_tasks(model, [str(tasks / "passages.yaml")], limit=1)
    assert list(results) == ["passages"] and results["passages"]["examples"] == 1
    nats = log_probabilities(model, [256, *PASSAGES[0].encode()]).sum()
    bits = results["passages"]["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(-nats / math.log(2) / len(PASSAGES[0]), rel=1e-5)


def test_faults_of_tasks(model, tasks, tmp_path):
    with pytest.raises(DataError, match="tasks: there is no file or folder '.*mine.yaml'"):
        run_tasks(model, [str(tmp_path / "mine.yaml")])
    with pytest.raises(DataError, match="tasks: no task is described in"):
        run_tasks(model, [str(tmp_path)])
    (tmp_path / "broken.yaml").write_text(CHOICE.replace("QUESTIONS", str(tmp_path / "missing.jsonl")))
    with pytest.raises(DataError, match=r"tasks: .*broken.yaml failed: .*missing.jsonl"):
        run_tasks(model, [str(tmp_path / "broken.yaml")])
    (tmp_path / "wish.yaml").write_text((tasks / "continue.yaml").read_text().replace("max_gen_toks", "num_beams"))
    with pytest.raises(ConfigError, match="generation_kwargs.num_beams"):
        run_tasks(model, [str(tmp_path / "wish.yaml")])


@pytest.mark.slow
def test_unknown_names_are_answered_with_the_nearest(model):
    with pytest.raises(ConfigError, match="tasks: lm-eval has no task 'arc_esy'; did you mean 'arc_easy'"):
        run_tasks(model, ["arc_esy"])
