"""A real `vllm serve` of the demo's model answers, and only to those who have the key."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcache.assets import DEMO

MESSAGES = [{"role": "user", "content": "What does str.join do?"}]


def ask(served, key):
    body = {"model": served.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = Request(f"{served.base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


@torch.inference_mode()
def test_the_llama_is_the_demos_model(llama_demo):
    ids = torch.randint(0, 4096, (2, 200), generator=torch.Generator().manual_seed(0))
    expected, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (DEMO, llama_demo)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_server_says_what_the_demo_says(served_demo):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(DEMO),
        AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32),
    )
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    choice = ask(served_demo, served_demo.key)["choices"][0]
    assert choice["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("key", [None, "another"])
def test_without_the_key_it_refuses(served_demo, key):
    with pytest.raises(HTTPError) as refused:
        ask(served_demo, key)
    assert refused.value.code == 401
    refused.value.close()
