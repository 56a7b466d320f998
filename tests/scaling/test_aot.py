"""Ahead-of-time compilation: the programs that run, right arithmetic, a word where it does not fit."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from milora_jax.base.known import SHAPES
from milora_jax.commands.config_options import read_config_file
from milora_jax.commands.parallel import model_of, parse_mesh
from milora_jax.config import (
    AdapterSection,
    Config,
    DataSection,
    EvalSection,
    MeshSection,
    ModelSection,
    TrainSection,
)
from milora_jax.errors import UserError
from milora_jax.model_config import LLAMA2_7B
from milora_jax.parallel.mesh import make_mesh
from milora_jax.scaling import aot
from milora_jax.scaling.aot import (
    Memory,
    Topology,
    chip_of,
    count_collectives,
    describe,
    step_flops,
)
from milora_jax.scaling.chips import GIB, Chip
from milora_jax.scaling.gpus import GPUS, layout_of
from milora_jax.scaling.plan import base_bytes, estimate, meshes, plan
from milora_jax.scaling.programs import decode_program, prefill_program
from tests.models import TINY
from tests.programs import compiled

ROOT = Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(TINY, vocab_size=96, num_heads=8, num_kv_heads=8, head_dim=4)
CONFIG = Config(
    adapter=AdapterSection(rank=4),
    data=DataSection(max_length=16),
    train=TrainSection(batch_size=16),
    mesh=MeshSection(data=1, fsdp=-1),
    eval=EvalSection(batch_size=8, max_new_tokens=16),
)
CHIP = Chip(memory=GIB, flops=1e12, link=1e9)


def host():
    """The eight devices of the tests in a topology's place."""
    found = object.__new__(Topology)
    found.name, found.chip, found.devices = "host:8", CHIP, jax.devices()
    return found


@pytest.mark.thorough
def test_a_step_is_compiled_and_measured():
    found = host().compile(CONFIG, MODEL, "train")
    assert found.fits
    assert (found.mesh, found.devices, found.remat) == (MeshSection(1, 8, 1), 8, "products")
    assert found.memory.peak > found.memory.arguments > found.memory.donated > 0
    assert found.collectives["all-gather"] > 0, "nothing is sharded"
    assert found.flops == 4 * MODEL.matrix_parameters * 16 * 16


@pytest.mark.thorough
@pytest.mark.parametrize("make", [prefill_program, decode_program])
def test_decoding_gathers_no_weights_and_no_cache(make):
    """A tensor-parallel step sums activations; what it gathers is as small as a token's."""
    mesh = make_mesh(MeshSection(data=1, fsdp=1, tensor=8), jax.devices())
    program = compiled(make(CONFIG, MODEL, mesh)).as_text()
    assert count_collectives(program).get("all-reduce", 0) >= 2 * MODEL.num_layers
    gathered = [line for line in program.splitlines() if " all-gather(" in line]
    rows, slots = CONFIG.eval.batch_size, CONFIG.data.max_length + CONFIG.eval.max_new_tokens
    of_cache = f"[{rows},{MODEL.num_kv_heads},{slots},{MODEL.head_dim}]"
    of_weights = [f"[{a},{b}]" for a, b in MODEL.module_dims.values()]
    assert not [line for line in gathered if any(shape in line for shape in (of_cache, *of_weights))]


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"train.batch_size is 12: expected a multiple"):
        host().compile(dataclasses.replace(CONFIG, train=TrainSection(batch_size=12)), MODEL, "train")
    with pytest.raises(UserError, match="mesh data=1 fsdp=3 tensor=1 does not fit 8"):
        host().compile(dataclasses.replace(CONFIG, mesh=MeshSection(1, 3, 1)), MODEL, "train")


def test_what_does_not_fit_is_said(monkeypatch):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM\nmore")

    monkeypatch.setattr(aot, "train_program", lambda *_: Lowered())
    found = host().compile(CONFIG, MODEL, "train")
    assert not found.fits
    assert "does not fit: RESOURCE_EXHAUSTED: Ran out of memory on HBM" in "\n".join(
        aot.describe(found, CHIP)
    )
    lines = []
    assert plan(host(), CONFIG, MODEL, lines.append) == []
    assert lines[-1].startswith("nothing fits")


