"""vLLM as an engine: beside the training on its device, or as a server on devices of its own.

NOT RUN: no card was there when this was written. It was read against the sources of vLLM 0.22 to 0.31 and TRL 1.16's
`trl.generation`, which brings weights in the same way and says which versions it does so for.
tests/tasks/generation/test_vllm_generation.py reads its requests and refusals only.

vLLM draws by itself, with a seed for each request that is made of the request's key: so its texts depend on the same
things as ours, as far as vLLM's own batches leave log-probabilities alone, but they are other texts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts import readable
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.generation.interface import Engine, Request, Sampling, Written, no_report, seed_of_request
from smoltulu.tasks.models.batches import OnBatch
from smoltulu.tasks.models.sizes import kv_bytes, model_size

if TYPE_CHECKING:
    import torch

#: What TRL 1.16 brings weights to (`trl[vllm]`).
FIRST, LAST = "0.22.0", "0.31.0"
#: Requests that a server is sent at the same time: connections that TRL's client keeps.
_AT_ONCE = 64
#: Seconds that a server may still need until it answers.
_SERVER_START_S = 240.0
#: Below, vLLM takes this instead, and says nothing; above, it refuses.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
_OTHERWISE = "or take engine: transformers"


def check_vllm(model: Path, compute: ComputeSettings, device: str, longest: int) -> None:
    """ValueError where vLLM cannot write here: absent, out of range, without a card or without room.

    longest: tokens of prompt and answer.
    """
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = None
    if fault := version_fault(version):
        raise ValueError(fault)
    if fault := length_fault(model, longest):
        raise ValueError(fault)
    if device != "cuda":
        raise ValueError(
            f"engine vllm needs a CUDA device, and this stage runs on the {device}; give it one, {_OTHERWISE}"
        )
    if compute.vllm_server is None:
        import torch

        # Of this rank's own device: a look at another would leave a context of CUDA there.
        free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
        if fault := room_fault(needed_bytes(model, longest), compute.vllm_memory_share, free, total):
            raise ValueError(fault)


def version_fault(version: str | None) -> str | None:
    """What is wrong with the installed version; None: nothing, or nothing is known."""
    if version is None:
        return (
            f"engine vllm needs the package vllm, {FIRST} to {LAST}, which is not installed: see docs/stages/rlvr.md, "
            f"What writes, {_OTHERWISE}"
        )
    from packaging.version import Version

    if not Version(FIRST) <= Version(Version(version).base_version) <= Version(LAST):
        return (
            f"engine vllm is written for vllm {FIRST} to {LAST}, and {version} is installed; install one of these, "
            f"{_OTHERWISE}"
        )
    return None


def length_fault(model: Path, longest: int) -> str | None:
    """What is wrong with texts of so many tokens: vLLM refuses more than the model has positions."""
    config = json.loads((model / "config.json").read_text())
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or longest <= positions:
        return None
    return (
        f"prompts and answers of up to {longest:,} tokens are asked for, and the model has {positions:,} positions, "
        f"which vLLM takes at its word; lower max_prompt_length or max_completion_length, {_OTHERWISE}"
    )


def grown_fault(model: Path, num_embeddings: int) -> str | None:
    """What is wrong where the policy's embeddings grew for its tokenizer: vLLM made its own as the folder says."""
    rows = json.loads((model / "config.json").read_text()).get("vocab_size")
    if rows in (None, num_embeddings):
        return None
    return (
        f"the policy has {num_embeddings:,} embeddings, since its tokenizer has more tokens than the {rows:,} of its "
        "folder's config.json, and vLLM takes those; train from a model of this recipe (its SFT has them), "
        f"{_OTHERWISE}"
    )


def needed_bytes(model: Path, longest: int) -> int:
    """Bytes of the weights in bfloat16 and of the keys and values of one text of the longest length."""
    weights = 2 * model_size(model).num_parameters
    try:
        return weights + kv_bytes(json.loads((model / "config.json").read_text()), 1, longest, 2)
    except (KeyError, TypeError):  # not a decoder with attention in every layer
        return weights


def room_fault(needed: int, share: float, free: int, total: int) -> str | None:
    """What is wrong with vLLM's share of a device's memory. All in bytes."""
    own = int(share * total)
    if needed > own:
        return (
            f"vLLM is given {share:g} of the device's {readable.size(total)}, which is {readable.size(own)}; weights "
            f"in bfloat16 and one text of the longest length need {readable.size(needed)}. Raise "
            f"compute.vllm_memory_share, name a compute.vllm_server on another device, {_OTHERWISE}"
        )
    if own > free:
        return (
            f"vLLM is to take {share:g} of the device's {readable.size(total)}, and {readable.size(free)} of it are "
            f"free: lower compute.vllm_memory_share, end what else runs there, {_OTHERWISE}"
        )
    return None


def parameters_of(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Fields of `SamplingParams`, which are those of the server's completions too.

    No defaults of a model's generation_config: nothing is cut off the distribution but what `sampling` says. The stop
    ids are ours alone.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "stop": list(sampling.stop_strings) or None,
        "ignore_eos": True,
        "seed": seed_of_request(request, sampling),
        "logprobs": 0,  # of the sampled token
    }


def written(ids: Sequence[int], logps: Sequence[float | None], sampling: Sampling) -> Written:
    """What vLLM gives, as every engine gives it. RuntimeError where a token has no log-probability."""
    known = [one for one in logps if one is not None and not math.isnan(one)]
    if not ids or len(known) != len(ids):
        raise RuntimeError(
            f"vLLM gave no log-probabilities of the {len(ids):,} tokens that it wrote; are its weights finite? Report "
            f"the versions of vllm and torch, {_OTHERWISE}"
        )
    stopped = ids[-1] in sampling.stop_ids
    return Written(list(ids), stopped, known if sampling.temperature > 0 else [])


