"""Answers sampled by vLLM instead of eval/generate.py: the same request to an engine that is built for throughput.

vLLM is no requirement and is imported where it is asked for. Its engine runs in this very process, so that no other one
outlives a kill, beside the model that is trained: with weights and a KV cache of its own, which the plan counts. Before
every call it is given what was trained since. An adapter is handed over as it is: merged into 16-bit weights, a small
update would be rounded away. Answers are scored again by training's own forward, so the last digits in which the two
differ change no gradient.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch

from data.batches import hash_seed
from data.errors import UserError
from data.labels import Example
from eval.generate import Answer, make_answer
from lora.adapter import ADAPTER, Settings, lora_layers
from lora.files import save_adapter
from model.family import Model
from model.quantize import is_quantized
from training.memory import GIB, cache_bytes, stack_from_config
from training.state import capture_random, restore_random

SERVED = ("qwen2", "qwen3")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's kernels for LoRA are made for
CARD_BYTES = 2 * GIB  # CUDA graphs, workspaces and activations of the engine: an estimate, not measured
SPARE_TOKENS = 256  # a block of the cache holds 16 tokens on a card and 128 on a processor, and one stays empty
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",  # else every start is reported to its makers
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else training's own threads are bound too
}


def check(model: Model) -> None:
    """Raises UserError where vLLM is missing, does not import, or cannot sample from this model as it is trained."""
    layers = lora_layers(model.net).values()
    for found, reason in (
        (model.family.name not in SERVED, f"is here for text models ({', '.join(SERVED)}), this one is {model.family.name}"),
        (model.prefix is not None, "knows no prefix tuning"),
        (any(map(is_quantized, model.net.modules())), "would sample from the unquantised base, which is not what is trained"),
        (any(ADAPTER in layer.lora_magnitude_vector for layer in layers), "knows no DoRA"),
        (any(layer.r[ADAPTER] > RANKS[-1] for layer in layers), f"takes no LoRA of a rank above {RANKS[-1]}"),
        (model.device.index, f"samples on the first card alone, not on {model.device}, which CUDA_VISIBLE_DEVICES can make it"),
    ):
        if found:
            raise UserError(f"--rollout_backend vllm {reason}; take --rollout_backend own")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM  # noqa: F401 - loads what a broken installation fails at
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise UserError(f"--rollout_backend vllm: there is no package {error.name}; pip install vllm==0.32.0 (for torch 2.13), "
                        "or take --rollout_backend own") from None  # fmt: skip
    except Exception as error:  # vLLM is compiled for one release of torch, and fails in many ways beside another
        raise UserError(f"--rollout_backend vllm: vLLM does not import ({one_line(error)}); pip install vllm==0.32.0 (for "
                        "torch 2.13) in a new environment, or take --rollout_backend own") from None  # fmt: skip
    if current_platform.device_type != model.device.type:
        raise UserError(f"--rollout_backend vllm: this vLLM is built for {current_platform.device_type}, and the run is on "
                        f"{model.device.type}; take --rollout_backend own")  # fmt: skip


def held_bytes(model: Model) -> int:
    """What an engine holds beside its KV cache: a second set of the weights, and what it needs to run."""
    return sum(p.numel() * p.element_size() for p in model.net.parameters()) + CARD_BYTES * (model.device.type == "cuda")


class Engine:
    """vLLM on a model that is being trained."""

    def __init__(self, model: Model, settings: Settings, dtype: torch.dtype, cache_tokens: int, max_length: int):
        """settings: those the model's adapter was attached with; dtype: of weights and computing; cache_tokens: positions of
        the KV cache; max_length: of a prompt with its answer. Raises UserError where vLLM does not start."""
        from vllm import LLM

        self.model, self.family, self.settings, self.num_updates = model, model.family, settings, 0
        config = model.net.config.get_text_config()
        self.max_length = min(max_length, config.max_position_embeddings)
        ranks = [layer.r[ADAPTER] for layer in lora_layers(model.net).values()]
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in RANKS if r >= max(ranks))} if ranks else {}
        with guarded():
            self.llm = LLM(
                str(self.family.folder), dtype=str(dtype).removeprefix("torch."), max_model_len=self.max_length,
                kv_cache_memory_bytes=(cache_tokens + SPARE_TOKENS) * cache_bytes(stack_from_config(config, 1), dtype.itemsize),
                gpu_memory_utilization=0.01,  # only has to be free at the start: the line above is what is taken
                skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs", **lora,
            )  # fmt: skip

    def generate(
        self,
        prompts: list[Example],
        max_new_tokens: int,
        stop_ids: list[int] | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[Answer]:
        """eval.generate.generate() of the model as it is now, in the same order, and by no generation_config.json either.

        Each answer has a seed of its own, made from seed and its number; the same seed gives the same answers as far as vLLM
        promises, which is not for another order of requests. logprobs are of what top_k, top_p and min_p leave.
        """
        from vllm import SamplingParams

        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.max_length:
            raise UserError(f"a prompt and its answer take up to {longest} positions, and vLLM was started for "
                            f"{self.max_length}; lower --max_length or --max_new_tokens")  # fmt: skip
        stops = self.family.stop_ids if stop_ids is None else stop_ids
        asked, parameters = [], []
        for number in range(len(prompts) * num_samples):
            asked.append({"prompt_token_ids": prompts[number // num_samples].input_ids.tolist()})
            parameters.append(SamplingParams(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=hash_seed(seed, number),
                max_tokens=max_new_tokens, stop_token_ids=stops, ignore_eos=True, detokenize=False, logprobs=0,
            ))  # fmt: skip
        with TemporaryDirectory() as folder:
            adapter = self.hand_over(folder)
            with guarded():
                outputs = self.llm.generate(asked, parameters, use_tqdm=False, lora_request=adapter)
        return [self.answer(output.outputs[0], stops) for output in outputs]

    def hand_over(self, folder: str) -> Any:
        """Give the engine what is trained as it is now: an adapter through files in folder (returns what each request has to
        name), or all weights (returns None). What the KV cache has of earlier weights is forgotten."""
        from vllm.lora.request import LoRARequest

        self.num_updates += 1
        self.llm.reset_prefix_cache()
        if lora_layers(self.model.net):
            save_adapter(self.model, self.family, folder, self.settings, self.family.folder)
            return LoRARequest(f"update-{self.num_updates}", self.num_updates, folder)
        weights = ((self.family.tensor_name(name), p.detach()) for name, p in self.model.net.named_parameters())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.model.device.type == "cpu":  # a tied head has a packed copy there, which a reload of the embedding passes by
            self.llm.apply_model(lambda net: net.lm_head.quant_method.process_weights_after_loading(net.lm_head))
        return None

    def answer(self, output: Any, stops: list[int]) -> Answer:
        """vLLM's CompletionOutput as an Answer."""
        ids = list(output.token_ids)
        logprobs = [found[token].logprob for found, token in zip(output.logprobs, ids, strict=True)]
        return make_answer(self.family, ids, logprobs, stops)


@contextmanager
def guarded() -> Iterator[None]:
    """vLLM seeds and draws from the generators that training draws from, and on a card leaves torch one thread: both are put
    back. What it raises (a kernel that it lacks, memory that is not there) becomes a sentence."""
    random, num_threads = capture_random(), torch.get_num_threads()
    try:
        yield
    except Exception as error:
        raise UserError(f"--rollout_backend vllm fails ({one_line(error)}); VLLM_LOGGING_LEVEL=INFO shows more, "
                        "--rollout_backend own does without it") from error  # fmt: skip
    finally:
        restore_random(random)
        torch.set_num_threads(num_threads)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
