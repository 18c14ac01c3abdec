"""fixmin_cpp.hf beside the PyTorch model of the same checkpoint: logits, loops, pipelines, and what is refused."""

import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp import ArgumentError, ContextLengthError, UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextGenerationPipeline, pipeline  # noqa: E402
from transformers.generation.logits_process import (  # noqa: E402
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer, TextIteratorStreamer  # noqa: E402

from fixmin_cpp.hf import _CACHE as CACHE  # noqa: E402
from fixmin_cpp.hf import Decoding, FixMinForCausalLM, TokenCache, load_tokenizer  # noqa: E402

COUNTS_PADDING = Version(transformers.__version__) < Version("5.23.dev0")
DEMO = Path(__file__).parents[2] / "examples" / "demo"
PROMPT = "Question: What is the capital of France?\nAnswer:"
PROMPTS = [PROMPT, "Once upon a time,", "The"]


@dataclass
class Pair:
    """The same weights twice: in PyTorch, and in the native engine (F32 file, F32 cache)."""

    folder: Path
    reference: transformers.PreTrainedModel
    model: FixMinForCausalLM
    tokenizer: transformers.PreTrainedTokenizerFast  # the GGUF file's

    def batch(self, texts: list[str] = PROMPTS) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory):
    """Converts a demo checkpoint the first time that it is asked for."""
    from fixmin_cpp.convert.convert import convert

    folder, made = tmp_path_factory.mktemp("hf"), {}

    def make(variant: str) -> Pair:
        if variant not in made:
            path = folder / f"{variant}.gguf"
            convert(DEMO / variant, path, "f32", trust_remote_code=True, n_threads=1)
            reference = AutoModelForCausalLM.from_pretrained(
                DEMO / variant, trust_remote_code=True, dtype=torch.float32
            )
            model = FixMinForCausalLM.from_gguf(path, kv_type="f32", n_threads=1)
            made[variant] = Pair(DEMO / variant, reference.eval(), model, load_tokenizer(path))
        return made[variant]

    yield make
    for pair in made.values():
        pair.model.close()


