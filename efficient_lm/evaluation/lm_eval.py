"""The adapter to lm-eval (EleutherAI's evaluation harness), and its tasks. The only place that imports `lm_eval`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efficient_lm.errors import ConfigError, DataError, UserError, nearest
from efficient_lm.evaluation.buckets import group_by_length
from efficient_lm.evaluation.requests import Request, RequestScorer
from efficient_lm.evaluation.text import batch_limits
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.validation import validate

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(
        f"tasks: lm-eval is not installed ({error}); install the extra: pip install 'efficient-lm[lm_eval]'"
    ) from error

if TYPE_CHECKING:
    from efficient_lm.api import Model

DEFAULT_NEW_TOKENS = 256
GENERATED_ROWS = 16
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GENERATION = ("until", "do_sample", *SamplingSpec.model_fields, *LENGTHS)
"""What a task may ask of `generate_until`; every name of `LENGTHS` means the same."""


class LanguageModelHarness(TemplateLM):
    """A model as lm-eval sees it, by the conventions of its Hugging Face adapter.

    Context and continuation are encoded together and then cut, spaces at the end of the context having moved to the
    continuation (`TemplateLM` sees to both); an empty context is the begin token; contexts that are too long lose their
    beginning. The begin token stands in front of other texts only where it is one of its own and not the end of text.

    Args:
        sequence_length: tokens that the model reads at most; None takes that of training.
        batch_size: requests at a time; None takes what suits the device.
        seed: of what is sampled.
    """

    def __init__(
        self, model: "Model", sequence_length: int | None = None, batch_size: int | None = None, seed: int = 0
    ):
        super().__init__()
        self.max_length = sequence_length or model.config.train.sequence_length
        model.model.check_length(self.max_length, "sequence_length")
        self.model, self.batch_size, self.seed = model, batch_size, seed
        limits = batch_limits(batch_size, self.max_length)
        self.scorer = RequestScorer(model.model, model.params, model.dtype, self.max_length, *limits, model.skipping)

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.model.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for."""
        return self.model.tokenizer.begin_of_text

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self.model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; `add_special_tokens` None puts in front what the tokenizer's own texts begin with."""
        ids = self.model.tokenizer.encode(string).tolist()
        own = self.prefix_token_id != self.eot_token_id if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if own else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Answers to ``(what was asked, context, continuation)``; the first is None for a part of what was asked."""
        results: list[Any] = [None] * len(requests)
        asked = [Request(context, continuation) for _, context, continuation in requests]
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring requests")
        for index, answer in self.scorer.answers(asked):
            results[index] = tuple(answer)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
            bar.update()
        bar.close()
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: disjoint windows, the last one with as much context as it can have."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            found = [(None, *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        results = []
        for request, count in zip(requests, counts, strict=True):
            results.append(sum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each up to the first of its `until` strings, which is left out.

        Raises:
            ConfigError: an option that is not in `GENERATION`, or no room for a context.
        """
        options = [_Generation(request.args[1], self.max_length) for request in requests]
        contexts = [
            self.tok_encode(request.args[0])[-self.max_length + option.length :] or [self.prefix_token_id]
            for request, option in zip(requests, options, strict=True)
        ]
        rows = self.batch_size or GENERATED_ROWS
        results = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        for number, members in enumerate(_alike(contexts, options, rows, self.max_length)):
            texts = self._generate([contexts[member] for member in members], options[members[0]], number)
            for member, text in zip(members, texts, strict=True):
                results[member] = text
                self.cache_hook.add_partial("generate_until", requests[member].args, text)
            bar.update(len(members))
        bar.close()
        return results

    def _generate(self, contexts: list[list[int]], option: "_Generation", number: int) -> list[str]:
        # Whole powers of two of rows: one more shape to compile costs more than rows of padding.
        rows = 1 << (len(contexts) - 1).bit_length()
        prompts = [np.array(context, np.int32) for context in contexts]
        prompts += [np.array([self.prefix_token_id], np.int32)] * (rows - len(prompts))
        end, tokenizer = self.eot_token_id, self.model.tokenizer
        streams, texts, done = [tokenizer.stream() for _ in contexts], [""] * len(contexts), [False] * len(contexts)
        for tokens in self.model.decoder.stream(prompts, option.length, option.sampling, self.seed + number, end):
            for row, stream in enumerate(streams):
                if done[row]:
                    continue
                ended = tokens[row] == end
                texts[row] += stream.end() if ended else stream.put(int(tokens[row]))
                done[row] = ended or option.stops(texts[row])
            if all(done):
                break
        texts = [text if over else text + stream.end() for text, over, stream in zip(texts, done, streams, strict=True)]
        return [option.before_stop(text) for text in texts]