def vllm_engine(model: Path, compute: ComputeSettings, accelerator: Any, longest: int) -> Engine:
    """The engine that `compute` asks for; see `check_vllm`."""
    if compute.vllm_server is not None:
        return ServedEngine(compute.vllm_server, accelerator)
    return ColocatedEngine(model, compute, accelerator, longest)


class ColocatedEngine:
    """vLLM in the process of the training, on its device: an engine a rank. It sleeps between rollouts.

    Asleep it has no weights (level 2). They are brought when it wakes, so it never writes with those that it once read
    from its folder (trl#5312), and only after its memory is mapped again (trl#5142).
    """

    def __init__(self, model: Path, compute: ComputeSettings, accelerator: Any, longest: int) -> None:
        import torch
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM

        # What the launcher below reads; torchrun has set it where there are several processes.
        os.environ.setdefault("RANK", str(accelerator.process_index))
        os.environ.setdefault("LOCAL_RANK", str(accelerator.local_process_index))
        os.environ.setdefault("WORLD_SIZE", str(accelerator.num_processes))
        # Without it vLLM sets one thread for the whole process, and an offloaded optimizer crawls.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        if conf := os.environ.get("PYTORCH_ALLOC_CONF"):
            # Under the old name vLLM looks whether it must keep expandable segments out of what it gives back.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", conf)
        ensure_master_addr_port()
        self._sleeps, self._is_asleep = compute.vllm_sleep, False
        self._llm = LLM(
            model=str(model),
            dtype="bfloat16",
            max_model_len=longest,
            gpu_memory_utilization=compute.vllm_memory_share,
            enable_sleep_mode=compute.vllm_sleep,
            distributed_executor_backend="external_launcher",  # in this process, on this rank's device
            max_num_batched_tokens=max(4096, longest),
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
            generation_config="vllm",  # none of the model's own defaults
            trust_remote_code=False,
        )
        if conf:
            # vLLM sets one option of torch's allocator while it loads, and torch then forgets the others.
            torch._C._accelerator_setAllocatorSettings(conf)

    def generate(self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch = no_report) -> list[Written]:
        from vllm import SamplingParams

        how = {"detokenize": bool(sampling.stop_strings)}
        # A rank may have no prompt of its own, and sleeps all the same.
        made: Any = requests and self._llm.generate(
            [{"prompt_token_ids": list(one.prompt_ids)} for one in requests],
            sampling_params=[SamplingParams(**parameters_of(one, sampling), **how) for one in requests],
            use_tqdm=False,
        )
        texts = [one.outputs[0] for one in made]
        on_batch(len(texts), len(requests))
        if self._sleeps:
            self._llm.sleep(level=2)
            self._is_asleep = True
        return [written(one.token_ids, _own(one.token_ids, one.logprobs), sampling) for one in texts]

    def logps(self, ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [made] = self._llm.generate([{"prompt_token_ids": list(ids)}], sampling_params=how, use_tqdm=False)
        return _own(ids[1:], made.prompt_logprobs[1:])

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        import torch

        if self._is_asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
        model = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
        for named in weights:
            model.load_weights([named])
        if self._is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of older weights: it would write with both. Report it")


class ServedEngine:
    """vLLM on devices of its own, behind `vllm serve` with its weight transfer on; TRL's client speaks to it.

    The main process brings the weights. Every process sends its own requests. The server must be started with
    `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype bfloat16 --generation-config vllm --logprobs-mode
    processed_logprobs --weight-transfer-config '{"backend": "nccl"}'`: without that mode it takes no weights.
    """

    def __init__(self, url: str, accelerator: Any) -> None:
        from trl.generation.vllm_client import VLLMClient

        self._client, self._accelerator = VLLMClient(base_url=url, connection_timeout=_SERVER_START_S), accelerator
        if accelerator.is_main_process:
            self._client.init_communicator(device=accelerator.device)

    def generate(self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch = no_report) -> list[Written]:
        def send(request: Request) -> Written:
            how = parameters_of(request, sampling)
            made = self._client.generate([list(request.prompt_ids)], generation_kwargs=how)
            [ids], [logps] = made["completion_ids"], made["logprobs"]
            return written(ids, [one[0] for one in logps], sampling)

        with ThreadPoolExecutor(_AT_ONCE) as threads:
            made = list(threads.map(send, requests))
        on_batch(len(made), len(requests))
        return made

    def logps(self, ids: Sequence[int]) -> list[float]:
        made = self._client.get_sequence_logprobs([list(ids)], [1], top_logprobs=1)
        return [one[0] for one in made["actual_logprobs"][0]]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._accelerator.is_main_process:
            import torch

            whole = [(name, weight.to(torch.bfloat16)) for name, weight in weights]
            self._client.update_named_params(
                [(name, "bfloat16", list(weight.shape)) for name, weight in whole], iter(whole)
            )
            self._client.reset_prefix_cache()
        else:
            for _ in weights:  # takes part in gathering what is sharded
                pass
        self._accelerator.wait_for_everyone()


def _own(ids: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    """Log-probability of each id, out of what vLLM gives for its place: {id: Logprob}. NaN where it is not among them:
    so some versions answer a probe (vllm#44106), which then counts as stale."""
    return [
        float(places[one].logprob) if one in places else math.nan for one, places in zip(ids, logprobs, strict=True)
    ]