@pytest.fixture(scope="module")
def pair(make_pair) -> Pair:
    return make_pair("fixed")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FixMinForCausalLM]:
    """A random model whose end-of-text token turns up in greedy answers."""
    folder = tmp_path_factory.mktemp("toy")
    with fixmin_cpp.Model(write_model(folder / "any.gguf", byte_level())) as model:
        ids = model.generate([5, 6, 7], max_new_tokens=12, ignore_eos=True).token_ids
    end = max(ids, key=ids.index)  # the one that turns up last
    model = FixMinForCausalLM.from_gguf(write_model(folder / "toy.gguf", byte_level(), eos_id=end))
    yield model
    model.close()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """As the converter certifies float files: the error's norm relative to the logits'."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert (got - expected).norm() / expected.norm() < 1e-5


@torch.no_grad()
def expected_logits(pair: Pair, **arguments: torch.Tensor) -> torch.Tensor:
    return pair.reference(**arguments).logits


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fixed", "affine"])
def test_logits_are_those_of_the_checkpoint(make_pair, variant):
    pair = make_pair(variant)
    ids = torch.tensor([pair.tokenizer.encode(PROMPT), pair.tokenizer.encode(PROMPT)[::-1]])
    expected = expected_logits(pair, input_ids=ids)
    assert_close(pair.model(ids).logits, expected)
    assert_close(pair.model(ids, logits_to_keep=3).logits, expected[:, -3:])
    assert_close(pair.model(ids, logits_to_keep=torch.tensor([0, 5, -1])).logits, expected[:, [0, 5, -1]])
    as_tuple = pair.model(input_ids=ids.int(), return_dict=False, use_cache=False)
    assert len(as_tuple) == 1
    assert_close(as_tuple[0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair, side):
    rows = [pair.tokenizer.encode(text) for text in PROMPTS]
    width = max(map(len, rows)) + 1
    ids, mask = torch.zeros(2, 3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), 1
    logits = pair.model(input_ids=ids, attention_mask=mask).logits
    if side == "left":
        assert_close(logits[mask == 1], expected_logits(pair, input_ids=ids, attention_mask=mask)[mask == 1])
    assert not logits[mask == 0].any()
    for i, row in enumerate(rows):
        alone = pair.model(torch.tensor([row])).logits[0]
        assert torch.equal(logits[i][mask[i] == 1], alone)
    last = pair.model(input_ids=ids, attention_mask=mask.bool(), logits_to_keep=2).logits
    assert torch.equal(last, logits[:, -2:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_continues_from_a_cache(pair, name):
    ids = torch.tensor([pair.tokenizer.encode(PROMPT)[:9]] * 2)
    ids[1, 4:] += 1
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    whole = pair.model(ids, mask).logits
    first = pair.model(ids[:, :4], mask[:, :4])
    cache = first[CACHE]
    assert torch.equal(first.logits, whole[:, :4])
    assert cache.get_seq_length() == 4
    assert torch.equal(pair.model(ids[:, 4:6], mask[:, :6], **{name: cache}).logits, whole[:, 4:6])
    assert torch.equal(pair.model(ids[:, 6:], **{name: cache}).logits, whole[:, 6:]), "the mask is remembered"
    cache.crop(-3)
    assert torch.equal(pair.model(ids[:, 6:], **{name: cache}).logits, whole[:, 6:])
    cache.crop(5)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(pair.model(ids.flip(0)[:, 5:], **{name: cache}).logits, whole.flip(0)[:, 5:])
    assert CACHE not in pair.model(ids, use_cache=False)


def test_loss_is_that_of_the_checkpoint(pair):
    ids = torch.tensor([pair.tokenizer.encode(PROMPT)[:10], pair.tokenizer.encode(PROMPT)[-10:]])
    labels = ids.clone()
    labels[0, 3:5] = -100
    with torch.no_grad():
        expected = pair.reference(ids, labels=labels).loss
        torch.testing.assert_close(pair.model(ids, labels=labels).loss, expected, rtol=1e-5, atol=0)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0  # of this row the tokens 6 to 9 are predicted from something
        nll = -torch.log_softmax(expected_logits(pair, input_ids=ids[:1, 5:]), -1)[0, range(4), ids[0, 6:]]
        other = -torch.log_softmax(expected_logits(pair, input_ids=ids[1:]), -1)[0, range(9), ids[1, 1:]]
        got = pair.model(ids, mask, labels=ids).loss
    torch.testing.assert_close(got, torch.cat((nll, other)).mean(), rtol=1e-5, atol=0)
    loss = pair.model(ids, labels=labels).loss  # as evaluation code does that forgets no_grad()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UnsupportedError, match="no gradients"):
        loss.backward()


@pytest.mark.external  # accelerate
def test_trainer_evaluates_as_the_checkpoint(pair, tmp_path):
    """Trainer passes num_items_in_batch and drops what config says of the outputs, under either name."""
    ids = [pair.tokenizer.encode(PROMPT + " Paris")[:n] for n in (12, 12, 12, 12)]
    rows = [{"input_ids": row, "labels": [-100] * k + row[k:]} for k, row in enumerate(ids)]
    losses = []
    for model in (pair.model, pair.reference):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        losses.append(transformers.Trainer(model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with torch.no_grad():
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        expected = pair.reference(**batch, num_items_in_batch=7).loss
        got = pair.model(**batch, num_items_in_batch=torch.tensor(7)).loss
        assert float(got) == pytest.approx(float(expected), rel=1e-5)
        assert float(got) > 2 * float(pair.model(**batch).loss)


# --- generate() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fixed", "affine"])
@pytest.mark.parametrize("native", [True, False])
def test_greedy_tokens_are_those_of_the_checkpoint(make_pair, variant, native):
    pair = make_pair(variant)
    batch, arguments = pair.batch(), {"max_new_tokens": 24, "do_sample": False}
    assert not batch["attention_mask"].all()
    got = pair.model.generate(**batch, **arguments, native=native)
    assert pair.model.last_decoding.native is native
    assert torch.equal(got, pair.reference.generate(**batch, **arguments))
    for i, text in enumerate(PROMPTS):
        alone = pair.model.generate(torch.tensor([pair.tokenizer.encode(text)]), **arguments, native=native)
        n_prompt = batch["input_ids"].shape[1]
        n_alone = alone.shape[1] - len(pair.tokenizer.encode(text))
        assert torch.equal(got[i, n_prompt : n_prompt + n_alone], alone[0, -n_alone:])


def test_native_is_the_default(pair):
    ids = pair.tokenizer.encode("Once upon a time,")
    got = pair.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    assert pair.model.last_decoding == Decoding(True, "")
    assert got[0].tolist() == ids + pair.model.engine.generate(ids, max_new_tokens=8).token_ids


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 3}, "beam_search"),
        ({"num_beams": 2, "num_return_sequences": 2}, "beam_search"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[30], [31, 32]]}, "NoBadWordsLogitsProcessor of several tokens"),
        ({"sequence_bias": {(30, 31): 5.0}}, "SequenceBiasLogitsProcessor of several tokens"),
        ({"eos_token_id": [2, 30]}, "eos_token_id"),
        ({"max_time": 100.0}, "MaxTimeCriteria"),
        ({"use_cache": False, "no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    ],
)
def test_the_rest_runs_in_transformers_loop(pair, arguments, reason):
    arguments = {**pair.batch(), "do_sample": False, "max_new_tokens": 12, **arguments}
    got = pair.model.generate(**arguments)
    assert not pair.model.last_decoding.native
    assert reason in pair.model.last_decoding.reason
    assert torch.equal(got, pair.reference.generate(**arguments))
    with pytest.raises(UnsupportedError, match=reason):
        pair.model.generate(**arguments, native=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"min_new_tokens": 12},
        {"min_new_tokens": 3, "min_length": 12},
        {"suppress_tokens": "first"},
        {"bad_words_ids": "first"},
        {"sequence_bias": "first"},
        {"repetition_penalty": 1.2, "suppress_tokens": "first", "sequence_bias": "first"},
    ],
    ids=str,
)
def test_processors_that_are_native(pair, arguments):
    """Greedy tokens are those that transformers and the checkpoint give; "first": of the tokens that came else."""
    on = {"do_sample": False, "max_new_tokens": 12}
    for batch in (pair.batch(), pair.batch(["The old"])):
        first = pair.reference.generate(**batch, **on)[0, batch["input_ids"].shape[1] :].tolist()
        forms = {"suppress_tokens": first[:2], "bad_words_ids": [[first[0]], [first[2]]]}
        forms |= {"sequence_bias": {(first[1],): -3.0, (first[0],): 1.0}}
        given = {name: forms[name] if value == "first" else value for name, value in arguments.items()}
        got = pair.model.generate(**batch, **on, **given)
        # Releases before 5.23 count padding as a repetition, which only their own loop does.
        counted = COUNTS_PADDING and "repetition_penalty" in given and not batch["attention_mask"].all()
        assert pair.model.last_decoding == Decoding(not counted, "prompt_ignore_length" if counted else "")
        assert torch.equal(got, pair.reference.generate(**batch, **on, **given))


def test_assisted_by_prompt_lookup(pair):
    ids = torch.tensor([pair.tokenizer.encode(PROMPT + " Paris\n" + PROMPT)])
    got = pair.model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert pair.model.last_decoding.reason == "assisted_generation"
    assert torch.equal(got, pair.reference.generate(ids, max_new_tokens=12, do_sample=False))


def test_scores(pair):
    arguments = {**pair.batch(), "max_new_tokens": 4, "do_sample": False}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    got, expected = (model.generate(**arguments, **asked) for model in (pair.model, pair.reference))
    assert pair.model.last_decoding.reason == "output_logits"
    assert_close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("native", [True, False])
def test_a_dict_goes_on_from_its_cache(pair, native):
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    batch = pair.batch(PROMPTS[1:])  # whose answers do not end before that
    got = pair.model.generate(**batch, max_new_tokens=5, **arguments, native=native)
    assert got[CACHE].get_seq_length() == got.sequences.shape[1] - 1
    more = {"attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1), "max_new_tokens": 6}
    whole = pair.model.generate(**batch, max_new_tokens=11, **arguments).sequences
    assert torch.equal(pair.model.generate(got.sequences, **{CACHE: got[CACHE]}, **more, **arguments).sequences, whole)
    assert "a cache with tokens" in pair.model.last_decoding.reason


@pytest.mark.parametrize("native", [True, False])
def test_ends_at_the_end_of_text(toy, native):
    """Rows end at different lengths; what follows the end of one is padding."""
    end = toy.config.eos_token_id
    ids, mask = torch.tensor([[5, 6, 7], [0, 9, 9], [0, 0, 8]]), torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    got = toy.generate(ids, **arguments, native=native)
    lengths = []
    for row, real, answer in zip(ids, mask, got[:, 3:].tolist(), strict=True):
        completion = toy.engine.generate(row[real == 1], max_new_tokens=12)
        expected = completion.token_ids + [end] * (completion.finish_reason == "eos")
        assert answer[: len(expected)] == expected
        assert set(answer[len(expected) :]) <= {3}
        lengths.append(len(expected))
    assert 1 < lengths[0] < max(lengths)
    assert got.shape[1] == 3 + max(lengths)
    if native:
        with pytest.raises(UnsupportedError, match="no eos_token_id"):
            toy.generate(ids, **arguments, eos_token_id=None, native=True)
    on = toy.generate(ids, **arguments, eos_token_id=None)
    assert on.shape[1] == 15
    assert end in on[0].tolist()


@pytest.mark.parametrize("native", [True, False])
def test_ends_with_the_context(pair, native):
    n_ctx = pair.model.config.max_position_embeddings
    ids = torch.tensor([pair.tokenizer.encode("The"), pair.tokenizer.encode("Once")]).repeat(1, n_ctx - 5)
    ids = ids[:, : n_ctx - 5]
    on = {} if native else {"eos_token_id": None}  # the engine's loop always ends at the end-of-text token
    got = pair.model.generate(ids, max_new_tokens=20, do_sample=False, native=native, **on)
    assert native or got.shape[1] == n_ctx
    assert torch.equal(got, pair.reference.generate(ids, max_new_tokens=5, do_sample=False, **on))
    full = torch.full((1, n_ctx), int(ids[0, 0]))
    with pytest.raises(ValueError, match=str(n_ctx)):
        pair.model.generate(full, max_new_tokens=1, do_sample=False, native=native)


@pytest.mark.parametrize("native", [True, False])
def test_streamers(toy, native):
    ids, arguments = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 12, "do_sample": False, "native": native}
    streamer = Recorder()
    got = toy.generate(ids, streamer=streamer, **arguments)
    assert toy.last_decoding.native is native
    assert streamer.seen == [[5, 6, 7], *([token] for token in got[0, 3:].tolist())]
    assert got[0, -1] == toy.config.eos_token_id
    assert streamer.ended == 1
    streamer = Recorder()
    rows = toy.generate(ids.repeat(2, 1), streamer=streamer, max_new_tokens=8, do_sample=False)
    assert not toy.last_decoding.native
    assert streamer.seen[1:] == rows[:, 3:].T.tolist()


def test_text_streamer_from_another_thread(pair):
    streamer = TextIteratorStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {"max_new_tokens": 10, "do_sample": False, "streamer": streamer, "native": True}
    worker = threading.Thread(
        target=pair.model.generate, args=(torch.tensor([pair.tokenizer.encode(PROMPT)]),), kwargs=arguments
    )
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == pair.model.engine.generate(PROMPT, max_new_tokens=10).text


@pytest.mark.parametrize("stops", [["."], ["ris", "zebra"], ["irl", "mam", "ire"]])
@pytest.mark.parametrize("native", [True, False])
def test_stop_strings(pair, stops, native):
    arguments = {**pair.batch(), "max_new_tokens": 30, "do_sample": False, "stop_strings": stops}
    got = pair.model.generate(**arguments, tokenizer=pair.tokenizer, native=native)
    assert torch.equal(got, pair.reference.generate(**arguments, tokenizer=pair.tokenizer))
    for text in pair.tokenizer.batch_decode(got, skip_special_tokens=True):
        if any(stop in text for stop in stops):
            assert min(len(text.split(stop)[-1]) for stop in stops if stop in text) < 4, "goes on after the stop string"


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.6},
        {"temperature": 1.6, "top_k": 40},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 0, "min_p": 0.05},
        {"temperature": 1.7, "top_k": 0, "min_p": 0.2},
        {"temperature": 0.6, "top_k": 8, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 0, "typical_p": 0.7},
        {"temperature": 1.4, "top_k": 20, "repetition_penalty": 1.5},
        {"temperature": 1.4, "top_k": 5, "suppress_tokens": [40, 41, 42], "sequence_bias": {(43,): 4.0}},
    ],
)
def test_draws_from_the_distribution_of_transformers(pair, options):
    """Shares of 1,000 draws against the probabilities that transformers' own processors leave of the checkpoint's."""
    n, ids = 1000, torch.tensor([pair.tokenizer.encode("The old")])
    torch.manual_seed(1)
    arguments = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": n, **options}
    got = pair.model.generate(ids, **arguments, native=True)[:, -1]
    kept = pair.reference.generate(
        ids, **{**arguments, "num_return_sequences": 1}, return_dict_in_generate=True, output_scores=True
    )
    p = torch.softmax(kept.scores[0][0].double(), -1)
    shares = torch.bincount(got, minlength=len(p)) / n
    assert not shares[p == 0].any()
    assert len(got.unique()) > 2
    # Five standard deviations: of a few hundred shares none is farther off by chance.
    assert (shares - p).abs().le(5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_seed_of_pytorch(pair):
    def draw(seed: int, **options) -> torch.Tensor:
        transformers.set_seed(seed)
        sampled = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 8, "native": True}
        return pair.model.generate(**pair.batch(), **sampled, **options)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    several = draw(5, num_return_sequences=3)
    assert several.shape[0] == 9
    n_prompt = pair.batch()["input_ids"].shape[1]
    assert torch.equal(several[:, :n_prompt], pair.batch()["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in several[:3].tolist()}) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "top_p after a temperature"),
        ({"temperature": 0.7, "typical_p": 0.9}, "typical_p after a temperature"),
        ({"min_p": 0.1, "typical_p": 0.9}, "TypicalLogitsWarper after MinPLogitsWarper"),
        ({"epsilon_cutoff": 0.01}, "EpsilonLogitsWarper"),
    ],
)
def test_sampling_that_is_not_native(pair, options, reason):
    """Both models draw with the same generator from the same distribution, token by token."""
    drawn = []
    for model in (pair.model, pair.reference):
        torch.manual_seed(0)
        drawn.append(model.generate(**pair.batch(), do_sample=True, max_new_tokens=6, **options))
    assert reason in pair.model.last_decoding.reason
    assert torch.equal(*drawn)


def test_processors_of_the_caller(pair):
    def run(*processors, **options) -> str:
        pair.model.generate(
            **pair.batch(["The"]), max_new_tokens=1, logits_processor=LogitsProcessorList(processors), **options
        )
        return pair.model.last_decoding.reason

    sampled = {"do_sample": True, "top_k": 0}
    assert run(TopPLogitsWarper(0.5), temperature=0.5, **sampled) == "", "here top_p stands before the temperature"
    assert run(TopPLogitsWarper(0.5), do_sample=True, top_k=9) == "TopKLogitsWarper after TopPLogitsWarper"
    assert run(TopPLogitsWarper(0.5, min_tokens_to_keep=3), **sampled) == "top_p with min_tokens_to_keep"
    assert run(TopKLogitsWarper(3, filter_value=-5.0), **sampled) == "TopKLogitsWarper with a filter_value"
    assert run(TopKLogitsWarper(3), do_sample=False) == ""
    assert run(RepetitionPenaltyLogitsProcessor(1.5), do_sample=False) == ""
    ignoring = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=1)
    assert run(ignoring, do_sample=False) == "prompt_ignore_length"
    late = MinLengthLogitsProcessor(9, 99)
    assert run(late, do_sample=False) == "MinLengthLogitsProcessor with another end-of-text token"
    assert run(MinPLogitsWarper(0.1, min_tokens_to_keep=2), **sampled) == "min_p with min_tokens_to_keep"


# --- pipelines ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(pair) -> SimpleNamespace:
    """The pipeline on the engine with the file's tokenizer, and on PyTorch with the checkpoint's."""
    return SimpleNamespace(
        native=pipeline("text-generation", model=pair.model, tokenizer=pair.tokenizer),
        torch=pipeline(
            "text-generation",
            model=pair.reference,
            tokenizer=AutoTokenizer.from_pretrained(pair.folder, padding_side="left"),
        ),
    )


@pytest.mark.parametrize(
    ("texts", "arguments"),
    [
        (PROMPT, {"max_new_tokens": 20}),
        (PROMPT, {"max_new_tokens": 20, "return_full_text": False}),
        (PROMPT, {"max_new_tokens": 5, "return_tensors": True}),
        (PROMPT, {"max_length": 30}),
        (PROMPTS, {"max_new_tokens": 20}),
        (PROMPTS, {"max_new_tokens": 20, "batch_size": 2}),
        (PROMPT, {"max_new_tokens": 40, "stop_sequence": "\n"}),
        (PROMPT, {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2}),
    ],
)
def test_pipeline_says_the_same(pair, pipelines, texts, arguments):
    got = pipelines.native(texts, do_sample=False, **arguments)
    # Older pipelines make the stop sequence the end of text, which is not what the file says.
    as_end = "stop_strings" not in inspect.getsource(TextGenerationPipeline._sanitize_parameters)
    foreign = "num_beams" in arguments or ("stop_sequence" in arguments and as_end)
    assert pair.model.last_decoding.native == (not foreign)
    assert got == pipelines.torch(texts, do_sample=False, **arguments)


def test_pipeline_knows_the_class(pair, monkeypatch):
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", pytest.fail)
    pipeline("text-generation", model=pair.model, tokenizer=pair.tokenizer)


def test_pipeline_with_its_defaults(pair, pipelines):
    """Sampling with temperature 0.7 and 256 new tokens: native, and cut by the context of 256."""
    transformers.set_seed(0)
    text = pipelines.native("Once upon a time,")[0]["generated_text"]
    assert pair.model.last_decoding.native
    transformers.set_seed(0)
    assert pipelines.native("Once upon a time,")[0]["generated_text"] == text
    assert text.startswith("Once upon a time,")
    assert len(text) > 20


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_tokenizer_is_that_of_the_checkpoint(pair):
    expected = AutoTokenizer.from_pretrained(pair.folder)
    for text in [*PROMPTS, "naïve 日本 😀\n\n  two", "", "</s>a<s>"]:
        assert pair.tokenizer.encode(text) == expected.encode(text)
        assert pair.tokenizer.decode(expected.encode(text)) == expected.decode(expected.encode(text))
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(pair.tokenizer, name) == getattr(expected, name)
    assert len(pair.tokenizer) == len(expected)
    assert pair.tokenizer.model_max_length == pair.model.config.max_position_embeddings
    assert pair.tokenizer.padding_side == "left"
    assert pair.batch()["input_ids"][2, 0] == expected.pad_token_id


def test_tokenizer_of_a_model_and_without_padding_token(toy):
    tokenizer = load_tokenizer(toy)
    assert tokenizer.encode("the cat") == toy.engine.encode("the cat")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == toy.engine.info["eos_token_id"]
    assert load_tokenizer(toy.engine).get_vocab() == tokenizer.get_vocab()


def test_file_without_a_tokenizer(bare_model_path):
    model = FixMinForCausalLM.from_gguf(bare_model_path, n_ctx=20)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        load_tokenizer(model)
    got = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, native=True)
    assert got[0, 3:].tolist() == model.engine.generate([1, 2, 3], max_new_tokens=5).token_ids
    assert model.config.max_position_embeddings == 20
    model.close()
    with pytest.raises(fixmin_cpp.FixminError, match="closed"):
        model(torch.tensor([[1]]))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": None}, ArgumentError, "input_ids must be a tensor"),
        ({"input_ids": [[1]]}, ArgumentError, "input_ids must be a tensor, got list"),
        ({"input_ids": torch.tensor([1, 2])}, ArgumentError, r"\[rows, tokens\], got \[2\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ArgumentError, r"\[1, 0\]"),
        ({"input_ids": torch.zeros(1, 2)}, ArgumentError, "torch.float32"),
        ({"input_ids": torch.tensor([[1, 2], [3, 4096]])}, ArgumentError, r"input_ids\[1, 1\] is 4096"),
        ({"input_ids": torch.tensor([[-1]])}, ArgumentError, r"input_ids\[0, 0\] is -1"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long, device="meta")}, ArgumentError, "input_ids is on meta"),
        ({"input_ids": torch.ones(1, 257, dtype=torch.long)}, ContextLengthError, "257 tokens"),
        ({"attention_mask": torch.ones(1, 2)}, ArgumentError, r"\[1, 2\], but there are \[1, 3\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, ArgumentError, r"attention_mask\[0, 1\] is 0 between tokens"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, ArgumentError, "row 0 of attention_mask hides every token"),
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}, ArgumentError, "1 for a token and 0 for padding"),
        ({"attention_mask": torch.ones(1, 3, device="meta")}, ArgumentError, "attention_mask is on meta"),
        ({"past_key_values": DynamicCache()}, ArgumentError, "past_key_values must be .* got DynamicCache"),
        ({"cache": DynamicCache()}, ArgumentError, "cache must be .* got DynamicCache"),
        ({"cache": TokenCache(), "past_key_values": TokenCache()}, ArgumentError, "two names of one argument"),
        ({"cahce": TokenCache()}, UnsupportedError, "does not take cahce"),
        ({"cache_position": torch.tensor([1, 2, 3])}, ArgumentError, "cache_position must be 0 to 2"),
        ({"labels": torch.tensor([[1, 2]])}, ArgumentError, r"labels has the shape \[1, 2\]"),
        ({"labels": torch.tensor([[1, 2, 3]]), "logits_to_keep": 1}, ArgumentError, "leave out logits_to_keep"),
        ({"logits_to_keep": -1}, ArgumentError, "logits_to_keep must be at least 0"),
        ({"logits_to_keep": torch.tensor([3])}, ArgumentError, "positions outside of the 3"),
        ({"inputs_embeds": torch.ones(1, 1, 1)}, UnsupportedError, "no embedding table"),
        ({"position_ids": torch.tensor([[0, 1, 2]])}, UnsupportedError, "positions are counted"),
        ({"output_hidden_states": True}, UnsupportedError, "output_hidden_states"),
        ({"inptu_ids": 1}, UnsupportedError, "inptu_ids"),
    ],
)
def test_refused_by_forward(pair, arguments, error, message):
    with pytest.raises(error, match=message):
        pair.model(**{"input_ids": torch.tensor([[1, 2, 3]]), **arguments})


def test_refused_by_a_cache(pair):
    cache = pair.model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]]))[CACHE]
    with pytest.raises(ArgumentError, match=r"attention_mask\[0, 2\] is 0 between tokens"):
        pair.model(torch.tensor([[4]]), past_key_values=cache)
    with pytest.raises(ArgumentError, match="2 rows, but the cache 1"):
        pair.model(torch.tensor([[4], [5]]), past_key_values=cache)
    with pytest.raises(ArgumentError, match="those of the cache included"):
        pair.model(torch.tensor([[4]]), torch.tensor([[1]]), past_key_values=cache)
    assert TokenCache().get_seq_length() == 0


def test_refused_by_generate(pair):
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    for native in (None, False):
        with pytest.raises(ArgumentError, match="row 1 of input_ids is padded on the right"):
            pair.model.generate(ids, attention_mask=mask, max_new_tokens=1, native=native)
    with pytest.raises(UnsupportedError, match="cache_implementation='static'"):
        pair.model.generate(ids, cache_implementation="static", max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokes"):
        pair.model.generate(ids, max_new_tokes=1)


def test_refused_by_the_model(pair, tmp_path):
    model = pair.model
    assert model.eval() is model
    assert not model.training
    assert model.to("cpu").to(torch.float32).float() is model
    assert model.device == torch.device("cpu")
    for refused in (model.train, model.half, lambda: model.to("meta"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(UnsupportedError):
            refused()
    with pytest.raises(UnsupportedError, match="copy"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="from_gguf"):
        FixMinForCausalLM.from_pretrained(pair.folder)
    with pytest.raises(ArgumentError, match=r"fixmin_cpp\.Model, got str"):
        FixMinForCausalLM("model.gguf")
    assert list(tmp_path.iterdir()) == []
