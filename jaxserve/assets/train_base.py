"""Trains the model of the demo from nothing, on two CPU cores in less than an hour.

    python -m jaxserve.assets.train_base --text children_stories.txt:5 --text novels.txt:3 --text shakespeare.txt:1 \\
        --out storyteller --minutes 45

Writes a Hugging Face model directory. The learning rate follows a cosine over the steps or over the minutes,
whichever ends first, and the state is saved on the way, so that the same command goes on where it was stopped.

Shapes: B rows of a batch, T tokens of a row, D hidden.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxserve.assets import corpus
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import dummy_params
from jaxserve.models.params import ParamSpec, param_specs
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from sharding import make_mesh

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, EOS, PAD, END = 0, 1, 2, 6
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": [EOS, END],
    "pad_token_id": PAD,
    "dtype": "float32",  # to compute in; the file holds bfloat16
}

SEED = 0
NUM_CHATS = 16000
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 0.004, 0.02
WARMUP, FLOOR = 0.02, 0.02  # parts of the run, of the rate
LONG_FROM = 0.92
SAVE_EVERY, LOG_EVERY = 100, 10


def train_tokenizer(texts: list[str], out: Path) -> Tokenizer:
    """Byte-level BPE trained on these texts, with control tokens and a chat template, written to ``out``."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    backend.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    _write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return load_tokenizer(out)


