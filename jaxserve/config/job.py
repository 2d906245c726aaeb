"""The options of a finetuning job."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from jaxserve.config.section import Name, Names, Place, Section

LEAST, MOST, BELOW_1 = 2.0**-126, (2 - 2.0**-23) * 2.0**127, 1 - 2.0**-24  # of float32, which updates are made in
Share = Annotated[float, Field(ge=0, le=BELOW_1)]


class JobOptions(Section):
    """The settings of a finetuning job; ``finetune.config`` says which of them agree with each other."""

    method: Literal["lora", "rslora", "dora", "ia3"] = "lora"
    """PEFT method."""
    rank: Annotated[int, Field(ge=1, le=256)] = 16
    """Rank of every module's update; ia3 has none."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """The update is scaled by alpha / rank, in rslora by alpha / sqrt(rank)."""
    target_modules: Name | Annotated[Names, Field(strict=False, min_length=1, max_length=4096)] | None = None
    """Module names, a pattern or all-linear; by default all-linear, and k_proj, v_proj, down_proj for ia3."""
    feedforward_modules: Name | Annotated[Names, Field(strict=False, max_length=4096)] | None = None
    """Of ia3: modules whose input is scaled, not their output; by default down_proj where it is a target."""
    dropout: Share = 0.0
    """Share of an update's inputs dropped while training."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    """Update rule."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak of the schedule."""
    beta1: Share = 0.9
    """Of adamw, adam and lion."""
    beta2: Share | None = None
    """Of adamw and adam, by default 0.999, and of lion, by default 0.99."""
    eps: Annotated[float, Field(ge=LEAST, le=1)] | None = None
    """Added to a denominator: by default 1e-8, and 1e-30 for adafactor."""
    momentum: Share = 0.9
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the adapter taken off per step, times the learning rate; decoupled from the gradient."""
    max_grad_norm: Annotated[float, Field(ge=LEAST, le=MOST)] | None = 1.0
    """Largest norm of the adapter's whole gradient; none does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: kept, or brought down to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate rises from zero."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of all steps."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Examples per optimizer step."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the data, by default one."""
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps, in place of epochs."""
    window: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Tokens that one backward pass covers; by default the engine's most."""
    remat: Literal["none", "elementwise", "attention", "full"] | None = None
    """What a backward pass computes again rather than keep: what the engine's steps do, which all jobs share."""
    deterministic: bool = False
    """Cut windows by the example alone, so that load or a restart changes no bit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's start, the order of the data, the validation split and dropout."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learnt: the assistant's (the completion), or all."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of an example; by default what the engine takes."""
    on_long: Literal["refuse", "truncate"] = "refuse"
    """What is done with a longer example; what is cut is counted and reported."""
    shuffle: bool = True
    """Another order of the data in every epoch."""
    packing: bool = True
    """Put several short examples into one window."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the data kept from training, to measure the loss on."""
    validation_data: Place | None = None
    """A file for that in its place."""
    eval_steps: PositiveInt | None = None
    """Measure every so many steps; by default after each epoch."""

    output_dir: Place | None = None
    """Where checkpoints go; none keeps none."""
    save_steps: PositiveInt = 100
    """A checkpoint every so many steps, and one at the end."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints that are kept."""
    start: Place = "init"
    """init for a new adapter, or the name or directory of one to go on from, or a directory of checkpoints."""
