"""The Python interface: a model with its tokenizer, trained here or published elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.composition import compose
from efficient_lm.config import RunConfig, Skipping, read_config, save_config
from efficient_lm.data.base import DataSpec
from efficient_lm.data.sources import FilesSource
from efficient_lm.data.store import open_store
from efficient_lm.data.tokenizers import Tokenizer, load_tokenizer
from efficient_lm.elastic.choices import Part, choose, parts_of
from efficient_lm.elastic.importance import Order, most_important
from efficient_lm.elastic.nesting import NoNestingSpec
from efficient_lm.elastic.submodels import submodel_parameters, submodel_spec
from efficient_lm.errors import ConfigError
from efficient_lm.evaluation import attention_rank, decisions
from efficient_lm.evaluation.answers import evaluate_answers
from efficient_lm.evaluation.bits_per_byte import make_scorer
from efficient_lm.evaluation.diagnostics import ROWS, Diagnostics
from efficient_lm.evaluation.text import evaluate_documents
from efficient_lm.evaluation.windows import WindowSpec
from efficient_lm.inference.decoding import Decoder
from efficient_lm.inference.sampling import SamplingSpec
from efficient_lm.inference.speculative import Draft, SpeculativeDecoder
from efficient_lm.interop.hugging_face import Origin, check_free, write_folder
from efficient_lm.interop.sources import Published, is_published, open_published
from efficient_lm.models.computed import computed
from efficient_lm.models.context import Context
from efficient_lm.models.parameters import Parameters, count_parameters
from efficient_lm.models.skipping.base import SkippingSpec
from efficient_lm.objectives.base import ObjectiveSpec
from efficient_lm.training.checkpoints import Checkpoints, load_parameters
from efficient_lm.training.parameterization import StandardSpec
from efficient_lm.training.run_directory import RunDirectory, locate
from efficient_lm.validation import of_kind, validate

if TYPE_CHECKING:
    from efficient_lm.models.language_model import LanguageModel


LONGEST = 1024
"""Tokens per row when an imported model is scored and nothing is said; fewer where its context is shorter."""


class Model:
    """A language model with its parameters, tokenizer and config.

    Attributes:
        config: the run's config.
        params: nested dict of float32 arrays.
        tokenizer: text ↔ ids.
        step: training step of the parameters.
        origin: what the published model said of itself that this one comes from; None if it comes from none.
        skipping: which layers each token runs when the model is used; None runs all.
    """

    def __init__(
        self,
        config: RunConfig,
        params: Parameters,
        tokenizer: Tokenizer,
        step: int = 0,
        origin: Origin | None = None,
        skipping: SkippingSpec | None = None,
    ):
        self.config, self.params, self.tokenizer, self.step, self.origin = config, params, tokenizer, step, origin
        self.model: LanguageModel = config.model.build()
        self.skipping = skipping
        self.dtype = config.precision.dtype
        self._drafted: dict[str, Model] = {}

    @property
    def begins(self) -> bool:
        """Whether texts begin with the tokenizer's begin token: always in training here, elsewhere if it adds one."""
        return self.origin is None or self.tokenizer.adds_begin

    def skip(self, kind: str | SkippingSpec | None, **options: Any) -> "Model":
        """The same model, running fewer layers: what it then generates, scores and says is under this policy.

        Args:
            kind: of the policy, with its attributes as `options`: ``model.skip("uniform", layers=4)``; or the whole
                policy; None runs every layer.

        Raises:
            ConfigError: no such policy, or one that cannot work with the model.
        """
        kind = of_kind(Skipping, "skipping", kind, options)
        if kind is not None:
            kind.check(self.model)
        return Model(self.config, self.params, self.tokenizer, self.step, self.origin, kind)

    def speculate(
        self,
        draft: float | Mapping[str, Part] | Sequence[float | Mapping[str, Part]],
        draft_tokens: int = 4,
        draft_confidence: float = 0.5,
    ) -> "Model":
        """The same model, whose tokens a smaller one inside drafts: it generates the same, in fewer passes.

        Args:
            draft: what `submodel` takes, or several of them, smallest first.
            draft_tokens: drafted at a time.
            draft_confidence: probability of the likeliest token below which a token is left to the next larger draft.

        Returns:
            A model whose `decoder` is a `SpeculativeDecoder`; the same one for the same arguments.

        Raises:
            ConfigError: nothing that the model has inside, or the whole; or the model skips layers.
        """
        if self.skipping is not None:
            raise ConfigError(
                f"draft: with skipping={self.skipping.kind} there is no whole model to verify with; leave one out"
            )
        if draft_tokens < 1:
            raise ConfigError(f"draft_tokens: at least 1; got {draft_tokens}")
        key = repr((draft, draft_tokens, draft_confidence))
        if key not in self._drafted:
            sizes = [draft] if isinstance(draft, Mapping | float | int) else list(draft)
            drafts = [self._draft(size) for size in sizes]
            counts = [count_parameters(small.declarations) for small, _ in drafts]
            if not counts or counts != sorted(set(counts)):
                raise ConfigError(f"draft: sizes ascend, and the whole model comes last of all; got {sizes}")
            found = Model(self.config, self.params, self.tokenizer, self.step, self.origin)
            # In place of the one that would be made when it is first asked for.
            found.decoder = SpeculativeDecoder(
                self.model, self.params, drafts, self.dtype, draft_tokens, draft_confidence
            )
            self._drafted[key] = found
        return self._drafted[key]

    def _draft(self, size: float | Mapping[str, Part]) -> Draft:
        small = self.submodel(parts_of(self.model, size, "draft"))
        if count_parameters(small.model.declarations) == count_parameters(self.model.declarations):
            raise ConfigError("draft: this is the whole model, which verifies; a draft is a smaller part")
        return small.model, small.params

    @cached_property
    def decoder(self) -> Decoder:
        """The cached decoder; its compiled programs live as long as this model, and its `report` says what it ran."""
        return Decoder(self.model, self.params, self.dtype, self.skipping)

    @cached_property
    def _logits(self) -> Any:
        options = {"dtype": self.dtype, "skipping": self.skipping}
        return jax.jit(lambda params, tokens: self.model.logits(params, tokens, **options))

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
        special_tokens: bool = False,
        *,
        draft: float | Mapping[str, Part] | Sequence[float | Mapping[str, Part]] | None = None,
        draft_tokens: int = 4,
        draft_confidence: float = 0.5,
        **options: Any,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each prompt of a list, without the prompt.

        Args:
            draft, draft_tokens, draft_confidence: as of `speculate`; None drafts nothing.
            special_tokens: whether names of special tokens in a prompt, such as ``<|im_start|>``, stand for them.
            sampling: how tokens are chosen; or give its attributes, such as ``temperature=0``, as `options`.
        """
        sampling = sampling or validate(SamplingSpec, options)
        if draft is not None:
            drafted = self.speculate(draft, draft_tokens, draft_confidence)
            return drafted.generate(prompt, max_new_tokens, sampling, seed, stop_at_end, special_tokens)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        made = np.stack(list(self.stream(prompts, max_new_tokens, sampling, seed, stop_at_end, special_tokens)), axis=1)
        texts = [self.tokenizer.decode(_before(row, self._end(stop_at_end))) for row in made]
        return texts[0] if isinstance(prompt, str) else texts

    def stream_text(
        self,
        prompt: str,
        max_new_tokens: int,
        sampling: SamplingSpec,
        seed: int = 0,
        stop_at_end: bool = True,
        special_tokens: bool = False,
    ) -> Iterator[str]:
        """The continuation of one prompt in whole characters, as they are made."""
        stream, end = self.tokenizer.stream(), self._end(stop_at_end)
        for (token,) in self.stream([prompt], max_new_tokens, sampling, seed, stop_at_end, special_tokens):
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
        special_tokens: bool = False,
    ) -> Iterator[np.ndarray]:
        """Token ids ``[batch]`` as they are made; a row that has ended yields end-of-text from there on."""
        encoded = [self.tokenizer.encode(prompt, special_tokens) for prompt in prompts]
        start = np.array([self.tokenizer.begin_of_text], np.int32)
        ids = [np.concatenate([start, tokens]) if self.begins or not len(tokens) else tokens for tokens in encoded]
        return self.decoder.stream(ids, max_new_tokens, sampling, seed, self._end(stop_at_end))

    def _end(self, stop_at_end: bool) -> int | None:
        return self.tokenizer.end_of_text if stop_at_end else None

    @cached_property
    def _scorer(self) -> Any:
        return make_scorer(self.model, self.dtype, self.skipping)

    def evaluate(
        self,
        data: DataSpec | Sequence[str] | None = None,
        sequence_length: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        stride: int | None = None,
        begin: str = "document",
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Score held-out text, or the answers to a synthetic task.

        See `efficient_lm.evaluation.text.evaluate_documents` and `efficient_lm.evaluation.answers.evaluate_answers` for
        what comes back. Where tokens may pass by layers, `computed` stands for `ran` (see `Computed.figures`).

        Args:
            data: data whose validation part is scored, or paths of text files; None takes what the run was trained on.
            sequence_length: tokens per window, or per row of a task and then also several; None takes the task's
                own, or that of training.
            batch_size: windows at a time; None takes what suits the device.
            stride, begin, limit: which windows; see `efficient_lm.evaluation.windows.WindowSpec`.

        Raises:
            ConfigError: windows longer than the model's table of positions, or a stride longer than a window.
            DataError: a file that cannot be read, or no text.
        """
        data = self.config.data if data is None else data
        own = data.row_length if isinstance(data, DataSpec) else None
        length = sequence_length or own or self.config.train.sequence_length
        if isinstance(data, DataSpec) and not data.reads_text:
            if stride is not None or begin != "document":
                raise ConfigError("stride, begin: are for windows of text; the rows of a task are read whole")
            lengths = [length] if isinstance(length, int) else length
            seed = self.config.run.seed
            found = evaluate_answers(
                self._scorer, self.model, self.params, data, self.tokenizer, seed, lengths, limit, batch_size
            )
            return found | {"lengths": [self._with_computed(row, row["length"]) for row in found["lengths"]]}
        if not isinstance(length, int):
            raise ConfigError(f"sequence_length: {len(length)} values are for a synthetic task; text takes one")
        spec = validate(WindowSpec, {"sequence_length": length, "stride": stride, "begin": begin, "limit": limit})
        self.model.check_length(length, "sequence_length")
        if isinstance(data, DataSpec):
            held_out = data.open(self.tokenizer, length, self.config.run.seed).validation
            store, documents = held_out.store, held_out.documents
        else:
            store = open_store(FilesSource(paths=tuple(data), any_extension=True), self.tokenizer)
            documents = np.arange(len(store))
        scores = evaluate_documents(self._scorer, self.params, store, documents, spec, batch_size)
        return self._with_computed(scores, length)

    def _with_computed(self, scores: dict[str, Any], length: int) -> dict[str, Any]:
        """Scores of windows of so many tokens, with what was computed in place of what ran."""
        ran = scores.pop("ran", None)
        if ran is None:
            return scores
        found = computed(self.model, self.skipping, ran["halves"], ran["tokens"], length)
        return scores | {"computed": found.figures()}

    def diagnose(
        self, data: DataSpec | None = None, sequence_length: int | None = None, rows: int = ROWS
    ) -> list[dict[str, Any]]:
        """What goes on inside the mixers, on a few rows of validation data.

        Args:
            data: whose validation rows are read; None takes what the run was trained on.
            sequence_length: tokens of a row; None takes the task's own, or that of training.
            rows: at most so many.

        Returns:
            For each layer the kind of its `mixer` (None without one), and what
            `efficient_lm.evaluation.diagnostics.Diagnostics.measure` finds, as lists.
        """
        batch = self.validation_rows(data, sequence_length, rows)
        found = Diagnostics(self.model, self.dtype).measure_batch(self.params, batch)
        return [
            {"mixer": kind, **{name: values.tolist() for name, values in figures.items()}}
            for kind, figures in zip(self._mixers(), found, strict=True)
        ]

    def decided(self, selection: str) -> "Model":
        """The same model, its depth rules choosing tokens of a row by comparing them, ``top_k``, or ``causal``, as when
        decoding. Raises `ConfigError` if it has no such rule."""
        config = self.config.model_copy(update={"model": self.config.model.decided(selection)})
        return Model(config, self.params, self.tokenizer, self.step, self.origin)

    def depth_decisions(
        self, data: DataSpec | None = None, sequence_length: int | None = None, rows: int = decisions.ROWS
    ) -> list[dict[str, Any]]:
        """How well single tokens decide to run what a comparison of the row would have them run, by layer.

        Arguments as of `diagnose`; see `efficient_lm.evaluation.decisions.decisions` for what comes back.
        """
        batch = self.validation_rows(data, sequence_length, rows)
        return decisions.decisions(self.model, self.params, batch, self.dtype)

    def attention_rank(
        self, data: DataSpec | None = None, sequence_length: int | None = None, rows: int = attention_rank.ROWS
    ) -> list[dict[str, Any]]:
        """The rank of attention maps of each layer (see `efficient_lm.evaluation.attention_rank`).

        Arguments as of `diagnose`.

        Returns:
            For each layer the kind of its `mixer` (None without one), `ranks`, the mean rank of each head's maps over
            rows, and `rank`, the mean of those; both None for a mixer without attention weights.
        """
        batch = self.validation_rows(data, sequence_length, rows)
        found = attention_rank.attention_ranks(self.model, self.params, batch, self.dtype)
        return [
            {"mixer": kind, "ranks": None if ranks is None else ranks.tolist(),
             "rank": None if ranks is None else float(ranks.mean())}
            for kind, ranks in zip(self._mixers(), found, strict=True)
        ]  # fmt: skip

    def _mixers(self) -> list[str | None]:
        return [layer.mixer and layer.mixer.kind for layer in self.model.layers]

    def validation_rows(self, data: DataSpec | None, sequence_length: int | None, rows: int) -> dict[str, np.ndarray]:
        """At most so many validation rows, of the run's own data for None."""
        data = self.config.data if data is None else data
        length = sequence_length or data.row_length or self.config.train.sequence_length
        self.model.check_length(length, "sequence_length")
        opened = data.open(self.tokenizer, length, self.config.run.seed)
        return next(opened.validation_batches(rows, limit_rows=rows))

    def submodel(self, submodel: float | Mapping[str, Part]) -> "Model":
        """The smaller model that has a part of every axis this one is trained for, or the parts named.

        Args:
            submodel: ``0.5``, or ``{"ffn": 0.5, "layers": [0, 1, 3]}`` (see `efficient_lm.elastic.choices.choose`).

        Raises:
            ConfigError: nothing that the model has inside.
        """
        choice = choose(self.model, parts_of(self.model, submodel))
        spec = submodel_spec(self.model, choice)
        cut = jax.jit(lambda params: submodel_parameters(self.model, spec.build(), params, choice.layers))
        changes = {
            "model": spec, "init_from": None, "nesting": NoNestingSpec(), "parameterization": StandardSpec(),
        }  # fmt: skip
        config = self.config.model_copy(update=changes)
        return Model(config, cut(self.params), self.tokenizer, self.step, self.origin)

    def extract(self, *, experts: Any = None, order: Order | None = None, **choice: Any) -> "Model":
        """A smaller model of a part of this one, what is worth most of it.

        Args:
            experts: as a part of all, like other axes; or how many or which (see `efficient_lm.experts.extract`, which
                then takes what is left of `choice`).
            order: what makes units worth keeping (see `efficient_lm.elastic.importance`): ``none`` keeps the first.
                None: those of axes that the model is trained for, and along others the most active.
            choice: parts by axis, as of `submodel`; and `text`, `sequence_length` and `rows` of what is measured on, as
                of `efficient_lm.experts.upcycle`.
        """
        from efficient_lm.experts import extract, rows_of

        if experts is not None and not isinstance(experts, float):
            return extract(self, experts, **choice)
        measured = {name: choice.pop(name) for name in ("text", "sequence_length", "rows") if name in choice}
        parts = choice if experts is None else {**choice, "experts": experts}
        params, parts = most_important(
            self.model, self.params, parts, order, lambda: rows_of(self, **measured), self.dtype
        )  # fmt: skip
        whole = Model(self.config, params, self.tokenizer, self.step, self.origin)
        return whole.submodel(parts)

    def save(self, path: str | Path) -> Path:
        """Write a run directory: config, tokenizer, parameters. Raises `CheckpointError` if something is there."""
        path = Path(path)
        check_free(path)
        with RunDirectory(path) as run:
            save_config(run.config, self.config)
            self.tokenizer.save(run.tokenizer)
            if self.origin is not None:
                self.origin.save(run.origin)
            checkpoints = Checkpoints(run.checkpoints)
            checkpoints.save(self.step, {"parameters": self.params}, {"step": self.step})
            checkpoints.close()
        return path

    def to_hf(self, path: str | Path, dtype: str | None = None) -> Path:
        """Write a folder in Hugging Face format: `config.json`, safetensors, the tokenizer.

        Args:
            dtype: ``float32``, ``bfloat16`` or ``float16`` to round to; None writes each tensor in the element type it
                was published in where that changes no value, and otherwise in float32.

        Raises:
            ConfigError: no published family can express the model.
            CheckpointError: something is there already.
            ResourceError: the disk is full.
        """
        context = self.config.train.sequence_length
        return write_folder(Path(path), self.config.model, self.params, self.tokenizer, self.origin, context, dtype)


