"""Settings of RLVR, one model an algorithm. Every default names its source; `ours` where no source gives one.

A recipe's block is read as the settings of the algorithm that it names, so an option of another one is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from smoltulu.schemas.budget import Budget
from smoltulu.schemas.common import machinery, science
from smoltulu.schemas.critic import CriticSettings
from smoltulu.schemas.held_out import HeldOutSettings, Keep, RolloutGuards, fault_of
from smoltulu.schemas.training import GateSettings, LoraSettings, RowRules, TrainingInputs, TrainingSettings

Algorithm = Literal["ppo", "grpo", "rloo"]
#: Ways to sample that the update's log-probabilities do not know.
_OTHER_SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


_IMPORTANCE_SAMPLING_CAP: Any = science(
    None,
    absent=None,
    gt=0,
    description="a token's loss is multiplied by min(policy's probability / sampler's, this): truncated importance "
    "sampling, for an engine that rounds otherwise than the update; 2: Yao et al. 2025; none: no correction",
)


class RLVRSettings(TrainingSettings):
    """What every algorithm has: rollouts of the DPO model (SFT where there is none), paid by verifiers.

    `RLVRSettings.model_validate` gives the settings of the algorithm that the values name.
    """

    #: The field that says how many rollouts each prompt has.
    samples_field: ClassVar[str]

    algorithm: Algorithm = science()
    max_prompt_length: int = science(ge=8, description="tokens; longer prompts are dropped before training")
    max_completion_length: int = science(ge=1, description="tokens")
    temperature: float = science(1.0, gt=0, description="of the rollouts, and of the update's log-probabilities")
    beta: float = science(ge=0, description="KL coefficient against the starting model")
    epsilon: float = science(0.2, gt=0, lt=1, description="clip range of the policy ratio")
    reward_correct: float = science(gt=0, description="reward of a verified completion; 10 in Tulu 3")
    non_stop_reward: float | None = science(description="reward of a completion without eos; none: as verified")
    reward_model_weight: float = science(
        0.0, absent=0.0, ge=0, description="this times the reward model's score is added; 0: verifiers alone (Tulu 3)"
    )
    leave_out: tuple[Literal["never", "always"], ...] | None = science(
        None,
        absent=None,
        description="prompts that are not trained on, by how often the starting model is right (stage pass_rates)",
    )
    reward: Literal["verified", "constant", "random", "format_only"] = science(
        "verified",
        absent="verified",
        description="what earns reward_correct; the others are controls, whose gain does not come from right answers: "
        "every answer, a random share of them, every one in the form that its verifier reads",
    )
    random_reward_probability: float = science(
        0.5, absent=0.5, gt=0, lt=1, description="share of the answers that reward random pays"
    )
    held_out: HeldOutSettings | None = science(
        None, absent=None, description="prompts that are never trained on; none: every row is trained on"
    )
    keep: Keep = science(
        "last", absent="last", description="weights that become the artifact; best: those of the best held-out accuracy"
    )
    engine: Literal["transformers", "vllm"] = science(
        "transformers",
        absent="transformers",
        description="what writes rollouts and held-out answers (tasks/generation). vllm: faster, other random numbers, "
        "log-probabilities that round otherwise; where it runs says compute",
    )
    guards: RolloutGuards = machinery(RolloutGuards())
    gate: GateSettings = machinery(GateSettings())
    max_rollouts_without_signal: int = machinery(
        1000,
        ge=0,
        description="a run is stopped whose first rollouts, so many or all of a shorter run (of 100 and more), hold no "
        "group with rewards that differ: fewer than 3 of 1,000 are then right; 0: never. ours",
    )

    @field_validator("leave_out")
    @classmethod
    def _one_spelling(cls, pools: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Order and repetition mean nothing, so they must not change the key."""
        return tuple(sorted(set(pools))) if pools else None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """The settings of the algorithm that `obj` names."""
        if cls is not RLVRSettings:
            return super().model_validate(obj, **kwargs)
        settings: Self = _ANY.validate_python(obj, **kwargs)
        return settings

    @property
    def num_rollouts(self) -> int:
        """Rollouts that are generated at once, by all processes together."""
        raise NotImplementedError

    @property
    def num_steps_per_rollout(self) -> int:
        """Optimizer steps on one batch of rollouts."""
        raise NotImplementedError

    @property
    def num_prompts(self) -> int:
        """Prompts that rollouts are generated for at once: no two are the same row."""
        raise NotImplementedError

    def check_num_rows(self, num_rows: int) -> None:
        """ValueError where one batch of rollouts needs more prompts than there are."""
        if num_rows < self.num_prompts:
            raise ValueError(
                f"a batch of {self.num_rollouts:,} rollouts needs {self.num_prompts:,} different prompts, and there "
                f"{'is' if num_rows == 1 else 'are'} {num_rows:,}; lower effective_batch_size, raise "
                f"{self.samples_field}, or give more prompts"
            )

    @property
    def keeps_best(self) -> bool:
        return self.keep == "best"

    @property
    def num_warmup_steps_of_critic(self) -> int | None:
        """Optimizer steps that train the critic alone; None where there is no critic."""
        return None

    @property
    def signal_limit(self) -> int:
        """Rollouts without a signal after which it stops; 0: none. A constant reward is to have none."""
        return 0 if self.reward == "constant" else self.max_rollouts_without_signal

    @property
    def needs_reward_model(self) -> bool:
        """Whether it reads the recipe's reward model."""
        return self.reward_model_weight > 0

    @property
    def bytes_per_parameter(self) -> int:
        frozen = (self.beta > 0) + (self.reward_model_weight > 0)  # the reference, the reward model
        return super().bytes_per_parameter + 4 * frozen

    def row_rules(self) -> RowRules:
        return RowRules(kind="prompts", max_length=self.max_prompt_length, overlong="drop")

    @model_validator(mode="before")
    @classmethod
    def _rollouts_are_of_the_policy(cls, values: Any) -> Any:
        given = [name for name in _OTHER_SAMPLING if isinstance(values, dict) and name in values]
        if given:
            raise ValueError(
                f"no field {', '.join(given)}: rollouts are drawn from the policy itself. Cut to a part of the "
                "vocabulary, they come from another distribution than the one whose ratio the update computes; remove "
                "it, and set temperature, which both know"
            )
        return values

    @model_validator(mode="after")
    def _random_rewards_have_a_share(self) -> Self:
        if self.reward != "random" and self.random_reward_probability != 0.5:
            raise ValueError(
                f"random_reward_probability {self.random_reward_probability:g} has no meaning for reward "
                f"{self.reward}; set reward to random, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _held_out_and_guards_fit(self) -> Self:
        if (fault := fault_of(self)) is not None:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _stopping_pays(self) -> Self:
        if self.non_stop_reward is not None and self.non_stop_reward >= self.reward_correct:
            raise ValueError(
                f"non_stop_reward {self.non_stop_reward:g} is not below reward_correct {self.reward_correct:g}: a "
                "completion that never ends would be paid as well as a right answer; lower it (Tulu 3: -10 and 10)"
            )
        return self


class _GroupSettings(RLVRSettings):
    """Algorithms whose baseline is the other rollouts of a prompt; the loop is TRL's."""

    samples_field = "num_generations"

    num_steps: int = science(ge=1, description="optimizer steps")
    num_generations: int = science(8, ge=2, description="rollouts per prompt")
    num_iterations: int = science(1, ge=1, description="optimizer passes over each rollout batch")
    steps_per_generation: int = science(1, ge=1, description="optimizer steps that share one generation batch")
    reward_correct: float = science(1.0, gt=0, description="reward of a verified completion; 10 in Tulu 3")
    non_stop_reward: float | None = science(None, description="reward of a completion without eos; None: as verified")
    epsilon_high: float | None = science(
        None, absent=None, gt=0, description="clip range above 1 (DAPO, arXiv 2503.14476: 0.28); none: epsilon"
    )
    mask_truncated_completions: bool = science(
        False, absent=False, description="completions without eos get no gradient (DAPO); they stay in the baseline"
    )

    @property
    def budget(self) -> Budget:
        return Budget(self.effective_batch_size, max_steps=self.num_steps)

    @property
    def num_rollouts(self) -> int:
        return self.effective_batch_size * self.steps_per_generation

    @property
    def num_steps_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def num_prompts(self) -> int:
        return self.num_rollouts // self.num_generations

    @property
    def num_passes(self) -> int:
        return self.num_iterations

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.effective_batch_size % self.num_generations:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}: a step must hold whole groups"
            )
        return self