class Source:
    """A text as token ids, from which rows are cut that begin where a paragraph begins."""

    def __init__(self, pieces: list[list[int]], num_bytes: int):
        self.ids = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        self.starts = np.cumsum([0, *map(len, pieces)])[:-1]
        self.bytes_per_token = num_bytes / len(self.ids)

    def row(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """``length`` ids from a random start; the text goes on at its beginning after its end."""
        start = self.starts[rng.integers(len(self.starts))]
        return self.ids.take(np.arange(start, start + length), mode="wrap")

    def rows(self, length: int) -> np.ndarray:
        """The whole text in rows; what is left over at its end is dropped."""
        count = max(len(self.ids) // length, 1)
        return np.resize(self.ids, (count, length))


def book_source(items: list[str], tokenizer: Tokenizer) -> Source:
    """Paragraphs, a line each; bos now and then, so that the model knows how texts begin."""
    encoded = [tokenizer.encode(f"{item}\n", add_special_tokens=False) for item in items]
    pieces = [([BOS] if index % 20 == 0 else []) + ids for index, ids in enumerate(encoded)]
    return Source(pieces, sum(len(item.encode()) + 1 for item in items))


def chat_source(chats: list[corpus.Chat], tokenizer: Tokenizer) -> Source:
    """Whole chats, one after the other."""
    pieces = [tokenizer.apply_chat_template(chat, add_generation_prompt=False) for chat in chats]
    return Source(pieces, sum(len(message["content"].encode()) for chat in chats for message in chat))


def loss(params: Any, ids_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Mean negative log likelihood, in nats per token, of each row's tokens but the first."""

    def row_loss(ids_T: jax.Array) -> jax.Array:
        logits_TV = sequence_logits(params, ids_T[:-1], config)[:, : config.vocab_size]
        return optax.softmax_cross_entropy_with_integer_labels(logits_TV, ids_T[1:]).mean()

    return jax.vmap(row_loss)(ids_BT).mean()


def sequence_logits(params: Any, ids_T: jax.Array, config: ModelConfig) -> jax.Array:
    """[T, V] logits of one sequence, the whole model on one device."""
    x_TD, _ = decoder.forward(
        params,
        ids_T,
        jnp.arange(ids_T.shape[0]),
        config=config,
        lookup=decoder.plain_lookup,
        linear=decoder.plain_linear,
        attend=decoder.plain_attend(config),
        kv=[None] * config.num_layers,
    )
    return decoder.logits(params, x_TD, config)


def _projections(params: Any) -> Any:
    """Muon's (in, out) axes for the projections [out, in]; the embedding and the norms are AdamW's."""
    axes = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return jax.tree.map(lambda p: axes if p.ndim == 2 else None, params) | {"embed": None}


OPTIMIZER = muon(  # at rate 1: ``step`` scales its updates
    1.0,
    weight_decay=WEIGHT_DECAY,
    adam_learning_rate=ADAM_RATE / MUON_RATE,
    adam_b2=0.98,
    muon_weight_dimension_numbers=_projections,
)


@partial(jax.jit, static_argnames="config", donate_argnames=("params", "state"))
def step(params: Any, state: Any, ids_BT: jax.Array, rate: jax.Array, *, config: ModelConfig):
    """One step of training: new parameters, new optimizer state, the batch's loss."""
    value, grads = jax.value_and_grad(loss)(params, ids_BT, config)
    updates, state = OPTIMIZER.update(grads, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, value


def rate_at(progress: float) -> float:
    """The learning rate after this part of the run: a short rise, then a cosine."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return MUON_RATE * min(1.0, progress / WARMUP + 0.02) * cosine


def batch(sources: list[tuple[Source, float]], shape: tuple[int, int], index: int, progress: float) -> np.ndarray:
    """The index-th [B, T + 1] batch; its rows come from the sources in proportion to their weights.

    Towards the end rows are twice as long and half as many: attention is dear on a CPU, and positions generalise.
    """
    if progress > LONG_FROM:
        shape = (shape[0] // 2, shape[1] * 2)
    rng = np.random.default_rng((SEED, index))
    weights = np.array([weight for _, weight in sources])
    chosen = rng.choice(len(sources), shape[0], p=weights / weights.sum())
    return np.stack([sources[i][0].row(shape[1] + 1, rng) for i in chosen])


def write_weights(path: Path, params: Any, config: ModelConfig) -> None:
    """model.safetensors in bfloat16, under the checkpoint's names."""
    specs = jax.tree.leaves(param_specs(config, 1), is_leaf=lambda node: isinstance(node, ParamSpec))
    tensors = {}
    for spec, array in zip(specs, jax.tree.leaves(params), strict=True):
        ends = np.cumsum([part.rows for part in spec.parts])
        for part, rows in zip(spec.parts, np.split(np.asarray(array), ends), strict=False):
            tensors[part.name] = np.ascontiguousarray(rows.astype(ml_dtypes.bfloat16))
    save_file(tensors, path, metadata={"format": "pt"})


class Checkpoint:
    """Where a run stands: arrays, steps and seconds, in one file that is replaced as a whole."""

    def __init__(self, path: Path):
        self.path = path

    def save(self, tree: Any, steps: int, seconds: float) -> None:
        arrays = {str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
        partial_path = self.path.with_suffix(".partial")
        save_file(arrays, partial_path, metadata={"steps": str(steps), "seconds": str(seconds)})
        partial_path.replace(self.path)

    def load(self, tree: Any) -> tuple[Any, int, float]:
        """(tree, steps, seconds): what was saved, or the given tree and zeros."""
        if not self.path.exists():
            return tree, 0, 0.0
        with safe_open(self.path, "numpy") as file:
            leaves = [
                jax.device_put(file.get_tensor(str(index)), leaf.sharding)
                for index, leaf in enumerate(jax.tree.leaves(tree))
            ]
            meta = file.metadata()
        return jax.tree.unflatten(jax.tree.structure(tree), leaves), int(meta["steps"]), float(meta["seconds"])


def train(
    config: ModelConfig, data: Callable[[int, float], np.ndarray], checkpoint: Checkpoint, steps: int, minutes: float
) -> Any:
    """Runs to the end of the steps or the minutes and returns the parameters."""
    params = initial_params(config)
    fresh = jax.device_put((params, OPTIMIZER.init(params)), jax.devices()[0])
    (params, state), done, before = checkpoint.load(fresh)
    start, losses = time.monotonic() - before, []
    while (progress := max(done / steps, (time.monotonic() - start) / (minutes * 60))) < 1:
        rate = jnp.asarray(rate_at(progress), jnp.float32)
        params, state, value = step(params, state, jnp.asarray(data(done, progress)), rate, config=config)
        losses.append(float(value))
        done += 1
        if done % LOG_EVERY == 0:
            seconds = time.monotonic() - start
            print(f"step {done} {seconds:.0f} s loss {np.mean(losses[-LOG_EVERY:]):.4f} rate {rate:.5f}", flush=True)
        if done % SAVE_EVERY == 0:
            checkpoint.save((params, state), done, time.monotonic() - start)
    checkpoint.save((params, state), done, time.monotonic() - start)
    return params


def initial_params(config: ModelConfig) -> Any:
    """Random weights; every layer begins as the identity."""
    params = dummy_params(config, make_mesh(1, jax.devices()[:1]), jnp.float32, SEED)
    for layer in params["layers"]:
        layer |= {site: jnp.zeros_like(layer[site]) for site in decoder.ROW}
    return params


def evaluate(params: Any, source: Source, config: ModelConfig, shape: tuple[int, int], limit: int = 10) -> float:
    """Nats per byte over at most ``limit`` batches of a held-out text."""
    mean_loss = jax.jit(loss, static_argnames="config")
    rows = np.resize(source.rows(shape[1] + 1), (limit * shape[0], shape[1] + 1))
    values = [float(mean_loss(params, jnp.asarray(rows[i::limit]), config)) for i in range(limit)]
    return float(np.mean(values)) / source.bytes_per_token


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, metavar="PATH:WEIGHT", help="a book; may repeat")
    parser.add_argument("--chat-weight", type=float, default=13.0, help="of the chats made of all books but the plays")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--state", type=Path, default=Path("train_state.safetensors"), help="where the run stands")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Tokenizer, data, training, weights and a report."""
    args.out.mkdir(parents=True, exist_ok=True)
    config, shape = ModelConfig.from_dict(CONFIG), (args.batch, args.context)
    _write_json(args.out / "config.json", CONFIG)
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": PAD, "do_sample": False}
    _write_json(args.out / "generation_config.json", generation)
    books = [(path, float(weight), *corpus.split(corpus.read(path))) for path, weight in _weighted(args.text)]
    rng = np.random.default_rng(SEED)
    prose = [(train, valid) for path, _, train, valid in books if not corpus.is_play(path)]
    chats = [
        list(islice(corpus.chats([item for book in prose for item in book[side]], rng), count))
        for side, count in ((0, NUM_CHATS), (1, NUM_CHATS // 20))
    ]
    if args.state.exists():  # goes on with the ids it began with
        tokenizer = load_tokenizer(args.out)
    else:
        written = [message["content"] for chat in chats[0][:2000] for message in chat]
        tokenizer = train_tokenizer([item for _, _, train, _ in books for item in train] + written, args.out)
    sources = [(book_source(train, tokenizer), weight) for _, weight, train, _ in books]
    sources.append((chat_source(chats[0], tokenizer), args.chat_weight))
    held = {Path(path).name: book_source(valid, tokenizer) for path, _, _, valid in books}
    held["chats"] = chat_source(chats[1], tokenizer)
    for (source, weight), name in zip(sources, held, strict=True):
        print(f"{name}: {len(source.ids)} tokens, {source.bytes_per_token:.2f} bytes a token, weight {weight}")
    params = train(config, partial(batch, sources, shape), Checkpoint(args.state), args.steps, args.minutes)
    write_weights(args.out / "model.safetensors", params, config)
    for (source, _), (name, valid) in zip(sources, held.items(), strict=True):
        seen, unseen = (evaluate(params, text, config, shape) for text in (source, valid))
        print(f"{name}: nats per byte, train {seen:.4f}, validation {unseen:.4f} ({unseen / math.log(2):.4f} bits)")


def _weighted(texts: list[str]) -> list[tuple[str, str]]:
    """``path:weight`` arguments in two; without a weight, 1."""
    return [(path, weight or "1") if sep else (weight, "1") for path, sep, weight in (t.rpartition(":") for t in texts)]


if __name__ == "__main__":
    main()
