"""Preference objectives: DPO, IPO, ORPO and KTO, as TRL computes them.

Every prompt of a batch has two answers in its row (``types.Batch.answers``), each behind its own copy of the
prompt. Both have one route, which is computed from the first copy. A pair is the chosen and the rejected
answer; for KTO the first answer is judged, and the second is that of another row, from which the divergence
is estimated. The reference model is the frozen base without the adapter, or with a frozen one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from milora_jax.adapters.inputs import RoutingSchedule
from milora_jax.adapters.protocol import Adapter
from milora_jax.base.attention import Attend, attention
from milora_jax.base.modules import Base
from milora_jax.base.transformer import forward
from milora_jax.config import TrainSection
from milora_jax.model_config import ModelConfig
from milora_jax.shapes import Array, Bool, Float, Int, Key
from milora_jax.training.cross_entropy import token_cross_entropy
from milora_jax.training.loss import LossParts, Totals, following, totals_of, with_terms
from milora_jax.types import Batch, PreferenceSums, PyTree, Route

NEAREST = -1e-7
"""Largest mean log-probability of an answer in ORPO's odds; the odds of a certain answer are infinite."""


def dpo(margin: Float[Array, "*B"], beta: float, label_smoothing: float) -> Float[Array, "*B"]:
    """The sigmoid loss of DPO (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7), with the label smoothing of
    conservative DPO (Mitchell 2023).

    Args:
      margin: log-ratio of policy and reference of the chosen answer, less that of the rejected one, in nats.
    """
    right, wrong = (jax.nn.log_sigmoid(sign * beta * margin) for sign in (1.0, -1.0))
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def ipo(margin: Float[Array, "*B"], beta: float) -> Float[Array, "*B"]:
    """The squared loss of IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    Args:
      margin: as :func:`dpo`, of log-ratios divided by their answers' tokens, as in TRL.
      beta: the paper's tau.
    """
    return (margin - 1.0 / (2.0 * beta)) ** 2


def orpo(chosen: Float[Array, "*B"], rejected: Float[Array, "*B"], beta: float) -> Float[Array, "*B"]:
    """The odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, Eq. 6 and 7), without cross entropy.

    Args:
      chosen, rejected: mean log-probabilities of the answers' tokens.
      beta: the paper's lambda.
    """
    chosen, rejected = jnp.minimum(chosen, NEAREST), jnp.minimum(rejected, NEAREST)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * jax.nn.log_sigmoid(log_odds)


def kto(
    ratio: Float[Array, "*B"], label: Bool[Array, "*B"], kl: Float[Array, ""], beta: float
) -> Float[Array, "*B"]:
    """The loss of KTO (Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7), with both weights 1.

    Args:
      ratio: log-ratio of policy and reference of each answer.
      label: whether the answer is desirable.
      kl: estimate of the divergence, at least 0.
    """
    return 1.0 - jax.nn.sigmoid(beta * jnp.where(label, ratio - kl, kl - ratio))


def _log1mexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log(1 - exp(x)) of negative numbers, without cancellation near 0."""
    near = x > -0.6931471805599453
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


class Answers(NamedTuple):
    """What a model gives to the answers of a batch.

    Attributes:
      logps: log-probability of each answer, the sum over its tokens, in nats.
      tokens: number of these tokens.
      nll: summed negative log-likelihood of the tokens that are imitated, see :func:`_imitated`.
    """

    logps: Float[Array, "B Z A"]
    tokens: Int[Array, "B Z A"]
    nll: Float[Array, ""]


def answers_of(
    base: Base, config: ModelConfig, hidden: Float[Array, "B T D"], batch: Batch, settings: TrainSection
) -> Answers:
    """The log-probabilities of a batch's answers, from the normed residual stream of a pass over it."""
    targets, counted, segments = (
        following(field) for field in (batch.tokens, batch.loss_mask, batch.segment_ids)
    )
    imitated = _imitated(batch, settings.objective)
    losses = token_cross_entropy(base, config, hidden, targets, counted | imitated, settings.loss_chunk)
    number = jnp.arange(1, batch.segments + 1)[None, :, None]
    members = (segments[:, None, :] == number) & counted[:, None, :]
    shape = (-1, batch.prompts, batch.answers)
    return Answers(
        logps=-jnp.where(members, losses[:, None, :], 0.0).sum(axis=-1).reshape(shape),
        tokens=members.sum(axis=-1).reshape(shape),
        nll=jnp.where(imitated, losses, 0.0).sum(),
    )


