"""Runs in the Python that has vLLM and no fastrlhf: a model, and a line of JSON back for each line of JSON.

    python -c "$(cat vllm_worker.py)" FOLDER DTYPE THREADS MOST_TOKENS MOST_SEQUENCES

An answer gives the lengths of the responses, in the order of the prompts.
"""

import json
import os
import sys

GIB = 2**30


def main(folder: str, dtype: str, threads: str, most_tokens: str, most_sequences: str) -> None:
    # vLLM prints where it likes: what stands for standard output from now on is standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = threads
    # With a core for itself, as by default, vLLM would leave one idle; and nothing of it is to run between requests.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=int(most_tokens),
        max_num_seqs=int(most_sequences),
        kv_cache_memory_bytes=GIB,
        enable_prefix_caching=False,  # the same prompts come again and again
        logprobs_mode="raw_logprobs",
    )
    answers.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        params = [
            SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
            for length in request["lengths"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.write(json.dumps([len(output.outputs[0].token_ids) for output in outputs]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
