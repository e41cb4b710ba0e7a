"""The Python interface: a trained model with its tokenizer."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.config import RunConfig, read_config, save_config
from efficient_lm.data.dataset import DataSpec, document_batches
from efficient_lm.data.sources import FilesSource
from efficient_lm.data.tokenizers import Tokenizer, load_tokenizer
from efficient_lm.errors import CheckpointError
from efficient_lm.evaluation.bits_per_byte import evaluate, make_scorer
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters
from efficient_lm.objectives.base import ObjectiveSpec
from efficient_lm.training.checkpoints import Checkpoints, load_parameters
from efficient_lm.training.run_directory import RunDirectory
from efficient_lm.validation import validate

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


class Model:
    """A language model with its parameters, tokenizer and config.

    Attributes:
        config: the run's config.
        params: nested dict of float32 arrays.
        tokenizer: text ↔ ids.
        step: training step of the parameters.
    """

    def __init__(self, config: RunConfig, params: Parameters, tokenizer: Tokenizer, step: int = 0):
        self.config, self.params, self.tokenizer, self.step = config, params, tokenizer, step
        self.model: LanguageModel = config.model.build()
        self.dtype = config.precision.dtype

    @cached_property
    def decoder(self) -> Decoder:
        """The cached decoder; its compiled programs live as long as this model."""
        return Decoder(self.model, self.params, self.dtype)

    @cached_property
    def _logits(self) -> Any:
        return jax.jit(lambda params, tokens: self.model.logits(params, tokens, dtype=self.dtype))

    def logits(self, tokens: np.ndarray | jax.Array) -> jax.Array:
        """float32 ``[batch, time, vocab]`` for int ids `[batch, time]`, each row one whole document."""
        tokens = jnp.asarray(tokens, jnp.int32)
        self.model.check_length(tokens.shape[1], "tokens")
        return self._logits(self.params, tokens)

    def loss(self, tokens: np.ndarray | jax.Array, objective: ObjectiveSpec | None = None) -> float:
        """The training objective per predicted token, nats: rows `[batch, time + 1]` predict their own next token."""
        tokens = jnp.asarray(tokens, jnp.int32)
        context = Context.rows(tokens.shape[0], tokens.shape[1] - 1)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": context.positions,
            "segment_ids": context.segment_ids,
            "weights": jnp.ones_like(tokens[:, 1:], jnp.float32),
        }
        sums = (objective or self.config.objective).sums(self.model, self.params, batch, self.dtype, packed=False)
        return float(sums.loss / sums.weight)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 128,
        sampling: SamplingSpec | None = None,
        seed: int = 0,
        stop_at_end: bool = True,
        **options: Any,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each prompt of a list, without the prompt.

        Args:
            sampling: how tokens are chosen; or give its attributes, such as ``temperature=0``, as `options`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampling = sampling or validate(SamplingSpec, options)
        made = np.stack(list(self.stream(prompts, max_new_tokens, sampling, seed, stop_at_end)), axis=1)
        texts = [self.tokenizer.decode(_before(row, self._end(stop_at_end))) for row in made]
        return texts[0] if isinstance(prompt, str) else texts

    def stream_text(
        self, prompt: str, max_new_tokens: int, sampling: SamplingSpec, seed: int = 0, stop_at_end: bool = True
    ) -> Iterator[str]:
        """The continuation of one prompt in whole characters, as they are made."""
        stream, end = self.tokenizer.stream(), self._end(stop_at_end)
        for (token,) in self.stream([prompt], max_new_tokens, sampling, seed, stop_at_end):
            if token == end:
                break
            yield stream.put(int(token))
        yield stream.end()

    def stream(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingSpec,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> Iterator[np.ndarray]:
        """Token ids ``[batch]`` as they are made; a row that has ended yields end-of-text from there on."""
        start = [self.tokenizer.end_of_text]
        ids = [np.concatenate([start, self.tokenizer.encode(prompt)]).astype(np.int32) for prompt in prompts]
        return self.decoder.stream(ids, max_new_tokens, sampling, seed, self._end(stop_at_end))

    def _end(self, stop_at_end: bool) -> int | None:
        return self.tokenizer.end_of_text if stop_at_end else None

    def evaluate(
        self, data: DataSpec | Sequence[str] | None = None, sequence_length: int | None = None, batch_size: int = 32
    ) -> dict[str, float]:
        """Score held-out text: see `efficient_lm.evaluation.bits_per_byte.evaluate`.

        Args:
            data: data whose validation part is scored, or paths of text files; None takes what the run was trained on.
            sequence_length: tokens per row; None takes that of training.

        Raises:
            ConfigError: rows longer than the model's table of positions.
            DataError: a file that cannot be read, or no text.
        """
        length = sequence_length or self.config.train.sequence_length
        self.model.check_length(length, "sequence_length")
        if data is None or isinstance(data, DataSpec):
            opened = (data or self.config.data).open(self.tokenizer, length, self.config.run.seed)
            batches = opened.validation_batches(batch_size)
        else:
            batches = document_batches(
                FilesSource(paths=tuple(data), any_extension=True), self.tokenizer, length, batch_size
            )
        return evaluate(make_scorer(self.model, self.dtype), self.params, batches)

    def save(self, path: str | Path) -> Path:
        """Write a run directory: config, tokenizer, parameters. Raises `CheckpointError` if something is there."""
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path}: already holds something; choose another folder")
        with RunDirectory(path) as run:
            save_config(run.config, self.config)
            self.tokenizer.save(run.tokenizer)
            checkpoints = Checkpoints(run.checkpoints)
            checkpoints.save(self.step, {"parameters": self.params}, {"step": self.step})
            checkpoints.close()
        return path


def _before(row: np.ndarray, end: int | None) -> np.ndarray:
    stops = np.flatnonzero(row == end) if end is not None else []
    return row[: stops[0]] if len(stops) else row


def load(path: str | Path) -> Model:
    """A run directory, or one of its checkpoints (``runs/name/checkpoints/400``).

    Raises:
        CheckpointError: there is no run, nothing in it can be read, or config and checkpoint do not fit each other.
    """
    path, step = Path(path), None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    run = RunDirectory(path)
    if not run.config.is_file():
        beside = (
            sorted(str(found.parent) for found in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        )
        hint = f"; there are {', '.join(beside[:5])}" if beside else ""
        raise CheckpointError(f"{path}: not a run directory (no config.yaml){hint}")
    config = read_config(run.config)
    params, record = load_parameters(run.checkpoints, config.model.build().declarations, step)
    return Model(config, params, load_tokenizer(run.tokenizer), record["step"])