def _before(row: np.ndarray, end: int | None) -> np.ndarray:
    stops = np.flatnonzero(row == end) if end is not None else []
    return row[: stops[0]] if len(stops) else row


def load(path: str | Path, submodel: float | Mapping[str, Part] | None = None, averaged: bool = False) -> Model:
    """A run directory, one of its checkpoints (``runs/name/checkpoints/400``), a Hugging Face folder or a GGUF file.

    Args:
        submodel: the smaller model inside to take, see `Model.submodel`; None takes the whole.
        averaged: take the moving average that a run kept of its parameters (`train.average`).

    Raises:
        CheckpointError: there is no model, nothing in it can be read, or config and parameters do not fit each other.
        ConfigError: a published model of a family or with an option that is not supported.
    """
    if submodel is not None:
        return load(path, averaged=averaged).submodel(submodel)
    path = Path(path)
    if is_published(path):
        if averaged:
            raise ConfigError(f"averaged: {path} is a published model, which holds no average beside; leave it out")
        return _published(open_published(path), path)
    run, step = locate(path)
    config = read_config(run.config)
    params, record = load_parameters(run.checkpoints, config.model.build().declarations, step, averaged)
    return Model(config, params, load_tokenizer(run.tokenizer), record["step"], Origin.load(run.origin))


def from_hf(path: str | Path) -> Model:
    """A folder in Hugging Face format (`config.json`, safetensors, `tokenizer.json`). Raises as `load`."""
    return _published(open_published(Path(path), "hf"), Path(path))


def from_gguf(path: str | Path) -> Model:
    """A GGUF file. Raises as `load`."""
    return _published(open_published(Path(path), "gguf"), Path(path))


def _published(found: Published, path: Path) -> Model:
    """A model with the config of a run that would use it, on the embedded corpus for want of its own data."""
    name = path.resolve().stem or "published"
    values = compose("train").values
    values |= {"model": found.described.spec.dump(), "tokenizer": found.tokenizer_choice}
    values["run"] |= {"name": name, "dir": f"runs/{name}"}
    values["train"]["sequence_length"] = min(LONGEST, found.context or LONGEST)
    config = validate(RunConfig, values)
    return Model(config, found.described.read(), found.tokenizer, origin=found.described.origin)
