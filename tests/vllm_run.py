"""Runs vLLM on a checkpoint, in a process of its own: python vllm_run.py DIRECTORY RANKS [--eager].

Prints the tokens that follow TOKENS, greedily, and their log-probabilities, as JSON.
"""

from __future__ import annotations

import json
import sys

TOKENS = [7, 8, 9, 10, 11]

if __name__ == "__main__":  # vLLM starts the other ranks by importing this file again
    from vllm import LLM, SamplingParams

    model = LLM(
        sys.argv[1],
        tensor_parallel_size=int(sys.argv[2]),
        enforce_eager="--eager" in sys.argv,
        skip_tokenizer_init=True,
        max_model_len=32,
        max_num_seqs=1,
        gpu_memory_utilization=0.3,
    )
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=1, detokenize=False)
    (output,) = model.generate([{"prompt_token_ids": TOKENS}], sampling)[0].outputs
    chosen = zip(output.token_ids, output.logprobs, strict=True)
    print("RESULT", json.dumps([(token, logs[token].logprob) for token, logs in chosen]))
