"""A method that is not in the package: one class and one line in the registry are all that it takes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milora_jax.adapters.inputs import ProjectionGroup
from milora_jax.adapters.protocol import Method
from milora_jax.adapters.records import Rescaled, WeightChange
from milora_jax.adapters.registry import METHOD_CLASSES
from milora_jax.config import AdapterSection
from milora_jax.errors import Preempted
from milora_jax.storage.adapters import load_adapter
from milora_jax.storage.export import export_orbax, export_peft, formats_of
from milora_jax.storage.verify import findings
from tests.serving.harness import Listener, running, service_of
from tests.training.short_runs import STOP, fit, prepare_short_run

pytest.importorskip("transformers", reason="prompts need a tokenizer, which the core does without")


@dataclasses.dataclass(frozen=True)
class Gain(Method):
    """Every output of every module is multiplied by a number of its own."""

    name: ClassVar[str] = "gain"
    record: ClassVar[type | None] = Rescaled

    def init(self, key, shape, kernels):
        """Gains of 0, by which an output is what it was."""
        return {name: jnp.zeros((shape.num_layers, d_out), jnp.float32) for name, (_, d_out) in shape.modules}

    def adapt(self, params, group: ProjectionGroup):
        """The outputs times 1 and their gain."""
        return tuple(
            output * (1.0 + params[name])[None, None].astype(output.dtype)
            for name, output in zip(group.names, group.outputs, strict=True)
        )

    def weight_change(self, params):
        """The factors of the outputs."""
        return WeightChange({name: Rescaled(1.0 + gain) for name, gain in params.items()})


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHOD_CLASSES, "gain", Gain)


@pytest.mark.thorough
def test_a_new_method_trains_saves_resumes_exports_and_serves(registered, tmp_path):
    run, steps = prepare_short_run(tmp_path)
    config = dataclasses.replace(run.config, adapter=AdapterSection(method="gain"))
    run = dataclasses.replace(run, config=config)
    whole = fit(run, steps, tmp_path / "whole")
    with pytest.raises(Preempted):
        fit(run, steps, tmp_path / "cut", stop_after=STOP)
    resumed = fit(run, steps, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.state.adapter.params, resumed.state.adapter.params)

    adapter = load_adapter(tmp_path / "whole")
    assert adapter.method == Gain()
    assert all(np.asarray(gain).any() for gain in jax.tree.leaves(adapter.params))
    assert formats_of(adapter.method, fused=False) == ("peft", "orbax")
    export_orbax(tmp_path / "whole", tmp_path / "orbax")
    again = load_adapter(tmp_path / "orbax")
    jax.tree.map(np.testing.assert_array_equal, adapter.params, again.params)
    export_peft(tmp_path / "whole", tmp_path / "peft", "base")
    assert findings(tmp_path / "peft", tmp_path / "model") == {tmp_path / "peft": []}

    service, _ = service_of(tmp_path, {"one": tmp_path / "whole", "two": tmp_path / "orbax"})
    with running(service):
        served = [Listener(service, name, [5, 6, 7, 8]).end()[0] for name in ("one", "two", "base")]
    assert served[0] == served[1] != served[2]