def test_a_plan_ranks_what_fits(monkeypatch):
    def compiled(self, config, model, what):
        """As if all but ``none`` fitted, up to four rows a chip."""
        fits = config.train.remat != "none" and config.train.batch_size <= 32
        memory = Memory(1, 1, 1, config.train.batch_size * GIB // 32) if fits else None
        seen.append((config.mesh, config.train.remat, config.train.batch_size))
        return aot.Compiled(
            what,
            config.mesh,
            8,
            config.train.remat,
            config.train.batch_size,
            memory,
            "" if fits else "too much",
            1.0,
            {},
            1.0,
        )

    seen, lines = [], []
    monkeypatch.setattr(Topology, "compile", compiled)
    config = dataclasses.replace(CONFIG, train=TrainSection(batch_size=8))
    ranked = plan(host(), config, MODEL, lines.append)
    seconds = [found.seconds for found, _ in ranked]
    assert seconds == sorted(seconds)
    tried = [(m.data, m.fsdp, m.tensor) for m, remat, rows in seen if (remat, rows) == ("none", 8)]
    assert tried == [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
    assert {c.remat for _, c in ranked} == {"products", "full"}
    assert len(ranked) == 2 * len(tried)
    assert lines[-1] == "the first one's batch, doubled while it fits: 32 rows, 1.00 GiB"


def test_the_arithmetic_of_a_step():
    config = dataclasses.replace(
        CONFIG, mesh=MeshSection(1, 4, 2), train=TrainSection(batch_size=8, remat="full")
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    found = estimate(config, MODEL, CHIP, 8)
    assert found.compute == pytest.approx(6 * MODEL.matrix_parameters * 8 * 16 / (8 * 1e12))
    gathered = base_bytes(config, MODEL) / 2 * 3 / 4 * 3
    summed = 2 * 3 * MODEL.num_layers * 2 * (8 * 16 / 4 * MODEL.hidden_size * 2) / 2
    assert found.links == pytest.approx((gathered + summed) / 1e9)
    assert found.seconds == max(found.compute, found.links)


def test_the_parameters_of_llama():
    for name, count in (
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
    ):
        assert base_bytes(CONFIG, SHAPES[name]) == 4 * count
    assert LLAMA2_7B.matrix_parameters == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert step_flops(CONFIG, MODEL, "prefill") == 2 * MODEL.matrix_parameters * 8 * 16


def test_the_bytes_of_a_quantised_base():
    apart = 2 * 32000 * 4096 + 65 * 4096  # embedding, head and norms
    matrices = LLAMA2_7B.matrix_parameters - 32000 * 4096
    outputs = 32 * sum(d_out for _, d_out in LLAMA2_7B.module_dims.values())
    for quantize, expected in (("int8", matrices + 4 * outputs), ("nf4", matrices * (4 + 16 / 64) / 8)):
        config = dataclasses.replace(CONFIG, model=ModelSection(dtype="bfloat16", quantize=quantize))
        assert base_bytes(config, LLAMA2_7B) == 2 * apart + expected


@pytest.mark.slow
def test_what_does_not_fit_a_gpu_is_found_by_its_numbers():
    """Its compiler would only warn."""
    topology = host()
    topology.chip = dataclasses.replace(GPUS["t4"], memory=GIB)
    found = topology.compile(CONFIG, MODEL, "train")
    assert found.fits
    size = found.memory.peak
    topology.chip = dataclasses.replace(GPUS["t4"], memory=size)
    found = topology.compile(CONFIG, MODEL, "train")
    assert not found.fits
    assert "of which JAX takes 75 %" in found.problem
    text = "\n".join(describe(found, topology.chip))
    assert "does not fit" in text
    assert "temporaries" in text
    analysis = SimpleNamespace(
        argument_size_in_bytes=5, temp_size_in_bytes=7, output_size_in_bytes=3, alias_size_in_bytes=2
    )
    assert aot._memory(analysis) == Memory(arguments=5, temporaries=7, donated=2, peak=13)


def test_gpus_come_in_whole_machines():
    assert layout_of("t4:1") == ("t4", "1x1x1")
    assert layout_of("h200:8") == ("h200", "1x1x8")
    assert layout_of("h100:32") == ("h100", "1x4x8")


def test_meshes_divide_the_batch_and_the_heads():
    config = dataclasses.replace(CONFIG, train=TrainSection(batch_size=16, accumulate=2))
    found = meshes(16, config, dataclasses.replace(MODEL, num_kv_heads=4))
    assert all(m.data * m.fsdp * m.tensor == 16 for m in found)
    assert {m.tensor for m in found} == {2, 4}, "16 rows in two parts do not spread over 16 chips"
    with pytest.raises(UserError, match="no mesh of 16 devices"):
        meshes(16, dataclasses.replace(CONFIG, train=TrainSection(batch_size=3)), MODEL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chip_of("v9:2x4"), "--topology is 'v9:2x4'"),
        (lambda: chip_of("v5e"), "--topology is 'v5e'"),
        (lambda: layout_of("h200:0"), "--topology is 'h200:0'"),
        (lambda: layout_of("h200:12"), "1 to 8 or a multiple of 8"),
        (lambda: parse_mesh("rows=4"), "--mesh is 'rows=4'"),
        (lambda: parse_mesh("fsdp=many"), "--mesh is 'fsdp=many'"),
        (lambda: model_of("llama9", CONFIG), "--model is 'llama9'"),
        (lambda: model_of("", CONFIG), "or a config.model.path"),
        (lambda: host().compile(CONFIG, MODEL, "run"), "--what is 'run'"),
        (lambda: read_config_file("nowhere.py", []), "no such file"),
        (lambda: read_config_file(str(ROOT / "configs/tiny.py"), ["--config.train.steps=3"]), "command line"),
    ],
)
def test_a_mistake_is_one_line(make, message):
    with pytest.raises(UserError) as found:
        make()
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_the_config_takes_the_flags_of_training():
    argv = list(sys.argv)
    config = read_config_file(str(ROOT / "configs/llama7b_math.py"), ["--config.train.batch_size=64"])
    assert (config.train.batch_size, config.mesh.fsdp) == (64, -1)
    assert sys.argv == argv


def command(*arguments):
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "milora_jax.parallel", "aot", *arguments],
        cwd=ROOT,
        env={**plain, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def peak(output):
    return float(output.split("per chip")[1].split()[0])


@pytest.mark.slow
def test_the_shipped_config_fits_eight_v5e():
    pytest.importorskip("libtpu", reason="needs pip install 'milora-jax[tpu]'")
    shipped = ("--config", "configs/llama7b_math.py", "--model", "llama2-7b", "--topology", "v5e:2x4")
    trained = command(*shipped)
    assert trained.returncode == 0, trained.stderr
    assert peak(trained.stdout) < 6
    decoded = command(*shipped, "--what", "decode", "--mesh", "tensor=8", "--config.eval.batch_size=16")
    assert decoded.returncode == 0, decoded.stderr
    assert peak(decoded.stdout) < 4
    assert " 2 all-gather," in decoded.stdout, "weights or cache are gathered"
    too_much = command(*shipped, "--config.train.batch_size=128", "--config.train.remat=none")
    assert too_much.returncode == 2
    assert "error: train does not fit v5e:2x4" in too_much.stderr
    assert "Traceback" not in too_much.stderr


@pytest.mark.slow
def test_a_quantised_base_trains_and_decodes_on_one_chip():
    """The real compiler decodes inside the products: nothing of the size of the layers is added."""
    pytest.importorskip("libtpu", reason="needs pip install 'milora-jax[tpu]'")
    shipped = ("--config", "configs/llama7b_math.py", "--model", "llama2-7b", "--topology", "v5e:1x1")
    shipped = (*shipped, "--mesh", "fsdp=1", "--config.train.batch_size=2", "--config.eval.batch_size=4")
    peaks = {}
    for quantize in ("none", "int8", "nf4"):
        found = command(*shipped, f"--config.model.quantize={quantize}")
        assert found.returncode == 0, found.stderr
        peaks[quantize] = peak(found.stdout)
    assert peaks["int8"] < peaks["none"] - 5.9
    assert peaks["nf4"] < peaks["none"] - 8.6
    decoding = (*shipped, "--what", "decode")
    assert command(*decoding).returncode == 2
    assert peak(command(*decoding, "--config.model.quantize=nf4").stdout) < 8.5


@pytest.mark.slow
def test_a_quantised_base_trains_on_a_t4():
    pytest.importorskip("jax_cuda12_plugin", reason="needs pip install 'jax[cuda12]'")
    given = ("--config", "configs/llama7b_math.py", "--model", "llama2-7b", "--topology", "t4:1")
    given = (*given, "--config.model.dtype=float16", "--config.train.batch_size=1")
    plain, quantised = (command(*given, f"--config.model.quantize={kept}") for kept in ("none", "nf4"))
    assert plain.returncode == 2
    assert "does not fit" in plain.stdout
    assert peak(quantised.stdout) < 6
