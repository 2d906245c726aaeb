"""A kernel is lowered once for a set of shapes, whichever programs call it, and not at all where it has been kept."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from mosaic_checks import needs_mosaic

from pallas_kernels import lowered
from pallas_kernels.dispatch import MOSAIC
from pallas_kernels.paged_kv_write import paged_kv_write
from pallas_kernels.paged_kv_write.cases import BENCH_CASES

pytestmark = needs_mosaic


@pytest.fixture
def exports(monkeypatch) -> list:
    """One entry for each op that is lowered from here on."""
    count, export = [], lowered.export.export
    monkeypatch.setattr(lowered, "_exported", {})
    monkeypatch.setattr(lowered.export, "export", lambda f, **how: count.append(f) or export(f, **how))
    return count


@pytest.fixture
def kept_in(tmp_path):
    """Where a new process finds what others have lowered."""
    pytest.importorskip("flatbuffers")
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path), True), strict=True):
        jax.config.update(name, value)
    yield tmp_path / "kernels"
    for name, value in before.items():
        jax.config.update(name, value)


@cache
def arguments(case):
    return jax.eval_shape(partial(case.make, jnp.bfloat16))


def program(scale: float = 1.0, case=BENCH_CASES[0]) -> str:
    """One that writes keys and values, lowered for CUDA, each time anew."""

    def write_scaled(k_PKGC, v_PKGC, k_TKC, *others):
        return paged_kv_write(k_PKGC, v_PKGC, k_TKC * scale, *others, implementation=MOSAIC)

    write = jax.jit(write_scaled, donate_argnums=(0, 1))
    return write.trace(*arguments(case)).lower(lowering_platforms=("cuda",)).as_text()


def test_programs_share_an_op_of_the_same_shapes(exports):
    texts = [program(scale) for scale in (1.0, 2.0)]
    assert len(exports) == 1
    assert all(text.count("@mosaic_gpu") == 1 and text.count("output_operand_alias<") == 2 for text in texts)
    program(case=BENCH_CASES[1])
    assert len(exports) == 2


def test_another_precision_is_another_op(exports):
    program()
    with jax.default_matmul_precision("highest"):
        program()
    assert len(exports) == 2


def test_a_new_process_lowers_no_kernel(exports, kept_in):
    text = program()
    lowered._exported.clear()
    assert program() == text
    assert len(exports) == 1
    assert kept_in.stat().st_mode & 0o77 == 0  # it is run, so nobody else may write there


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_made_again(exports, kept_in, damage):
    program()
    (file,) = kept_in.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    lowered._exported.clear()
    text = program()
    assert len(exports) == 2
    lowered._exported.clear()
    assert program() == text
    assert len(exports) == 2


def test_the_least_recently_used_make_room(exports, kept_in, monkeypatch):
    program()
    (first,) = kept_in.iterdir()
    monkeypatch.setattr(lowered, "KEPT_BYTES", first.stat().st_size * 3 // 2)
    program(case=BENCH_CASES[1])
    (second,) = kept_in.iterdir()
    assert second != first


def test_a_directory_that_cannot_be_written_keeps_nothing(exports, kept_in):
    kept_in.write_text("a file")
    assert program()
    assert kept_in.read_text() == "a file"


def test_without_flatbuffers_nothing_is_kept(exports, kept_in, monkeypatch):
    monkeypatch.setattr(lowered, "find_spec", lambda name: None)
    assert program()
    assert not kept_in.exists()