class GRPOSettings(_GroupSettings):
    """Advantage: reward less the mean of its group (arXiv 2402.03300); Tulu 3.1."""

    algorithm: Literal["grpo"] = science("grpo")
    beta: float = science(0.0, ge=0, description="KL coefficient against the starting model; 0: no reference model")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = science("dapo")
    scale_rewards: Literal["group", "batch", "none"] = science("group")
    kl_form: Literal["k3", "k3_weighted"] = science(
        "k3_weighted",
        absent="k3_weighted",
        description="k3: Tulu 3.1 (arXiv 2402.03300); k3_weighted: times the policy ratio (arXiv 2512.02556), TRL",
    )
    importance_sampling_level: Literal["token", "sequence"] = science(
        "token", absent="token", description="what the ratio is of; sequence: GSPO (arXiv 2507.18071)"
    )
    delta: float | None = science(
        None, absent=None, gt=1, description="upper bound of the ratio where the advantage is negative; none: no bound"
    )
    importance_sampling_cap: float | None = _IMPORTANCE_SAMPLING_CAP
    top_entropy_quantile: float = science(
        1.0, absent=1.0, gt=0, le=1, description="share of a step's tokens, those of highest entropy, that are trained "
        "on (arXiv 2506.01939: 0.2); KL is of all",
    )  # fmt: skip

    @model_validator(mode="after")
    def _delta_is_beyond_the_clip_range(self) -> Self:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"delta {self.delta:g} is not above 1 + {high:g}, where the ratio is clipped already; raise it, or "
                "leave it out"
            )
        return self


