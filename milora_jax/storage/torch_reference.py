"""An exported MiLoRA on a transformers model in PyTorch, for users of PyTorch.

    model = AutoModelForCausalLM.from_pretrained("MODEL_DIR", dtype=torch.float32).eval()
    reader = attach(model, "EXPORT_DIR")
    model.generate(torch.tensor([reader.encode(tokenizer, prompt)]), do_sample=False)

It reads the directory that ``python -m milora_jax.storage export --format milora`` writes (method milora or
midora), and follows ``docs/method.md`` and the paper line by line, independently of the JAX code: the parity
tests compare the two. It is short rather than fast. Prompts are not padded: give one prompt at a time, or
several of one length. Check the base's files first with
``python -m milora_jax.storage verify EXPORT_DIR --base MODEL_DIR``.

A forward pass over more than one token is a prompt: every decoder layer pools the hidden states that enter it
and chooses its experts. A pass over one token, a decode step, keeps the choice. Call ``reader.reset()``
before a prompt of one token.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency)
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from milora_jax.errors import UserError
from milora_jax.prompt_format import stored_prompt_format

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The seven experts in the order of the router's outputs, and their modules in transformers."""


def attach(model: Any, directory: str | Path) -> Reader:
    """Attach an exported MiLoRA or MiDoRA to a transformers model; ``Reader.detach`` undoes it.

    Raises:
      UserError: the model stores several of the seven modules in one, as Phi-3 does, or has other widths or
        another depth than the adapter's base; or the method is another.
    """
    from safetensors.torch import load_file

    folder = Path(directory)
    config = json.loads((folder / "milora_config.json").read_text())
    found = config["adapter"]["method"]
    if found not in ("milora", "midora"):
        raise UserError(f"method is {found!r}, expected milora or midora: PEFT reads what has no router")
    experts = load_file(folder / "experts.safetensors", device=str(model.device))
    router = load_file(folder / "router.safetensors", device=str(model.device))
    return Reader(model, config, experts, router)


FEATURE_LIMIT = 3.0
"""Standardized features are clipped to plus and minus this."""


def full_values(settings: dict) -> dict:
    """The settings of an adapter as a file of any format holds them, by today's names."""
    settings = {"route_on": "prompt", "use_rslora": False, **settings}
    if settings.get("features") is not None:
        return settings
    return {**settings, "features": "rms" if settings["normalize"] else "raw", "balance": "loss"}


