"""Loading: any dtype to any dtype, shards or one file, and one clear line for everything else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from milora_jax import load_base, logits
from milora_jax.base.fingerprint import WHOLE_BELOW, base_fingerprint
from milora_jax.base.hf_config import read_model_config, write_model_config
from milora_jax.base.modules import decode_layout
from milora_jax.errors import UserError
from milora_jax.model_config import Llama3Scaling
from tests.base.pieces import GROUPED, PLAIN
from tests.base.shards import INDEX, WEIGHTS, shard
from tests.models import random_base, write_hf_directory


@pytest.fixture
def folder(tmp_path):
    write_hf_directory(tmp_path / "model", PLAIN, tokenizer=False)
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None)
        if value is not ...:
            values[name] = value
    path.write_text(json.dumps(values))


def edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)


def assert_same(base, expected):
    jax.tree.map(np.testing.assert_array_equal, base, expected)


@pytest.mark.parametrize("config", [PLAIN, GROUPED])
def test_shards_and_one_file_give_the_same_leaves(tmp_path, config):
    write_hf_directory(tmp_path, config, tokenizer=False)
    assert_same(load_base(tmp_path)[0], random_base(config))
    shard(tmp_path)
    assert_same(load_base(tmp_path)[0], random_base(config))


@pytest.mark.parametrize("config", [PLAIN, GROUPED])
def test_the_decode_layout_is_read_as_it_is_made(tmp_path, config):
    write_hf_directory(tmp_path, config, tokenizer=False)
    read, made = load_base(tmp_path, decode=True)[0], decode_layout(random_base(config))
    assert jax.tree.structure(read) == jax.tree.structure(made)
    assert_same(read, made)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_any_dtype_to_any_dtype(tmp_path, stored, wanted):
    write_hf_directory(tmp_path, PLAIN, dtype=stored, tokenizer=False)
    base, _ = load_base(tmp_path, dtype=wanted)
    assert base.dtype == jnp.dtype(wanted)
    assert_same(base, jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), random_base(PLAIN)))


def test_a_tied_head_stored_twice_and_old_rotary_buffers_are_no_error(tmp_path):
    write_hf_directory(tmp_path, GROUPED, tokenizer=False)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    edit_weights(tmp_path, add)
    assert_same(load_base(tmp_path)[0], random_base(GROUPED))


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_the_rotary_settings(folder, spelling):
    inner = {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    if spelling == "rope_parameters":
        edit_config(folder, rope_theta=..., rope_parameters={**inner, "rope_theta": 2e5})
    else:
        edit_config(folder, rope_theta=2e5, rope_scaling=inner)
    config = read_model_config(folder)
    assert config.rope_theta == 2e5
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 16)


def test_a_config_survives_writing_and_reading(tmp_path):
    for config in (PLAIN, GROUPED, dataclasses.replace(PLAIN, eos_ids=(2, 5))):
        (tmp_path / "config.json").write_text(json.dumps(write_model_config(config, 1, "float32")))
        assert read_model_config(tmp_path) == config


def rename(old, new):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
BAD_WEIGHTS = {
    "missing": (lambda t: t.pop(Q0), f"tensor '{Q0}' is missing (1 in all)"),
    "extra": (lambda t: t.update(more=t[NORM].copy()), "unexpected tensor 'more' (1 in all)"),
    "renamed": (rename(Q0, "q"), f"tensor '{Q0}' is missing"),
    "extra layer": (
        lambda t: t.update({Q0.replace(".0.", ".2."): t[Q0].copy()}),
        "unexpected tensor 'model.layers.2.self_attn.q_proj.weight'",
    ),
    "shape": (lambda t: t.update({NORM: t[NORM][:-1]}), f"tensor '{NORM}' has shape (23,), expected (24,)"),
    "axes": (lambda t: t.update({NORM: t[NORM][None]}), f"tensor '{NORM}' has shape (1, 24), expected (24,)"),
    "integers": (
        lambda t: t.update({NORM: t[NORM].astype(np.int32)}),
        f"tensor '{NORM}' has dtype I32, expected a floating type",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_wrong_tensors_are_named(folder, case):
    edit, message = BAD_WEIGHTS[case]
    edit_weights(folder, edit)
    with pytest.raises(UserError) as caught:
        load_base(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def to_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def disguise_pickle(folder):
    import pickle

    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def escape(name):
    def edit(folder):
        weight_map = shard(folder)
        weight_map[NORM] = name
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def lose_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def misindex(folder):
    weight_map = shard(folder)
    weight_map.pop(NORM)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BAD_FILES = {
    "truncated": (truncate, "truncated: tensor "),
    "a pickle": (to_pickle, "found pytorch_model.bin, but pickles are never loaded"),
    "a pickle in disguise": (disguise_pickle, "not a whole safetensors file: its header has"),
    "nothing": (
        lambda f: (f / WEIGHTS).unlink(),
        f"expected {WEIGHTS} or {INDEX}",
    ),
    "outside, relative": (escape("../x.safetensors"), "expected a safetensors file of this directory"),
    "outside, absolute": (escape("/x.safetensors"), "expected a safetensors file of this directory"),
    "a pickle in the index": (escape("x.bin"), "expected a safetensors file of this directory"),
    "lost shard": (lose_shard, "names 'model-00002-of-00002.safetensors', which is missing"),
    "in a shard, not in the index": (
        misindex,
        "is in the file or in the index, not in both",
    ),
    "empty index": (lambda f: (shard(f), (f / INDEX).write_text("{}")), "expected a non-empty object"),
    "broken index": (lambda f: (shard(f), (f / INDEX).write_text("{")), "not readable JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_wrong_files_are_one_line(folder, case):
    edit, message = BAD_FILES[case]
    edit(folder)
    with pytest.raises(UserError) as caught:
        load_base(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_CONFIGS = {
    "another family": ({"model_type": "mamba"}, "model_type is 'mamba': expected one of llama, mistral"),
    "window": ({"sliding_window": 4096}, "sliding_window is 4096: expected unset"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu': expected one of silu"),
    "rope type": (
        {"rope_scaling": {"rope_type": "yarn"}},
        "rope_type is 'yarn': expected",
    ),
    "rope without factor": ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
    "missing size": ({"hidden_size": ...}, "hidden_size is None: expected a whole number"),
    "text size": ({"hidden_size": "24"}, "hidden_size is '24'"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "zero": ({"vocab_size": 0}, "vocab_size is 0"),
    "heads": ({"num_key_value_heads": 2}, "num_kv_heads is 2: expected a divisor of num_heads 3"),
    "odd head": ({"head_dim": 7}, "head_dim is 7: expected an even number"),
    "no head_dim": ({"head_dim": ..., "hidden_size": 25}, "hidden_size 25 is no multiple"),
    "infinite": ({"rms_norm_eps": float("inf")}, "expected a finite number"),
    "enormous": ({"rope_theta": 10**400}, "expected a finite number"),
    "end beyond the vocabulary": ({"eos_token_id": [2, 61]}, "expected a token id below 61"),
    "eps": ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    "flag": ({"attention_bias": "yes"}, "attention_bias is 'yes': expected true or false"),
    "end": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_we_cannot_compute_is_refused(folder, case):
    changes, message = BAD_CONFIGS[case]
    edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_base(folder)
    assert message in str(caught.value)


def test_a_flag_that_is_null_is_off(folder):
    edit_config(folder, attention_bias=None, mlp_bias=None, tie_word_embeddings=None, rope_scaling=None)
    assert read_model_config(folder) == PLAIN


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000])
def test_a_hostile_config_is_one_line(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: not readable JSON"):
        load_base(folder)


def test_a_fingerprint_sees_every_file_and_samples_large_ones(folder):
    seen = {base_fingerprint(folder)}
    assert base_fingerprint(folder) in seen
    path = folder / WEIGHTS
    for at in (0, -1):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        seen.add(base_fingerprint(folder))
    (folder / "tokenizer.json").write_text("{}")
    seen.add(base_fingerprint(folder))
    path.write_bytes(bytes(3 * WHOLE_BELOW))
    seen.add(base_fingerprint(folder))
    path.write_bytes(bytes(3 * WHOLE_BELOW - 1) + b"\1")
    seen.add(base_fingerprint(folder))
    assert len(seen) == 6


def test_a_missing_directory_or_config(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_base(tmp_path / "no")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_base(tmp_path)
    with pytest.raises(UserError, match="dtype is 'int8': expected one of"):
        load_base(tmp_path, dtype="int8")


PEAK = """
import re, sys
from pathlib import Path
import jax, safetensors.numpy
from milora_jax.base.load import load_base

def memory(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

jax.device_put(1.0).block_until_ready()
before = memory("VmRSS")
base, _ = load_base(sys.argv[1], sys.argv[2])
peak = memory("VmHWM")
print((peak - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory figures of /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, dtype):
    wide = dataclasses.replace(
        PLAIN, vocab_size=8192, hidden_size=512, intermediate_size=2048, num_layers=6, head_dim=128
    )
    write_hf_directory(tmp_path, wide, dtype=dtype, tokenizer=False)
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), dtype],
        env={**kept, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.3


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim"])
def test_a_size_that_the_files_do_not_have_is_refused(folder, name):
    values = write_model_config(dataclasses.replace(PLAIN, **{name: 2 * getattr(PLAIN, name)}), 1, "float32")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"has shape|is missing"):
        load_base(folder)


def test_rows_longer_than_the_model_are_refused(folder):
    base, config = load_base(folder)
    with pytest.raises(UserError, match="row length is 65: expected at most max_positions 64"):
        logits(base, config, jnp.zeros((1, 65), jnp.int32))
    for token in (-1, config.vocab_size):
        with pytest.raises(UserError, match="expected 0 to 60"):
            logits(base, config, jnp.array([[1, token]]))