class _Generation:
    """What a task asks of a generation.

    Attributes:
        until: strings that end a text.
        length: new tokens at most.
        sampling: greedy, unless `do_sample` or a temperature says otherwise.
    """

    def __init__(self, options: dict[str, Any], longest: int):
        unknown = [name for name in options if name not in GENERATION]
        if unknown:
            raise ConfigError(
                f"generation_kwargs.{unknown[0]}: generate_until has no such option; {nearest(unknown[0], GENERATION)}"
            )
        until = options.get("until") or []
        self.until = [text for text in ([until] if isinstance(until, str) else until) if text]
        given = [options[name] for name in LENGTHS if options.get(name) is not None]
        self.length = int(given[0]) if given else min(DEFAULT_NEW_TOKENS, longest // 2)
        if not 0 < self.length < longest:
            raise ConfigError(
                f"generation_kwargs.max_gen_toks: {self.length} new tokens leave no room for a context in "
                f"sequence_length={longest}; valid: 1 to {longest - 1}"
            )
        chosen = {name: options[name] for name in SamplingSpec.model_fields if options.get(name) is not None}
        sampled = options.get("do_sample")
        if sampled is False or (sampled is None and not chosen.get("temperature")):
            chosen = {"temperature": 0}
        self.sampling = validate(SamplingSpec, {"temperature": 1.0} | chosen)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for requests that may share a batch."""
        return tuple(self.until), self.length, self.sampling

    def stops(self, text: str) -> bool:
        """Whether a text holds a string that ends it."""
        return any(stop in text for stop in self.until)

    def before_stop(self, text: str) -> str:
        """The text up to the first string that ends it."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]


def _alike(contexts: list[list[int]], options: list[_Generation], rows: int, longest: int) -> Iterator[list[int]]:
    """Indices of requests that are generated together: of one wish, and of similar length."""
    wishes: dict[tuple[Any, ...], list[int]] = {}
    for index, option in enumerate(options):
        wishes.setdefault(option.key, []).append(index)
    for members in wishes.values():
        for group in group_by_length([len(contexts[member]) for member in members], rows * longest, rows, longest):
            yield [members[place] for place in group.members]


def run_tasks(
    model: "Model",
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks.

    Args:
        tasks: names that lm-eval knows, YAML files of tasks, and folders, of which every task is run.
        fewshot: worked examples before each question; None takes what the task says.
        limit: at most so many examples of each task.
        sequence_length, batch_size, seed: as for `LanguageModelHarness`.

    Returns:
        By task, and by group: ``{"metrics": {name: {"value", "stderr"}}, "examples", "fewshot", "version"}``; what a
        metric was filtered by follows its name after a comma.

    Raises:
        ConfigError: a task that does not exist or asks for what is not there.
        DataError: a task whose description or data cannot be read.
    """
    harness = LanguageModelHarness(model, sequence_length, batch_size, seed)
    manager, names = _manager(tasks)
    try:
        results = simple_evaluate(
            harness, tasks=names, task_manager=manager, num_fewshot=fewshot, limit=limit, log_samples=False,
            random_seed=seed, numpy_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # lm-eval and datasets raise anything from KeyError to ConnectionError
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"tasks: {', '.join(tasks)} failed: {type(error).__name__}: {reason}") from error
    return {name: _figures(name, results) for name in results["results"]}


def _manager(tasks: Sequence[str]) -> tuple[TaskManager, list[str]]:
    """What finds the tasks, and what it is asked for."""
    folders = [task for task in tasks if Path(task).is_dir()]
    paths = [task for task in tasks if Path(task).is_file()]
    named = [task for task in tasks if task not in folders and task not in paths]
    for task in named:
        if task.endswith((".yaml", ".yml")) or "/" in task:
            raise DataError(f"tasks: there is no file or folder '{task}'")
    local = TaskManager(include_path=folders, include_defaults=False) if folders else None
    manager = TaskManager(include_path=folders or None, include_defaults=bool(named))
    for task in named:
        if task not in manager.all_tasks:
            raise ConfigError(f"tasks: lm-eval has no task '{task}'; {nearest(task, manager.all_tasks)}")
    found = list(local.all_subtasks) if local else []
    if folders and not found:
        raise DataError(f"tasks: no task is described in {', '.join(folders)}")
    return manager, [*named, *paths, *found]


def _figures(name: str, results: dict[str, Any]) -> dict[str, Any]:
    values = results["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or not chosen or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        shown = metric if chosen == "none" else key
        metrics[shown] = {"value": float(value), "stderr": error if isinstance(error, int | float) else None}
    counts = results.get("n-samples", {}).get(name, {})
    return {
        "metrics": metrics,
        "examples": counts.get("effective"),
        "fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
    }