def _imitated(batch: Batch, objective: str) -> Bool[Array, "B T"]:
    """Which hidden states predict a token of an answer that is imitated: the chosen or desirable ones. For
    ORPO, as in TRL, they are all tokens of prompt and chosen answer but the first."""
    segments, counted = following(batch.segment_ids), following(batch.loss_mask)
    first = (segments > 0) & ((segments - 1) % batch.answers == 0)
    if objective == "orpo":
        return first & (following(batch.positions) > 0)
    if objective != "kto" or batch.labels is None:
        return first & counted
    prompt = jnp.maximum(segments - 1, 0) // batch.answers
    return first & counted & jnp.take_along_axis(batch.labels, prompt, axis=1, mode="clip")


class _Scored(NamedTuple):
    """The answers of a batch under policy and reference.

    Attributes:
      ratios: log-ratios of policy and reference; the policy's log-probabilities where there is no reference.
    """

    answers: Answers
    ratios: Float[Array, "B Z A"]
    route: Route | None


def _scored(
    adapter: Adapter,
    reference: Adapter | None,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    settings: TrainSection,
    key: Key[Array, ""] | None,
    attend: Attend,
    top_k: Int[Array, ""] | None,
) -> _Scored:
    policy = forward(
        base, config, batch, adapter=adapter, key=key, remat=settings.remat, attend=attend, top_k=top_k
    )
    answers = answers_of(base, config, policy.hidden, batch, settings)
    if settings.objective == "orpo":
        return _Scored(answers, answers.logps, policy.route)
    final = None if reference is None else reference.method.final_schedule.top_k
    still = forward(base, config, batch, adapter=reference, attend=attend, top_k=final)
    logps = jax.lax.stop_gradient(answers_of(base, config, still.hidden, batch, settings).logps)
    return _Scored(answers, answers.logps - logps, policy.route)


def preference_loss(
    adapter: Adapter,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    *,
    settings: TrainSection,
    key: Key[Array, ""] | None,
    reference: Adapter | None = None,
    attend: Attend = attention,
    totals: Totals | None = None,
    schedule: RoutingSchedule | None = None,
    memory: PyTree = None,
) -> tuple[Float[Array, ""], LossParts]:
    """The objective's mean over the prompts of the global batch, plus the method's terms as in
    ``loss.adapted_loss``; ORPO adds the mean cross entropy of the imitated tokens.

    Args:
      batch: a batch with two answers to a prompt.
      settings: ``objective``, ``beta`` and ``label_smoothing``, and how the passes are computed.
      key: random key of dropout, for the policy alone; None switches dropout off.
      reference: the adapter of the reference model, with a route of its own; None is the plain base. ORPO has
        no reference model.
      totals: totals of the whole batch, where ``batch`` is a part of it.
      attend, schedule, memory: as ``loss.adapted_loss`` takes them.
    """
    schedule = adapter.method.final_schedule if schedule is None else schedule
    scored = _scored(adapter, reference, base, config, batch, settings, key, attend, schedule.top_k)
    whole = _totals(batch, scored, settings) if totals is None else totals
    here, prompts = batch.present, jnp.maximum(whole.prompts, 1).astype(jnp.float32)
    per_prompt, sums = _objective(batch, scored, whole, settings)
    value = jnp.where(here, per_prompt, 0.0).sum() / prompts
    cross_entropy = scored.answers.nll / jnp.maximum(whole.tokens, 1).astype(jnp.float32)
    if settings.objective == "orpo":
        value = value + cross_entropy
    loss, parts = with_terms(adapter, config, scored.route, value, whole, schedule, memory)
    return loss, dataclasses.replace(
        parts, cross_entropy=cross_entropy, tokens=sums.tokens, preference=jax.lax.stop_gradient(sums)
    )