class RLOOSettings(_GroupSettings):
    """Advantage: reward less the mean of the others of its group (arXiv 2402.14740), the KL term in the reward."""

    algorithm: Literal["rloo"] = science("rloo")
    beta: float = science(0.05, ge=0, description="KL coefficient in the reward; TRL; 0: no reference model")
    normalize_advantages: bool = science(False, description="TRL")


class PPOSettings(RLVRSettings):
    """PPO with a critic, and the KL term in the rewards (arXiv 1707.06347, 1909.08593); SmolTulu, Tulu 3.

    One rollout batch has `effective_batch_size * num_minibatches` episodes.
    """

    samples_field = "num_samples_per_prompt"

    algorithm: Literal["ppo"] = science("ppo")
    num_episodes: int = science(ge=1, description="rollouts of the whole run, those of the critic's warm-up included")
    num_samples_per_prompt: int = science(1, ge=1, description="rollouts per prompt in a rollout batch; 1: Tulu 3")
    num_minibatches: int = science(1, ge=1, description="optimizer steps for one pass over a rollout batch; 1: Tulu 3")
    num_ppo_epochs: int = science(4, ge=1, description="passes over each rollout batch; 4: Tulu 3")
    beta: float = science(0.05, ge=0, description="KL coefficient in the token rewards; 0.05: Tulu 3")
    gamma: float = science(1.0, gt=0, le=1, description="discount; 1: Tulu 3")
    gae_lambda: float = science(0.95, ge=0, le=1, description="of the advantages; 0.95: Tulu 3")
    whiten_advantages: bool = science(True, description="Tulu 3")
    reward_correct: float = science(10.0, gt=0, description="reward of a verified completion; 10: Tulu 3")
    non_stop_reward: float | None = science(
        -10.0, description="replaces the reward of a completion without eos; -10: Tulu 3; none: as verified"
    )
    importance_sampling_cap: float | None = _IMPORTANCE_SAMPLING_CAP
    critic: CriticSettings = science(CriticSettings())
    lora: LoraSettings | None = science(
        None, absent=None, description="of the policy; the reference is then the policy without it; none: Tulu 3"
    )
    rollout_batch_size: int | None = machinery(
        None, ge=1, description="rollouts that a process writes at once; none: all of a rollout batch"
    )

    @property
    def num_rollouts(self) -> int:
        return self.effective_batch_size * self.num_minibatches

    @property
    def num_prompts(self) -> int:
        return self.num_rollouts // self.num_samples_per_prompt

    @property
    def num_passes(self) -> int:
        return self.num_ppo_epochs

    @property
    def trains_critic(self) -> bool:
        return True

    @property
    def bytes_per_parameter(self) -> int:
        # With an adapter, the policy's weights are its reference's too.
        policy = 4 + 4 * (self.reward_model_weight > 0) if self.lora else super().bytes_per_parameter
        return policy + (8 if self.critic.offload_optimizer else 16)  # the critic is as large

    @property
    def num_warmup_steps_of_critic(self) -> int:
        return self.critic.warmup_steps

    @property
    def num_steps_per_rollout(self) -> int:
        return self.num_minibatches * self.num_ppo_epochs

    @property
    def budget(self) -> Budget:
        num_steps = self.num_episodes // self.num_rollouts * self.num_steps_per_rollout
        return Budget(self.effective_batch_size, max_steps=num_steps)

    @property
    def needs_reward_model(self) -> bool:
        return super().needs_reward_model or self.critic.initial == "reward_model"

    @model_validator(mode="after")
    def _episodes_divide(self) -> Self:
        size = self.num_rollouts
        if self.num_episodes % size:
            below, above = self.num_episodes // size * size, -(-self.num_episodes // size) * size
            raise ValueError(
                f"num_episodes {self.num_episodes:,} is not a multiple of the rollout batch {size:,} "
                f"(effective_batch_size {self.effective_batch_size} x num_minibatches {self.num_minibatches}); give "
                + (f"{below:,} or {above:,}" if below else f"{above:,}")
            )
        if size % self.num_samples_per_prompt:
            raise ValueError(
                f"the rollout batch {size:,} is not a multiple of num_samples_per_prompt "
                f"{self.num_samples_per_prompt}: it must hold all samples of a prompt"
            )
        num_steps = self.budget.max_steps
        assert num_steps is not None
        if self.critic.warmup_steps >= num_steps:
            raise ValueError(
                f"critic.warmup_steps {self.critic.warmup_steps:,} leaves the policy none of the run's {num_steps:,} "
                "optimizer steps; lower it, or raise num_episodes"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        """Of a policy that drops values in the update, but not in the rollout, the ratio is not 1 where it begins."""
        if self.lora is not None and self.lora.lora_dropout:
            raise ValueError(
                f"lora.lora_dropout is {self.lora.lora_dropout}; PPO compares the policy with the one that wrote the "
                "rollouts, and runs both without dropout (as Tulu 3 does); set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        """The policy's schedule counts the steps behind the critic's warm-up; a schedule of both must fit both."""
        num_steps, critic = self.budget.max_steps, self.critic
        assert num_steps is not None
        if self.schedule is not None and critic.warmup_steps:
            self.schedule.check(num_steps - critic.warmup_steps)
        if critic.lr_scheduler_type == "constant" and critic.warmup_ratio:
            raise ValueError(
                f"critic.lr_scheduler_type constant has no warm-up, and would ignore critic.warmup_ratio "
                f"{critic.warmup_ratio}; set it to 0, or take linear or cosine"
            )
        return self


def _algorithm_of(values: Any) -> Any:
    """The algorithm that values name; a recipe that names none means GRPO, which once was the only one."""
    if isinstance(values, BaseModel):
        return getattr(values, "algorithm", None)
    return values.get("algorithm", "grpo") if isinstance(values, dict) else None


AnyRLVRSettings = Annotated[
    Annotated[PPOSettings, Tag("ppo")] | Annotated[GRPOSettings, Tag("grpo")] | Annotated[RLOOSettings, Tag("rloo")],
    Discriminator(
        _algorithm_of,
        custom_error_type="algorithm",
        custom_error_message="rlvr is a mapping of names to values, with algorithm: one of ppo, grpo, rloo",
    ),
]
_ANY: TypeAdapter[Any] = TypeAdapter(AnyRLVRSettings)


def of_another_algorithm(block: dict[str, Any], algorithm: Any) -> dict[str, Any]:
    """A recipe's block without the fields that another algorithm lacks; as it is where that is none, or the same."""
    models: dict[str, type[RLVRSettings]] = {"ppo": PPOSettings, "grpo": GRPOSettings, "rloo": RLOOSettings}
    if algorithm not in models or algorithm == _algorithm_of(block):
        return block
    return {name: value for name, value in block.items() if name in models[algorithm].model_fields}


class RLVRInputs(TrainingInputs):
    """Those of RLVR."""

    reward_model: str | None = Field(None, description="folder of the reward model, where the settings need it")
    critic: str | None = Field(None, description="folder of an earlier run's critic (critic.initial: path)")
    audit: str | None = Field(None, description="audit.json of the verifier audit, where the recipe asks for one")
    pass_rates: str | None = Field(None, description="pass_rates.parquet, where prompts are left out by it")
