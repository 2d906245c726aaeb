"""The sizes of an engine, and what each of its programs is specific to. The engine compiles these programs, and a plan
compiles the same ones for a device that need not be there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape
from jaxserve.engine.activations import window_remat
from jaxserve.engine.batch import BatchLayout
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.gradient import TrainShape
from jaxserve.engine.step import StepSpec
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.request import Objective
from pallas_kernels.lora_matmul import PAGE_RANK, SINGLE_ROWS

TRAIN_SLOTS = 8  # finetune sequences under way at once


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Sizes of an engine core, all resolved: nothing is a default any more."""

    dtype: str
    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    row_block: int
    max_logprobs: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_queue: int = 1024
    max_loras: int = 0
    max_lora_rank: int = 0
    attention: str | None = None
    lora: str | None = None
    max_grad_rows: int = 256
    remat: str = "attention"
    stash_tokens: int = 0  # of finetune sequences between forward and backward; 0: windows run forward twice
    objectives: Mapping[str, Objective] = field(default_factory=lambda: {"": Objective()})  # by class of requests
    finetune_floor: float = 0.0
    sharing: str = "coserve"

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def window_remat(self) -> str | None:
        """What the backward of a window computes again; None: there is a stash."""
        return window_remat(self.stash_tokens, self.remat)

    @property
    def max_example_len(self) -> int:
        """Tokens of the longest example."""
        return min(self.max_model_len, self.stash_tokens) if self.stash_tokens else self.max_model_len

    @property
    def adapter_pages(self) -> int:
        """Bank pages of an adapter of the greatest rank."""
        return -(-self.max_lora_rank // PAGE_RANK)

    @property
    def bank_pages(self) -> int:
        """Bank pages in all; page 0 is the bare base model."""
        return 1 + self.max_loras * self.adapter_pages if self.max_loras else 0

    def bank(self, model: ModelConfig, tensor_parallel: int) -> BankShape | None:
        """The adapters' place on the device; None: the base model alone is served."""
        return BankShape(model, self.bank_pages, tensor_parallel, self.dtype) if self.max_loras else None


def train_shape(config: CoreConfig, lanes: int) -> TrainShape:
    """Room for so many jobs at once, and for two sequences of full length between their first and last window."""
    return TrainShape(
        TRAIN_SLOTS,
        2 * config.pages_per_seq,
        lanes * config.adapter_pages,
        config.remat,
        lanes,
        stash_blocks=config.stash_tokens // config.row_block,
        row_block=config.row_block,
    )


def step_spec(
    bucket: Bucket,
    config: CoreConfig,
    model: ModelConfig,
    mesh: Mesh,
    bank: BankShape | None,
    train: TrainShape | None,
    *,
    scaled: bool = False,
    dropout: bool = False,
) -> StepSpec:
    """What the program of one bucket is specific to.

    Args:
      train: of an engine that finetunes.
      scaled: rows may have scales, those of (IA)3 and DoRA.
      dropout: gradient rows may ask for it.
    """
    # decode rows stand side by side by adapter: a run of them ends with its block or its adapter
    runs = min(-(-bucket.decode_rows // SINGLE_ROWS) + config.bank_pages - 1, bucket.decode_rows)
    lora_items = (bucket.forward_block_rows // config.row_block + runs) * config.adapter_pages if bank else 0
    layout = BatchLayout(
        bucket,
        config.max_num_seqs,
        config.pages_per_seq,
        lora_items,
        train_slots=TRAIN_SLOTS,
        grad_items=bucket.grad_rows // config.row_block * config.adapter_pages,
        row_block=config.row_block,
        scaled=scaled,
        dropout=dropout and bucket.finetunes,
    )
    return StepSpec(
        train=train if bucket.finetunes else None,
        config=model,
        mesh=mesh,
        layout=layout,
        row_block=config.row_block,
        page_size=config.page_size,
        bank=bank,
        attention=config.attention,
        lora=config.lora,
        scaled=scaled,
    )