class Reader:
    """The hooks that make a transformers model compute with an adapter.

    Attributes:
      weights: of the experts, ``[rows, 7]`` per layer: the route of the last prompt.
      prompt_format: how the prompts were written that the adapter was trained on, and what of them the
        routers read.
      route_tokens: how many tokens of the next prompt, from the first, the routers read; 0 is all. It is to
        be set for a chat where ``prompt_format.route_on`` is not ``prompt``: ``data.scopes.encode_messages``
        counts them.
    """

    def __init__(self, model: Any, config: dict, experts: dict, router: dict) -> None:
        self.model = model
        self.settings = full_values(config["adapter"])
        stored = stored_prompt_format(config.get("prompt_format"), "milora_config.json")
        self.prompt_format = dataclasses.replace(stored, route_on=self.settings["route_on"])
        self.route_tokens = 0
        self.eps, self.layers = config["normalize_eps"], config["shape"]["num_layers"]
        self.router, self.weights = router, {}
        alpha, rank = self.settings["alpha"], self.settings["rank"]
        divisor = rank**0.5 if self.settings["use_rslora"] else rank
        self.scale = alpha / divisor if alpha else 1.0
        self.hooks = []
        names = {name for name, _ in model.model.layers[0].named_modules()}
        for path in MODULES.values():
            if path not in names:
                raise UserError(
                    f"the model has no module {path!r} in its layers: expected one for each expert"
                )
        if len(model.model.layers) != self.layers:
            raise UserError(
                f"the model has {len(model.model.layers)} layers, the adapter is for one of {self.layers}"
            )
        for i, layer in enumerate(model.model.layers):
            self.hooks.append(layer.register_forward_pre_hook(self._router_hook(i), with_kwargs=True))
            for place, path in enumerate(MODULES.values()):
                prefix = f"base_model.model.model.layers.{i}.{path}."
                mine = {
                    name.removeprefix(prefix): t for name, t in experts.items() if name.startswith(prefix)
                }
                module = layer.get_submodule(path)
                widths = tuple(mine["lora_B.weight"].shape[:1] + mine["lora_A.weight"].shape[1:])
                if widths != tuple(module.weight.shape):
                    found = tuple(module.weight.shape)
                    raise UserError(f"module {path!r} of the model is {found}, of the adapter {widths}")
                hook = self._expert_hook(i, place, mine)
                self.hooks.append(module.register_forward_hook(hook))

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Encode a text prompt as in the adapter's training; special tokens in the text are read.

        ``tokenizer(text)`` gives the same ids where the adapter was trained by the tokenizer's own rule.
        """
        rule, bos = self.prompt_format.special_tokens, tokenizer.bos_token_id
        ids = tokenizer(text, add_special_tokens=rule == "tokenizer").input_ids
        ids = [bos, *ids] if rule == "bos" and bos is not None and ids[:1] != [bos] else ids
        self.route_tokens = 0
        return ids

    def reset(self) -> None:
        """Forget the route, so that the next pass is a prompt of any length."""
        self.weights = {}

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def route(self, layer: int, hidden: Any) -> Any:
        """Weights ``[rows, 7]`` of a layer's experts (Eq. 2 and 3), from the prompt ``[rows, tokens, D]``."""
        import torch

        weight = self._leaf(layer, "weight")
        logits = self._activate(layer, self._features(layer, hidden)) @ weight.T
        probs = torch.softmax(logits, dim=-1)
        scores = probs + self._leaf(layer, "bias") if self.settings["balance"] == "bias" else probs
        chosen = torch.topk(scores, self.settings["top_k"], dim=-1).indices
        values = probs.gather(-1, chosen)
        gate = self.settings["gate"]
        if gate == "straight_through":
            values = torch.ones_like(values)
        elif gate == "renormalized":
            values = self.settings["top_k"] * values / values.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, chosen, values)

    def _leaf(self, layer: int, name: str) -> Any:
        return self.router[f"layers.{layer}.router.{name}"]

    def _scaled(self, x: Any) -> Any:
        """Scale to unit root mean square."""
        import torch

        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)

    def _features(self, layer: int, hidden: Any) -> Any:
        """The features that the activation reads, ``[rows, D]``."""
        kind = self.settings["features"]
        if kind == "standardized":
            norm = getattr(self.model.model.layers[layer], "input_layernorm", None)
            normed = hidden if norm is None else norm(hidden)
            pooled = self._pool(layer, self._scaled(normed.float()), hidden.shape[-1] ** -0.5)
            z = (pooled - self._leaf(layer, "mean")) / self._leaf(layer, "deviation")
            return z.clamp(-FEATURE_LIMIT, FEATURE_LIMIT)
        pooled = self._pool(layer, hidden.float())
        return self._scaled(pooled) if kind == "rms" else pooled

    def _pool(self, layer: int, hidden: Any, scale: float = 1.0) -> Any:
        """One vector per prompt (section 3.3; Eq. 8 for attention)."""
        import torch

        pooler = self.settings["pooler"]
        if pooler == "attention":
            shares = torch.softmax(hidden @ self._leaf(layer, "pool") * scale, dim=1)
            return (shares[:, :, None] * hidden).sum(1)
        return {"mean": hidden.mean(1), "max": hidden.amax(1), "last": hidden[:, -1]}[pooler]

    def _activate(self, layer: int, x: Any) -> Any:
        """The router's activation (Eq. 6, Table 5)."""
        import torch

        name = self.settings["activation"]
        if name == "rational":
            a, b = (self._leaf(layer, part) for part in ("numerator", "denominator"))
            top = sum(a[j] * x**j for j in range(7))
            bottom = sum(b[i - 1] * x**i for i in range(1, 6))
            return top / (1 + torch.abs(torch.as_tensor(bottom)))
        first, _, second = name.partition("-")
        kind = first if layer / self.layers < 0.5 else second or first
        return torch.nn.functional.gelu(x) if kind == "gelu" else torch.relu(x)

    def _router_hook(self, layer: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            del module
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] > 1 or layer not in self.weights:
                scope = self.route_tokens or hidden.shape[1]
                if self.prompt_format.route_on == "system" and not self.route_tokens:
                    raise UserError("the routers read a system message: set route_tokens of the reader")
                self.weights[layer] = self.route(layer, hidden[:, :scope])

        return hook

    def _expert_hook(self, layer: int, place: int, tensors: dict) -> Any:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        magnitude = tensors.get("lora_magnitude_vector")

        def hook(module: Any, args: tuple, output: Any) -> Any:
            x, share = args[0], self.weights[layer][:, None, place : place + 1]
            change = self.scale * (x.float() @ a.T) @ b.T
            if magnitude is not None:
                whole = module.weight.float()
                ratio = magnitude / (whole + self.scale * (b @ a)).norm(dim=1)
                change = (ratio - 1) * (x.float() @ whole.T) + ratio * change
            return output + (share * change).to(output.dtype)

        return hook