def _objective(
    batch: Batch, scored: _Scored, whole: Totals, settings: TrainSection
) -> tuple[Float[Array, "B Z"], PreferenceSums]:
    """The objective of each prompt, and the sums that are reported."""
    beta, here, ratios = settings.beta, batch.present, scored.ratios
    first, second = ratios[..., 0], ratios[..., 1]
    rewards = beta * ratios
    chosen, right = here, ratios[..., 0] > ratios[..., 1]
    averages = ratios / jnp.maximum(scored.answers.tokens, 1).astype(jnp.float32)
    if settings.objective == "dpo":
        per_prompt = dpo(first - second, beta, settings.label_smoothing)
    elif settings.objective == "ipo":
        per_prompt = ipo(averages[..., 0] - averages[..., 1], beta)
    elif settings.objective == "orpo":
        per_prompt = orpo(averages[..., 0], averages[..., 1], beta)
        rewards, right = beta * averages, averages[..., 0] > averages[..., 1]
    else:
        if batch.labels is None or whole.kl is None:
            raise ValueError("kto needs the labels of a batch and the log-ratios of its mismatched answers")
        kl = jnp.maximum(whole.kl / jnp.maximum(whole.prompts, 1).astype(jnp.float32), 0.0)
        per_prompt = kto(first, batch.labels, kl, beta)
        chosen, right = here & batch.labels, (first > kl) == batch.labels
    judged = settings.objective == "kto"
    rejected = here & ~chosen if judged else here
    of_rejected = rewards[..., 0] if judged else rewards[..., 1]
    return per_prompt, PreferenceSums(
        loss=jnp.where(here, per_prompt, 0.0).sum(),
        prompts=here.sum(),
        chosen=jnp.where(chosen, rewards[..., 0], 0.0).sum(),
        rejected=jnp.where(rejected, of_rejected, 0.0).sum(),
        chosen_count=chosen.sum(),
        rejected_count=rejected.sum(),
        accurate=(here & right).sum(),
        kl=_summed_kl(batch, scored) if judged else jnp.zeros((), jnp.float32),
        nll=scored.answers.nll,
        tokens=_imitated(batch, settings.objective).sum(),
    )


def _summed_kl(batch: Batch, scored: _Scored) -> Float[Array, ""]:
    """Sum of the log-ratios of the answers of other rows, without a gradient."""
    return jax.lax.stop_gradient(jnp.where(batch.present, scored.ratios[..., 1], 0.0).sum())


def _totals(batch: Batch, scored: _Scored, settings: TrainSection) -> Totals:
    return dataclasses.replace(
        totals_of(batch, scored.route),
        tokens=_imitated(batch, settings.objective).sum(),
        kl=_summed_kl(batch, scored) if settings.objective == "kto" else None,
    )


def preference_totals(
    adapter: Adapter,
    base: Base,
    config: ModelConfig,
    batch: Batch,
    *,
    settings: TrainSection,
    key: Key[Array, ""] | None,
    reference: Adapter | None,
    attend: Attend,
    top_k: Int[Array, ""] | None,
) -> Totals:
    """The totals of a part of a batch, from a pass over it where the method routes or for kto."""
    if settings.objective == "kto":
        scored = _scored(adapter, reference, base, config, batch, settings, key, attend, top_k)
        return _totals(batch, scored, settings)
    route = None
    if adapter.method.routes:
        route = forward(base, config, batch, adapter=adapter, key=key, attend=attend, top_k=top_k).route
    return dataclasses.replace(totals_of(batch, route), tokens=_imitated(batch, settings.objective).sum())


def preference_figures(sums: PreferenceSums, objective: str) -> dict[str, float | None]:
    """The figures of a preference objective under TRL's names, on the host; None where a batch has none.

    Args:
      sums: of a batch, or added up over batches.
    """
    counts = (sums.chosen_count, sums.rejected_count)
    means = [
        float(value) / int(count) if int(count) else None
        for value, count in zip((sums.chosen, sums.rejected), counts, strict=True)
    ]
    chosen, rejected = means
    prompts = max(int(sums.prompts), 1)
    found: dict[str, float | None] = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        "rewards/accuracies": int(sums.accurate) / prompts,
    }
    if objective == "kto":
        found["kl"] = max(float(sums.kl) / prompts, 0.0)
    return found


def objective_of(sums: PreferenceSums, objective: str) -> float:
    """The mean of an objective over the prompts of ``sums``, without the method's terms."""
    value = float(sums.loss) / max(int(sums.prompts), 1)
    return value + float(sums.nll) / max(int(sums.tokens), 1) if objective == "orpo" else value
