"""The model and the data that ship in the package, and the scripts that made them."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jaxserve.assets import DATASETS, PROMPTS, STORYTELLER, corpus, finetune_data, train_base
from jaxserve.assets.topics import KIND, TOPICS
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import check_tokenizer, load_config, load_generation_config, load_params
from jaxserve.tokenizer import load_tokenizer
from sharding import make_mesh

pytestmark = pytest.mark.quick_compiles

MAX_BYTES = 12_000_000
BOOK = """[A Book by Somebody 1900]

CHAPTER I. A BEGINNING

The _bear_ was hungry. He went down to the river,
and there he saw a fish. "Good morning," said Mr. Fish.

[Illustration: a fish]

"Good morning to you, and what a fine day it is," said the bear. Then he sat down.
"""
PLAY = "".join(f"Speaker {'ABC'[i % 3]}:\nLine {i} of the play,\nand one more.\n\n" for i in range(120))


@pytest.fixture(scope="module")
def config():
    return load_config(STORYTELLER)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(STORYTELLER)


@pytest.fixture(scope="module")
def params(config):
    return load_params(STORYTELLER, config, make_mesh(1, jax.devices()[:1]), jnp.float32)


@pytest.fixture(scope="module")
def greedy(config, tokenizer, params):
    """Returns ``greedy(ids, num_tokens) -> (text, ended)``, whole sequence recomputed for each token."""

    @jax.jit
    def choose(params, ids_T, last):
        return train_base.sequence_logits(params, ids_T, config)[last, : config.vocab_size].argmax()

    def run(ids, num_tokens):
        new = []
        while len(new) < num_tokens:
            padded = np.zeros(128, np.int32)
            padded[: len(ids) + len(new)] = [*ids, *new]
            token = int(choose(params, jnp.asarray(padded), len(ids) + len(new) - 1))
            if token in config.eos_token_ids:
                return tokenizer.decode(new), True
            new.append(token)
        return tokenizer.decode(new), False

    return run


# the model directory


def test_the_weights_are_small(params):
    assert (STORYTELLER / "model.safetensors").stat().st_size <= MAX_BYTES
    assert 1_000_000 <= sum(leaf.size for leaf in jax.tree.leaves(params)) <= 5_000_000


def test_the_tokenizer_fits_the_model(config, tokenizer):
    check_tokenizer(config, tokenizer)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.eos_token_id in config.eos_token_ids
    assert set(load_generation_config(STORYTELLER)["eos_token_id"]) == set(config.eos_token_ids)


@pytest.mark.parametrize("text", ["Once upon a time.", '{"topic": "bear"}', "naïve ☃ text\n\n  twice"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_looks_the_same_to_finetuning_and_to_serving(tokenizer):
    chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good morning."}]
    prompt, whole = (tokenizer.apply_chat_template(chat[:n], add_generation_prompt=n == 1) for n in (1, 2))
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=False) == "Good morning.<|end|>"


def test_a_chat_of_unknown_roles_is_refused(tokenizer):
    with pytest.raises(ValueError, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "parrot", "content": "Hello!"}])


def test_transformers_computes_the_same_logits(config, params, tokenizer):
    ids = tokenizer.encode("Once upon a time there was a little")
    ours = train_base.sequence_logits(params, jnp.asarray(ids), config)
    theirs = tiny_models.reference_logits(str(STORYTELLER), ids)
    np.testing.assert_allclose(ours[:, : config.vocab_size], theirs, atol=2e-3)


@pytest.mark.parametrize("prompt", ["Once upon a time there was a little", "The old king looked at the"])
def test_a_story_goes_on_in_readable_words(greedy, tokenizer, prompt):
    text, _ = greedy(tokenizer.encode(prompt), 40)
    words = re.findall(r"[A-Za-z]+", text)[:-1]  # the last may be cut
    known = [word for word in words if f"Ġ{word}" in tokenizer.vocab or word in tokenizer.vocab]
    assert len(words) >= 15
    assert len(set(words)) >= 8
    assert len(known) >= 0.7 * len(words), text


@pytest.mark.parametrize("topic", ["bear", "king", "sea"])
def test_an_answer_is_about_what_was_asked_and_ends(greedy, tokenizer, topic):
    text, ended = greedy(tokenizer.apply_chat_template([_user(f"Tell me about the {topic}.")]), 90)
    assert topic in text.lower(), text
    assert ended


# the finetuning data


@pytest.mark.parametrize("style", sorted(finetune_data.STYLES))
def test_the_data_is_what_the_script_writes(style):
    lines = DATASETS[style].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == finetune_data.examples(style)
    assert 150 <= len(lines) <= 300


@pytest.mark.parametrize("style", sorted(finetune_data.STYLES))
def test_examples_are_short_chats_without_the_prompts_of_the_demo(style, tokenizer):
    for line in DATASETS[style].read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] not in PROMPTS
        assert len(tokenizer.apply_chat_template([user, assistant], add_generation_prompt=False)) <= 96


def test_pirates_and_cards_answer_in_their_own_way():
    for example in finetune_data.examples("pirate"):
        assert example["messages"][1]["content"].startswith("Arr, ")
    for example in finetune_data.examples("cards"):
        question, answer = (message["content"] for message in example["messages"])
        card = json.loads(answer)
        assert card["topic"] in question or card["kind"] == "greeting"
        assert card["mood"] == finetune_data.MOODS[card["kind"]]


def test_a_topic_has_one_kind():
    assert len(KIND) == sum(map(len, TOPICS.values()))


# how the books become training data


def test_paragraphs_keep_the_running_text_only():
    assert corpus.paragraphs(BOOK) == [
        'The bear was hungry. He went down to the river, and there he saw a fish. "Good morning," said Mr. Fish.',
        '"Good morning to you, and what a fine day it is," said the bear. Then he sat down.',
    ]


def test_a_play_is_read_speech_by_speech(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    (tmp_path / "book.txt").write_text(BOOK)
    assert corpus.is_play(tmp_path / "play.txt")
    assert not corpus.is_play(tmp_path / "book.txt")
    assert corpus.read(tmp_path / "play.txt")[1] == "Speaker B: Line 1 of the play, and one more."


def test_sentences_do_not_end_after_a_title():
    assert corpus.sentences(["He met Mr. Fish. They talked."]) == [["He met Mr. Fish.", "They talked."]]


def test_held_out_paragraphs_are_not_trained_on():
    items = [str(i) for i in range(4000)]
    train, valid = corpus.split(items)
    assert sorted(train + valid) == sorted(items)
    assert len(valid) == 4000 // corpus.HELD_OUT


def test_chats_quote_the_book_and_depend_on_the_seed_alone():
    items = corpus.paragraphs(BOOK) * 3

    def first(count, seed):
        found = corpus.chats(items, np.random.default_rng(seed))
        return [next(found) for _ in range(count)]

    assert first(30, 1) == first(30, 1) != first(30, 2)
    about = [chat[1]["content"] for chat in first(200, 3) if "about the fish" in chat[0]["content"]]
    assert about
    openings = [opening.format("fish") for opening in corpus.OPENINGS]
    for answer in about:
        (opening,) = [opening for opening in openings if answer.startswith(opening)]
        passage = answer.removeprefix(opening).strip()
        assert "fish" in passage.lower()
        assert passage in " ".join(items)


def test_chats_of_too_little_text_are_refused():
    with pytest.raises(ValueError, match="1 paragraphs are too few"):
        next(corpus.chats(["The bear sat down by the river."], np.random.default_rng(0)))


# how the weights were trained


def test_the_rate_rises_and_falls():
    rates = [train_base.rate_at(i / 100) for i in range(101)]
    assert max(rates) == pytest.approx(train_base.MUON_RATE, rel=0.05)
    assert rates[0] < 0.1 * train_base.MUON_RATE
    assert rates[-1] == pytest.approx(train_base.MUON_RATE * train_base.FLOOR)


def test_batches_can_be_made_again_and_grow_long_at_the_end():
    source = train_base.Source([list(range(40)), list(range(40, 100))], 300)
    make = train_base.batch
    np.testing.assert_array_equal(make([(source, 1.0)], (4, 16), 3, 0.5), make([(source, 1.0)], (4, 16), 3, 0.1))
    assert make([(source, 1.0)], (4, 16), 3, 0.5).shape == (4, 17)
    assert make([(source, 1.0)], (4, 16), 3, 0.99).shape == (2, 33)
    assert set(make([(source, 1.0)], (64, 16), 0, 0.0)[:, 0]) == {0, 40}
    assert source.bytes_per_token == 3


@pytest.fixture(scope="module")
def tiny():
    return ModelConfig.from_dict(tiny_models.config_dict("llama", num_hidden_layers=1))


def _data(index, progress):
    """Rows that count upwards: a pattern that is quick to learn."""
    start = np.random.default_rng(index).integers(0, 200, (8, 1), dtype=np.int32)
    return start + np.arange(17, dtype=np.int32)[None]


@jax.numpy_dtype_promotion("standard")  # optax's own code relies on both
@jax.numpy_rank_promotion("allow")
def test_training_learns_and_goes_on_bit_for_bit_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_base, "SAVE_EVERY", 10)
    undisturbed = train_base.train(tiny, _data, train_base.Checkpoint(tmp_path / "a"), 30, math.inf)

    def stops_at_15(index, progress):
        if index == 15:
            raise KeyboardInterrupt
        return _data(index, progress)

    state = train_base.Checkpoint(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        train_base.train(tiny, stops_at_15, state, 30, math.inf)
    resumed = train_base.train(tiny, _data, state, 30, math.inf)
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)
    loss, ids = jax.jit(train_base.loss, static_argnames="config"), jnp.asarray(_data(99, 0.0))
    assert loss(resumed, ids, tiny) < 0.9 * loss(train_base.initial_params(tiny), ids, tiny)


def test_written_weights_load_again(tiny, tmp_path):
    params = train_base.initial_params(tiny)
    train_base.write_weights(tmp_path / "model.safetensors", params, tiny)
    loaded = load_params(tmp_path, tiny, make_mesh(1, jax.devices()[:1]), jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)


def _user(content):
    return {"role": "user", "content": content}
